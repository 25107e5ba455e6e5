//! The cache worker process: parses its arguments, starts [`efc_worker::Worker`], says when it is ready, and ends in good order.

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use efc_client::peers::host_name;
use efc_common::parent::Parent;
use efc_common::units::{parse_bytes, parse_duration, show_bytes};
use efc_worker::store::{DiskTier, MemoryTier, Policy, StoreConfig};
use efc_worker::{Connector, Worker, WorkerConfig};
use std::fs::File;
use std::io::Write;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// What the process needs beside its budgets: code, stacks, connections, tables.
const BASE_BYTES: u64 = 32 << 20;
/// For requests under way when another process is to take this one's place.
const WAY_PATIENCE: Duration = Duration::from_secs(1);
/// Threads for blocking work: tier reads and writes.
const BLOCKING_THREADS: usize = 64;

/// EFC cache worker: keeps pieces of files of NAS and object stores in memory and on disks and serves them to efc-fuse mounts.
///
/// Alone, for one machine:      efc-worker --memory 4GiB --unix /run/efc/worker.sock
///
/// In a cluster:                efc-worker --master m1:7000,m2:7000,m3:7000 --listen 0.0.0.0:7100 --advertise $HOSTNAME
///                                         --memory 16GiB --disk /ssd/efc:500GiB --http 0.0.0.0:7101
///
/// SIGTERM leaves the cluster: others take over its share, and get it from the origin. SIGUSR2 ends it at once and keeps its place, for a new version
/// that is started with the same --id; it has what was cached on disk, and in memory if --memory names a directory.
#[derive(Debug, Parser)]
#[command(name = "efc-worker", version, verbatim_doc_comment)]
struct Args {
    /// Stable name of this worker in the cluster; its share of the cache follows the name [default: host name]
    #[arg(long)]
    id: Option<String>,
    /// Masters to register with, any of them; without it the worker stands alone
    #[arg(long, value_name = "HOST:PORT,...", value_delimiter = ',', env = "EFC_MASTER")]
    master: Vec<String>,
    /// Address of the data plane; port 0 takes a free one
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7100")]
    listen: String,
    /// Address that clients are told, if not the one listened on
    #[arg(long, value_name = "HOST[:PORT]")]
    advertise: Option<String>,
    /// Unix socket for mounts of the same user on this host: faster, and trusted with sources of the host itself
    #[arg(long, value_name = "PATH")]
    unix: Option<PathBuf>,
    /// Address of /metrics (Prometheus), /healthz and /stats (JSON)
    #[arg(long, value_name = "HOST:PORT")]
    http: Option<String>,
    /// Memory tier: its size, and a directory on tmpfs if it shall survive a restart of the worker; 0 for none
    #[arg(long, value_name = "SIZE[:DIR]", default_value = "1GiB")]
    memory: String,
    /// Disk tier: a directory of its own and the bytes it may take; may be given several times
    #[arg(long, value_name = "PATH:SIZE")]
    disk: Vec<String>,
    /// Eviction policy: scan (resists scans), arc or lru
    #[arg(long, default_value = "scan")]
    policy: String,
    /// Forget what was cached longer ago than this (for example 12h); 0 for never
    #[arg(long, default_value = "0")]
    ttl: String,
    /// Failure zone
    #[arg(long, default_value = "")]
    zone: String,
    /// Range requests to origins at once
    #[arg(long, default_value_t = 64)]
    fetch_concurrency: usize,
    /// Memory for bytes on their way from origins and disks to clients
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    inflight: String,
    /// Memory for directory listings
    #[arg(long, value_name = "SIZE", default_value = "128MiB")]
    listings: String,
    /// Limit of the whole process, memory tier included: the other budgets are cut to fit
    #[arg(long, value_name = "SIZE")]
    memory_limit: Option<String>,
    /// One request to an origin, its retries included, is given up after this
    #[arg(long, default_value = "90s")]
    fetch_deadline: String,
    /// Let TCP clients attach sources that read this host's files (file://) or run its programs (secret process:)
    #[arg(long)]
    allow_local_sources: bool,
    /// On SIGTERM: serve on for at most this long while clients go to other workers
    #[arg(long, default_value = "30s")]
    drain_timeout: String,
    /// Filter of log lines, for example info or info,efc_worker=debug
    #[arg(long, default_value = "info", env = "EFC_LOG")]
    log_level: String,
    /// Shape of log lines: text or json
    #[arg(long, default_value = "text")]
    log_format: String,
    /// Append the log to this file instead of stderr
    #[arg(long, value_name = "PATH")]
    log_file: Option<PathBuf>,
    /// When ready, write the line of JSON with the addresses to this inherited file descriptor instead of stdout
    #[arg(long, value_name = "N", default_value_t = 1)]
    ready_fd: RawFd,
    /// Stops when the process that started it ends
    #[arg(long)]
    parent_death: bool,
    /// Stops when its standard input ends: a pipe whose other end is with whoever needs it
    #[arg(long)]
    lifeline: bool,
}

