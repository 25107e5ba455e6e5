//! What a tier hands out: [`Segment`], a guard over the bytes of one stored segment. While one exists the slot under it is neither
//! punched nor reused, so a read or a `sendfile` that is under way sees the bytes it began with even when the entry has been
//! evicted meanwhile. The last guard of a forgotten entry does no I/O: it only puts the slot on the slab's freed list.

use std::fmt;
use std::fs::File;
use std::ops::{Deref, Range};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use efc_common::block::{GRANULE_BYTES, GRANULES_PER_SEGMENT, SEGMENT_BYTES};
use efc_common::checksum::crc32c;
use efc_common::id::SegmentKey;
use efc_common::{Error, Kind, Result};
use efc_proto::data;
use efc_proto::shared::Seals;
use parking_lot::Mutex;

use super::slab::Slab;
use super::whole::WholeFile;

/// Where a segment's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tier {
    /// The memory tier (memfd or a file on tmpfs).
    Memory,
    /// The disk tier with this position in [`super::StoreConfig::disks`].
    Disk(u16),
}

impl Tier {
    /// `memory` or `disk`: the metric label.
    pub fn label(self) -> &'static str {
        match self {
            Tier::Memory => "memory",
            Tier::Disk(_) => "disk",
        }
    }
}

/// A memory tier as it is shared with clients of this host; see [`efc_proto::shared`].
pub(super) struct Share {
    pub(super) seals: Seals,
    /// For reading: the data file, the seals' file, and the file of whole segments if there is one.
    pub(super) files: Vec<OwnedFd>,
}

/// What a slab and all entries in it have in common. Entries hold it, it does not hold entries: no cycle.
pub(super) struct Shared {
    pub(super) tier: Tier,
    pub(super) data: File,
    /// Where the odd slots are, if not in `data`.
    pub(super) whole: Option<WholeFile>,
    pub(super) share: Option<Share>,
    /// Slots whose last guard is gone and that are not punched yet. Taken after the slab's state lock, never before it.
    pub(super) freed: Mutex<Vec<Freed>>,
    /// Failures of the file system since the last success.
    pub(super) errors: AtomicU32,
    pub(super) slab: Weak<Slab>,
}

impl Shared {
    /// The file that a slot is in, at [`slot_offset`].
    pub(super) fn file(&self, slot: u32) -> &File {
        self.whole.as_ref().filter(|_| WholeFile::has(slot)).map_or(&self.data, WholeFile::file)
    }
}

/// A slot to be punched.
pub(super) struct Freed {
    pub(super) slot: u32,
    pub(super) len: u32,
    pub(super) in_limbo: bool,
}

/// One stored segment. The slab's table holds one reference while the entry can be found; each guard holds one more.
pub(super) struct Entry {
    shared: Arc<Shared>,
    pub(super) key: SegmentKey,
    pub(super) slot: u32,
    pub(super) len: u32,
    /// The store's clock, milliseconds; 0 = never.
    pub(super) expires_ms: u64,
    sums: [u32; GRANULES_PER_SEGMENT],
    pub(super) pinned: AtomicBool,
    /// A disk entry that was hit before: the next hit may promote it.
    pub(super) hit_before: AtomicBool,
    /// In memory: a disk has been asked to take a copy. On disk: it waits to be copied to memory.
    pub(super) offered: AtomicBool,
    /// In memory: the disk that was asked has its copy, or will not have one.
    pub(super) settled: AtomicBool,
    /// Forgotten by the table while a guard existed.
    pub(super) in_limbo: AtomicBool,
    /// Every granule is known to match its checksum: written by this process, or verified since.
    verified: AtomicBool,
}

/// What the table needs to make an entry.
pub(super) struct NewEntry<'a> {
    pub(super) key: SegmentKey,
    pub(super) slot: u32,
    pub(super) len: u32,
    pub(super) expires_ms: u64,
    pub(super) sums: &'a [u32],
    pub(super) pinned: bool,
    pub(super) verified: bool,
}

impl Entry {
    pub(super) fn new(shared: &Arc<Shared>, n: NewEntry<'_>) -> Self {
        let mut sums = [0; GRANULES_PER_SEGMENT];
        sums[..n.sums.len()].copy_from_slice(n.sums);
        Entry {
            shared: shared.clone(),
            key: n.key,
            slot: n.slot,
            len: n.len,
            expires_ms: n.expires_ms,
            sums,
            pinned: AtomicBool::new(n.pinned),
            hit_before: AtomicBool::new(false),
            offered: AtomicBool::new(false),
            settled: AtomicBool::new(false),
            in_limbo: AtomicBool::new(false),
            verified: AtomicBool::new(n.verified),
        }
    }

    pub(super) fn sums(&self) -> &[u32] {
        &self.sums[..sum_count(self.len)]
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let freed = Freed { slot: self.slot, len: self.len, in_limbo: *self.in_limbo.get_mut() };
        self.shared.freed.lock().push(freed);
    }
}

/// Checksums that a segment of `len` bytes has.
pub(super) fn sum_count(len: u32) -> usize {
    len.div_ceil(GRANULE_BYTES) as usize
}

/// File offset of a slot.
pub(super) fn slot_offset(slot: u32) -> u64 {
    slot as u64 * SEGMENT_BYTES as u64
}

