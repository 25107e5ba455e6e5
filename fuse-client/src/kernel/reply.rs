//! Answers. Each is given exactly once, from any thread. Dropping one unanswered is a bug of the file system: the application gets EIO and
//! the log an ERROR line; while the session drains it is no bug but the way to leave the request to the successor.

use std::io::IoSlice;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use bytes::Bytes;

use super::conn::Conn;
use super::encode::{self, DIRENT_BYTES, ENTRY_BYTES, Fixed};
use super::metrics::Op;
use super::outcomes::Done;
use super::types::{AttrOut, CreateOut, EntryOut, Errno, LockOut, LseekOut, OpenOut, PollOut, StatfsOut, WriteOut};

/// The kernel's mark on a request that it sends a second time.
pub(super) const RESENT: u64 = 1 << 63;

/// One taken request, not yet answered.
pub(super) struct Slot {
    conn: Arc<Conn>,
    unique: u64,
    op: Op,
    taken_at: Instant,
    answered: bool,
}

impl Slot {
    /// Takes responsibility for request `unique` (as the kernel sent it, with the resend mark).
    pub(super) fn new(conn: Arc<Conn>, unique: u64, op: Op) -> Slot {
        conn.taken();
        if let Some(outcomes) = &conn.outcomes {
            outcomes.taken(unique & !RESENT);
        }
        Slot { conn, unique, op, taken_at: Instant::now(), answered: false }
    }

    fn send(&mut self, error: Option<Errno>, payload: &[IoSlice<'_>]) {
        self.answered = true;
        // A non-positive errno would be read as success or be refused, and then the caller would wait forever.
        let errno = error.map(|e| if (1..=511).contains(&e.0) { e } else { Errno::EIO });
        let written_down = self.conn.outcomes.as_ref().filter(|_| self.op.may_be_once());
        if let Some(outcomes) = written_down {
            outcomes.finish(self.unique & !RESENT, errno.map_or(0, |e| e.0), payload);
        }
        let sent = self.conn.answer(self.unique, errno.map_or(0, |e| e.0), payload);
        if let Err(e) = sent {
            tracing::error!(op = self.op.name(), error = %e, "the kernel refused an answer; the caller gets EIO");
            if let Err(e) = self.conn.answer(self.unique, libc::EIO, &[]) {
                tracing::error!(op = self.op.name(), error = %e, "the kernel refused EIO as well; the caller hangs");
            }
        }
        // Nobody was told once the connection is left to a successor: that finds it.
        if let Some(outcomes) = self.conn.outcomes.as_ref().filter(|o| !self.conn.is_closed() && o.knows(self.op)) {
            outcomes.answered(self.unique & !RESENT);
        }
        self.conn.metrics.answered(self.op, self.taken_at, errno);
    }

    /// If the predecessor had an answer, gives it.
    pub(super) fn answered_before(self) -> Option<Slot> {
        let Some(outcomes) = &self.conn.outcomes else { return Some(self) };
        outcomes.resent().taken.fetch_add(1, Relaxed);
        match outcomes.take(self.unique & !RESENT) {
            Some(Done { errno: 0, payload }) => self.bytes(&payload),
            Some(Done { errno, .. }) => self.error(Errno(errno)),
            None => return Some(self),
        }
        None
    }

    fn fixed(mut self, fill: impl FnOnce(&mut Fixed)) {
        let mut out = Fixed::new();
        fill(&mut out);
        self.send(None, &[IoSlice::new(out.as_slice())]);
    }

    fn bytes(mut self, bytes: &[u8]) {
        self.send(None, &[IoSlice::new(bytes)]);
    }

    fn error(mut self, errno: Errno) {
        self.send(Some(errno), &[]);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if !self.answered && self.conn.serving() {
            tracing::error!(
                op = self.op.name(),
                unique = self.unique,
                "request dropped without an answer; the caller gets EIO"
            );
            self.send(Some(Errno::EIO), &[]);
        }
        self.conn.done();
    }
}

/// The answer to a request whose success is a `T`.
pub struct Reply<T> {
    slot: Slot,
    answer: PhantomData<fn(T)>,
}

impl<T> Reply<T> {
    pub(super) fn new(slot: Slot) -> Reply<T> {
        Reply { slot, answer: PhantomData }
    }

    /// Refuses.
    pub fn error(self, errno: Errno) {
        self.slot.error(errno);
    }
}

/// What a [`Reply`] can succeed with.
pub trait Answer: sealed::Send + Sized {}

mod sealed {
    use super::Slot;

    /// Only this room knows how an answer is written.
    pub trait Send {
        #[doc(hidden)]
        #[allow(private_interfaces)]
        fn send(self, slot: Slot);
    }
}

impl<T: Answer> Reply<T> {
    /// Succeeds.
    pub fn ok(self, value: T) {
        value.send(self.slot);
    }

