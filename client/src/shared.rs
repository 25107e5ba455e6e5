//! Reading a neighbour's memory tier without asking it: see [`efc_proto::shared`] for the scheme and its source.

use bytes::Bytes;
use efc_common::block::{GRANULE_BYTES, SEGMENT_BYTES};
use efc_common::checksum;
use efc_common::{Error, Kind, Result};
use efc_proto::data;
use efc_proto::shared::{Seals, in_whole_file};
use std::ops::Range;
use std::os::fd::OwnedFd;

/// The memory tier of a worker on this host, as it shared it with one connection.
#[derive(Debug)]
pub struct SharedMemory {
    data: OwnedFd,
    seals: Seals,
    /// Where the odd slots are, if not in `data`.
    whole: Option<OwnedFd>,
}

impl SharedMemory {
    /// From the descriptors that came with the worker's greeting.
    ///
    /// # Errors
    /// When they are not what they should be.
    pub fn new(data: OwnedFd, seals: &OwnedFd, whole: Option<OwnedFd>) -> Result<Self> {
        Ok(SharedMemory { data, seals: Seals::open(seals)?, whole })
    }

    /// Appends to `out` the granules of a segment that cover `part`, verified; where `part` begins in what was appended. `None` when
    /// other bytes have taken their place meanwhile: then the worker has to be asked again.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] when a checksum does not match, or the worker named an impossible place.
    pub fn read(&self, place: &data::Place, part: Range<u32>, out: &mut Vec<u8>) -> Result<Option<usize>> {
        let sums = place.len.div_ceil(GRANULE_BYTES) as usize;
        let sound =
            place.len <= SEGMENT_BYTES && place.sums.len() == sums && place.at.is_multiple_of(SEGMENT_BYTES as u64);
        if !sound || part.is_empty() || part.end > place.len {
            return Err(Error::new(Kind::Corrupt, "worker named an impossible place")
                .with("at", place.at)
                .with("bytes", place.len)
                .with("part", format!("{}..{}", part.start, part.end)));
        }
        let slot = place.at / SEGMENT_BYTES as u64;
        let first = part.start / GRANULE_BYTES;
        let wide = first * GRANULE_BYTES..part.end.next_multiple_of(GRANULE_BYTES).min(place.len);
        if self.seals.get(slot) != Some(place.seal) {
            return Ok(None);
        }
        let start = out.len();
        let file = self.whole.as_ref().filter(|_| in_whole_file(slot)).unwrap_or(&self.data);
        if !copy(file, place.at + wide.start as u64, wide.len(), out)? || self.seals.get(slot) != Some(place.seal) {
            out.truncate(start);
            return Ok(None);
        }
        checksum::verify(&out[start..], &place.sums[first as usize..wide.end.div_ceil(GRANULE_BYTES) as usize])?;
        Ok(Some((part.start - wide.start) as usize))
    }

    /// The run of `bytes` bytes that begins at `offset` in its file and lies in `places`, in one piece of memory. `None` as for
    /// [`SharedMemory::read`].
    ///
    /// # Errors
    /// As [`SharedMemory::read`].
    pub fn read_run(&self, places: &[data::Place], offset: u64, bytes: usize) -> Result<Option<Bytes>> {
        let wrong = || Error::new(Kind::Corrupt, "worker named places that do not make the run").with("bytes", bytes);
        let mut out = Vec::with_capacity(bytes);
        for place in places {
            let at = offset.checked_add(out.len() as u64).ok_or_else(wrong)?;
            let from = (at % SEGMENT_BYTES as u64) as u32;
            let left = bytes.checked_sub(out.len()).ok_or_else(wrong)?.min(SEGMENT_BYTES as usize) as u32;
            let to = from.saturating_add(left).min(place.len);
            if !from.is_multiple_of(GRANULE_BYTES) || from >= to {
                return Err(wrong());
            }
            if self.read(place, from..to, &mut out)?.is_none() {
                return Ok(None);
            }
        }
        if out.len() != bytes {
            return Err(wrong());
        }
        Ok(Some(out.into()))
    }
}

