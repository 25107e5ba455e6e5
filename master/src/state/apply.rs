//! `apply`: the state machine. Pure and total: every command of every age has an outcome, and a refused one changes nothing.

use super::command::Why;
use super::{Command, Dataset, Life, Outcome, Registration, Session, State, Worker};
use efc_common::id::{Incarnation, SessionId, WorkerId};

/// Bounds of the replicated state: it lives in memory and travels whole in a snapshot.
const WORKERS_MAX: usize = 10_000;
const DATASETS_MAX: usize = 10_000;
const SESSIONS_MAX: usize = 100_000;
/// Workers that are gone are remembered for the administrator, the newest this many.
const GONE_MAX: usize = 256;

impl State {
    /// Applies one command.
    pub(crate) fn apply(&mut self, command: &Command) -> Outcome {
        match command {
            Command::Found { cluster } => {
                if self.cluster.is_empty() {
                    self.cluster.clone_from(cluster);
                }
                Outcome::Done
            }
            Command::RegisterWorker(r) => self.register(r),
            Command::DrainWorker { id, incarnation, draining } => self.drain(id, *incarnation, *draining),
            Command::LeaveWorker { id, incarnation } => self.leave(id, *incarnation),
            Command::ForgetWorker { id } => self.forget(id),
            Command::ExpireWorker { id, incarnation } => self.expire(id, *incarnation),
            Command::CreateDataset(d) => self.create_dataset(d),
            Command::DeleteDataset { name } => self.delete_dataset(name),
            Command::OpenSession { client, dataset, resume, incarnation, lease_ms } => {
                let opened = Session {
                    id: *resume,
                    incarnation: *incarnation,
                    client: client.clone(),
                    dataset: dataset.clone(),
                    lease_ms: *lease_ms,
                };
                self.open_session(opened)
            }
            Command::CloseSession { session, incarnation } => self.end_session(*session, *incarnation),
            Command::ExpireSession { office, .. } if *office != 0 && *office != self.office => {
                Outcome::refused(Why::Stale, format!("office {office} is over, this is {}", self.office))
            }
            Command::ExpireSession { session, incarnation, .. } => self.end_session(*session, *incarnation),
            Command::TakeOffice => {
                self.office += 1;
                Outcome::Office { office: self.office }
            }
        }
    }

    /// What a command that was just applied, with this outcome, did to the life of a session that leases.
    pub(crate) fn life_after(&self, command: &Command, outcome: &Outcome) -> Option<Life> {
        match (command, outcome) {
            (Command::OpenSession { lease_ms: 0, .. }, Outcome::Session { session, incarnation }) => {
                Some(Life::Ended(*session, *incarnation))
            }
            (Command::OpenSession { .. }, Outcome::Session { session, incarnation }) => {
                Some(Life::Begun(*session, *incarnation))
            }
            // Ends whichever life it was in; none of it begins again.
            (Command::CloseSession { session, .. } | Command::ExpireSession { session, .. }, Outcome::Done) => {
                Some(Life::Ended(*session, Incarnation(self.last_incarnation)))
            }
            _ => None,
        }
    }

    fn next_incarnation(&mut self) -> Incarnation {
        self.last_incarnation += 1;
        Incarnation(self.last_incarnation)
    }

    /// The one place that changes `workers`, hence the one that moves the ring epoch.
    fn put_worker(&mut self, id: &WorkerId, new: Option<Worker>) -> Outcome {
        let incarnation = new.as_ref().map_or(Incarnation(0), |w| w.incarnation);
        let old = match new.clone() {
            Some(w) => self.workers.insert(id.clone(), w),
            None => self.workers.remove(id),
        };
        if old.filter(Worker::in_ring) != new.filter(Worker::in_ring) {
            self.epoch.0 += 1;
        }
        Outcome::Worker { incarnation, epoch: self.epoch }
    }

    fn register(&mut self, r: &Registration) -> Outcome {
        let draining = match self.workers.get(&r.id) {
            Some(old) => old.draining,
            None if self.workers.len() >= WORKERS_MAX => {
                return Outcome::refused(Why::Exhausted, format!("the cluster has {WORKERS_MAX} workers already"));
            }
            None => false,
        };
        let worker = Worker {
            id: r.id.clone(),
            incarnation: self.next_incarnation(),
            addr: r.addr.clone(),
            unix: r.unix.clone(),
            host: r.host.clone(),
            zone: r.zone.clone(),
            capacity_bytes: r.capacity_bytes,
            metrics_addr: r.metrics_addr.clone(),
            gone: false,
            draining,
        };
        self.put_worker(&r.id, Some(worker))
    }

    /// The worker in the life that is meant, or the refusal.
    fn life(&self, id: &WorkerId, incarnation: Incarnation) -> Result<Worker, Outcome> {
        let Some(w) = self.workers.get(id) else {
            return Err(Outcome::refused(Why::NotFound, format!("worker `{id}` is unknown; `efc nodes` lists all")));
        };
        if incarnation.0 != 0 && w.incarnation != incarnation {
            return Err(Outcome::refused(
                Why::Stale,
                format!("worker `{id}` is in life {}, not {incarnation}: register again", w.incarnation),
            ));
        }
        Ok(w.clone())
    }

