//! The link on which one session speaks of leases with whoever leads the masters. It opens the session when its owner wants one, finds the
//! leader, keeps one stream to it, renews, and goes to the next leader when this one falls silent. No policy: what is held, asked and given
//! back is its owner's business, and so is when a life of the session is over.
//!
//! Nothing is kept for a leader that cannot be reached: words that cannot be sent now are lost. Both engines say again what matters.
//!
//! A life is opened only when the owner asks for it, because only the owner knows that nothing of the old life is under way to the origin. It is
//! a compare-and-set on the last life, which can be that of a process that died: when that turns out to be over or unknown, a new session is opened.

use crate::master::{MasterClient, of_transport};
use efc_common::hint::Hint;
use efc_common::id::{Incarnation, SessionId};
use efc_common::lease::{Ask, Tell};
use efc_common::lock::{LockState, LockTell};
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use efc_proto::control::{LeaseAsk, LeaseTell};
use efc_proto::lease::{Down, LIST_MAX, Up, Welcome, down_from_wire, up_to_wire};
use std::collections::VecDeque;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tonic::Streaming;

/// Words that wait to be sent; more are lost.
const UP_QUEUE: usize = 8192;
/// Words that wait for the owner.
const DOWN_QUEUE: usize = 1024;
/// Between the link and the stream itself.
const STREAM_QUEUE: usize = 64;
/// Renewals whose answers are still waited for; older ones are forgotten.
const RENEWALS_MAX: usize = 16;
/// For a leader to let a stream in.
const WELCOME_DEADLINE: Duration = Duration::from_secs(2);
/// Pause after a failure; doubles up to the maximum, with jitter.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// Lives in a row that predecessors may have opened and not kept the number of.
const UNHEARD_MAX: u32 = 3;
const GOODBYE: Duration = Duration::from_secs(2);

/// What the link tells its owner, in order.
#[derive(Debug, Clone)]
pub enum News {
    /// A life of the session was opened, as asked for by [`LeaseLink::open`].
    Opened {
        /// The session.
        session: SessionId,
        /// Its new life.
        incarnation: Incarnation,
        /// It follows on the last one of the same session, whose advisory locks wait to be claimed in it; the leader wants to hear of them once more by
        /// [`Ask::Reclaim`].
        resumed: bool,
        /// The leader's office and times.
        welcome: Welcome,
        /// When the question was sent.
        sent: Instant,
    },
    /// A renewal was answered.
    Renewed {
        /// Of this life.
        incarnation: Incarnation,
        /// The office of the leader that answered.
        term: u64,
        /// When it was sent.
        sent: Instant,
    },
    /// The masters say that this life is over.
    Refused {
        /// Which.
        incarnation: Incarnation,
    },
    /// A master speaks of advisory locks.
    Lock {
        /// To this life.
        incarnation: Incarnation,
        /// What.
        tell: LockTell,
    },
    /// Others changed something, says the store.
    Hint(Hint),
    /// A master speaks of leases.
    Told {
        /// To this life.
        incarnation: Incarnation,
        /// What.
        tell: Tell,
    },
}

/// Who opens sessions.
#[derive(Debug, Clone)]
pub struct Who {
    /// What the masters list it as: `host:pid:mountpoint`.
    pub client: String,
    /// What is mounted.
    pub dataset: String,
}

/// Handle of the link; the link itself is a task.
#[derive(Debug)]
pub struct LeaseLink {
    asks: mpsc::Sender<(Incarnation, Up)>,
    wish: watch::Sender<Wish>,
}

/// What the owner wants.
#[derive(Debug, Default)]
struct Wish {
    /// How many lives were asked for.
    lives: u64,
    /// The session is to end.
    close: bool,
}

impl LeaseLink {
    /// Begins a link as a task of `tasks`. Nothing is opened before [`LeaseLink::open`], whose first life follows on `last`, if a predecessor has left
    /// one. If the group stops or the handle is dropped, it falls silent without a goodbye: somebody may still believe something.
    pub fn start(
        master: MasterClient,
        who: Who,
        last: Option<(SessionId, Incarnation)>,
        tasks: &TaskGroup,
    ) -> (LeaseLink, mpsc::Receiver<News>) {
        let (asks, asked) = mpsc::channel(UP_QUEUE);
        let (news, heard) = mpsc::channel(DOWN_QUEUE);
        let (wish, wanted) = watch::channel(Wish::default());
        let worker = Worker { master, who, asked, wanted, news, last, unheard: last.map_or(0, |_| UNHEARD_MAX) };
        tasks.spawn(worker.run());
        (LeaseLink { asks, wish }, heard)
    }

