//! Talking to the master group. Given any subset of its addresses, [`MasterClient`] finds the leader, follows redirects, asks
//! again when a master is away or an election runs, and remembers every master it hears of.
//!
//! Every call has one deadline for all its attempts. Commands that may have happened although no answer came are sent again: the
//! masters are made for that (creating the same dataset twice is one creation, a second registration is a new life).

use efc_common::hint::Hint;
use efc_common::id::{Incarnation, RingEpoch, SessionId};
use efc_common::{Error, Kind, Result, Retry};
use efc_proto::control::cluster_client::ClusterClient;
use efc_proto::control::leases_client::LeasesClient;
use efc_proto::control::{
    Dataset, DatasetRef, GetRingRequest, HeartbeatReply, HeartbeatRequest, HintRequest, KeepSessionReply, LeaseAsk,
    LeaseTell, ListDatasetsRequest, ListSessionsRequest, ListWorkersReply, ListWorkersRequest, MasterNode,
    OpenSessionReply, OpenSessionRequest, RegisterWorkerReply, RegisterWorkerRequest, RingReply, Session, SessionRef,
    StatusReply, StatusRequest, WorkerLoad, WorkerRef,
};
use efc_proto::lease::{MESSAGE_BYTES_MAX, hint_to_wire};
use efc_proto::status::from_status;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status, Streaming};

/// Of one call with all its attempts.
const CALL_DEADLINE: Duration = Duration::from_secs(10);
/// Of one attempt: above the time a leader gives a proposal, so that its own verdict arrives.
const ATTEMPT_DEADLINE: Duration = Duration::from_secs(6);
const CONNECT_DEADLINE: Duration = Duration::from_secs(1);
const KEEPALIVE: Duration = Duration::from_secs(5);
/// Pause after all known masters were asked in vain; doubles up to the maximum, with jitter.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// How often the list of masters is refreshed, beside the calls.
const LEARN_EVERY: Duration = Duration::from_secs(60);
const LEARN_DEADLINE: Duration = Duration::from_secs(1);
/// A change of the masters waits for a node to catch up.
const GROUP_DEADLINE: Duration = Duration::from_secs(40);
/// Listings can be long.
const REPLY_BYTES_MAX: usize = 64 << 20;

/// Client of the master group; clones share what it knows.
#[derive(Clone)]
pub struct MasterClient {
    shared: Arc<Shared>,
    deadline: Duration,
}

struct Shared {
    /// As configured: never forgotten.
    seeds: Vec<String>,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// Masters the group told of.
    learnt: Vec<String>,
    learnt_at: Option<Instant>,
    leader: Option<String>,
    /// Where to go on when no leader is known.
    next: usize,
    channels: HashMap<String, Channel>,
}

impl std::fmt::Debug for MasterClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MasterClient").field("masters", &self.addrs()).finish_non_exhaustive()
    }
}

/// Who may answer a call.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    /// The leader only.
    Leader,
    /// Any master.
    Any,
}

impl MasterClient {
    /// A client of the masters at `addrs` (`host:port`, any of them; more are learnt). Connects when first used.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for an empty list or an address that is not `host:port`.
    pub fn new(addrs: Vec<String>) -> Result<Self> {
        let seeds: Vec<String> = addrs.iter().map(|a| a.trim().trim_start_matches("http://").to_string()).collect();
        if seeds.is_empty() {
            return Err(Error::new(Kind::Invalid, "no master address given; write --master host:port[,host:port]"));
        }
        for a in &seeds {
            endpoint(a)?;
        }
        Ok(MasterClient { shared: Arc::new(Shared { seeds, known: Mutex::default() }), deadline: CALL_DEADLINE })
    }

    /// The same client with another deadline for each call, all attempts together (default 10 s).
    pub fn with_deadline(&self, deadline: Duration) -> Self {
        MasterClient { shared: self.shared.clone(), deadline }
    }

    /// All masters known: those given, then those learnt.
    pub fn addrs(&self) -> Vec<String> {
        let known = self.shared.known.lock();
        let mut all = self.shared.seeds.clone();
        all.extend(known.learnt.iter().filter(|a| !self.shared.seeds.contains(a)).cloned());
        all
    }

    /// The leader, if the last call found one.
    pub fn leader(&self) -> Option<String> {
        self.shared.known.lock().leader.clone()
    }

