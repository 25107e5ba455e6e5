//! The memory that requests are read into is there from the start.
//!
//! The kernel copies a request into the pages of the thread that reads it. When a page is not there at once, because it was never written or is shared with a child of fork(2), it is made; but not for a process that has just been
//! killed: then the kernel ends the request with EIO instead of keeping it for a successor (Linux 6.18, fs/fuse/dev.c `fuse_dev_do_read`, mm/gup.c `fatal_signal_pending`). Pages that are there are found without that.
//!
//! `fuser` allocates a buffer for each of its threads and touches nothing of it, so this allocator, which is the system's but for that, writes to what a request can fill.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Length of the buffers of `fuser` 0.18, bytes.
const BUFFER_BYTES: usize = (16 << 20) + 4096;
/// Longest request: 1 MiB to write, with its head.
const REQUEST_BYTES_MAX: usize = (1 << 20) + 8192;
const PAGE_BYTES: usize = 4096;

/// The system's allocator, by which buffers for requests are in memory when they are had.
#[derive(Debug)]
pub struct Buffers;

static MADE: AtomicUsize = AtomicUsize::new(0);

/// How many there were so far.
pub fn made() -> usize {
    MADE.load(Relaxed)
}

// SAFETY: every call is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Buffers {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: by the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: by the caller's contract; it came from there.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, length: usize) -> *mut u8 {
        // SAFETY: by the caller's contract; it came from there.
        unsafe { System.realloc(at, layout, length) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: by the caller's contract.
        let at = unsafe { System.alloc_zeroed(layout) };
        if layout.size() == BUFFER_BYTES && !at.is_null() {
            for offset in (0..REQUEST_BYTES_MAX).step_by(PAGE_BYTES) {
                // SAFETY: inside the block, which is longer and nobody else's yet. It is zero there before and after.
                unsafe { at.add(offset).write_volatile(0) };
            }
            MADE.fetch_add(1, Relaxed);
        }
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kilobytes of a mapping that are in memory, of the one that holds this address.
    fn present(address: usize) -> usize {
        let maps = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
        let mut inside = false;
        for line in maps.lines() {
            let range = line.split(' ').next().and_then(|r| r.split_once('-'));
            let parse = |t: &str| usize::from_str_radix(t, 16).ok();
            if let Some((from, to)) = range.and_then(|(a, b)| Some((parse(a)?, parse(b)?))) {
                inside = (from..to).contains(&address);
            } else if let Some(kilobytes) = line.strip_prefix("Rss:").filter(|_| inside) {
                return kilobytes.trim().trim_end_matches(" kB").parse().expect("number");
            }
        }
        panic!("no such mapping");
    }

    #[test]
    fn a_buffer_is_in_memory_when_it_is_had() {
        let before = made();
        let buffer = vec![0u8; BUFFER_BYTES];
        assert_eq!(made(), before + 1);
        let there = present(buffer.as_ptr() as usize);
        assert!(there >= REQUEST_BYTES_MAX / 1024, "{there} kB");
    }
}
