//! What a mount process answers about itself: control requests, Prometheus text, statistics.

use crate::control::{Handler, Request};
use crate::fs::EfcFs;
use crate::holder::Held;
use crate::holder::line::Upgrade;
use crate::live::Live;
use crate::namespace::Namespace;
use crate::read::source::DataSource;
use crate::stats::{Stats, WorkerStats};
use crate::upgrade::{self, Agreed};
use crate::warm;
use axum::Router;
use axum::routing::get;
use efc_client::ring::RingWatch;
use efc_common::limit::ByteBudget;
use efc_common::metrics::{PrometheusHandle, counter, gauge};
use efc_common::node::Node;
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use futures::future::BoxFuture;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

/// How long workers may take to tell their counters.
const WORKERS_DEADLINE: Duration = Duration::from_secs(3);

/// Knows where everything is that people ask for.
pub struct Teller {
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// What is mounted, as given.
    pub source: String,
    /// When the process began to serve.
    pub started: Instant,
    /// The process's metrics.
    pub exposition: PrometheusHandle,
    /// Names and bytes.
    pub data: Arc<DataSource>,
    /// Nodes.
    pub namespace: Arc<Namespace>,
    /// For what is asked of the mount itself.
    pub fs: Arc<EfcFs>,
    /// The process budget.
    pub budget: ByteBudget,
    /// Options that may change.
    pub live: Live,
    /// How long names may be believed.
    pub ttl: Duration,
    /// The ring.
    pub ring: Arc<RingWatch>,
    /// Who replaces this process.
    pub held: Option<Arc<Held>>,
    /// What a program has to agree with that is to replace it.
    pub agreed: Agreed,
    /// The format of the journal that this program reads, of what is asked for last.
    pub successor_reads: AtomicU32,
    /// Whether all that was written is at the origin, when the mount has ended.
    pub ended: watch::Sender<Option<std::result::Result<(), String>>>,
}

impl Teller {
    /// Prometheus text of this process.
    pub fn metrics(&self) -> String {
        gauge!("efc_fuse_inodes").set(self.namespace.len() as f64);
        gauge!("efc_budget_used_bytes", "budget" => "client").set(self.budget.used() as f64);
        gauge!("efc_budget_total_bytes", "budget" => "client").set(self.budget.total() as f64);
        counter!("efc_budget_waits_total", "budget" => "client").absolute(self.budget.waits());
        if let Some(leases) = self.fs.leases() {
            gauge!("efc_leases").set(leases.leases as f64);
            gauge!("efc_leases_waiting").set(leases.waiting as f64);
        }
        gauge!("efc_ring_epoch").set(self.ring.current().epoch().0 as f64);
        self.exposition.render()
    }

    /// Statistics, with what the workers say of themselves.
    pub async fn stats(&self) -> Stats {
        let mut stats = Stats {
            mountpoint: self.mountpoint.display().to_string(),
            source: self.source.clone(),
            pid: std::process::id(),
            uptime_s: self.started.elapsed().as_secs(),
            inodes: self.namespace.len(),
            budget: (self.budget.used(), self.budget.total(), self.budget.waits()),
            leases: self.fs.leases().map(|l| (l.leases as u64, l.waiting as u64)),
            ..Stats::default()
        };
        if let Some(held) = &self.held {
            (stats.takeovers, stats.last_takeover) = held.takeovers();
        }
        stats.absorb(&self.metrics());
        if let Some(peers) = self.data.peers() {
            match tokio::time::timeout(WORKERS_DEADLINE, peers.cache_stat()).await {
                Ok(all) => stats.workers = all.into_iter().map(|(id, s)| worker_stats(id.0, s)).collect(),
                Err(_) => warn!("workers did not tell their counters in time"),
            }
        }
        stats
    }

    /// Takes options over at once, and has successors begin with them.
    ///
    /// # Errors
    /// As [`Live::set`]; when the holder cannot be told, after they were taken over.
    pub async fn set(&self, texts: Vec<String>) -> Result<()> {
        self.live.set(&texts, &self.fs).await?;
        info!(options = texts.join(","), "options are taken over");
        self.held.as_ref().map_or(Ok(()), |held| held.set_options(texts))
    }