fn main() -> std::process::ExitCode {
    let args = Args::parse();
    match run(args) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("efc-worker: {e:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<()> {
    efc_common::alloc::tune(Some(4 << 20), 16 << 20);
    efc_common::log::install(&args.log_level, args.log_format.parse()?, args.log_file.as_deref())?;
    let config = config(&args)?;
    let drain = parse_duration(&args.drain_timeout).context("--drain-timeout")?;
    let ready = ready_file(args.ready_fd)?;
    let metrics = efc_common::metrics::install()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_name("efc-worker")
        .build()
        .context("start the runtime")?;
    runtime.block_on(async {
        let parent = Parent::watch(args.parent_death, args.lifeline)?;
        serve(config, drain, ready, Arc::new(move || metrics.render()), parent).await
    })
}

async fn serve(
    config: WorkerConfig,
    drain: Duration,
    ready: Option<File>,
    metrics: Arc<dyn Fn() -> String + Send + Sync>,
    mut parent: Parent,
) -> Result<()> {
    let mut term = signal(SignalKind::terminate()).context("listen to SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("listen to SIGINT")?;
    let mut usr2 = signal(SignalKind::user_defined2()).context("listen to SIGUSR2")?;
    let id = config.id.clone();
    let connect: Connector =
        Arc::new(|spec, keys| Box::pin(async move { efc_backend::connect(&spec, keys.as_ref()).await }));
    let starting = Worker::start(config, connect, Some(metrics));
    let worker = tokio::select! {
        w = starting => w?,
        _ = term.recv() => return Ok(()),
        _ = int.recv() => return Ok(()),
        () = parent.ended() => return Ok(()),
    };
    tracing::info!(id, addr = worker.addr(), "serving");
    say_ready(ready, &id, &worker)?;
    let why = tokio::select! {
        _ = term.recv() => "SIGTERM",
        _ = int.recv() => "SIGINT",
        () = parent.ended() => "who started it has ended",
        _ = usr2.recv() => {
            tracing::info!("makes way for another process of this name");
            worker.make_way(WAY_PATIENCE).await;
            return Ok(());
        }
    };
    tracing::info!(why, "stopping");
    tokio::select! {
        () = worker.stop(drain) => {}
        // A second signal: now.
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    Ok(())
}

fn config(args: &Args) -> Result<WorkerConfig> {
    let mut memory = match args.memory.split_once(':') {
        Some((size, dir)) => (parse_bytes(size).context("--memory")?, Some(PathBuf::from(dir))),
        None => (parse_bytes(&args.memory).context("--memory")?, None),
    };
    let mut disks = Vec::new();
    for text in &args.disk {
        let (path, size) = text.rsplit_once(':').with_context(|| format!("--disk {text}: write PATH:SIZE"))?;
        disks.push(DiskTier { path: path.into(), quota_bytes: parse_bytes(size).context("--disk")? });
    }
    let mut inflight = parse_bytes(&args.inflight).context("--inflight")?;
    let mut listings = parse_bytes(&args.listings).context("--listings")?;
    if let Some(limit) = &args.memory_limit {
        let limit = parse_bytes(limit).context("--memory-limit")?;
        let smallest = BASE_BYTES + (32 << 20);
        ensure!(limit >= smallest, "--memory-limit is too small; give it at least {}", show_bytes(smallest));
        let room = limit - BASE_BYTES;
        inflight = inflight.min(room / 8);
        listings = listings.min(room / 8);
        let rest = room - inflight - listings;
        ensure!(memory.0 > 0 || !disks.is_empty(), "no tier; give --memory or --disk");
        memory.0 = memory.0.min(rest);
    }
    let memory = (memory.0 > 0).then_some(MemoryTier { quota_bytes: memory.0, path: memory.1 });
    let ttl = parse_duration(&args.ttl).context("--ttl")?;
    let policy = match args.policy.as_str() {
        "scan" => Policy::ScanResistant,
        "arc" => Policy::Arc,
        "lru" => Policy::Lru,
        other => bail!("--policy {other} is unknown; use scan, arc or lru"),
    };
    let store = StoreConfig { memory, disks, policy, ttl: (!ttl.is_zero()).then_some(ttl) };
    let id = args.id.clone().unwrap_or_else(host_name);
    if id.is_empty() {
        bail!("the host has no name; give --id");
    }
    let mut c = WorkerConfig::new(id, store);
    c.masters = args.master.iter().filter(|m| !m.is_empty()).cloned().collect();
    c.listen.clone_from(&args.listen);
    c.advertise.clone_from(&args.advertise);
    // Clients open it by this name, wherever they run.
    c.unix = args.unix.as_ref().map(std::path::absolute).transpose().context("--unix")?;
    c.http.clone_from(&args.http);
    c.zone.clone_from(&args.zone);
    c.fetch_concurrency = args.fetch_concurrency;
    c.inflight_bytes = inflight;
    c.listing_bytes = listings;
    c.fetch_deadline = parse_duration(&args.fetch_deadline).context("--fetch-deadline")?;
    c.allow_local_sources = args.allow_local_sources;
    Ok(c)
}

/// Takes over the descriptor the parent opened for us; `None` for stdout.
fn ready_file(fd: RawFd) -> Result<Option<File>> {
    if fd == 1 {
        return Ok(None);
    }
    ensure!(fd > 2, "--ready-fd {fd} is not a descriptor to report on; pass 1 or one above 2");
    // SAFETY: borrowed only to ask the kernel whether it is open; a closed number gives EBADF and nothing else.
    let asked = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_setfd(asked, rustix::io::FdFlags::CLOEXEC)
        .with_context(|| format!("--ready-fd {fd} is not open"))?;
    // SAFETY: it is open (just checked), was inherited for this very use, and nothing else in the process knows its number.
    Ok(Some(File::from(unsafe { OwnedFd::from_raw_fd(fd) })))
}

/// One line for whoever started us.
fn say_ready(out: Option<File>, id: &str, worker: &Worker) -> Result<()> {
    let line = serde_json::json!({
        "data": worker.addr(),
        "unix": worker.unix().map(|p| p.display().to_string()).unwrap_or_default(),
        "http": worker.http().map(|a| a.to_string()).unwrap_or_default(),
        "id": id,
    });
    match out {
        Some(mut file) => writeln!(file, "{line}").context("write to --ready-fd"),
        None => {
            let mut stdout = std::io::stdout().lock();
            // A shell that does not listen is no reason to stop.
            let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
            Ok(())
        }
    }
}
