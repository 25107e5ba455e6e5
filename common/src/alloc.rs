//! Tuning of the system allocator (glibc malloc; `mallopt(3)`), for processes that pass large buffers between threads.

use std::time::Duration;

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

/// How often a process is looked at that may be idle.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Less CPU time in between is idle.
const IDLE: Duration = Duration::from_millis(50);

/// Gives memory that is free back to the system (`malloc_trim(3)`) each time that the process has become idle, for as long as it is polled. It holds up
/// allocations for some milliseconds, which then nobody minds.
pub async fn trim_when_idle() {
    let (mut before, mut is_trimmed) = (cpu_time(), false);
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let now = cpu_time();
        let is_idle = now.saturating_sub(before) < IDLE;
        if is_idle && !is_trimmed {
            // SAFETY: touches free memory of the allocator only, under its own locks.
            unsafe { libc::malloc_trim(0) };
        }
        (before, is_trimmed) = (now, is_idle);
    }
}

fn cpu_time() -> Duration {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec, which is ours. This clock is there in every process.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut t) };
    Duration::new(t.tv_sec.unsigned_abs(), u32::try_from(t.tv_nsec).unwrap_or(0))
}
