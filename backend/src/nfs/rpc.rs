//! ONC RPC over TCP (RFC 5531): record marking, AUTH_SYS, and several connections to one server, each with many calls in flight.
//!
//! A [`Client`] owns `N` slots. A slot is one connection that is made when the first call needs it and made again after it broke. Its
//! writer task takes calls from a bounded queue, connects if need be, and sends what has queued up with one write; while a connection
//! lives, a reader task cuts replies out of the stream and hands each to the caller that waits for its number (xid). Callers own the
//! deadline: a call that is not answered in time fails, and takes the connection with it if nothing at all arrived since the call began.
//! A failed call may have been executed unless its error is marked [`unsent`].
//!
//! What must stay true: a reply longer than [`REPLY_BYTES_MAX`] is refused before anything is allocated for it; a broken connection
//! fails every call that was sent on it (all calls we make can be sent again); a caller that goes away leaves nothing behind in the
//! table of waiting calls. READ data is never copied: a large reply is received into one buffer of its own size, and data handed
//! out is a slice of it. WRITE data is never copied either: a call has a payload beside its frame, and both go out in one vectored write.

use super::outgoing::Outgoing;
use super::xdr::{Reader, garbled};
use crate::tree::settle::unsent;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result, Retry};
use nfs3_types::rpc::{auth_flavor, auth_unix, call_body, msg_body, opaque_auth, rpc_msg};
use nfs3_types::xdr_codec::{Opaque, Pack};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpSocket, TcpStream, lookup_host};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};

/// Longest reply we accept, bytes: the largest READ we send (1 MiB) or directory page, with its headers.
pub(super) const REPLY_BYTES_MAX: usize = 1024 * 1024 + 64 * 1024;
/// Calls in flight on one connection.
const CALLS_MAX: usize = 64;
/// Bytes asked of the socket at a time while no large reply is being received: some 60 small replies, and at most this much of a large
/// one is copied.
const SCRATCH_BYTES: usize = 8 * 1024;
/// Bytes of calls sent with one write.
const BATCH_BYTES: usize = 64 * 1024;

/// A server program: what RPC calls number and what messages name.
#[derive(Debug, Clone, Copy)]
pub(super) struct Program {
    /// Program number.
    pub(super) number: u32,
    /// Its version.
    pub(super) version: u32,
    /// Name for messages.
    pub(super) name: &'static str,
}

/// A call on its way to a writer.
struct Call {
    xid: u32,
    frame: BytesMut,
    /// Opaque data that ends the call: its length is in the frame, its padding is not.
    payload: Bytes,
    reply: oneshot::Sender<Result<Bytes>>,
}

/// A caller that waits for a reply.
struct Waiting {
    /// Number of the connection the call was sent on.
    connection: u64,
    sent: Instant,
    reply: oneshot::Sender<Result<Bytes>>,
}

/// What the callers, the writer and the reader of one connection share.
struct Slot {
    address: String,
    timeout: Duration,
    permits: Semaphore,
    waiting: Mutex<HashMap<u32, Waiting>>,
    /// When the connection last received anything.
    heard: Mutex<Instant>,
    /// Asks the writer to drop the connection.
    suspect: watch::Sender<u64>,
}

/// Several connections to one server program.
pub(super) struct Client {
    program: Program,
    address: String,
    timeout: Duration,
    credential: Vec<u8>,
    slots: Vec<(Arc<Slot>, mpsc::Sender<Call>)>,
    turn: AtomicUsize,
    xid: AtomicU32,
    tasks: TaskGroup,
}

/// Removes a caller from the table of waiting calls, also when its future is dropped.
struct Forget<'a>(&'a Slot, u32);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.0.waiting.lock().remove(&self.1);
    }
}

impl Client {
    /// A client of `program` at `address` (`host:port`) over `connections` connections; no network is touched before the first call.
    /// `timeout` bounds each call and each attempt to connect.
    pub(super) fn new(program: Program, address: &str, connections: usize, timeout: Duration) -> Client {
        let tasks = TaskGroup::new();
        let slots = (0..connections.max(1)).map(|_| {
            let slot = Arc::new(Slot {
                address: address.into(),
                timeout,
                permits: Semaphore::new(CALLS_MAX),
                waiting: Mutex::default(),
                heard: Mutex::new(Instant::now()),
                suspect: watch::Sender::new(0),
            });
            let (queue, calls) = mpsc::channel(CALLS_MAX);
            tasks.spawn(write_calls(slot.clone(), calls, tasks.clone()));
            (slot, queue)
        });
        Client {
            program,
            address: address.into(),
            timeout,
            credential: credential(),
            slots: slots.collect(),
            turn: AtomicUsize::new(0),
            xid: AtomicU32::new(rand::random()),
            tasks,
        }
    }

