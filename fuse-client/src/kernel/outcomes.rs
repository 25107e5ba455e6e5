//! Requests that must not be done twice: what was begun, and how it ended, written down outside this process before the kernel is told.
//!
//! The kernel resends what was taken and not answered to whoever adopts the connection. Most requests may as well be done again. One that may not is written down when it is about to be
//! done ([`Outcomes::begin`]) and again with its answer before that is sent: a successor that gets it again finds the answer, and gives it; or finds that it was begun, and has to look
//! at the origin.
//!
//! A kernel without RESEND (before Linux 6.9) sends nothing again, so there every request is written down when it is taken ([`Outcomes::note_all`]): the successor ends those that are
//! left ([`Outcomes::unanswered`]), which would hang for ever. A request that died with its process between the read from the connection and that is lost.
//!
//! ```text
//! file     slots of 1024 bytes, in memory (memfd); a request under way has one
//! slot     unique u64, state u8 (0 over, 1 begun, 2 done, 3 taken), 3 bytes, errno i32, length u32, bytes: of what was begun, or of the answer
//! ```
//! Integers are little-endian. One `pwrite` inside a page is whole or not there, whenever the process is killed.

use super::metrics::Op;
use efc_common::{Error, Kind, Result};
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

const SLOT_BYTES: usize = 1024;
const HEAD_BYTES: usize = 20;
const OVER: u8 = 0;
const BEGUN: u8 = 1;
const DONE: u8 = 2;
const TAKEN: u8 = 3;
/// Longest text of a slot, bytes.
const TEXT_BYTES_MAX: usize = SLOT_BYTES - HEAD_BYTES;
/// Slots that a file can have.
const SLOTS_MAX: u64 = 1 << 20;

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Done {
    /// 0: well.
    pub(super) errno: i32,
    /// The answer's payload.
    pub(super) payload: Vec<u8>,
}

#[derive(Default)]
struct Slots {
    free: Vec<u64>,
    count: u64,
    /// Slot of each request that was begun.
    of: HashMap<u64, u64>,
    /// Those of them that were begun by the predecessor, and have not come again.
    inherited: HashSet<u64>,
}

/// See the module.
pub struct Outcomes {
    file: File,
    slots: Mutex<Slots>,
    /// What the predecessor had begun, by request.
    begun: HashMap<u64, Vec<u8>>,
    done: Mutex<HashMap<u64, Done>>,
    /// What it had taken and not begun.
    taken: Vec<u64>,
    resent: Resent,
    /// Is every request written down?
    all: AtomicBool,
}

/// Requests that came a second time, since this process took over.
#[derive(Debug, Default)]
pub struct Resent {
    /// All of them.
    pub taken: AtomicU64,
    /// Answered as the predecessor would have.
    pub answered: AtomicU64,
    /// Begun by the predecessor: done again in doubt.
    pub in_doubt: AtomicU64,
}

impl std::fmt::Debug for Outcomes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outcomes").field("slots", &self.slots.lock().count).finish_non_exhaustive()
    }
}

impl Outcomes {
    /// A new file; with what is in the one that a predecessor left. That stays as it is until somebody else holds the new one.
    ///
    /// # Errors
    /// When there is no memory for it, or what was left cannot be read.
    pub fn new(left: Option<&File>) -> Result<Outcomes> {
        let fd =
            rustix::fs::memfd_create("efc-outcomes", rustix::fs::MemfdFlags::CLOEXEC).map_err(std::io::Error::from)?;
        let this = Outcomes {
            file: File::from(fd),
            slots: Mutex::default(),
            begun: HashMap::new(),
            done: Mutex::default(),
            taken: Vec::new(),
            resent: Resent::default(),
            all: AtomicBool::new(false),
        };
        match left {
            Some(left) => this.resume(left),
            None => Ok(this),
        }
    }

    fn resume(mut self, left: &File) -> Result<Outcomes> {
        let length = usize::try_from(left.metadata()?.len()).unwrap_or(usize::MAX);
        if length as u64 > SLOTS_MAX * SLOT_BYTES as u64 {
            return Err(Error::new(Kind::Corrupt, "outcomes of the predecessor: too many"));
        }
        let mut bytes = vec![0; length];
        left.read_exact_at(&mut bytes, 0)?;
        for slot in bytes.chunks(SLOT_BYTES) {
            let Some((unique, state, errno, text)) = parse(slot) else { continue };
            // Not only for us: this process may die as well before the request has come again.
            self.write(unique, state, errno, text)?;
            self.slots.lock().inherited.insert(unique);
            match state {
                BEGUN => drop(self.begun.insert(unique, text.to_vec())),
                TAKEN => self.taken.push(unique),
                _ => drop(self.done.lock().insert(unique, Done { errno, payload: text.to_vec() })),
            }
        }
        Ok(self)
    }

