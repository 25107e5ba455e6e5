//! Changes to a local directory: [`Tree`] of `file` sources.
//!
//! A change is a call on the opened parent directory and a name without `/`, so that nothing it meets leads out of the root. What is not a
//! name is reached through an `O_PATH` descriptor, which opens neither devices nor FIFOs, and its `/proc/self/fd` entry, which leads to that very
//! object: a symbolic link is changed itself, never what it points to. New objects are made first and then given owner and mode, in this order
//! because chown(2) clears set-id bits; one that cannot be given both is removed again.

use super::open::Opened;
use super::{File, Root, error, node, show};
use crate::tree::{Change, New, NewNode, OpenFile, RenameMode, SetTime, Tree};
use async_trait::async_trait;
use bytes::Bytes;
use efc_common::node::Node;
use efc_common::{Error, Kind, Result};
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, Stat, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid,
    XattrFlags,
};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

/// The set-group-id bit.
const SETGID: u32 = 0o2000;

#[async_trait]
impl Tree for File {
    fn keeps_removed(&self) -> bool {
        true
    }

    fn child(&self, dir: &Bytes, name: &[u8]) -> Option<Bytes> {
        Some(self.root.join(dir, name))
    }

    async fn create(&self, dir: &Bytes, name: &[u8], new: &NewNode) -> Result<Node> {
        let (dir, name, new) = (dir.clone(), name.to_vec(), new.clone());
        self.run(move |root| root.create(&dir, &name, &new)).await
    }

    async fn link(&self, file: &Bytes, dir: &Bytes, name: &[u8]) -> Result<Node> {
        let (file, dir, name) = (file.clone(), dir.clone(), name.to_vec());
        self.run(move |root| root.link(&file, &dir, &name)).await
    }

    async fn remove(&self, dir: &Bytes, name: &[u8], directory: bool) -> Result<()> {
        let (dir, name) = (dir.clone(), name.to_vec());
        self.run(move |root| {
            let locator = root.child(&dir, &name)?;
            let flags = if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            rustix::fs::unlinkat(root.dir(&dir)?, OsStr::from_bytes(&name), flags).map_err(|e| error(e, &locator))
        })
        .await
    }

    async fn rename(&self, from: (&Bytes, &[u8]), to: (&Bytes, &[u8]), mode: RenameMode) -> Result<Node> {
        let (from, to) = ((from.0.clone(), from.1.to_vec()), (to.0.clone(), to.1.to_vec()));
        self.run(move |root| root.rename((&from.0, &from.1), (&to.0, &to.1), mode)).await
    }

    async fn set_attr(&self, locator: &Bytes, change: &Change) -> Result<Node> {
        let (locator, change) = (locator.clone(), *change);
        self.run(move |root| {
            let fd = root.open(&locator, OFlags::PATH)?;
            let stat = apply(fd.as_fd(), &change, &locator)?;
            Ok(node(locator, &stat))
        })
        .await
    }

    async fn set_xattr(&self, locator: &Bytes, name: &[u8], value: &[u8], flags: i32) -> Result<()> {
        let (locator, name, value) = (locator.clone(), name.to_vec(), value.to_vec());
        self.run(move |root| {
            let fd = root.open(&locator, OFlags::PATH)?;
            let flags = XattrFlags::from_bits_retain(flags as u32);
            rustix::fs::setxattr(itself(fd.as_fd()), OsStr::from_bytes(&name), &value, flags)
                .map_err(|e| error(e, &locator))
        })
        .await
    }

    async fn remove_xattr(&self, locator: &Bytes, name: &[u8]) -> Result<()> {
        let (locator, name) = (locator.clone(), name.to_vec());
        self.run(move |root| {
            let fd = root.open(&locator, OFlags::PATH)?;
            rustix::fs::removexattr(itself(fd.as_fd()), OsStr::from_bytes(&name)).map_err(|e| error(e, &locator))
        })
        .await
    }

    async fn open(&self, locator: &Bytes, write: bool) -> Result<Arc<dyn OpenFile>> {
        let at = locator.clone();
        let fd = self.run(move |root| root.open_file(&at, write)).await?;
        Ok(Arc::new(Opened::new(fd, locator.clone(), self.permits.clone())))
    }