    /// Looks whether a program can serve this mount, and has it do so in the place of this process.
    ///
    /// # Errors
    /// Why not; this process serves on.
    pub async fn upgrade(&self, id: u64, program: Option<PathBuf>, options: Vec<String>) -> Result<()> {
        let Some(held) = &self.held else {
            let text = "this mount has no holder that could start another program (no_failover)";
            return Err(Error::new(Kind::Unsupported, text));
        };
        let program = program.map_or_else(std::env::current_exe, Ok)?;
        let format = upgrade::preflight(&program, &options, &self.agreed).await?;
        self.successor_reads.store(format, Relaxed);
        let program = program.display().to_string();
        held.upgrade(Upgrade { id, program, options })
    }

    /// Serves `/metrics` and `/stats` over HTTP.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn serve_http(self: Arc<Self>, addr: &str, tasks: &TaskGroup) -> Result<()> {
        let listener =
            tokio::net::TcpListener::bind(addr).await.map_err(|e| Error::from(e).with("http", addr.to_string()))?;
        info!(addr = %listener.local_addr()?, "metrics are served");
        let (a, b) = (self.clone(), self);
        let app = Router::new()
            .route("/metrics", get(move || async move { a.metrics() }))
            .route("/stats", get(move || async move { axum::Json(b.stats().await) }));
        tasks.spawn(async move {
            if let Err(e) = axum::serve(listener, app).await {
                warn!(error = %e, "metrics server ended");
            }
        });
        Ok(())
    }
}

fn worker_stats(id: String, answer: Result<efc_proto::data::CacheStats>) -> WorkerStats {
    match answer {
        Ok(s) => WorkerStats {
            id,
            used_bytes: s.tiers.iter().map(|t| t.used).sum(),
            capacity_bytes: s.tiers.iter().map(|t| t.capacity).sum(),
            hits: s.hits,
            misses: s.misses,
            origin_requests: s.origin_requests,
            origin_bytes: s.served_origin_bytes,
            error: None,
        },
        Err(e) => WorkerStats { id, error: Some(e.to_string()), ..WorkerStats::default() },
    }
}

impl Handler for Teller {
    fn handle(&self, request: Request, out: mpsc::Sender<Value>) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let answer = match request {
                Request::Warm { paths } => {
                    let root = self.namespace.root();
                    let now = root.now();
                    let node =
                        Node { locator: now.locator.clone(), version: now.version.clone(), attr: now.attr.clone() };
                    return warm::warm(self.data.clone(), node, self.ttl, paths, out).await;
                }
                Request::Refresh { path } => match self.fs.forget_below(path.as_bytes()).await {
                    Ok(n) => json!({ "forgotten": n }),
                    Err(e) => json!({ "error": e.to_string() }),
                },
                Request::Dirty { discard } => match self.fs.dirty(discard.as_deref()).await {
                    Ok(files) => json!({ "files": files }),
                    Err(e) => json!({ "error": e.to_string() }),
                },
                Request::Status => json!({
                    "pid": std::process::id(),
                    "source": self.source,
                    "mountpoint": self.mountpoint,
                    "uptime_s": self.started.elapsed().as_secs(),
                    "version": env!("CARGO_PKG_VERSION"),
                }),
                Request::Set { options } => match self.set(options).await {
                    Ok(()) => json!({ "set": true }),
                    Err(e) => json!({ "error": e.to_string() }),
                },
                Request::End => {
                    let mut ended = self.ended.subscribe();
                    match ended.wait_for(Option::is_some).await.map(|e| e.clone()) {
                        Ok(Some(Err(text))) => json!({ "missing": text }),
                        Ok(_) | Err(_) => json!({ "missing": null }),
                    }
                }
                Request::History => json!({ "events": self.held.as_ref().map(|h| h.events()).unwrap_or_default() }),
                Request::Upgrade { id, program, options } => match self.upgrade(id, program, options).await {
                    Ok(()) => json!({ "tried": true }),
                    Err(e) => json!({ "error": e.to_string() }),
                },
                Request::Stats => json!(self.stats().await),
                Request::Metrics => json!({ "text": self.metrics() }),
            };
            // The asker may have left.
            let _ = out.send(answer).await;
        })
    }
}
