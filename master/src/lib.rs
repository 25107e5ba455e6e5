//! The master: a small Raft group that owns the datasets, the workers with their ring, and the client sessions.
//!
//! Rooms: `state` (commands, pure apply), `raft` (the only door to openraft and RocksDB), `coordinator` (who is silent), [`lease`] (who may
//! believe and change what), `service` (gRPC), `formation` (how a node comes into a group), `http` (metrics). [`Master::start`] puts them
//! together.

mod coordinator;
mod events;
mod formation;
mod http;
pub mod lease;
mod lock;
mod raft;
mod service;
mod state;

use coordinator::{Grace, Heard};
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use formation::Formation;
use lease::Desk;
use raft::{Node, RaftDoor, Tuning};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Mutex, mpsc};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

/// Time for open calls to end when the process stops.
const STOP_PATIENCE: Duration = Duration::from_secs(5);
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Open calls of one connection; ring polls are among them.
const STREAMS_MAX: u32 = 1024;

/// What a master is started with.
#[derive(Debug, Clone)]
pub struct Config {
    /// This node's id, from 1; stays with the data directory.
    pub node_id: u64,
    /// Where gRPC listens, `host:port`; port 0: any.
    pub listen: String,
    /// Where others reach it, `host:port`; port 0: the one that was chosen. None: the listening address.
    pub advertise: Option<String>,
    /// Where HTTP listens, `host:port`; port 0: any.
    pub http: String,
    /// What senders of events must know to be heard at `/events`. None: nobody is.
    pub events_token: Option<String>,
    /// State of this node.
    pub data_dir: PathBuf,
    /// Static list of the group, id → address, this node included. Empty: no list.
    pub peers: BTreeMap<u64, String>,
    /// Addresses of a group to join. Empty: none.
    pub join: Vec<String>,
    /// Between heartbeats of the leader to the other masters.
    pub heartbeat: Duration,
    /// Silence of the leader after which others stand for election: this to twice this.
    pub election: Duration,
    /// Log entries between two snapshots.
    pub snapshot_logs: u64,
    /// Silence after which a worker leaves the ring.
    pub worker_expire: Duration,
    /// Silence after which a client session ends that holds no leases.
    pub session_expire: Duration,
    /// Silence after which a client session ends that holds leases, and so long do its leases live after it was heard.
    pub lease: Duration,
}

/// A running master.
pub struct Master {
    node: Arc<Node>,
    tasks: TaskGroup,
    /// What ended a part of it; the process should not go on then.
    failures: Mutex<mpsc::Receiver<Error>>,
    http: SocketAddr,
}

impl Config {
    fn formation(&self) -> Result<Formation> {
        let invalid = |what: String| Err(Error::new(Kind::Invalid, what));
        if self.node_id == 0 {
            return invalid("--node-id must be 1 or more".into());
        }
        match (self.peers.is_empty(), self.join.is_empty()) {
            (true, true) => Ok(Formation::Single),
            (true, false) => Ok(Formation::Join(self.join.clone())),
            (false, false) => invalid("give --peers or --join, not both".into()),
            (false, true) => match self.peers.get(&self.node_id) {
                None => invalid(format!(
                    "--peers does not list this node ({}); every node gets the same list",
                    self.node_id
                )),
                Some(_) if self.peers.len() == 1 => Ok(Formation::Single),
                Some(_) => Ok(Formation::Peers(self.peers.clone())),
            },
        }
    }

    /// The address others are told, once the port is known.
    fn advertised(&self, bound: SocketAddr) -> Result<String> {
        let given = self.advertise.as_ref().or_else(|| self.peers.get(&self.node_id));
        match given {
            Some(a) => match a.rsplit_once(':') {
                Some((host, "0")) if !host.is_empty() => Ok(format!("{host}:{}", bound.port())),
                Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => Ok(a.clone()),
                _ => Err(Error::new(Kind::Invalid, format!("--advertise `{a}` must be host:port"))),
            },
            None if bound.ip().is_unspecified() => Err(Error::new(
                Kind::Invalid,
                format!(
                    "--listen {bound} is every address; say with --advertise host:port under which one others reach it"
                ),
            )),
            None => Ok(bound.to_string()),
        }
    }
}

async fn bind(flag: &str, addr: &str) -> Result<(TcpListener, SocketAddr)> {
    let listener =
        TcpListener::bind(addr).await.map_err(|e| Error::from(e).with("flag", flag).with("address", addr))?;
    let bound = listener.local_addr()?;
    Ok((listener, bound))
}

