//! Bytes for READ: from what was read ahead, else through the pool of workers, else from the origin.
//!
//! Budget: everything this room holds (parts, bytes on their way to the kernel) comes out of one [`ByteBudget`]; over it loaded parts give
//! way, then reads wait and read-ahead stops. Nothing is copied: pieces are slices of the buffers the data plane received into, or read from a neighbour's memory into.

mod capacity;
pub mod parts;
pub mod source;
pub mod stream;

use crate::namespace::Inode;
use bytes::Bytes;
use efc_common::block::split_blocks;
use efc_common::limit::ByteBudget;
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use futures::StreamExt;
use parking_lot::Mutex;
use parts::{PART_BYTES, Part, Parts};
use source::{DataSource, File};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use stream::{Plan, Streams};
use tokio::runtime::Handle;

/// Part of the deadline that the kernel's second try of a failed read gets.
const SECOND_TRY_PART: u32 = 10;

/// How the reader behaves.
#[derive(Debug, Clone, Copy)]
pub struct ReadConfig {
    /// A stream goes at most this far ahead, bytes; 0 = no read-ahead.
    pub readahead_bytes: u64,
    /// A read ends after this, whatever happens; the kernel's second try of one that failed after a tenth of it.
    pub deadline: Duration,
}

/// Serves reads of one mount.
pub struct Reader {
    source: Arc<DataSource>,
    parts: Arc<Parts>,
    budget: ByteBudget,
    tasks: TaskGroup,
    runtime: Handle,
    config: Mutex<ReadConfig>,
}

impl Reader {
    /// A reader over `source` that holds at most `budget`. To be made inside the runtime that its loads shall run on.
    pub fn new(source: Arc<DataSource>, budget: ByteBudget, tasks: TaskGroup, config: ReadConfig) -> Self {
        let parts = Arc::new(Parts::new(budget.clone()));
        Reader { source, parts, budget, tasks, runtime: Handle::current(), config: Mutex::new(config) }
    }

    /// Behaves like this from now on.
    pub fn configure(&self, change: impl FnOnce(&mut ReadConfig)) {
        change(&mut self.config.lock());
    }

    /// The budget it draws on.
    pub fn budget(&self) -> &ByteBudget {
        &self.budget
    }

    /// The bytes at `range` of a file if they were read ahead or lie in memory of this host, without waiting. Moves the stream on.
    /// (What lies there is copied for the length of one reply, outside of the budget: one request per kernel thread at a time.)
    /// The second value is the plan that [`Reader::read`] goes on with.
    pub fn try_read(&self, inode: &Inode, range: Range<u64>) -> (Option<Vec<Bytes>>, Plan) {
        let size = inode.size();
        let plan = {
            let mut streams = inode.streams.lock();
            let streams = streams.get_or_insert_with(|| Box::new(Streams::default()));
            streams.plan(range.clone(), size, self.config.lock().readahead_bytes)
        };
        let file = self.source.file(inode);
        if plan == Plan::Random {
            return (self.source.read_here(&file, &range), plan);
        }
        let mut pieces = Vec::new();
        let mut parts = Vec::new();
        for (index, inside) in split_parts(range) {
            let Some(part) = self.parts.get(&(file.content, index)) else { return (None, plan) };
            parts.push((part, inside));
        }
        for (part, inside) in &parts {
            match part.try_read(inside.clone()) {
                Some(bytes) => pieces.extend(bytes),
                None => return (None, plan),
            }
        }
        parts.iter().for_each(|(p, _)| self.parts.settle(p));
        if let Plan::Sequential { ahead } = &plan {
            self.load(&file, ahead.clone());
        }
        self.source.count_client_hit(&pieces);
        (Some(pieces), plan)
    }

    /// The bytes at `range` (inside the file).
    ///
    /// # Errors
    /// [`Kind::Stale`] when the file is no longer this version, [`Kind::Timeout`] after the read deadline, else what workers and
    /// origin said.
    pub async fn read(&self, inode: &Inode, range: Range<u64>, plan: Plan) -> Result<Vec<Bytes>> {
        let file = self.source.file(inode);
        let work = async {
            match plan {
                Plan::Random => self.exact(&file, range).await,
                Plan::Sequential { ahead } => self.streamed(&file, range, ahead).await,
            }
        };
        let second = inode.streams.lock().as_mut().is_some_and(|s| s.is_second_try());
        let whole = self.config.lock().deadline;
        let deadline = if second { whole / SECOND_TRY_PART } else { whole };
        let outcome = tokio::time::timeout(deadline, work).await.unwrap_or_else(|_| {
            let e = Error::new(Kind::Timeout, "read did not end within its deadline");
            Err(e.with("seconds", deadline.as_secs_f32()))
        });
        if outcome.is_err()
            && !second
            && let Some(s) = inode.streams.lock().as_mut()
        {
            s.read_failed();
        }
        outcome
    }

