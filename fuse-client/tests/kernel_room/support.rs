//! What the kernel tests share: a small file system in memory, a mount that cleans up after a panic, and a watchdog for file access (a FUSE
//! mount that hangs would hang the test run).

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::mpsc;
use std::time::Duration;

use bytes::Bytes;
use efc_common::node::Time;
use efc_fuse::kernel::{
    AttrOut, Caller, DirReply, EntryOut, Errno, FileSystem, Mount, MountConfig, NodeAttr, OpenOut, Outcomes, ROOT_NODE,
    ReadAt, ReadReply, Reply, Session, SessionConfig, StatfsOut, XattrReply, serve,
};
use parking_lot::Mutex;

/// Longer than anything here takes, also on a busy machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(40);

const DAY: Duration = Duration::from_secs(86_400);

/// Names in `many/`.
pub(crate) const MANY: usize = 2_000;

/// Sizes of the files in `files/`, named by their size.
pub(crate) const SIZES: [usize; 7] = [0, 1, 4095, 4096, 114_688, 1_048_579, 8 << 20];

/// What stands in a file: different for each node and offset.
pub(crate) fn content(node: u64, size: usize) -> Bytes {
    (0..size as u64).map(|i| (i.wrapping_mul(31) ^ (i >> 8).wrapping_mul(17) ^ node.wrapping_mul(97)) as u8).collect()
}

enum What {
    Dir(Vec<(String, u64)>),
    File(Bytes),
    Link(&'static str),
}

/// Behaviour that a test switches on.
pub(crate) type ReadHook = Box<dyn Fn(&MemFs, u64, ReadAt, ReadReply) + Send + Sync>;

/// A read-only tree in memory that counts what it is asked.
pub(crate) struct MemFs {
    nodes: Mutex<HashMap<u64, What>>,
    counts: Mutex<HashMap<&'static str, u64>>,
    /// Pages of names that came without attributes.
    pub(crate) plain_pages: AtomicU64,
    /// Largest READ that came, bytes.
    pub(crate) largest_read: AtomicU64,
    /// Look-ups handed out minus look-ups forgotten.
    pub(crate) lookups: AtomicU64,
    /// Answers reads instead of the file system.
    pub(crate) on_read: Option<ReadHook>,
    pub(crate) outcomes: Option<Arc<Outcomes>>,
    no_open: bool,
}

impl MemFs {
    pub(crate) fn new() -> MemFs {
        let mut nodes = HashMap::new();
        let mut next = ROOT_NODE;
        let mut id = || {
            next += 1;
            next
        };
        let many: Vec<_> = (0..MANY).map(|i| (format!("file-{i:05}"), id())).collect();
        let files: Vec<_> = SIZES.iter().map(|s| (format!("{s}"), id())).collect();
        for (i, (_, node)) in many.iter().enumerate() {
            nodes.insert(*node, What::File(content(*node, 100 + i)));
        }
        for (size, (_, node)) in SIZES.iter().zip(&files) {
            nodes.insert(*node, What::File(content(*node, *size)));
        }
        let (many_dir, files_dir, link) = (id(), id(), id());
        nodes.insert(many_dir, What::Dir(many));
        nodes.insert(files_dir, What::Dir(files));
        nodes.insert(link, What::Link("files/114688"));
        let root = vec![("many".into(), many_dir), ("files".into(), files_dir), ("link".into(), link)];
        nodes.insert(ROOT_NODE, What::Dir(root));
        MemFs {
            nodes: Mutex::new(nodes),
            counts: Mutex::new(HashMap::new()),
            plain_pages: AtomicU64::new(0),
            largest_read: AtomicU64::new(0),
            lookups: AtomicU64::new(0),
            on_read: None,
            outcomes: None,
            no_open: true,
        }
    }

    pub(crate) fn count(&self, op: &'static str) -> u64 {
        self.counts.lock().get(op).copied().unwrap_or(0)
    }

    pub(crate) fn counts(&self) -> HashMap<&'static str, u64> {
        self.counts.lock().clone()
    }

    fn bump(&self, op: &'static str) {
        *self.counts.lock().entry(op).or_default() += 1;
    }

    /// Node of a path below the root.
    pub(crate) fn node(&self, path: &str) -> u64 {
        let nodes = self.nodes.lock();
        path.split('/').fold(ROOT_NODE, |dir, name| match &nodes[&dir] {
            What::Dir(entries) => entries.iter().find(|(n, _)| n == name).expect("name").1,
            _ => panic!("{path} leads through a file"),
        })
    }

    /// Makes `to` in `dir` stand for what `from` is, and takes `from` away.
    pub(crate) fn rename(&self, dir: &str, from: &str, to: &str) {
        let dir = self.node(dir);
        let mut nodes = self.nodes.lock();
        let Some(What::Dir(entries)) = nodes.get_mut(&dir) else { panic!("no directory") };
        let at = entries.iter().position(|(n, _)| n == from).expect("from");
        entries[at].0 = to.into();
    }

