//! What is known of one directory (or subtree): leases, recalls, guards, questions under way, operations that wait.
//!
//! Numbers decide what is newer, never the order of arrival: `floor` and `without` remember up to which grant something was given back, so that a
//! grant overtaken by its own recall is not believed.

use super::event::{OpId, RecallId};
use efc_common::lease::{DirKey, FileKey, GrantNumber, Mode, Moment, RequestId, Scope, Want};
use std::collections::{BTreeMap, VecDeque};

/// A lease that is believed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Held {
    pub(super) mode: Mode,
    pub(super) number: GrantNumber,
    /// The grant since which nobody else can have changed anything that is covered now.
    pub(super) since: GrantNumber,
}

/// A lease on its way back.
#[derive(Debug, Clone)]
pub(super) struct Recall {
    pub(super) id: RecallId,
    pub(super) number: GrantNumber,
    pub(super) keep_shared: bool,
    pub(super) flushing: bool,
    pub(super) flushed: bool,
    pub(super) dropping: bool,
    pub(super) dropped: bool,
    /// Readers that go past it, and that it is not released before.
    pub(super) passing: usize,
}

/// Running operations by mode.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Running {
    pub(super) shared: usize,
    pub(super) exclusive: usize,
}

impl Running {
    pub(super) fn of(&mut self, mode: Mode) -> &mut usize {
        match mode {
            Mode::Shared => &mut self.shared,
            Mode::Exclusive => &mut self.exclusive,
        }
    }

    pub(super) fn is_none(self) -> bool {
        self.shared == 0 && self.exclusive == 0
    }
}

/// One thing that can be held.
#[derive(Debug, Default)]
pub(super) struct Lease {
    pub(super) held: Option<Held>,
    /// Grants up to this number are over.
    pub(super) floor: GrantNumber,
    pub(super) recall: Option<Recall>,
    pub(super) running: Running,
}

impl Lease {
    fn is_idle(&self) -> bool {
        self.held.is_none() && self.recall.is_none() && self.running.is_none()
    }

    /// A recall that `mode` must not pass.
    fn refuses(&self, mode: Mode) -> bool {
        self.recall.as_ref().is_some_and(|r| !(r.keep_shared && mode == Mode::Shared))
    }

    /// Since which grant it does.
    fn serves(&self, mode: Mode) -> Option<GrantNumber> {
        self.held.filter(|h| h.mode.covers(mode) && !self.refuses(mode)).map(|h| h.since)
    }
}

/// A want that was sent and not answered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Question {
    pub(super) request: RequestId,
    /// When it is said again.
    pub(super) next: Moment,
}

/// How a need is covered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cover {
    /// By the lease of just what is needed.
    Own,
    /// A file, by its directory's.
    Dir,
}

/// Which room: subtrees have their own. Ordered so that a subtree comes before all it covers.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct RoomKey {
    pub(super) key: DirKey,
    pub(super) is_dir: bool,
}

impl RoomKey {
    pub(super) fn of(scope: &Scope) -> RoomKey {
        RoomKey { key: scope.dir().clone(), is_dir: !matches!(scope, Scope::Subtree(_)) }
    }

    pub(super) fn scope(&self) -> Scope {
        if self.is_dir { Scope::Dir(self.key.clone()) } else { Scope::Subtree(self.key.clone()) }
    }
}

/// All that is known of one directory, or of one subtree.
#[derive(Debug, Default)]
pub(super) struct Room {
    pub(super) lease: Lease,
    /// Files with leases, recalls or guards of their own.
    pub(super) files: BTreeMap<FileKey, Lease>,
    /// Files that the directory's grants up to this number do not cover.
    pub(super) without: BTreeMap<FileKey, GrantNumber>,
    pub(super) questions: BTreeMap<Want, Question>,
    pub(super) parked: VecDeque<OpId>,
    /// When an operation was admitted last.
    pub(super) used: Moment,
    /// Its place in the order of use, which is put right when it comes up.
    pub(super) listed: Option<Moment>,
}

impl Room {
    /// Does the directory's lease, if there is one, cover this file?
    pub(super) fn has_file(&self, file: &FileKey) -> bool {
        self.lease.held.is_some() && !self.without.contains_key(file)
    }

