//! Where a file is being read: recognises sequential streams among the READ requests of one node and says how far ahead to fetch.
//! Pure: offsets in, plan out.
//!
//! On a read-only mount the kernel sends no OPEN, so streams belong to the node, several at a time (several processes, or one
//! that reads two places). The kernel sends reads of one stream in parallel and a little out of order, hence the tolerance. Random
//! reads match no stream and get exactly their bytes; a stream that is left behind is replaced by a newer one.

use super::parts::PART_BYTES;
use efc_common::block::BLOCK_BYTES;
use std::ops::Range;
use std::time::{Duration, Instant};

/// Streams followed per node; the least recently used gives way.
const STREAMS_MAX: usize = 8;
/// How far from the expected offset a read still counts as the same stream, bytes.
const TOLERANCE_BYTES: u64 = 2 << 20;
/// A first read at offset 0 of at least this size starts a stream at once: the kernel's own read-ahead thinks so too.
const EAGER_BYTES: u64 = 128 << 10;
/// The kernel's second try comes at once.
const SECOND_TRY: Duration = Duration::from_secs(1);
/// First window, bytes.
const WINDOW_MIN_BYTES: u64 = PART_BYTES;

/// What a read asks for beyond its own bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// Exactly the bytes of the read.
    Random,
    /// The read belongs to a stream: load whole parts, and fetch this range ahead (may be empty).
    Sequential {
        /// Range to fetch ahead, after the read's own bytes; cut at the end of the file by the caller.
        ahead: Range<u64>,
    },
}

#[derive(Debug)]
struct Stream {
    /// Where the next read is expected.
    next: u64,
    /// Fetched ahead up to here.
    ahead: u64,
    /// Bytes to keep fetched ahead.
    window: u64,
    /// Reads in sequence.
    hits: u32,
    used: u64,
}

/// The streams of one node.
#[derive(Debug, Default)]
pub struct Streams {
    list: Vec<Stream>,
    clock: u64,
    /// When a read of the node failed, until the next read begins.
    failed: Option<Instant>,
}

impl Streams {
    /// Takes note that a read of the node failed.
    pub fn read_failed(&mut self) {
        self.failed = Some(Instant::now());
    }

    /// Is the read that now begins the kernel's second try of one that has just failed? When its read-ahead failed it asks for the
    /// page itself, so one read of an application is two here. True once after a failure.
    pub fn is_second_try(&mut self) -> bool {
        self.failed.take().is_some_and(|at| at.elapsed() < SECOND_TRY)
    }

    /// Takes note of a read and plans for it. `window_max_bytes` bounds how far ahead a stream may go; 0 switches read-ahead off.
    pub fn plan(&mut self, read: Range<u64>, file_bytes: u64, window_max_bytes: u64) -> Plan {
        self.clock += 1;
        let clock = self.clock;
        let near = |s: &Stream| read.start.abs_diff(s.next) <= TOLERANCE_BYTES.min(s.window.max(EAGER_BYTES));
        let Some(s) = self.list.iter_mut().filter(|s| near(s)).min_by_key(|s| read.start.abs_diff(s.next)) else {
            return self.start(read, file_bytes, window_max_bytes);
        };
        s.used = clock;
        if read.end <= s.next {
            // A straggler of the same stream: nothing new.
            return if s.window > 0 { Plan::Sequential { ahead: 0..0 } } else { Plan::Random };
        }
        s.next = read.end;
        s.hits += 1;
        if s.window == 0 {
            s.window = WINDOW_MIN_BYTES.min(window_max_bytes);
            s.ahead = read.end;
        }
        Self::extend(s, window_max_bytes)
    }

    fn start(&mut self, read: Range<u64>, file_bytes: u64, window_max_bytes: u64) -> Plan {
        let eager = read.start == 0 && (read.end >= EAGER_BYTES || read.end >= file_bytes);
        let window = if eager { WINDOW_MIN_BYTES.min(window_max_bytes) } else { 0 };
        if self.list.len() == STREAMS_MAX
            && let Some(oldest) = self.list.iter().enumerate().min_by_key(|(_, s)| s.used).map(|(i, _)| i)
        {
            self.list.swap_remove(oldest);
        }
        self.list.push(Stream { next: read.end, ahead: read.end, window, hits: 0, used: self.clock });
        if window == 0 || read.end >= file_bytes { Plan::Random } else { Plan::Sequential { ahead: 0..0 } }
    }

