//! The words in which masters and clients speak of leases: what can be leased, in which mode, and the messages of both sides.
//! The engines (`master/src/lease`, `fuse-client/src/lease`) decide by them; decision 0007 says why they are cut this way.
//!
//! All times are a [`Moment`] of one process' own monotonic clock and never cross the wire.

use crate::id::SourceId;
use crate::lock::LockState;
use crate::{Error, Kind, Result};
use bytes::Bytes;
use std::fmt;
use std::time::Duration;

/// A reading of a monotonic clock: time since a start that only its process knows.
pub type Moment = Duration;

/// Longest key of a directory or file at its origin, without the source id.
pub const KEY_BYTES_MAX: usize = 4096;
/// Bits of a [`GrantNumber`] below the term: at 100,000 grants a second one term has enough for four months.
const COUNTER_BITS: u32 = 40;
const SOURCE_BYTES: usize = 16;

/// What a lease permits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mode {
    /// To believe what was read.
    Shared,
    /// To believe it and to change it.
    Exclusive,
}

impl Mode {
    /// May two sessions hold these modes of one thing at once? Only shared goes with shared.
    pub fn compatible(self, other: Mode) -> bool {
        self == Mode::Shared && other == Mode::Shared
    }

    /// Does holding `self` serve who needs `need`?
    pub fn covers(self, need: Mode) -> bool {
        self >= need
    }
}

/// A directory anywhere: its source, then the bytes that find it there. Keys of one subtree are neighbours in their order, if the origin's keys are
/// paths (which then end in `/`, so that `a/` does not cover `ab/`).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DirKey(Bytes);

impl DirKey {
    /// The directory found by `key` in `source`.
    ///
    /// # Errors
    /// [`Kind::NameTooLong`] over [`KEY_BYTES_MAX`].
    pub fn new(source: SourceId, key: &[u8]) -> Result<Self> {
        DirKey::from_bytes([&source.0[..], key].concat().into())
    }

    /// Reads what [`DirKey::as_bytes`] gave.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if there is no source id, [`Kind::NameTooLong`] over the longest key.
    pub fn from_bytes(bytes: Bytes) -> Result<Self> {
        match bytes.len() {
            0..SOURCE_BYTES => Err(Error::new(Kind::Invalid, "a directory's key begins with its source")),
            n if n > SOURCE_BYTES + KEY_BYTES_MAX => {
                Err(Error::new(Kind::NameTooLong, "a directory's key is too long"))
            }
            _ => Ok(DirKey(bytes)),
        }
    }

    /// Source id and key in one, for the wire.
    pub fn as_bytes(&self) -> &Bytes {
        &self.0
    }

    /// Is this directory in the subtree that begins with `prefix`?
    pub fn is_in(&self, prefix: &DirKey) -> bool {
        self.0.starts_with(&prefix.0)
    }
}

impl fmt::Debug for DirKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0[SOURCE_BYTES..].escape_ascii())
    }
}

/// A file in its directory: bytes that stay the same as long as it is this file there.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileKey(Bytes);

impl FileKey {
    /// The file found by these bytes.
    ///
    /// # Errors
    /// [`Kind::NameTooLong`] over [`KEY_BYTES_MAX`].
    pub fn new(bytes: Bytes) -> Result<Self> {
        if bytes.len() > KEY_BYTES_MAX {
            return Err(Error::new(Kind::NameTooLong, "a file's key is too long"));
        }
        Ok(FileKey(bytes))
    }

    /// The bytes, for the wire.
    pub fn as_bytes(&self) -> &Bytes {
        &self.0
    }
}

impl fmt::Debug for FileKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

/// What one lease covers.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// A directory's names, and attributes and content of its direct children but for the grant's exceptions.
    Dir(DirKey),
    /// Attributes and content of one file. Wanted: of this file, however it is covered. Held: the file was split off its directory.
    File(DirKey, FileKey),
    /// Everything whose key begins so, against all other sessions; always exclusive.
    Subtree(DirKey),
}

