//! `file:///dir`: a local directory that is the same on every node (a shared mount of the host, or a single machine).
//!
//! Locators are absolute paths and come from peers, so every one is opened with openat2(2) below the source's directory: it may not
//! leave it through `..`, a symbolic link or a magic link, whatever happens to the tree meanwhile. A version is inode, ctime, mtime and
//! size; the device number is left out, because nodes that mount the same share number it differently. A read keeps one file open and
//! compares its attributes before the first byte and after every chunk. All I/O runs on tokio's blocking threads, a bounded number at once.
//! What changes the tree is in `change`, open files are in `open`.

mod change;
mod open;

use crate::{Backend, ByteStream, Capabilities, FsStats, ListPage};
use async_trait::async_trait;
use bytes::{BufMut, Bytes, BytesMut};
use efc_common::id::SourceId;
use efc_common::node::{Attr, Entry, FileKind, LOCATOR_BYTES_MAX, Node, Time};
use efc_common::source::SourceSpec;
use efc_common::{Error, Kind, Result};
use futures::{StreamExt, stream};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, ResolveFlags, SeekFrom, Stat};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Blocking calls at once.
const CALLS_MAX: usize = 32;
/// Bytes read at a time.
const CHUNK_BYTES: u64 = 1024 * 1024;
/// Chunks being read ahead for one stream.
const READ_AHEAD: usize = 2;
/// Directory entries in one page: one buffer of getdents64(2).
const PAGE_BYTES: usize = 64 * 1024;
/// Bytes of a version token.
const VERSION_BYTES: usize = 40;

/// A local directory.
pub(crate) struct File {
    id: SourceId,
    root: Arc<Root>,
    permits: Arc<Semaphore>,
}

/// The directory that no locator may leave.
struct Root {
    path: Vec<u8>,
}

impl File {
    /// The directory `spec.path`; whether it is there is seen by [`Backend::root`].
    pub(crate) fn new(spec: &SourceSpec) -> File {
        File {
            id: spec.id(),
            root: Arc::new(Root { path: spec.path.clone().into_bytes() }),
            permits: Arc::new(Semaphore::new(CALLS_MAX)),
        }
    }

    /// Runs blocking work off the async threads.
    async fn run<T: Send + 'static>(&self, work: impl FnOnce(&Root) -> Result<T> + Send + 'static) -> Result<T> {
        let root = self.root.clone();
        blocking(&self.permits, move || work(&root)).await
    }
}

async fn blocking<T: Send + 'static>(
    permits: &Arc<Semaphore>,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let stopping = |_| Error::new(Kind::Cancelled, "the file backend is stopping");
    let permit = permits.clone().acquire_owned().await.map_err(stopping)?;
    let job = move || {
        // Kept until the call is over, also when nobody waits for it any more.
        let _permit = permit;
        work()
    };
    tokio::task::spawn_blocking(job)
        .await
        .map_err(|e| Error::new(Kind::Cancelled, "a file operation was cut off").caused_by(e))?
}

