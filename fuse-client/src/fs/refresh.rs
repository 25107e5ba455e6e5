//! What people ask of a mount itself. `efc-fuse dirty`: which files wait for the store. `efc-fuse refresh PATH`: what is remembered below a path is forgotten, so that the next look sees what others changed at the origin, without waiting for the ttl.

use super::{EfcFs, Shared};
use crate::kernel::Notification;
use crate::namespace::Inode;
use efc_backend::tree::Pending;
use efc_common::hint::Hint;
use efc_common::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Weak;
use std::time::Duration;
use tracing::{debug, info};

/// How long the kernel may take to drop its copies.
const KERNEL_DEADLINE: Duration = Duration::from_secs(10);

impl EfcFs {
    /// Forgets what is remembered of `path` (relative to the mount's root) and below. The number of nodes that were.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a path with `.` or `..`, [`Kind::Timeout`] when the kernel does not drop its copies.
    pub async fn forget_below(&self, path: &[u8]) -> Result<usize> {
        self.shared.forget_below(path).await
    }

    /// Files with changes that the origin has not, after the changes of `discard` were given up.
    ///
    /// # Errors
    /// [`Kind::NotFound`]: that file has none; [`Kind::Unsupported`] on a read-only mount.
    pub async fn dirty(&self, discard: Option<&str>) -> Result<Vec<Dirty>> {
        let tree = self.shared.tree()?;
        if let Some(path) = discard {
            tree.discard(path.trim_start_matches('/').as_bytes()).await?;
            self.shared.forget_below(path.as_bytes()).await?;
        }
        let shown =
            |p: Pending| Dirty { path: String::from_utf8_lossy(&p.path).into_owned(), bytes: p.bytes, error: p.error };
        let mut files: Vec<Dirty> = tree.pending().into_iter().map(shown).collect();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(files)
    }
}

/// A file with changes that the origin has not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dirty {
    /// Path below the mountpoint.
    pub path: String,
    /// Length, bytes.
    pub bytes: u64,
    /// Why it could not be brought there.
    pub error: Option<String>,
}

impl Shared {
    /// What a store says was changed: as if it was refreshed, all of it at once.
    pub(super) async fn hinted(&self, hints: Vec<Hint>) {
        let Some(bucket) = self.beliefs.as_ref().and_then(|b| b.bucket.as_deref()) else { return };
        let root = self.parts.namespace.root().locator();
        let ours = hints.iter().filter(|h| h.bucket == bucket).flat_map(|h| &h.keys);
        let mut nodes = HashMap::new();
        for path in ours.filter_map(|key| key.strip_prefix(&root[..])) {
            let found = self.look_again(path);
            nodes.extend(found.into_iter().flatten().map(|node| (node.id, node)));
        }
        debug!(nodes = nodes.len(), "the store says that others changed something");
        if !nodes.is_empty()
            && let Err(e) = self.forget(nodes.into_values().collect()).await
        {
            info!(error = %e, "the kernel keeps something old until its time is over");
        }
    }

    async fn forget_below(&self, path: &[u8]) -> Result<usize> {
        self.forget(self.look_again(path)?).await
    }

    /// Has what is at a path and below looked at anew, and says which nodes that are.
    fn look_again(&self, path: &[u8]) -> Result<Vec<Arc<Inode>>> {
        let mut at = self.parts.namespace.root();
        for name in path.split(|b| *b == b'/').filter(|n| !n.is_empty()) {
            if matches!(name, b"." | b"..") {
                return Err(Error::new(Kind::Invalid, "a path to refresh is given without `.` and `..`"));
            }
            match self.parts.namespace.child(&at, name) {
                Some(child) => at = child,
                // Nobody has looked there: only the directory above may remember something, of the name itself.
                None => {
                    self.parts.directories.refresh(&at, true);
                    return Ok(vec![at]);
                }
            }
        }
        self.parts.directories.refresh(&at, true);
        let mut all = self.parts.namespace.below(&at);
        if let Some(d) = at.dentry() {
            self.parts.directories.refresh(&d.parent, false);
            all.push(d.parent);
        }
        Ok(all)
    }

    async fn forget(&self, nodes: Vec<Arc<Inode>>) -> Result<usize> {
        for node in &nodes {
            self.parts.directories.changed(node);
            if self.parts.namespace.follows() {
                node.expire();
            }
        }
        if let Some(session) = self.session.get().and_then(Weak::upgrade) {
            let notifier = session.notifier();
            if notifier.has_epoch() {
                notifier.tell(Notification::IncrementEpoch, KERNEL_DEADLINE).await?;
            }
            for node in &nodes {
                if !notifier.has_epoch()
                    && let Some(d) = node.dentry()
                {
                    let gone = Notification::InvalidateEntry { parent: d.parent.id, name: d.name };
                    notifier.tell(gone, KERNEL_DEADLINE).await?;
                }
                // Attributes only: pages go when the version turns out to have moved.
                let attributes = Notification::InvalidateInode { node: node.id, offset: -1, length: 0 };
                notifier.tell(attributes, KERNEL_DEADLINE).await?;
            }
        }
        Ok(nodes.len())
    }
}
