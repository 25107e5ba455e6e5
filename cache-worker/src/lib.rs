//! The cache worker: holds immutable segments of origin content and serves them to clients.
//!
//! `server` accepts, `conn` reads frames and writes answers, `service` decides between tier and origin, `flight` and `fetch` bring
//! what is missing, `listing` keeps shared directories, `store` keeps the bytes, `membership` the place in the ring. [`Worker`] puts
//! them together, visibly, here.

mod conn;
mod fetch;
mod flight;
mod http;
mod listing;
mod membership;
mod server;
mod service;
mod socket;
mod source;
pub mod store;

pub use server::Limits;
pub use source::Connector;

use efc_client::master::MasterClient;
use efc_client::peers::host_name;
use efc_common::error::Context;
use efc_common::limit::ByteBudget;
use efc_common::metrics::{counter, gauge};
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use efc_proto::control::WorkerInfo;
use fetch::Fetcher;
use listing::Listings;
use membership::Membership;
use server::{Server, UnixDoor, bind_tcp, bind_unix};
use service::Service;
use source::Sources;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use store::{Store, StoreConfig};
use tokio::net::TcpListener;
use tokio::time::timeout;

/// How often gauges that nobody sets by himself are refreshed.
const GAUGES_EVERY: Duration = Duration::from_secs(5);
/// How long tasks may take to end at a planned stop.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// What a worker is to be.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Stable name in the cluster.
    pub id: String,
    /// Masters to register with; empty: the worker stands alone.
    pub masters: Vec<String>,
    /// Data plane `host:port`; port 0 for any.
    pub listen: String,
    /// Data-plane address told to clients; the listening one if `None`.
    pub advertise: Option<String>,
    /// Unix socket of the data plane.
    pub unix: Option<PathBuf>,
    /// `host:port` of metrics and health.
    pub http: Option<String>,
    /// Failure zone.
    pub zone: String,
    /// Tiers.
    pub store: StoreConfig,
    /// Range requests to origins at once.
    pub fetch_concurrency: usize,
    /// Memory of bytes that fly from origins and disks to clients.
    pub inflight_bytes: u64,
    /// Memory of directory listings.
    pub listing_bytes: u64,
    /// One range request, or one walk over a directory, ends after this.
    pub fetch_deadline: Duration,
    /// Take sources that read this host's files or run its programs from TCP clients too.
    pub allow_local_sources: bool,
    /// Of the data plane.
    pub limits: Limits,
}

impl WorkerConfig {
    /// A worker called `id` with these tiers and nothing else out of the ordinary, on a free port of the loopback.
    pub fn new(id: impl Into<String>, store: StoreConfig) -> Self {
        WorkerConfig {
            id: id.into(),
            masters: Vec::new(),
            listen: "127.0.0.1:0".into(),
            advertise: None,
            unix: None,
            http: None,
            zone: String::new(),
            store,
            fetch_concurrency: 64,
            inflight_bytes: 256 << 20,
            listing_bytes: 128 << 20,
            fetch_deadline: Duration::from_secs(90),
            allow_local_sources: false,
            limits: Limits::default(),
        }
    }

    fn capacity(&self) -> u64 {
        let memory = self.store.memory.as_ref().map_or(0, |m| m.quota_bytes);
        // A memory tier above disks holds copies of what they hold.
        if self.store.disks.is_empty() { memory } else { self.store.disks.iter().map(|d| d.quota_bytes).sum() }
    }
}

/// A running worker. Dropping it stops it without a goodbye.
pub struct Worker {
    server: Arc<Server>,
    store: Arc<Store>,
    membership: Option<Arc<Membership>>,
    data: SocketAddr,
    advertise: String,
    unix: Option<UnixDoor>,
    http: Option<SocketAddr>,
    doors: TaskGroup,
    /// Heartbeats: end before the goodbye, or they would register the worker again.
    beats: TaskGroup,
    tasks: TaskGroup,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.doors.cancel();
        self.beats.cancel();
        self.tasks.cancel();
    }
}

impl Worker {
    /// Opens the tiers, starts to serve and, with masters, enters the ring. `metrics` renders the text of `/metrics`.
    ///
    /// # Errors
    /// Why a tier cannot be opened, an address not be listened on, or the masters refuse the worker. Masters that do not answer
    /// are waited for.
    pub async fn start(
        config: WorkerConfig,
        connect: Connector,
        metrics: Option<Arc<dyn Fn() -> String + Send + Sync>>,
    ) -> Result<Worker> {
        let listener = bind_tcp(&config.listen).await?;
        let data = listener.local_addr().context("address of the data plane")?;
        let unix = match &config.unix {
            Some(path) => Some(bind_unix(path).await?),
            None => None,
        };
        let http = match &config.http {
            Some(addr) => Some(bind_tcp(addr).await?),
            None => None,
        };
        let http_addr = http.as_ref().map(TcpListener::local_addr).transpose().context("address of the http server")?;
        let tiers = config.store.clone();
        let store = service::blocking(move || Store::open(tiers)).await??;
        let (doors, tasks) = (TaskGroup::new(), TaskGroup::new());
        let budget = ByteBudget::new(config.inflight_bytes);
        let deadline = config.fetch_deadline;
        let fetcher = Fetcher::new(store.clone(), budget.clone(), config.fetch_concurrency, deadline, tasks.clone());
        let listings = Listings::new(config.listing_bytes, deadline, tasks.clone());
        let sources = Sources::new(connect, config.allow_local_sources);
        let service = Service::new(store.clone(), fetcher, sources, listings, budget);
        let server = Server::new(config.id.clone(), config.limits.clone(), service);
        let advertise = advertised(&config, data)?;
        server.listen_tcp(listener, &doors);
        let unix = unix.map(|(listener, door)| {
            server.listen_unix(listener, &doors);
            door
        });
        if let Some(listener) = http {
            http::serve(server.clone(), listener, metrics, &tasks);
        }
        tasks.spawn(refresh_gauges(server.clone()));
        let mut worker = Worker {
            server,
            store,
            membership: None,
            data,
            advertise,
            unix,
            http: http_addr,
            doors,
            beats: TaskGroup::new(),
            tasks,
        };
        if !config.masters.is_empty() {
            worker.join(&config).await?;
        }
        Ok(worker)
    }