    async fn exact(&self, file: &File, range: Range<u64>) -> Result<Vec<Bytes>> {
        let _hold = self.parts.hold(range.end - range.start).await;
        let mut pieces = Vec::with_capacity(1);
        for piece in split_blocks(range) {
            let mut chunks = self.source.fetch(file, piece);
            while let Some(chunk) = chunks.next().await {
                pieces.push(chunk?);
            }
        }
        Ok(pieces)
    }

    async fn streamed(&self, file: &File, range: Range<u64>, ahead: Range<u64>) -> Result<Vec<Bytes>> {
        // The part that holds the end of the read is needed next, so the read's own parts are loaded whole.
        self.load(file, range.start..range.end.max(ahead.end));
        let mut pieces = Vec::new();
        for (index, inside) in split_parts(range) {
            match self.parts.get(&(file.content, index)) {
                Some(part) => {
                    let bytes = part.read(inside).await;
                    self.parts.settle(&part);
                    pieces.extend(bytes?);
                }
                // No budget for a part, or it was used up by another reader: exactly these bytes.
                None => {
                    let start = index as u64 * PART_BYTES;
                    pieces.extend(self.exact(file, start + inside.start..start + inside.end).await?);
                }
            }
        }
        Ok(pieces)
    }

    /// Starts loading the parts of `range` that are not there, one request per run inside a block.
    fn load(&self, file: &File, range: Range<u64>) {
        let range = range.start..range.end.min(file.size);
        for block in split_blocks(range.start / PART_BYTES * PART_BYTES..range.end.next_multiple_of(PART_BYTES)) {
            let mut run: Vec<Arc<Part>> = Vec::new();
            for (index, _) in split_parts(block) {
                let len = (file.size - (index as u64 * PART_BYTES).min(file.size)).min(PART_BYTES);
                match (len > 0).then(|| self.parts.enter((file.content, index), len)).flatten() {
                    Some(part) => run.push(part),
                    None => self.start(file, std::mem::take(&mut run)),
                }
            }
            self.start(file, run);
        }
    }

    fn start(&self, file: &File, run: Vec<Arc<Part>>) {
        if run.is_empty() {
            return;
        }
        let (source, parts, file) = (self.source.clone(), self.parts.clone(), file.clone());
        let guard = LoadGuard { run, done: 0, parts };
        // Also called on the kernel's threads, which belong to no runtime.
        let _entered = self.runtime.enter();
        self.tasks.spawn(load_run(source, file, guard));
    }
}

/// Parts being loaded by one task; what is not complete when the task ends (also when it is cancelled) fails.
struct LoadGuard {
    run: Vec<Arc<Part>>,
    done: usize,
    parts: Arc<Parts>,
}

impl LoadGuard {
    fn fail(&mut self, e: &Error) {
        for part in &self.run[self.done..] {
            part.fail(e);
            self.parts.forget(part);
        }
        self.done = self.run.len();
    }
}

impl Drop for LoadGuard {
    fn drop(&mut self) {
        if self.done < self.run.len() {
            self.fail(&Error::new(Kind::Cancelled, "read-ahead was abandoned"));
        }
    }
}

async fn load_run(source: Arc<DataSource>, file: File, mut guard: LoadGuard) {
    let start = guard.run[0].key().1 as u64 * PART_BYTES;
    let len: u64 = guard.run.iter().map(|p| p.len()).sum();
    let mut chunks = source.fetch(&file, start..start + len);
    let mut have: Vec<Bytes> = Vec::new();
    let mut have_len = 0u64;
    while let Some(chunk) = chunks.next().await {
        let mut chunk = match chunk {
            Ok(c) => c,
            Err(e) => return guard.fail(&e),
        };
        while guard.done < guard.run.len() && !chunk.is_empty() {
            let want = guard.run[guard.done].len() - have_len;
            let take = chunk.split_to((want as usize).min(chunk.len()));
            have_len += take.len() as u64;
            have.push(take);
            if have_len == guard.run[guard.done].len() {
                guard.run[guard.done].complete(std::mem::take(&mut have));
                guard.parts.loaded();
                guard.done += 1;
                have_len = 0;
            }
        }
    }
}

/// Cuts a range at part boundaries: part index and the range inside that part.
fn split_parts(range: Range<u64>) -> impl Iterator<Item = (u32, Range<u64>)> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let index = at / PART_BYTES;
        let end = ((index + 1) * PART_BYTES).min(range.end);
        let inside = at - index * PART_BYTES..end - index * PART_BYTES;
        at = end;
        Some((index as u32, inside))
    })
}