    /// Wants a (new) life of the session. What was believed in the last one has been dropped, and nothing of it is under way.
    pub fn open(&self) {
        self.wish.send_modify(|w| w.lives += 1);
    }

    /// Ends the session, so that its leases pass on at once, and the link. Only when nothing is believed any more. A goodbye that nobody hears
    /// only costs others the lease time.
    pub async fn close(&self) {
        self.wish.send_modify(|w| w.close = true);
        let _ = timeout(GOODBYE, self.wish.closed()).await;
    }

    /// Says something in a life; false if it is lost at once.
    pub fn say(&self, incarnation: Incarnation, ask: Ask) -> bool {
        in_messages(ask).into_iter().all(|ask| self.asks.try_send((incarnation, Up::Ask(ask))).is_ok())
    }

    /// Says in a life what an owner of advisory locks has and wants; false if it is lost at once.
    pub fn say_locks(&self, incarnation: Incarnation, state: LockState) -> bool {
        self.asks.try_send((incarnation, Up::Locks(state))).is_ok()
    }
}

/// Lists that are too long for one message, in several.
fn in_messages(ask: Ask) -> Vec<Ask> {
    match ask {
        Ask::Acquire { request, wants } if wants.len() > LIST_MAX => {
            wants.chunks(LIST_MAX).map(|w| Ask::Acquire { request, wants: w.to_vec() }).collect()
        }
        Ask::Cancel { wants } if wants.len() > LIST_MAX => {
            wants.chunks(LIST_MAX).map(|w| Ask::Cancel { wants: w.to_vec() }).collect()
        }
        ask => vec![ask],
    }
}

/// Why a stream or a life ended.
enum End {
    /// The owner wants another life, or the link stops.
    Wanted,
    /// The masters refuse this life.
    Refused,
    /// Try the next leader.
    Failed(Error),
}

impl From<Error> for End {
    fn from(e: Error) -> End {
        match e.kind() {
            Kind::NotFound | Kind::Stale => End::Refused,
            _ => End::Failed(e),
        }
    }
}

/// The session as it was opened.
#[derive(Clone, Copy)]
struct Life {
    session: SessionId,
    incarnation: Incarnation,
    lease: Duration,
}

struct Worker {
    master: MasterClient,
    who: Who,
    asked: mpsc::Receiver<(Incarnation, Up)>,
    wanted: watch::Receiver<Wish>,
    news: mpsc::Sender<News>,
    last: Option<(SessionId, Incarnation)>,
    /// So many lives of `last` may have been opened after it.
    unheard: u32,
}

/// Grows with each failure, up to a bound: a fraction of the lease time once that is known, since a new leader waits no longer than that.
struct Pause {
    next: Duration,
    max: Duration,
}

impl Pause {
    fn new(max: Duration) -> Pause {
        Pause { next: PAUSE_MIN, max: max.clamp(PAUSE_MIN, PAUSE_MAX) }
    }

    async fn wait(&mut self) {
        sleep(self.next.mul_f64(rand::random_range(0.5..1.0))).await;
        self.next = (self.next * 2).min(self.max);
    }
}

/// One stream to one leader.
struct Stream {
    up: mpsc::Sender<LeaseAsk>,
    down: Streaming<LeaseTell>,
    welcome: Welcome,
    /// Renewals that are not answered, oldest first.
    renewals: VecDeque<(u64, Instant)>,
    /// When the last answer to a renewal came, or the stream began.
    answered: Instant,
}

impl Worker {
    /// One life after the other; ends when the owner has gone or closes the link.
    async fn run(mut self) {
        while self.wanted.changed().await.is_ok() && !self.news.is_closed() {
            if self.wanted.borrow_and_update().close {
                return self.goodbye().await;
            }
            let mut pause = Pause::new(PAUSE_MAX);
            let mut told = false;
            let life = loop {
                match self.open().await {
                    Ok(life) => break Some(life),
                    Err(e) if e.is(Kind::Stale) && self.last.is_some() => {
                        tracing::info!(error = %e, "the predecessor had opened a life that it did not hear of");
                    }
                    Err(e) => {
                        if !std::mem::replace(&mut told, true) {
                            tracing::warn!(error = %e, "no session with the masters; tries again");
                        }
                        tokio::select! {
                            () = pause.wait() => {}
                            () = another(&self.wanted) => break None,
                        }
                    }
                }
            };
            let Some(life) = life else { continue };
            self.last = Some((life.session, life.incarnation));
            self.talk(life).await;
        }
    }

