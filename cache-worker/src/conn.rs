//! One data-plane connection: handshake, the reader that takes requests as far as there is room for them, and the writer that
//! sends answers in the order they come.
//!
//! What must stay true:
//! - Back-pressure instead of growth: a connection has [`REQUESTS_MAX`] requests at most, then its socket is not read; its answers
//!   wait in a queue of [`ANSWERS_MAX`] frames, and those made of our memory hold it from the connection's window.
//! - Whoever sends what is not a frame, or a frame that is not a request, is cut off and counted. Nothing is allocated on its word.
//! - The end of a connection ends its requests, never the fetches they began.

use crate::server::Server;
use crate::service::Wanted;
use crate::socket::{Outgoing, Part, WriteHalf};
use crate::source::Source;
use crate::store::InsertOptions;
use bytes::Bytes;
use efc_common::limit::{ByteBudget, Hold};
use efc_common::metrics::counter;
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use efc_proto::data;
use efc_proto::frame::{self, Head, ITEMS_MAX, Message, PROTOCOL_VERSION};
use efc_proto::status::to_fail;
use futures::StreamExt;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, timeout, timeout_at};

/// Requests of one connection at once.
pub(crate) const REQUESTS_MAX: usize = 64;
/// Frames that wait for the socket.
const ANSWERS_MAX: usize = 16;
/// Our memory in answers of one connection, bytes.
const WINDOW_BYTES: u64 = 8 << 20;
/// Sources one connection may name.
const SLOTS_MAX: usize = 64;
/// A frame that has begun arrives within this.
const FRAME_DEADLINE: Duration = Duration::from_secs(30);
/// Items of one batch that are answered at once.
const ITEMS_AT_ONCE: usize = 16;
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// Deadline of a request that names none, and the longest one.
const DEADLINE_DEFAULT: Duration = Duration::from_secs(60);
const DEADLINE_MAX: Duration = Duration::from_secs(600);

/// Where the answers of one request go.
#[derive(Clone)]
pub(crate) struct Replier {
    out: mpsc::Sender<Outgoing>,
    request: u64,
    window: ByteBudget,
}

impl Replier {
    /// Queues an answer; waits while the queue is full.
    pub(crate) async fn send(
        &self,
        message: &Message,
        parts: Vec<Part>,
        bulk: usize,
        holds: Vec<Arc<Hold>>,
    ) -> Result<()> {
        let head = frame::encode_head(self.request, 0, message, bulk)?;
        let gone = |_| Error::new(Kind::Cancelled, "the asker has gone");
        self.out.send(Outgoing { head, parts, _holds: holds }).await.map_err(gone)
    }

    pub(crate) async fn message(&self, message: impl Into<Message>) -> Result<()> {
        self.send(&message.into(), Vec::new(), 0, Vec::new()).await
    }

    pub(crate) async fn bulk(&self, message: impl Into<Message>, bulk: Bytes) -> Result<()> {
        let len = bulk.len();
        self.send(&message.into(), vec![Part::Bytes(bulk)], len, Vec::new()).await
    }

    /// Tells the asker of a failure; an asker that has gone does not mind.
    pub(crate) async fn fail(&self, e: &Error, item: u32) {
        let _ = self.message(to_fail(e, item)).await;
    }

    /// What answers made of our memory hold while they wait for the socket.
    pub(crate) fn window(&self) -> &ByteBudget {
        &self.window
    }
}

/// A connection after its handshake.
pub(crate) struct Conn {
    server: Arc<Server>,
    /// The peer is of our own user: it came through the unix socket.
    own_user: bool,
    /// It was given our memory tier to read by itself.
    shares: bool,
    /// Sources, and how what is read of them is kept.
    slots: Mutex<HashMap<u32, (Arc<Source>, InsertOptions)>>,
    room: Arc<Semaphore>,
    out: mpsc::Sender<Outgoing>,
    window: ByteBudget,
    tasks: TaskGroup,
}

