//! What is held and who waits: plain tables, and the questions asked of them. Nothing here decides.

use efc_common::id::SessionId;
use efc_common::lease::{FileKey, GrantNumber, Mode, Moment, RequestId, Want};
use std::collections::{BTreeMap, VecDeque};

/// A recall that is due or was sent.
#[derive(Debug, Clone)]
pub(super) struct Recall {
    pub(super) keep_shared: bool,
    /// When it was (or will be) said first.
    pub(super) first: Moment,
    /// When it is said (again).
    pub(super) next: Moment,
}

/// One session's lease of one thing.
#[derive(Debug, Clone)]
pub(super) struct Hold {
    pub(super) mode: Mode,
    pub(super) number: GrantNumber,
    pub(super) since: Moment,
    /// The file is believed only as part of the directory: it goes when the directory's lease goes.
    pub(super) implied: bool,
    pub(super) recall: Option<Recall>,
}

pub(super) type Holders = BTreeMap<SessionId, Hold>;

/// A want in a queue.
#[derive(Debug, Clone)]
pub(super) struct Waiter {
    /// Order of arrival over all queues.
    pub(super) arrival: u64,
    pub(super) session: SessionId,
    pub(super) request: RequestId,
    pub(super) want: Want,
}

/// Who waits, in order.
#[derive(Debug, Default)]
pub(super) struct Queue {
    pub(super) waiters: VecDeque<Waiter>,
    /// The one (by arrival) for whom everything in the way was recalled. Nothing new gets in its way until somebody is served.
    pub(super) recalled_for: Option<u64>,
}

impl Queue {
    /// Lets somebody wait who comes from another queue, at the place that is due.
    pub(super) fn insert(&mut self, waiter: Waiter) {
        let at = self.waiters.partition_point(|w| w.arrival < waiter.arrival);
        self.waiters.insert(at, waiter);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiters.is_empty()
    }
}

/// A file with holders of its own.
#[derive(Debug, Default)]
pub(super) struct Split {
    pub(super) holders: Holders,
    pub(super) queue: Queue,
}

/// A directory that somebody holds or waits for. Its holders believe all of it but for `files`.
#[derive(Debug, Default)]
pub(super) struct Dir {
    pub(super) holders: Holders,
    pub(super) files: BTreeMap<FileKey, Split>,
    pub(super) queue: Queue,
}

/// Does another session's hold forbid `mode`? Constant time: who holds exclusively holds alone.
pub(super) fn forbids(holders: &Holders, session: SessionId, mode: Mode) -> bool {
    match mode {
        Mode::Exclusive => others(holders, session),
        Mode::Shared => holders.iter().next().is_some_and(|(&s, h)| s != session && h.mode == Mode::Exclusive),
    }
}

/// Does another session hold it at all?
pub(super) fn others(holders: &Holders, session: SessionId) -> bool {
    holders.len() > usize::from(holders.contains_key(&session))
}

/// Those whose hold forbids `mode`.
pub(super) fn in_the_way(holders: &Holders, session: SessionId, mode: Mode) -> Vec<SessionId> {
    holders.iter().filter(|&(&s, h)| s != session && !h.mode.compatible(mode)).map(|(&s, _)| s).collect()
}

impl Dir {
    /// Nobody holds or waits for any of it.
    pub(super) fn is_idle(&self) -> bool {
        self.holders.is_empty() && self.queue.is_empty() && self.files.is_empty()
    }

    pub(super) fn exceptions(&self) -> Vec<FileKey> {
        self.files.keys().cloned().collect()
    }

    /// Splits a file off: each holder of the directory holds it as a part of that, until told otherwise.
    pub(super) fn split(&mut self, file: &FileKey) {
        let holders =
            self.holders.iter().map(|(&s, h)| (s, Hold { implied: true, recall: None, ..h.clone() })).collect();
        self.files.insert(file.clone(), Split { holders, queue: Queue::default() });
    }

    /// Everybody who holds any of it, and how to name it: the file, or none for the directory.
    pub(super) fn all_holds(&self) -> impl Iterator<Item = (SessionId, Option<&FileKey>)> {
        let files = self.files.iter().flat_map(|(f, s)| s.holders.keys().map(move |&id| (id, Some(f))));
        self.holders.keys().map(|&id| (id, None)).chain(files)
    }

    /// Does anybody but `session` hold any of it, or has waited for it since before `arrival`?
    pub(super) fn is_used_by_others(&self, session: SessionId, arrival: u64) -> bool {
        let waits = |q: &Queue| q.waiters.iter().any(|w| w.session != session && w.arrival < arrival);
        others(&self.holders, session)
            || waits(&self.queue)
            || self.files.values().any(|s| others(&s.holders, session) || waits(&s.queue))
    }
}