    fn reopen(&self, fd: OwnedFd, locator: &Bytes) -> Option<Arc<dyn OpenFile>> {
        Some(Arc::new(Opened::new(fd, locator.clone(), self.permits.clone())))
    }
}

impl Root {
    /// A directory to change names in.
    fn dir(&self, locator: &[u8]) -> Result<OwnedFd> {
        self.open(locator, OFlags::PATH | OFlags::DIRECTORY)
    }

    fn create(&self, dir: &[u8], name: &[u8], new: &NewNode) -> Result<Node> {
        let locator = self.child(dir, name)?;
        let fail = |e| error(e, &locator);
        let parent = self.dir(dir)?;
        let above = rustix::fs::fstat(&parent).map_err(fail)?;
        let name = OsStr::from_bytes(name);
        let made = make(&parent, name, new).map_err(fail)?;
        let finished = (|| {
            let fd = match made {
                Some(fd) => fd,
                None => {
                    rustix::fs::openat(&parent, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
                        .map_err(fail)?
                }
            };
            finish(&fd, new, &above, &locator)
        })();
        match finished {
            Ok(stat) => Ok(node(locator, &stat)),
            Err(e) => {
                let flags = if new.what == New::Directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
                match rustix::fs::unlinkat(&parent, name, flags) {
                    Ok(()) | Err(Errno::NOENT) => Err(e),
                    Err(left) => Err(e.with("left_behind", left)),
                }
            }
        }
    }

    fn link(&self, file: &[u8], dir: &[u8], name: &[u8]) -> Result<Node> {
        let locator = self.child(dir, name)?;
        let fd = self.open(file, OFlags::PATH)?;
        let name = OsStr::from_bytes(name);
        rustix::fs::linkat(CWD, itself(fd.as_fd()), self.dir(dir)?, name, AtFlags::SYMLINK_FOLLOW)
            .map_err(|e| error(e, &locator))?;
        let stat = rustix::fs::fstat(&fd).map_err(|e| error(e, &locator))?;
        Ok(node(locator, &stat))
    }

    fn rename(&self, from: (&[u8], &[u8]), to: (&[u8], &[u8]), mode: RenameMode) -> Result<Node> {
        let (source, target) = (self.child(from.0, from.1)?, self.child(to.0, to.1)?);
        let flags = match mode {
            RenameMode::Replace => RenameFlags::empty(),
            RenameMode::NoReplace => RenameFlags::NOREPLACE,
            RenameMode::Exchange => RenameFlags::EXCHANGE,
        };
        let (from_dir, to_dir) = (self.dir(from.0)?, self.dir(to.0)?);
        let (from, to) = (OsStr::from_bytes(from.1), OsStr::from_bytes(to.1));
        rustix::fs::renameat_with(from_dir, from, to_dir, to, flags)
            .map_err(|e| error(e, &source).with("to", show(&target)))?;
        self.node(&target)
    }

    fn open_file(&self, locator: &[u8], write: bool) -> Result<OwnedFd> {
        let fd = self.open(locator, OFlags::PATH)?;
        regular(fd.as_fd(), locator)?;
        let flags = if write { OFlags::RDWR } else { OFlags::RDONLY };
        reopen(fd.as_fd(), flags, locator)
    }
}

/// Puts the object into its directory, without owner and set-id bits yet. The descriptor of a regular file is its own.
fn make(parent: &OwnedFd, name: &OsStr, new: &NewNode) -> rustix::io::Result<Option<OwnedFd>> {
    let mode = Mode::from_raw_mode(new.mode & 0o777);
    let node = |kind, number: u32| rustix::fs::mknodat(parent, name, kind, mode, number.into());
    match &new.what {
        New::File => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
            return rustix::fs::openat(parent, name, flags, mode).map(Some);
        }
        New::Directory => rustix::fs::mkdirat(parent, name, mode),
        New::Symlink(target) => rustix::fs::symlinkat(OsStr::from_bytes(target), parent, name),
        New::Fifo => node(FileType::Fifo, 0),
        New::Socket => node(FileType::Socket, 0),
        New::CharDevice(number) => node(FileType::CharacterDevice, *number),
        New::BlockDevice(number) => node(FileType::BlockDevice, *number),
    }?;
    Ok(None)
}

