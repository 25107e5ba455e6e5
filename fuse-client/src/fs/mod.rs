//! One function per FUSE operation: policy only. Answers that need no waiting are given on the kernel's thread; the others by a task that
//! keeps the reply.
//!
//! A read-only mount has no tree to change ([`Parts::tree`]): what would write is answered EROFS, and files need not be opened. Here are the operations that look; [`io`] has those on open files,
//! [`change`] those that change names and attributes.

pub mod attr;
mod belief;
mod callers;
pub mod change;
pub mod directory;
pub mod errno;
pub mod failover;
mod io;
mod locks;
pub mod open;
mod recall;
pub mod refresh;
mod requests;

use crate::kernel::{
    Answer, AttrOut, Caller, DirReply, EntryOut, Errno, NodeAttr, Notification, OpenOut, Reply, Session,
};
use crate::lease::{self, Leases};
use crate::lock::LocksLeft;
use crate::namespace::listing::Listing;
use crate::namespace::{Inode, Namespace, ROOT_ID, Seen};
use crate::read::Reader;
use crate::read::source::DataSource;
use attr::Ownership;
use belief::{Beliefs, Permit};
use bytes::Bytes;
use change::PARKED_PREFIX;
use directory::{Directories, Found};
use efc_backend::tree::DynTree;
use efc_client::lease::Who;
use efc_client::master::MasterClient;
use efc_common::id::{Incarnation, SessionId};
use efc_common::lease::Mode;
use efc_common::node::{Attr, FileKind, Node};
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use failover::{Begun, Failover, Once};
use futures::TryFutureExt;
use locks::Had;
use open::OpenFiles;
use parking_lot::Mutex;
use recall::FsHolder;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::task::{Context, Waker};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::Notify;
use tracing::{debug, info, warn};

/// A file's attributes never change under its node, so the kernel may keep them as long as it likes.
const FILE_ATTR_TTL: Duration = Duration::from_secs(30 * 86400);
/// How long the end of a mount waits for an origin that does not take what was written, and how often it is tried.
const LAST_PATIENCE: Duration = Duration::from_secs(120);
const LAST_PAUSE: Duration = Duration::from_secs(2);
/// Preferred I/O size told to applications, bytes.
const IO_BYTES: u32 = 1 << 20;
/// Positions of a directory: `.`, `..`, then the entries ([`Listing::after`]).
const DOTS: u64 = 2;

/// What a mount is made of.
pub struct Parts {
    /// Nodes, new or restored from a predecessor.
    pub namespace: Arc<Namespace>,
    /// Names and bytes.
    pub source: Arc<DataSource>,
    /// Listings.
    pub directories: Directories,
    /// Reads.
    pub reader: Reader,
    /// What changes names and files; `None`: a read-only mount.
    pub tree: Option<DynTree>,
    /// Owner and mode options.
    pub ownership: Ownership,
    /// How long names may be believed.
    pub ttl: Duration,
    /// Owner of the tasks that answer requests.
    pub tasks: TaskGroup,
    /// Leases decide what is believed, by these masters; `None`: the `ttl` alone does.
    pub strict: Option<Strict>,
    /// Another process goes on with the mount if this one dies; `None`: nobody does.
    pub failover: Option<Failover>,
}

/// What leases need.
pub struct Strict {
    /// The masters.
    pub master: MasterClient,
    /// Whose session it is.
    pub who: Who,
    /// The bucket that is mounted, if it is one.
    pub bucket: Option<String>,
    /// How long an operation waits for a lease before it fails.
    pub deadline: Duration,
    /// The last life of the predecessor's session.
    pub last: Option<(SessionId, Incarnation)>,
    /// Locks that it had.
    pub locks: Vec<LocksLeft>,
}

/// The file system of one mount.
pub struct EfcFs {
    shared: Arc<Shared>,
}

struct Shared {
    parts: Parts,
    runtime: tokio::runtime::Handle,
    /// Weak: the session owns the file system.
    session: OnceLock<Weak<Session>>,
    open_dirs: Mutex<HashMap<u64, Arc<Listing>>>,
    files: OpenFiles,
    next_handle: AtomicU64,
    begun: Begun,
    /// Told when the kernel is to drop pages, and when somebody waits who holds that up.
    crossed: Notify,
    beliefs: Option<Beliefs>,
}