    fn drain(&mut self, id: &WorkerId, incarnation: Incarnation, draining: bool) -> Outcome {
        match self.life(id, incarnation) {
            Err(refused) => refused,
            Ok(w) => self.put_worker(id, Some(Worker { draining, ..w })),
        }
    }

    fn leave(&mut self, id: &WorkerId, incarnation: Incarnation) -> Outcome {
        match self.life(id, incarnation) {
            Err(refused) => refused,
            Ok(w) => {
                let outcome = self.put_worker(id, Some(Worker { gone: true, draining: false, ..w }));
                self.prune_gone();
                outcome
            }
        }
    }

    fn expire(&mut self, id: &WorkerId, incarnation: Incarnation) -> Outcome {
        match self.life(id, incarnation) {
            Err(refused) => refused,
            Ok(w) => {
                let outcome = self.put_worker(id, Some(Worker { gone: true, ..w }));
                self.prune_gone();
                outcome
            }
        }
    }

    fn forget(&mut self, id: &WorkerId) -> Outcome {
        match self.life(id, Incarnation(0)) {
            Err(refused) => refused,
            Ok(w) if !w.gone => Outcome::refused(
                Why::Busy,
                format!("worker `{id}` is alive; stop it, or wait until its silence was noticed, then forget it"),
            ),
            Ok(_) => self.put_worker(id, None),
        }
    }

    /// Drops the longest gone, so that workers with ever new names do not fill the state.
    fn prune_gone(&mut self) {
        while self.workers.values().filter(|w| w.gone).count() > GONE_MAX {
            let oldest = self.workers.values().filter(|w| w.gone).min_by_key(|w| w.incarnation).map(|w| w.id.clone());
            match oldest {
                Some(id) => self.put_worker(&id, None),
                None => return,
            };
        }
    }

    fn create_dataset(&mut self, d: &Dataset) -> Outcome {
        if let Some(old) = self.datasets.get(&d.name) {
            let same = Dataset { id: old.id, created_ms: old.created_ms, ..d.clone() } == *old;
            return match same {
                true => Outcome::Dataset(old.clone()),
                false => Outcome::refused(
                    Why::AlreadyExists,
                    format!("dataset `{}` exists with other contents; delete it first", d.name),
                ),
            };
        }
        if self.datasets.len() >= DATASETS_MAX {
            return Outcome::refused(Why::Exhausted, format!("the cluster has {DATASETS_MAX} datasets already"));
        }
        self.last_dataset += 1;
        let made = Dataset { id: self.last_dataset, ..d.clone() };
        self.datasets.insert(made.name.clone(), made.clone());
        Outcome::Dataset(made)
    }

    fn delete_dataset(&mut self, name: &str) -> Outcome {
        let users = self.sessions.values().filter(|s| s.dataset == name).count();
        if users > 0 {
            return Outcome::refused(
                Why::Busy,
                format!("dataset `{name}` is mounted by {users} clients; unmount them"),
            );
        }
        match self.datasets.remove(name) {
            Some(d) => Outcome::Dataset(d),
            None => Outcome::refused(Why::NotFound, format!("dataset `{name}` does not exist")),
        }
    }

    /// `opened.incarnation`: the life the caller knows.
    fn open_session(&mut self, opened: Session) -> Outcome {
        let (resume, knows) = (opened.id, opened.incarnation);
        let known = match self.sessions.get(&resume) {
            Some(s) if knows.0 != 0 && s.incarnation != knows => {
                return Outcome::refused(
                    Why::Stale,
                    format!("session {resume} is in life {}, not {knows}", s.incarnation),
                );
            }
            None if knows.0 != 0 => return Outcome::refused(Why::NotFound, format!("session {resume} is not open")),
            found => found.is_some(),
        };
        if !known && self.sessions.len() >= SESSIONS_MAX {
            return Outcome::refused(Why::Exhausted, format!("the cluster has {SESSIONS_MAX} client sessions already"));
        }
        let id = match known {
            true => resume,
            false => {
                self.last_session += 1;
                SessionId(self.last_session)
            }
        };
        let incarnation = self.next_incarnation();
        self.sessions.insert(id, Session { id, incarnation, ..opened });
        Outcome::Session { session: id, incarnation }
    }

    fn end_session(&mut self, id: SessionId, incarnation: Incarnation) -> Outcome {
        match self.sessions.get(&id) {
            None => Outcome::refused(Why::NotFound, format!("session {id} is not open")),
            Some(s) if incarnation.0 != 0 && s.incarnation != incarnation => {
                Outcome::refused(Why::Stale, format!("session {id} was taken over"))
            }
            Some(_) => {
                self.sessions.remove(&id);
                Outcome::Done
            }
        }
    }
}
