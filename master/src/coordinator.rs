//! Who is silent. The leader keeps in memory when each worker and session was last heard, and turns too long a silence into a command;
//! nothing of this is replicated. One task on every master owns the decisions; it acts only while the node leads.
//!
//! What must stay true: nobody is expired who was not silent for the whole grace period *as this leader could hear it*. A new
//! leader therefore counts from its election, and one that was stopped or starved (its clock jumped) begins anew.

use crate::lease::Desk;
use crate::raft::Node;
use crate::state::{Command, Outcome, State};
use efc_common::id::{Incarnation, SessionId, WorkerId};
use efc_common::metrics::gauge;
use efc_common::{Error, Kind, Result};
use efc_proto::control::WorkerLoad;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Silences that end a life.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grace {
    /// Of a worker.
    pub(crate) worker: Duration,
    /// Of a client session.
    pub(crate) session: Duration,
}

impl Grace {
    /// How often the silence is looked at.
    fn tick(&self) -> Duration {
        (self.worker.min(self.session) / 20).clamp(Duration::from_millis(10), Duration::from_millis(500))
    }

    /// How often a worker should be heard: three may be lost.
    pub(crate) fn heartbeat(&self) -> Duration {
        (self.worker / 4).max(Duration::from_millis(20))
    }
}

struct Beat {
    incarnation: Incarnation,
    at: Instant,
    load: Option<WorkerLoad>,
}

#[derive(Default)]
struct Tables {
    workers: HashMap<WorkerId, Beat>,
    sessions: HashMap<SessionId, Beat>,
}

/// What the leader heard, shared by the gRPC doors (they note) and the coordinator (it judges).
#[derive(Default)]
pub(crate) struct Heard {
    tables: Mutex<Tables>,
}

impl Heard {
    /// A worker was heard in a life.
    pub(crate) fn worker(&self, id: &WorkerId, incarnation: Incarnation, load: Option<WorkerLoad>) {
        self.tables.lock().workers.insert(id.clone(), Beat { incarnation, at: Instant::now(), load });
    }

    /// A session was heard in a life.
    pub(crate) fn session(&self, id: SessionId, incarnation: Incarnation) {
        self.tables.lock().sessions.insert(id, Beat { incarnation, at: Instant::now(), load: None });
    }

    /// Silence and last load of a worker in a life.
    pub(crate) fn of_worker(&self, id: &WorkerId, incarnation: Incarnation) -> Option<(Duration, Option<WorkerLoad>)> {
        let t = self.tables.lock();
        t.workers.get(id).filter(|b| b.incarnation == incarnation).map(|b| (b.at.elapsed(), b.load))
    }

    /// Silence of a session in a life.
    pub(crate) fn of_session(&self, id: SessionId, incarnation: Incarnation) -> Option<Duration> {
        let t = self.tables.lock();
        t.sessions.get(&id).filter(|b| b.incarnation == incarnation).map(|b| b.at.elapsed())
    }

    fn forget_all(&self) {
        *self.tables.lock() = Tables::default();
    }

    /// The commands that end the lives that were silent for too long. Lives not heard yet are counted from now.
    fn silent(&self, state: &State, grace: Grace, now: Instant) -> Vec<Command> {
        let mut t = self.tables.lock();
        let workers = state.workers().filter(|w| !w.gone).map(|w| (w.id.clone(), w.incarnation));
        let mut out: Vec<Command> = overdue(&mut t.workers, workers, grace.worker, now)
            .into_iter()
            .map(|(id, incarnation)| Command::ExpireWorker { id, incarnation })
            .collect();
        // Those that lease are judged by the desk of leases, by their own time.
        let sessions = state.sessions().values().filter(|s| s.lease_ms == 0).map(|s| (s.id, s.incarnation));
        out.extend(
            overdue(&mut t.sessions, sessions, grace.session, now)
                .into_iter()
                .map(|(session, incarnation)| Command::ExpireSession { session, incarnation, office: 0 }),
        );
        out
    }
}