impl EfcFs {
    /// The file system; its waiting answers run on `runtime`.
    pub fn new(mut parts: Parts, runtime: tokio::runtime::Handle) -> Self {
        let strict = parts.strict.take();
        let shared = Arc::new_cyclic(|shared| Shared {
            beliefs: strict.map(|s| {
                let _entered = runtime.enter();
                let holder = Arc::new(FsHolder::new(shared.clone()));
                let succession = parts.failover.as_ref().map(|f| f.succession(s.last, s.locks));
                let leases = Leases::start(s.master, s.who, lease::Config::default(), holder, &parts.tasks, succession);
                Beliefs::new(leases, parts.source.id(), s.bucket, parts.source.path_locators(), s.deadline)
            }),
            files: OpenFiles::new(parts.failover.as_ref().map(|f| f.journal.clone())),
            parts,
            runtime,
            session: OnceLock::new(),
            open_dirs: Mutex::default(),
            begun: Begun::default(),
            crossed: Notify::new(),
            next_handle: AtomicU64::new(first_handle()),
        });
        EfcFs { shared }
    }

    /// The mount ends and its kernel session is over: what is not at the origin yet is brought there, then leases go back.
    ///
    /// # Errors
    /// What keeps changes from the origin after [`LAST_PATIENCE`]; they are lost.
    pub async fn end(&self, patience: Duration) -> Result<()> {
        let begun = Instant::now();
        let mut settled = Ok(());
        if let Some(tree) = &self.shared.parts.tree {
            settled = tree.settle_all().await;
            while let Err(e) = &settled
                && begun.elapsed() < LAST_PATIENCE
            {
                warn!(error = %e, "files are not at the origin yet; they are tried again before the mount's process ends");
                tokio::time::sleep(LAST_PAUSE).await;
                settled = tree.settle_all().await;
            }
        }
        if let Some(beliefs) = &self.shared.beliefs {
            beliefs.leases.close(patience).await;
        }
        settled
    }

    /// Leases that are held and operations that wait or run, on mounts that have leases.
    pub fn leases(&self) -> Option<lease::Counts> {
        self.shared.beliefs.as_ref().map(|b| b.leases.counts())
    }

    /// Gives the file system the way to tell the kernel that something changed. To be called once, when the session runs.
    pub fn set_session(&self, session: &Arc<Session>) {
        if self.shared.session.set(Arc::downgrade(session)).is_err() {
            warn!("a second session was offered and not taken");
        }
        self.shared.forget_lost_nodes();
        if let Some(beliefs) = &self.shared.beliefs {
            beliefs.leases.begin();
        }
    }

    /// Names.
    pub fn directories(&self) -> &Directories {
        &self.shared.parts.directories
    }

    /// Serves reads.
    pub fn reader(&self) -> &Reader {
        &self.shared.parts.reader
    }

    fn inode(&self, id: u64) -> Result<Arc<Inode>> {
        self.shared.inode(id)
    }