/// Gives a new object its owner and mode; `above` is its directory.
fn finish(fd: &OwnedFd, new: &NewNode, above: &Stat, locator: &[u8]) -> Result<Stat> {
    let stat = rustix::fs::fstat(fd).map_err(|e| error(e, locator))?;
    let inherits = above.st_mode & SETGID != 0;
    let gid = if inherits { above.st_gid } else { new.gid };
    let bit = if inherits && new.what == New::Directory { SETGID } else { 0 };
    let mode = new.mode & 0o7777 | bit;
    let has_mode = !matches!(new.what, New::Symlink(_));
    let change = Change {
        uid: (stat.st_uid != new.uid).then_some(new.uid),
        gid: (stat.st_gid != gid).then_some(gid),
        mode: (has_mode && stat.st_mode & 0o7777 != mode).then_some(mode),
        ..Change::default()
    };
    if change == Change::default() { Ok(stat) } else { apply(fd.as_fd(), &change, locator) }
}

/// Changes attributes of an open object of any kind (also one opened with `O_PATH`); the attributes after it.
pub(super) fn apply(fd: BorrowedFd<'_>, change: &Change, locator: &[u8]) -> Result<Stat> {
    let fail = |e| error(e, locator);
    if let Some(size) = change.size {
        regular(fd, locator)?;
        let file = reopen(fd, OFlags::WRONLY, locator)?;
        rustix::io::retry_on_intr(|| rustix::fs::ftruncate(&file, size)).map_err(fail)?;
    }
    if change.uid.is_some() || change.gid.is_some() {
        // chown(2) reads the largest number as "leave alone".
        if change.uid == Some(u32::MAX) || change.gid == Some(u32::MAX) {
            return Err(Error::new(Kind::Invalid, format!("{} is no owner", u32::MAX)));
        }
        let (uid, gid) = (change.uid.map(Uid::from_raw), change.gid.map(Gid::from_raw));
        rustix::fs::chownat(fd, c"", uid, gid, AtFlags::EMPTY_PATH).map_err(fail)?;
    }
    if let Some(mode) = change.mode {
        let stat = rustix::fs::fstat(fd).map_err(fail)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
            return Err(Error::new(Kind::Unsupported, "symbolic links have no mode").with("path", show(locator)));
        }
        rustix::fs::chmod(itself(fd), Mode::from_raw_mode(mode & 0o7777)).map_err(fail)?;
    }
    if change.atime.is_some() || change.mtime.is_some() {
        let times = Timestamps { last_access: timespec(change.atime), last_modification: timespec(change.mtime) };
        rustix::fs::utimensat(CWD, itself(fd), &times, AtFlags::empty()).map_err(fail)?;
    }
    rustix::fs::fstat(fd).map_err(fail)
}

fn timespec(time: Option<SetTime>) -> Timespec {
    match time {
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        Some(SetTime::Now) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        Some(SetTime::At(t)) => Timespec { tv_sec: t.secs, tv_nsec: t.nanos.min(999_999_999).into() },
    }
}