/// Judges the living against a table, and drops from the table who is not among them.
fn overdue<K: Hash + Eq + Clone>(
    table: &mut HashMap<K, Beat>,
    living: impl Iterator<Item = (K, Incarnation)>,
    grace: Duration,
    now: Instant,
) -> Vec<(K, Incarnation)> {
    let mut seen = HashMap::with_capacity(table.len());
    let mut out = Vec::new();
    for (key, incarnation) in living {
        let beat = match table.remove(&key) {
            Some(b) if b.incarnation == incarnation => b,
            // A life that this leader has not heard, or the table is behind or ahead of the applied state.
            _ => Beat { incarnation, at: now, load: None },
        };
        if now.saturating_duration_since(beat.at) > grace {
            out.push((key.clone(), incarnation));
        }
        seen.insert(key, beat);
    }
    *table = seen;
    out
}

/// Runs until Raft stops. The owner of all commands that nobody asked for.
pub(crate) async fn run(node: Arc<Node>, heard: Arc<Heard>, desk: Arc<Desk>, grace: Grace) {
    let mut ticks = tokio::time::interval(grace.tick());
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut led: Option<u64> = None;
    let mut refused = false;
    let mut last = Instant::now();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            // An election need not wait for the tick; but one attempt to take office a tick.
            Ok(_) = node.wait(|v| v.leads), if led.is_none() && !refused => {}
        }
        let now = Instant::now();
        let gap = now - std::mem::replace(&mut last, now);
        let view = node.view();
        export(&node, view.term, view.applied, view.leads);
        if !view.leads {
            refused = false;
            desk.leave(&node.not_leader());
            if led.take().is_some() {
                tracing::info!(node = view.node, "no longer the leader");
            }
            continue;
        }
        if led != Some(view.term) || !desk.in_office(node.read(State::office)) {
            // What was acknowledged before this leader's time must be applied before anybody is judged by it.
            let taken = take_office(&node, &desk).await;
            refused = taken.is_err();
            if let Err(e) = taken {
                tracing::debug!(error = %e, "not yet the leader");
                continue;
            }
            led = Some(view.term);
            heard.forget_all();
            last = Instant::now();
            tracing::info!(node = view.node, term = view.term, "leads the masters");
            continue;
        }
        if gap > grace.worker.min(grace.session) / 2 {
            tracing::warn!(
                gap_ms = gap.as_millis() as u64,
                "this master stood still; all workers and clients get a new period of grace"
            );
            heard.forget_all();
        }
        let commands = node.read(|s| heard.silent(s, grace, now));
        for c in commands {
            if !expire(&node, c).await {
                break;
            }
        }
        // Time spent here is no reason to suspect the clock.
        last = Instant::now();
    }
}

/// A new leader names the cluster if it is the first, ends a change of the voters that its predecessor left half done, and opens the desk of
/// leases under a number that no other time of office has.
async fn take_office(node: &Node, desk: &Desk) -> Result<()> {
    node.linearizable().await?;
    if node.read(|s| s.cluster().is_empty()) {
        let cluster = format!("{:016x}", rand::random::<u64>());
        node.propose(Command::Found { cluster }).await?;
        tracing::info!(cluster = node.read(|s| s.cluster().to_string()), "the cluster is founded");
    }
    if node.view().joint {
        node.finish_change().await?;
    }
    let Outcome::Office { office } = node.propose(Command::TakeOffice).await? else {
        return Err(Error::new(Kind::Io, "apply answered something else than was asked"));
    };
    desk.open(node, office);
    Ok(())
}

/// False if nothing can be agreed on now.
async fn expire(node: &Node, command: Command) -> bool {
    let what = match &command {
        Command::ExpireWorker { id, .. } => format!("worker {id}"),
        Command::ExpireSession { session, .. } => format!("session {session}"),
        other => format!("{other:?}"),
    };
    match node.propose(command).await {
        Ok(_) => {
            tracing::warn!(epoch = node.read(|s| s.epoch().0), "{what} was silent for too long and is expired");
            true
        }
        // It left or began a new life meanwhile.
        Err(e) if matches!(e.kind(), Kind::Stale | Kind::NotFound) => true,
        // The next tick sees it again, if this node still leads.
        Err(e) => {
            tracing::debug!(error = %e, "{what} could not be expired");
            false
        }
    }
}

