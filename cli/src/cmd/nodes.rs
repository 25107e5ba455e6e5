//! `efc nodes`: the cache workers as the leader knows them, and what an administrator does with one.

use super::status::{self, Master, masters_table};
use crate::context::Context;
use crate::output::{percent, span};
use crate::table::Table;
use clap::{Args, Subcommand};
use efc_common::error::Context as _;
use efc_common::id::Incarnation;
use efc_common::units::show_bytes;
use efc_common::{Error, Kind, Result};
use efc_proto::control::{RingReply, WorkerInfo, WorkerState};
use serde::Serialize;

/// Arguments of `efc nodes`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
#[command(after_help = "Example: efc nodes\n         efc nodes --masters\n         efc nodes drain w3")]
pub(crate) struct NodesArgs {
    /// Show the masters too.
    #[arg(long)]
    masters: bool,
    #[command(subcommand)]
    action: Option<Action>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Take a worker out of the ring; it goes on serving what it has.
    #[command(after_help = "Example: efc nodes drain w3")]
    Drain(IdArg),
    /// Put a drained worker back into the ring.
    #[command(after_help = "Example: efc nodes undrain w3")]
    Undrain(IdArg),
    /// Remove a worker that is gone for good from the list.
    #[command(after_help = "Example: efc nodes forget w3")]
    Forget(IdArg),
}

#[derive(Debug, Args)]
struct IdArg {
    /// Id of the worker, as `efc nodes` shows it.
    id: String,
}

/// JSON of `efc nodes`.
#[derive(Debug, Serialize)]
struct Report {
    /// Epoch of the ring.
    ring_epoch: u64,
    /// All workers known, in the ring or not.
    workers: Vec<Worker>,
    /// The masters, with `--masters` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    masters: Option<Vec<Master>>,
}

/// One worker in the JSON of `efc nodes`.
#[derive(Debug, Serialize)]
struct Worker {
    /// Id.
    id: String,
    /// `live` (in the ring), `draining` (serves, not in the ring) or `gone` (silent for too long, or left).
    state: &'static str,
    /// Data plane `host:port`.
    addr: String,
    /// Its host's name.
    host: String,
    /// Failure zone, empty if none.
    zone: String,
    /// `host:port` of its metrics, empty if none.
    metrics_addr: String,
    /// Counts its lives.
    incarnation: u64,
    /// Quota of all tiers, bytes.
    capacity_bytes: u64,
    /// Of it used.
    used_bytes: u64,
    /// Segments stored.
    segments: u64,
    /// Look-ups that found their segment.
    hits: u64,
    /// Look-ups that did not.
    misses: u64,
    /// hits / (hits + misses); null before the first look-up.
    hit_rate: Option<f64>,
    /// Bytes it fetched from origins.
    origin_bytes: u64,
    /// Bytes it served.
    served_bytes: u64,
    /// Open data-plane connections.
    connections: u64,
    /// Since its last heartbeat, milliseconds.
    silent_ms: u64,
}

/// JSON of `efc nodes drain|undrain|forget`.
#[derive(Debug, Serialize)]
struct Changed {
    /// The worker.
    id: String,
    /// What was done: `drained`, `undrained` or `forgotten`.
    done: &'static str,
    /// Epoch of the ring after it.
    ring_epoch: u64,
    /// Workers in the ring after it.
    members: Vec<String>,
}

pub(crate) async fn run(context: &Context, args: NodesArgs) -> Result<()> {
    match args.action {
        Some(action) => change(context, action).await,
        None => list(context, args.masters).await,
    }
}

async fn list(context: &Context, masters: bool) -> Result<()> {
    let master = context.master()?;
    let reply = master.list_workers().await?;
    let masters = match masters {
        true => Some(status::members(&master, &master.status().await?).await),
        false => None,
    };
    let mut workers: Vec<Worker> = reply.workers.into_iter().map(worker).collect();
    workers.sort_by(|a, b| a.id.cmp(&b.id));
    context.output.print(&Report { ring_epoch: reply.epoch, workers, masters }, table)
}

async fn change(context: &Context, action: Action) -> Result<()> {
    let master = context.master()?;
    let any_life = Incarnation(0);
    let (id, done, ring) = match action {
        Action::Drain(a) => (a.id.clone(), "drained", master.drain_worker(&a.id, any_life).await),
        Action::Undrain(a) => (a.id.clone(), "undrained", master.undrain_worker(&a.id, any_life).await),
        Action::Forget(a) => (a.id.clone(), "forgotten", master.leave_worker(&a.id, any_life).await),
    };
    let ring: RingReply = match ring {
        Err(e) if e.is(Kind::NotFound) => {
            return Err(Error::new(Kind::NotFound, format!("there is no worker `{id}`; `efc nodes` lists them")));
        }
        Err(e) if e.is(Kind::Busy) => {
            return Err(e).context(format!("worker `{id}` still lives; drain it and stop it before it is forgotten"));
        }
        other => other?,
    };
    let live = ring.members.iter().filter(|w| w.state() == WorkerState::WorkerLive);
    let members = live.map(|w| w.id.clone()).collect();
    context.output.print(&Changed { id, done, ring_epoch: ring.epoch, members }, |c| {
        format!("worker {} is {}; ring epoch {} has {} workers", c.id, c.done, c.ring_epoch, c.members.len())
    })
}

/// Name of a state.
pub(crate) fn state_name(state: WorkerState) -> &'static str {
    match state {
        WorkerState::WorkerLive => "live",
        WorkerState::WorkerDraining => "draining",
        WorkerState::WorkerGone => "gone",
        WorkerState::WorkerUnknown => "unknown",
    }
}

fn worker(w: WorkerInfo) -> Worker {
    let state = state_name(w.state());
    let load = w.load.unwrap_or_default();
    let asked = load.hits + load.misses;
    Worker {
        id: w.id,
        state,
        addr: w.addr,
        host: w.host,
        zone: w.zone,
        metrics_addr: w.metrics_addr,
        incarnation: w.incarnation,
        capacity_bytes: w.capacity_bytes,
        used_bytes: load.used_bytes,
        segments: load.segments,
        hits: load.hits,
        misses: load.misses,
        hit_rate: (asked > 0).then(|| load.hits as f64 / asked as f64),
        origin_bytes: load.origin_bytes,
        served_bytes: load.served_bytes,
        connections: load.connections,
        silent_ms: w.silent_ms,
    }
}

fn table(r: &Report) -> String {
    let mut t = Table::new(&["ID", "STATE", "ADDRESS", "ZONE", "CAPACITY", "USED", "USED%", "HIT RATE", "SILENT"]);
    for w in &r.workers {
        t.row([
            w.id.clone(),
            w.state.into(),
            w.addr.clone(),
            if w.zone.is_empty() { "-".into() } else { w.zone.clone() },
            show_bytes(w.capacity_bytes),
            show_bytes(w.used_bytes),
            percent(w.used_bytes, w.capacity_bytes),
            percent(w.hits, w.hits + w.misses),
            span(w.silent_ms),
        ]);
    }
    match &r.masters {
        Some(m) => format!("{t}\n{}", masters_table(m)),
        None => t.to_string(),
    }
}