impl Root {
    /// The path of `locator` below the root, `.` for the root itself.
    fn below<'a>(&self, locator: &'a [u8]) -> Result<&'a [u8]> {
        let outside = || Error::new(Kind::Invalid, format!("`{}` is not below {}", show(locator), show(&self.path)));
        let rest = locator.strip_prefix(&self.path[..]).ok_or_else(outside)?;
        let rest = match (rest, &self.path[..]) {
            (b"", _) => return Ok(b"."),
            (rest, b"/") => rest,
            (rest, _) => rest.strip_prefix(b"/").ok_or_else(outside)?,
        };
        let odd = |part: &[u8]| matches!(part, b"" | b"." | b"..");
        if rest.split(|b| *b == b'/').any(odd) || rest.contains(&0) {
            return Err(outside());
        }
        Ok(rest)
    }

    /// Opens the object at `locator`.
    fn open(&self, locator: &[u8], flags: OFlags) -> Result<OwnedFd> {
        let below = self.below(locator)?;
        let root = rustix::fs::open(
            OsStr::from_bytes(&self.path),
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|e| error(e, &self.path))?;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        loop {
            match rustix::fs::openat2(&root, OsStr::from_bytes(below), flags, Mode::empty(), resolve) {
                // A rename raced with the resolution: the kernel asks to try again.
                Err(Errno::AGAIN | Errno::INTR) => {}
                // A component of the path is now a symbolic link, so what the locator named is gone.
                Err(Errno::LOOP | Errno::XDEV) => {
                    return Err(Error::new(Kind::Stale, "the path leads through a symbolic link now")
                        .with("path", show(locator)));
                }
                other => return other.map_err(|e| error(e, locator)),
            }
        }
    }

    fn node(&self, locator: &[u8]) -> Result<Node> {
        let fd = self.open(locator, OFlags::PATH)?;
        let stat = rustix::fs::fstat(&fd).map_err(|e| error(e, locator))?;
        Ok(node(Bytes::copy_from_slice(locator), &stat))
    }

    /// `dir` + `name`.
    fn join(&self, dir: &[u8], name: &[u8]) -> Bytes {
        let mut path = BytesMut::with_capacity(dir.len() + 1 + name.len());
        path.put_slice(dir);
        if dir != b"/" {
            path.put_u8(b'/');
        }
        path.put_slice(name);
        path.freeze()
    }

    /// The locator of `name` in `dir`, if it can be one.
    fn child(&self, dir: &[u8], name: &[u8]) -> Result<Bytes> {
        if name.is_empty() || matches!(name, b"." | b"..") || name.contains(&b'/') || name.contains(&0) {
            return Err(Error::new(Kind::Invalid, format!("`{}` is no file name", show(name))));
        }
        let path = self.join(dir, name);
        if path.len() > LOCATOR_BYTES_MAX {
            return Err(Error::new(Kind::NameTooLong, format!("the path of `{}` is too long", show(name))));
        }
        Ok(path)
    }

    fn lookup(&self, dir: &[u8], name: &[u8]) -> Result<Node> {
        self.node(&self.child(dir, name)?)
    }

    fn list(&self, dir: &[u8], from: u64) -> Result<ListPage> {
        let fd = self.open(dir, OFlags::RDONLY | OFlags::DIRECTORY)?;
        rustix::fs::seek(&fd, SeekFrom::Start(from)).map_err(|e| error(e, dir))?;
        let mut buffer = Vec::with_capacity(PAGE_BYTES);
        let mut raw = RawDir::new(&fd, buffer.spare_capacity_mut());
        let mut page = ListPage::default();
        while let Some(entry) = raw.next() {
            let entry = entry.map_err(|e| error(e, dir))?;
            page.next = Some(Bytes::copy_from_slice(&entry.next_entry_cookie().to_be_bytes()));
            let name = entry.file_name();
            if !matches!(name.to_bytes(), b"." | b"..") {
                self.add(&fd, dir, name, &mut page)?;
            }
            if raw.is_buffer_empty() {
                return Ok(page);
            }
        }
        page.next = None;
        Ok(page)
    }

    fn add(&self, fd: &OwnedFd, dir: &[u8], name: &std::ffi::CStr, page: &mut ListPage) -> Result<()> {
        let locator = self.join(dir, name.to_bytes());
        let name_bytes = Bytes::copy_from_slice(name.to_bytes());
        if locator.len() > LOCATOR_BYTES_MAX {
            page.hidden.push((name_bytes, "path longer than 8192 bytes"));
            return Ok(());
        }
        match rustix::fs::statat(fd, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT) {
            Ok(stat) => page.entries.push(Entry { name: name_bytes, node: node(locator, &stat) }),
            // Removed since the directory was read.
            Err(Errno::NOENT) => {}
            Err(e) => return Err(error(e, &locator)),
        }
        Ok(())
    }

    /// Opens a regular file at `version`.
    fn open_version(&self, locator: &[u8], version: &[u8]) -> Result<OwnedFd> {
        // Without NONBLOCK a FIFO would wait for a writer.
        let fd = self.open(locator, OFlags::RDONLY | OFlags::NONBLOCK).map_err(|e| match e.kind() {
            // The version was of a file that is no longer there.
            Kind::NotFound | Kind::NotADirectory => Error::new(Kind::Stale, "the file is gone").caused_by(e),
            _ => e,
        })?;
        same(&fd, version, locator)?;
        Ok(fd)
    }

    fn readlink(&self, locator: &[u8]) -> Result<Bytes> {
        let fd = self.open(locator, OFlags::PATH)?;
        match rustix::fs::readlinkat(&fd, c"", Vec::new()) {
            Ok(target) => Ok(Bytes::from(target.into_bytes())),
            // What readlinkat(2) answers for an open file that is no symbolic link.
            Err(Errno::NOENT | Errno::INVAL) => {
                Err(Error::new(Kind::Invalid, format!("`{}` is no symbolic link", show(locator))))
            }
            Err(e) => Err(error(e, locator)),
        }
    }

    fn xattrs(&self, locator: &[u8]) -> Result<Vec<(Bytes, Bytes)>> {
        let fd = self.open(locator, OFlags::PATH)?;
        // The f*xattr calls refuse O_PATH descriptors, and another kind would open devices and FIFOs; the magic link leads to the object.
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let mut buffer = vec![0u8; 64 * 1024];
        let names = match rustix::fs::listxattr(&path, &mut buffer[..]) {
            Ok(n) => buffer[..n].to_vec(),
            Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
            Err(e) => return Err(error(e, locator)),
        };
        let mut found = Vec::new();
        for name in names.split(|b| *b == 0).filter(|n| !n.is_empty()) {
            match rustix::fs::getxattr(&path, OsStr::from_bytes(name), &mut buffer[..]) {
                Ok(n) => found.push((Bytes::copy_from_slice(name), Bytes::copy_from_slice(&buffer[..n]))),
                // Removed since it was listed, or not for us.
                Err(Errno::NODATA | Errno::PERM | Errno::ACCESS) => {}
                Err(e) => return Err(error(e, locator)),
            }
        }
        Ok(found)
    }
}

