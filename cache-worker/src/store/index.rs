//! The record file beside a slab's data file: one fixed record per slot, so that a restart finds what the slab holds.
//! `docs/FORMATS.md` has the layout. Only the slab calls this.
//!
//! What must stay true: a record is written after the data it names and cleared before its slot is punched or reused. A process
//! killed at any point leaves either no record (the bytes are an orphan and are punched at the next start) or a record with its
//! bytes. After a power cut the two may disagree: the record has its own checksum, the data has one per granule, and what does
//! not match is dropped when it is read.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use efc_common::block::{GRANULE_BYTES, GRANULES_PER_SEGMENT, SEGMENT_BYTES};
use efc_common::checksum::crc32c;
use efc_common::error::Context;
use efc_common::id::{ContentId, SegmentKey};
use efc_common::{Error, Kind, Result};

use super::segment::sum_count;

/// Bytes before the first record.
const HEADER_BYTES: u64 = 4096;
/// Bytes of a record.
const RECORD_BYTES: usize = 128;
const MAGIC: [u8; 8] = *b"EFCSLAB1";
const STATE_LIVE: u8 = 1;
const FLAG_PINNED: u8 = 1;
/// Where a record's own checksum stands.
const CRC_AT: usize = RECORD_BYTES - 4;
/// Records read at once at start-up.
const BATCH: usize = 8192;

/// What a record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) key: SegmentKey,
    pub(super) len: u32,
    pub(super) pinned: bool,
    /// Grows with every insert into the slab: orders entries by age, and decides between two records of one key.
    pub(super) generation: u64,
    /// Unix time, milliseconds; 0 = never.
    pub(super) expires_ms: u64,
    pub(super) sums: [u32; GRANULES_PER_SEGMENT],
}

/// Bytes the file takes with records for `slots` slots.
pub(super) fn index_bytes(slots: u64) -> u64 {
    HEADER_BYTES + (slots * RECORD_BYTES as u64).next_multiple_of(4096)
}

/// An open record file, locked against other processes.
pub(super) struct Index {
    file: File,
}

/// What a record file held.
#[derive(Default)]
pub(super) struct Found {
    /// Live records by slot.
    pub(super) live: Vec<(u32, Record)>,
    /// Slots whose record was not zero and did not match its checksum.
    pub(super) damaged: Vec<u32>,
    /// The whole file was of another format, and was started afresh.
    pub(super) reset: bool,
}

impl Index {
    /// Opens or creates the file and reads every record.
    ///
    /// # Errors
    /// [`Kind::Busy`] when another process has it open, else what the file system says.
    pub(super) fn open(path: &Path) -> Result<(Self, Found)> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .context("open cache index")?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            Error::new(Kind::Busy, "cache directory is in use by another worker; give each its own")
                .with("index", path.display())
        })?;
        let index = Index { file };
        let mut found = Found::default();
        let len = index.file.metadata().context("stat cache index")?.len();
        if len == 0 || !index.header_fits()? {
            found.reset = len > 0;
            index.start_afresh()?;
        } else {
            index.read_all(len, &mut found)?;
        }
        Ok((index, found))
    }

    fn header() -> [u8; 28] {
        let mut h = [0; 28];
        h[..8].copy_from_slice(&MAGIC);
        h[8..12].copy_from_slice(&SEGMENT_BYTES.to_le_bytes());
        h[12..16].copy_from_slice(&GRANULE_BYTES.to_le_bytes());
        h[16..20].copy_from_slice(&(RECORD_BYTES as u32).to_le_bytes());
        let crc = crc32c(&h[..24]);
        h[24..].copy_from_slice(&crc.to_le_bytes());
        h
    }

    fn header_fits(&self) -> Result<bool> {
        let mut h = [0; 28];
        match self.file.read_exact_at(&mut h, 0) {
            Ok(()) => Ok(h == Self::header()),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
            Err(e) => Err(e).context("read cache index header"),
        }
    }

    fn start_afresh(&self) -> Result<()> {
        self.file.set_len(0).and_then(|()| self.file.set_len(HEADER_BYTES)).context("truncate cache index")?;
        self.file.write_all_at(&Self::header(), 0).context("write cache index header")
    }

    fn read_all(&self, len: u64, found: &mut Found) -> Result<()> {
        let slots = len.saturating_sub(HEADER_BYTES) / RECORD_BYTES as u64;
        let slots = slots.min(super::slab::SLOTS_MAX as u64) as u32;
        let mut buf = vec![0; BATCH * RECORD_BYTES];
        let mut slot = 0;
        while slot < slots {
            let n = ((slots - slot) as usize).min(BATCH);
            let batch = &mut buf[..n * RECORD_BYTES];
            self.file.read_exact_at(batch, record_offset(slot)).context("read cache index")?;
            for raw in batch.chunks_exact(RECORD_BYTES) {
                match decode(raw, slot) {
                    Some(Ok(record)) => found.live.push((slot, record)),
                    Some(Err(())) => found.damaged.push(slot),
                    None => {}
                }
                slot += 1;
            }
        }
        Ok(())
    }

    /// Writes a slot's record.
    pub(super) fn write(&self, slot: u32, record: &Record) -> std::io::Result<()> {
        self.file.write_all_at(&encode(record, slot), record_offset(slot))
    }

    /// Clears a slot's record.
    pub(super) fn clear(&self, slot: u32) -> std::io::Result<()> {
        self.file.write_all_at(&[0; RECORD_BYTES], record_offset(slot))
    }

    /// Cuts the file after `slots` records.
    pub(super) fn truncate(&self, slots: u32) -> std::io::Result<()> {
        self.file.set_len(record_offset(slots))
    }

    /// Marks a slot's record as pinned or not. A record that cannot be read back as live is left alone.
    pub(super) fn set_pinned(&self, slot: u32, pinned: bool) -> std::io::Result<()> {
        let mut raw = [0; RECORD_BYTES];
        self.file.read_exact_at(&mut raw, record_offset(slot))?;
        match decode(&raw, slot) {
            Some(Ok(record)) => self.write(slot, &Record { pinned, ..record }),
            _ => Ok(()),
        }
    }
}