impl Scope {
    /// The directory (or prefix) it belongs to.
    pub fn dir(&self) -> &DirKey {
        match self {
            Scope::Dir(d) | Scope::File(d, _) | Scope::Subtree(d) => d,
        }
    }
}

/// A scope in a mode: what an operation needs and what a session asks for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Want {
    /// What.
    pub scope: Scope,
    /// How. A subtree is always wanted exclusively.
    pub mode: Mode,
}

impl Want {
    /// To read the names of a directory and what is in it.
    pub fn read(dir: DirKey) -> Want {
        Want { scope: Scope::Dir(dir), mode: Mode::Shared }
    }

    /// To change names in a directory.
    pub fn change(dir: DirKey) -> Want {
        Want { scope: Scope::Dir(dir), mode: Mode::Exclusive }
    }

    /// To read one file.
    pub fn read_file(dir: DirKey, file: FileKey) -> Want {
        Want { scope: Scope::File(dir, file), mode: Mode::Shared }
    }

    /// To change one file.
    pub fn change_file(dir: DirKey, file: FileKey) -> Want {
        Want { scope: Scope::File(dir, file), mode: Mode::Exclusive }
    }

    /// To move everything below a prefix.
    pub fn subtree(prefix: DirKey) -> Want {
        Want { scope: Scope::Subtree(prefix), mode: Mode::Exclusive }
    }
}

/// Numbers grants in the order in which they were given, over all leaders: the leader's term, then a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct GrantNumber(pub u64);

impl GrantNumber {
    /// Below all numbers of a term.
    pub fn before(term: u64) -> GrantNumber {
        GrantNumber(term << COUNTER_BITS)
    }

    /// The term of the leader that gave it.
    pub fn term(self) -> u64 {
        self.0 >> COUNTER_BITS
    }

    /// The one after it, of the same term.
    ///
    /// # Panics
    /// When a term has no number left: the process ends, and the next leader has a new term.
    pub fn next(self) -> GrantNumber {
        let next = GrantNumber(self.0 + 1);
        assert!(next.term() == self.term(), "a term has run out of grant numbers");
        next
    }
}

/// Names a session's request, so that its answers find it. The session numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RequestId(pub u64);

/// What a session believes to hold, told to a new leader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// What.
    pub scope: Scope,
    /// How.
    pub mode: Mode,
    /// By which grant.
    pub number: GrantNumber,
    /// Of a directory: the files it does not believe.
    pub exceptions: Vec<FileKey>,
}

/// What a session says about leases. Each may be said again, arrive twice, late, or in another order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// Leases, please; each want is answered by itself.
    Acquire {
        /// For the answers.
        request: RequestId,
        /// What.
        wants: Vec<Want>,
    },
    /// Wants that are no longer waited for. A grant that was under way is to be released.
    Cancel {
        /// Which.
        wants: Vec<Want>,
    },
    /// "I believe nothing of this scope by any grant up to this number", or no more than shared.
    Release {
        /// What.
        scope: Scope,
        /// The highest number the session has seen for it.
        number: GrantNumber,
        /// It goes on believing.
        keep_shared: bool,
    },
    /// What the session believes, for the leader of `term`. Accepted claims are answered by grants.
    Reclaim {
        /// For the answers.
        request: RequestId,
        /// The leader that is meant; others do not listen.
        term: u64,
        /// A part of what is believed and not confirmed.
        claims: Vec<Claim>,
        /// Which part, from 0.
        part: usize,
        /// How many parts this request has. Only all of them are all that is believed.
        parts: usize,
        /// With part 0: all advisory locks of the session.
        locks: Vec<LockState>,
    },
}

/// Why a want was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// This life of the session is over.
    Fenced,
    /// The session is not known (here, yet).
    Unknown,
    /// Too many wait for it; ask later.
    QueueFull,
    /// The session or the cluster holds or waits for too much; give something back first.
    TooMany,
    /// A claim that another session's contradicts, or that came too late.
    Conflict,
}