#[async_trait]
impl Backend for File {
    fn source_id(&self) -> SourceId {
        self.id
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            shared_listing: false,
            path_locators: true,
            conditional_read: true,
            symlinks: true,
            xattr: true,
            posix_attr: true,
            statfs: true,
        }
    }

    async fn root(&self) -> Result<Node> {
        self.run(|root| root.node(&root.path)).await
    }

    async fn lookup(&self, dir: &Bytes, name: &[u8]) -> Result<Node> {
        let (dir, name) = (dir.clone(), name.to_vec());
        self.run(move |root| root.lookup(&dir, &name)).await
    }

    async fn getattr(&self, locator: &Bytes) -> Result<Node> {
        let locator = locator.clone();
        self.run(move |root| root.node(&locator)).await
    }

    async fn list(&self, dir: &Bytes, from: Option<Bytes>) -> Result<ListPage> {
        let dir = dir.clone();
        let from = match from.as_deref().map(<[u8; 8]>::try_from) {
            None => 0,
            Some(Ok(cookie)) => u64::from_be_bytes(cookie),
            Some(Err(_)) => return Err(Error::new(Kind::Invalid, "that is no place in a directory")),
        };
        self.run(move |root| root.list(&dir, from)).await
    }

    async fn read(&self, locator: &Bytes, version: &Bytes, range: Range<u64>) -> Result<ByteStream> {
        let range = range.start..range.end.min(size_of(version)?);
        let fd = Arc::new({
            let (locator, version) = (locator.clone(), version.clone());
            self.run(move |root| root.open_version(&locator, &version)).await?
        });
        let (permits, locator, version) = (self.permits.clone(), locator.clone(), version.clone());
        let starts = range.clone().step_by(CHUNK_BYTES as usize);
        let chunks = stream::iter(starts).map(move |at| {
            let (fd, permits, locator, version) = (fd.clone(), permits.clone(), locator.clone(), version.clone());
            let chunk = at..(at + CHUNK_BYTES).min(range.end);
            async move { blocking(&permits, move || read_chunk(&fd, &locator, &version, chunk)).await }
        });
        Ok(chunks.buffered(READ_AHEAD).boxed())
    }

    async fn readlink(&self, locator: &Bytes) -> Result<Bytes> {
        let locator = locator.clone();
        self.run(move |root| root.readlink(&locator)).await
    }

    async fn xattrs(&self, locator: &Bytes) -> Result<Vec<(Bytes, Bytes)>> {
        let locator = locator.clone();
        self.run(move |root| root.xattrs(&locator)).await
    }

    async fn statfs(&self) -> Result<FsStats> {
        self.run(|root| {
            let fd = root.open(&root.path, OFlags::PATH)?;
            let s = rustix::fs::fstatvfs(&fd).map_err(|e| error(e, &root.path))?;
            Ok(FsStats {
                total_bytes: s.f_blocks * s.f_frsize,
                free_bytes: s.f_bfree * s.f_frsize,
                available_bytes: s.f_bavail * s.f_frsize,
                total_files: s.f_files,
                free_files: s.f_ffree,
            })
        })
        .await
    }
}

/// The bytes `range` of the open file, fewer if it ends before.
fn read_full(fd: &OwnedFd, locator: &[u8], range: Range<u64>) -> Result<Vec<u8>> {
    let len = (range.end - range.start) as usize;
    let mut data = Vec::with_capacity(len);
    while data.len() < len {
        let at = range.start + data.len() as u64;
        match rustix::io::pread(fd, rustix::buffer::spare_capacity(&mut data), at) {
            Ok(0) => break,
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(error(e, locator)),
        }
    }
    // The allocator may give more than was asked for, and then more may have been read.
    data.truncate(len);
    Ok(data)
}

