//! Leases over the wire: real masters, sessions in this process.

use crate::harness::{Group, PATIENCE, eventually};
use efc_client::lease::{LeaseLink, News, Who};
use efc_client::master::MasterClient;
use efc_common::Kind;
use efc_common::id::{Incarnation, SessionId, SourceId};
use efc_common::lease::{Ask, Claim, DirKey, GrantNumber, Mode, RequestId, Scope, Tell, Want};
use efc_common::task::TaskGroup;
use efc_fuse::lease::{Holder, LeaseGuard, Leases, Under};
use efc_proto::control::LeaseAsk;
use efc_proto::control::leases_client::LeasesClient;
use efc_proto::lease::{Up, up_to_wire};
use efc_proto::status::from_status;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

const FLAGS: [&str; 2] = ["--lease", "2s"];
const LEASE: Duration = Duration::from_secs(2);

fn dir(key: &str) -> DirKey {
    DirKey::new(SourceId([0; 16]), key.as_bytes()).expect("short")
}

/// A session that does what the test says.
struct Client {
    link: LeaseLink,
    news: mpsc::Receiver<News>,
    tasks: TaskGroup,
    session: SessionId,
    life: Incarnation,
    term: u64,
    requests: u64,
}

impl Client {
    async fn start(master: MasterClient) -> Client {
        let tasks = TaskGroup::new();
        let who = Who { client: "host:1:/mnt".into(), dataset: "d".into() };
        let (link, news) = LeaseLink::start(master, who, None, &tasks);
        let (session, life) = (SessionId(0), Incarnation(0));
        let mut c = Client { link, news, tasks, session, life, term: 0, requests: 0 };
        c.open().await;
        c
    }

    async fn open(&mut self) {
        self.link.open();
        let opened = self
            .hear(|n| match n {
                News::Opened { session, incarnation, welcome, .. } => Some((*session, *incarnation, *welcome)),
                _ => None,
            })
            .await;
        assert_eq!(opened.2.lease, LEASE);
        (self.session, self.life, self.term) = (opened.0, opened.1, opened.2.term);
        self.renewed().await;
    }

    /// Hears until there is what is meant.
    async fn hear<T>(&mut self, mut pick: impl FnMut(&News) -> Option<T>) -> T {
        let listen = async {
            loop {
                let news = self.news.recv().await.expect("the link lives");
                if let Some(found) = pick(&news) {
                    return found;
                }
                assert!(!matches!(news, News::Refused { .. }), "{news:?}");
            }
        };
        timeout(PATIENCE, listen).await.expect("said in time")
    }

    async fn renewed(&mut self) -> u64 {
        let term = self.hear(|n| if let News::Renewed { term, .. } = n { Some(*term) } else { None }).await;
        self.term = term;
        term
    }

    async fn refused(&mut self) -> Incarnation {
        self.hear(|n| if let News::Refused { incarnation } = n { Some(*incarnation) } else { None }).await
    }

    async fn granted(&mut self) -> (Mode, GrantNumber) {
        self.hear(|n| match n {
            News::Told { tell: Tell::Grant { mode, number, .. }, .. } => Some((*mode, *number)),
            _ => None,
        })
        .await
    }

    async fn recalled(&mut self) -> GrantNumber {
        self.hear(|n| match n {
            News::Told { tell: Tell::Recall { number, .. }, .. } => Some(*number),
            _ => None,
        })
        .await
    }

    /// Hears nothing of leases for a while.
    async fn hears_no_grant(&mut self, during: Duration) {
        let grant = self.granted();
        let _ = timeout(during, grant).await.map(|g| panic!("granted {g:?}"));
    }

    fn ask(&mut self, want: Want) {
        self.requests += 1;
        let ask = Ask::Acquire { request: RequestId(self.requests), wants: vec![want] };
        assert!(self.link.say(self.life, ask));
    }

    fn release(&self, key: &str, number: GrantNumber) {
        let ask = Ask::Release { scope: Scope::Dir(dir(key)), number, keep_shared: false };
        assert!(self.link.say(self.life, ask));
    }

