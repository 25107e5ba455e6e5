//! Notifications to the kernel: dropping and filling its caches. They leave from threads of their own, because each may wait for a lock
//! (of a page, of a directory) that a request holds which is being answered; sent from a request thread they would wait for themselves.
//! One thread sends them in order. When it is held up, another takes over the queue. The queue is bounded; a full one refuses instead of blocking.
//!
//! Layouts: `include/uapi/linux/fuse.h`, `enum fuse_notify_code` and `struct fuse_notify_*_out`.

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use bytes::Bytes;
use efc_common::{Error, Kind, Result};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use super::conn::{Conn, is_gone};
use super::encode::{Fixed, Sink};
use super::init::InitRecord;

const INVAL_INODE: i32 = 2;
const INVAL_ENTRY: i32 = 3;
const STORE: i32 = 4;
const DELETE: i32 = 6;
const INC_EPOCH: i32 = 8;

/// `FUSE_EXPIRE_ONLY`, a flag of INVAL_ENTRY.
const EXPIRE_ONLY: u32 = 1;

/// Minor protocol version with INC_EPOCH.
pub(super) const EPOCH_ABI_MINOR: u32 = 44;

/// Threads at most: all but one are held up.
const THREADS_MAX: usize = 32;
/// A notification that is not sent after this time has another thread started, if all are held up.
const HELD_UP_AFTER: Duration = Duration::from_millis(50);
/// How long a dropped notifier waits for the notification it is sending.
const STOP_PATIENCE: Duration = Duration::from_secs(1);

/// Something the kernel should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notification {
    /// Attributes of a node are old, and its pages from `offset` on, `length` bytes (0: to the end; negative `offset`: attributes only).
    InvalidateInode {
        /// Node.
        node: u64,
        /// First byte; negative leaves the pages alone.
        offset: i64,
        /// Bytes; 0 is "to the end".
        length: i64,
    },
    /// A name is no longer true. Takes the lock of the directory: it waits for every change under way there.
    InvalidateEntry {
        /// Directory.
        parent: u64,
        /// Name in it.
        name: Bytes,
    },
    /// A name is to be looked up again at its next use; what is open or mounted below it stays. Needs [`Notifier::has_expire_only`].
    ExpireEntry {
        /// Directory.
        parent: u64,
        /// Name in it.
        name: Bytes,
    },
    /// A name was removed elsewhere: like [`Notification::InvalidateEntry`], and watchers (inotify) are told.
    Delete {
        /// Directory.
        parent: u64,
        /// Node the name stood for.
        child: u64,
        /// Name.
        name: Bytes,
    },
    /// Bytes for the page cache of a node, before anybody reads them. The end of the file must come with the last bytes.
    Store {
        /// Node.
        node: u64,
        /// Where in the file; whole pages.
        offset: u64,
        /// The bytes.
        data: Bytes,
    },
    /// All names of the mount are to be looked up again. Takes no directory lock. Needs [`Notifier::has_epoch`].
    IncrementEpoch,
}

/// What the kernel made of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// Done.
    Done,
    /// It does not hold that node or name (any more): nothing to do.
    Unknown,
}

struct Job {
    notification: Notification,
    done: Option<oneshot::Sender<Result<Told>>>,
}

/// What the threads share.
struct Sending {
    conn: Arc<Conn>,
    queue: Mutex<mpsc::Receiver<Job>>,
    threads: AtomicUsize,
    /// Threads that wait for something to send.
    free: AtomicUsize,
}

/// Sends notifications of one mount. Cheap to use from anywhere; see the module's text for why it never runs inline.
pub struct Notifier {
    queue: Option<mpsc::Sender<Job>>,
    sending: Arc<Sending>,
    /// Each thread has a copy.
    running: Option<std::sync::mpsc::Sender<()>>,
    stopped: Mutex<std::sync::mpsc::Receiver<()>>,
    epoch: bool,
    expire_only: bool,
}

