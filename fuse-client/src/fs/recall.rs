//! Leases on their way back: what is open for writing is brought to the origin, and what is remembered is dropped, here and in the kernel.
//!
//! The kernel drops names by the epoch, which takes no directory's lock: whoever holds one may be waiting for the very lease that is going. Attributes are dropped node by
//! node, pages of files that are open too; a file that is not open keeps its pages until the next open has compared the version.

use super::belief::{Beliefs, Own};
use super::{FileKind, Shared};
use crate::kernel::{Notification, Notifier};
use crate::lease::Holder;
use crate::namespace::Inode;
use async_trait::async_trait;
use bytes::Bytes;
use efc_backend::tree::OpenFile;
use efc_common::hint::Hint;
use efc_common::lease::{DirKey, Scope};
use efc_common::{Kind, Result, Retry};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tracing::warn;

/// For the kernel to drop one thing.
const KERNEL_DEADLINE: Duration = Duration::from_secs(10);
/// The kernel drops pages within this time, if it has none to write.
const LENGTH_PAUSE: Duration = Duration::from_millis(50);
/// How long an origin that does not answer is tried to be told of changes. The masters end the session of who does not give back for 30 s.
const FLUSH_PATIENCE: Duration = Duration::from_secs(20);
const FLUSH_PAUSE: Duration = Duration::from_millis(500);
/// Longer than the tick of a server's clock: the next writer's change gets another time, hence another version, than ours.
const CLOCK_TICK: Duration = Duration::from_millis(12);

/// The file system as the holder of what is leased.
pub(super) struct FsHolder {
    /// Weak: the file system owns the leases.
    shared: Weak<Shared>,
}

impl FsHolder {
    pub(super) fn new(shared: Weak<Shared>) -> FsHolder {
        FsHolder { shared }
    }
}

#[async_trait]
impl Holder for FsHolder {
    async fn flush(&self, scope: &Scope) {
        let Some(shared) = self.shared.upgrade() else { return };
        if let Some(beliefs) = &shared.beliefs {
            shared.flush(beliefs, scope).await;
        }
    }

    async fn drop_cached(&self, scope: &Scope) {
        let Some(shared) = self.shared.upgrade() else { return };
        if let Some(beliefs) = &shared.beliefs {
            shared.drop_scope(beliefs, scope).await;
        }
    }

    async fn hinted(&self, hints: Vec<Hint>) {
        if let Some(shared) = self.shared.upgrade() {
            shared.hinted(hints).await;
        }
    }

    async fn drop_all(&self) {
        if let Some(shared) = self.shared.upgrade() {
            shared.drop_everything().await;
        }
    }
}

/// What the kernel is to drop.
#[derive(Default)]
struct Drops {
    names: bool,
    attributes: Vec<Arc<Inode>>,
    pages: Vec<Arc<Inode>>,
}

impl Shared {
    async fn flush(&self, beliefs: &Beliefs, scope: &Scope) {
        let begun = Instant::now();
        let mut changed = false;
        for (inode, file) in self.files.writers() {
            if !self.is_in(beliefs, &inode, scope) {
                continue;
            }
            changed |= inode.is_racy(CLOCK_TICK);
            while let Err(e) = self.bring_home(&inode, &*file).await {
                if e.retry() != Retry::Later || begun.elapsed() > FLUSH_PATIENCE {
                    // What was written stays with the open file, which tells it at the next fsync or close.
                    warn!(path = inode.path(), error = %e, "changes could not be brought to the origin; others go on without them");
                    break;
                }
                tokio::time::sleep(FLUSH_PAUSE).await;
            }
        }
        for (dir, name) in self.places(beliefs, scope) {
            if let Ok(tree) = self.tree()
                && let Err(e) = tree.settle(&dir, name.as_deref()).await
            {
                warn!(error = %e, "changes could not be brought to the origin; others go on without them");
            }
        }
        if !changed {
            changed = self.nodes_in(beliefs, scope).iter().any(|i| i.is_racy(CLOCK_TICK));
        }
        if changed && !self.has_drafts() {
            tokio::time::sleep(CLOCK_TICK).await;
        }
    }

    async fn bring_home(&self, inode: &Arc<Inode>, file: &dyn OpenFile) -> Result<()> {
        if self.has_drafts() && file.is_clean() {
            return Ok(());
        }
        let change = inode.begin();
        // Not to be believed: another lease of it may be gone by now.
        change.finish(file.sync(true).await?, Duration::ZERO);
        Ok(())
    }

    /// Is a node leased in this scope?
    fn is_in(&self, beliefs: &Beliefs, inode: &Inode, scope: &Scope) -> bool {
        let Ok(own) = beliefs.own(&self.parts.namespace, inode) else { return false };
        match (own, scope) {
            (Own::In(dir, file), Scope::File(in_dir, in_file)) => dir == *in_dir && file == *in_file,
            (Own::In(dir, _) | Own::Key(dir), Scope::Dir(key)) => dir == *key,
            (Own::In(dir, _) | Own::Key(dir), Scope::Subtree(prefix)) => dir.is_in(prefix),
            _ => false,
        }
    }

    /// The same, and not by a lease of its own.
    fn is_covered(&self, beliefs: &Beliefs, inode: &Inode, scope: &Scope) -> bool {
        let own = match beliefs.own(&self.parts.namespace, inode) {
            Ok(Own::In(dir, file)) => Scope::File(dir, file),
            _ => return false,
        };
        own.dir() == scope.dir() && !beliefs.leases.has(&own)
    }

