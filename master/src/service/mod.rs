//! The gRPC services: `Cluster` here (decode, one call, encode), `Leases` in `leases`. Decisions are in `state` (what may happen), `coordinator` (who is silent) and
//! `raft` (who leads).

mod convert;
mod leases;

pub(crate) use leases::LeaseDoor;

use crate::coordinator::{Grace, Heard, check_life};
use crate::lease::Desk;
use crate::raft::Node;
use crate::state::{Command, Outcome, State};
use convert::{check_text, dataset, dataset_wire, registration, worker_id, worker_info};
use efc_common::id::{Incarnation, SessionId, WorkerId};
use efc_common::{Error, Kind, Result};
use efc_proto::control::cluster_server::{Cluster, ClusterServer};
use efc_proto::control::*;
use efc_proto::lease::hint_from_wire;
use efc_proto::status::to_status;
use std::sync::Arc;
use std::time::Duration;
use tonic::{Request, Response, Status};

/// The longest a ring poll is kept open.
const POLL_MAX: Duration = Duration::from_secs(60);

/// Server side of the control plane.
pub(crate) struct Door {
    node: Arc<Node>,
    heard: Arc<Heard>,
    desk: Arc<Desk>,
    grace: Grace,
    /// Ends long polls when the process stops.
    stop: efc_common::task::TaskGroup,
}

type Answer<T> = std::result::Result<Response<T>, Status>;

fn answer<T>(r: Result<T>) -> Answer<T> {
    r.map(Response::new).map_err(|e| to_status(&e))
}

fn unexpected() -> Error {
    Error::new(Kind::Io, "apply answered something else than was asked")
}

/// The ring as the state has it.
pub(crate) fn ring_reply(s: &State) -> RingReply {
    RingReply {
        epoch: s.epoch().0,
        members: s.workers().filter(|w| w.in_ring()).map(worker_info).collect(),
        cluster: s.cluster().to_string(),
    }
}

/// What this node says of itself and the group.
pub(crate) fn status_reply(node: &Node) -> StatusReply {
    let view = node.view();
    node.read(|s| StatusReply {
        cluster: s.cluster().to_string(),
        node: view.node,
        leader: view.leads,
        leader_node: view.leader.unwrap_or(0),
        leader_addr: view.leader_addr.unwrap_or_default(),
        term: view.term,
        last_log: view.last_log,
        applied: view.applied,
        masters: view.masters,
        ring_epoch: s.epoch().0,
        workers: s.workers().filter(|w| w.in_ring()).count() as u64,
        datasets: s.datasets().len() as u64,
        sessions: s.sessions().len() as u64,
        version: env!("CARGO_PKG_VERSION").into(),
    })
}

impl Door {
    /// The service, to mount on a gRPC server.
    pub(crate) fn service(
        node: Arc<Node>,
        heard: Arc<Heard>,
        desk: Arc<Desk>,
        grace: Grace,
        stop: efc_common::task::TaskGroup,
    ) -> ClusterServer<Self> {
        ClusterServer::new(Door { node, heard, desk, grace, stop })
    }

    fn ring(&self) -> RingReply {
        self.node.read(ring_reply)
    }

    async fn propose_worker(&self, command: Command) -> Result<Incarnation> {
        match self.node.propose(command).await? {
            Outcome::Worker { incarnation, .. } => Ok(incarnation),
            _ => Err(unexpected()),
        }
    }

    async fn propose_dataset(&self, command: Command) -> Result<Dataset> {
        match self.node.propose(command).await? {
            Outcome::Dataset(d) => Ok(dataset_wire(&d)),
            _ => Err(unexpected()),
        }
    }

    async fn register(&self, request: RegisterWorkerRequest) -> Result<RegisterWorkerReply> {
        self.node.lead()?;
        let info = request.worker.ok_or_else(|| Error::new(Kind::Invalid, "a registration without a worker"))?;
        let cluster = self.node.read(|s| s.cluster().to_string());
        if cluster.is_empty() {
            return Err(Error::new(Kind::Unavailable, "the cluster is being founded; try again"));
        }
        if !request.cluster.is_empty() && request.cluster != cluster {
            return Err(Error::new(
                Kind::Invalid,
                format!("the worker is of cluster {}, these are the masters of {cluster}", request.cluster),
            ));
        }
        let r = registration(info)?;
        let id = r.id.clone();
        let incarnation = self.propose_worker(Command::RegisterWorker(r)).await?;
        self.heard.worker(&id, incarnation, None);
        tracing::info!(worker = %id, %incarnation, "worker registered");
        Ok(RegisterWorkerReply {
            incarnation: incarnation.0,
            cluster,
            heartbeat_ms: self.grace.heartbeat().as_millis() as u64,
            expire_ms: self.grace.worker.as_millis() as u64,
            ring: Some(self.ring()),
        })
    }