impl Master {
    /// Opens the data, listens, and begins to form or join its group. `metrics` renders the Prometheus text of the process.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a bad configuration; those of listening and of the data directory.
    pub async fn start(config: Config, metrics: Arc<dyn Fn() -> String + Send + Sync>) -> Result<Master> {
        let formation = config.formation()?;
        let (grpc, grpc_addr) = bind("--listen", &config.listen).await?;
        let (http, http_addr) = bind("--http", &config.http).await?;
        let advertise = config.advertised(grpc_addr)?;
        let tuning = Tuning {
            heartbeat: config.heartbeat,
            election: config.election,
            snapshot_logs: config.snapshot_logs.max(1),
        };
        let node = Node::start(config.node_id, &config.data_dir, advertise, &tuning).await?;
        let tasks = TaskGroup::new();
        let (failed, failures) = mpsc::channel(4);
        let master = Master { node, tasks, failures: Mutex::new(failures), http: http_addr };
        let grace = Grace { worker: config.worker_expire, session: config.session_expire };
        master.serve_grpc(grpc, grace, config.lease, failed.clone());
        let events = config.events_token.map(|token| http::Events::new(token, &grpc_addr.to_string())).transpose()?;
        let served = http::serve(http, master.node.clone(), metrics, events, master.stopped());
        master.spawn_part("http", served, failed.clone());
        let node = master.node.clone();
        let formed = async move { formation::form(&node, &formation).await };
        master.spawn_part("formation", formed, failed.clone());
        let node = master.node.clone();
        // Ends only with an error: no view satisfies it.
        master.spawn_part("raft", async move { node.wait(|_| false).await.map(|_| ()) }, failed);
        Ok(master)
    }

    /// Runs a part of the master; its error is the master's.
    fn spawn_part(
        &self,
        name: &'static str,
        part: impl Future<Output = Result<()>> + Send + 'static,
        failed: mpsc::Sender<Error>,
    ) {
        let stop = self.tasks.clone();
        let run = async move {
            if let Err(e) = part.await
                && !stop.is_stopped()
            {
                // Only the first failure is looked at.
                let _ = failed.try_send(Error::new(e.kind(), format!("{name} failed")).caused_by(e));
            }
        };
        match name {
            // These end by themselves when told to stop.
            "grpc" | "http" => self.tasks.spawn_graceful(run),
            _ => self.tasks.spawn(run),
        }
    }

    fn stopped(&self) -> impl Future<Output = ()> + Send + 'static {
        self.tasks.token().cancelled_owned()
    }

    fn serve_grpc(&self, listener: TcpListener, grace: Grace, lease: Duration, failed: mpsc::Sender<Error>) {
        let heard = Arc::new(Heard::default());
        let desk = Arc::new(Desk::new(lease));
        let (node, tasks) = (&self.node, &self.tasks);
        let server = Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE))
            .max_concurrent_streams(Some(STREAMS_MAX))
            .add_service(RaftDoor::service(node.clone()))
            .add_service(service::LeaseDoor::service(node.clone(), desk.clone(), heard.clone(), tasks.clone()))
            .add_service(service::Door::service(node.clone(), heard.clone(), desk.clone(), grace, tasks.clone()));
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let stop = self.stopped();
        let served = async move {
            server
                .serve_with_incoming_shutdown(incoming, stop)
                .await
                .map_err(|e| Error::new(Kind::Io, "the gRPC server ended").caused_by(e))
        };
        self.spawn_part("grpc", served, failed);
        self.tasks.spawn_graceful(lease::keep_time(desk.clone(), self.tasks.clone()));
        self.tasks.spawn(lease::prove(desk.clone(), self.node.clone()));
        self.tasks.spawn(lease::fence(desk.clone(), self.node.clone()));
        self.tasks.spawn(coordinator::run(self.node.clone(), heard, desk, grace));
    }

    /// The advertised gRPC address, `host:port`.
    pub fn grpc_addr(&self) -> &str {
        self.node.advertise()
    }

    /// The HTTP address, `host:port`.
    pub fn http_addr(&self) -> String {
        self.http.to_string()
    }

    /// Returns when the node is a member that knows a leader, and the cluster has its name.
    ///
    /// # Errors
    /// [`Kind::Io`] when Raft has stopped.
    pub async fn ready(&self) -> Result<()> {
        let named = |n: &Node| n.read(|s| !s.cluster().is_empty());
        // Naming the cluster is a log entry, so the view changes after it.
        self.node
            .wait(|v| v.leader.is_some() && v.masters.iter().any(|m| m.node == v.node) && named(&self.node))
            .await?;
        Ok(())
    }

    /// Returns when a part of the master has failed: the process should end.
    pub async fn failed(&self) -> Error {
        let mut failures = self.failures.lock().await;
        match failures.recv().await {
            Some(e) => e,
            None => std::future::pending().await,
        }
    }

    /// Ends open calls, then Raft, in good order.
    pub async fn stop(self) {
        if !self.tasks.shutdown(STOP_PATIENCE).await {
            tracing::info!("calls were cut off at the end of the stop period");
        }
        self.node.shutdown().await;
    }
}
