//! Mounting and unmounting by ourselves: /dev/fuse, mount(2), umount2(2), and the connection directory of the kernel for mounts that hang.
//!
//! Nothing here touches a file *on* a FUSE mount, because that would hang where the daemon does: what is mounted where is read from
//! `/proc/self/mountinfo`, and paths are resolved up to the mountpoint's parent only. [`Mount`] does not unmount when it is dropped: after a
//! hand-over the mount belongs to the successor.

use std::ffi::OsString;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use efc_common::{Error, Kind, Result};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::FileSystem;
use super::session::{Session, SessionConfig};

const DEVICE: &str = "/dev/fuse";
const CONNECTIONS: &str = "/sys/fs/fuse/connections";
const MAX_PAGES_LIMIT: &str = "/proc/sys/fs/fuse/max_pages_limit";

/// What to mount, where and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountConfig {
    /// Directory to mount on.
    pub mountpoint: PathBuf,
    /// First column of `mount` and `df`: names the source for people.
    pub source: String,
    /// No writes.
    pub read_only: bool,
    /// Users other than the mounting one may enter.
    pub allow_other: bool,
    /// The kernel checks modes and owners.
    pub default_permissions: bool,
    /// Largest READ, bytes. `None`: what the session's request size allows.
    pub max_read_bytes: Option<u32>,
    /// Raise `fs.fuse.max_pages_limit` (of the whole machine) to this many pages first, if it is lower.
    pub raise_max_pages_limit: Option<u32>,
}

/// A mount of ours in this mount namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    mountpoint: PathBuf,
    device: (u32, u32),
}

/// How an unmount went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmounted {
    /// Gone.
    Clean,
    /// Out of the tree, but something is still open on it; it ends with the last user.
    Detached,
    /// It was not mounted any more.
    NotMounted,
}

/// Mounts and serves. On failure nothing is left mounted. `keep` gets the connection before anything is mounted with it.
///
/// # Errors
/// Those of [`Mount::new`], `keep` and [`Session::start`].
pub fn serve(
    fs: Arc<dyn FileSystem>,
    mount: &MountConfig,
    session: &SessionConfig,
    keep: impl FnOnce(BorrowedFd<'_>) -> Result<()>,
) -> Result<(Session, Mount)> {
    let (mounted, fd) = Mount::new(mount, keep)?;
    match Session::start(fs, fd, session) {
        Ok(running) => {
            mounted.apply_read_ahead(session);
            Ok((running, mounted))
        }
        Err(e) => {
            if let Err(left) = mounted.unmount(true) {
                tracing::error!(mountpoint = %mounted.mountpoint.display(), error = %left, "a mount that never worked is left");
            }
            Err(e)
        }
    }
}

/// Can something be mounted there? Gives the mountpoint's absolute path. The device is looked at too, so that a command can refuse at once.
///
/// # Errors
/// As [`Mount::new`].
pub fn check(mountpoint: &Path) -> Result<PathBuf> {
    let mountpoint = resolve(mountpoint)?;
    let shown = mountpoint.display();
    if let Some(there) = find(&mountpoint)? {
        let text =
            format!("{shown} is already a mount point ({} from {}); unmount it first", there.fs_type, there.source);
        return Err(Error::new(Kind::Busy, text));
    }
    match fs::metadata(&mountpoint) {
        Ok(m) if m.is_dir() => {}
        Ok(_) => return Err(Error::new(Kind::NotADirectory, format!("mountpoint {shown} is not a directory"))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::new(Kind::NotFound, format!("mountpoint {shown} does not exist; create the directory")));
        }
        Err(e) => return Err(Error::from(e).with("mountpoint", shown)),
    }
    open_device()?;
    Ok(mountpoint)
}

