//! One mount of a source for all who want it on a node (`-o subpath=DIR`): the mount itself is at a place of EFC's own, and what its users see are bind mounts of directories in it.
//! So a thousand pods that mount a thousand directories of a dataset have one client process, one cache of names and one session with the masters.
//!
//! ```text
//! /run/efc/shared/KEY/lock    held (flock) by who mounts, binds or ends it
//! /run/efc/shared/KEY/mnt     the mount
//! ```
//! KEY is made of the source and its options: other options, another mount. The holder of a shared mount ends it when nothing of it has been bound for a moment.

use crate::control::{self, Request};
use crate::kernel::Mount;
use efc_common::id::{ContentId, hex};
use efc_common::{Error, Kind, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// A shared mount of which nothing is bound is kept so long: the next one may come at once.
const LINGER: Duration = Duration::from_secs(1);
/// For a shared mount to say that it serves.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// Where a shared mount is.
#[derive(Debug, Clone)]
pub struct Place {
    dir: PathBuf,
}

impl Place {
    /// Of a source with these options.
    pub fn of(source: &str, options: &[String]) -> Place {
        let parts: Vec<&[u8]> =
            [source].into_iter().chain(options.iter().map(String::as_str)).map(str::as_bytes).collect();
        Place { dir: control::run_dir().join("shared").join(hex(&ContentId::of(&parts).0[..8])) }
    }

    /// That of a mountpoint, if it is a shared mount's own.
    pub fn at(mountpoint: &Path) -> Option<Place> {
        let dir = mountpoint.parent()?;
        let is_ours = mountpoint.file_name()? == "mnt" && dir.parent()? == control::run_dir().join("shared");
        is_ours.then(|| Place { dir: dir.into() })
    }

    /// The mount itself.
    pub fn mountpoint(&self) -> PathBuf {
        self.dir.join("mnt")
    }

    /// None: somebody else has it, and it was not to be waited for.
    fn lock(&self, how: FlockArg) -> Result<Option<Flock<File>>> {
        let path = self.dir.join("lock");
        let file = File::create(&path).map_err(|e| Error::from(e).with("path", path.display()))?;
        match Flock::lock(file, how) {
            Ok(held) => Ok(Some(held)),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, e)) => Err(Error::from(std::io::Error::from(e)).with("path", path.display())),
        }
    }

    /// Makes sure that the mount is there, by `start` if it is not, and binds `sub` of it at `mountpoint`.
    ///
    /// # Errors
    /// What `start` said; [`Kind::NotFound`] for a directory that the source does not have; [`Kind::PermissionDenied`] for who may not mount.
    pub fn bind(&self, sub: &str, mountpoint: &Path, start: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let root = self.mountpoint();
        std::fs::create_dir_all(&self.dir).map_err(|e| Error::from(e).with("path", self.dir.display()))?;
        // Until it is bound nobody else may end it.
        let _held = self.lock(FlockArg::LockExclusive)?;
        match Mount::existing(&root) {
            Ok(_) if serves(&root) => {}
            Ok(dead) => {
                dead.unmount(true)?;
                start(&root)?;
            }
            Err(_) => {
                std::fs::create_dir_all(&root).map_err(|e| Error::from(e).with("path", root.display()))?;
                start(&root)?;
            }
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let top = openat(CWD, &root, flags, Mode::empty()).map_err(std::io::Error::from)?;
        let below = Path::new(".").join(sub.trim_start_matches('/'));
        let no_way_out = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let dir = openat2(&top, &below, flags, Mode::empty(), no_way_out).map_err(|e| no_directory(sub, e.into()))?;
        let from = format!("/proc/self/fd/{}", dir.as_raw_fd());
        mount(Some(from.as_str()), mountpoint, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(|e| match e {
            Errno::EPERM => Error::new(Kind::PermissionDenied, "subpath= binds directories, which needs root"),
            e => Error::from(std::io::Error::from(e)).with("mountpoint", mountpoint.display()),
        })
    }
}

fn no_directory(sub: &str, e: std::io::Error) -> Error {
    // It leads out of the source, or is a file or nothing.
    let none = [libc::EXDEV, libc::ENOENT, libc::ENOTDIR, libc::ELOOP].map(Some).contains(&e.raw_os_error());
    if none {
        return Error::new(Kind::NotFound, format!("subpath={sub}: the source has no such directory")).caused_by(e);
    }
    Error::from(e).with("subpath", sub)
}

/// Does somebody serve the mount?
fn serves(mountpoint: &Path) -> bool {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return false };
    runtime.block_on(async {
        let ask = control::ask(mountpoint, &Request::Status, |_| {});
        tokio::time::timeout(ANSWER_DEADLINE, ask).await.is_ok_and(|answer| answer.is_ok())
    })
}

/// Looks whether anything of a shared mount is bound, for its holder.
pub struct Users {
    place: Place,
    /// The kernel says by it that something was mounted or unmounted.
    mounts: File,
    /// Since when nothing is bound.
    idle: Option<Instant>,
    /// Nobody may begin to use it any more; held until this process ends.
    last: Option<Flock<File>>,
}

impl Users {
    /// Of the shared mount at `mountpoint`, if it is one.
    ///
    /// # Errors
    /// When the kernel does not tell what is mounted.
    pub fn of(mountpoint: &Path) -> Result<Option<Users>> {
        let Some(place) = Place::at(mountpoint) else { return Ok(None) };
        let mounts = File::open("/proc/self/mountinfo")?;
        Ok(Some(Users { place, mounts, idle: Some(Instant::now()), last: None }))
    }

    /// To be called again and again: ends the mount when nobody uses it any more.
    pub fn look(&mut self) {
        if self.last.is_some() {
            return;
        }
        let mut changed = [PollFd::new(self.mounts.as_fd(), PollFlags::POLLPRI)];
        let is_other = poll(&mut changed, PollTimeout::ZERO).is_ok_and(|n| n > 0);
        if !is_other && self.idle.is_none_or(|t| t.elapsed() < LINGER) {
            return;
        }
        match self.end_if_unused() {
            Ok(()) => {}
            Err(e) => warn!(error = %e, "a shared mount that nobody uses stays"),
        }
    }

    fn end_if_unused(&mut self) -> Result<()> {
        let Ok(mount) = Mount::existing(&self.place.mountpoint()) else { return Ok(()) };
        if mount.places()?.len() > 1 {
            self.idle = None;
            return Ok(());
        }
        if self.idle.get_or_insert_with(Instant::now).elapsed() < LINGER {
            return Ok(());
        }
        // Anew, whatever comes of it.
        self.idle = Some(Instant::now());
        let Some(held) = self.place.lock(FlockArg::LockExclusiveNonblock)? else { return Ok(()) };
        if mount.places()?.len() == 1 {
            info!("nothing of the shared mount is bound any more");
            mount.unmount(false)?;
            self.last = Some(held);
        }
        Ok(())
    }
}