    /// Answers here what needs no waiting, because handing it to another thread takes longer than doing it; the rest in a task of the mount.
    fn spawn<F>(&self, make: impl FnOnce(Arc<Shared>) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let _entered = self.shared.runtime.enter();
        let mut work = Box::pin(make(self.shared.clone()));
        // Nobody is woken by this first look: the task looks again.
        if work.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
            self.shared.parts.tasks.spawn(work);
        }
    }

    /// Answers what concerns one node in a task of the mount. What `work` gives beside the answer is kept until that was written.
    fn answer<T, F>(
        &self,
        operation: &'static str,
        node: u64,
        reply: Reply<T>,
        work: impl FnOnce(Arc<Shared>, Arc<Inode>) -> F + Send + 'static,
    ) where
        T: Answer + Send + 'static,
        F: Future<Output = Result<(T, Permit)>> + Send + 'static,
    {
        self.respond(operation, node, reply, |s, inode| work(s, inode).map_ok(|(answer, permit)| (Ok(answer), permit)));
    }

    /// The same, for what can be refused without an error of anybody's.
    fn respond<T, F>(
        &self,
        operation: &'static str,
        node: u64,
        reply: Reply<T>,
        work: impl FnOnce(Arc<Shared>, Arc<Inode>) -> F + Send + 'static,
    ) where
        T: Answer + Send + 'static,
        F: Future<Output = Result<(std::result::Result<T, Errno>, Permit)>> + Send + 'static,
    {
        let inode = match self.inode(node) {
            Ok(i) => i,
            Err(e) => return reply.error(errno_of(&e)),
        };
        self.spawn(|s| async move {
            match work(s.clone(), inode.clone()).await {
                Ok((answer, permit)) => {
                    s.write_down();
                    reply.end(answer);
                    drop(permit);
                }
                Err(e) => {
                    log(operation, &inode, &e);
                    reply.error(errno_of(&e));
                }
            }
        });
    }

    /// As [`EfcFs::answer`], for what changes something.
    fn change<T, F>(
        &self,
        operation: &'static str,
        node: u64,
        reply: Reply<T>,
        work: impl FnOnce(Arc<Shared>, Arc<Inode>) -> F + Send + 'static,
    ) where
        T: Answer + Send + 'static,
        F: Future<Output = Result<(T, Permit)>> + Send + 'static,
    {
        if self.shared.parts.tree.is_none() {
            return reply.error(Errno::EROFS);
        }
        self.answer(operation, node, reply, work);
    }

    /// The same, for what must not be done twice.
    fn change_once<T, F>(
        &self,
        ctx: &Caller,
        operation: &'static str,
        node: u64,
        reply: Reply<T>,
        work: impl FnOnce(Arc<Shared>, Arc<Inode>, Once) -> F + Send + 'static,
    ) where
        T: Answer + Send + 'static,
        F: Future<Output = Result<(T, Permit)>> + Send + 'static,
    {
        let once = self.once(ctx);
        self.change(operation, node, reply, |s, inode| work(s, inode, once));
    }

    /// Answers what concerns the advisory locks of one node.
    fn lock<T, F>(
        &self,
        operation: &'static str,
        node: u64,
        reply: Reply<T>,
        work: impl FnOnce(Arc<Shared>, Arc<Inode>) -> F + Send + 'static,
    ) where
        T: Answer + Send + 'static,
        F: Future<Output = Result<Had<T>>> + Send + 'static,
    {
        let errno = |why| Errno(errno::no_lock(why));
        self.respond(operation, node, reply, move |s, inode| {
            work(s, inode).map_ok(move |had| (had.map_err(errno), Permit::none()))
        });
    }

    fn read_only(&self) -> bool {
        self.shared.parts.tree.is_none()
    }
}

fn errno_of(e: &Error) -> Errno {
    Errno(errno::errno(e.kind()))
}

/// One line for an error that an application is about to see, unless it is its own doing.
fn log(operation: &'static str, inode: &Inode, e: &Error) {
    match e.kind() {
        Kind::Stale => info!(operation, path = inode.path(), error = %e, "file changed at the origin"),
        Kind::NotFound
        | Kind::AlreadyExists
        | Kind::NotADirectory
        | Kind::IsADirectory
        | Kind::NotEmpty
        | Kind::NotPermitted
        | Kind::Invalid
        | Kind::Unsupported
        | Kind::NoData
        | Kind::NameTooLong
        | Kind::OutOfRange
        | Kind::CrossDevice
        | Kind::Deadlock => debug!(operation, path = inode.path(), error = %e, "refused"),
        _ => warn!(operation, path = inode.path(), error = %e, "operation failed"),
    }
}

impl Shared {
    fn inode(&self, id: u64) -> Result<Arc<Inode>> {
        self.parts.namespace.get(id).ok_or_else(|| Error::new(Kind::Stale, "node is not known").with("node", id))
    }

    fn node_attr(&self, id: u64, attr: &Attr) -> NodeAttr {
        let own = &self.parts.ownership;
        // What a removed file is called until it is closed is no name of it.
        let is_parked = attr.kind == FileKind::File && self.parts.tree.is_some() && self.files.is_parked(id);
        NodeAttr {
            ino: id,
            size: attr.size,
            blocks: attr::blocks(attr),
            atime: attr.atime.unwrap_or(attr.mtime),
            mtime: attr.mtime,
            ctime: attr.ctime,
            mode: attr::type_bits(attr.kind) | own.permissions(attr),
            nlink: if is_parked { 0 } else { attr.nlink },
            uid: own.uid(attr),
            gid: own.gid(attr),
            rdev: attr.rdev,
            blksize: IO_BYTES,
        }
    }