/// Appends `len` bytes of `file` from `at` on; false when there are not so many.
fn copy(file: &OwnedFd, at: u64, len: usize, out: &mut Vec<u8>) -> Result<bool> {
    out.reserve(len);
    let end = out.len() + len;
    while out.len() < end {
        let (have, left) = (out.len(), end - out.len());
        let from = at + (len - left) as u64;
        match rustix::io::pread(file, &mut out.spare_capacity_mut()[..left], from) {
            Ok(([], _)) => return Ok(false),
            Ok((filled, _)) => {
                let n = filled.len();
                // SAFETY: the kernel has filled the first `n` bytes of the spare capacity.
                unsafe { out.set_len(have + n) };
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(std::io::Error::from(e).into()),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use efc_common::checksum::granule_sums;
    use efc_proto::shared::read_only;
    use rustix::fs::{MemfdFlags, memfd_create};

    const SLOT: u64 = SEGMENT_BYTES as u64;

    /// A worker's memory with three slots that hold a file of 600,000 bytes, and the places of its segments.
    fn memory() -> (OwnedFd, Seals, SharedMemory, Vec<u8>, Vec<data::Place>) {
        let file = memfd_create("data", MemfdFlags::CLOEXEC).expect("memfd");
        let (seals, seals_file) = Seals::create(3).expect("seals");
        let content: Vec<u8> = (0..600_000u32).map(|i| ((i * 7) >> 5) as u8).collect();
        let place = |(i, bytes): (usize, &[u8])| {
            // Not in the file's order.
            let at = (2 - i as u64) * SLOT;
            rustix::io::pwrite(&file, bytes, at).expect("write");
            data::Place { at, seal: 0, len: bytes.len() as u32, sums: granule_sums(bytes) }
        };
        let places = content.chunks(SLOT as usize).enumerate().map(place).collect();
        let shared = SharedMemory::new(read_only(&file).expect("reopen"), &seals_file, None).expect("shared");
        (file, seals, shared, content, places)
    }

    #[test]
    fn a_run_over_segments_comes_whole_and_verified() {
        let (_file, _seals, shared, content, places) = memory();
        let all = shared.read_run(&places, 0, content.len()).expect("read").expect("sealed");
        assert_eq!(all, content);
        let some = shared.read_run(&places[..2], 16384, 294_912).expect("read").expect("sealed");
        assert_eq!(some, content[16384..16384 + 294_912]);
        let mut out = Vec::new();
        let at = shared.read(&places[2], 20_000..20_100, &mut out).expect("read").expect("sealed");
        assert_eq!(out[at..at + 100], content[2 * SLOT as usize + 20_000..][..100]);
    }

    #[test]
    fn a_broken_seal_is_told_from_wrong_bytes() {
        let (file, seals, shared, content, places) = memory();
        rustix::io::pwrite(&file, b"other", places[0].at + 5).expect("write");
        assert!(shared.read_run(&places, 0, content.len()).is_err_and(|e| e.is(Kind::Corrupt)));
        seals.break_seal(places[0].at / SLOT);
        assert!(shared.read_run(&places, 0, content.len()).expect("no error").is_none());
        assert!(shared.read_run(&places[1..2], SLOT, 98_304).expect("read").is_some());
    }

    #[test]
    fn a_reader_never_believes_what_a_writer_is_changing() {
        let (file, seals, shared, _, _) = memory();
        // The checksums of all-zero bytes are told for every content: only the seal stands between.
        let zero = vec![0u8; 4096];
        let place = |seal| data::Place { at: 0, seal, len: 4096, sums: granule_sums(&zero) };
        rustix::io::pwrite(&file, &zero, 0).expect("write");
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                // Every even seal holds zeroes, every odd one garbage.
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    seals.break_seal(0);
                    rustix::io::pwrite(&file, &[7; 4096], 0).expect("write");
                    rustix::io::pwrite(&file, &zero, 0).expect("write");
                    seals.break_seal(0);
                }
            });
            let mut believed = 0;
            let end = std::time::Instant::now() + std::time::Duration::from_secs(2);
            while believed < 1000 && std::time::Instant::now() < end {
                let seal = shared.seals.get(0).expect("slot");
                if seal.is_multiple_of(2) {
                    let mut out = Vec::new();
                    believed += shared.read(&place(seal), 0..4096, &mut out).expect("never corrupt").is_some() as u32;
                }
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(believed > 0);
        });
    }

    #[test]
    fn places_that_cannot_be_are_refused() {
        let (_file, _seals, shared, _, places) = memory();
        let p = &places[0];
        let bad = [
            data::Place { at: 1, ..p.clone() },
            data::Place { len: u32::MAX, ..p.clone() },
            data::Place { sums: vec![1], ..p.clone() },
        ];
        for place in bad {
            assert!(shared.read(&place, 0..10, &mut Vec::new()).is_err_and(|e| e.is(Kind::Corrupt)), "{place:?}");
        }
        assert!(shared.read(&places[2], 0..SEGMENT_BYTES, &mut Vec::new()).is_err(), "past the end of the segment");
        assert!(shared.read_run(&places, 5, 100).is_err(), "not on a granule");
        assert!(shared.read_run(&places[..1], 0, 300_000).is_err(), "too few places");
        assert!(shared.read_run(&places, 0, 100_000).is_err(), "ends inside a granule");
        assert!(shared.read_run(&places, u64::MAX - 16_383, 100_000).is_err(), "past the end of everything");
        let past = data::Place { at: 100 * SLOT, ..p.clone() };
        assert!(shared.read(&past, 0..10, &mut Vec::new()).expect("no slot, no seal").is_none());
    }
}
