//! Tuning of the system allocator (glibc malloc; `mallopt(3)`), for processes that pass large buffers between threads.

/// Keeps the allocator from holding a heap for each thread, so that buffers freed by one are room for all, and from giving large
/// buffers back to the system at once: blocks below `mmap_bytes` come from the heap, whose free top is kept up to `trim_bytes`. Measured:
/// with the defaults every received block of 1 MiB is mapped and faulted in anew, up to three times the CPU of the receive path.
///
/// To be called first in `main`, before other threads exist. `None` leaves the system's dynamic threshold.
pub fn tune(mmap_bytes: Option<i32>, trim_bytes: i32) {
    // SAFETY: sets tunables of the allocator only; by contract no other thread allocates meanwhile. A refused value changes nothing.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
        libc::mallopt(libc::M_TRIM_THRESHOLD, trim_bytes);
        if let Some(bytes) = mmap_bytes {
            libc::mallopt(libc::M_MMAP_THRESHOLD, bytes);
        }
    }
}
