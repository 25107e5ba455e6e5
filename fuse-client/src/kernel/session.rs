//! A FUSE session: one connection, a set of threads that read its requests, one file system that answers them.
//!
//! All threads share one fd and it is never cloned: requests taken through a cloned fd that dies with its process fail, those taken through
//! one that somebody else still holds are resent. Life of a session: [`Session::start`] (new mount) or [`super::adopt`] (running mount) →
//! serving → [`Session::drain`] → the successor serves.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use efc_common::{Error, Kind, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::FileSystem;
use super::adapter::Adapter;
use super::conn::Conn;
use super::init::{InitRecord, InitRequest};
use super::notify::Notifier;
use super::readers::Readers;
use super::types::Negotiated;

/// How long the kernel may take to send INIT after the mount, milliseconds.
const INIT_DEADLINE_MS: u16 = 10_000;

/// How a session talks to the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionConfig {
    /// Threads that take requests; they hand work on and do not wait for it, so a few are enough.
    pub threads: usize,
    /// Largest READ and WRITE, bytes; the kernel caps it at `fs.fuse.max_pages_limit` pages (1 MiB by default).
    pub max_request_bytes: u32,
    /// Read-ahead asked for at INIT, bytes; the kernel offers 128 KiB. More goes through [`SessionConfig::bdi_read_ahead_kb`].
    pub max_readahead_bytes: u32,
    /// Read-ahead of the mount, KiB, set through `/sys/class/bdi` after the mount. `None` leaves it alone; it is never lowered.
    pub bdi_read_ahead_kb: Option<u32>,
    /// Background requests (read-ahead) in flight.
    pub max_background: u16,
    /// From how many on the kernel calls the mount congested; `None`: three quarters of `max_background`.
    pub congestion_threshold: Option<u16>,
    /// Attributes come with the names of every directory page.
    pub readdirplus: bool,
    /// The file system answers OPEN with ENOSYS (read-only mounts).
    pub no_open: bool,
    /// The file system answers OPENDIR with ENOSYS.
    pub no_opendir: bool,
    /// The file system answers for advisory locks; else the kernel does, for the processes of this node.
    pub locks: bool,
    /// RESEND is asked for. Without it, as on kernels before Linux 6.9, a successor ends what was taken and not answered.
    pub resend: bool,
    /// Notifications waiting for the kernel before new ones are refused.
    pub notify_queue: usize,
}

impl Default for SessionConfig {
    fn default() -> Self {
        SessionConfig {
            threads: std::thread::available_parallelism().map_or(4, usize::from).clamp(2, 16),
            max_request_bytes: 1 << 20,
            max_readahead_bytes: 1 << 20,
            bdi_read_ahead_kb: Some(1024),
            max_background: 256,
            congestion_threshold: None,
            readdirplus: true,
            no_open: true,
            no_opendir: false,
            locks: false,
            resend: true,
            notify_queue: 1024,
        }
    }
}

/// Why a session ended by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The mount is gone: unmounted or aborted, here or by somebody else.
    Unmounted,
    /// The request threads failed.
    Failed(String),
}

/// What [`Session::drain`] left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drained {
    /// Requests that were taken and not answered in time; the successor gets them by RESEND.
    pub left: u64,
    /// How long it took.
    pub took: Duration,
}

/// A served connection. Dropping it stops its threads and closes its fd: if nobody else holds the connection, the kernel aborts it.
pub struct Session {
    conn: Arc<Conn>,
    record: InitRecord,
    adopted: bool,
    readers: Mutex<Option<Readers>>,
    stopping: Arc<AtomicBool>,
    ended: watch::Sender<Option<Ended>>,
    notifier: Notifier,
}

impl Session {
    /// Serves a new mount: `fd` is the /dev/fuse fd it was mounted with. Waits for INIT.
    ///
    /// # Errors
    /// [`Kind::Timeout`] when no INIT comes, [`Kind::Unsupported`] for a protocol nobody speaks, else what the system said.
    pub fn start(fs: Arc<dyn FileSystem>, fd: OwnedFd, config: &SessionConfig) -> Result<Session> {
        wait_readable(fd.as_fd())?;
        let for_fuser = fd.try_clone().map_err(Error::from)?;
        let conn = Arc::new(Conn::new(fd, fs.outcomes()));
        let (session, record) = handshake(&fs, &conn, config, for_fuser)?;
        Self::serve(fs, conn, config, record, false, session)
    }

    /// The common end of starting and adopting: `fuser` has had its handshake.
    pub(super) fn serve(
        fs: Arc<dyn FileSystem>,
        conn: Arc<Conn>,
        config: &SessionConfig,
        record: InitRecord,
        adopted: bool,
        session: fuser::Session<Adapter>,
    ) -> Result<Session> {
        if let Some(outcomes) = conn.outcomes.as_ref().filter(|_| !record.has_resend()) {
            outcomes.note_all();
        }
        let notifier = Notifier::start(conn.clone(), &record, config.notify_queue)?;
        fs.init(&record.negotiated(adopted));
        let this = Session {
            conn,
            record,
            adopted,
            readers: Mutex::new(None),
            stopping: Arc::new(AtomicBool::new(false)),
            ended: watch::Sender::new(None),
            notifier,
        };
        this.start_readers(session)?;
        Ok(this)
    }

