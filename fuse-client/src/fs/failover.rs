//! What makes a mount outlive its process (decision 0011): requests that must not be done twice, and what a successor finds of its predecessor's open files.
//!
//! A request is done once though it may come twice: before the origin is asked for a change that cannot be repeated, that is written down ([`Once::begin`]), and so is its answer
//! before it is sent. A successor that gets it again gives that answer, or does it again *in doubt*: a refusal that the first attempt would explain is looked into
//! ([`efc_backend::tree::Tree::in_doubt`]).

use super::change::remove_parked;
use super::open::Parked;
use super::{EfcFs, Shared};
use crate::holder::Held;
use crate::holder::line::Item;
use crate::journal::{self, Journal};
use crate::kernel::{Caller, Outcomes, Resent};
use crate::lease::Succession;
use crate::lock::LocksLeft;
use crate::namespace::Inode;
use crate::write::ObjectTree;
use async_trait::async_trait;
use bytes::Bytes;
use efc_backend::tree::{Allocate, Change, DynTree, OpenFile};
use efc_common::id::{Incarnation, SessionId};
use efc_common::metrics::counter;
use efc_common::node::Node;
use efc_common::{Error, Kind, Result};
use efc_proto::state::{self, attempt};
use futures::{StreamExt, stream};
use parking_lot::Mutex;
use prost::Message as _;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::Notify;
use tracing::{debug, error, info, warn};

/// Files of a predecessor that are opened at once.
const OPENS_AT_ONCE: usize = 64;
/// An append waits so long for one that the predecessor had begun on the same file: its caller may be gone.
const APPEND_PATIENCE: Duration = Duration::from_secs(2);
/// What a server has taken of a process that died it has done after this time, or nearly always: only then is it looked at, and done again.
const LATE: Duration = Duration::from_millis(100);
/// After which what came again is told: the kernel sends it at once.
const RESENT_SOON: Duration = Duration::from_secs(1);
/// What has not come again after this does not come.
const RESEND_PATIENCE: Duration = Duration::from_secs(60);

/// What makes the mount outlive this process.
pub struct Failover {
    /// Nodes, open files and locks.
    pub journal: Arc<Journal>,
    /// Requests that must not be done twice.
    pub outcomes: Arc<Outcomes>,
    /// Files that the object store does not have yet.
    pub drafts: Option<ObjectTree>,
    /// Who keeps all that.
    pub held: Arc<Held>,
}

/// What a predecessor left of its open files.
pub struct Inherited {
    /// What it had written down.
    pub state: state::Checkpoint,
    /// Files that are open without a name, by node.
    pub files: HashMap<u64, OwnedFd>,
}

/// What is known of requests that a predecessor had begun.
#[derive(Default)]
pub(super) struct Begun {
    /// Renames that were made.
    renamed: Mutex<HashSet<u64>>,
    /// Nodes that it was appending to, by request.
    appends: Mutex<BTreeMap<u64, u64>>,
    appended: Notify,
    /// Its nodes, with their look-ups.
    nodes: Mutex<Vec<(u64, u64)>>,
}

/// A request that is to be done once.
pub(super) struct Once {
    unique: u64,
    /// What the predecessor was about to do for it.
    before: Option<state::Attempt>,
}

impl Once {
    /// May it have been done already?
    pub(super) fn is_in_doubt(&self) -> bool {
        self.before.is_some()
    }

    /// Where the predecessor was going to append.
    pub(super) fn appended_at(&self) -> Option<u64> {
        match self.before.as_ref()?.what.as_ref()? {
            attempt::What::Append(a) => Some(a.offset),
            attempt::What::Rename(_) => None,
        }
    }

    /// Now it is done: everything that it waits for is there. The tree to do it by.
    ///
    /// # Errors
    /// EROFS without one, and want of memory.
    pub(super) fn begin(&self, shared: &Shared, what: Option<attempt::What>) -> Result<DynTree> {
        let tree = shared.tree()?;
        if let Some(failover) = &shared.parts.failover {
            failover.outcomes.begin(self.unique, &state::Attempt { what }.encode_to_vec())?;
        }
        let doubtful = if self.is_in_doubt() { tree.in_doubt() } else { None };
        Ok(doubtful.unwrap_or_else(|| tree.clone()))
    }
}

impl Failover {
    /// What the leases of a mount go on with.
    pub(super) fn succession(&self, last: Option<(SessionId, Incarnation)>, locks: Vec<LocksLeft>) -> Succession {
        let held = self.held.clone();
        let keep = move |session: SessionId, life: Incarnation| {
            if let Err(e) = held.keep(Item::Session, &session_text(session, life), None) {
                warn!(error = %e, "a successor of this process would begin with another session");
            }
        };
        Succession { last, keep: Box::new(keep), journal: self.journal.clone(), locks }
    }
}