impl Mount {
    /// Mounts, when `keep` has got the connection. Requests queue in the returned fd until a session serves it; dropping the fd kills the mount but leaves it in the tree.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::NotADirectory`] for the mountpoint; [`Kind::Busy`] when something is mounted on it;
    /// [`Kind::Unsupported`] without /dev/fuse or FUSE in the kernel; [`Kind::PermissionDenied`] without the right to mount;
    /// [`Kind::Invalid`] for a name the kernel cannot take.
    pub fn new(config: &MountConfig, keep: impl FnOnce(BorrowedFd<'_>) -> Result<()>) -> Result<(Mount, OwnedFd)> {
        let mountpoint = check(&config.mountpoint)?;
        let shown = mountpoint.display();
        if config.source.is_empty() || config.source.contains('\0') {
            return Err(Error::new(Kind::Invalid, "the source name of a mount must be neither empty nor contain NUL"));
        }
        if let Some(pages) = config.raise_max_pages_limit {
            raise_max_pages_limit(pages);
        }
        let fd = open_device()?;
        keep(fd.as_fd())?;
        let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        flags.set(MsFlags::MS_RDONLY, config.read_only);
        let options = options(config, fd.as_raw_fd());
        mount(Some(config.source.as_str()), &mountpoint, Some("fuse.efc"), flags, Some(options.as_str()))
            .map_err(|e| mount_error(e, &mountpoint))?;
        match find(&mountpoint)? {
            Some(there) => Ok((Mount { mountpoint, device: there.device }, fd)),
            None => Err(Error::new(Kind::Io, format!("{shown} was mounted and is not in /proc/self/mountinfo"))),
        }
    }

    /// The FUSE mount at `mountpoint`, for a process that adopts it.
    ///
    /// # Errors
    /// [`Kind::NotFound`] when no FUSE file system is mounted there.
    pub fn existing(mountpoint: &Path) -> Result<Mount> {
        let mountpoint = resolve(mountpoint)?;
        match find(&mountpoint)? {
            Some(there) if there.fs_type.starts_with("fuse") => Ok(Mount { mountpoint, device: there.device }),
            _ => Err(Error::new(Kind::NotFound, format!("no FUSE mount at {}", mountpoint.display()))),
        }
    }

    /// The mount that was made at `mountpoint` with this device number ([`Mount::device`]). It may be out of the tree, with files open on it, and another in its place.
    ///
    /// # Errors
    /// When the mountpoint cannot be resolved.
    pub fn made(mountpoint: &Path, device: (u32, u32)) -> Result<Mount> {
        Ok(Mount { mountpoint: resolve(mountpoint)?, device })
    }

    /// Does its root answer? Asked by a thread of its own ([`own_no_files`]).
    ///
    /// # Errors
    /// What it said; [`Kind::Timeout`] when it said nothing within `patience`.
    pub fn answers(&self, patience: Duration) -> Result<()> {
        let (answer, answered) = std::sync::mpsc::channel();
        let path = self.mountpoint.clone();
        let ask = move || {
            let said = own_no_files().and_then(|()| fs::metadata(path));
            // Nobody waits for it any more.
            let _ = answer.send(said.map(drop));
        };
        std::thread::Builder::new().name("efc-check".into()).spawn(ask)?;
        match answered.recv_timeout(patience) {
            Ok(said) => said.map_err(|e| Error::from(e).with("mountpoint", self.mountpoint.display())),
            Err(_) => Err(Error::new(Kind::Timeout, format!("{} did not answer", self.mountpoint.display()))),
        }
    }

    /// Its device number (`st_dev`: major, minor).
    pub fn device(&self) -> (u32, u32) {
        self.device
    }

    /// Where it is, absolute.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Number of its directory under `/sys/fs/fuse/connections`: the minor number of `st_dev`.
    pub fn connection(&self) -> u32 {
        self.device.1
    }

    /// Is it still mounted at its place?
    ///
    /// # Errors
    /// When `/proc/self/mountinfo` cannot be read.
    pub fn is_mounted(&self) -> Result<bool> {
        Ok(find(&self.mountpoint)?.is_some_and(|m| m.device == self.device))
    }

    /// All places of this mount namespace where its file system is mounted, bind mounts included: each with the directory of it that is to be seen there.
    ///
    /// # Errors
    /// When `/proc/self/mountinfo` cannot be read.
    pub fn places(&self) -> Result<Vec<(PathBuf, PathBuf)>> {
        let all = mount_infos()?.into_iter().filter(|m| m.device == self.device);
        Ok(all.map(|m| (m.mountpoint, m.root)).collect())
    }

    /// Unmounts. With files open on it: refused, or, when `detach`, taken out of the tree at once and ended with the last user.
    ///
    /// # Errors
    /// [`Kind::Busy`] when in use and not to be detached; [`Kind::PermissionDenied`] without the right to unmount.
    pub fn unmount(&self, detach: bool) -> Result<Unmounted> {
        // Never somebody else's mount that came in our place.
        if !self.is_mounted()? {
            return Ok(Unmounted::NotMounted);
        }
        let shown = self.mountpoint.display();
        match umount2(&self.mountpoint, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => return Ok(Unmounted::Clean),
            Err(Errno::EBUSY) if detach => {}
            Err(Errno::EBUSY) => {
                return Err(Error::new(
                    Kind::Busy,
                    format!("{shown} is in use; close what is open on it, or detach it"),
                ));
            }
            Err(Errno::EINVAL) => return Ok(Unmounted::NotMounted),
            Err(e) => return Err(Error::from(std::io::Error::from(e)).with("mountpoint", shown)),
        }
        umount2(&self.mountpoint, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
            .map_err(|e| Error::from(std::io::Error::from(e)).with("mountpoint", shown))?;
        Ok(Unmounted::Detached)
    }

    /// Kills the connection: every request, waiting or to come, fails, also where no daemon is left to answer. The mount stays in the tree
    /// until it is unmounted.
    ///
    /// # Errors
    /// When the connection directory cannot be reached or written.
    pub fn abort(&self) -> Result<()> {
        abort_connection(self.connection())
    }

    /// Raises the mount's read-ahead to what `session` asks for; see [`raise_read_ahead`].
    pub fn apply_read_ahead(&self, session: &SessionConfig) {
        if let Some(kib) = session.bdi_read_ahead_kb {
            raise_read_ahead(self.device, kib);
        }
    }
}

/// Gives the calling thread a table of descriptors of its own, and nothing in it: for one that asks a mount something. It waits in the kernel for the answer, also when its process was killed,
/// and may not keep the connection open by that, which ends with the last who has it.
///
/// # Errors
/// What the system said.
pub fn own_no_files() -> std::io::Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_FILES)?;
    // SAFETY: of the thread's own table; whatever the process has open stays so for its other threads, and this one uses no descriptor from here on.
    match unsafe { libc::close_range(0, libc::c_uint::MAX, 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Aborts a connection by its number; mounts the control file system for it if nobody has.
///
/// # Errors
/// When the connection directory cannot be reached or written. A connection that is gone already is success.
pub fn abort_connection(connection: u32) -> Result<()> {
    let base = Path::new(CONNECTIONS);
    if find(base)?.is_none() {
        mount(None::<&str>, base, Some("fusectl"), MsFlags::empty(), None::<&str>)
            .map_err(|e| Error::from(std::io::Error::from(e)).with("path", CONNECTIONS))?;
    }
    match fs::write(base.join(connection.to_string()).join("abort"), b"1") {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::from(e).with("connection", connection)),
        _ => Ok(()),
    }
}

fn options(config: &MountConfig, fd: i32) -> String {
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    let mut text = format!("fd={fd},rootmode={:o},user_id={uid},group_id={gid}", libc::S_IFDIR);
    if config.allow_other {
        text.push_str(",allow_other");
    }
    if config.default_permissions {
        text.push_str(",default_permissions");
    }
    if let Some(bytes) = config.max_read_bytes {
        text.push_str(&format!(",max_read={bytes}"));
    }
    text
}

/// Opens the FUSE device, close-on-exec.
pub(super) fn open_device() -> Result<OwnedFd> {
    match fs::OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(file) => Ok(file.into()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ENODEV) => {
            let text = "no /dev/fuse: load the module (modprobe fuse), or pass the device into the container";
            Err(Error::new(Kind::Unsupported, text).caused_by(e))
        }
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            let text = "/dev/fuse may not be opened: in a container, allow the device (char 10:229)";
            Err(Error::new(Kind::PermissionDenied, text).caused_by(e))
        }
        Err(e) => Err(Error::from(e).with("path", DEVICE)),
    }
}

