//! Advisory locks: ranges of a file that an owner has locked, and the words in which sessions and masters speak of them.
//!
//! A session does not say what it does but what it *has*: a [`LockState`] of one owner and file replaces the one before it. So each may be
//! said again or be lost, and what a session gives up needs no word of its own. `master/src/lock` decides, `fuse-client/src/lock` asks.
//!
//! Semantics: POSIX record locks (IEEE Std 1003.1, `fcntl`), for all kinds: a new lock takes the place of what the same owner had there, and
//! `flock` is a lock on the whole file, as over NFS.

use crate::id::SourceId;
use crate::{Error, Kind, Result};
use bytes::Bytes;
use std::fmt;

/// Longest name of a file, source included.
pub const LOCK_FILE_BYTES_MAX: usize = 4096 + 16;
/// Ranges and wants that one owner may have of one file.
pub const LOCKS_MAX: usize = 4096;

/// A file that can be locked: its source, then what stays the same as long as it is this file.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LockFile(Bytes);

impl LockFile {
    /// The file that `identity` names in `source`.
    ///
    /// # Errors
    /// [`Kind::NameTooLong`] over [`LOCK_FILE_BYTES_MAX`].
    pub fn new(source: SourceId, identity: &[u8]) -> Result<LockFile> {
        LockFile::from_bytes([&source.0[..], identity].concat().into())
    }

    /// Reads what [`LockFile::as_bytes`] gave.
    ///
    /// # Errors
    /// [`Kind::NameTooLong`] over [`LOCK_FILE_BYTES_MAX`].
    pub fn from_bytes(bytes: Bytes) -> Result<LockFile> {
        if bytes.len() > LOCK_FILE_BYTES_MAX {
            return Err(Error::new(Kind::NameTooLong, "the name of a locked file is too long"));
        }
        Ok(LockFile(bytes))
    }

    /// For the wire.
    pub fn as_bytes(&self) -> &Bytes {
        &self.0
    }
}

impl fmt::Debug for LockFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

/// Who locks, within its session: a process, or an open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LockOwner(pub u64);

/// One lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lock {
    /// First byte.
    pub start: u64,
    /// Last byte, not before the first.
    pub end: u64,
    /// Against all others, not only against exclusive ones.
    pub exclusive: bool,
}

impl Lock {
    /// May two owners have these at once?
    pub fn conflicts(&self, other: &Lock) -> bool {
        (self.exclusive || other.exclusive) && self.start <= other.end && other.start <= self.end
    }
}

/// The locks of one owner on one file: in order, none overlaps another, and neighbours that are alike are one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LockSet(Vec<Lock>);

impl LockSet {
    /// All of them.
    pub fn locks(&self) -> &[Lock] {
        &self.0
    }

    /// None?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Locks a range, in place of what was locked there.
    pub fn set(&mut self, lock: Lock) {
        self.clear(lock.start, lock.end);
        let at = self.0.partition_point(|l| l.end < lock.start);
        self.0.insert(at, lock);
        self.join(at);
        if at > 0 {
            self.join(at - 1);
        }
    }

    /// Makes one of two neighbours that are alike.
    fn join(&mut self, at: usize) {
        if let Some((a, b)) = self.0.get(at).zip(self.0.get(at + 1))
            && a.exclusive == b.exclusive
            && a.end.checked_add(1) == Some(b.start)
        {
            self.0[at].end = b.end;
            self.0.remove(at + 1);
        }
    }

    /// Unlocks the bytes from `start` to `end`.
    pub fn clear(&mut self, start: u64, end: u64) {
        let mut kept = Vec::with_capacity(self.0.len() + 1);
        for l in &self.0 {
            if l.end < start || end < l.start {
                kept.push(*l);
                continue;
            }
            if l.start < start {
                kept.push(Lock { end: start - 1, ..*l });
            }
            if end < l.end {
                kept.push(Lock { start: end + 1, ..*l });
            }
        }
        self.0 = kept;
    }

    /// The first lock that stands against `lock` of another owner.
    pub fn against(&self, lock: &Lock) -> Option<Lock> {
        self.0.iter().find(|l| l.conflicts(lock)).copied()
    }