    pub(crate) fn data(&self, node: u64) -> Option<Bytes> {
        match self.nodes.lock().get(&node) {
            Some(What::File(b)) => Some(b.clone()),
            _ => None,
        }
    }

    fn attr(&self, node: u64) -> Option<NodeAttr> {
        let nodes = self.nodes.lock();
        let (mode, size) = match nodes.get(&node)? {
            What::Dir(_) => (libc::S_IFDIR | 0o755, 4096),
            What::File(b) => (libc::S_IFREG | 0o644, b.len() as u64),
            What::Link(t) => (libc::S_IFLNK | 0o777, t.len() as u64),
        };
        let time = Time { secs: -5, nanos: 250_000_000 };
        Some(NodeAttr {
            ino: node,
            size,
            blocks: size.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            mode,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
        })
    }

    fn entry(&self, node: u64) -> Option<EntryOut> {
        Some(EntryOut { node, generation: 0, attr: self.attr(node)?, entry_ttl: DAY, attr_ttl: DAY })
    }
}

impl FileSystem for MemFs {
    fn outcomes(&self) -> Option<Arc<Outcomes>> {
        self.outcomes.clone()
    }

    fn lookup(&self, _: &Caller, parent: u64, name: &[u8], reply: Reply<EntryOut>) {
        self.bump("lookup");
        let found = match self.nodes.lock().get(&parent) {
            Some(What::Dir(entries)) => entries.iter().find(|(n, _)| n.as_bytes() == name).map(|e| e.1),
            _ => None,
        };
        match found.and_then(|node| self.entry(node)) {
            Some(e) => {
                self.lookups.fetch_add(1, SeqCst);
                reply.ok(e);
            }
            // A negative entry: the kernel remembers that there is nothing.
            None if name != b"asked-each-time" => reply.ok(EntryOut { entry_ttl: DAY, ..EntryOut::default() }),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn forget(&self, _: u64, count: u64) {
        self.lookups.fetch_sub(count, SeqCst);
    }

    fn getattr(&self, _: &Caller, node: u64, reply: Reply<AttrOut>) {
        self.bump("getattr");
        match self.attr(node) {
            Some(attr) => reply.ok(AttrOut { attr, ttl: DAY }),
            None => reply.error(Errno::ESTALE),
        }
    }

    fn readlink(&self, _: &Caller, node: u64, reply: Reply<Bytes>) {
        self.bump("readlink");
        match self.nodes.lock().get(&node) {
            Some(What::Link(target)) => reply.ok(Bytes::from_static(target.as_bytes())),
            _ => reply.error(Errno::EINVAL),
        }
    }

    fn open(&self, _: &Caller, _: u64, _: i32, reply: Reply<OpenOut>) {
        self.bump("open");
        if self.no_open { reply.error(Errno::ENOSYS) } else { reply.ok(OpenOut::default()) }
    }

    fn read(&self, ctx: &Caller, node: u64, _: u64, at: ReadAt, reply: ReadReply) {
        self.bump(if ctx.resent { "resent read" } else { "read" });
        self.largest_read.fetch_max(at.size.into(), SeqCst);
        match &self.on_read {
            Some(hook) => hook(self, node, at, reply),
            None => answer_read(self, node, at, reply),
        }
    }

    fn flush(&self, _: &Caller, _: u64, _: u64, _: u64, reply: Reply<()>) {
        self.bump("flush");
        reply.error(Errno::ENOSYS);
    }

    fn opendir(&self, _: &Caller, _: u64, _: i32, reply: Reply<OpenOut>) {
        self.bump("opendir");
        reply.ok(OpenOut { fh: 7, flags: 0 });
    }

    fn readdir(&self, _: &Caller, node: u64, fh: u64, offset: u64, mut reply: DirReply) {
        self.bump("readdir");
        assert_eq!(fh, 7, "the handle of opendir comes back");
        if !reply.plus() {
            self.plain_pages.fetch_add(1, SeqCst);
        }
        let entries = match self.nodes.lock().get(&node) {
            Some(What::Dir(entries)) => entries.clone(),
            _ => return reply.error(Errno::ENOTDIR),
        };
        let dots = [(".".to_string(), node), ("..".to_string(), ROOT_NODE)];
        for (i, (name, child)) in dots.iter().chain(&entries).enumerate().skip(offset as usize) {
            let entry = self.entry(*child).expect("node");
            if !reply.add(name.as_bytes(), i as u64 + 1, &entry) {
                break;
            }
            if reply.plus() && i >= 2 {
                self.lookups.fetch_add(1, SeqCst);
            }
        }
        reply.finish();
    }

    fn statfs(&self, _: &Caller, _: u64, reply: Reply<StatfsOut>) {
        self.bump("statfs");
        reply.ok(StatfsOut {
            blocks: 1000,
            blocks_free: 400,
            blocks_available: 300,
            files: MANY as u64,
            files_free: 5,
            block_size: 1 << 20,
            fragment_size: 4096,
            name_max: 255,
        });
    }

    fn getxattr(&self, _: &Caller, _: u64, name: &[u8], reply: XattrReply) {
        self.bump("getxattr");
        if name == b"user.efc" { reply.value(b"some value") } else { reply.error(Errno::ENODATA) }
    }

    fn listxattr(&self, _: &Caller, _: u64, reply: XattrReply) {
        reply.value(b"user.efc\0");
    }
}

/// The plain answer to a read: in several pieces, as a file system with segments gives it.
pub(crate) fn answer_read(fs: &MemFs, node: u64, at: ReadAt, reply: ReadReply) {
    let Some(data) = fs.data(node) else { return reply.error(Errno::ESTALE) };
    let begin = (at.offset as usize).min(data.len());
    let end = (begin + at.size as usize).min(data.len());
    let pieces: Vec<Bytes> = (begin..end).step_by(60_000).map(|at| data.slice(at..(at + 60_000).min(end))).collect();
    match &pieces[..] {
        [one] => reply.bytes(one),
        _ => reply.slices(&pieces),
    }
}

/// Mount options of most tests.
pub(crate) fn mount_config(mountpoint: &Path) -> MountConfig {
    MountConfig {
        mountpoint: mountpoint.into(),
        source: "efc test,with comma".into(),
        read_only: true,
        allow_other: true,
        default_permissions: true,
        max_read_bytes: None,
        raise_max_pages_limit: None,
    }
}

/// A mount in a temporary directory. However the test ends, the connection is killed and the mount is gone.
pub(crate) struct Mounted {
    pub(crate) fs: Arc<MemFs>,
    pub(crate) session: Option<Arc<Session>>,
    pub(crate) mount: Mount,
    dir: tempfile::TempDir,
}

impl Mounted {
    pub(crate) fn new(fs: MemFs) -> Mounted {
        Mounted::with(fs, |_| {}, SessionConfig::default())
    }

    pub(crate) fn with(fs: MemFs, change: impl FnOnce(&mut MountConfig), session: SessionConfig) -> Mounted {
        let dir = tempfile::tempdir().expect("temp dir");
        let mut config = mount_config(dir.path());
        change(&mut config);
        let fs = Arc::new(fs);
        let (session, mount) = serve(fs.clone(), &config, &session, |_| Ok(())).expect("mounts");
        Mounted { fs, session: Some(Arc::new(session)), mount, dir }
    }

    pub(crate) fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }

    pub(crate) fn session(&self) -> &Session {
        self.session.as_ref().expect("session")
    }

    /// Runs `access` on a thread and kills the connection when it hangs.
    pub(crate) fn guarded<T: Send + 'static>(&self, access: impl FnOnce() -> T + Send + 'static) -> T {
        guarded(&self.mount, access)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        tear_down(&self.mount);
    }
}