/// A stored segment, and a guard over its bytes: they stay readable until the last clone is dropped, even if the store forgets
/// the entry meanwhile. Hold it for the length of one answer, not longer: its room cannot be reused before.
#[derive(Clone)]
pub struct Segment {
    pub(super) entry: Arc<Entry>,
}

impl Segment {
    /// The key it is stored under.
    pub fn key(&self) -> SegmentKey {
        self.entry.key
    }

    /// Length in bytes, at least 1.
    #[allow(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> u32 {
        self.entry.len
    }

    /// One CRC-32C per 16 KiB granule, the last granule may be short.
    pub fn sums(&self) -> &[u32] {
        self.entry.sums()
    }

    /// Where the bytes are.
    pub fn tier(&self) -> Tier {
        self.entry.shared.tier
    }

    /// Is it exempt from eviction?
    pub fn pinned(&self) -> bool {
        self.entry.pinned.load(Relaxed)
    }

    /// The file that holds the bytes and the offset of the first one: for `sendfile` and `pread` while this guard lives.
    /// Whoever sends from here sends unchecked bytes: see [`Segment::sendable`].
    pub fn file(&self) -> (BorrowedFd<'_>, u64) {
        (self.entry.shared.file(self.entry.slot).as_fd(), slot_offset(self.entry.slot))
    }

    /// Where a client of this host finds the bytes, if the tier is shared and they are known to be right.
    pub fn place(&self) -> Option<data::Place> {
        let share = self.entry.shared.share.as_ref().filter(|_| self.sendable())?;
        let slot = self.entry.slot as u64;
        // Stable as long as this guard lives.
        let seal = share.seals.get(slot)?;
        Some(data::Place { at: slot_offset(self.entry.slot), seal, len: self.len(), sums: self.sums().to_vec() })
    }

    /// May the bytes leave by `sendfile` without being looked at? True in the memory tier when this process wrote them or has
    /// verified them whole since it started. A disk can change what it holds, so there it is always false: use
    /// [`Segment::read`].
    pub fn sendable(&self) -> bool {
        self.tier() == Tier::Memory && self.entry.verified.load(Relaxed)
    }

    /// Reads `range` of the segment (blocking) and verifies every granule it touches.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a range outside the segment. [`Kind::Corrupt`] when a checksum does not match: the segment is
    /// dropped from the store and counted. [`Kind::Io`] and the like when the disk fails; counted against the disk. The
    /// caller treats the last two as a miss.
    pub fn read(&self, range: Range<u32>) -> Result<Bytes> {
        let mut out = Vec::new();
        let start = self.read_into(range.clone(), &mut out)?;
        Ok(Bytes::from(out).slice(start..start + range.len()))
    }

    /// As [`Segment::read`], but the granules that `range` touches take the place of what `out` holds; returns where in `out` the
    /// range begins.
    ///
    /// # Errors
    /// As [`Segment::read`].
    pub(super) fn read_into(&self, range: Range<u32>, out: &mut Vec<u8>) -> Result<usize> {
        let e = self.entry.deref();
        if range.start > range.end || range.end > e.len {
            return Err(Error::new(Kind::Invalid, "range outside the segment")
                .with("range", format!("{}..{}", range.start, range.end))
                .with("bytes", e.len));
        }
        out.clear();
        if range.is_empty() {
            return Ok(0);
        }
        let first = range.start / GRANULE_BYTES;
        let wide = first * GRANULE_BYTES..range.end.next_multiple_of(GRANULE_BYTES).min(e.len);
        if let Err(io) = self.pread(wide.clone(), out) {
            return Err(self.failed(io));
        }
        let mut bad = out.len() != wide.len();
        for (chunk, want) in out.chunks(GRANULE_BYTES as usize).zip(&e.sums[first as usize..]) {
            bad |= crc32c(chunk) != *want;
        }
        if bad {
            return Err(self.corrupt());
        }
        if e.shared.errors.load(Relaxed) != 0 {
            e.shared.errors.store(0, Relaxed);
        }
        if wide == (0..e.len) {
            e.verified.store(true, Relaxed);
        }
        Ok((range.start - wide.start) as usize)
    }

    /// Appends the bytes of `range` to the empty `out`; fewer only when the file ends early.
    fn pread(&self, range: Range<u32>, out: &mut Vec<u8>) -> std::io::Result<()> {
        let (file, start) = self.file();
        out.reserve_exact(range.len());
        while out.len() < range.len() {
            let at = start + range.start as u64 + out.len() as u64;
            // The capacity may be larger than asked for: what lies past the range is cut off below.
            match rustix::io::pread(file, rustix::buffer::spare_capacity(out), at) {
                Ok(0) => break,
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        out.truncate(range.len());
        Ok(())
    }

    fn corrupt(&self) -> Error {
        if let Some(slab) = self.entry.shared.slab.upgrade() {
            slab.drop_corrupt(&self.entry);
        }
        Error::new(Kind::Corrupt, "cached segment does not match its checksum; dropped")
            .with("tier", self.tier().label())
            .with("content", self.entry.key.content)
            .with("segment", self.entry.key.index)
    }

    fn failed(&self, io: std::io::Error) -> Error {
        if let Some(slab) = self.entry.shared.slab.upgrade() {
            slab.read_failed(&self.entry, &io);
        }
        Error::new(Kind::Io, "cache tier cannot be read").with("tier", self.tier().label()).caused_by(io)
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Segment")
            .field("key", &self.key())
            .field("len", &self.len())
            .field("tier", &self.tier())
            .finish()
    }
}