    async fn goodbye(&self) {
        if let Some((session, incarnation)) = self.last {
            let _ = timeout(GOODBYE, self.master.close_session(session, incarnation)).await;
        }
    }

    async fn open(&mut self) -> Result<Life> {
        let sent = Instant::now();
        let reply = match self.master.open_session(&self.who.client, &self.who.dataset, self.last, true).await {
            Err(e) if matches!(e.kind(), Kind::NotFound | Kind::Stale) => {
                // A predecessor may have died before it kept the number of a life that it had opened.
                let unheard = e.is(Kind::Stale) && self.unheard > 0;
                self.unheard = self.unheard.saturating_sub(1);
                self.last = self.last.filter(|_| unheard).map(|(session, life)| (session, Incarnation(life.0 + 1)));
                return Err(e);
            }
            reply => reply?,
        };
        self.unheard = 0;
        let welcome = Welcome::new(reply.term, reply.expire_ms, reply.margin_ms)?;
        let life = Life {
            session: SessionId(reply.session),
            incarnation: Incarnation(reply.incarnation),
            lease: welcome.lease,
        };
        let Life { session, incarnation, .. } = life;
        let resumed = self.last.is_some_and(|(last, _)| last == session);
        self.tell(News::Opened { session, incarnation, resumed, welcome, sent }).await?;
        Ok(life)
    }

    async fn tell(&self, news: News) -> Result<()> {
        self.news.send(news).await.map_err(|_| Error::new(Kind::Cancelled, "nobody listens to the link"))
    }

    /// Goes from leader to leader until the life is over.
    async fn talk(&mut self, life: Life) {
        let mut pause = Pause::new(life.lease / 20);
        loop {
            let ended = match self.connect(life).await {
                Ok(stream) => {
                    pause = Pause::new(life.lease / 20);
                    self.exchange(life, stream).await
                }
                Err(end) => end,
            };
            match ended {
                End::Wanted => return,
                End::Refused => {
                    let _ = self.tell(News::Refused { incarnation: life.incarnation }).await;
                    return;
                }
                End::Failed(e) => tracing::debug!(error = %e, "the link of leases goes to another master"),
            }
            tokio::select! {
                () = pause.wait() => {}
                _ = another(&self.wanted) => return,
            }
        }
    }

    async fn connect(&mut self, life: Life) -> std::result::Result<Stream, End> {
        let (up, queue) = mpsc::channel(STREAM_QUEUE);
        let hello = Up::Hello { session: life.session, incarnation: life.incarnation };
        let _ = up.try_send(up_to_wire(&hello));
        let began = Instant::now();
        let entering = async {
            let mut down = self.master.talk(queue).await?;
            let first = down.message().await.map_err(|s| of_transport(&s))?;
            match first.map(down_from_wire).transpose()? {
                Some(Down::Welcome(w)) => Ok((down, w)),
                _ => Err(Error::new(Kind::Corrupt, "a leader's first word was no welcome")),
            }
        };
        let entered = tokio::select! {
            e = timeout(WELCOME_DEADLINE.min(life.lease / 4), entering) => e,
            () = another(&self.wanted) => return Err(End::Wanted),
        };
        let late = |_| {
            self.master.no_leader();
            Error::new(Kind::Timeout, "no leader let the stream in")
        };
        let (down, welcome) = entered.map_err(late)??;
        Ok(Stream { up, down, welcome, renewals: VecDeque::new(), answered: began })
    }

