//! The one background thread of a store: copies segments from memory to disk, and hot ones from disk to memory.
//!
//! Its queue holds guards, so it is bounded in bytes by the share of the memory quota that is set aside for entries in limbo
//! ([`super::reserve`]). When the queue is full the segment is not written now: reads never wait for a cache disk. The thread
//! looks for such segments in memory when it has nothing else to do, and memory keeps them until then ([`Writer::copies`]).

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use efc_common::error::Context;
use efc_common::id::SegmentKey;
use efc_common::{Kind, Result};
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::Tiers;
use super::segment::{Entry, Segment, Tier};
use super::slab::{PutRequest, Slab};
use super::table::cost;

/// Disk entries waiting to be copied to memory.
const PROMOTIONS_MAX: usize = 64;
/// How much less the thread's processor time counts than that of the others (`nice(2)`; on Linux of this thread alone).
const NICE: i32 = 10;
/// A write that takes longer is a disk that hangs.
const HANG: Duration = Duration::from_secs(5);
/// Slots of memory looked at in one go, under its lock.
const SWEEP_SLOTS: u32 = 4096;

#[derive(Default)]
struct Queue {
    /// Memory entries to be written to disk.
    writes: VecDeque<Arc<Entry>>,
    /// Room of `writes` and of the write under way, bytes.
    writes_bytes: u64,
    /// Disk entries to be copied to memory.
    promotions: VecDeque<Arc<Entry>>,
    /// The queue was full for an entry that memory has: look for entries without a copy from this slot on.
    sweep: Option<u32>,
    /// It happened again during the sweep.
    sweep_again: bool,
    /// What the thread works on, and whether it is pinned.
    busy: Option<(SegmentKey, bool)>,
    /// Since when.
    busy_since: Option<Instant>,
    /// `busy` was removed from the store meanwhile: undo the copy.
    cancelled: bool,
    stop: bool,
}

struct State {
    tiers: Arc<Tiers>,
    queue: Mutex<Queue>,
    /// Work came, or stop.
    work: Condvar,
    /// The queue ran empty.
    idle: Condvar,
    bytes_max: u64,
}

/// Owner of the thread; dropping it ends the thread after the copy under way.
pub(super) struct Writer {
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

enum Job {
    Write(Arc<Entry>),
    Promote(Arc<Entry>),
}

impl Writer {
    /// Starts the thread, if there are two kinds of tier to copy between.
    ///
    /// # Errors
    /// When the system has no thread to give.
    pub(super) fn start(tiers: Arc<Tiers>, bytes_max: u64) -> Result<Self> {
        let needed = tiers.memory.is_some() && !tiers.disks.is_empty();
        let state = Arc::new(State {
            tiers,
            queue: Mutex::new(Queue::default()),
            work: Condvar::new(),
            idle: Condvar::new(),
            bytes_max,
        });
        let thread = if needed {
            let state = state.clone();
            let spawned = std::thread::Builder::new().name("efc-store".into()).spawn(move || state.run());
            Some(spawned.context("start the cache's disk writer")?)
        } else {
            None
        };
        Ok(Writer { state, thread })
    }

    /// Memory took this entry in: have it written to disk if a disk wants it. A disk is asked once per entry, when there is room
    /// in the queue.
    pub(super) fn offer(&self, entry: Arc<Entry>) {
        if self.thread.is_some() {
            self.state.offer(entry);
        }
    }

    /// Will what is in memory and not settled be settled? False without a disk in use, and while one hangs.
    pub(super) fn copies(&self) -> bool {
        self.thread.is_some()
            && self.state.tiers.disks.iter().any(|d| !d.ejected())
            && self.state.queue.lock().busy_since.is_none_or(|t| t.elapsed() < HANG)
    }

    /// A disk entry was asked for again.
    pub(super) fn promote(&self, entry: &Arc<Entry>) {
        let Some(memory) = &self.state.tiers.memory else { return };
        if self.thread.is_none() || entry.offered.load(Relaxed) || !memory.admits(&entry.key, entry.len, false) {
            return;
        }
        let mut q = self.state.queue.lock();
        if q.promotions.len() < PROMOTIONS_MAX && !entry.offered.swap(true, Relaxed) {
            q.promotions.push_back(entry.clone());
            self.state.work.notify_one();
        }
    }

    /// The key is being removed: forget work on it, and undo the copy under way.
    pub(super) fn cancel(&self, key: &SegmentKey) {
        let mut q = self.state.queue.lock();
        q.cancelled |= q.busy.is_some_and(|(k, _)| k == *key);
        q.drop_where(|e| e.key == *key);
    }

    /// Everything that is not pinned is being removed.
    pub(super) fn cancel_all(&self) {
        let mut q = self.state.queue.lock();
        q.cancelled |= q.busy.is_some_and(|(_, pinned)| !pinned);
        q.drop_where(|e| !e.pinned.load(Relaxed));
    }

    /// Waits until there is no work.
    pub(super) fn flush(&self) {
        let mut q = self.state.queue.lock();
        while self.thread.is_some() && !q.is_idle() {
            self.state.idle.wait(&mut q);
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.state.queue.lock().stop = true;
        self.state.work.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the cache's disk writer panicked");
        }
    }
}

impl Queue {
    fn is_idle(&self) -> bool {
        self.writes.is_empty() && self.promotions.is_empty() && self.busy.is_none() && self.sweep.is_none()
    }