    /// The group, as its leader sees it (any master, if none leads).
    ///
    /// # Errors
    /// [`Kind::Unavailable`] when no master answers in time.
    pub async fn status(&self) -> Result<StatusReply> {
        let first = self.call(Who::Any, &StatusRequest {}, |mut c, r| async move { c.status(r).await }).await?;
        self.learn(&first);
        if first.leader || first.leader_addr.is_empty() {
            return Ok(first);
        }
        let at_leader = self.status_of(&first.leader_addr).await.ok().filter(|s| s.leader);
        Ok(at_leader.unwrap_or(first))
    }

    /// What the master at `addr` says of itself and the group. One attempt.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] or [`Kind::Timeout`] when it does not answer.
    pub async fn status_of(&self, addr: &str) -> Result<StatusReply> {
        let mut client = self.client(addr)?;
        let mut request = Request::new(StatusRequest {});
        request.set_timeout(self.deadline.min(ATTEMPT_DEADLINE));
        let reply = client.status(request).await.map_err(|s| from_status(&s).with("master", addr))?.into_inner();
        self.learn(&reply);
        Ok(reply)
    }

    /// Enters a worker under a new incarnation.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for impossible fields or another cluster; [`Kind::Unavailable`] when no leader answers in time (all
    /// calls below, too).
    pub async fn register_worker(&self, request: RegisterWorkerRequest) -> Result<RegisterWorkerReply> {
        self.call(Who::Leader, &request, |mut c, r| async move { c.register_worker(r).await }).await
    }

    /// Says that the worker lives.
    ///
    /// # Errors
    /// [`Kind::Stale`] or [`Kind::NotFound`]: register again.
    pub async fn heartbeat(&self, id: &str, incarnation: Incarnation, load: WorkerLoad) -> Result<HeartbeatReply> {
        let request = HeartbeatRequest { id: id.into(), incarnation: incarnation.0, load: Some(load) };
        self.call(Who::Leader, &request, |mut c, r| async move { c.heartbeat(r).await }).await
    }

    /// Takes a worker out of the ring. Incarnation 0: whichever life it is in.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Stale`] for an older life.
    pub async fn drain_worker(&self, id: &str, incarnation: Incarnation) -> Result<RingReply> {
        let request = WorkerRef { id: id.into(), incarnation: incarnation.0 };
        self.call(Who::Leader, &request, |mut c, r| async move { c.drain_worker(r).await }).await
    }

    /// Puts a drained worker back into the ring.
    ///
    /// # Errors
    /// As [`MasterClient::drain_worker`].
    pub async fn undrain_worker(&self, id: &str, incarnation: Incarnation) -> Result<RingReply> {
        let request = WorkerRef { id: id.into(), incarnation: incarnation.0 };
        self.call(Who::Leader, &request, |mut c, r| async move { c.undrain_worker(r).await }).await
    }

    /// A worker's goodbye; with incarnation 0: forgets a worker that is gone.
    ///
    /// # Errors
    /// As [`MasterClient::drain_worker`]; [`Kind::Busy`] when asked to forget one that lives.
    pub async fn leave_worker(&self, id: &str, incarnation: Incarnation) -> Result<RingReply> {
        let request = WorkerRef { id: id.into(), incarnation: incarnation.0 };
        self.call(Who::Leader, &request, |mut c, r| async move { c.leave_worker(r).await }).await
    }