    fn start_readers(&self, session: fuser::Session<Adapter>) -> Result<()> {
        let (stopping, ended, conn) = (self.stopping.clone(), self.ended.clone(), self.conn.clone());
        let readers = Readers::start(session, move |verdict| {
            if stopping.load(SeqCst) {
                return;
            }
            conn.close();
            let why = match verdict {
                Ok(()) => Ended::Unmounted,
                Err(e) => Ended::Failed(e.to_string()),
            };
            ended.send_replace(Some(why));
        })?;
        *self.readers.lock() = Some(readers);
        Ok(())
    }

    /// What kernel and session agreed on.
    pub fn negotiated(&self) -> Negotiated {
        self.record.negotiated(self.adopted)
    }

    /// The agreement as a successor needs it.
    pub fn init_record(&self) -> &InitRecord {
        &self.record
    }

    /// The connection, to be passed to a successor or a holder. Keep it close-on-exec.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.conn.fd().as_fd()
    }

    /// Requests taken and not yet answered.
    pub fn in_flight(&self) -> u64 {
        self.conn.in_flight()
    }

    /// Kernel notifications of this mount.
    pub fn notifier(&self) -> &Notifier {
        &self.notifier
    }

    /// Turns to `Some` when the session ends by itself (unmounted, aborted, failed), never by a drain or a drop.
    pub fn ended(&self) -> watch::Receiver<Option<Ended>> {
        self.ended.subscribe()
    }

    /// Stops at a request boundary: no request is begun any more, those under way are answered. Waits at most `patience` for both, then
    /// silences what is left. Afterwards nothing of this process answers the kernel, so that state can be saved and a successor may begin.
    /// Blocks the calling thread.
    ///
    /// # Errors
    /// When the threads cannot be stopped at all; then the session serves on.
    pub fn drain(&self, patience: Duration) -> Result<Drained> {
        let begun = Instant::now();
        self.conn.start_draining();
        if let Err(e) = self.stop_readers(patience) {
            self.conn.serve_again();
            self.stopping.store(false, SeqCst);
            return Err(e);
        }
        let rest = patience.saturating_sub(begun.elapsed());
        self.conn.wait_idle(rest);
        self.conn.close();
        Ok(Drained { left: self.conn.in_flight(), took: begun.elapsed() })
    }

    fn stop_readers(&self, patience: Duration) -> Result<bool> {
        self.stopping.store(true, SeqCst);
        let mut slot = self.readers.lock();
        let Some(mut readers) = slot.take() else { return Ok(true) };
        match readers.stop(patience) {
            Ok(all) => Ok(all),
            Err(e) => {
                *slot = Some(readers);
                Err(e)
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.conn.start_draining();
        match self.stop_readers(Duration::from_secs(2)) {
            Ok(true) => {}
            Ok(false) => tracing::warn!("a FUSE request thread is still busy while its session is closed"),
            Err(e) => tracing::error!(error = %e, "FUSE request threads could not be stopped"),
        }
        self.conn.close();
    }
}

/// Lets `fuser` answer the INIT request that waits on `fd`.
pub(super) fn handshake(
    fs: &Arc<dyn FileSystem>,
    conn: &Arc<Conn>,
    config: &SessionConfig,
    fd: OwnedFd,
) -> Result<(fuser::Session<Adapter>, InitRecord)> {
    let agreed = Arc::new(Mutex::new(None));
    let adapter =
        Adapter { fs: fs.clone(), conn: conn.clone(), want: InitRequest::new(config), agreed: agreed.clone() };
    let mut threads = fuser::Config::default();
    // Never `clone_fd`, see the module's text. Who may enter is the kernel's decision (`allow_other`), not ours a second time.
    threads.n_threads = Some(config.threads.max(1));
    threads.acl = fuser::SessionACL::All;
    let session = fuser::Session::from_fd(adapter, fd, threads.acl, threads)
        .map_err(|e| Error::new(Kind::Unsupported, "the FUSE handshake failed").caused_by(e))?;
    let record = agreed.lock().take();
    let record = record.ok_or_else(|| Error::new(Kind::Io, "the FUSE handshake ended without an agreement"))?;
    Ok((session, record))
}

/// `fuser` reads INIT without a deadline, so this waits for it first.
fn wait_readable(fd: BorrowedFd<'_>) -> Result<()> {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    loop {
        match poll(&mut fds, PollTimeout::from(INIT_DEADLINE_MS)) {
            Ok(0) => return Err(Error::new(Kind::Timeout, "the kernel sent no INIT request on the FUSE fd")),
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(io::Error::from(e).into()),
        }
    }
}
