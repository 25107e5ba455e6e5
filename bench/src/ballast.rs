//! Memory that the host has backed already, handed out as a phase needs it.
//!
//! A virtual machine with free page reporting gives its free pages back to the host within seconds, and each first touch of such a page costs a fault of the host: two seconds of CPU for the memory
//! that one cold gigabyte takes, paid by whichever tool comes first. Memory that is touched and freed *before* a phase has been given back in the middle of it. The ballast is therefore held, and let go a chunk
//! at a time while the phase runs, as fast as the machine's free memory shrinks: the kernel takes pages that were freed last first.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

const CHUNK_BYTES: usize = 64 << 20;
const PAGE_BYTES: usize = 4096;
/// How often the machine's free memory is looked at.
const LOOK: Duration = Duration::from_millis(2);
/// Chunks that are free ahead of what the phase has taken.
const AHEAD: usize = 6;

/// Held memory; what is left goes when it is dropped.
pub struct Ballast {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Ballast {
    /// Takes and touches `bytes`, at most half of what is available, then lets it go chunk by chunk as memory is taken by others.
    pub fn new(bytes: u64) -> Ballast {
        let bytes = bytes.min(meminfo("MemAvailable:") / 2) as usize;
        let mut held: Vec<Vec<u8>> = (0..bytes / CHUNK_BYTES).map(|_| touched()).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let ended = stop.clone();
        let floor = meminfo("MemFree:");
        let run = move || {
            let mut released = 0;
            while !ended.load(Relaxed) && !held.is_empty() {
                // What others took since: the free memory went down by that, and up by what was let go.
                let taken = (floor + (released * CHUNK_BYTES) as u64).saturating_sub(meminfo("MemFree:"));
                while released * CHUNK_BYTES < taken as usize + AHEAD * CHUNK_BYTES && held.pop().is_some() {
                    released += 1;
                }
                std::thread::sleep(LOOK);
            }
        };
        let thread = std::thread::Builder::new().name("ballast".into()).spawn(run).ok();
        Ballast { stop, thread }
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            // It ends within one look.
            let _ = thread.join();
        }
    }
}

/// One chunk, every page of it written. Large enough for the allocator to map it by itself, so that it is really let go.
fn touched() -> Vec<u8> {
    let mut chunk: Vec<u8> = Vec::with_capacity(CHUNK_BYTES);
    for page in chunk.spare_capacity_mut().chunks_mut(PAGE_BYTES) {
        page[0].write(1);
    }
    std::hint::black_box(chunk.as_ptr());
    chunk
}

/// A line of /proc/meminfo, bytes; 0 if there is none.
fn meminfo(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text.lines().find_map(|l| l.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Resident memory of this process, bytes.
    fn resident() -> u64 {
        let text = fs::read_to_string("/proc/self/status").expect("status");
        let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse::<u64>().ok());
        line.expect("VmRSS") * 1024
    }

    #[test]
    fn it_is_really_taken_and_really_let_go() {
        let before = resident();
        let chunk = touched();
        assert!(resident() >= before + CHUNK_BYTES as u64 / 2, "the pages are there");
        drop(chunk);
        drop(Ballast::new(512 << 20));
        assert!(resident() < before + CHUNK_BYTES as u64, "nothing stays");
        assert!(meminfo("MemFree:") > 0 && meminfo("Nonsense:") == 0);
    }
}