/// Serves a connection to its end.
pub(crate) async fn serve<R>(server: Arc<Server>, reader: R, writer: WriteHalf, own_user: bool)
where
    R: AsyncRead + Unpin + Send + 'static,
{
    let mut reader = BufReader::with_capacity(4096, reader);
    let greeting = timeout(HANDSHAKE_DEADLINE, greet(&server, &mut reader, &writer, own_user)).await;
    let shares = match greeting {
        Ok(Ok(Some(shares))) => shares,
        Ok(Ok(None)) => return,
        Ok(Err(e)) => return refused("handshake", &e),
        Err(_) => return refused("handshake", &Error::new(Kind::Timeout, "no greeting came")),
    };
    let (out, answers) = mpsc::channel(ANSWERS_MAX);
    let tasks = TaskGroup::new();
    let stop = tasks.token().drop_guard();
    let conn = Arc::new(Conn {
        server,
        own_user,
        shares,
        slots: Mutex::default(),
        room: Arc::new(Semaphore::new(REQUESTS_MAX)),
        out,
        window: ByteBudget::new(WINDOW_BYTES),
        tasks: tasks.clone(),
    });
    let stall = conn.server.limits().stall;
    let writing = write_answers(writer, answers, stall);
    let reading = conn.read_requests(&mut reader);
    tokio::select! {
        end = reading => if let Err(e) = end {
            refused(reason(&e), &e);
        },
        end = writing => if let Err(e) = end {
            counter!("efc_data_refused_total", "reason" => "stalled").increment(1);
            tracing::debug!(error = %e, "data-plane connection ended while answering");
        },
    }
    drop(stop);
}

fn reason(e: &Error) -> &'static str {
    match e.kind() {
        Kind::Corrupt => "garbage",
        Kind::Timeout => "timeout",
        Kind::Invalid => "not_a_request",
        _ => "broken",
    }
}

fn refused(why: &'static str, e: &Error) {
    counter!("efc_data_refused_total", "reason" => why).increment(1);
    tracing::debug!(reason = why, error = %e, "data-plane connection refused");
}

/// The handshake: was our memory shared? `None` if the peer closed the connection before it said anything.
async fn greet<R: AsyncRead + Unpin>(
    server: &Server,
    reader: &mut R,
    writer: &WriteHalf,
    own_user: bool,
) -> Result<Option<bool>> {
    let Some(head) = frame::read_head(reader, 0).await? else { return Ok(None) };
    let theirs = match head.message {
        Message::Hello(h) => h,
        m => return Err(Error::new(Kind::Corrupt, "peer did not greet").with("message", m.name())),
    };
    let ours = server.cluster();
    let error = if theirs.protocol != PROTOCOL_VERSION {
        Some(
            Error::new(Kind::Unsupported, "worker speaks another protocol version; upgrade the older side")
                .with("ours", PROTOCOL_VERSION)
                .with("theirs", theirs.protocol),
        )
    } else if !ours.is_empty() && !theirs.cluster.is_empty() && ours != theirs.cluster {
        Some(
            Error::new(Kind::PermissionDenied, "worker belongs to another cluster; check the master addresses")
                .with("ours", &ours)
                .with("theirs", &theirs.cluster),
        )
    } else {
        None
    };
    // What our own user may read here it could ask us for.
    let files = server.service().store.shared_files().filter(|_| theirs.share && own_user && error.is_none());
    let answer: Message = match &error {
        Some(e) => to_fail(e, 0).into(),
        None => data::Hello { share: files.is_some(), ..server.hello() }.into(),
    };
    let head = frame::encode_head(head.request, 0, &answer, 0)?;
    match &files {
        Some(files) => writer.send_files(&head, files, HANDSHAKE_DEADLINE).await?,
        None => {
            let frames = [Outgoing { head, parts: Vec::new(), _holds: Vec::new() }];
            writer.send(&frames, HANDSHAKE_DEADLINE).await?;
        }
    }
    error.map_or(Ok(Some(files.is_some())), Err)
}

