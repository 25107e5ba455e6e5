//! One data-plane connection of a client to a worker: handshake, sources attached to slots, many requests in flight.
//!
//! Called by [`crate::peers`]; whoever wants a single worker (an admin command) may use it directly. What must stay true:
//! - A request is written at once from the caller's task when the socket takes it; only what the socket refuses waits for the
//!   flusher. One read costs one system call out, and the reply wakes its asker directly from the reader task.
//! - A bulk is read from the socket into the buffer its user gets: no copy in between.
//! - The peer may send a request no more bytes and frames than it was asked for; then, and on any broken frame, the connection is
//!   closed and every waiter gets the reason.
//! - A worker on this host shares its memory tier with its greeting; then its answers may name places in it instead of carrying bytes.
//! - Dropping [`Answers`] cancels: what still arrives for it is read and thrown away.

use crate::shared::SharedMemory;
use arc_swap::ArcSwapOption;
use bytes::{Buf, Bytes, BytesMut};
use efc_common::block::GRANULE_BYTES;
use efc_common::error::Context;
use efc_common::id::SourceId;
use efc_common::policy::CachePolicy;
use efc_common::source::{SourceSpec, StaticKeys};
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use efc_proto::data;
use efc_proto::frame::{self, BULK_BYTES_MAX, Frame, Message, PROTOCOL_VERSION};
use efc_proto::status::from_fail;
use parking_lot::Mutex;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use std::collections::HashMap;
use std::fmt;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::{TcpStream, UnixStream, tcp, unix};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, timeout, timeout_at};

/// Bytes of requests that may wait for the socket.
const OUT_BYTES_MAX: usize = 4 << 20;
/// What the reader takes from the socket at once when it does not know a length yet: headers and metas of small frames. A
/// bulk is read past it.
const STAGE_BYTES: usize = 4096;
/// Requests at once on a connection whose worker does not say.
const REQUESTS_DEFAULT: u32 = 16;
/// Send buffer asked for on unix sockets, which do not tune themselves.
const UNIX_BUFFER_BYTES: usize = 2 << 20;

/// Where a worker listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// `host:port`.
    Tcp(String),
    /// A socket in the file system of this host.
    Unix(PathBuf),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Tcp(a) => f.write_str(a),
            Endpoint::Unix(p) => write!(f, "{}", p.display()),
        }
    }
}

/// Who we are in the handshake.
#[derive(Debug, Clone, Default)]
pub struct Identity {
    /// Cluster id; empty if not known yet.
    pub cluster: String,
    /// `host:pid`.
    pub peer: String,
    /// Ring epoch we have.
    pub epoch: u64,
}

enum WriteHalf {
    Tcp(tcp::OwnedWriteHalf),
    Unix(unix::OwnedWriteHalf),
}

impl WriteHalf {
    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            WriteHalf::Tcp(w) => w.try_write(bytes),
            WriteHalf::Unix(w) => w.try_write(bytes),
        }
    }

    async fn writable(&self) -> io::Result<()> {
        match self {
            WriteHalf::Tcp(w) => w.writable().await,
            WriteHalf::Unix(w) => w.writable().await,
        }
    }
}

/// A request whose answers are awaited.
struct Waiter {
    answers: mpsc::UnboundedSender<Result<Frame>>,
    bulk_left: usize,
    frames_left: usize,
}

struct Inner {
    endpoint: Endpoint,
    out: Mutex<BytesMut>,
    flush: Notify,
    half: WriteHalf,
    waiters: Mutex<HashMap<u64, Waiter>>,
    broken: OnceLock<Error>,
    /// The worker's memory tier, if it is on this host and shares it, until the connection breaks: who holds it keeps a dead worker's
    /// memory alive.
    shared: ArcSwapOption<SharedMemory>,
    next: AtomicU64,
    started: Instant,
    heard_ms: AtomicU64,
}