/// The bytes `range` of the open file, which must still be `version` afterwards.
fn read_chunk(fd: &OwnedFd, locator: &[u8], version: &[u8], range: Range<u64>) -> Result<Bytes> {
    let len = (range.end - range.start) as usize;
    let data = read_full(fd, locator, range)?;
    same(fd, version, locator)?;
    if data.len() < len {
        return Err(Error::new(Kind::Io, "the file ends before its size").with("path", show(locator)));
    }
    Ok(Bytes::from(data))
}

/// Fails unless the open file is `version`.
fn same(fd: &OwnedFd, version: &[u8], locator: &[u8]) -> Result<()> {
    let stat = rustix::fs::fstat(fd).map_err(|e| error(e, locator))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {}
        FileType::Directory => {
            return Err(Error::new(Kind::IsADirectory, format!("`{}` is a directory", show(locator))));
        }
        _ => return Err(Error::new(Kind::Invalid, format!("`{}` is no regular file", show(locator)))),
    }
    if version_of(&stat) != version {
        return Err(Error::new(Kind::Stale, "the file changed").with("path", show(locator)));
    }
    Ok(())
}

fn node(locator: Bytes, s: &Stat) -> Node {
    let kind = match FileType::from_raw_mode(s.st_mode) {
        FileType::RegularFile => FileKind::File,
        FileType::Directory => FileKind::Directory,
        FileType::Symlink => FileKind::Symlink,
        FileType::Fifo => FileKind::Fifo,
        FileType::CharacterDevice => FileKind::CharDevice,
        FileType::BlockDevice => FileKind::BlockDevice,
        _ => FileKind::Socket,
    };
    let version = if kind == FileKind::Directory { Bytes::new() } else { Bytes::copy_from_slice(&version_of(s)) };
    let attr = Attr {
        kind,
        size: s.st_size as u64,
        mtime: Time { secs: s.st_mtime, nanos: s.st_mtime_nsec as u32 },
        ctime: Time { secs: s.st_ctime, nanos: s.st_ctime_nsec as u32 },
        mode: Some(s.st_mode & 0o7777),
        uid: Some(s.st_uid),
        gid: Some(s.st_gid),
        nlink: s.st_nlink as u32,
        fileid: s.st_ino,
        used: Some(s.st_blocks as u64 * 512),
        atime: Some(Time { secs: s.st_atime, nanos: s.st_atime_nsec as u32 }),
        // Linux uses 12 bits for the major number and 20 for the minor.
        rdev: s.st_rdev as u32,
    };
    Node { locator, version, attr }
}

/// inode, ctime, mtime, size, big endian.
fn version_of(s: &Stat) -> [u8; VERSION_BYTES] {
    let mut token = [0; VERSION_BYTES];
    let mut out = &mut token[..];
    out.put_u64(s.st_ino);
    for (secs, nanos) in [(s.st_ctime, s.st_ctime_nsec), (s.st_mtime, s.st_mtime_nsec)] {
        out.put_i64(secs);
        out.put_u32(nanos as u32);
    }
    out.put_u64(s.st_size as u64);
    token
}

/// The size that a version had.
fn size_of(version: &[u8]) -> Result<u64> {
    match version.last_chunk::<8>() {
        Some(size) if version.len() == VERSION_BYTES => Ok(u64::from_be_bytes(*size)),
        _ => Err(Error::new(Kind::Invalid, format!("{} bytes are no version of a local file", version.len()))),
    }
}

