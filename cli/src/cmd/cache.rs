//! `efc cache`: what the workers hold, and changes of it. Files are named by dataset paths, directories with all below them.

use crate::context::{Cluster, Context};
use crate::dataset::{DatasetPath, Found, each_file};
use crate::output::{percent, warn};
use crate::progress::{Failure, Progress};
use crate::table::Table;
use clap::{Args, Subcommand};
use efc_client::wire::{Connection, Endpoint, Identity};
use efc_common::units::show_bytes;
use efc_common::{Error, Kind, Result};
use efc_proto::control::{WorkerInfo, WorkerState};
use efc_proto::data::{self, manage::Action};
use efc_proto::frame::Message;
use efc_proto::status::from_fail;
use futures::StreamExt;
use futures::future::join_all;
use futures::stream::BoxStream;
use serde::Serialize;
use std::ffi::OsString;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Connecting to one worker.
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);
/// One question to one worker. Evicting all takes the longest.
const ASK_DEADLINE: Duration = Duration::from_secs(60);
/// Files asked for at once; each is one question to every worker.
const FILES_AT_ONCE: usize = 32;

#[derive(Debug, Subcommand)]
pub(crate) enum CacheCommand {
    /// Without PATH each worker and tier; with PATH what is cached of those files.
    #[command(after_help = "Examples:\n  efc cache stat\n  efc cache stat dataset://images/train")]
    Stat(StatArgs),
    /// Drop cached data; it is fetched again when it is read.
    #[command(after_help = "Examples:\n  efc cache evict dataset://images/old\n  efc cache evict --all")]
    Evict(EvictArgs),
    /// Keep what is cached of files from being evicted; warm them up first.
    #[command(after_help = "Example: efc warmup dataset://images/hot && efc cache pin dataset://images/hot")]
    Pin(PathsArgs),
    /// Let pinned files be evicted again.
    #[command(after_help = "Example: efc cache unpin dataset://images/hot")]
    Unpin(PathsArgs),
}