    /// `host:port`.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// One call; the reader stands at the results of the procedure.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] when the server cannot be reached or the connection broke, [`Kind::Timeout`] when it did not answer in
    /// time, [`Kind::PermissionDenied`] when it refused our credential, [`Kind::Unsupported`] for an unknown program or
    /// procedure, [`Kind::Corrupt`] for bytes that are no reply.
    pub(super) async fn call(&self, procedure: u32, arguments: &impl Pack) -> Result<Reader> {
        self.call_with(procedure, arguments, Bytes::new()).await
    }

    /// As [`Client::call`]; `arguments` end with the length of `payload`, which follows them.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub(super) async fn call_with(&self, procedure: u32, arguments: &impl Pack, payload: Bytes) -> Result<Reader> {
        let (slot, queue) = &self.slots[self.turn.fetch_add(1, Relaxed) % self.slots.len()];
        let xid = self.xid.fetch_add(1, Relaxed);
        let frame = self.encode(xid, procedure, arguments, payload.len())?;
        let _forget = Forget(slot, xid);
        let answer = timeout(self.timeout, exchange(slot, queue, xid, frame, payload)).await;
        let Ok(answer) = answer else {
            slot.doubt(xid);
            let text = format!("{} at {} did not answer within {:?}", self.program.name, self.address, self.timeout);
            return Err(Error::new(Kind::Timeout, text));
        };
        accepted(answer?, self.program).map_err(|e| e.with("server", &self.address))
    }

    fn encode(&self, xid: u32, procedure: u32, arguments: &impl Pack, payload: usize) -> Result<BytesMut> {
        let message = rpc_msg {
            xid,
            body: msg_body::CALL(call_body {
                rpcvers: nfs3_types::rpc::RPC_VERSION_2,
                prog: self.program.number,
                vers: self.program.version,
                proc: procedure,
                cred: opaque_auth { flavor: auth_flavor::AUTH_UNIX, body: Opaque::borrowed(&self.credential) },
                verf: opaque_auth::default(),
            }),
        };
        let head = message.packed_size() + arguments.packed_size();
        let len = head + payload.next_multiple_of(4);
        let mut frame = BytesMut::with_capacity(head + 4).writer();
        let packed = (|| {
            // Record mark: this is the last (and only) fragment, and its length.
            (len as u32 | 1 << 31).pack(&mut frame)?;
            message.pack(&mut frame)?;
            arguments.pack(&mut frame)
        })();
        packed.map_err(|e| Error::new(Kind::Invalid, format!("cannot encode a call: {e}")))?;
        Ok(frame.into_inner())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.tasks.cancel();
    }
}

impl Slot {
    /// A call was not answered in time: give its connection up if nothing else came since it was sent either.
    fn doubt(&self, xid: u32) {
        let sent = self.waiting.lock().get(&xid).map(|w| w.sent);
        if sent.is_some_and(|sent| *self.heard.lock() <= sent) {
            self.suspect.send_modify(|n| *n += 1);
        }
    }

    /// Puts a call into the table of waiting calls and its bytes into `out`, unless its caller went away.
    fn register(&self, connection: u64, call: Call, out: &mut Outgoing) {
        if !call.reply.is_closed() {
            let waiting = Waiting { connection, sent: Instant::now(), reply: call.reply };
            self.waiting.lock().insert(call.xid, waiting);
            out.put(&call.frame, call.payload);
        }
    }

    /// Fails the calls sent on `connection`.
    fn fail(&self, connection: u64, why: &str) {
        let lost: Vec<Waiting> = {
            let mut waiting = self.waiting.lock();
            waiting.extract_if(|_, w| w.connection == connection).map(|(_, w)| w).collect()
        };
        for w in lost {
            let text = format!("the connection to {} broke: {why}", self.address);
            // A caller that went away meanwhile does not mind.
            let _ = w.reply.send(Err(Error::new(Kind::Unavailable, text)));
        }
    }
}

async fn exchange(slot: &Slot, queue: &mpsc::Sender<Call>, xid: u32, frame: BytesMut, payload: Bytes) -> Result<Bytes> {
    let stopping = || Error::new(Kind::Cancelled, "the NFS client is stopping");
    let _permit = slot.permits.acquire().await.map_err(|_| stopping())?;
    let (reply, answer) = oneshot::channel();
    queue.send(Call { xid, frame, payload, reply }).await.map_err(|_| stopping())?;
    answer.await.map_err(|_| stopping())?
}