    async fn exchange(&mut self, life: Life, mut s: Stream) -> End {
        let every = life.lease / 3;
        let (mut number, mut next) = (0, Instant::now());
        loop {
            // Two renewals that get no answer: another may lead.
            let silent = s.answered + 2 * every;
            let step = tokio::select! {
                () = another(&self.wanted) => return End::Wanted,
                word = s.down.message() => match word {
                    Ok(Some(word)) => self.hear(life, &mut s, word).await,
                    Ok(None) => Err(Error::new(Kind::Unavailable, "the leader ended the stream").into()),
                    Err(status) => {
                        let e = of_transport(&status);
                        self.master.note(&e);
                        Err(End::from(e))
                    }
                },
                () = sleep_until(next) => {
                    number += 1;
                    next = Instant::now() + every;
                    s.renewals.push_back((number, Instant::now()));
                    if s.renewals.len() > RENEWALS_MAX {
                        s.renewals.pop_front();
                    }
                    send(&s.up, &Up::Renew { renewal: number }, silent).await
                }
                () = sleep_until(silent) => {
                    self.master.no_leader();
                    Err(Error::new(Kind::Timeout, "the leader does not answer renewals").into())
                }
                Some((incarnation, up)) = self.asked.recv() => match incarnation == life.incarnation {
                    true => {
                        tracing::trace!(word = ?up, "says");
                        send(&s.up, &up, silent).await
                    }
                    false => Ok(()),
                },
            };
            if let Err(end) = step {
                return end;
            }
        }
    }

    async fn hear(&mut self, life: Life, s: &mut Stream, word: LeaseTell) -> std::result::Result<(), End> {
        let incarnation = life.incarnation;
        let word = down_from_wire(word)?;
        tracing::trace!(?word, "heard");
        match word {
            Down::Welcome(_) => return Err(Error::new(Kind::Corrupt, "a second welcome").into()),
            Down::Tell(tell) => self.tell(News::Told { incarnation, tell }).await?,
            Down::Lock(tell) => self.tell(News::Lock { incarnation, tell }).await?,
            Down::Hint(hint) => self.tell(News::Hint(hint)).await?,
            Down::NotRenewed { .. } => return Err(End::Refused),
            Down::Renewed { renewal } => {
                s.answered = Instant::now();
                while let Some((number, sent)) = s.renewals.front().copied().filter(|(n, _)| *n <= renewal) {
                    s.renewals.pop_front();
                    if number == renewal {
                        self.tell(News::Renewed { incarnation, term: s.welcome.term, sent }).await?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Resolves when another life is wanted, without taking note of it.
async fn another(wanted: &watch::Receiver<Wish>) {
    // A clone has seen what its original has seen. An error: the owner has gone.
    let _ = wanted.clone().changed().await;
}

/// Onto the stream. A leader that does not read for so long is none.
async fn send(up: &mpsc::Sender<LeaseAsk>, word: &Up, until: Instant) -> std::result::Result<(), End> {
    match tokio::time::timeout_at(until, up.send(up_to_wire(word))).await {
        Ok(Ok(())) => Ok(()),
        _ => Err(Error::new(Kind::Unavailable, "the leader does not read").into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use efc_common::id::SourceId;
    use efc_common::lease::{DirKey, RequestId, Want};

    #[test]
    fn long_lists_go_in_several_messages() {
        let want = Want::read(DirKey::new(SourceId([0; 16]), b"a/").expect("short"));
        for (n, messages) in [(0, 1), (LIST_MAX, 1), (LIST_MAX + 1, 2), (2 * LIST_MAX, 2)] {
            let wants = vec![want.clone(); n];
            let acquire = in_messages(Ask::Acquire { request: RequestId(1), wants: wants.clone() });
            let sum: usize =
                acquire.iter().map(|a| if let Ask::Acquire { wants, .. } = a { wants.len() } else { 0 }).sum();
            assert_eq!((acquire.len(), sum, in_messages(Ask::Cancel { wants }).len()), (messages, n, messages));
        }
    }

    #[tokio::test]
    async fn without_masters_it_tries_on_and_ends_with_its_owner() {
        let tasks = TaskGroup::new();
        let master = MasterClient::new(vec!["127.0.0.1:1".into()]).expect("client");
        let who = Who { client: "c".into(), dataset: "d".into() };
        let (link, mut news) = LeaseLink::start(master.with_deadline(Duration::from_millis(50)), who, None, &tasks);
        link.open();
        assert!(timeout(Duration::from_millis(200), news.recv()).await.is_err());
        link.close().await;
        assert!(news.recv().await.is_none());
        assert!(tasks.shutdown(Duration::from_secs(5)).await);
    }
}