/// A session's life as it is kept.
fn session_text(session: SessionId, life: Incarnation) -> String {
    format!("{} {}", session.0, life.0)
}

/// The life of a session that was kept.
///
/// # Errors
/// [`Kind::Corrupt`] for other text.
pub fn session_from(text: &str) -> Result<(SessionId, Incarnation)> {
    let numbers = text.split_once(' ').and_then(|(s, i)| Some((s.parse().ok()?, i.parse().ok()?)));
    let (session, life) =
        numbers.ok_or_else(|| Error::new(Kind::Corrupt, "the session of the predecessor is not understood"))?;
    Ok((SessionId(session), Incarnation(life)))
}

impl EfcFs {
    /// The request of `ctx`, to be done once.
    pub(super) fn once(&self, ctx: &Caller) -> Once {
        let failover = self.shared.parts.failover.as_ref().filter(|_| ctx.resent);
        let before = failover.and_then(|f| f.outcomes.begun_before(ctx.unique));
        Once { unique: ctx.unique, before: before.map(|text| state::Attempt::decode(text).unwrap_or_default()) }
    }

    /// Everything that is known now is there for a successor, which reads this format of the journal. Nothing is answered any more.
    pub fn write_down_for(&self, format: u32) {
        let Some(failover) = &self.shared.parts.failover else { return };
        self.shared.write_down();
        if format != *journal::FORMATS.end()
            && let Err(e) = failover.journal.renew_in(format, || self.shared.checkpoint())
        {
            error!(error = %e, format, "the journal cannot be written as the other program reads it; that will not take over");
        }
    }

    /// Takes up what the predecessor was doing and had open. To be called before the kernel's requests are read.
    ///
    /// # Errors
    /// When the origin does not answer.
    pub async fn restore(&self, inherited: Inherited) -> Result<()> {
        let shared = &self.shared;
        let Some(failover) = &shared.parts.failover else { return Ok(()) };
        // A node that is in an answer still to be given is not held yet.
        let to_give = failover.outcomes.first_words();
        let nodes = inherited.state.inodes.iter().filter(|i| !to_give.contains(&i.id)).map(|i| (i.id, i.lookups));
        *shared.begun.nodes.lock() = nodes.collect();
        let is_remote = failover.drafts.is_some() || shared.tree().is_ok_and(|t| !t.keeps_removed());
        if is_remote && failover.outcomes.left_open().next().is_some() {
            tokio::time::sleep(LATE).await;
        }
        let mut renamed = false;
        for (unique, text) in failover.outcomes.left_open() {
            match state::Attempt::decode(text).ok().and_then(|a| a.what) {
                Some(attempt::What::Rename(r)) => {
                    renamed = true;
                    shared.look_for_rename(unique, &r).await?;
                }
                Some(attempt::What::Append(a)) => drop(shared.begun.appends.lock().insert(unique, a.node)),
                None => {}
            }
        }
        if renamed && let Some(drafts) = &failover.drafts {
            drafts.recover_own_renames().await?;
        }
        shared.restore_files(inherited).await;
        if let Some(drafts) = &failover.drafts {
            drafts.resumed(shared.beliefs.is_some()).await;
        }
        let outcomes = failover.outcomes.clone();
        shared.parts.tasks.spawn(async move {
            tokio::time::sleep(RESENT_SOON).await;
            let Resent { taken, answered, in_doubt } = outcomes.resent();
            let (taken, answered, in_doubt) = (taken.load(Relaxed), answered.load(Relaxed), in_doubt.load(Relaxed));
            info!(taken, answered, in_doubt, "requests came a second time");
            for (how, count) in [("taken", taken), ("answered", answered), ("in_doubt", in_doubt)] {
                counter!("efc_failover_resent_total", "how" => how).absolute(count);
            }
            tokio::time::sleep(RESEND_PATIENCE).await;
            outcomes.forget_left();
        });
        Ok(())
    }
}

impl Shared {
    /// Forgets inherited nodes that the kernel does not hold: a FORGET that the predecessor had taken and not written down does not come again.
    ///
    /// Exact: of answers that are still to be given the nodes were left out, and one that is given since is counted, and stays.
    pub(super) fn forget_lost_nodes(self: &Arc<Self>) {
        let nodes = std::mem::take(&mut *self.begun.nodes.lock());
        if nodes.is_empty() {
            return;
        }
        let this = self.clone();
        let look = move || {
            let count = nodes.len();
            let mut forgotten = 0;
            for (id, lookups) in nodes {
                let Some(session) = this.session.get().and_then(Weak::upgrade) else { return };
                match session.notifier().holds(id) {
                    Ok(true) => {}
                    Ok(false) => forgotten += usize::from(this.parts.namespace.forget_all(id, lookups)),
                    Err(e) => return debug!(error = %e, "the kernel does not say which nodes it holds"),
                }
            }
            info!(nodes = count, forgotten, "nodes that the kernel does not hold are forgotten");
        };
        drop(self.runtime.spawn_blocking(look));
    }

