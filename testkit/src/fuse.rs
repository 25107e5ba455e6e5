//! Mountpoints that cannot hang a test run.
//!
//! A FUSE mount whose daemon does not answer blocks everybody who touches it, even `ps`. [`FuseGuard`] detaches the mount and aborts its
//! connection when dropped, and [`FuseGuard::with_timeout`] runs whatever touches the mount on a thread of its own with a deadline. Nothing here ever
//! touches the mount itself: the connection's number is read from `/proc/self/mountinfo`.

use anyhow::{Context, Result, anyhow};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

const CONNECTIONS: &str = "/sys/fs/fuse/connections";
/// After an abort blocked calls return within this time.
const ABORT_GRACE: Duration = Duration::from_secs(5);

/// Owns a mountpoint; make it before anything is mounted there.
#[derive(Debug)]
pub struct FuseGuard {
    mountpoint: PathBuf,
}

impl FuseGuard {
    /// Guards a mountpoint, which is made if it does not exist.
    ///
    /// # Errors
    /// When it cannot be made or resolved.
    pub fn new(mountpoint: &Path) -> Result<FuseGuard> {
        fs::create_dir_all(mountpoint).with_context(|| format!("make {}", mountpoint.display()))?;
        let mountpoint = mountpoint.canonicalize().with_context(|| mountpoint.display().to_string())?;
        Ok(FuseGuard { mountpoint })
    }

    /// The mountpoint.
    pub fn path(&self) -> &Path {
        &self.mountpoint
    }

    /// Is anything mounted there?
    pub fn is_mounted(&self) -> bool {
        !self.connections().is_empty()
    }

    /// Numbers of the FUSE connections mounted here, the topmost last.
    pub fn connections(&self) -> Vec<u64> {
        let text = fs::read("/proc/self/mountinfo").unwrap_or_default();
        text.split(|b| *b == b'\n').filter_map(|line| connection_of(line, &self.mountpoint)).collect()
    }

    /// Aborts the connections: everybody who is blocked on the mount gets an error, the daemon sees its device closed.
    ///
    /// # Errors
    /// When the control file system cannot be mounted or written.
    pub fn abort(&self) -> Result<()> {
        self.connections().into_iter().try_for_each(abort)
    }

    /// Runs `f`, which may touch the mount, and waits at most `limit` for it.
    ///
    /// # Errors
    /// When time ran out; the connection is aborted then, so that `f` ends. A panic of `f` goes on in the caller.
    pub fn with_timeout<T: Send + 'static>(
        &self,
        limit: Duration,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        let (tx, rx) = mpsc::channel();
        let thread = std::thread::Builder::new().name("on-the-mount".into()).spawn(move || {
            let result = f();
            // The receiver is gone when the time ran out before.
            let _ = tx.send(result);
        })?;
        match rx.recv_timeout(limit) {
            Ok(result) => Ok(result),
            Err(mpsc::RecvTimeoutError::Disconnected) => match thread.join() {
                Err(panic) => std::panic::resume_unwind(panic),
                Ok(()) => Err(anyhow!("the thread on {} ended without a result", self.mountpoint.display())),
            },
            Err(mpsc::RecvTimeoutError::Timeout) => {
                self.abort()?;
                let ended = match rx.recv_timeout(ABORT_GRACE) {
                    Err(mpsc::RecvTimeoutError::Timeout) => "and did not end after an abort either",
                    _ => "and ended after the connection was aborted",
                };
                Err(anyhow!("work on {} took longer than {limit:?} {ended}", self.mountpoint.display()))
            }
        }
    }
}

impl Drop for FuseGuard {
    fn drop(&mut self) {
        // Mounts may be stacked, and foreign ones may refuse: so it is bounded.
        for _ in 0..8 {
            let connections = self.connections();
            if connections.is_empty() {
                return;
            }
            let detached = umount2(&self.mountpoint, MntFlags::MNT_DETACH);
            for connection in connections {
                // A healthy daemon may have ended its connection by now.
                let _ = abort(connection);
            }
            if detached.is_err() {
                return;
            }
        }
    }
}