    fn beat(&self, request: HeartbeatRequest) -> Result<HeartbeatReply> {
        self.node.lead()?;
        let (id, incarnation) = (WorkerId(request.id), Incarnation(request.incarnation));
        let (draining, epoch) = self.node.read(|s| Ok::<_, Error>((check_life(s, &id, incarnation)?, s.epoch().0)))?;
        self.heard.worker(&id, incarnation, request.load);
        let state = if draining { WorkerState::WorkerDraining } else { WorkerState::WorkerLive };
        Ok(HeartbeatReply { epoch, state: state.into() })
    }

    async fn change_worker(&self, r: WorkerRef, command: fn(WorkerId, Incarnation) -> Command) -> Result<RingReply> {
        self.node.lead()?;
        self.propose_worker(command(worker_id(r.id)?, Incarnation(r.incarnation))).await?;
        Ok(self.ring())
    }

    fn workers(&self) -> Result<ListWorkersReply> {
        self.node.lead()?;
        let (mut workers, epoch) = self.node.read(|s| (s.workers().map(worker_info).collect::<Vec<_>>(), s.epoch().0));
        for w in &mut workers {
            if let Some((silent, load)) = self.heard.of_worker(&WorkerId(w.id.clone()), Incarnation(w.incarnation)) {
                w.silent_ms = silent.as_millis() as u64;
                w.load = load;
            }
        }
        Ok(ListWorkersReply { workers, epoch })
    }

    async fn poll_ring(&self, r: GetRingRequest) -> Result<RingReply> {
        let mut epochs = self.node.epochs();
        let news = |epoch: &u64| {
            *epoch > r.known_epoch
                || (!r.cluster.is_empty() && self.node.read(|s| !s.cluster().is_empty() && s.cluster() != r.cluster))
        };
        let wait = Duration::from_millis(r.wait_ms).min(POLL_MAX);
        tokio::select! {
            _ = epochs.wait_for(news) => {}
            () = tokio::time::sleep(wait) => {}
            () = self.stop.stopped() => return Err(Error::new(Kind::Unavailable, "this master is stopping")),
        }
        Ok(self.ring())
    }

    /// Ok when the applied state may be shown: on the leader with all that was acknowledged before, on others only while they know no
    /// leader (better the last known than nothing); else the way to the leader. True if it is fresh.
    async fn may_show(&self) -> Result<bool> {
        let view = self.node.view();
        match (view.leads, view.leader) {
            (true, _) => self.node.linearizable().await.map(|()| true),
            (false, Some(_)) => Err(self.node.not_leader()),
            (false, None) => Ok(false),
        }
    }

    async fn find_dataset(&self, name: String) -> Result<Dataset> {
        let fresh = self.may_show().await?;
        match self.node.read(|s| s.datasets().get(&name).map(dataset_wire)) {
            Some(d) => Ok(d),
            None if fresh => Err(Error::new(Kind::NotFound, format!("dataset `{name}` does not exist"))),
            None => Err(self.node.not_leader()),
        }
    }

    async fn list(&self) -> Result<ListDatasetsReply> {
        self.may_show().await?;
        Ok(ListDatasetsReply { datasets: self.node.read(|s| s.datasets().values().map(dataset_wire).collect()) })
    }

    async fn open(&self, r: OpenSessionRequest) -> Result<OpenSessionReply> {
        self.node.lead()?;
        check_text("client", &r.client)?;
        check_text("dataset", &r.dataset)?;
        if (r.resume == 0) != (r.incarnation == 0) {
            return Err(Error::new(Kind::Invalid, "a session is resumed by its number and the life it is known in"));
        }
        let welcome = if r.leases { Some(self.desk.welcome()?) } else { None };
        let expire = welcome.map_or(self.grace.session, |w| w.lease);
        let command = Command::OpenSession {
            client: r.client,
            dataset: r.dataset,
            resume: SessionId(r.resume),
            incarnation: Incarnation(r.incarnation),
            lease_ms: welcome.map_or(0, |w| w.lease.as_millis() as u64),
        };
        let Outcome::Session { session, incarnation } = self.node.propose(command).await? else {
            return Err(unexpected());
        };
        self.heard.session(session, incarnation);
        Ok(OpenSessionReply {
            session: session.0,
            incarnation: incarnation.0,
            expire_ms: expire.as_millis() as u64,
            cluster: self.node.read(|s| s.cluster().to_string()),
            term: welcome.map_or(0, |w| w.term),
            margin_ms: welcome.map_or(0, |w| w.margin.as_millis() as u64),
        })
    }

    fn keep(&self, r: SessionRef) -> Result<KeepSessionReply> {
        self.node.lead()?;
        let (id, incarnation) = (SessionId(r.session), Incarnation(r.incarnation));
        let epoch = self.node.read(|s| match s.sessions().get(&id) {
            None => Err(Error::new(Kind::NotFound, format!("session {id} is not open; open a new one"))),
            Some(x) if x.incarnation != incarnation => {
                Err(Error::new(Kind::Stale, format!("session {id} was taken over")))
            }
            Some(_) => Ok(s.epoch().0),
        })?;
        self.heard.session(id, incarnation);
        Ok(KeepSessionReply { epoch })
    }