    /// From now on every request is written down when it is taken.
    pub(super) fn note_all(&self) {
        self.all.store(true, Relaxed);
    }

    /// May there be something of a request of this kind?
    pub(super) fn knows(&self, op: Op) -> bool {
        op.may_be_once() || self.all.load(Relaxed)
    }

    /// A request was taken. Nothing unless all are written down.
    pub(super) fn taken(&self, unique: u64) {
        if self.all.load(Relaxed)
            && let Err(e) = self.write(unique, TAKEN, 0, &[])
        {
            tracing::error!(error = %e, "a request cannot be written down; after a crash at this moment it would hang");
        }
    }

    /// How to end each request that the predecessor did not answer, on a kernel that does not send them again: as it would have; with EIO what it had begun, which may have been
    /// done; with EINTR the rest.
    pub(super) fn unanswered(&self) -> Vec<(u64, Done)> {
        let refuse = |errno| Done { errno, payload: Vec::new() };
        let done = std::mem::take(&mut *self.done.lock()).into_iter();
        let begun = self.begun.keys().map(|unique| (*unique, refuse(libc::EIO)));
        let taken = self.taken.iter().map(|unique| (*unique, refuse(libc::EINTR)));
        done.chain(begun).chain(taken).collect()
    }

    /// The file, to be held by somebody else as well.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// What the predecessor was about to do for requests that it has not answered: the number of each, and what it said when it began.
    pub fn left_open(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.begun.iter().map(|(unique, text)| (*unique, &text[..]))
    }

    /// What the predecessor said when it began this request, if it did.
    pub fn begun_before(&self, unique: u64) -> Option<&[u8]> {
        let text = self.begun.get(&unique)?;
        self.resent.in_doubt.fetch_add(1, Relaxed);
        Some(text)
    }

    /// The first eight bytes of every answer that the predecessor has not given: of one that gives a node that is its number.
    pub fn first_words(&self) -> HashSet<u64> {
        let done = self.done.lock();
        done.values().filter_map(|d| d.payload.first_chunk()).map(|bytes| u64::from_ne_bytes(*bytes)).collect()
    }

    /// How much came a second time.
    pub fn resent(&self) -> &Resent {
        &self.resent
    }

    /// Request `unique` is about to be done; `what`, at most about 1000 bytes, is for a successor.
    ///
    /// # Errors
    /// Those of the file: want of memory.
    pub fn begin(&self, unique: u64, what: &[u8]) -> Result<()> {
        if what.len() > TEXT_BYTES_MAX {
            return Err(Error::new(Kind::Invalid, "too long to be written down"));
        }
        self.slots.lock().inherited.remove(&unique);
        self.write(unique, BEGUN, 0, what)
    }

    /// What the predecessor left and has not come again until now will not come: it was answered, or who asked is gone.
    pub fn forget_left(&self) {
        let left = std::mem::take(&mut self.slots.lock().inherited);
        for unique in left {
            self.done.lock().remove(&unique);
            if let Err(e) = self.write(unique, OVER, 0, &[]) {
                tracing::debug!(error = %e, "an old outcome stays");
            }
            self.answered(unique);
        }
    }