/// An open connection. Dropping it closes it; requests under way fail.
pub struct Connection {
    inner: Arc<Inner>,
    hello: data::Hello,
    room: Arc<Semaphore>,
    tasks: TaskGroup,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("worker", &self.hello.peer).field("endpoint", &self.inner.endpoint).finish()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.tasks.cancel();
    }
}

impl Connection {
    /// Connects and shakes hands, within `limit`.
    ///
    /// # Errors
    /// [`Kind::Timeout`] or [`Kind::Unavailable`] when nobody answers, [`Kind::Unsupported`] for another protocol version, and what
    /// the worker says when it refuses us (another cluster: [`Kind::PermissionDenied`]).
    pub async fn open(endpoint: &Endpoint, me: &Identity, limit: Duration) -> Result<Arc<Connection>> {
        let opened = timeout(limit, Self::open_unbounded(endpoint, me)).await;
        opened
            .unwrap_or_else(|_| Err(Error::new(Kind::Timeout, "worker does not answer")))
            .map_err(|e| e.with("worker", endpoint))
    }

    async fn open_unbounded(endpoint: &Endpoint, me: &Identity) -> Result<Arc<Connection>> {
        match endpoint {
            Endpoint::Tcp(addr) => {
                let mut s = TcpStream::connect(addr).await.context("connect to worker")?;
                s.set_nodelay(true).context("set TCP_NODELAY")?;
                s.write_all(&greeting(me, false)?).await.context("greet worker")?;
                let (r, w) = s.into_split();
                Self::start(endpoint, r, WriteHalf::Tcp(w), None).await
            }
            Endpoint::Unix(path) => {
                let mut s = UnixStream::connect(path).await.context("connect to worker")?;
                // Best effort: a smaller buffer only costs wake-ups.
                let _ = socket2::SockRef::from(&s).set_recv_buffer_size(UNIX_BUFFER_BYTES);
                s.write_all(&greeting(me, true)?).await.context("greet worker")?;
                let (first, shared) = first_bytes(&s).await?;
                let (r, w) = s.into_split();
                // What was read for the descriptors' sake comes first.
                Self::start(endpoint, AsyncReadExt::chain(io::Cursor::new(first), r), WriteHalf::Unix(w), shared).await
            }
        }
    }

    /// Takes over a socket on which our greeting was sent.
    async fn start<R>(
        endpoint: &Endpoint,
        reader: R,
        half: WriteHalf,
        shared: Option<SharedMemory>,
    ) -> Result<Arc<Connection>>
    where
        R: AsyncRead + Unpin + Send + 'static,
    {
        let inner = Arc::new(Inner {
            endpoint: endpoint.clone(),
            out: Mutex::new(BytesMut::new()),
            flush: Notify::new(),
            half,
            waiters: Mutex::default(),
            broken: OnceLock::new(),
            shared: ArcSwapOption::empty(),
            next: AtomicU64::new(1),
            started: Instant::now(),
            heard_ms: AtomicU64::new(0),
        });
        let mut reader = BufReader::with_capacity(STAGE_BYTES, reader);
        let tasks = TaskGroup::new();
        let flusher = inner.clone();
        tasks.spawn(async move { flusher.flush_loop().await });
        // If the handshake fails the group's tasks end with `inner`, which they then hold alone.
        let stop = tasks.token().drop_guard();
        let answer = frame::read_frame(&mut reader).await?;
        let hello = match answer.map(|f| f.message) {
            Some(Message::Hello(h)) if h.protocol == PROTOCOL_VERSION => h,
            Some(Message::Hello(h)) => {
                return Err(Error::new(
                    Kind::Unsupported,
                    "worker speaks another protocol version; upgrade the older side",
                )
                .with("ours", PROTOCOL_VERSION)
                .with("theirs", h.protocol));
            }
            Some(Message::Fail(f)) => return Err(from_fail(&f)),
            Some(m) => return Err(Error::new(Kind::Corrupt, "worker did not greet").with("message", m.name())),
            None => return Err(Error::new(Kind::Unavailable, "worker closed the connection in the handshake")),
        };
        let requests = if hello.requests == 0 { REQUESTS_DEFAULT } else { hello.requests };
        let room = Arc::new(Semaphore::new(requests as usize));
        let read_side = inner.clone();
        tasks.spawn(async move {
            let why = match read_side.read_loop(&mut reader).await {
                Ok(()) => Error::new(Kind::Unavailable, "worker closed the connection"),
                Err(e) => e,
            };
            read_side.fail(why);
        });
        stop.disarm();
        inner.share(shared.filter(|_| hello.share));
        Ok(Arc::new(Connection { inner, hello, room, tasks }))
    }