fn mount_error(e: Errno, mountpoint: &Path) -> Error {
    let shown = mountpoint.display();
    let (kind, text) = match e {
        Errno::EPERM | Errno::EACCES => {
            (Kind::PermissionDenied, format!("mounting on {shown} needs root (CAP_SYS_ADMIN)"))
        }
        Errno::EBUSY => (Kind::Busy, format!("{shown} is busy")),
        Errno::ENODEV => (Kind::Unsupported, "this kernel has no FUSE; load the module (modprobe fuse)".to_string()),
        Errno::ENOENT => (Kind::NotFound, format!("mountpoint {shown} does not exist")),
        Errno::ENOTDIR => (Kind::NotADirectory, format!("mountpoint {shown} is not a directory")),
        _ => (Kind::Io, format!("mounting on {shown} failed")),
    };
    Error::new(kind, text).caused_by(std::io::Error::from(e))
}

/// Absolute path with no symbolic link in it, without touching the last component when that is a directory: it may be a mount that hangs.
fn resolve(path: &Path) -> Result<PathBuf> {
    let missing = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::NotFound => {
            Error::new(Kind::NotFound, format!("mountpoint {} does not exist; create the directory", path.display()))
        }
        _ => Error::from(e).with("mountpoint", path.display()),
    };
    let absolute = std::path::absolute(path).map_err(missing)?;
    let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name()) else {
        return Err(Error::new(Kind::Invalid, "the root directory cannot be a mountpoint"));
    };
    let direct = fs::canonicalize(parent).map_err(missing)?.join(name);
    // `readlink` does not ask the file system below a mountpoint: a directory inode has no link to read.
    match fs::read_link(&direct) {
        Ok(_) => fs::canonicalize(&direct).map_err(missing),
        Err(_) => Ok(direct),
    }
}