/// What a master says to a session about leases.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tell {
    /// A lease, as long as the session lives and until it is recalled.
    Grant {
        /// Whose answer it is.
        request: RequestId,
        /// The scope that was asked for.
        asked: Scope,
        /// The scope that is granted: it may be the directory of the file that was asked for.
        scope: Scope,
        /// How.
        mode: Mode,
        /// Replaces lower numbers of the same scope.
        number: GrantNumber,
        /// Of a directory: the split files, which it does not cover.
        exceptions: Vec<FileKey>,
    },
    /// Give it back: release all grants of this scope up to this number. A file may be recalled out of its directory's lease.
    Recall {
        /// What.
        scope: Scope,
        /// By which grant.
        number: GrantNumber,
        /// Shared may be kept.
        keep_shared: bool,
    },
    /// A want or claim that is not granted and does not wait.
    Refuse {
        /// Whose answer it is.
        request: RequestId,
        /// The scope that was asked for.
        asked: Scope,
        /// Why.
        reason: Reason,
    },
}

/// The times that both sides must agree on.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// Silence after which a session is fenced, and what a new leader waits for claims.
    pub lease: Duration,
    /// How much earlier than that a client stops believing. Covers drift of clocks, and changes under way to the origin.
    pub margin: Duration,
    /// An exclusive lease is not recalled earlier.
    pub min_hold: Duration,
    /// After which an unanswered request or recall is said again.
    pub again: Duration,
    /// A session that does not answer a recall for so long is no longer renewed, however alive it is.
    pub patience: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Times {
            lease: Duration::from_secs(10),
            margin: Duration::from_secs(2),
            min_hold: Duration::from_millis(5),
            again: Duration::from_secs(1),
            patience: Duration::from_secs(30),
        }
    }
}

impl Times {
    /// How long a client believes, from when it sent a renewal that was answered.
    pub fn believe(&self) -> Duration {
        self.lease.saturating_sub(self.margin)
    }

    /// How often a session is renewed.
    pub fn renew(&self) -> Duration {
        self.lease / 3
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir(key: &str) -> DirKey {
        DirKey::new(SourceId([7; 16]), key.as_bytes()).unwrap()
    }

    #[test]
    fn only_shared_goes_with_shared() {
        use Mode::{Exclusive, Shared};
        let table = [(Shared, Shared, true), (Shared, Exclusive, false), (Exclusive, Exclusive, false)];
        for (a, b, together) in table {
            assert_eq!((a.compatible(b), b.compatible(a)), (together, together), "{a:?} {b:?}");
        }
        assert!(Exclusive.covers(Shared) && Shared.covers(Shared) && !Shared.covers(Exclusive));
    }

    #[test]
    fn a_subtree_is_a_range_of_keys() {
        let mut keys = ["a/", "a/b/", "a/b/c/", "a/bc/", "ab/", "b/"].map(dir);
        keys.sort();
        let below: Vec<_> = keys.iter().map(|k| k.is_in(&dir("a/b/"))).collect();
        assert_eq!(below, [false, true, true, false, false, false]);
        assert!(!DirKey::new(SourceId([8; 16]), b"a/b/").unwrap().is_in(&dir("a/")));
    }

    #[test]
    fn keys_have_bounds() {
        let source = SourceId([0; 16]);
        assert!(DirKey::new(source, &[0; KEY_BYTES_MAX]).is_ok());
        assert!(DirKey::new(source, &[0; KEY_BYTES_MAX + 1]).is_err_and(|e| e.is(Kind::NameTooLong)));
        assert!(DirKey::from_bytes(Bytes::from_static(b"short")).is_err_and(|e| e.is(Kind::Invalid)));
        assert!(FileKey::new(vec![0; KEY_BYTES_MAX + 1].into()).is_err());
    }

    #[test]
    fn numbers_increase_over_terms() {
        let old = GrantNumber::before(3).next().next();
        assert!(old < GrantNumber::before(4) && GrantNumber::before(4) < GrantNumber::before(4).next());
        assert_eq!((old.term(), GrantNumber::before(4).next().term()), (3, 4));
    }
}