    fn claim(&mut self, held: Option<(&str, GrantNumber)>) {
        self.requests += 1;
        let claim =
            |(key, number)| Claim { scope: Scope::Dir(dir(key)), mode: Mode::Exclusive, number, exceptions: vec![] };
        let claims = held.map(claim).into_iter().collect();
        let ask = Ask::Reclaim {
            request: RequestId(self.requests),
            term: self.term,
            claims,
            part: 0,
            parts: 1,
            locks: vec![],
        };
        assert!(self.link.say(self.life, ask));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn exclusive_excludes_until_it_is_given_back() {
    let g = Group::start(1, &FLAGS).await;
    let (mut a, mut b) = (Client::start(g.client()).await, Client::start(g.client()).await);
    a.ask(Want::change(dir("x/")));
    let (mode, number) = a.granted().await;
    assert_eq!(mode, Mode::Exclusive);
    b.ask(Want::read(dir("x/")));
    assert_eq!(a.recalled().await, number);
    // As long as it is renewed and not given back, time changes nothing.
    b.hears_no_grant(2 * LEASE).await;
    a.release("x/", number);
    let (mode, next) = b.granted().await;
    assert!(mode == Mode::Shared && next > number);
    let text = g.nodes[0].http_get("/metrics").await;
    for line in ["efc_master_lease_grants_total 2", "efc_master_leases "] {
        assert!(text.contains(line), "{line}");
    }
    // A goodbye passes on at once.
    b.ask(Want::change(dir("y/")));
    b.granted().await;
    a.ask(Want::change(dir("y/")));
    let began = Instant::now();
    b.link.close().await;
    a.granted().await;
    assert!(began.elapsed() < LEASE / 2, "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_falls_silent_is_fenced_and_its_lease_passes_on() {
    let g = Group::start(1, &FLAGS).await;
    let (mut a, mut b) = (Client::start(g.client()).await, Client::start(g.client()).await);
    let mut reader = Client::start(g.client()).await;
    reader.ask(Want::read(dir("z/")));
    reader.granted().await;
    a.ask(Want::change(dir("x/")));
    a.granted().await;
    b.ask(Want::change(dir("x/")));
    a.renewed().await;
    let began = Instant::now();
    assert!(a.tasks.shutdown(PATIENCE).await);
    b.granted().await;
    let took = began.elapsed();
    assert!(took > LEASE / 2 && took < 3 * LEASE, "{took:?}");
    let open = g.client().list_sessions().await.expect("list");
    assert!(open.iter().all(|s| s.session != a.session.0) && open.len() == 2, "{open:?}");
    let again = g.client().open_session("c", "d", Some((a.session, a.life)), true).await;
    assert!(again.is_err_and(|e| e.is(Kind::NotFound)), "its life is over for good");
    assert!(g.nodes[0].http_get("/metrics").await.contains("efc_master_fences_total 1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_without_leases_lives_by_its_own_time_and_delays_no_claims() {
    let mut g = Group::start(1, &["--lease", "20s", "--session-expire", "20s"]).await;
    let plain = g.client().open_session("c", "d", None, false).await.expect("open");
    g.nodes[0].kill().await;
    g.start_all().await;
    let leasing = g.client().open_session("c", "d", None, true).await.expect("open");
    assert_eq!((plain.expire_ms, plain.term, leasing.expire_ms), (20_000, 0, 20_000));
    // Nobody owes a claim, so the new office grants at once.
    let (up, down) = talk(&g.nodes[0].grpc).await;
    let hello = Up::Hello { session: SessionId(leasing.session), incarnation: Incarnation(leasing.incarnation) };
    up.send(up_to_wire(&hello)).await.expect("sent");
    let ask = Ask::Acquire { request: RequestId(1), wants: vec![Want::read(dir("a/"))] };
    up.send(up_to_wire(&Up::Ask(ask))).await.expect("sent");
    let mut down = timeout(PATIENCE, down).await.expect("in time").expect("ran").expect("welcome").into_inner();
    for _ in 0..2 {
        timeout(LEASE, down.message()).await.expect("at once").expect("no error").expect("a word");
    }
}

/// The leases of sessions survive their leader: by claims, with no grant in between, and who waited goes on.
async fn over_a_crash(mut g: Group) {
    let (mut a, mut b) = (Client::start(g.client()).await, Client::start(g.client()).await);
    a.ask(Want::change(dir("x/")));
    let (_, held) = a.granted().await;
    b.ask(Want::change(dir("x/")));
    a.recalled().await;
    let leader = g.leader().await;
    let before = a.term;
    g.nodes[leader].kill().await;
    if g.nodes.len() == 1 {
        g.start_all().await;
    }
    while a.renewed().await == before {}
    while b.renewed().await == before {}
    assert!(a.term > before && a.term == b.term);
    b.claim(None);
    b.ask(Want::change(dir("x/")));
    a.claim(Some(("x/", held)));
    let (mode, confirmed) = a.granted().await;
    assert!(mode == Mode::Exclusive && confirmed > held && confirmed.term() == a.term);
    // All have claimed, so b's want is heard again: but it gets nothing before a has answered.
    assert_eq!(a.recalled().await, confirmed);
    b.hears_no_grant(LEASE / 2).await;
    a.release("x/", confirmed);
    let (_, passed) = b.granted().await;
    assert!(passed > confirmed);
    g.start_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_survive_a_new_leader() {
    over_a_crash(Group::start(3, &FLAGS).await).await;
}

/// Here Raft goes on in the same term, but the memory is gone.
#[tokio::test(flavor = "multi_thread")]
async fn leases_survive_a_leader_that_comes_back() {
    over_a_crash(Group::start(1, &FLAGS).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_leader_waits_for_the_claims_of_the_silent() {
    let mut g = Group::start(3, &FLAGS).await;
    let (mut a, mut b) = (Client::start(g.client()).await, Client::start(g.client()).await);
    a.ask(Want::change(dir("x/")));
    a.granted().await;
    let leader = g.leader().await;
    let before = b.term;
    // a is cut off from everybody, and believes for the rest of its time.
    a.renewed().await;
    let silent = Instant::now();
    assert!(a.tasks.shutdown(PATIENCE).await);
    g.nodes[leader].kill().await;
    while b.renewed().await == before {}
    b.claim(None);
    b.ask(Want::change(dir("x/")));
    let granting = async {
        // Its owner says it again, as the first may have been lost.
        loop {
            match timeout(LEASE / 2, b.granted()).await {
                Ok(_) => return,
                Err(_) => b.ask(Want::change(dir("x/"))),
            }
        }
    };
    timeout(PATIENCE, granting).await.expect("passes on");
    assert!(silent.elapsed() >= LEASE, "{:?}", silent.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_life_that_is_taken_over_is_refused() {
    let g = Group::start(1, &FLAGS).await;
    let mut a = Client::start(g.client()).await;
    let first = a.life;
    a.ask(Want::change(dir("x/")));
    a.granted().await;
    let next = g.client().open_session("c", "d", Some((a.session, first)), true).await.expect("resume");
    assert!(next.incarnation > first.0);
    assert_eq!(a.refused().await, first);
    // Its owner drops all and wants a life: what it resumes is unknown, so it gets another session.
    let old = a.session;
    a.open().await;
    assert!(a.session != old && a.life.0 > next.incarnation);
}

async fn talk(
    addr: &str,
) -> (
    mpsc::Sender<LeaseAsk>,
    tokio::task::JoinHandle<Result<tonic::Response<tonic::Streaming<efc_proto::control::LeaseTell>>, tonic::Status>>,
) {
    let mut client = LeasesClient::connect(format!("http://{addr}")).await.expect("connect");
    let (up, mut queue) = mpsc::channel(16);
    let call = async move { client.talk(futures::stream::poll_fn(move |cx| queue.poll_recv(cx))).await };
    (up, tokio::spawn(call))
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_ends_its_stream_and_nothing_else() {
    let g = Group::start(1, &FLAGS).await;
    let mut good = Client::start(g.client()).await;
    let open = g.client().open_session("c", "d", None, true).await.expect("open");
    let plain = g.client().open_session("c", "d", None, false).await.expect("open");
    let hello = |session: u64, incarnation: u64| {
        up_to_wire(&Up::Hello { session: SessionId(session), incarnation: Incarnation(incarnation) })
    };
    let empty = LeaseAsk { ask: None };
    for (first, kind) in [
        (empty.clone(), Kind::Corrupt),
        (up_to_wire(&Up::Renew { renewal: 1 }), Kind::Invalid),
        (hello(999, 1), Kind::NotFound),
        (hello(open.session, open.incarnation + 99), Kind::Stale),
        (hello(plain.session, plain.incarnation), Kind::Invalid),
    ] {
        let (up, answer) = talk(&g.nodes[0].grpc).await;
        up.send(first.clone()).await.expect("sent");
        let status = timeout(PATIENCE, answer).await.expect("in time").expect("ran").expect_err("refused");
        assert_eq!(from_status(&status).kind(), kind, "{first:?}: {status}");
    }
    for bad in [empty, hello(open.session, open.incarnation)] {
        let (up, answer) = talk(&g.nodes[0].grpc).await;
        up.send(hello(open.session, open.incarnation)).await.expect("sent");
        up.send(bad).await.expect("sent");
        let mut down = timeout(PATIENCE, answer).await.expect("in time").expect("ran").expect("welcome").into_inner();
        let mut words = 0;
        let end = loop {
            match timeout(PATIENCE, down.message()).await.expect("ends") {
                Ok(Some(_)) => words += 1,
                end => break end,
            }
        };
        assert!(end.is_err() && words == 1, "{end:?} {words}");
    }
    good.ask(Want::change(dir("x/")));
    good.granted().await;
    // The one that never spoke sense was silent, and has ended.
    let sessions = || async { g.client().list_sessions().await };
    eventually("fenced", sessions, |l| l.as_ref().is_ok_and(|l| l.iter().all(|s| s.session != open.session)))
        .await
        .expect("list");
}

/// Counts what it is asked to do.
#[derive(Default)]
struct Counting {
    flushed: AtomicU64,
    dropped: AtomicU64,
    lost: AtomicU64,
}

#[async_trait::async_trait]
impl Holder for Counting {
    async fn flush(&self, _: &Scope) {
        self.flushed.fetch_add(1, SeqCst);
    }
    async fn drop_cached(&self, _: &Scope) {
        self.dropped.fetch_add(1, SeqCst);
    }
    async fn drop_all(&self) {
        self.lost.fetch_add(1, SeqCst);
    }
}

struct Mount {
    leases: Leases,
    holder: Arc<Counting>,
    tasks: TaskGroup,
}

impl Mount {
    fn start(master: MasterClient) -> Mount {
        let (tasks, holder) = (TaskGroup::new(), Arc::<Counting>::default());
        let who = Who { client: "host:1:/mnt".into(), dataset: "d".into() };
        let leases = Leases::start(master, who, Default::default(), holder.clone(), &tasks, None);
        leases.begin();
        Mount { leases, holder, tasks }
    }

    async fn guard(&self, want: Want) -> LeaseGuard {
        timeout(PATIENCE, self.leases.guard(vec![want])).await.expect("in time").expect("granted")
    }

    fn counted(&self) -> (u64, u64, u64) {
        let h = &self.holder;
        (h.flushed.load(SeqCst), h.dropped.load(SeqCst), h.lost.load(SeqCst))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mounts_take_turns_and_tell_their_holders() {
    let g = Group::start(1, &FLAGS).await;
    let (a, b) = (Mount::start(g.client()), Mount::start(g.client()));
    let (change, read) = (Want::change(dir("x/")), Want::read(dir("x/")));
    assert!(a.leases.try_guard(&change).is_none());
    let guard = a.guard(change.clone()).await;
    assert!(matches!(guard.how(), Under::Believed { until } if until > Instant::now()) && guard.holds());
    drop(guard);
    let again = a.leases.try_guard(&change).expect("held");
    // A change of b waits for the guard, then for the flush and the drop; one that gives up leaves no trace.
    let gave_up = timeout(LEASE / 8, b.leases.guard(vec![change.clone()])).await;
    assert!(gave_up.is_err() && b.leases.counts().waiting == 0);
    let (waiting, ()) = tokio::join!(b.guard(change.clone()), async {
        tokio::time::sleep(LEASE / 8).await;
        assert_eq!(a.counted(), (0, 0, 0), "a guard is out");
        drop(again);
    });
    assert_eq!(a.counted(), (1, 1, 0));
    assert!(a.leases.try_guard(&read).is_none());
    // a's reader comes when b has given up being exclusive, which it may keep to shared.
    let (reader, ()) = tokio::join!(a.guard(read.clone()), async { drop(waiting) });
    drop(reader);
    let both = a.guard(read.clone()).await;
    assert_eq!(a.counted().2 + b.counted().2, 0);
    drop(both);
    a.leases.close(PATIENCE).await;
    assert!(a.leases.guard(vec![read]).await.is_err_and(|e| e.is(Kind::Cancelled)));
    let left = g.client().list_sessions().await.expect("list").len();
    assert_eq!((left, a.counted().2), (1, 1));
    assert!(a.tasks.shutdown(PATIENCE).await && b.tasks.shutdown(PATIENCE).await);
}

/// Writers in turns over crashes of the leader: at no time two of them.
#[tokio::test(flavor = "multi_thread")]
async fn no_two_change_one_thing_whoever_leads() {
    let mut g = Group::start(3, &FLAGS).await;
    let mounts: Vec<Mount> = (0..3).map(|_| Mount::start(g.client())).collect();
    let (inside, turns) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
    let tasks = TaskGroup::new();
    for m in &mounts {
        let (leases, inside, turns) = (m.leases.clone(), inside.clone(), turns.clone());
        tasks.spawn(async move {
            loop {
                let guard = leases.guard(vec![Want::change(dir("x/"))]).await.expect("granted");
                assert_eq!(inside.fetch_add(1, SeqCst), 0, "two at once");
                tokio::time::sleep(Duration::from_millis(2)).await;
                assert_eq!(inside.fetch_sub(1, SeqCst), 1, "two at once");
                turns.fetch_add(1, SeqCst);
                drop(guard);
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
    }
    let more = |n: u64| {
        let (goal, turns) = (turns.load(SeqCst) + n, turns.clone());
        async move { eventually("turns", || async { turns.load(SeqCst) }, |t| *t >= goal).await }
    };
    more(20).await;
    for _ in 0..2 {
        let leader = g.leader().await;
        g.nodes[leader].kill().await;
        more(20).await;
        g.start_all().await;
    }
    more(20).await;
    assert!(tasks.shutdown(PATIENCE).await);
    for m in mounts {
        m.leases.close(PATIENCE).await;
        assert!(m.tasks.shutdown(PATIENCE).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mount_that_lost_its_session_drops_all_and_goes_on() {
    let mut g = Group::start(1, &FLAGS).await;
    let a = Mount::start(g.client());
    let want = Want::change(dir("x/"));
    drop(a.guard(want.clone()).await);
    g.nodes[0].kill().await;
    // Belief ends by the mount's own clock.
    eventually("all is dropped", || async { a.counted().2 }, |n| *n == 1).await;
    assert!(a.leases.try_guard(&want).is_none() && a.leases.believed_until() <= Instant::now());
    g.start_all().await;
    assert!(a.guard(want).await.holds());
    assert!(a.tasks.shutdown(PATIENCE).await);
}