    /// Id of the worker, as it says itself.
    pub fn worker(&self) -> &str {
        &self.hello.peer
    }

    /// The cluster the worker belongs to; empty if to none.
    pub fn cluster(&self) -> &str {
        &self.hello.cluster
    }

    /// Where it leads.
    pub fn endpoint(&self) -> &Endpoint {
        &self.inner.endpoint
    }

    /// The worker's memory tier, if it shares it, while the connection works. For one read, not for keeping.
    pub fn shared(&self) -> Option<Arc<SharedMemory>> {
        self.inner.shared.load_full()
    }

    /// Sends a message that is not answered.
    ///
    /// # Errors
    /// Why the connection is broken, or that too much waits for it.
    pub fn tell(&self, message: impl Into<Message>) -> Result<()> {
        self.inner.write(frame::encode_head(0, 0, &message.into(), 0)?)
    }

    /// Why it is of no more use; `None` while it works.
    pub fn broken(&self) -> Option<Error> {
        self.inner.broken.get().map(Error::share)
    }

    /// Closes it with a reason; every waiter gets it.
    pub fn close(&self, why: Error) {
        self.inner.fail(why);
        self.tasks.cancel();
    }

    /// How long the worker has been silent on this connection.
    pub fn silent_for(&self) -> Duration {
        let heard = Duration::from_millis(self.inner.heard_ms.load(Relaxed));
        self.inner.started.elapsed().saturating_sub(heard)
    }

    /// Sends a request and returns its answers to come. Waits while the worker has as many requests of this connection as it
    /// takes. `bulk_max`: bytes the answers may carry in all.
    ///
    /// # Errors
    /// [`Kind::Timeout`] when there is no room within `limit`, else why the connection is broken.
    pub async fn ask(&self, message: Message, limit: Duration, bulk_max: usize) -> Result<Answers> {
        let deadline = Instant::now() + limit;
        let room = match self.room.clone().try_acquire_owned() {
            Ok(p) => p,
            Err(_) => match timeout_at(deadline, self.room.clone().acquire_owned()).await {
                Ok(Ok(p)) => p,
                _ => {
                    return Err(
                        Error::new(Kind::Timeout, "worker takes no more requests").with("worker", self.worker())
                    );
                }
            },
        };
        self.start_request(&message, deadline, bulk_max, Some(room))
    }

    fn start_request(
        &self,
        message: &Message,
        deadline: Instant,
        bulk_max: usize,
        room: Option<OwnedSemaphorePermit>,
    ) -> Result<Answers> {
        let request = self.inner.next.fetch_add(1, Relaxed);
        let left_ms = deadline.saturating_duration_since(Instant::now()).as_millis().clamp(1, u32::MAX as u128);
        let head = frame::encode_head(request, left_ms as u32, message, 0)?;
        let items = if let Message::ReadMany(m) = message { m.items.len() } else { 1 };
        let (tx, rx) = mpsc::unbounded_channel();
        // The channel is bounded by these two numbers, so the reader task never waits for one slow asker.
        let frames_left = 2 * items + bulk_max / GRANULE_BYTES as usize + 2;
        self.inner.waiters.lock().insert(request, Waiter { answers: tx, bulk_left: bulk_max, frames_left });
        let answers = Answers { inner: self.inner.clone(), request, answers: rx, deadline, _room: room };
        // Checked after the waiter is entered: either `fail` sees the waiter or we see that it was called.
        match self.inner.broken.get() {
            Some(e) => Err(e.share()),
            None => self.inner.write(head).map(|()| answers),
        }
    }