/// A path that leads to the open object itself, even if it is a symbolic link.
fn itself(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Opens the regular file behind `fd` once more.
fn reopen(fd: BorrowedFd<'_>, flags: OFlags, locator: &[u8]) -> Result<OwnedFd> {
    rustix::fs::open(itself(fd), flags | OFlags::CLOEXEC, Mode::empty()).map_err(|e| error(e, locator))
}

/// Fails unless the object is a regular file.
fn regular(fd: BorrowedFd<'_>, locator: &[u8]) -> Result<()> {
    let stat = rustix::fs::fstat(fd).map_err(|e| error(e, locator))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(()),
        FileType::Directory => Err(Error::new(Kind::IsADirectory, format!("`{}` is a directory", show(locator)))),
        _ => Err(Error::new(Kind::Invalid, format!("`{}` is no regular file", show(locator)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Backend;
    use efc_common::source::{SecretRef, SourceSpec};

    fn tree(dir: &std::path::Path) -> File {
        let url = format!("file://{}", dir.display());
        File::new(&SourceSpec::parse(&url, Default::default(), SecretRef::Anonymous).expect("a source"))
    }

    fn locator(dir: &std::path::Path, below: &str) -> Bytes {
        Bytes::from(dir.join(below).into_os_string().into_encoded_bytes())
    }

    fn new(what: New) -> NewNode {
        NewNode { what, mode: 0o600, uid: 0, gid: 0 }
    }

    #[tokio::test]
    async fn nothing_is_changed_through_a_symbolic_link() {
        let outside = tempfile::tempdir().expect("outside");
        std::fs::write(outside.path().join("file"), "content").expect("file");
        let before = std::fs::metadata(outside.path().join("file")).expect("metadata");
        let dir = tempfile::tempdir().expect("dir");
        std::os::unix::fs::symlink(outside.path(), dir.path().join("door")).expect("link");
        std::os::unix::fs::symlink(outside.path().join("file"), dir.path().join("link")).expect("link");
        std::fs::write(dir.path().join("own"), "own").expect("file");
        let t = tree(dir.path());
        let (root, door, link) =
            (t.root().await.expect("root").locator, locator(dir.path(), "door"), locator(dir.path(), "link"));
        let through = locator(dir.path(), "door/file");
        let mode = Change { mode: Some(0o777), size: Some(0), ..Change::default() };
        for what in [New::File, New::Directory, New::Fifo] {
            assert!(t.create(&door, b"x", &new(what)).await.is_err());
        }
        assert!(t.remove(&door, b"file", false).await.is_err());
        assert!(t.rename((&door, b"file"), (&root, b"x"), RenameMode::Replace).await.is_err());
        assert!(t.rename((&root, b"own"), (&door, b"x"), RenameMode::Replace).await.is_err());
        assert!(t.link(&through, &root, b"x").await.is_err());
        assert!(t.set_attr(&through, &mode).await.is_err_and(|e| e.is(Kind::Stale)));
        assert!(t.set_attr(&link, &mode).await.is_err());
        assert!(t.set_xattr(&through, b"user.x", b"", 0).await.is_err());
        for bad in [&through, &link, &door] {
            assert!(t.open(bad, true).await.is_err());
        }
        // What is at a name already is never written through.
        assert!(t.create(&root, b"link", &new(New::File)).await.is_err_and(|e| e.is(Kind::AlreadyExists)));
        let after = std::fs::metadata(outside.path().join("file")).expect("metadata");
        assert_eq!(std::fs::read_dir(outside.path()).expect("list").count(), 1);
        assert_eq!((after.len(), after.permissions()), (before.len(), before.permissions()));
        t.remove(&root, b"door", false).await.expect("the link itself");
        assert!(outside.path().exists());
    }

    #[tokio::test]
    async fn what_cannot_be_finished_is_not_left_behind() {
        let dir = tempfile::tempdir().expect("dir");
        let t = tree(dir.path());
        let root = t.root().await.expect("root").locator;
        for what in [New::File, New::Directory, New::Symlink("x".into()), New::Fifo] {
            let nobody = NewNode { uid: u32::MAX, ..new(what) };
            assert!(t.create(&root, b"half", &nobody).await.is_err_and(|e| e.is(Kind::Invalid)));
            assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 0);
        }
    }

    #[tokio::test]
    async fn an_open_file_needs_no_name() {
        let dir = tempfile::tempdir().expect("dir");
        let t = tree(dir.path());
        let root = t.root().await.expect("root").locator;
        let made = t.create(&root, b"file", &new(New::File)).await.expect("create");
        let open = t.open(&made.locator, true).await.expect("open");
        t.remove(&root, b"file", false).await.expect("remove");
        let node = open.write(0, Bytes::from_static(b"content")).await.expect("write");
        assert_eq!((node.attr.nlink, node.attr.size, node.locator), (0, 7, made.locator));
        let change = Change { size: Some(3), mode: Some(0o640), uid: Some(5), ..Change::default() };
        let attr = open.set_attr(&change).await.expect("set").attr;
        assert_eq!((attr.size, attr.mode, attr.uid), (3, Some(0o640), Some(5)));
        assert_eq!(open.read(0..10).await.expect("read"), &b"con"[..]);
        open.sync(false).await.expect("sync");
    }
}