/// Kills and removes a mount; complaints only, because it runs in `Drop`.
pub(crate) fn tear_down(mount: &Mount) {
    if std::thread::panicking()
        && let Err(e) = mount.abort()
    {
        eprintln!("abort: {e}");
    }
    if let Err(e) = mount.unmount(true) {
        eprintln!("unmount: {e}");
    }
}

/// See [`Mounted::guarded`].
pub(crate) fn guarded<T: Send + 'static>(mount: &Mount, access: impl FnOnce() -> T + Send + 'static) -> T {
    let (tx, rx) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let _ = tx.send(access());
    });
    match rx.recv_timeout(LIMIT) {
        Ok(value) => {
            thread.join().expect("joins");
            value
        }
        Err(e) => {
            mount.abort().expect("aborts");
            match thread.join() {
                Err(panic) => std::panic::resume_unwind(panic),
                Ok(()) => panic!("file access hung ({e}); the connection was aborted"),
            }
        }
    }
}

/// Runs a shell command below the mount, in a child that is killed when it hangs.
pub(crate) fn shell(mounted: &Mounted, script: &str) -> String {
    let (dir, script) = (mounted.path(""), script.to_string());
    let output: Output = mounted.guarded(move || {
        Command::new("timeout").args(["-k", "1", "30", "sh", "-ec", &script]).current_dir(dir).output().expect("runs")
    });
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{:?}: {text}{}", output.status, String::from_utf8_lossy(&output.stderr));
    text
}

/// Names in a directory.
pub(crate) fn names(path: &Path) -> Vec<Vec<u8>> {
    let dir = std::fs::read_dir(path).expect("opens");
    let mut names: Vec<_> = dir.map(|e| e.expect("entry").file_name().as_bytes().to_vec()).collect();
    names.sort();
    names
}