    /// Everything that is written down.
    pub(super) fn checkpoint(&self) -> state::Checkpoint {
        let (handles, parked) = self.files.checkpoint();
        let locks = self.beliefs.as_ref().map(|b| b.leases.locks().checkpoint()).unwrap_or_default();
        let tree = self.parts.failover.as_ref().and_then(|f| f.drafts.as_ref());
        let (drafts, owner) = tree.map(|t| (t.checkpoint(), t.owner())).unwrap_or_default();
        state::Checkpoint { handles, parked, locks, drafts, owner, ..self.parts.namespace.checkpoint() }
    }

    /// What the kernel is about to be told is kept for a successor.
    pub(super) fn write_down(&self) {
        let Some(failover) = &self.parts.failover else { return };
        let written = match failover.journal.commit() {
            Ok(true) => failover.journal.renew(|| self.checkpoint()),
            other => other.map(drop),
        };
        if let Err(e) = written {
            error!(error = %e, "the journal cannot be written; after a crash of this process the mount would not go on");
        }
    }

    /// A rename that was begun: if it was made, names and paths are those of after it.
    async fn look_for_rename(&self, unique: u64, r: &attempt::Rename) -> Result<()> {
        let namespace = &self.parts.namespace;
        let (Some(from), Some(to)) = (namespace.get(r.from), namespace.get(r.to)) else { return Ok(()) };
        let at_target = self.found_there(&to, &r.new_name).await?;
        let Some(moved) = at_target.filter(|n| n.attr.fileid == r.fileid && r.fileid != 0) else { return Ok(()) };
        let at_source = self.found_there(&from, &r.name).await?;
        if at_source.as_ref().is_some_and(|n| n.attr.fileid == r.fileid) {
            return Ok(());
        }
        info!(path = format!("{}/{}", to.path(), r.new_name.escape_ascii()), "a rename of the former process was made");
        self.begun.renamed.lock().insert(unique);
        let is_known = namespace.child(&from, &r.name).is_some_and(|i| i.has_number(&moved));
        match at_source {
            _ if !is_known => {}
            Some(back) if r.exchange => {
                namespace.exchanged((&from, &r.name, back.locator), (&to, &r.new_name, moved.locator));
            }
            _ => namespace.renamed((&from, &r.name), (&to, &r.new_name), moved.locator),
        }
        Ok(())
    }