    fn sessions(&self) -> Result<ListSessionsReply> {
        self.node.lead()?;
        let silent = |id, inc| self.heard.of_session(id, inc).map_or(0, |d| d.as_millis() as u64);
        let all: Vec<crate::state::Session> = self.node.read(|s| s.sessions().values().cloned().collect());
        let wire = |s: crate::state::Session| Session {
            session: s.id.0,
            incarnation: s.incarnation.0,
            silent_ms: silent(s.id, s.incarnation),
            client: s.client,
            dataset: s.dataset,
        };
        Ok(ListSessionsReply { sessions: all.into_iter().map(wire).collect() })
    }
}

fn now_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

#[tonic::async_trait]
impl Cluster for Door {
    async fn status(&self, _: Request<StatusRequest>) -> Answer<StatusReply> {
        answer(Ok(status_reply(&self.node)))
    }

    async fn register_worker(&self, r: Request<RegisterWorkerRequest>) -> Answer<RegisterWorkerReply> {
        answer(self.register(r.into_inner()).await)
    }

    async fn heartbeat(&self, r: Request<HeartbeatRequest>) -> Answer<HeartbeatReply> {
        answer(self.beat(r.into_inner()))
    }

    async fn drain_worker(&self, r: Request<WorkerRef>) -> Answer<RingReply> {
        let command = |id, incarnation| Command::DrainWorker { id, incarnation, draining: true };
        answer(self.change_worker(r.into_inner(), command).await)
    }

    async fn undrain_worker(&self, r: Request<WorkerRef>) -> Answer<RingReply> {
        let command = |id, incarnation| Command::DrainWorker { id, incarnation, draining: false };
        answer(self.change_worker(r.into_inner(), command).await)
    }

    async fn leave_worker(&self, r: Request<WorkerRef>) -> Answer<RingReply> {
        let command = |id, incarnation| match incarnation {
            Incarnation(0) => Command::ForgetWorker { id },
            _ => Command::LeaveWorker { id, incarnation },
        };
        answer(self.change_worker(r.into_inner(), command).await)
    }

    async fn list_workers(&self, _: Request<ListWorkersRequest>) -> Answer<ListWorkersReply> {
        answer(self.workers())
    }

    async fn get_ring(&self, r: Request<GetRingRequest>) -> Answer<RingReply> {
        answer(self.poll_ring(r.into_inner()).await)
    }

    async fn create_dataset(&self, r: Request<Dataset>) -> Answer<Dataset> {
        answer(match self.node.lead().and_then(|()| dataset(r.into_inner(), now_ms())) {
            Ok(d) => self.propose_dataset(Command::CreateDataset(d)).await,
            Err(e) => Err(e),
        })
    }

    async fn get_dataset(&self, r: Request<DatasetRef>) -> Answer<Dataset> {
        answer(self.find_dataset(r.into_inner().name).await)
    }

    async fn list_datasets(&self, _: Request<ListDatasetsRequest>) -> Answer<ListDatasetsReply> {
        answer(self.list().await)
    }

    async fn delete_dataset(&self, r: Request<DatasetRef>) -> Answer<Dataset> {
        answer(match self.node.lead() {
            Ok(()) => self.propose_dataset(Command::DeleteDataset { name: r.into_inner().name }).await,
            Err(e) => Err(e),
        })
    }

    async fn open_session(&self, r: Request<OpenSessionRequest>) -> Answer<OpenSessionReply> {
        answer(self.open(r.into_inner()).await)
    }

    async fn keep_session(&self, r: Request<SessionRef>) -> Answer<KeepSessionReply> {
        answer(self.keep(r.into_inner()))
    }

    async fn close_session(&self, r: Request<SessionRef>) -> Answer<CloseSessionReply> {
        let r = r.into_inner();
        let command = Command::CloseSession { session: SessionId(r.session), incarnation: Incarnation(r.incarnation) };
        answer(match self.node.lead() {
            Ok(()) => self.node.propose(command).await.map(|_| {
                // Its leases pass on at once.
                self.desk.look();
                CloseSessionReply {}
            }),
            Err(e) => Err(e),
        })
    }

    async fn list_sessions(&self, _: Request<ListSessionsRequest>) -> Answer<ListSessionsReply> {
        answer(self.sessions())
    }

    async fn hint(&self, r: Request<HintRequest>) -> Answer<HintReply> {
        let hints = r.into_inner().hints.into_iter().map(hint_from_wire).collect::<Result<Vec<_>>>();
        answer(self.node.lead().and(hints).map(|hints| HintReply { sessions: self.desk.hint(&hints) }))
    }

    async fn add_master(&self, r: Request<MasterNode>) -> Answer<StatusReply> {
        let r = r.into_inner();
        answer(match convert::check_addr("the master's address", &r.addr) {
            Ok(()) => self.node.add_master(r.node, &r.addr).await.map(|()| status_reply(&self.node)),
            Err(e) => Err(e),
        })
    }

    async fn remove_master(&self, r: Request<MasterNode>) -> Answer<StatusReply> {
        answer(self.node.remove_master(r.into_inner().node).await.map(|()| status_reply(&self.node)))
    }
}
