//! Metadata of objects as attributes of nodes, and a bounded cache of what was learnt of them.
//!
//! Known are files this mount wrote or asked for, by locator and version, and directories by locator (their marker's metadata, or that they have none). Others may change
//! metadata without changing the version, so what is known is forgotten after the mount's `ttl`, as names are.

use bytes::Bytes;
use efc_backend::objects::Metadata;
use efc_backend::tree::{Change, SetTime};
use efc_common::node::{FileKind, Node, Time};
use moka::sync::Cache;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Share of the process budget that this cache may take at most, bytes.
const KNOWN_BYTES_MAX: u64 = 32 << 20;

/// What is known of an object.
#[derive(Debug, Clone)]
pub(super) struct Known {
    /// Metadata; empty for a directory without a marker.
    pub(super) metadata: Metadata,
    /// There is an object of this name (for a directory: its marker).
    pub(super) there: bool,
}

/// The cache.
pub(super) struct Knowledge {
    cache: Cache<(Bytes, Bytes), Arc<Known>>,
}

impl Knowledge {
    pub(super) fn new(ttl: Duration) -> Knowledge {
        let weigh = |(locator, version): &(Bytes, Bytes), known: &Arc<Known>| {
            let m = &known.metadata;
            let texts: usize = m.other.iter().chain(&m.headers).map(|(k, v)| k.len() + v.len() + 64).sum();
            u32::try_from(locator.len() + version.len() + texts + 400).unwrap_or(u32::MAX)
        };
        let builder = Cache::builder().weigher(weigh).max_capacity(KNOWN_BYTES_MAX);
        Knowledge {
            cache: builder.time_to_live(ttl.max(Duration::from_secs(1))).support_invalidation_closures().build(),
        }
    }

    pub(super) fn get(&self, locator: &Bytes, version: &Bytes) -> Option<Arc<Known>> {
        self.cache.get(&(locator.clone(), version.clone()))
    }

    /// Of a directory.
    pub(super) fn dir(&self, locator: &Bytes) -> Option<Arc<Known>> {
        self.get(locator, &Bytes::new())
    }

    pub(super) fn learn(&self, node: &Node, metadata: &Metadata, there: bool) {
        let known = Known { metadata: metadata.clone(), there };
        self.cache.insert((node.locator.clone(), node.version.clone()), Arc::new(known));
    }

    /// What is known of `only`, or of everything below `dir`, is asked for again.
    pub(super) fn forget(&self, dir: &Bytes, only: Option<Bytes>) {
        let dir = dir.clone();
        let of = move |(key, _): &(Bytes, Bytes), _: &Arc<Known>| match &only {
            Some(only) => key == only,
            None => key.starts_with(&dir),
        };
        if let Err(e) = self.cache.invalidate_entries_if(of) {
            // It was built to be able to.
            tracing::error!(error = %e, "metadata is not forgotten");
            self.cache.invalidate_all();
        }
    }

    pub(super) fn forget_dir(&self, locator: &Bytes) {
        self.cache.invalidate(&(locator.clone(), Bytes::new()));
    }

    /// Names of a directory were changed by us: its time is now.
    pub(super) fn touch_dir(&self, locator: &Bytes) {
        if let Some(known) = self.dir(locator) {
            let mut known = Known::clone(&known);
            known.metadata.mtime = Some(now());
            self.cache.insert((locator.clone(), Bytes::new()), Arc::new(known));
        }
    }
}

/// A number never given before in this process.
pub(super) fn edition() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Relaxed)
}

/// The time.
pub(super) fn now() -> Time {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Time { secs: i64::try_from(since.as_secs()).unwrap_or(i64::MAX), nanos: since.subsec_nanos() }
}

/// `node` with what its metadata says.
pub(super) fn apply(mut node: Node, m: &Metadata) -> Node {
    let attr = &mut node.attr;
    if let Some(mode) = m.mode {
        attr.mode = Some(mode & 0o7777);
        if attr.kind == FileKind::File && mode & libc::S_IFMT == libc::S_IFLNK {
            attr.kind = FileKind::Symlink;
        }
    }
    attr.uid = m.uid.or(attr.uid);
    attr.gid = m.gid.or(attr.gid);
    attr.mtime = m.mtime.unwrap_or(attr.mtime);
    attr.atime = m.atime.or(attr.atime);
    attr.ctime = attr.ctime.max(attr.mtime.min(now())).max(m.ctime.unwrap_or_default());
    node
}

/// Enters a change, but for the size. True if anything is another than before that the store has to know: an access time alone is not worth a copy of the object.
pub(super) fn change(m: &mut Metadata, kind: u32, change: &Change) -> bool {
    let time = |t: SetTime| match t {
        SetTime::At(t) => t,
        SetTime::Now => now(),
    };
    m.atime = change.atime.map(time).or(m.atime);
    let before = m.clone();
    if let Some(mode) = change.mode {
        let kind = m.mode.map(|m| m & libc::S_IFMT).filter(|k| *k != 0).unwrap_or(kind);
        m.mode = Some(kind | mode & 0o7777);
    }
    m.uid = change.uid.or(m.uid);
    m.gid = change.gid.or(m.gid);
    m.mtime = change.mtime.map(time).or(m.mtime);
    let changed = *m != before;
    if changed {
        m.ctime = Some(now());
    }
    changed
}