    /// All workers known, with load and silence as the leader sees them.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn list_workers(&self) -> Result<ListWorkersReply> {
        self.call(Who::Leader, &ListWorkersRequest {}, |mut c, r| async move { c.list_workers(r).await }).await
    }

    /// The ring, at once if it is newer than `known` of `cluster` or that is another cluster's, else after a change or `wait`.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn get_ring(&self, known: RingEpoch, cluster: &str, wait: Duration) -> Result<RingReply> {
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let request = GetRingRequest { known_epoch: known.0, wait_ms, cluster: cluster.into() };
        self.call_within(Who::Any, wait, &request, |mut c, r| async move { c.get_ring(r).await }).await
    }

    /// Makes a dataset; the same one again answers the existing one.
    ///
    /// # Errors
    /// [`Kind::Invalid`] naming the field; [`Kind::AlreadyExists`] if one of that name says something else.
    pub async fn create_dataset(&self, dataset: Dataset) -> Result<Dataset> {
        self.call(Who::Leader, &dataset, |mut c, r| async move { c.create_dataset(r).await }).await
    }

    /// A dataset by name.
    ///
    /// # Errors
    /// [`Kind::NotFound`].
    pub async fn get_dataset(&self, name: &str) -> Result<Dataset> {
        let request = DatasetRef { name: name.into() };
        self.call(Who::Any, &request, |mut c, r| async move { c.get_dataset(r).await }).await
    }

    /// All datasets, by name.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn list_datasets(&self) -> Result<Vec<Dataset>> {
        let all =
            self.call(Who::Any, &ListDatasetsRequest {}, |mut c, r| async move { c.list_datasets(r).await }).await?;
        Ok(all.datasets)
    }

    /// Removes a dataset and answers what it was.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Busy`] while clients have it mounted.
    pub async fn delete_dataset(&self, name: &str) -> Result<Dataset> {
        let request = DatasetRef { name: name.into() };
        self.call(Who::Leader, &request, |mut c, r| async move { c.delete_dataset(r).await }).await
    }

    /// Opens a client session, or begins a new life of one, if it is in the life that is known.
    ///
    /// # Errors
    /// [`Kind::Exhausted`] when the cluster has too many; [`Kind::NotFound`] or [`Kind::Stale`] if what is resumed has ended or is in another
    /// life (also by this very call, when an answer got lost).
    pub async fn open_session(
        &self,
        client: &str,
        dataset: &str,
        resume: Option<(SessionId, Incarnation)>,
        leases: bool,
    ) -> Result<OpenSessionReply> {
        let (resume, incarnation) = resume.map_or((0, 0), |(s, i)| (s.0, i.0));
        let request =
            OpenSessionRequest { client: client.into(), dataset: dataset.into(), resume, incarnation, leases };
        self.call(Who::Leader, &request, |mut c, r| async move { c.open_session(r).await }).await
    }

    /// Says that the client lives.
    ///
    /// # Errors
    /// [`Kind::Stale`] or [`Kind::NotFound`]: open a session again.
    pub async fn keep_session(&self, session: SessionId, incarnation: Incarnation) -> Result<KeepSessionReply> {
        let request = SessionRef { session: session.0, incarnation: incarnation.0 };
        self.call(Who::Leader, &request, |mut c, r| async move { c.keep_session(r).await }).await
    }

    /// Ends a session.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Stale`] when it was taken over.
    pub async fn close_session(&self, session: SessionId, incarnation: Incarnation) -> Result<()> {
        let request = SessionRef { session: session.0, incarnation: incarnation.0 };
        self.call(Who::Leader, &request, |mut c, r| async move { c.close_session(r).await }).await?;
        Ok(())
    }

    /// All client sessions.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub async fn list_sessions(&self) -> Result<Vec<Session>> {
        let all =
            self.call(Who::Leader, &ListSessionsRequest {}, |mut c, r| async move { c.list_sessions(r).await }).await?;
        Ok(all.sessions)
    }

    /// Makes the node that listens at `addr` a voter. Waits until it has caught up, 40 s at most whatever the client's deadline.
    ///
    /// # Errors
    /// [`Kind::Invalid`] when another node or a member of another cluster answers there.
    pub async fn add_master(&self, node: u64, addr: &str) -> Result<StatusReply> {
        let request = MasterNode { node, addr: addr.into(), voter: true, matched: 0 };
        let patient = self.with_deadline(self.deadline.max(GROUP_DEADLINE));
        let call = |mut c: ClusterClient<Channel>, r| async move { c.add_master(r).await };
        patient.call_within(Who::Leader, GROUP_DEADLINE - ATTEMPT_DEADLINE, &request, call).await
    }

    /// Takes a master out of the group.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Invalid`] for the last one; [`Kind::Busy`] when the others could not go on without it.
    pub async fn remove_master(&self, node: u64) -> Result<StatusReply> {
        let request = MasterNode { node, addr: String::new(), voter: true, matched: 0 };
        let patient = self.with_deadline(self.deadline.max(GROUP_DEADLINE));
        let call = |mut c: ClusterClient<Channel>, r| async move { c.remove_master(r).await };
        patient.call_within(Who::Leader, GROUP_DEADLINE - ATTEMPT_DEADLINE, &request, call).await
    }

    /// Has the leader pass on to all sessions what was changed in buckets. How many sessions were told.
    ///
    /// # Errors
    /// What the masters said, or why none answered.
    pub async fn hint(&self, hints: &[Hint]) -> Result<u64> {
        let request = HintRequest { hints: hints.iter().map(hint_to_wire).collect() };
        let call = |mut c: ClusterClient<Channel>, r| async move { c.hint(r).await };
        Ok(self.call(Who::Leader, &request, call).await?.sessions)
    }

    /// Lets a session's words about leases flow to the leader, or to whom may be it; one attempt.
    ///
    /// # Errors
    /// [`Kind::NotLeader`] and all that a call may fail with; the next attempt goes where the answer pointed, or to the next master.
    pub(crate) async fn talk(&self, mut asks: mpsc::Receiver<LeaseAsk>) -> Result<Streaming<LeaseTell>> {
        let addr = self.target();
        let stream = futures::stream::poll_fn(move |cx| asks.poll_recv(cx));
        let mut client = LeasesClient::new(self.channel(&addr)?).max_decoding_message_size(MESSAGE_BYTES_MAX);
        match client.talk(stream).await {
            Ok(answer) => {
                self.shared.known.lock().leader = Some(addr);
                Ok(answer.into_inner())
            }
            Err(status) => {
                let e = of_transport(&status);
                self.failed(&addr, &e);
                Err(e)
            }
        }
    }

    /// What a stream to the leader ended with may say who leads now.
    pub(crate) fn note(&self, e: &Error) {
        if let Some(addr) = self.leader() {
            self.failed(&addr, e);
        }
    }

    /// The leader that is known does not do its work: look for another.
    pub(crate) fn no_leader(&self) {
        self.shared.known.lock().leader = None;
    }

    async fn call<Q, A, F, Fu>(&self, who: Who, request: &Q, rpc: F) -> Result<A>
    where
        Q: Clone,
        F: Fn(ClusterClient<Channel>, Request<Q>) -> Fu,
        Fu: Future<Output = std::result::Result<Response<A>, Status>>,
    {
        self.call_within(who, Duration::ZERO, request, rpc).await
    }

    /// Asks until somebody answers for good or the deadline is over. `wait`: how much longer than usual a master may take to
    /// answer, because it was asked to.
    async fn call_within<Q, A, F, Fu>(&self, who: Who, wait: Duration, request: &Q, rpc: F) -> Result<A>
    where
        Q: Clone,
        F: Fn(ClusterClient<Channel>, Request<Q>) -> Fu,
        Fu: Future<Output = std::result::Result<Response<A>, Status>>,
    {
        let end = Instant::now() + self.deadline;
        let mut pause = PAUSE_MIN;
        let mut asked_in_vain = 0;
        loop {
            let addr = self.target();
            let patience = ATTEMPT_DEADLINE.min(end - Instant::now()) + wait;
            let error = match self.attempt(&addr, patience, request, &rpc).await {
                Ok(answer) => {
                    self.answered(&addr, who).await;
                    return Ok(answer);
                }
                Err(e) => e,
            };
            if error.retry() == Retry::Never || error.is(Kind::Exhausted) {
                return Err(error);
            }
            let redirected = self.failed(&addr, &error);
            asked_in_vain += 1;
            // A redirect is followed at once, but two masters that name each other must not be asked in a tight loop.
            if redirected && asked_in_vain <= 2 {
                continue;
            }
            if asked_in_vain >= self.addrs().len() {
                let jitter = pause.mul_f64(rand::random_range(0.5..1.0));
                if Instant::now() + jitter >= end {
                    return Err(self.gave_up(error));
                }
                tokio::time::sleep(jitter).await;
                pause = (pause * 2).min(PAUSE_MAX);
            } else if Instant::now() >= end {
                return Err(self.gave_up(error));
            }
        }
    }

    async fn attempt<Q, A, F, Fu>(&self, addr: &str, deadline: Duration, request: &Q, rpc: &F) -> Result<A>
    where
        Q: Clone,
        F: Fn(ClusterClient<Channel>, Request<Q>) -> Fu,
        Fu: Future<Output = std::result::Result<Response<A>, Status>>,
    {
        let mut r = Request::new(request.clone());
        r.set_timeout(deadline);
        match timeout(deadline, rpc(self.client(addr)?, r)).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(of_transport(&status)),
            Err(_) => Err(Error::new(Kind::Timeout, "the master did not answer in time")),
        }
    }

    fn gave_up(&self, last: Error) -> Error {
        Error::new(Kind::Unavailable, "no leading master answered in time; are the masters running?")
            .with("masters", self.addrs().join(","))
            .caused_by(last)
    }

    /// The leader if known, else each master in turn.
    fn target(&self) -> String {
        let all = self.addrs();
        let mut known = self.shared.known.lock();
        if let Some(l) = &known.leader {
            return l.clone();
        }
        let i = known.next % all.len();
        known.next = known.next.wrapping_add(1);
        all[i].clone()
    }

    /// Takes note of a failure; true if it named another leader to go to.
    fn failed(&self, addr: &str, e: &Error) -> bool {
        let mut known = self.shared.known.lock();
        let named = e.context("leader").filter(|l| e.is(Kind::NotLeader) && !l.is_empty() && *l != addr);
        if let Some(l) = named {
            known.leader = Some(l.to_string());
            return true;
        }
        if known.leader.as_deref() == Some(addr) {
            known.leader = None;
        }
        false
    }

    async fn answered(&self, addr: &str, who: Who) {
        let learn = {
            let mut known = self.shared.known.lock();
            if who == Who::Leader {
                known.leader = Some(addr.to_string());
            }
            let due = known.learnt_at.is_none_or(|t| t.elapsed() >= LEARN_EVERY);
            if due {
                // Also if it fails: it is not worth asking again with every call.
                known.learnt_at = Some(Instant::now());
            }
            due
        };
        if learn {
            let brief = self.with_deadline(LEARN_DEADLINE);
            if let Err(e) = brief.status_of(addr).await {
                tracing::debug!(master = addr, error = %e, "the list of masters was not refreshed");
            }
        }
    }

    fn learn(&self, status: &StatusReply) {
        if status.masters.is_empty() {
            return;
        }
        let mut known = self.shared.known.lock();
        known.learnt_at = Some(Instant::now());
        known.learnt = status.masters.iter().map(|m| m.addr.clone()).filter(|a| endpoint(a).is_ok()).collect();
        let keep: Vec<String> = known.learnt.iter().chain(&self.shared.seeds).cloned().collect();
        known.channels.retain(|a, _| keep.contains(a));
        if status.leader && !status.leader_addr.is_empty() {
            known.leader = Some(status.leader_addr.clone());
        }
    }

    fn client(&self, addr: &str) -> Result<ClusterClient<Channel>> {
        Ok(ClusterClient::new(self.channel(addr)?).max_decoding_message_size(REPLY_BYTES_MAX))
    }

    fn channel(&self, addr: &str) -> Result<Channel> {
        let mut known = self.shared.known.lock();
        let channel = match known.channels.get(addr) {
            Some(c) => c.clone(),
            None => {
                let c = endpoint(addr)?.connect_lazy();
                known.channels.insert(addr.to_string(), c.clone());
                c
            }
        };
        Ok(channel)
    }
}