    fn drop_where(&mut self, gone: impl Fn(&Entry) -> bool) {
        let freed = &mut self.writes_bytes;
        self.writes.retain(|e| {
            let keep = !gone(e);
            if !keep {
                *freed -= cost(e.len);
            }
            keep
        });
        self.promotions.retain(|e| !gone(e));
    }

    fn next(&mut self) -> Option<Job> {
        let job = match self.writes.pop_front() {
            Some(e) => Job::Write(e),
            None => Job::Promote(self.promotions.pop_front()?),
        };
        self.busy = Some((job.entry().key, job.entry().pinned.load(Relaxed)));
        self.busy_since = Some(Instant::now());
        self.cancelled = false;
        Some(job)
    }
}

impl Job {
    fn entry(&self) -> &Arc<Entry> {
        let (Job::Write(e) | Job::Promote(e)) = self;
        e
    }
}

impl State {
    fn run(&self) {
        // Readers wait for what fetches and connections do, nobody for this thread: where they need all processors it stands back, and
        // memory holds what has still to be copied. Refused: then as important as they are.
        let _ = rustix::process::nice(NICE);
        let mut buffer = Vec::new();
        while let Some(job) = self.wait() {
            let target = match &job {
                Job::Write(e) => self.tiers.home(&e.key),
                Job::Promote(_) => self.tiers.memory.as_ref(),
            };
            if let Some(target) = target {
                self.copy(&job, target, &mut buffer);
            }
            let room = matches!(job, Job::Write(_)) as u64 * cost(job.entry().len);
            let key = job.entry().key;
            match &job {
                Job::Write(e) => e.settled.store(true, Relaxed),
                Job::Promote(e) => e.offered.store(false, Relaxed),
            }
            // The guard goes first, so that its room is free when the queue says that it has room.
            drop(job);
            let mut q = self.queue.lock();
            q.writes_bytes -= room;
            q.busy = None;
            q.busy_since = None;
            let cancelled = q.cancelled;
            drop(q);
            if cancelled && let Some(target) = target {
                target.remove(&key, super::Removal::Asked);
            }
        }
    }

    fn wait(&self) -> Option<Job> {
        let mut q = self.queue.lock();
        loop {
            if q.stop {
                return None;
            }
            if let Some(job) = q.next() {
                return Some(job);
            }
            if let Some(from) = q.sweep {
                let next = MutexGuard::unlocked(&mut q, || self.sweep(from));
                let again = next.is_none() && std::mem::take(&mut q.sweep_again);
                q.sweep = if again { Some(0) } else { next };
                continue;
            }
            self.idle.notify_all();
            self.work.wait(&mut q);
        }
    }

    /// Offers some entries of memory that no disk was asked to take; the slot to go on from.
    fn sweep(&self, from: u32) -> Option<u32> {
        let (entries, next) = self.tiers.memory.as_ref()?.not_offered(from, SWEEP_SLOTS, self.bytes_max / 2);
        entries.into_iter().for_each(|e| self.offer(e));
        next
    }

    /// Is there room for one more write? If not, it has to be looked for later.
    fn has_room(&self, room: u64) -> bool {
        let mut q = self.queue.lock();
        if q.writes_bytes + room <= self.bytes_max {
            return true;
        }
        if q.sweep.is_some() {
            q.sweep_again = true;
        } else {
            q.sweep = Some(0);
        }
        false
    }

    /// See [`Writer::offer`].
    fn offer(&self, entry: Arc<Entry>) {
        let room = cost(entry.len);
        let Some(disk) = self.tiers.home(&entry.key) else { return };
        if entry.offered.load(Relaxed) || !self.has_room(room) {
            return;
        }
        if entry.offered.swap(true, Relaxed) {
            return;
        }
        if !(disk.admits(&entry.key, entry.len, true) || entry.pinned.load(Relaxed)) {
            entry.settled.store(true, Relaxed);
            return;
        }
        let mut q = self.queue.lock();
        q.writes_bytes += room;
        q.writes.push_back(entry);
        self.work.notify_one();
    }

    /// Copies one segment; what goes wrong is counted where it went wrong, and the segment is not copied.
    fn copy(&self, job: &Job, target: &Slab, buffer: &mut Vec<u8>) {
        let entry = job.entry();
        let promote = matches!(job, Job::Promote(_));
        if target.peek(&entry.key).is_some() {
            return;
        }
        let segment = Segment { entry: entry.clone() };
        if let Err(e) = segment.read_into(0..entry.len, buffer) {
            debug_assert!(!e.is(Kind::Invalid), "a whole segment is a valid range");
            return;
        }
        let request = PutRequest {
            key: entry.key,
            pieces: &[buffer],
            len: entry.len,
            sums: entry.sums(),
            pinned: !promote && entry.pinned.load(Relaxed),
            expires_ms: entry.expires_ms,
            trial: false,
            admitted: true,
        };
        let may_go = |e: &Entry| !promote || e.settled.load(Relaxed);
        match target.put(&request, &may_go) {
            Ok(copy) => {
                // A memory copy of a disk entry need not be written to disk.
                copy.offered.store(promote, Relaxed);
                copy.settled.store(promote, Relaxed);
                if request.pinned
                    && let Some(memory) = &self.tiers.memory
                {
                    // The pinned copy is the one on disk.
                    memory.pin(&entry.key, false);
                }
            }
            Err(reason) if target.tier() != Tier::Memory => self.tiers.counters.bypassed(reason),
            Err(_) => {}
        }
    }
}