    /// Names a source for the rest of the connection under `slot`; what is read of it is kept as `cache` says.
    ///
    /// # Errors
    /// What the worker has against the source, or why the connection is broken.
    pub async fn attach(
        &self,
        slot: u32,
        spec: &SourceSpec,
        keys: Option<&StaticKeys>,
        cache: CachePolicy,
        limit: Duration,
    ) -> Result<SourceId> {
        let json =
            |r: serde_json::Result<String>| r.map_err(|e| Error::new(Kind::Invalid, "encode source").caused_by(e));
        let spec_json = json(serde_json::to_string(spec))?;
        let keys_json = keys.map_or(Ok(String::new()), |k| json(serde_json::to_string(k)))?;
        let ttl_ms = cache.ttl.map_or(0, |t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX).max(1));
        let mut answers =
            self.ask(data::Attach { slot, spec_json, keys_json, ttl_ms, pin: cache.pin }.into(), limit, 0).await?;
        match answers.next().await?.message {
            Message::Attached(a) => match <[u8; 16]>::try_from(a.source_id.as_ref()) {
                Ok(id) => Ok(SourceId(id)),
                Err(_) => Err(Error::new(Kind::Corrupt, "worker sent a source id of the wrong length")),
            },
            Message::Fail(f) => Err(from_fail(&f)),
            m => Err(unexpected(&Some(m))),
        }
    }

    /// Is the worker alive? It answers even while it waits for an origin.
    ///
    /// # Errors
    /// [`Kind::Timeout`] after `limit`, else why the connection is broken.
    pub async fn ping(&self, me: &Identity, limit: Duration) -> Result<()> {
        let mut answers = self.start_request(&hello(me, false).into(), Instant::now() + limit, 0, None)?;
        match answers.next().await?.message {
            Message::Hello(_) => Ok(()),
            Message::Fail(f) => Err(from_fail(&f)),
            m => Err(unexpected(&Some(m))),
        }
    }
}

fn hello(me: &Identity, share: bool) -> data::Hello {
    let Identity { cluster, peer, epoch } = me.clone();
    data::Hello { protocol: PROTOCOL_VERSION, cluster, peer, epoch, requests: 0, share }
}

fn greeting(me: &Identity, share: bool) -> Result<BytesMut> {
    frame::encode_head(0, 0, &hello(me, share).into(), 0)
}

/// The first bytes a worker sends on a unix socket, and its memory tier if the descriptors of one came with them.
async fn first_bytes(s: &UnixStream) -> Result<(Vec<u8>, Option<SharedMemory>)> {
    let mut bytes = vec![0; STAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let receive = || {
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [IoSliceMut::new(&mut bytes)];
        let got = rustix::net::recvmsg(s, parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        let mut files: Vec<OwnedFd> = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                files.extend(fds);
            }
        }
        Ok((got.bytes, files))
    };
    let (n, files) = s.async_io(Interest::READABLE, receive).await.context("read the worker's greeting")?;
    bytes.truncate(n);
    let mut files = files.into_iter();
    let shared = files.next().zip(files.next()).and_then(|(data, seals)| {
        SharedMemory::new(data, &seals, files.next())
            .inspect_err(|e| tracing::warn!(error = %e, "memory of the worker on this host cannot be read directly"))
            .ok()
    });
    Ok((bytes, shared))
}

/// The error of an answer that does not fit its question, or of none.
pub(crate) fn unexpected(m: &Option<Message>) -> Error {
    let name = m.as_ref().map_or("none", Message::name);
    Error::new(Kind::Corrupt, "worker sent an answer that does not fit").with("message", name)
}

/// The answers of one request, in the order the worker sent them. Dropping it cancels the request on this side.
pub struct Answers {
    inner: Arc<Inner>,
    request: u64,
    answers: mpsc::UnboundedReceiver<Result<Frame>>,
    deadline: Instant,
    _room: Option<OwnedSemaphorePermit>,
}