/// One line of `/proc/self/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct MountInfo {
    device: (u32, u32),
    root: PathBuf,
    mountpoint: PathBuf,
    fs_type: String,
    source: String,
}

/// The topmost mount at exactly this path.
fn find(mountpoint: &Path) -> Result<Option<MountInfo>> {
    // Later lines cover earlier ones.
    Ok(mount_infos()?.into_iter().rev().find(|m| m.mountpoint == mountpoint))
}

fn mount_infos() -> Result<Vec<MountInfo>> {
    let text = fs::read("/proc/self/mountinfo").map_err(|e| Error::from(e).with("path", "/proc/self/mountinfo"))?;
    Ok(text.split(|b| *b == b'\n').filter_map(parse_line).collect())
}

/// `36 35 98:0 /root /mount/point rw,noatime master:1 - ext3 /dev/root rw,errors=continue`, see proc_pid_mountinfo(5).
fn parse_line(line: &[u8]) -> Option<MountInfo> {
    let mut fields = line.split(|b| *b == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let root = unescape(fields.next()?);
    let mountpoint = unescape(fields.next()?);
    let mut rest = fields.skip_while(|f| *f != b"-").skip(1);
    Some(MountInfo {
        device: (major.parse().ok()?, minor.parse().ok()?),
        root: PathBuf::from(OsString::from_vec(root)),
        mountpoint: PathBuf::from(OsString::from_vec(mountpoint)),
        fs_type: String::from_utf8_lossy(rest.next()?).into_owned(),
        source: String::from_utf8_lossy(&unescape(rest.next()?)).into_owned(),
    })
}

/// Blanks, tabs, newlines and backslashes stand there as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&b, tail)) = rest.split_first() {
        let octal = (b == b'\\').then(|| tail.get(..3)).flatten().and_then(|d| std::str::from_utf8(d).ok());
        match octal.and_then(|d| u8::from_str_radix(d, 8).ok()) {
            Some(code) => {
                out.push(code);
                rest = &tail[3..];
            }
            None => {
                out.push(b);
                rest = tail;
            }
        }
    }
    out
}

/// Raises the kernel's read-ahead of a device to `kib`; never lowers it. Not being allowed to is logged: reads work, large ones slower.
fn raise_read_ahead(device: (u32, u32), kib: u32) {
    raise(Path::new(&format!("/sys/class/bdi/{}:{}/read_ahead_kb", device.0, device.1)), kib);
}

fn raise_max_pages_limit(pages: u32) {
    // The kernel's counter has 16 bits.
    raise(Path::new(MAX_PAGES_LIMIT), pages.min(65_535));
}

/// The system setting that bounds request sizes, pages; `None` on kernels without it (fixed at 256).
pub(super) fn max_pages_limit() -> Option<u32> {
    read_number(Path::new(MAX_PAGES_LIMIT))
}

fn read_number(path: &Path) -> Option<u32> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn raise(path: &Path, value: u32) {
    let path_bytes = String::from_utf8_lossy(path.as_os_str().as_bytes()).into_owned();
    match read_number(path) {
        Some(now) if now >= value => {}
        Some(now) => match fs::write(path, value.to_string()) {
            Ok(()) => tracing::info!(setting = path_bytes, from = now, to = value, "raised"),
            Err(e) => {
                tracing::info!(setting = path_bytes, now, wanted = value, error = %e, "may not be raised; large reads are slower")
            }
        },
        None => tracing::info!(setting = path_bytes, wanted = value, "this system has no such setting"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_lines_are_read_with_their_escapes() {
        let line = b"36 35 0:52 / /mnt/a\\040b\\134c rw,nosuid shared:7 master:1 - fuse.efc oss://b\\040x ro,user_id=0";
        let m = parse_line(line).expect("parses");
        assert_eq!(m.device, (0, 52));
        assert_eq!(m.mountpoint, Path::new("/mnt/a b\\c"));
        assert_eq!((m.fs_type.as_str(), m.source.as_str()), ("fuse.efc", "oss://b x"));
        assert_eq!(parse_line(b""), None);
        assert_eq!(parse_line(b"36 35 0:x / /mnt rw - a b c"), None);
    }

    #[test]
    fn a_setting_is_raised_and_never_lowered() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("setting");
        fs::write(&path, "256\n").expect("write");
        raise(&path, 128);
        assert_eq!(read_number(&path), Some(256));
        raise(&path, 1024);
        assert_eq!(read_number(&path), Some(1024));
        raise(&dir.path().join("absent"), 1);
        assert!(!dir.path().join("absent").exists());
    }
}