    /// How a need is covered now, and since which grant; none: it is not.
    pub(super) fn cover(&self, want: &Want) -> Option<(Cover, GrantNumber)> {
        let Scope::File(_, file) = &want.scope else {
            return self.lease.serves(want.mode).map(|n| (Cover::Own, n));
        };
        let own = self.files.get(file);
        if own.is_some_and(|l| l.refuses(want.mode)) {
            return None;
        }
        if let Some(since) = own.and_then(|l| l.serves(want.mode)) {
            return Some((Cover::Own, since));
        }
        self.lease.serves(want.mode).filter(|_| self.has_file(file)).map(|n| (Cover::Dir, n))
    }

    /// The leases that would cover this need and are on their way back.
    pub(super) fn leaving(&self, want: &Want) -> Vec<Scope> {
        let mut leaving = Vec::new();
        let mut whole = true;
        if let Scope::File(_, file) = &want.scope {
            let own = self.files.get(file);
            if own.is_some_and(|l| l.refuses(want.mode)) {
                leaving.push(want.scope.clone());
            }
            whole = own.is_none_or(|l| l.held.is_none());
        }
        if whole && self.lease.refuses(want.mode) {
            leaving.push(match &want.scope {
                Scope::File(dir, _) => Scope::Dir(dir.clone()),
                other => other.clone(),
            });
        }
        leaving
    }

    /// Is what would cover this need on its way back?
    pub(super) fn is_leaving(&self, want: &Want) -> bool {
        !self.leaving(want).is_empty()
    }

    /// Counts a guard in or out.
    pub(super) fn count(&mut self, want: &Want, cover: Cover, entered: bool) {
        let mode = want.mode;
        let change = |r: &mut Running| {
            let n = r.of(mode);
            *n = if entered { *n + 1 } else { n.saturating_sub(1) };
        };
        let Scope::File(_, file) = &want.scope else { return change(&mut self.lease.running) };
        let lease = self.files.entry(file.clone()).or_default();
        change(&mut lease.running);
        if lease.is_idle() {
            self.files.remove(file);
        }
        if cover == Cover::Dir {
            change(&mut self.lease.running);
        }
    }

    pub(super) fn lease(&self, scope: &Scope) -> Option<&Lease> {
        match scope {
            Scope::File(_, file) => self.files.get(file),
            _ => Some(&self.lease),
        }
    }

    pub(super) fn lease_mut(&mut self, scope: &Scope) -> &mut Lease {
        match scope {
            Scope::File(_, file) => self.files.entry(file.clone()).or_default(),
            _ => &mut self.lease,
        }
    }

    /// What is believed of this scope, by its own lease or as part of the directory's.
    pub(super) fn believed(&self, scope: &Scope) -> Option<Held> {
        match scope {
            Scope::File(_, file) => {
                let own = self.files.get(file).and_then(|l| l.held);
                own.or(self.lease.held.filter(|_| self.has_file(file)))
            }
            _ => self.lease.held,
        }
    }

    /// The scopes of its leases.
    pub(super) fn held<'a>(&'a self, key: &'a RoomKey) -> impl Iterator<Item = (Scope, Held)> + 'a {
        let files = self.files.iter().filter_map(|(f, l)| Some((Scope::File(key.key.clone(), f.clone()), l.held?)));
        self.lease.held.map(|h| (key.scope(), h)).into_iter().chain(files)
    }

    /// Running operations or recalls, or somebody who waits.
    pub(super) fn is_busy(&self) -> bool {
        let busy = |l: &Lease| l.recall.is_some() || !l.running.is_none();
        !self.parked.is_empty() || !self.questions.is_empty() || busy(&self.lease) || self.files.values().any(busy)
    }

    /// Forgets what has no meaning any more. True: all of it.
    pub(super) fn tidy(&mut self) -> bool {
        if self.questions.is_empty() && self.lease.held.is_none() {
            self.without.clear();
        }
        self.files.retain(|_, l| !l.is_idle());
        self.lease.is_idle() && self.files.is_empty() && self.parked.is_empty() && self.questions.is_empty()
    }
}
