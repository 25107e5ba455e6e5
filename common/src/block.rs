//! Byte arithmetic of the cache. A file is cut into *blocks* (4 MiB: the unit of placement on the ring), a block into
//! *segments* (256 KiB: the unit of filling, storing and evicting), a segment into *granules* (16 KiB: the unit of
//! checksums and of the smallest transfer). So a random 4 KiB miss costs one 256 KiB range request at the origin, and a
//! random 4 KiB hit moves 16 KiB that the reader can verify with a checksum made when the bytes left the origin.

use std::ops::Range;

/// Unit of checksum and of transfer, bytes.
pub const GRANULE_BYTES: u32 = 16 * 1024;
/// Unit of fill, storage and eviction, bytes.
pub const SEGMENT_BYTES: u32 = 256 * 1024;
/// Unit of placement on the ring, bytes.
pub const BLOCK_BYTES: u32 = 4 * 1024 * 1024;
/// Granules in a full segment.
pub const GRANULES_PER_SEGMENT: usize = (SEGMENT_BYTES / GRANULE_BYTES) as usize;
/// Segments in a full block.
pub const SEGMENTS_PER_BLOCK: u32 = BLOCK_BYTES / SEGMENT_BYTES;
/// Largest file, bytes: segment indexes are 32 bits (1 PiB).
pub const FILE_BYTES_MAX: u64 = SEGMENT_BYTES as u64 * u32::MAX as u64;

const _: () = assert!(SEGMENT_BYTES.is_multiple_of(GRANULE_BYTES) && BLOCK_BYTES.is_multiple_of(SEGMENT_BYTES));

/// The block that holds byte `offset`.
pub fn block_of(offset: u64) -> u32 {
    (offset / BLOCK_BYTES as u64) as u32
}

/// The segment that holds byte `offset`.
pub fn segment_of(offset: u64) -> u32 {
    (offset / SEGMENT_BYTES as u64) as u32
}

/// Bytes of segment `index` in a file of `size` bytes; 0 past the end.
pub fn segment_len(size: u64, index: u32) -> u32 {
    let start = index as u64 * SEGMENT_BYTES as u64;
    size.saturating_sub(start).min(SEGMENT_BYTES as u64) as u32
}

/// The file range of segment `index`, cut at `size`.
pub fn segment_range(size: u64, index: u32) -> Range<u64> {
    let start = (index as u64 * SEGMENT_BYTES as u64).min(size);
    start..start + segment_len(size, index) as u64
}

/// The segments that cover `range` of a file.
pub fn segments(range: Range<u64>) -> Range<u32> {
    if range.is_empty() {
        return 0..0;
    }
    segment_of(range.start)..segment_of(range.end - 1) + 1
}

/// `range` widened to granule boundaries, cut at `size`.
pub fn widen(range: Range<u64>, size: u64) -> Range<u64> {
    let g = GRANULE_BYTES as u64;
    let start = range.start / g * g;
    let end = range.end.div_ceil(g).saturating_mul(g).min(size);
    start..end.max(start)
}

/// Cuts `range` at block boundaries, in order.
pub fn split_blocks(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let b = BLOCK_BYTES as u64;
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let end = ((at / b + 1) * b).min(range.end);
        let piece = at..end;
        at = end;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn blocks_cover_the_range_exactly(start in 0u64..1 << 30, len in 0u64..64 << 20) {
            let mut at = start;
            for p in split_blocks(start..start + len) {
                prop_assert_eq!(p.start, at);
                prop_assert!(p.end > p.start);
                prop_assert_eq!(block_of(p.start), block_of(p.end - 1));
                at = p.end;
            }
            prop_assert_eq!(at, start + len);
        }

        #[test]
        fn widened_range_covers_and_stays_inside(size in 1u64..1 << 24, a in 0u64..1 << 24, n in 1u64..1 << 20) {
            let start = a % size;
            let end = (start + n).min(size);
            let w = widen(start..end, size);
            prop_assert!(w.start <= start && w.end >= end && w.end <= size);
            prop_assert!(w.start.is_multiple_of(GRANULE_BYTES as u64));
            prop_assert!(w.end == size || w.end.is_multiple_of(GRANULE_BYTES as u64));
        }

        #[test]
        fn segment_lengths_sum_to_size(size in 0u64..1 << 26) {
            let sum: u64 = segments(0..size).map(|i| segment_len(size, i) as u64).sum();
            prop_assert_eq!(sum, size);
        }
    }
}