#[derive(Debug, Args)]
pub(crate) struct StatArgs {
    /// dataset://name/path.
    paths: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct PathsArgs {
    /// dataset://name/path.
    #[arg(required = true)]
    paths: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct EvictArgs {
    /// dataset://name/path.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    paths: Vec<OsString>,
    /// Everything in every worker that is not pinned.
    #[arg(long)]
    all: bool,
}

/// JSON of `efc cache stat` without a path and of `efc cache evict --all` (counters after it).
#[derive(Debug, Serialize)]
struct Workers {
    /// Workers that are live or draining, by id.
    workers: Vec<Worker>,
    /// Quota of all tiers that answered, bytes.
    capacity_bytes: u64,
    /// Of it used.
    used_bytes: u64,
    /// Segments in them.
    segments: u64,
    /// Pinned bytes in them.
    pinned_bytes: u64,
}

/// One worker's cache.
#[derive(Debug, Default, Serialize)]
struct Worker {
    /// Id.
    id: String,
    /// `live` or `draining`.
    state: &'static str,
    /// Why it could not be asked, else null; the counters are 0 then.
    error: Option<String>,
    /// Memory first, then disks.
    tiers: Vec<Tier>,
    /// Look-ups that found their segment, since it started.
    hits: u64,
    /// Look-ups that did not.
    misses: u64,
    /// Bytes answered from memory.
    served_memory_bytes: u64,
    /// Bytes answered from disk.
    served_disk_bytes: u64,
    /// Bytes answered as they came from the origin.
    served_origin_bytes: u64,
    /// Requests sent to origins.
    origin_requests: u64,
    /// Segments dropped because their checksum was wrong.
    corrupt: u64,
    /// Segments evicted to make room.
    evictions: u64,
}

/// One tier of a worker.
#[derive(Debug, Serialize)]
struct Tier {
    /// `memory`, or `disk:PATH`.
    name: String,
    /// Quota, bytes.
    capacity_bytes: u64,
    /// Of it used.
    used_bytes: u64,
    /// Segments in it.
    segments: u64,
    /// Pinned bytes in it.
    pinned_bytes: u64,
    /// Taken out of use after an I/O error.
    ejected: bool,
}

/// JSON of `efc cache stat|evict|pin|unpin PATH...`.
#[derive(Debug, Serialize)]
struct Files {
    /// `stat`, `evict`, `pin` or `unpin`.
    action: &'static str,
    /// Files found.
    files: u64,
    /// Their bytes.
    bytes: u64,
    /// Files of which every byte is cached (is evicted, is pinned ...).
    files_whole: u64,
    /// Cached segments that the action met. After a change of the ring a segment may be in two workers: it counts twice.
    segments: u64,
    /// Their bytes.
    cached_bytes: u64,
    /// Of them pinned now.
    pinned_bytes: u64,
    /// Paths that failed.
    failed: u64,
    /// The first 10,000 of them.
    errors: Vec<Failure>,
}

pub(crate) async fn run(context: &Context, command: CacheCommand) -> Result<()> {
    match command {
        CacheCommand::Stat(a) if a.paths.is_empty() => workers(context, data::CacheStat {}.into()).await,
        CacheCommand::Evict(a) if a.all => workers(context, data::EvictAll {}.into()).await,
        CacheCommand::Stat(a) => files(context, "stat", Action::Stat, &a.paths).await,
        CacheCommand::Evict(a) => files(context, "evict", Action::Evict, &a.paths).await,
        CacheCommand::Pin(a) => files(context, "pin", Action::Pin, &a.paths).await,
        CacheCommand::Unpin(a) => files(context, "unpin", Action::Unpin, &a.paths).await,
    }
}

/// Asks every worker that runs, in the ring or not, and prints its counters.
async fn workers(context: &Context, question: Message) -> Result<()> {
    let Cluster { master, me, .. } = context.cluster().await?;
    let mut known = master.list_workers().await?.workers;
    known.retain(|w| matches!(w.state(), WorkerState::WorkerLive | WorkerState::WorkerDraining));
    known.sort_by(|a, b| a.id.cmp(&b.id));
    let answers = join_all(known.iter().map(|w| ask(w, &me, &question))).await;
    let all: Vec<Worker> = known.iter().zip(answers).map(|(w, a)| worker(w, a)).collect();
    let sum = |of: fn(&Tier) -> u64| all.iter().flat_map(|w| &w.tiers).map(of).sum();
    let report = Workers {
        capacity_bytes: sum(|t| t.capacity_bytes),
        used_bytes: sum(|t| t.used_bytes),
        segments: sum(|t| t.segments),
        pinned_bytes: sum(|t| t.pinned_bytes),
        workers: all,
    };
    let silent: Vec<&Worker> = report.workers.iter().filter(|w| w.error.is_some()).collect();
    silent.iter().for_each(|w| warn(&format!("worker {}: {}", w.id, w.error.as_deref().unwrap_or_default())));
    context.output.print(&report, workers_table)?;
    match (silent.len(), report.workers.len(), matches!(question, Message::EvictAll(_))) {
        (0, ..) => Ok(()),
        (n, all, true) => {
            Err(Error::new(Kind::Unavailable, format!("{n} of {all} workers did not answer and still hold their data")))
        }
        (n, all, false) if n == all => Err(Error::new(Kind::Unavailable, "no worker answers")),
        _ => Ok(()),
    }
}

async fn ask(w: &WorkerInfo, me: &Identity, question: &Message) -> Result<data::CacheStats> {
    let conn = Connection::open(&Endpoint::Tcp(w.addr.clone()), me, CONNECT_DEADLINE).await?;
    let mut answers = conn.ask(question.clone(), ASK_DEADLINE, 0).await?;
    match answers.next().await?.message {
        Message::CacheStats(s) => Ok(s),
        Message::Fail(f) => Err(from_fail(&f)),
        m => Err(Error::new(Kind::Corrupt, "worker sent an answer that does not fit").with("message", m.name())),
    }
}

fn worker(w: &WorkerInfo, answer: Result<data::CacheStats>) -> Worker {
    let known = Worker { id: w.id.clone(), state: super::nodes::state_name(w.state()), ..Worker::default() };
    let s = match answer {
        Ok(s) => s,
        Err(e) => return Worker { error: Some(e.to_string()), ..known },
    };
    let tier = |t: data::TierStats| Tier {
        name: t.name,
        capacity_bytes: t.capacity,
        used_bytes: t.used,
        segments: t.segments,
        pinned_bytes: t.pinned,
        ejected: t.ejected,
    };
    Worker {
        tiers: s.tiers.into_iter().map(tier).collect(),
        hits: s.hits,
        misses: s.misses,
        served_memory_bytes: s.served_memory_bytes,
        served_disk_bytes: s.served_disk_bytes,
        served_origin_bytes: s.served_origin_bytes,
        origin_requests: s.origin_requests,
        corrupt: s.corrupt,
        evictions: s.evictions,
        ..known
    }
}

fn workers_table(r: &Workers) -> String {
    let mut t = Table::new(&["WORKER", "TIER", "CAPACITY", "USED", "USED%", "SEGMENTS", "PINNED"]);
    for w in &r.workers {
        for tier in &w.tiers {
            let name = if tier.ejected { format!("{} (out of use)", tier.name) } else { tier.name.clone() };
            t.row([
                w.id.clone(),
                name,
                show_bytes(tier.capacity_bytes),
                show_bytes(tier.used_bytes),
                percent(tier.used_bytes, tier.capacity_bytes),
                tier.segments.to_string(),
                show_bytes(tier.pinned_bytes),
            ]);
        }
    }
    let mut served =
        Table::new(&["WORKER", "HIT RATE", "FROM MEMORY", "FROM DISK", "FROM ORIGIN", "GETS", "EVICTED", "CORRUPT"]);
    for w in r.workers.iter().filter(|w| w.error.is_none()) {
        served.row([
            w.id.clone(),
            percent(w.hits, w.hits + w.misses),
            show_bytes(w.served_memory_bytes),
            show_bytes(w.served_disk_bytes),
            show_bytes(w.served_origin_bytes),
            w.origin_requests.to_string(),
            w.evictions.to_string(),
            w.corrupt.to_string(),
        ]);
    }
    format!("{t}\n{served}")
}

async fn files(context: &Context, name: &'static str, action: Action, paths: &[OsString]) -> Result<()> {
    let paths = paths.iter().map(|p| DatasetPath::required(p)).collect::<Result<Vec<_>>>()?;
    let cluster = context.cluster().await?;
    if cluster.ring.is_empty() {
        return Err(Error::new(Kind::Unavailable, "the cluster has no live cache worker; `efc nodes` shows all"));
    }
    let progress = Progress::new();
    let sum: [AtomicU64; 3] = Default::default();
    let cancelled = progress
        .drive(async {
            let work = async |files: BoxStream<'static, Found>| {
                files.for_each_concurrent(FILES_AT_ONCE, async |f| manage(&f, action, &sum, &progress).await).await;
            };
            each_file(&cluster, &paths, &progress, work).await;
            Ok(())
        })
        .await?;
    let (failed, errors) = progress.failures();
    let report = Files {
        action: name,
        files: progress.files_total.load(Relaxed),
        bytes: progress.bytes_total.load(Relaxed),
        files_whole: progress.files.load(Relaxed),
        segments: sum[0].load(Relaxed),
        cached_bytes: sum[1].load(Relaxed),
        pinned_bytes: sum[2].load(Relaxed),
        failed,
        errors,
    };
    context.output.print(&report, files_text)?;
    progress.verdict(cancelled, "managed")
}

async fn manage(found: &Found, action: Action, sum: &[AtomicU64; 3], progress: &Progress) {
    let size = found.file.size;
    let done = match size {
        0 => Ok(data::Managed::default()),
        _ => found.origin.peers.manage(&found.file, action).await,
    };
    match done {
        Ok(m) => {
            sum.iter().zip([m.segments, m.bytes, m.pinned_bytes]).for_each(|(n, add)| {
                n.fetch_add(add, Relaxed);
            });
            progress.bytes.fetch_add(size, Relaxed);
            progress.files.fetch_add(u64::from(m.bytes >= size), Relaxed);
        }
        Err(e) => progress.fail(&found.path, &e),
    }
}

fn files_text(r: &Files) -> String {
    let did = match r.action {
        "evict" => "evicted",
        "pin" => "pinned",
        "unpin" => "unpinned",
        _ => "cached",
    };
    let pinned =
        if r.action == "stat" { format!(", {} of it pinned", show_bytes(r.pinned_bytes)) } else { String::new() };
    format!(
        "{} files of {}: {did} {} ({}) in {} segments{pinned}; {} files whole",
        r.files,
        show_bytes(r.bytes),
        show_bytes(r.cached_bytes),
        percent(r.cached_bytes, r.bytes),
        r.segments,
        r.files_whole,
    )
}