fn show(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

/// What an errno means in our terms: the only table of it for this origin.
fn kind_of(e: Errno) -> Kind {
    match e {
        Errno::NOENT => Kind::NotFound,
        Errno::EXIST => Kind::AlreadyExists,
        Errno::NOTDIR => Kind::NotADirectory,
        Errno::ISDIR => Kind::IsADirectory,
        Errno::ACCESS | Errno::ROFS => Kind::PermissionDenied,
        Errno::PERM => Kind::NotPermitted,
        Errno::NOTEMPTY => Kind::NotEmpty,
        Errno::FBIG => Kind::TooLarge,
        Errno::MLINK => Kind::TooManyLinks,
        Errno::XDEV => Kind::CrossDevice,
        Errno::DQUOT => Kind::NoQuota,
        Errno::NOSPC => Kind::NoSpace,
        Errno::NAMETOOLONG => Kind::NameTooLong,
        Errno::RANGE | Errno::TOOBIG => Kind::OutOfRange,
        Errno::NODATA => Kind::NoData,
        Errno::STALE => Kind::Stale,
        Errno::BUSY | Errno::TXTBSY => Kind::Busy,
        Errno::INVAL => Kind::Invalid,
        Errno::OPNOTSUPP | Errno::NOSYS => Kind::Unsupported,
        Errno::TIMEDOUT => Kind::Timeout,
        Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::AGAIN => Kind::Exhausted,
        Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::NETDOWN | Errno::CONNRESET | Errno::NOTCONN => {
            Kind::Unavailable
        }
        _ => Kind::Io,
    }
}

fn error(e: Errno, path: &[u8]) -> Error {
    Error::new(kind_of(e), format!("{}: {}", show(path), std::io::Error::from(e)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locators_stay_below_the_root() {
        let root = Root { path: b"/data/x".to_vec() };
        assert_eq!(root.below(b"/data/x").expect("root"), b".");
        assert_eq!(root.below(b"/data/x/a/..b").expect("below"), b"a/..b");
        for bad in [
            &b"/data"[..],
            b"/data/xy",
            b"/data/x/",
            b"/data/x/../y",
            b"/data/x/a/../../y",
            b"/data/x//etc",
            b"/data/x/a\0b",
            b"etc",
            b"",
        ] {
            assert!(root.below(bad).is_err_and(|e| e.is(Kind::Invalid)), "{}", show(bad));
        }
        assert_eq!(Root { path: b"/".to_vec() }.below(b"/etc/x").expect("below /"), b"etc/x");
    }

    fn backend(dir: &std::path::Path) -> File {
        let url = format!("file://{}", dir.display());
        let spec = SourceSpec::parse(&url, Default::default(), efc_common::source::SecretRef::Anonymous);
        File::new(&spec.expect("a source"))
    }

    fn locator(dir: &std::path::Path, below: &str) -> Bytes {
        Bytes::from(dir.join(below).into_os_string().into_encoded_bytes())
    }

    #[tokio::test]
    async fn symbolic_links_are_shown_and_never_followed() {
        let outside = tempfile::tempdir().expect("outside");
        std::fs::write(outside.path().join("secret"), "s").expect("secret");
        let dir = tempfile::tempdir().expect("dir");
        std::os::unix::fs::symlink(outside.path(), dir.path().join("door")).expect("link");
        std::os::unix::fs::symlink("/proc/self/root", dir.path().join("magic")).expect("link");
        let b = backend(dir.path());
        for (path, link) in [("door/secret", "door"), ("magic/etc/passwd", "magic")] {
            assert!(b.getattr(&locator(dir.path(), path)).await.is_err_and(|e| e.is(Kind::Stale)), "{path}");
            let node = b.getattr(&locator(dir.path(), link)).await.expect("the link itself");
            assert_eq!(node.attr.kind, FileKind::Symlink);
            assert!(b.lookup(&node.locator, b"x").await.is_err());
            assert!(b.list(&node.locator, None).await.is_err());
            assert!(b.read(&node.locator, &node.version, 0..1).await.is_err());
        }
    }

    #[tokio::test]
    async fn special_files_are_listed_and_never_waited_for() {
        let dir = tempfile::tempdir().expect("dir");
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RUSR, 0).expect("fifo");
        let b = backend(dir.path());
        let page = b.list(&locator(dir.path(), ""), None).await;
        assert!(page.is_err_and(|e| e.is(Kind::Invalid)), "a locator ends without a slash");
        let root = b.root().await.expect("root");
        let page = b.list(&root.locator, None).await.expect("list");
        let node = &page.entries[0].node;
        assert_eq!(node.attr.kind, FileKind::Fifo);
        assert_eq!(b.xattrs(&node.locator).await.expect("xattrs"), []);
        assert!(b.read(&node.locator, &node.version, 0..1).await.is_err());
        assert!(b.read(&root.locator, &node.version, 0..1).await.is_err_and(|e| e.is(Kind::IsADirectory)));
    }

    #[tokio::test]
    async fn a_missing_root_is_named() {
        let dir = tempfile::tempdir().expect("dir");
        let e = backend(&dir.path().join("absent")).root().await.expect_err("absent");
        assert!(e.is(Kind::NotFound) && e.message().contains("absent"), "{e}");
        std::fs::write(dir.path().join("plain"), "").expect("file");
        assert!(backend(&dir.path().join("plain")).root().await.is_err_and(|e| e.is(Kind::NotADirectory)));
    }
}