impl Notifier {
    /// Starts the thread.
    pub(super) fn start(conn: Arc<Conn>, record: &InitRecord, queue: usize) -> Result<Notifier> {
        let (tx, rx) = mpsc::channel(queue.max(1));
        let (running, stopped) = std::sync::mpsc::channel();
        let notifier = Notifier {
            queue: Some(tx),
            sending: Arc::new(Sending { conn, queue: Mutex::new(rx), threads: 0.into(), free: 0.into() }),
            running: Some(running),
            stopped: Mutex::new(stopped),
            epoch: record.abi_minor >= EPOCH_ABI_MINOR,
            expire_only: record.granted & fuser::InitFlags::FUSE_HAS_EXPIRE_ONLY.bits() != 0,
        };
        notifier.start_thread()?;
        Ok(notifier)
    }

    fn start_thread(&self) -> Result<()> {
        let (sending, running) = (self.sending.clone(), self.running.clone());
        sending.threads.fetch_add(1, Relaxed);
        let started = std::thread::Builder::new().name("efc-fuse-notify".into()).spawn(move || {
            sending.run();
            sending.threads.fetch_sub(1, Relaxed);
            drop(running);
        });
        started.map(drop).map_err(|e| {
            self.sending.threads.fetch_sub(1, Relaxed);
            Error::from(e).with("thread", "efc-fuse-notify")
        })
    }

    /// Somebody waits: has the queue a thread that is not held up?
    fn relieve(&self) {
        if self.sending.free.load(SeqCst) == 0
            && self.sending.threads.load(Relaxed) < THREADS_MAX
            && let Err(e) = self.start_thread()
        {
            tracing::warn!(error = %e, "notifications to the kernel wait for one that is held up");
        }
    }

    /// Does this kernel know [`Notification::IncrementEpoch`] (Linux 6.16)?
    pub fn has_epoch(&self) -> bool {
        self.epoch
    }

    /// Does this kernel know [`Notification::ExpireEntry`] (Linux 6.2)?
    pub fn has_expire_only(&self) -> bool {
        self.expire_only
    }

    /// Does the kernel hold this node? Asked by a STORE of no bytes, which waits for nothing and changes nothing: it finds the node, or says ENOENT (Linux
    /// `fs/fuse/dev.c`, `fuse_notify_store`). Newer kernels refuse it with EINVAL for a node that is no regular file, after having found it.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] when the connection is gone, else what the kernel said.
    pub fn holds(&self, node: u64) -> Result<bool> {
        let nothing = Notification::Store { node, offset: 0, data: Bytes::new() };
        match send(&self.sending.conn, &nothing) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(true),
            sent => Ok(told(&nothing, sent)? == Told::Done),
        }
    }

    /// Queues a notification and does not wait. A failure later on is logged.
    ///
    /// # Errors
    /// [`Kind::Exhausted`] when the queue is full, [`Kind::Unsupported`] when this kernel does not know it.
    pub fn try_tell(&self, notification: Notification) -> Result<()> {
        self.check(&notification)?;
        let full = |_| Error::new(Kind::Exhausted, "the queue of kernel notifications is full");
        self.queue()?.try_send(Job { notification, done: None }).map_err(full)
    }

    /// Queues a notification and waits until the kernel has acted on it, at most `deadline` in all.
    ///
    /// # Errors
    /// [`Kind::Timeout`], [`Kind::Unsupported`] when this kernel does not know it, [`Kind::Unavailable`] when the connection is gone, else what
    /// the kernel said.
    pub async fn tell(&self, notification: Notification, deadline: Duration) -> Result<Told> {
        self.check(&notification)?;
        let (done, outcome) = oneshot::channel();
        let queue = self.queue()?;
        let told = async {
            let gone = || Error::new(Kind::Unavailable, "the kernel notifier has stopped");
            queue.send(Job { notification, done: Some(done) }).await.map_err(|_| gone())?;
            outcome.await.map_err(|_| gone())?
        };
        let late = |_| Error::new(Kind::Timeout, "the kernel did not act on a notification in time");
        let relieved = async {
            let mut told = std::pin::pin!(told);
            loop {
                match tokio::time::timeout(HELD_UP_AFTER, &mut told).await {
                    Ok(told) => return told,
                    Err(_) => self.relieve(),
                }
            }
        };
        tokio::time::timeout(deadline, relieved).await.map_err(late)?
    }

    fn queue(&self) -> Result<&mpsc::Sender<Job>> {
        self.queue.as_ref().ok_or_else(|| Error::new(Kind::Unavailable, "the kernel notifier has stopped"))
    }

    fn check(&self, notification: &Notification) -> Result<()> {
        let missing = match notification {
            Notification::IncrementEpoch if !self.epoch => "INC_EPOCH (Linux 6.16)",
            Notification::ExpireEntry { .. } if !self.expire_only => "EXPIRE_ONLY (Linux 6.2)",
            _ => return Ok(()),
        };
        Err(Error::new(Kind::Unsupported, format!("this kernel has no {missing}")))
    }
}