    /// Succeeds or refuses.
    pub fn end(self, outcome: Result<T, Errno>) {
        match outcome {
            Ok(value) => self.ok(value),
            Err(errno) => self.error(errno),
        }
    }
}

macro_rules! fixed_answers {
    ($($type:ty => |$out:ident, $value:ident| $encode:expr;)+) => {$(
        impl Answer for $type {}
        #[allow(private_interfaces)]
        impl sealed::Send for $type {
            fn send(self, slot: Slot) {
                let $value = self;
                slot.fixed(|$out| $encode);
            }
        }
    )+};
}

fixed_answers! {
    EntryOut => |out, v| encode::entry(out, &v);
    AttrOut => |out, v| encode::attr_out(out, &v);
    OpenOut => |out, v| encode::open(out, &v);
    CreateOut => |out, v| encode::create(out, &v);
    StatfsOut => |out, v| encode::statfs(out, &v);
    LseekOut => |out, v| encode::lseek(out, v);
    LockOut => |out, v| encode::lock(out, &v);
    PollOut => |out, v| encode::poll(out, v);
    WriteOut => |out, v| encode::write(out, v);
}

impl Answer for () {}
#[allow(private_interfaces)]
impl sealed::Send for () {
    fn send(self, mut slot: Slot) {
        slot.send(None, &[]);
    }
}

impl Answer for Bytes {}
#[allow(private_interfaces)]
impl sealed::Send for Bytes {
    fn send(self, slot: Slot) {
        slot.bytes(&self);
    }
}

/// The answer to READ.
pub struct ReadReply {
    slot: Slot,
    size: usize,
}

impl ReadReply {
    pub(super) fn new(slot: Slot, size: u32) -> ReadReply {
        ReadReply { slot, size: size as usize }
    }

    /// Succeeds with one piece; what is longer than asked for is cut off, shorter means end of file.
    pub fn bytes(self, data: &[u8]) {
        self.slot.conn.metrics.read_bytes(data.len().min(self.size));
        self.slot.bytes(&data[..data.len().min(self.size)]);
    }

    /// Succeeds with several pieces in order: they go to the kernel in one `writev`, without a copy here. Cut off like [`ReadReply::bytes`].
    pub fn slices(mut self, data: &[Bytes]) {
        let mut left = self.size;
        let mut payload = Vec::with_capacity(data.len());
        for piece in data.iter().filter(|p| !p.is_empty()) {
            let take = piece.len().min(left);
            payload.push(IoSlice::new(&piece[..take]));
            left -= take;
            if left == 0 {
                break;
            }
        }
        self.slot.conn.metrics.read_bytes(self.size - left);
        self.slot.send(None, &payload);
    }

    /// Refuses.
    pub fn error(self, errno: Errno) {
        self.slot.error(errno);
    }
}

/// The answer to GETXATTR and LISTXATTR.
pub struct XattrReply {
    slot: Slot,
    size: u32,
}

impl XattrReply {
    pub(super) fn new(slot: Slot, size: u32) -> XattrReply {
        XattrReply { slot, size }
    }

    /// Succeeds: the value, or its length when the caller only asked how much room it needs, or ERANGE when it gave too little.
    pub fn value(self, value: &[u8]) {
        match u32::try_from(value.len()) {
            Ok(len) if self.size == 0 => self.slot.fixed(|out| encode::xattr_size(out, len)),
            Ok(len) if len <= self.size => self.slot.bytes(value),
            _ => self.slot.error(Errno::ERANGE),
        }
    }

    /// Refuses.
    pub fn error(self, errno: Errno) {
        self.slot.error(errno);
    }
}

/// The answer to READDIR and READDIRPLUS: a page that takes entries until it is full.
pub struct DirReply {
    slot: Slot,
    page: Vec<u8>,
    size: usize,
    plus: bool,
}

impl DirReply {
    pub(super) fn new(slot: Slot, size: usize, plus: bool) -> DirReply {
        DirReply { slot, page: Vec::with_capacity(size.min(64 << 10)), size, plus }
    }

    /// Do entries carry attributes and count as look-ups?
    pub fn plus(&self) -> bool {
        self.plus
    }

    /// Is there room for an entry with this name? Ask before counting a look-up.
    pub fn fits(&self, name: &[u8]) -> bool {
        let head = if self.plus { ENTRY_BYTES + DIRENT_BYTES } else { DIRENT_BYTES };
        self.page.len() + (head + name.len()).next_multiple_of(8) <= self.size
    }

    /// Adds an entry; false (and nothing added) when the page is full. `next_offset` is where the next page starts if this is the last
    /// entry of this one. Without [`DirReply::plus`] only the number and the type of `entry.attr` are used. `.` and `..` are sent
    /// without a node, as the kernel wants it, so they never count as look-ups.
    pub fn add(&mut self, name: &[u8], next_offset: u64, entry: &EntryOut) -> bool {
        if !self.fits(name) {
            return false;
        }
        if self.plus {
            let node = if matches!(name, b"." | b"..") { 0 } else { entry.node };
            encode::entry(&mut self.page, &EntryOut { node, ..*entry });
        }
        encode::dirent(&mut self.page, entry.attr.ino, next_offset, entry.attr.mode, name);
        true
    }

    /// Sends the page; an empty one is the end of the directory.
    pub fn finish(self) {
        self.slot.bytes(&self.page);
    }

    /// Refuses; entries added so far are not sent.
    pub fn error(self, errno: Errno) {
        self.slot.error(errno);
    }
}