/// AUTH_SYS credential (RFC 5531 appendix A) of this process: effective ids and up to 16 groups.
fn credential() -> Vec<u8> {
    let gids = rustix::process::getgroups().unwrap_or_default();
    let mut host = std::fs::read("/proc/sys/kernel/hostname").unwrap_or_default();
    host.truncate(host.trim_ascii_end().len().min(255));
    let auth = auth_unix {
        stamp: std::process::id(),
        machinename: Opaque::owned(host),
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        gids: gids.into_iter().take(16).map(|g| g.as_raw()).collect(),
    };
    opaque_auth::auth_unix(&auth).body.into_owned()
}

/// Checks the RPC header of a reply (RFC 5531 section 9) and leaves the reader at the results.
fn accepted(frame: Bytes, program: Program) -> Result<Reader> {
    let mut r = Reader(frame);
    // The xid brought the frame here; the message type was checked by the reader task.
    r.u32()?;
    r.u32()?;
    match r.u32()? {
        0 => {}
        1 => {
            return Err(match (r.u32()?, r.u32()?) {
                (1, why) => Error::new(
                    Kind::PermissionDenied,
                    format!(
                        "{} refused our AUTH_SYS identity (auth_stat {why}); the export may want another security flavor",
                        program.name
                    ),
                ),
                _ => Error::new(Kind::Unsupported, format!("{} does not speak RPC version 2", program.name)),
            });
        }
        other => return Err(garbled(&format!("reply_stat {other}"))),
    }
    r.u32()?;
    r.opaque(400)?;
    let refused = |kind, what: &str| {
        Err(Error::new(
            kind,
            format!("{} (program {} version {}) {what}", program.name, program.number, program.version),
        ))
    };
    match r.u32()? {
        0 => Ok(r),
        1 => refused(Kind::Unsupported, "is not served there; is the port right?"),
        2 => refused(Kind::Unsupported, "is served in other versions only"),
        3 => refused(Kind::Unsupported, "does not know the procedure"),
        4 => refused(Kind::Io, "could not decode our call"),
        5 => refused(Kind::Unavailable, "has a passing system error"),
        other => Err(garbled(&format!("accept_stat {other}"))),
    }
}

/// The writer of one slot: lives as long as the client.
async fn write_calls(slot: Arc<Slot>, mut calls: mpsc::Receiver<Call>, tasks: TaskGroup) {
    let mut number = 0u64;
    let mut suspect = slot.suspect.subscribe();
    while let Some(first) = calls.recv().await {
        if first.reply.is_closed() {
            continue;
        }
        number += 1;
        let stream = match open(&slot.address, slot.timeout).await {
            Ok(stream) => stream,
            Err(e) => {
                refuse(first, &e);
                while let Ok(next) = calls.try_recv() {
                    refuse(next, &e);
                }
                continue;
            }
        };
        suspect.mark_unchanged();
        let (read, mut write) = stream.into_split();
        let (broken, mut is_broken) = oneshot::channel();
        tasks.spawn(read_replies(slot.clone(), number, read, broken));
        let mut out = Outgoing::default();
        slot.register(number, first, &mut out);
        let why = tokio::select! {
            // In this order: calls that wait in the queue are not sent on a connection that is known to be bad.
            biased;
            why = &mut is_broken => why.unwrap_or_else(|_| "the reader stopped".into()),
            _ = suspect.changed() => "no answer at all for the whole timeout".into(),
            why = send_all(&slot, number, &mut write, &mut calls, out) => why,
        };
        // Dropping the write half alone would keep the socket open: its other half belongs to the reader, which ends on shutdown.
        let _ = write.shutdown().await;
        drop(is_broken);
        slot.fail(number, &why);
    }
}

fn refuse(call: Call, e: &Error) {
    // A caller that went away meanwhile does not mind.
    let _ = call.reply.send(Err(unsent(e.share())));
}

/// Sends `out`, and then calls as they come, as many as there are with one write; returns why it cannot go on.
async fn send_all(
    slot: &Slot,
    connection: u64,
    write: &mut OwnedWriteHalf,
    calls: &mut mpsc::Receiver<Call>,
    mut out: Outgoing,
) -> String {
    loop {
        match timeout(slot.timeout, write.write_all_buf(&mut out)).await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => return e.to_string(),
            Err(_) => return format!("it took nothing for {:?}", slot.timeout),
        }
        let Some(call) = calls.recv().await else { return "the client is stopping".into() };
        slot.register(connection, call, &mut out);
        while out.remaining() < BATCH_BYTES
            && let Ok(call) = calls.try_recv()
        {
            slot.register(connection, call, &mut out);
        }
    }
}