/// The error of a status; the transport's own codes for a master that went away in mid-call say that it is unavailable.
pub(crate) fn of_transport(status: &Status) -> Error {
    let e = from_status(status);
    match (e.kind(), status.metadata().contains_key(efc_proto::status::KIND_KEY)) {
        (Kind::Cancelled | Kind::Io | Kind::Stale | Kind::NotFound, false) => {
            Error::new(Kind::Unavailable, e.to_string())
        }
        _ => e,
    }
}

fn endpoint(addr: &str) -> Result<Endpoint> {
    let bad = || Error::new(Kind::Invalid, format!("master address `{addr}` is not host:port"));
    let port = addr.rsplit_once(':').and_then(|(host, port)| port.parse::<u16>().ok().filter(|_| !host.is_empty()));
    port.ok_or_else(bad)?;
    let endpoint = Endpoint::from_shared(format!("http://{addr}")).map_err(|e| bad().caused_by(e))?;
    Ok(endpoint
        .connect_timeout(CONNECT_DEADLINE)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true)
        .tcp_nodelay(true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn addresses_are_checked() {
        for bad in ["", "host", "host:", ":1", "host:port", "a b:1"] {
            assert!(MasterClient::new(vec![bad.into()]).is_err_and(|e| e.is(Kind::Invalid)), "{bad}");
        }
        assert!(MasterClient::new(vec![]).is_err());
        let c = MasterClient::new(vec![" http://h:1".into(), "[::1]:2".into()]).expect("good");
        assert_eq!(c.addrs(), ["h:1", "[::1]:2"]);
    }

    #[tokio::test]
    async fn nobody_there_is_unavailable_within_the_deadline() {
        let gone = std::net::TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("addr");
        let c = MasterClient::new(vec![gone.to_string()]).expect("new").with_deadline(Duration::from_millis(300));
        let began = Instant::now();
        let e = c.list_workers().await.expect_err("nobody");
        assert!(e.is(Kind::Unavailable) && e.to_string().contains(&gone.to_string()), "{e}");
        assert!(began.elapsed() < Duration::from_secs(3));
    }
}