    async fn found_there(&self, dir: &Inode, name: &Bytes) -> Result<Option<Node>> {
        match self.parts.source.lookup(&dir.locator(), name).await {
            Ok(node) => Ok(Some(node)),
            Err(e) if matches!(e.kind(), Kind::NotFound | Kind::NotADirectory | Kind::Stale) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Has this rename been made by the predecessor?
    pub(super) fn was_renamed(&self, once: &Once) -> bool {
        once.is_in_doubt() && self.begun.renamed.lock().remove(&once.unique)
    }

    /// Waits for what the predecessor was appending to this node, unless that is this request.
    pub(super) async fn appends_in_turn(&self, once: &Once, node: u64) {
        let others = || self.begun.appends.lock().iter().any(|(unique, n)| *n == node && *unique != once.unique);
        let ended = async {
            loop {
                let appended = self.begun.appended.notified();
                if !others() {
                    return;
                }
                appended.await;
            }
        };
        if tokio::time::timeout(APPEND_PATIENCE, ended).await.is_err() {
            // Nobody waits for it any more.
            self.begun.appends.lock().retain(|unique, n| *n != node || *unique == once.unique);
        }
    }

    /// An append that the predecessor had begun is over.
    pub(super) fn appended(&self, once: &Once) {
        if once.is_in_doubt() && self.begun.appends.lock().remove(&once.unique).is_some() {
            self.begun.appended.notify_waiters();
        }
    }

    /// An open file is about to lose its name: where nothing else leads to it, its descriptor is held for a successor.
    pub(super) fn keep_file(&self, node: u64) {
        let (Some(failover), Some(file)) = (&self.parts.failover, self.files.any(node)) else { return };
        if let Some(fd) = file.descriptor()
            && self.files.keep(node)
            && let Err(e) = failover.held.keep(Item::File(node), "", Some(fd))
        {
            warn!(node, error = %e, "a removed file that is open would not survive this process");
        }
    }

    /// It is closed.
    pub(super) fn drop_file(&self, node: u64) {
        if let Some(failover) = &self.parts.failover
            && let Err(e) = failover.held.drop_item(Item::File(node))
        {
            warn!(node, error = %e, "a removed file stays open in the holder");
        }
    }

    async fn restore_files(&self, inherited: Inherited) {
        let Inherited { state, mut files } = inherited;
        let mut by_node: BTreeMap<u64, Vec<state::Handle>> = BTreeMap::new();
        state.handles.into_iter().for_each(|h| by_node.entry(h.node).or_default().push(h));
        let last = by_node.values().flatten().map(|h| h.fh).max().unwrap_or(0);
        self.next_handle.fetch_max(last + 1, Relaxed);
        let opened: Vec<_> = by_node.into_iter().map(|(node, handles)| (node, handles, files.remove(&node))).collect();
        let (count, mut lost) = (opened.len(), 0);
        let opened = stream::iter(opened).map(|(node, handles, fd)| async move {
            let inode = self.parts.namespace.get(node)?;
            let write = handles.iter().any(|h| h.flags & libc::O_ACCMODE != libc::O_RDONLY);
            let kept = fd.is_some();
            let file = match handles.iter().find_map(|h| self.resumed_draft(h.draft)) {
                Some(file) => Ok(file),
                None => self.open_again(&inode, fd, write).await,
            };
            Some((inode, handles, file, kept))
        });
        let mut opened = opened.buffer_unordered(OPENS_AT_ONCE);
        while let Some(one) = opened.next().await {
            // A handle of a node that the kernel has forgotten is closed, or about to be.
            let Some((inode, handles, file, kept)) = one else { continue };
            let file = file.unwrap_or_else(|e| {
                lost += 1;
                warn!(path = inode.path(), error = %e, "a file that was open is gone");
                Arc::new(Gone)
            });
            handles.iter().for_each(|h| self.files.restore(h, inode.clone(), file.clone()));
            if kept {
                self.files.keep(inode.id);
            }
        }
        drop(opened);
        if count > 0 {
            info!(files = count, lost, "open files of the former process are open again");
        }
        for parked in &state.parked {
            if self.files.is_open(parked.node) {
                self.files.restore_parked(parked);
            } else if let Ok(tree) = self.tree()
                && let Err(e) = remove_parked(tree, &Parked::from(parked)).await
            {
                warn!(name = %parked.name.escape_ascii(), error = %e, "a removed file stays");
            }
        }
        files.into_keys().for_each(|node| self.drop_file(node));
    }

    /// A file that had changes.
    fn resumed_draft(&self, number: u64) -> Option<Arc<dyn OpenFile>> {
        self.parts.failover.as_ref()?.drafts.as_ref()?.resume(number)
    }

    /// What a predecessor had open.
    async fn open_again(&self, inode: &Arc<Inode>, fd: Option<OwnedFd>, write: bool) -> Result<Arc<dyn OpenFile>> {
        let tree = self.tree()?;
        if let Some(file) = fd.and_then(|fd| tree.reopen(fd, &inode.locator())) {
            return Ok(file);
        }
        let file = tree.open(&inode.locator(), write).await?;
        let node = file.attr().await?;
        if inode.attr().fileid != 0 && !inode.has_number(&node) {
            return Err(Error::new(Kind::Stale, "another file has taken its place"));
        }
        if write {
            file.resumed();
        }
        Ok(file)
    }
}

/// An open file that there is no way to any more.
struct Gone;

fn gone<T>() -> Result<T> {
    Err(Error::new(Kind::Stale, "the file was removed while the process that had it open was replaced"))
}

#[async_trait]
impl OpenFile for Gone {
    async fn read(&self, _range: Range<u64>) -> Result<Bytes> {
        gone()
    }

    async fn write(&self, _offset: u64, _data: Bytes) -> Result<Node> {
        gone()
    }

    async fn sync(&self, _data_only: bool) -> Result<Node> {
        gone()
    }

    async fn attr(&self) -> Result<Node> {
        gone()
    }

    async fn set_attr(&self, _change: &Change) -> Result<Node> {
        gone()
    }

    async fn allocate(&self, _range: Range<u64>, _how: Allocate) -> Result<Node> {
        gone()
    }

    async fn copy(&self, _source: &dyn OpenFile, _from: Range<u64>, _offset: u64) -> Result<(u64, Node)> {
        gone()
    }

    async fn seek(&self, _offset: u64, _hole: bool) -> Result<u64> {
        gone()
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