/// The reader of one connection: ends with it.
async fn read_replies(slot: Arc<Slot>, connection: u64, read: OwnedReadHalf, mut broken: oneshot::Sender<String>) {
    let mut records = Records { read, scratch: BytesMut::new() };
    let why = loop {
        let record = tokio::select! {
            record = records.next() => record,
            _ = broken.closed() => break "the writer gave it up".to_string(),
        };
        let frame = match record {
            Ok(frame) => frame,
            Err(e) => break e.to_string(),
        };
        let mut r = Reader(frame.clone());
        let (Ok(xid), Ok(1)) = (r.u32(), r.u32()) else { break "it sent something that is no RPC reply".into() };
        *slot.heard.lock() = Instant::now();
        let waiting = slot.waiting.lock().remove(&xid);
        // A reply nobody waits for any more is dropped.
        if let Some(w) = waiting {
            let _ = w.reply.send(Ok(frame));
        }
    };
    slot.fail(connection, &why);
    let _ = broken.send(why);
}

/// Cuts records (RFC 5531 section 11) out of the byte stream.
struct Records {
    read: OwnedReadHalf,
    scratch: BytesMut,
}

impl Records {
    /// The next record. Fragments of one record arrive in one buffer; a record that fits into what was read already is a slice of it.
    async fn next(&mut self) -> Result<Bytes> {
        let mut record = BytesMut::new();
        loop {
            while self.scratch.len() < 4 {
                self.fill().await?;
            }
            let mark = u32::from_be_bytes([self.scratch[0], self.scratch[1], self.scratch[2], self.scratch[3]]);
            let (last, len) = (mark >> 31 == 1, (mark & 0x7fff_ffff) as usize);
            if len > REPLY_BYTES_MAX - record.len() {
                return Err(garbled(&format!("a record of {len} bytes, at most {REPLY_BYTES_MAX} are allowed")));
            }
            if len == 0 && !last {
                return Err(garbled("an empty record fragment"));
            }
            let _ = self.scratch.split_to(4);
            if last && record.is_empty() && self.scratch.len() >= len {
                return Ok(self.scratch.split_to(len).freeze());
            }
            let have = self.scratch.len().min(len);
            record.reserve(len);
            record.extend_from_slice(&self.scratch.split_to(have));
            let mut rest = len - have;
            while rest > 0 {
                let n = self.read.read_buf(&mut (&mut record).limit(rest)).await?;
                if n == 0 {
                    return Err(closed());
                }
                rest -= n;
            }
            if last {
                return Ok(record.freeze());
            }
        }
    }

    async fn fill(&mut self) -> Result<()> {
        if self.scratch.capacity() - self.scratch.len() < 512 {
            self.scratch.reserve(SCRATCH_BYTES);
        }
        match self.read.read_buf(&mut self.scratch).await? {
            0 => Err(closed()),
            _ => Ok(()),
        }
    }
}

fn closed() -> Error {
    Error::new(Kind::Unavailable, "the server closed it")
}

/// Connects, from a reserved port (< 1024) where we may: exports are `secure` by default on many servers, which refuse others.
async fn open(address: &str, patience: Duration) -> Result<TcpStream> {
    let found = within(patience, address, async { Ok(lookup_host(address).await?.collect::<Vec<_>>()) }).await;
    // Name servers have passing troubles, too.
    let addresses = found.map_err(|e| {
        let text = format!("cannot find the address of {address}; is the host name right?");
        Error::new(Kind::Unavailable, text).caused_by(e)
    })?;
    let mut last = Error::new(Kind::Unavailable, format!("the name {address} has no address"));
    for a in addresses {
        match within(patience, address, dial(a)).await {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                let keepalive = socket2::TcpKeepalive::new()
                    .with_time(Duration::from_secs(20))
                    .with_interval(Duration::from_secs(5))
                    .with_retries(4);
                socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
                return Ok(stream);
            }
            Err(e) => {
                last = Error::new(
                    Kind::Unavailable,
                    format!("cannot connect to {address}; is the host right and the port open?"),
                )
                .with_retry(Retry::Later)
                .caused_by(e);
            }
        }
    }
    Err(last)
}

async fn within<T>(patience: Duration, address: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    match timeout(patience, work).await {
        Ok(done) => done,
        Err(_) => Err(Error::new(Kind::Timeout, format!("{address} did not answer within {patience:?}"))),
    }
}

async fn dial(to: SocketAddr) -> Result<TcpStream> {
    use std::io::ErrorKind as K;
    let start = rand::random_range(0..400u16);
    for i in 0..64u16 {
        let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        let mut from = to;
        from.set_ip(if to.is_ipv4() { [0u8; 4].into() } else { [0u16; 8].into() });
        from.set_port(1023 - (start + i) % 400);
        match socket.bind(from) {
            Ok(()) => {}
            Err(e) if e.kind() == K::AddrInUse => continue,
            Err(_) => break,
        }
        match socket.connect(to).await {
            Err(e) if matches!(e.kind(), K::AddrInUse | K::AddrNotAvailable) => continue,
            other => return Ok(other?),
        }
    }
    Ok(TcpStream::connect(to).await?)
}