    /// Its answer is about to be sent. Nothing if it was not begun.
    pub(super) fn finish(&self, unique: u64, errno: i32, payload: &[IoSlice<'_>]) {
        if !self.slots.lock().of.contains_key(&unique) {
            return;
        }
        let text: Vec<u8> = payload.iter().flat_map(|p| p.iter().copied()).collect();
        let outcome = if text.len() > TEXT_BYTES_MAX {
            Err(Error::new(Kind::Invalid, "an answer is too long to be written down"))
        } else {
            self.write(unique, DONE, errno, &text)
        };
        if let Err(e) = outcome {
            tracing::error!(error = %e, "an outcome cannot be written down; after a crash at this moment it would be looked for at the origin");
        }
    }

    /// Its answer was sent.
    pub(super) fn answered(&self, unique: u64) {
        if self.all.load(Relaxed) && self.slots.lock().of.contains_key(&unique) {
            // What stands there now would be ended a second time, when its number may be another's.
            if let Err(e) = self.write(unique, OVER, 0, &[]) {
                tracing::debug!(error = %e, "an old outcome stays");
            }
        }
        let mut slots = self.slots.lock();
        slots.inherited.remove(&unique);
        if let Some(slot) = slots.of.remove(&unique) {
            slots.free.push(slot);
        }
    }

    /// The answer that the predecessor had for a request, which is given once.
    pub(super) fn take(&self, unique: u64) -> Option<Done> {
        let done = self.done.lock().remove(&unique)?;
        self.resent.answered.fetch_add(1, Relaxed);
        Some(done)
    }

    fn write(&self, unique: u64, state: u8, errno: i32, text: &[u8]) -> Result<()> {
        let slot = {
            let mut slots = self.slots.lock();
            match slots.of.get(&unique) {
                Some(slot) => *slot,
                None => {
                    let slot = slots.free.pop().unwrap_or_else(|| {
                        slots.count += 1;
                        slots.count - 1
                    });
                    slots.of.insert(unique, slot);
                    slot
                }
            }
        };
        let mut bytes = Vec::with_capacity(HEAD_BYTES + text.len());
        bytes.extend(unique.to_le_bytes());
        bytes.extend([state, 0, 0, 0]);
        bytes.extend(errno.to_le_bytes());
        bytes.extend((text.len() as u32).to_le_bytes());
        bytes.extend(text);
        Ok(self.file.write_all_at(&bytes, slot * SLOT_BYTES as u64)?)
    }
}

/// A slot in use: number, state, errno, text.
fn parse(slot: &[u8]) -> Option<(u64, u8, i32, &[u8])> {
    let (unique, rest) = slot.split_first_chunk()?;
    let (state, rest) = rest.split_first_chunk::<4>()?;
    let (errno, rest) = rest.split_first_chunk()?;
    let (length, rest) = rest.split_first_chunk()?;
    let text = rest.get(..u32::from_le_bytes(*length) as usize)?;
    let state = state[0];
    matches!(state, BEGUN | DONE | TAKEN)
        .then(|| (u64::from_le_bytes(*unique), state, i32::from_le_bytes(*errno), text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn left(outcomes: &Outcomes) -> File {
        outcomes.file.try_clone().expect("clone")
    }

    #[test]
    fn a_successor_knows_what_was_begun_and_what_was_done() {
        let a = Outcomes::new(None).expect("new");
        a.begin(2, b"two").expect("begin");
        a.begin(4, b"four").expect("begin");
        a.begin(6, b"six").expect("begin");
        a.finish(4, 0, &[IoSlice::new(b"an "), IoSlice::new(b"answer")]);
        a.finish(6, 17, &[]);
        a.answered(6);
        a.begin(8, b"eight").expect("in the slot of six");
        a.finish(10, 0, &[]);
        let b = Outcomes::new(Some(&left(&a))).expect("resume");
        let mut open: Vec<_> = b.left_open().collect();
        open.sort_unstable();
        assert_eq!(open, [(2, &b"two"[..]), (8, b"eight")]);
        assert_eq!(b.first_words(), HashSet::from([u64::from_ne_bytes(*b"an answe")]));
        assert_eq!(b.take(4), Some(Done { errno: 0, payload: b"an answer".to_vec() }));
        assert_eq!((b.take(4), b.take(6), b.take(10)), (None, None, None));
        // The successor dies as well, in the middle of what it was doing again.
        b.begin(2, b"again").expect("begin");
        b.finish(2, 0, &[IoSlice::new(b"done")]);
        let c = Outcomes::new(Some(&left(&b))).expect("resume");
        assert_eq!(c.take(2).map(|d| d.payload), Some(b"done".to_vec()));
        assert!(c.take(4).is_some() && c.begun_before(8).is_some() && c.begun_before(2).is_none());
        // What has come again is not forgotten, the rest is.
        c.begin(8, b"eight").expect("begin");
        c.forget_left();
        let d = Outcomes::new(Some(&left(&c))).expect("resume");
        assert_eq!(d.left_open().map(|(unique, _)| unique).collect::<Vec<_>>(), [8]);
        assert_eq!(d.take(2), None);
    }

    #[test]
    fn what_is_not_sent_again_is_ended() {
        let a = Outcomes::new(None).expect("new");
        a.taken(2);
        a.note_all();
        for unique in [4, 6, 8, 10] {
            a.taken(unique);
        }
        a.begin(6, b"six").expect("begin");
        a.begin(8, b"eight").expect("begin");
        a.finish(8, 0, &[IoSlice::new(b"done")]);
        a.answered(10);
        let b = Outcomes::new(Some(&left(&a))).expect("resume");
        let mut left: Vec<_> = b.unanswered().into_iter().map(|(u, d)| (u, d.errno, d.payload)).collect();
        left.sort_unstable();
        assert_eq!(left, [(4, libc::EINTR, vec![]), (6, libc::EIO, vec![]), (8, 0, b"done".to_vec())]);
    }

    #[test]
    fn slots_are_used_again() {
        let a = Outcomes::new(None).expect("new");
        for unique in 0..1000 {
            a.begin(unique, b"x").expect("begin");
            a.finish(unique, 0, &[]);
            a.answered(unique);
        }
        assert!(a.file.metadata().expect("length").len() <= SLOT_BYTES as u64);
        assert!(a.begin(1, &[0; SLOT_BYTES]).is_err_and(|e| e.is(Kind::Invalid)));
    }

    proptest! {
        #[test]
        fn garbage_is_no_slot(bytes in proptest::collection::vec(any::<u8>(), 0..SLOT_BYTES)) {
            let _ = parse(&bytes);
        }
    }
}
