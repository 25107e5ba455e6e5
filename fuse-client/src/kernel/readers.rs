//! The threads that read requests: starting `fuser`'s loop, and stopping it at a request boundary, which `fuser` has no call for.
//!
//! How to stop. The loop reads from an fd number that `fuser` owns. We put another file under that number with `dup3`: one that cannot be
//! read. From then on a thread that comes back for the next request gets EBADF and ends; a thread that is blocked in `read` on the
//! old file is woken by a signal, gets EINTR, reads again, and ends as well. No request is lost on the way: a read that was interrupted took
//! none, and one that took a request executes it (or leaves it alone, when the session drains). Answers do not go through this
//! fd, so requests under way are not disturbed.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use efc_common::{Error, Kind, Result};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use super::adapter::Adapter;

/// Ignored by default and used by nobody else here, so a stray one does no harm.
const WAKE: Signal = Signal::SIGURG;

/// First part of the names `fuser` gives its threads.
const THREAD_NAME: &[u8] = b"fuser-";

/// A running loop.
pub(super) struct Readers {
    /// The number `fuser` reads from.
    number: RawFd,
    /// Keeps `fuser` from closing that number, so that it cannot come to mean another file while we may still replace it.
    _keep: fuser::Notifier,
    thread: Option<JoinHandle<()>>,
}

impl Readers {
    /// Starts the threads of a session whose handshake is done. `ended` is called on the session's thread with `fuser`'s verdict, also after a
    /// stop.
    ///
    /// # Errors
    /// When a thread cannot be made.
    pub(super) fn start(
        session: fuser::Session<Adapter>,
        ended: impl FnOnce(io::Result<()>) + Send + 'static,
    ) -> Result<Readers> {
        install_wake_handler()?;
        let (number, keep) = (session.as_fd().as_raw_fd(), session.notifier());
        let thread = std::thread::Builder::new()
            .name("efc-fuse-session".into())
            .spawn(move || ended(session.run()))
            .map_err(|e| Error::from(e).with("thread", "efc-fuse-session"))?;
        Ok(Readers { number, _keep: keep, thread: Some(thread) })
    }

    /// Lets no thread take another request, and waits until all have ended; false when `patience` ran out, because some operation blocks
    /// its thread. Such a thread ends after that operation.
    ///
    /// # Errors
    /// When the fd cannot be replaced; then nothing has changed.
    pub(super) fn stop(&mut self, patience: Duration) -> Result<bool> {
        let Some(thread) = self.thread.take() else { return Ok(true) };
        if let Err(e) = put_under(&unreadable()?, self.number) {
            self.thread = Some(thread);
            return Err(e);
        }
        let deadline = Instant::now() + patience;
        let mut pause = Duration::from_micros(100);
        while !thread.is_finished() {
            if Instant::now() >= deadline {
                return Ok(false);
            }
            wake_threads();
            // Waiting for threads that are on their way out; `JoinHandle` has no timed join.
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(5));
        }
        let panicked = thread.join().is_err();
        if panicked {
            tracing::error!("the FUSE session thread panicked");
        }
        Ok(true)
    }
}

/// A file that can be written (what is written vanishes) and not read.
fn unreadable() -> Result<OwnedFd> {
    let null = std::fs::OpenOptions::new().write(true).open("/dev/null");
    null.map(OwnedFd::from).map_err(|e| Error::from(e).with("path", "/dev/null"))
}

/// Puts `file` under the fd number `number`.
pub(super) fn put_under(file: &OwnedFd, number: RawFd) -> Result<()> {
    // SAFETY: both are open fds; the one that is replaced belongs to a `fuser` session that we keep alive, and all its users
    // expect the file under it to change (see the module's text).
    if unsafe { libc::dup3(file.as_raw_fd(), number, libc::O_CLOEXEC) } < 0 {
        return Err(Error::new(Kind::Io, "the session's fd cannot be replaced").caused_by(io::Error::last_os_error()));
    }
    Ok(())
}

/// A handler that does nothing: only a signal with a handler interrupts a blocked read.
fn install_wake_handler() -> Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    static INSTALLED: OnceLock<std::result::Result<(), nix::Error>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler touches nothing, so it may run at any point of any thread.
        unsafe { sigaction(WAKE, &action) }.map(drop)
    });
    installed.map_err(|e| Error::new(Kind::Io, "no signal handler for waking threads").caused_by(io::Error::from(e)))
}

/// Signals every request thread of this process; those of other sessions read again and notice nothing.
fn wake_threads() {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return };
    for task in tasks.flatten() {
        let is_reader = std::fs::read(task.path().join("comm")).is_ok_and(|name| name.starts_with(THREAD_NAME));
        let tid = task.file_name().to_str().and_then(|t| t.parse::<libc::pid_t>().ok());
        if let (true, Some(tid)) = (is_reader, tid) {
            // SAFETY: plain system call with integers; a thread that is gone is an error we do not need.
            unsafe { libc::syscall(libc::SYS_tgkill, std::process::id() as libc::pid_t, tid, WAKE as libc::c_int) };
        }
    }
}