    /// What of `lock` is locked, and no more strictly than it says.
    pub fn parts_of(&self, lock: Lock) -> impl Iterator<Item = Lock> {
        self.0.iter().filter(move |l| l.start <= lock.end && lock.start <= l.end).map(move |l| Lock {
            start: l.start.max(lock.start),
            end: l.end.min(lock.end),
            exclusive: l.exclusive && lock.exclusive,
        })
    }
}

/// What becomes of a want that cannot be met at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// It was only a question, also if it can be met.
    Test,
    /// It is denied.
    Try,
    /// It waits.
    Wait,
}

/// A lock that is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LockWant {
    /// The session's own number for it, used once.
    pub id: u64,
    /// What.
    pub lock: Lock,
    /// For how long.
    pub patience: Patience,
}

/// All that an owner has and wants of a file. What it had or wanted before and is not named is given up. A want that has been
/// granted stays named until the session has heard of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockState {
    /// Which file.
    pub file: LockFile,
    /// Whose.
    pub owner: LockOwner,
    /// The owner's process, for those who ask who stands against them; 0 if unknown.
    pub pid: u32,
    /// Counts the states of this owner and file.
    pub version: u64,
    /// What it has, as far as the session has heard.
    pub held: Vec<Lock>,
    /// What it wants.
    pub wants: Vec<LockWant>,
}

/// What became of a want.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is held now; a test: nothing stands against it.
    Granted,
    /// Another owner's lock stands against it.
    Denied {
        /// Which.
        by: Lock,
        /// Of this process, if it is one of the same session; else 0.
        pid: u32,
    },
    /// To wait for it would be to wait for oneself.
    Deadlock,
    /// Too much is held or waited for.
    TooMany,
}

/// What a master says about locks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LockTell {
    /// A state was taken up.
    Heard {
        /// Which file.
        file: LockFile,
        /// Whose.
        owner: LockOwner,
        /// Which state.
        version: u64,
    },
    /// A want is settled.
    Settled {
        /// Of which file.
        file: LockFile,
        /// Whose.
        owner: LockOwner,
        /// Which.
        id: u64,
        /// How.
        verdict: Verdict,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn lock() -> impl Strategy<Value = Lock> {
        (0u64..20, 0u64..20, any::<bool>()).prop_map(|(a, b, exclusive)| Lock {
            start: a.min(b),
            end: a.max(b),
            exclusive,
        })
    }

    proptest! {
        #[test]
        fn a_set_is_what_each_byte_says(steps in vec((lock(), any::<bool>()), 0..30), probe in lock()) {
            let (mut set, mut bytes) = (LockSet::default(), [None; 20]);
            for (lock, clear) in steps {
                let range = lock.start as usize..=lock.end as usize;
                if clear {
                    set.clear(lock.start, lock.end);
                    bytes[range].fill(None);
                } else {
                    set.set(lock);
                    bytes[range].fill(Some(lock.exclusive));
                }
            }
            let mut said = [None; 20];
            for l in set.locks() {
                prop_assert!(said[l.start as usize..=l.end as usize].iter().all(Option::is_none), "overlap");
                said[l.start as usize..=l.end as usize].fill(Some(l.exclusive));
            }
            prop_assert_eq!(said, bytes);
            prop_assert!(set.locks().windows(2).all(|w| w[0].end + 1 < w[1].start || w[0].exclusive != w[1].exclusive));
            let under = &bytes[probe.start as usize..=probe.end as usize];
            let against = under.iter().flatten().any(|x| *x || probe.exclusive);
            prop_assert_eq!(set.against(&probe).is_some(), against);
            let mut parts = [None; 20];
            for l in set.parts_of(probe) {
                parts[l.start as usize..=l.end as usize].fill(Some(l.exclusive));
            }
            for (at, part) in (0..).zip(parts) {
                let within = probe.start <= at && at <= probe.end;
                prop_assert_eq!(part, bytes[at as usize].filter(|_| within).map(|x| x && probe.exclusive));
            }
        }
    }

    #[test]
    fn the_end_of_the_file_is_the_last_byte_there_can_be() {
        let mut set = LockSet::default();
        set.set(Lock { start: 0, end: u64::MAX, exclusive: true });
        set.clear(10, 19);
        assert_eq!(set.locks().len(), 2);
        set.set(Lock { start: 10, end: 19, exclusive: true });
        assert_eq!(set.locks(), [Lock { start: 0, end: u64::MAX, exclusive: true }]);
        set.clear(0, u64::MAX);
        assert!(set.is_empty());
    }
}