fn export(node: &Node, term: u64, applied: u64, leads: bool) {
    let (live, draining, gone, sessions, epoch) = node.read(|s| {
        let count = |f: fn(&crate::state::Worker) -> bool| s.workers().filter(|w| f(w)).count();
        let (live, gone) = (count(|w| w.in_ring()), count(|w| w.gone));
        (live, count(|w| !w.gone && w.draining), gone, s.sessions().len(), s.epoch().0)
    });
    gauge!("efc_master_is_leader").set(if leads { 1.0 } else { 0.0 });
    gauge!("efc_master_term").set(term as f64);
    gauge!("efc_master_applied_index").set(applied as f64);
    for (state, n) in [("live", live), ("draining", draining), ("gone", gone)] {
        gauge!("efc_master_workers", "state" => state).set(n as f64);
    }
    gauge!("efc_master_sessions").set(sessions as f64);
    gauge!("efc_ring_epoch").set(epoch as f64);
}

/// The life a heartbeat names, checked against the applied state.
///
/// # Errors
/// [`Kind::NotFound`] or [`Kind::Stale`]: the worker must register again.
pub(crate) fn check_life(state: &State, id: &WorkerId, incarnation: Incarnation) -> Result<bool> {
    let again = "register again";
    match state.worker(id) {
        None => Err(Error::new(Kind::NotFound, format!("worker `{id}` is unknown; {again}"))),
        Some(w) if w.incarnation != incarnation => Err(Error::new(
            Kind::Stale,
            format!("worker `{id}` is in life {}, not {incarnation}; {again}", w.incarnation),
        )),
        Some(w) if w.gone => Err(Error::new(Kind::Stale, format!("worker `{id}` was expired; {again}"))),
        Some(w) => Ok(w.draining),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Registration;

    fn state(workers: &[&str]) -> State {
        let mut s = State::default();
        for id in workers {
            s.apply(&Command::RegisterWorker(Registration {
                id: WorkerId((*id).into()),
                addr: "h:1".into(),
                unix: String::new(),
                host: String::new(),
                zone: String::new(),
                capacity_bytes: 1,
                metrics_addr: String::new(),
            }));
        }
        s
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_silent_are_expired_and_everybody_gets_the_whole_grace() {
        let grace = Grace { worker: Duration::from_secs(10), session: Duration::from_secs(30) };
        let (heard, mut s) = (Heard::default(), state(&["a", "b"]));
        for lease_ms in [0, 1000] {
            s.apply(&Command::OpenSession {
                client: "c".into(),
                dataset: "d".into(),
                resume: SessionId(0),
                incarnation: Incarnation(0),
                lease_ms,
            });
        }
        // Never heard: counted from the first look.
        assert_eq!(heard.silent(&s, grace, Instant::now()), []);
        tokio::time::advance(Duration::from_secs(9)).await;
        heard.worker(&WorkerId("a".into()), Incarnation(1), None);
        tokio::time::advance(Duration::from_secs(2)).await;
        let b = Command::ExpireWorker { id: WorkerId("b".into()), incarnation: Incarnation(2) };
        assert_eq!(heard.silent(&s, grace, Instant::now()), std::slice::from_ref(&b));
        // A heartbeat of an older life is none.
        s.apply(&b);
        tokio::time::advance(Duration::from_secs(20)).await;
        let c = Command::ExpireSession { session: SessionId(1), incarnation: Incarnation(3), office: 0 };
        let a = Command::ExpireWorker { id: WorkerId("a".into()), incarnation: Incarnation(1) };
        assert_eq!(heard.silent(&s, grace, Instant::now()), [a, c]);
        // A new leader begins anew.
        heard.forget_all();
        assert_eq!(heard.silent(&s, grace, Instant::now()), []);
    }

    #[test]
    fn lives_are_checked() {
        let mut s = state(&["a"]);
        let a = WorkerId("a".into());
        assert!(check_life(&s, &a, Incarnation(1)).is_ok_and(|draining| !draining));
        assert!(check_life(&s, &a, Incarnation(2)).is_err_and(|e| e.is(Kind::Stale)));
        assert!(check_life(&s, &WorkerId("b".into()), Incarnation(1)).is_err_and(|e| e.is(Kind::NotFound)));
        s.apply(&Command::ExpireWorker { id: a.clone(), incarnation: Incarnation(1) });
        assert!(check_life(&s, &a, Incarnation(1)).is_err_and(|e| e.is(Kind::Stale)));
    }
}