    /// Interns an entry that is being sent to the kernel.
    fn entry(
        &self,
        permit: &Permit,
        dir: &Arc<Inode>,
        (name, node): (&Bytes, &Node),
        seen: Seen,
    ) -> (Arc<Inode>, EntryOut) {
        let believed = self.believes_entry(permit, dir, (name, node), seen.since);
        let of_attr = if believed { seen } else { seen.doubted() };
        let (inode, moved) = self.parts.namespace.intern(dir, name, node, of_attr);
        if moved {
            self.pages_are_old(&inode);
        }
        if let Some(beliefs) = self.beliefs.as_ref().filter(|_| believed) {
            inode.placed.store(true, Ordering::Release);
            // So that a directory which is leased already is found by its key.
            drop(beliefs.own(&self.parts.namespace, &inode));
        }
        let entry_ttl = self.name_ttl(seen);
        let (attr, attr_ttl) = self.attr_and_ttl(&inode, entry_ttl);
        let attr_ttl = if believed { attr_ttl } else { Duration::ZERO };
        let entry = EntryOut { node: inode.id, generation: 0, attr, entry_ttl, attr_ttl };
        (inode, entry)
    }

    /// How long the kernel may believe a name. Without epochs a name under a lease could not be dropped while somebody works in its directory.
    fn name_ttl(&self, seen: Seen) -> Duration {
        let has_epoch = || self.session.get().and_then(Weak::upgrade).is_some_and(|s| s.notifier().has_epoch());
        if self.beliefs.is_some() && !has_epoch() {
            return Duration::ZERO;
        }
        left(seen.fresh_until)
    }

    /// Attributes for the kernel and how long it may believe them; `dir_ttl` is what a directory of a read-only mount gets.
    fn attr_and_ttl(&self, inode: &Inode, dir_ttl: Duration) -> (NodeAttr, Duration) {
        let now = inode.now();
        let ttl = match (self.parts.namespace.follows(), inode.kind) {
            // Who reads directly sees a length that the kernel does not know of.
            (true, FileKind::File) if self.files.is_read_directly(inode.id) || self.is_contended(inode) => {
                Duration::ZERO
            }
            (true, _) => left(now.fresh_until),
            (false, FileKind::Directory) => dir_ttl,
            (false, _) => FILE_ATTR_TTL,
        };
        (self.node_attr(inode.id, &now.attr), ttl)
    }

    /// The answer for a name; to be written down before it is sent.
    fn found(&self, permit: &Permit, dir: &Arc<Inode>, name: &Bytes, found: Found) -> EntryOut {
        match found.node {
            Some(node) => self.entry(permit, dir, (name, &node), found.seen).1,
            None => EntryOut { entry_ttl: self.name_ttl(found.seen), ..EntryOut::default() },
        }
    }

    /// Can GETATTR be answered without asking the origin?
    fn attr_is_known(&self, inode: &Inode) -> bool {
        if self.parts.namespace.follows() {
            return inode.now().fresh_until > Instant::now();
        }
        // Prefixes of an object store have no attributes of their own; a NAS directory has.
        inode.kind != FileKind::Directory || self.parts.source.shared_listing()
    }

    async fn getattr(&self, inode: &Arc<Inode>) -> Result<(AttrOut, Permit)> {
        let permit = match self.node(inode, Mode::Shared).await {
            // It was there when its name was looked up, and others have removed it since: as any file system tells of what has no name any more.
            Err(e)
                if matches!(e.kind(), Kind::NotFound | Kind::Stale)
                    && self.beliefs.is_some()
                    && inode.id != ROOT_ID =>
            {
                let attr = Attr { nlink: 0, ..inode.attr() };
                let gone = AttrOut { attr: self.node_attr(inode.id, &attr), ttl: Duration::ZERO };
                return Ok((gone, Permit::none()));
            }
            permit => permit?,
        };
        if !self.parts.namespace.follows() {
            let fresh = self.parts.source.getattr(&inode.locator()).await?;
            if fresh.attr.kind == FileKind::Directory {
                inode.set_attr(fresh.attr);
            }
        } else if self.beliefs.is_none() {
            self.refresh(inode, permit.belief).await?;
        }
        Ok((self.attr_out(inode, &permit), permit))
    }