    /// Directories at the origin, and the one name in them, that a scope is about.
    fn places(&self, beliefs: &Beliefs, scope: &Scope) -> Vec<(Bytes, Option<Bytes>)> {
        let name = match scope {
            Scope::File(_, file) => Some(file.as_bytes().clone()),
            Scope::Dir(_) => None,
            Scope::Subtree(_) => return Vec::new(),
        };
        let dirs = beliefs.nodes(&self.parts.namespace, scope.dir());
        dirs.into_iter().filter(|d| d.dir.is_some()).map(|d| (d.locator(), name.clone())).collect()
    }

    /// The nodes whose attributes a scope covers.
    fn nodes_in(&self, beliefs: &Beliefs, scope: &Scope) -> Vec<Arc<Inode>> {
        let namespace = &self.parts.namespace;
        let of_key = beliefs.nodes(namespace, scope.dir());
        match scope {
            Scope::File(_, file) => of_key.iter().filter_map(|d| namespace.child(d, file.as_bytes())).collect(),
            Scope::Dir(_) => {
                let below = of_key.iter().flat_map(|d| namespace.children(d)).filter(|c| c.dir.is_none());
                let below: Vec<_> = below.filter(|c| self.is_covered(beliefs, c, scope)).collect();
                of_key.into_iter().chain(below).collect()
            }
            // Whoever moves what is below believes nothing by that.
            Scope::Subtree(_) => Vec::new(),
        }
    }

    async fn drop_scope(&self, beliefs: &Beliefs, scope: &Scope) {
        let mut drops = Drops { names: matches!(scope, Scope::Dir(_)), ..Drops::default() };
        if let Scope::Dir(key) = scope {
            self.forget_names(beliefs, key);
        }
        for inode in self.nodes_in(beliefs, scope) {
            let was_believed = inode.placed.load(Ordering::Acquire) || inode.now().fresh_until > Instant::now();
            self.doubt(inode, was_believed, &mut drops);
        }
        if let Ok(tree) = self.tree() {
            for (dir, name) in self.places(beliefs, scope) {
                tree.forget(&dir, name.as_deref()).await;
            }
        }
        self.drop_in_kernel(drops).await;
    }

    fn forget_names(&self, beliefs: &Beliefs, key: &DirKey) {
        for dir in beliefs.nodes(&self.parts.namespace, key) {
            self.parts.directories.forget(&dir);
        }
    }

    /// Nothing of a node is believed any more.
    fn doubt(&self, inode: Arc<Inode>, was_believed: bool, drops: &mut Drops) {
        inode.doubt();
        // Without OPEN nobody knows what is open, only what was read.
        let may_be_open = match self.parts.tree {
            Some(_) => self.files.is_open(inode.id),
            None => inode.streams.lock().is_some(),
        };
        match inode.kind {
            _ if !was_believed => {}
            FileKind::File if may_be_open => drops.pages.push(inode),
            _ => drops.attributes.push(inode),
        }
    }

    async fn drop_everything(&self) {
        let mut drops = Drops { names: true, ..Drops::default() };
        for inode in self.parts.namespace.all() {
            self.parts.directories.forget(&inode);
            // Also what an operation of the lost session has answered since it was doubted the first time.
            self.doubt(inode, true, &mut drops);
        }
        if let Ok(tree) = self.tree() {
            tree.forget(&self.parts.namespace.root().locator(), None).await;
        }
        self.drop_in_kernel(drops).await;
    }

    async fn drop_in_kernel(&self, drops: Drops) {
        let Some(session) = self.session.get().and_then(Weak::upgrade) else { return };
        let notifier = session.notifier();
        let names = (drops.names && notifier.has_epoch()).then_some(Notification::IncrementEpoch);
        let attributes = drops.attributes.iter();
        let attributes = attributes.map(|i| Notification::InvalidateInode { node: i.id, offset: -1, length: 0 });
        for what in names.into_iter().chain(attributes) {
            if is_over(notifier.tell(what, KERNEL_DEADLINE).await.map(drop)) {
                return;
            }
        }
        for inode in &drops.pages {
            if is_over(self.drop_all_pages(notifier, inode).await) {
                return;
            }
        }
    }

    /// The kernel drops the pages of a file. First it writes those that were changed through a mapping, which waits for no lease meanwhile. It writes none as long as somebody waits
    /// to change the length, perhaps for a lease: then it drops them when that is answered, and is not waited for.
    async fn drop_all_pages(&self, notifier: &Notifier, inode: &Inode) -> Result<()> {
        let pages = Notification::InvalidateInode { node: inode.id, offset: 0, length: 0 };
        inode.dropping.fetch_add(1, Ordering::SeqCst);
        self.crossed.notify_waiters();
        let held_up = async {
            tokio::time::sleep(LENGTH_PAUSE).await;
            self.until(|| inode.waiting_lengths.load(Ordering::SeqCst) > 0).await;
        };
        let told = tokio::select! {
            biased;
            told = notifier.tell(pages, KERNEL_DEADLINE) => told.map(drop),
            () = held_up => Ok(()),
        };
        inode.dropping.fetch_sub(1, Ordering::SeqCst);
        told
    }

    /// Returns when this is so, which [`Shared::crossed`] tells.
    pub(super) async fn until(&self, is: impl Fn() -> bool) {
        loop {
            let told = self.crossed.notified();
            if is() {
                return;
            }
            told.await;
        }
    }
}

/// Has the mount ended, and all that the kernel knew of it?
fn is_over(told: Result<()>) -> bool {
    match told {
        Err(e) if e.is(Kind::Unavailable) => true,
        Err(e) => {
            warn!(error = %e, "the kernel keeps something old until its time is over");
            false
        }
        Ok(()) => false,
    }
}