/// The FUSE connection that a line of mountinfo tells of, if it is mounted at `mountpoint`. The number of a connection is the minor number
/// of its device.
fn connection_of(line: &[u8], mountpoint: &Path) -> Option<u64> {
    let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    let kind = fields.iter().position(|f| *f == b"-").and_then(|i| fields.get(i + 1))?;
    if !(*kind == b"fuse" || kind.starts_with(b"fuse."))
        || unescape(fields.get(4)?) != mountpoint.as_os_str().as_bytes()
    {
        return None;
    }
    std::str::from_utf8(fields.get(2)?).ok()?.split_once(':')?.1.parse().ok()
}

/// Blanks, tabs, line feeds and backslashes are written as octal escapes.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut i = 0;
    while i < field.len() {
        let octal = field
            .get(i + 1..i + 4)
            .and_then(|d| std::str::from_utf8(d).ok())
            .and_then(|d| u8::from_str_radix(d, 8).ok());
        match octal {
            Some(byte) if field[i] == b'\\' => {
                out.push(byte);
                i += 4;
            }
            _ => {
                out.push(field[i]);
                i += 1;
            }
        }
    }
    out
}

fn abort(connection: u64) -> Result<()> {
    let control = Path::new(CONNECTIONS);
    let has_entries = fs::read_dir(control).is_ok_and(|mut d| d.next().is_some());
    if !has_entries {
        mount(Some("none"), control, Some("fusectl"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mount the FUSE control file system at {CONNECTIONS}"))?;
    }
    match fs::write(control.join(connection.to_string()).join("abort"), "1") {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.with_context(|| format!("abort FUSE connection {connection}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::time::Instant;

    /// A mount whose daemon never answers, not even INIT.
    fn dead_mount(guard: &FuseGuard) -> fs::File {
        let device = fs::File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        mount(Some("efc-testkit"), guard.path(), Some("fuse"), MsFlags::empty(), Some(options.as_str())).unwrap();
        device
    }

    #[test]
    fn a_hung_mount_is_aborted_and_detached() {
        let dir = crate::scratch("fuse").unwrap();
        let guard = FuseGuard::new(&dir.path().join("m n")).unwrap();
        assert!(!guard.is_mounted());
        assert_eq!(guard.with_timeout(Duration::from_secs(5), || 7).unwrap(), 7);
        let _device = dead_mount(&guard);
        assert_eq!(guard.connections().len(), 1);
        let path = guard.path().to_path_buf();
        let start = Instant::now();
        let e = guard.with_timeout(Duration::from_millis(200), move || fs::read_dir(path).is_ok()).unwrap_err();
        assert!(e.to_string().contains("ended after the connection was aborted"), "{e}");
        assert!(start.elapsed() < ABORT_GRACE);
        drop(guard);
        let again = FuseGuard::new(&dir.path().join("m n")).unwrap();
        assert!(!again.is_mounted());
    }

    #[test]
    fn an_aborted_mount_is_detached_too() {
        let dir = crate::scratch("fuse").unwrap();
        let guard = FuseGuard::new(&dir.path().join("m")).unwrap();
        let path = guard.path().to_path_buf();
        let _device = dead_mount(&guard);
        guard.abort().unwrap();
        assert!(guard.is_mounted());
        drop(guard);
        assert!(!FuseGuard { mountpoint: path }.is_mounted());
    }

    #[test]
    #[should_panic(expected = "on purpose")]
    fn a_panic_on_the_mount_reaches_the_test() {
        let dir = crate::scratch("fuse").unwrap();
        let guard = FuseGuard::new(dir.path()).unwrap();
        let _ = guard.with_timeout(Duration::from_secs(5), || panic!("on purpose"));
    }

    #[test]
    fn mountinfo_lines() {
        let line = br"36 35 0:87 / /mnt/a\040b rw,nosuid - fuse.efc efc rw,user_id=0";
        assert_eq!(connection_of(line, Path::new("/mnt/a b")), Some(87));
        assert_eq!(connection_of(line, Path::new("/mnt/a")), None);
        assert_eq!(connection_of(b"36 35 0:87 / /mnt rw - tmpfs tmpfs rw", Path::new("/mnt")), None);
        assert_eq!(connection_of(b"36 35 0:87 / /mnt rw - fusectl none rw", Path::new("/mnt")), None);
        assert_eq!(connection_of(b"", Path::new("/mnt")), None);
    }
}