    async fn join(&mut self, config: &WorkerConfig) -> Result<()> {
        let master = MasterClient::new(config.masters.clone())?;
        let info = WorkerInfo {
            id: config.id.clone(),
            addr: self.advertise.clone(),
            unix: self.unix.as_ref().map(|d| d.path.display().to_string()).unwrap_or_default(),
            host: host_name(),
            zone: config.zone.clone(),
            capacity_bytes: config.capacity(),
            metrics_addr: self.http.map(|a| a.to_string()).unwrap_or_default(),
            ..Default::default()
        };
        let membership = Membership::new(master, self.server.clone(), info);
        // Without masters we wait, but serve: clients that know the ring from before come already.
        membership.register_until_done().await?;
        membership.keep(&self.beats);
        self.membership = Some(membership);
        Ok(())
    }

    /// The address told to clients.
    pub fn addr(&self) -> &str {
        &self.advertise
    }

    /// The address it listens on.
    pub fn listens_on(&self) -> SocketAddr {
        self.data
    }

    /// Its unix socket.
    pub fn unix(&self) -> Option<&std::path::Path> {
        self.unix.as_ref().map(|d| d.path.as_path())
    }

    /// Its http address.
    pub fn http(&self) -> Option<SocketAddr> {
        self.http
    }

    /// Ends in good order: out of the ring, then serving on until no request is under way or `patience` is over, then gone. What
    /// waits for a disk is written.
    pub async fn stop(self, patience: Duration) {
        if let Some(m) = &self.membership {
            match m.drain().await {
                // Clients learn of the new ring within moments; what they have asked meanwhile is served.
                Ok(()) => {
                    let _ = timeout(patience, self.drained()).await;
                }
                Err(e) => tracing::warn!(error = %e, "the masters do not hear that we leave; leaving anyway"),
            }
        } else {
            let _ = timeout(patience, self.server.quiet()).await;
        }
        self.beats.shutdown(STOP_PATIENCE).await;
        if let Some(m) = &self.membership
            && let Err(e) = m.leave().await
        {
            tracing::warn!(error = %e, "goodbye to the masters failed; they will notice the silence");
        }
        self.close().await;
    }

    /// Ends in moments, and stays in the ring: another process of the same name takes its place before the masters miss it. What is asked for is answered, for at most
    /// `patience`; until the other serves, clients go to the origin.
    pub async fn make_way(self, patience: Duration) {
        self.beats.shutdown(STOP_PATIENCE).await;
        let _ = timeout(patience, self.server.quiet()).await;
        self.close().await;
    }

    async fn close(self) {
        self.doors.cancel();
        let store = self.store.clone();
        if let Err(e) = service::blocking(move || store.flush()).await {
            tracing::warn!(error = %e, "flushing the disk tiers failed");
        }
        if !self.tasks.shutdown(STOP_PATIENCE).await {
            tracing::warn!("some tasks did not end in time");
        }
    }

    /// Quiet for a whole ring-propagation time: clients have gone to the other owners.
    async fn drained(&self) {
        loop {
            self.server.quiet().await;
            let before = self.server.service().served.frames();
            tokio::time::sleep(DRAIN_QUIET).await;
            if self.server.service().served.frames() == before && !self.server.is_busy() {
                return;
            }
        }
    }
}

/// No request for so long means that the clients have the new ring.
const DRAIN_QUIET: Duration = Duration::from_millis(500);

fn advertised(config: &WorkerConfig, data: SocketAddr) -> Result<String> {
    match &config.advertise {
        // `host` alone: our port.
        Some(a) if a.rsplit_once(':').is_none_or(|(_, p)| p.parse::<u16>().is_err()) => {
            Ok(format!("{a}:{}", data.port()))
        }
        Some(a) => Ok(a.clone()),
        None if data.ip().is_unspecified() && !config.masters.is_empty() => Err(Error::new(
            Kind::Invalid,
            format!("listening on {data}, clients need an address to come to; add --advertise HOST[:PORT]"),
        )),
        None => Ok(data.to_string()),
    }
}

async fn refresh_gauges(server: Arc<Server>) {
    loop {
        let service = server.service();
        gauge!("efc_budget_used_bytes", "budget" => "inflight").set(service.budget.used() as f64);
        gauge!("efc_budget_total_bytes", "budget" => "inflight").set(service.budget.total() as f64);
        counter!("efc_budget_waits_total", "budget" => "inflight").absolute(service.budget.waits());
        gauge!("efc_budget_used_bytes", "budget" => "listings").set(service.listings.bytes() as f64);
        gauge!("efc_budget_total_bytes", "budget" => "listings").set(service.listings.budget_bytes() as f64);
        // Sets the tiers' gauges.
        service.cache_stats().await;
        tokio::time::sleep(GAUGES_EVERY).await;
    }
}