    fn attr_out(&self, inode: &Inode, permit: &Permit) -> AttrOut {
        let (attr, ttl) = self.attr_and_ttl(inode, self.parts.ttl);
        AttrOut { attr, ttl: if permit.is_doubtful() { Duration::ZERO } else { ttl } }
    }

    /// Tells the kernel without waiting.
    fn tell(&self, what: Notification) {
        if let Some(session) = self.session.get().and_then(Weak::upgrade)
            && let Err(e) = session.notifier().try_tell(what)
        {
            warn!(error = %e, "the kernel keeps something old until its time is over");
        }
    }

    fn open_dir(&self, listing: Arc<Listing>) -> OpenOut {
        let fh = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.open_dirs.lock().insert(fh, listing);
        OpenOut { fh, flags: 0 }
    }

    /// Fills a page of a directory. What is still true of its listing goes out with attributes.
    fn fill(&self, dir: &Arc<Inode>, listing: &Listing, offset: u64, mut reply: DirReply) {
        let permit = self.is_continuous(dir, listing.seen().since);
        let parent = dir.dentry().map_or(dir.id, |d| d.parent.id);
        let seen = listing.seen();
        // `.` and `..` give a number and a type only: node 0 tells the kernel that they are no look-ups.
        let dot = |ino| EntryOut {
            attr: NodeAttr { ino, mode: libc::S_IFDIR, ..NodeAttr::default() },
            ..EntryOut::default()
        };
        let dots = [(b".".as_slice(), dir.id), (b"..".as_slice(), parent)];
        for (i, (name, id)) in dots.into_iter().enumerate().skip(offset.min(DOTS) as usize) {
            if !reply.add(name, i as u64 + 1, &dot(id)) {
                return reply.finish();
            }
        }
        for (next, e) in listing.after(offset.saturating_sub(DOTS), self.parts.namespace.follows()) {
            if e.name.starts_with(PARKED_PREFIX) {
                continue;
            }
            // A look-up is counted only for what really goes out.
            if !reply.fits(&e.name) {
                break;
            }
            let whole = self.parts.directories.complete_now(&e.node);
            let entry = match (&whole, &permit) {
                (Some(node), Some(permit)) if reply.plus() => self.entry(permit, dir, (&e.name, node), seen).1,
                // Without attributes the number is a hint; the look-up that follows gives the node.
                _ => EntryOut {
                    attr: NodeAttr { ino: u64::MAX, mode: type_hint(&e.node, whole.as_ref()), ..NodeAttr::default() },
                    ..EntryOut::default()
                },
            };
            reply.add(&e.name, next + DOTS, &entry);
        }
        self.write_down();
        reply.finish();
    }

    /// The file is no longer what its node says: the kernel drops the name, so that the next open finds the new version.
    fn gone_stale(&self, inode: &Arc<Inode>) {
        if !self.parts.namespace.mark_stale(inode) {
            return;
        }
        if let Some(d) = inode.dentry() {
            self.parts.directories.distrust(&d.parent);
            self.tell(Notification::InvalidateEntry { parent: d.parent.id, name: d.name });
        }
    }
}

/// The type to show of an entry whose attributes are not sent: 0, unknown, for what may turn out to be a symbolic link.
fn type_hint(listed: &Node, whole: Option<&Node>) -> u32 {
    let may_be_link = listed.attr.kind == FileKind::File && listed.attr.size <= libc::PATH_MAX as u64;
    match whole {
        Some(node) => attr::type_bits(node.attr.kind),
        None if may_be_link => 0,
        None => attr::type_bits(listed.attr.kind),
    }
}

/// Handles of a predecessor are not given again, also those that were closed: their RELEASE may still come. Nobody opens a million files a second, so what counts from the time in
/// microseconds is ahead of what was counted from an earlier one.
fn first_handle() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(1)
}

/// How long until then.
fn left(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now())
}