    /// Fetches ahead again when half of the window is used up, so that requests are large; the window doubles each time.
    fn extend(s: &mut Stream, window_max_bytes: u64) -> Plan {
        let left = s.ahead.saturating_sub(s.next);
        if s.window == 0 || left > s.window / 2 {
            return Plan::Sequential { ahead: 0..0 };
        }
        s.window = (s.window * 2).min(window_max_bytes);
        let from = s.ahead.max(s.next);
        // Whole parts, so that none is asked for twice; whole blocks as soon as the window holds one, so that each is one request.
        let unit = if s.window >= BLOCK_BYTES as u64 { BLOCK_BYTES as u64 } else { PART_BYTES };
        s.ahead = (s.next + s.window).next_multiple_of(unit);
        Plan::Sequential { ahead: from..s.ahead.max(from) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_sequential_reader_goes_further_and_further_ahead_up_to_the_window() {
        let mut s = Streams::default();
        let (file, step) = (1 << 30, 128 << 10);
        let mut ahead_end = 0;
        for i in 0..2000u64 {
            let at = i * step;
            match s.plan(at..at + step, file, 16 * MIB) {
                Plan::Sequential { ahead } => {
                    if !ahead.is_empty() {
                        assert!(ahead.start >= ahead_end, "nothing is fetched twice");
                        let whole = ahead.end.is_multiple_of(BLOCK_BYTES as u64);
                        assert!(whole || i < 100, "a block is asked for in one piece: {ahead:?}");
                        ahead_end = ahead.end;
                    }
                    assert!(ahead_end <= at + step + 20 * MIB, "never a block beyond the window");
                    assert!(i < 200 || ahead_end >= at + step + 8 * MIB, "at least half of the window is ahead");
                }
                Plan::Random => panic!("read {i} of a sequential reader taken as random"),
            }
        }
    }

    #[test]
    fn random_reads_fetch_nothing_ahead() {
        let mut s = Streams::default();
        let mut x = 12345u64;
        let mut sequential = 0;
        for _ in 0..1000 {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let at = (x >> 20) % (1 << 30) / 4096 * 4096;
            if !matches!(s.plan(at..at + 4096, 1 << 30, 16 * MIB), Plan::Random) {
                sequential += 1;
            }
        }
        assert!(sequential < 10, "{sequential} of 1000 random reads taken as sequential");
    }

    #[test]
    fn parallel_and_slightly_disordered_reads_stay_one_stream() {
        let mut s = Streams::default();
        let order = [0u64, 2, 1, 3, 5, 4, 6, 8, 7];
        for i in order {
            let at = i * 256 * 1024;
            assert!(matches!(s.plan(at..at + 256 * 1024, 1 << 30, 16 * MIB), Plan::Sequential { .. }), "{i}");
        }
        assert_eq!(s.list.len(), 1);
    }

    #[test]
    fn two_readers_of_one_file_are_two_streams() {
        let mut s = Streams::default();
        for i in 0..50u64 {
            for base in [0, 512 * MIB] {
                s.plan(base + i * 131072..base + (i + 1) * 131072, 1 << 30, 8 * MIB);
            }
        }
        assert_eq!(s.list.len(), 2);
        assert!(s.list.iter().all(|s| s.window == 8 * MIB));
    }

    #[test]
    fn a_small_file_read_whole_is_just_read() {
        assert_eq!(Streams::default().plan(0..112_000, 112_000, 16 * MIB), Plan::Random);
    }

    #[test]
    fn window_zero_switches_read_ahead_off() {
        let mut s = Streams::default();
        for i in 0..20u64 {
            match s.plan(i * 131072..(i + 1) * 131072, 1 << 30, 0) {
                Plan::Sequential { ahead } => assert!(ahead.is_empty()),
                Plan::Random => {}
            }
        }
    }
}