/// Sends answers until all askers are gone.
async fn write_answers(writer: WriteHalf, mut answers: mpsc::Receiver<Outgoing>, stall: Duration) -> Result<()> {
    let mut batch = Vec::with_capacity(ANSWERS_MAX);
    while answers.recv_many(&mut batch, ANSWERS_MAX).await > 0 {
        writer.send(&batch, stall).await?;
        batch.clear();
    }
    Ok(())
}

impl Conn {
    async fn read_requests<R: AsyncRead + Unpin>(self: &Arc<Self>, reader: &mut BufReader<R>) -> Result<()> {
        let idle = self.server.limits().idle;
        loop {
            match timeout(idle, reader.fill_buf()).await {
                Ok(Ok([])) => return Ok(()),
                Ok(Ok(_)) => {}
                // A peer that vanishes is no news.
                Ok(Err(_)) => return Ok(()),
                Err(_) if self.room.available_permits() < REQUESTS_MAX => continue,
                Err(_) => return Ok(()),
            }
            let head = match timeout(FRAME_DEADLINE, frame::read_head(reader, 0)).await {
                Ok(Ok(Some(head))) => head,
                Ok(Ok(None)) => return Ok(()),
                Ok(Err(e)) => return Err(e),
                Err(_) => return Err(Error::new(Kind::Timeout, "a frame did not arrive whole")),
            };
            self.take(head).await?;
        }
    }

    /// Answers a request, or starts a task that does. An error cuts the connection off.
    async fn take(self: &Arc<Self>, head: Head) -> Result<()> {
        let to = Replier { out: self.out.clone(), request: head.request, window: self.window.clone() };
        let asked = Duration::from_millis(head.deadline_ms as u64);
        let patience = if asked.is_zero() { DEADLINE_DEFAULT } else { asked.min(DEADLINE_MAX) };
        let deadline = Instant::now() + patience;
        let mut looked_up = None;
        match &head.message {
            // Answered even when there is no room: this is how the peer knows that we live.
            Message::Hello(_) => return to.message(self.server.hello()).await,
            Message::Read(read) if !read.fill_only => match self.wanted(read, 0) {
                // All in memory: no task, no waiting but for the socket.
                Ok(w) if w.at_hand() => {
                    if let Err(e) = self.server.service().answer(&to, w).await {
                        to.fail(&e, 0).await;
                    }
                    return Ok(());
                }
                other => looked_up = Some(other),
            },
            Message::Read(_) | Message::ReadMany(_) | Message::Attach(_) | Message::List(_) => {}
            Message::Manage(_) | Message::CacheStat(_) | Message::EvictAll(_) | Message::Resize(_) => {}
            Message::Touched(t) => {
                self.server.service().touched(&t.touches);
                return Ok(());
            }
            m => return Err(Error::new(Kind::Invalid, "peer sent an answer as a request").with("message", m.name())),
        }
        let Ok(turn) = self.room.clone().acquire_owned().await else { return Ok(()) };
        let busy = self.server.busy();
        let me = self.clone();
        self.tasks.spawn(async move {
            let _held = (turn, busy);
            let request = async {
                match (looked_up, head.message) {
                    (Some(w), _) => me.server.service().answer(&to, w?).await,
                    (None, message) => me.answer(&to, message, deadline).await,
                }
            };
            let outcome = timeout_at(deadline, request).await;
            if let Err(e) = outcome.unwrap_or_else(|_| Err(too_late())) {
                to.fail(&e, 0).await;
            }
        });
        Ok(())
    }