impl Answers {
    /// The next frame; a `Fail` of the worker is a frame like any other. The caller knows which one is the last.
    ///
    /// # Errors
    /// [`Kind::Timeout`] at the request's deadline, else why the connection broke.
    pub async fn next(&mut self) -> Result<Frame> {
        match timeout_at(self.deadline, self.answers.recv()).await {
            Ok(Some(frame)) => frame,
            Ok(None) => Err(Error::new(Kind::Unavailable, "connection to the worker is closed")),
            Err(_) => {
                Err(Error::new(Kind::Timeout, "worker did not answer in time").with("worker", &self.inner.endpoint))
            }
        }
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        self.inner.waiters.lock().remove(&self.request);
    }
}

impl Inner {
    /// Hands `head` to the socket, or queues what it does not take.
    fn write(&self, mut head: BytesMut) -> Result<()> {
        let mut out = self.out.lock();
        if out.is_empty() {
            match self.half.try_write(&head) {
                Ok(n) => head.advance(n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => {
                    drop(out);
                    let e = Error::from(e);
                    self.fail(e.share());
                    return Err(e);
                }
            }
            if head.is_empty() {
                return Ok(());
            }
        }
        if out.len() + head.len() > OUT_BYTES_MAX {
            return Err(
                Error::new(Kind::Exhausted, "too many requests wait for the worker").with("worker", &self.endpoint)
            );
        }
        out.extend_from_slice(&head);
        drop(out);
        self.flush.notify_one();
        Ok(())
    }

    async fn flush_loop(&self) {
        loop {
            self.flush.notified().await;
            if let Err(e) = self.flush_once().await {
                return self.fail(e.into());
            }
        }
    }

    async fn flush_once(&self) -> io::Result<()> {
        loop {
            self.half.writable().await?;
            let mut out = self.out.lock();
            match self.half.try_write(&out) {
                Ok(n) => out.advance(n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
                Err(e) => return Err(e),
            }
            if out.is_empty() {
                return Ok(());
            }
        }
    }

    async fn read_loop<R: AsyncRead + Unpin>(&self, from: &mut R) -> Result<()> {
        while let Some(head) = frame::read_head(from, BULK_BYTES_MAX).await? {
            self.heard();
            let wanted = {
                let mut waiters = self.waiters.lock();
                match waiters.get_mut(&head.request) {
                    None => None,
                    Some(w) if w.bulk_left < head.bulk_len || w.frames_left == 0 => {
                        return Err(Error::new(Kind::Corrupt, "worker sends more than it was asked for"));
                    }
                    Some(w) => {
                        w.bulk_left -= head.bulk_len;
                        w.frames_left -= 1;
                        Some(w.answers.clone())
                    }
                }
            };
            let Some(answers) = wanted else {
                frame::skip_bulk(from, head.bulk_len).await?;
                continue;
            };
            let bulk = if head.bulk_len == 0 { Bytes::new() } else { frame::read_bulk(from, head.bulk_len).await? };
            self.heard();
            let frame = Frame { request: head.request, deadline_ms: 0, message: head.message, bulk };
            // The asker may have gone meanwhile: that is how it cancels.
            let _ = answers.send(Ok(frame));
        }
        Ok(())
    }

    fn heard(&self) {
        self.heard_ms.store(self.started.elapsed().as_millis() as u64, Relaxed);
    }

    fn share(&self, shared: Option<SharedMemory>) {
        self.shared.store(shared.map(Arc::new));
        // Checked after it is entered: either `fail` sees it or we see that it was called.
        if self.broken.get().is_some() {
            self.shared.store(None);
        }
    }

    fn fail(&self, why: Error) {
        let why = self.broken.get_or_init(|| why);
        self.shared.store(None);
        let waiters = std::mem::take(&mut *self.waiters.lock());
        for w in waiters.into_values() {
            let _ = w.answers.send(Err(why.share()));
        }
    }
}