impl Drop for Index {
    fn drop(&mut self) {
        // Unlocked by name: a child process that is between fork and exec holds a copy of the descriptor, and with it the lock.
        // Cannot fail on an open file, and closing it would unlock it in the end.
        let _ = rustix::fs::flock(&self.file, rustix::fs::FlockOperation::Unlock);
    }
}

fn record_offset(slot: u32) -> u64 {
    HEADER_BYTES + slot as u64 * RECORD_BYTES as u64
}

fn encode(r: &Record, slot: u32) -> [u8; RECORD_BYTES] {
    let mut b = [0; RECORD_BYTES];
    b[0] = STATE_LIVE;
    b[1] = if r.pinned { FLAG_PINNED } else { 0 };
    b[4..8].copy_from_slice(&r.len.to_le_bytes());
    b[8..24].copy_from_slice(&r.key.content.0);
    b[24..28].copy_from_slice(&r.key.index.to_le_bytes());
    b[28..32].copy_from_slice(&slot.to_le_bytes());
    b[32..40].copy_from_slice(&r.generation.to_le_bytes());
    b[40..48].copy_from_slice(&r.expires_ms.to_le_bytes());
    for (to, sum) in b[48..112].chunks_exact_mut(4).zip(&r.sums) {
        to.copy_from_slice(&sum.to_le_bytes());
    }
    let crc = crc32c(&b[..CRC_AT]);
    b[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    b
}

/// `None` for an empty record, `Some(Err)` for one that is damaged.
fn decode(b: &[u8], slot: u32) -> Option<std::result::Result<Record, ()>> {
    if b.iter().all(|x| *x == 0) {
        return None;
    }
    let u32_at = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
    let u64_at = |at: usize| u32_at(at) as u64 | (u32_at(at + 4) as u64) << 32;
    let len = u32_at(4);
    let sound = b[0] == STATE_LIVE && u32_at(CRC_AT) == crc32c(&b[..CRC_AT]) && u32_at(28) == slot;
    if !sound || !(1..=SEGMENT_BYTES).contains(&len) {
        return Some(Err(()));
    }
    let mut content = ContentId::default();
    content.0.copy_from_slice(&b[8..24]);
    let mut sums = [0; GRANULES_PER_SEGMENT];
    for (i, sum) in sums.iter_mut().enumerate().take(sum_count(len)) {
        *sum = u32_at(48 + 4 * i);
    }
    Some(Ok(Record {
        key: SegmentKey { content, index: u32_at(24) },
        len,
        pinned: b[1] & FLAG_PINNED != 0,
        generation: u64_at(32),
        expires_ms: u64_at(40),
        sums,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn records_round_trip_and_any_flipped_bit_is_found(
            content: [u8; 16], index: u32, len in 1u32..=SEGMENT_BYTES, pinned: bool, generation: u64, expires_ms: u64,
            seed: u32, slot in 0u32..1 << 20, bit in 0usize..RECORD_BYTES * 8
        ) {
            let mut sums = [0; GRANULES_PER_SEGMENT];
            for (i, s) in sums.iter_mut().enumerate().take(sum_count(len)) {
                *s = seed.wrapping_mul(i as u32 + 1);
            }
            let key = SegmentKey { content: ContentId(content), index };
            let r = Record { key, len, pinned, generation, expires_ms, sums };
            let mut raw = encode(&r, slot);
            prop_assert_eq!(decode(&raw, slot), Some(Ok(r)));
            prop_assert_eq!(decode(&raw, slot + 1), Some(Err(())), "a record in a slot that is not its own");
            raw[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(decode(&raw, slot), Some(Err(())));
        }
    }

    #[test]
    fn a_second_process_is_refused_and_a_foreign_file_is_started_afresh() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("index");
        let (index, found) = Index::open(&path).expect("fresh");
        assert!(found.live.is_empty() && !found.reset);
        assert!(Index::open(&path).is_err_and(|e| e.is(Kind::Busy)));
        drop(index);
        std::fs::write(&path, b"something else").expect("write");
        let (_index, found) = Index::open(&path).expect("reset");
        assert!(found.reset);
    }
}