    async fn answer(self: &Arc<Self>, to: &Replier, message: Message, deadline: Instant) -> Result<()> {
        let service = self.server.service();
        match message {
            Message::Attach(a) => {
                let source = service.sources.attach(&a.spec_json, &a.keys_json, self.own_user).await?;
                let source_id = Bytes::copy_from_slice(&source.id.0);
                let ttl = (a.ttl_ms > 0).then(|| Duration::from_millis(a.ttl_ms));
                self.name(a.slot, source, InsertOptions { ttl, pinned: a.pin })?;
                to.message(data::Attached { source_id }).await
            }
            Message::Read(read) => service.fill(to, self.wanted(&read, 0)?).await,
            Message::ReadMany(m) => self.answer_many(to, m.items, deadline).await,
            Message::List(l) => service.list(to, self.slot(l.slot)?.0, l).await,
            Message::Manage(m) => {
                let (source, _) = self.slot(m.slot)?;
                to.message(service.manage(source, m).await?).await
            }
            Message::CacheStat(_) => to.message(service.cache_stats().await).await,
            Message::EvictAll(_) => {
                service.evict_all().await;
                to.message(service.cache_stats().await).await
            }
            Message::Resize(r) => {
                if !self.own_user {
                    let text = "the sizes of a worker's tiers are changed through its unix socket only";
                    return Err(Error::new(Kind::PermissionDenied, text));
                }
                service.resize(r).await?;
                to.message(service.cache_stats().await).await
            }
            m => Err(Error::new(Kind::Invalid, "not a request").with("message", m.name())),
        }
    }

    /// Many small reads: all are looked up first, so that their fetches run at once, then answered as they get ready.
    async fn answer_many(self: &Arc<Self>, to: &Replier, items: Vec<data::Read>, deadline: Instant) -> Result<()> {
        if items.len() > ITEMS_MAX || items.is_empty() {
            return Err(Error::new(Kind::Invalid, "a batch has 1 to 128 reads").with("items", items.len()));
        }
        let service = self.server.service();
        let mut all: Vec<(u32, Result<Wanted>)> = Vec::with_capacity(items.len());
        for (item, read) in (0u32..).zip(&items) {
            all.push((item, self.wanted(read, item)));
        }
        for (_, wanted) in &mut all {
            if let Ok(w) = wanted {
                service.start(w);
            }
        }
        // What is at hand goes first, in one pass and without a task per item.
        all.sort_by_key(|(_, w)| !w.as_ref().is_ok_and(Wanted::at_hand));
        futures::stream::iter(all)
            .for_each_concurrent(ITEMS_AT_ONCE, |(item, wanted)| async move {
                let answered = async { service.answer(to, wanted?).await };
                let outcome = timeout_at(deadline, answered).await;
                if let Err(e) = outcome.unwrap_or_else(|_| Err(too_late())) {
                    to.fail(&e, item).await;
                }
            })
            .await;
        Ok(())
    }

    fn wanted(&self, read: &data::Read, item: u32) -> Result<Wanted> {
        let (source, keep) = self.slot(read.slot)?;
        let wanted = self.server.service().wanted(source, keep, read, item)?;
        Ok(wanted.by_place(read.by_place && self.shares))
    }

    fn slot(&self, slot: u32) -> Result<(Arc<Source>, InsertOptions)> {
        let slots = self.slots.lock();
        let found = slots.get(&slot).cloned();
        found.ok_or_else(|| Error::new(Kind::Invalid, "no source is attached under this slot").with("slot", slot))
    }

    fn name(&self, slot: u32, source: Arc<Source>, keep: InsertOptions) -> Result<()> {
        let mut slots = self.slots.lock();
        if slots.len() >= SLOTS_MAX && !slots.contains_key(&slot) {
            return Err(Error::new(Kind::Exhausted, "one connection names too many sources").with("most", SLOTS_MAX));
        }
        slots.insert(slot, (source, keep));
        Ok(())
    }
}

fn too_late() -> Error {
    Error::new(Kind::Timeout, "the worker could not answer in time")
}
