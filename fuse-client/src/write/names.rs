//! Names that this mount changed and listings may not show yet.
//!
//! A file that is being written has no object: its name is here until it is committed. What is at the store is here as long as listings may be believed that were made
//! before: each entry knows when the change was made, and wins over listings that were asked for earlier.

use super::file::FileState;
use bytes::Bytes;
use efc_common::node::Node;
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Changes between two sweeps of what listings show by now.
const SWEEP_EVERY: usize = 1024;

enum Now {
    Draft(Arc<FileState>),
    There(Node),
    Gone,
}

struct Changed {
    now: Now,
    at: Instant,
}

#[derive(Default)]
struct Inner {
    dirs: HashMap<Bytes, BTreeMap<Bytes, Changed>>,
    /// Prefixes below which listings made earlier are wrong.
    floors: Vec<(Bytes, Instant)>,
    changes: usize,
}

/// All of them.
pub(super) struct Overlay {
    inner: Mutex<Inner>,
    ttl: Duration,
}

impl Overlay {
    /// Listings are believed for `ttl`.
    pub(super) fn new(ttl: Duration) -> Overlay {
        Overlay { inner: Mutex::default(), ttl }
    }

    /// A file with changes.
    pub(super) fn draft(&self, dir: &Bytes, name: &Bytes, file: Arc<FileState>) {
        self.enter(dir, name, Now::Draft(file));
    }

    /// A name that was made, or whose file was committed.
    pub(super) fn there(&self, dir: &Bytes, name: &Bytes, node: Node) {
        self.enter(dir, name, Now::There(node));
    }

    /// A name that was removed.
    pub(super) fn gone(&self, dir: &Bytes, name: &Bytes) {
        self.enter(dir, name, Now::Gone);
    }

    fn enter(&self, dir: &Bytes, name: &Bytes, now: Now) {
        let mut inner = self.inner.lock();
        let entry = Changed { now, at: Instant::now() };
        inner.dirs.entry(dir.clone()).or_default().insert(name.clone(), entry);
        inner.changes += 1;
        if inner.changes >= SWEEP_EVERY {
            inner.changes = 0;
            let old = |at: Instant| at.elapsed() > self.ttl + Duration::from_secs(1);
            for names in inner.dirs.values_mut() {
                names.retain(|_, c| matches!(c.now, Now::Draft(_)) || !old(c.at));
            }
            inner.dirs.retain(|_, names| !names.is_empty());
            inner.floors.retain(|(_, at)| !old(*at));
        }
    }

    /// What is known of a name that an origin asked at `asked` may not tell: `Some(None)`, it is gone.
    pub(super) fn find(&self, dir: &Bytes, name: &[u8], asked: Instant) -> Option<Option<Node>> {
        self.inner.lock().dirs.get(dir)?.get(name)?.node(asked)
    }

    /// The same of all names of a directory.
    pub(super) fn all(&self, dir: &Bytes, asked: Instant) -> Vec<(Bytes, Option<Node>)> {
        let inner = self.inner.lock();
        let names = inner.dirs.get(dir).into_iter().flatten();
        names.filter_map(|(name, c)| Some((name.clone(), c.node(asked)?))).collect()
    }

    /// Others may change the names of this directory now: of what was changed here only drafts are still known.
    pub(super) fn forget(&self, dir: &[u8]) {
        if let Some(names) = self.inner.lock().dirs.get_mut(dir) {
            names.retain(|_, c| matches!(c.now, Now::Draft(_)));
        }
    }

    /// The files with changes in this directory (the one of this name).
    pub(super) fn drafts_in(&self, dir: &[u8], name: Option<&[u8]>) -> Vec<Arc<FileState>> {
        let inner = self.inner.lock();
        let names = inner.dirs.get(dir).into_iter().flatten();
        let drafts = names.filter(|(n, _)| name.is_none_or(|name| name == &n[..]));
        drafts.filter_map(|(_, c)| if let Now::Draft(file) = &c.now { Some(file.clone()) } else { None }).collect()
    }

    /// Is there a file with changes in this directory or below?
    pub(super) fn drafts_below(&self, prefix: &[u8]) -> Vec<Arc<FileState>> {
        let inner = self.inner.lock();
        let below = inner.dirs.iter().filter(|(dir, _)| dir.starts_with(prefix)).flat_map(|(_, names)| names.values());
        below.filter_map(|c| if let Now::Draft(file) = &c.now { Some(file.clone()) } else { None }).collect()
    }

    /// Everything below a directory changed at once: what was known of it is wrong, and so are listings made before now.
    pub(super) fn replaced(&self, prefix: &Bytes) {
        let mut inner = self.inner.lock();
        inner.dirs.retain(|dir, _| !dir.starts_with(prefix));
        inner.floors.push((prefix.clone(), Instant::now()));
    }

    /// Listings of `dir` made before this are wrong.
    pub(super) fn floor(&self, dir: &[u8]) -> Option<Instant> {
        let inner = self.inner.lock();
        inner.floors.iter().filter(|(prefix, _)| dir.starts_with(prefix)).map(|(_, at)| *at).max()
    }
}

impl Changed {
    fn node(&self, asked: Instant) -> Option<Option<Node>> {
        match &self.now {
            Now::Draft(file) => Some(Some(file.node())),
            _ if asked > self.at => None,
            Now::There(node) => Some(Some(node.clone())),
            Now::Gone => Some(None),
        }
    }
}
