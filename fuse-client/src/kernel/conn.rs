//! One FUSE connection as this process holds it: the fd, the phase it is in, and how many requests are taken and not yet answered.
//!
//! Phases: *serving* → *draining* (taken requests are still answered, new ones are left in peace) → *closed* (nothing is written any more; a
//! successor has the mount, or nobody has); back to serving only when the threads could not be stopped. A request that is neither answered nor refused stays in the kernel's
//! processing list, which is exactly what RESEND hands to the next process.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::metrics::Metrics;
use super::outcomes::Outcomes;

const SERVING: u8 = 0;
const DRAINING: u8 = 1;
const CLOSED: u8 = 2;

/// Size of `fuse_out_header`, bytes.
const HEADER_BYTES: usize = 16;

/// Slices handed to one `writev` without an allocation; a 1 MiB read of 256 KiB segments needs five.
const SLICES_INLINE: usize = 18;

pub(super) struct Conn {
    fd: OwnedFd,
    phase: AtomicU8,
    in_flight: AtomicU64,
    idle_lock: Mutex<()>,
    idle: Condvar,
    pub(super) metrics: Metrics,
    /// Where the file system writes down what must not be done twice.
    pub(super) outcomes: Option<Arc<Outcomes>>,
}

impl Conn {
    pub(super) fn new(fd: OwnedFd, outcomes: Option<Arc<Outcomes>>) -> Conn {
        Conn {
            fd,
            phase: AtomicU8::new(SERVING),
            in_flight: AtomicU64::new(0),
            idle_lock: Mutex::new(()),
            idle: Condvar::new(),
            metrics: Metrics::new(),
            outcomes,
        }
    }

    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// May a request that was just read be executed?
    pub(super) fn serving(&self) -> bool {
        self.phase.load(SeqCst) == SERVING
    }

    /// Is nothing answered any more?
    pub(super) fn is_closed(&self) -> bool {
        self.phase.load(SeqCst) == CLOSED
    }

    /// From now on new requests are not executed.
    pub(super) fn start_draining(&self) {
        self.phase.fetch_max(DRAINING, SeqCst);
    }

    /// From now on nothing is answered.
    pub(super) fn close(&self) {
        self.phase.fetch_max(CLOSED, SeqCst);
    }

    /// The threads could not be stopped.
    pub(super) fn serve_again(&self) {
        self.phase.store(SERVING, SeqCst);
    }

    pub(super) fn in_flight(&self) -> u64 {
        self.in_flight.load(SeqCst)
    }

    pub(super) fn taken(&self) {
        self.in_flight.fetch_add(1, SeqCst);
    }

    pub(super) fn done(&self) {
        // Ordered against `start_draining`: either this sees the new phase and wakes the waiter, or the waiter sees the new count.
        if self.in_flight.fetch_sub(1, SeqCst) == 1 && !self.serving() {
            let _guard = self.idle_lock.lock();
            self.idle.notify_all();
        }
    }

    /// Waits until no taken request is unanswered; false when `patience` ran out first. Call after [`Conn::start_draining`].
    pub(super) fn wait_idle(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut guard = self.idle_lock.lock();
        while self.in_flight() != 0 {
            if self.idle.wait_until(&mut guard, deadline).timed_out() {
                return self.in_flight() == 0;
            }
        }
        true
    }

    /// Answers request `unique`: `errno` (0 = success) and the payload. Does nothing once closed.
    ///
    /// # Errors
    /// Those of writev(2) that a file system can do something about. A request or connection that is gone (interrupted, aborted, unmounted)
    /// is success: there is nobody left to tell.
    pub(super) fn answer(&self, unique: u64, errno: i32, payload: &[IoSlice<'_>]) -> io::Result<()> {
        if self.is_closed() {
            return Ok(());
        }
        match self.write_message(-errno, unique, payload) {
            Err(e) if is_gone(&e) => Ok(()),
            other => other,
        }
    }

    /// Sends a notification: `code` is a `fuse_notify_code`.
    ///
    /// # Errors
    /// Those of writev(2); ENOENT when the kernel does not know the node; ENOTCONN once closed.
    pub(super) fn notify(&self, code: i32, payload: &[IoSlice<'_>]) -> io::Result<()> {
        if self.is_closed() {
            return Err(io::Error::from_raw_os_error(libc::ENOTCONN));
        }
        self.write_message(code, 0, payload)
    }

    /// One message to the kernel: `fuse_out_header { len, error, unique }` and the payload, in one atomic write.
    fn write_message(&self, error: i32, unique: u64, payload: &[IoSlice<'_>]) -> io::Result<()> {
        let len = HEADER_BYTES + payload.iter().map(|s| s.len()).sum::<usize>();
        let len = u32::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
        let mut header = [0u8; HEADER_BYTES];
        header[..4].copy_from_slice(&len.to_ne_bytes());
        header[4..8].copy_from_slice(&error.to_ne_bytes());
        header[8..].copy_from_slice(&unique.to_ne_bytes());
        if payload.len() < SLICES_INLINE {
            let mut slices = [IoSlice::new(&[]); SLICES_INLINE];
            slices[0] = IoSlice::new(&header);
            slices[1..=payload.len()].copy_from_slice(payload);
            writev(&self.fd, &slices[..=payload.len()])
        } else if payload.len() < libc::UIO_MAXIOV as usize {
            let mut slices = Vec::with_capacity(payload.len() + 1);
            slices.push(IoSlice::new(&header));
            slices.extend_from_slice(payload);
            writev(&self.fd, &slices)
        } else {
            // More pieces than one writev takes; only a caller that cuts its data finer than 1 KiB gets here.
            let mut whole = header.to_vec();
            payload.iter().for_each(|s| whole.extend_from_slice(s));
            writev(&self.fd, &[IoSlice::new(&whole)])
        }
    }
}

fn writev(fd: impl AsFd, slices: &[IoSlice<'_>]) -> io::Result<()> {
    // The device takes a message whole or not at all.
    Ok(nix::sys::uio::writev(fd, slices).map(|_| ())?)
}

/// The request (ENOENT) or the whole connection is no more.
pub(super) fn is_gone(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENOTCONN | libc::ECONNABORTED | libc::EPERM))
}