impl Drop for Notifier {
    fn drop(&mut self) {
        (self.queue, self.running) = (None, None);
        // Nobody sends anything: it ends with the last thread.
        if self.stopped.lock().recv_timeout(STOP_PATIENCE) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!("a kernel notification still waits for a lock while its session is closed");
        }
    }
}

impl Sending {
    /// Sends what is asked for, until nothing is any more, or another thread has taken over while this one was held up.
    fn run(&self) {
        loop {
            self.free.fetch_add(1, SeqCst);
            let job = self.queue.lock().blocking_recv();
            self.free.fetch_sub(1, SeqCst);
            let Some(job) = job else { return };
            self.carry_out(job);
            if self.free.load(SeqCst) > 0 {
                return;
            }
        }
    }

    fn carry_out(&self, job: Job) {
        let told = told(&job.notification, send(&self.conn, &job.notification));
        match job.done {
            // A waiter that gave up has reported its timeout itself.
            Some(done) => drop(done.send(told)),
            None => match told {
                Err(e) if !e.is(Kind::Unavailable) => tracing::error!(error = %e, "the kernel refused a notification"),
                _ => {}
            },
        }
    }
}

fn told(n: &Notification, sent: io::Result<()>) -> Result<Told> {
    match sent {
        Ok(()) => Ok(Told::Done),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(Told::Unknown),
        Err(e) if is_gone(&e) => Err(Error::new(Kind::Unavailable, "the FUSE connection is gone").caused_by(e)),
        Err(e) => Err(Error::from(e).with("notification", kind_name(n))),
    }
}

fn kind_name(n: &Notification) -> &'static str {
    match n {
        Notification::InvalidateInode { .. } => "inval_inode",
        Notification::InvalidateEntry { .. } => "inval_entry",
        Notification::ExpireEntry { .. } => "expire_entry",
        Notification::Delete { .. } => "delete",
        Notification::Store { .. } => "store",
        Notification::IncrementEpoch => "inc_epoch",
    }
}

fn send(conn: &Conn, n: &Notification) -> io::Result<()> {
    let mut head = Fixed::new();
    let length = |b: &Bytes| u32::try_from(b.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG));
    let (code, tail): (i32, &[IoSlice<'_>]) = match n {
        Notification::InvalidateInode { node, offset, length } => {
            head.u64(*node);
            head.put(&offset.to_ne_bytes());
            head.put(&length.to_ne_bytes());
            (INVAL_INODE, &[])
        }
        Notification::InvalidateEntry { parent, name } | Notification::ExpireEntry { parent, name } => {
            head.u64(*parent);
            head.u32(length(name)?);
            head.u32(if matches!(n, Notification::ExpireEntry { .. }) { EXPIRE_ONLY } else { 0 });
            (INVAL_ENTRY, &[IoSlice::new(name), IoSlice::new(b"\0")])
        }
        Notification::Delete { parent, child, name } => {
            head.u64(*parent);
            head.u64(*child);
            head.u32(length(name)?);
            head.u32(0);
            (DELETE, &[IoSlice::new(name), IoSlice::new(b"\0")])
        }
        Notification::Store { node, offset, data } => {
            head.u64(*node);
            head.u64(*offset);
            head.u32(length(data)?);
            head.u32(0);
            (STORE, &[IoSlice::new(data)])
        }
        Notification::IncrementEpoch => (INC_EPOCH, &[]),
    };
    let mut payload = Vec::with_capacity(3);
    if !head.as_slice().is_empty() {
        payload.push(IoSlice::new(head.as_slice()));
    }
    payload.extend_from_slice(tail);
    conn.notify(code, &payload)
}
