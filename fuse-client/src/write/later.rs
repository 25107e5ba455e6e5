//! Write-back (`writeback`): a file that is closed becomes an object behind the writer.
//!
//! `close` only takes it down; `fsync`, the recall of its lease and the end of the mount wait for it. So a mount that is killed loses what was closed and not synced, and
//! nothing else does. What cannot be committed stays, is tried again, and is told at the next `fsync`. How much may wait is bounded: beyond that `close` waits for its own file.

use super::Core;
use super::file::{FileState, Open};
use efc_backend::tree::OpenFile;
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use futures::{StreamExt, stream};
use std::sync::Arc;
use std::sync::atomic::{
    AtomicUsize,
    Ordering::{Relaxed, SeqCst},
};
use std::time::Duration;
use tokio::sync::Semaphore;
use tracing::warn;

/// Commits under way at once.
const AT_ONCE: usize = 64;
/// Files that wait.
const WAITING_MAX: usize = 10_000;
/// Pause after a failure; doubles up to the maximum.
const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// What commits behind writers.
pub(super) struct Later {
    tasks: TaskGroup,
    turns: Semaphore,
    waiting: AtomicUsize,
}

impl Later {
    pub(super) fn new(tasks: TaskGroup) -> Later {
        Later { tasks, turns: Semaphore::new(AT_ONCE), waiting: AtomicUsize::new(0) }
    }
}

impl Core {
    /// Takes a file with changes, to be committed soon. False: without write-back, or when too much waits; then the caller commits it.
    pub(super) fn commit_later(self: &Arc<Self>, state: &Arc<FileState>) -> bool {
        let Some(later) = &self.later else { return false };
        if later.waiting.load(Relaxed) >= WAITING_MAX || self.space.is_scarce() {
            return false;
        }
        state.closes.fetch_add(1, SeqCst);
        if !state.queued.swap(true, SeqCst) {
            later.waiting.fetch_add(1, Relaxed);
            later.tasks.spawn(behind(self.clone(), state.clone()));
        }
        true
    }

    /// For a file that is known: also one whose name is gone.
    pub(super) fn open_again(self: &Arc<Self>, state: &Arc<FileState>) -> Open {
        let _files = self.files.lock();
        Open::new(self.clone(), state.clone())
    }

    /// Brings files to the store, many at a time. The first error, when all were tried.
    pub(super) async fn commit_all(self: &Arc<Self>, files: Vec<Arc<FileState>>) -> Result<()> {
        let commit = |state| async move { self.open_again(&state).sync(false).await.err() };
        let failed: Vec<Error> =
            stream::iter(files).map(commit).buffer_unordered(AT_ONCE).filter_map(async |e| e).collect().await;
        failed.into_iter().next().map_or(Ok(()), Err)
    }
}

async fn behind(core: Arc<Core>, state: Arc<FileState>) {
    let Some(later) = &core.later else { return };
    let mut pause = PAUSE_MIN;
    // Never closed.
    while let Ok(turn) = later.turns.acquire().await {
        let closes = state.closes.load(SeqCst);
        let outcome = core.open_again(&state).sync(false).await;
        drop(turn);
        match outcome {
            Ok(_) if is_over(&state, closes) => break,
            Ok(_) => continue,
            // It lies beside now, and the log says where.
            Err(e) if e.is(Kind::Conflict) && is_over(&state, closes) => break,
            Err(e) if pause == PAUSE_MIN => {
                let key = state.node().locator;
                warn!(key = %key.escape_ascii(), error = %e, "a closed file is not at the store yet; it is tried again");
            }
            Err(_) => {}
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
    later.waiting.fetch_sub(1, Relaxed);
}

/// Was it not closed again since it had been closed so often? Who closes it from now on takes it down anew.
fn is_over(state: &FileState, closes: usize) -> bool {
    state.queued.store(false, SeqCst);
    state.closes.load(SeqCst) == closes || state.queued.swap(true, SeqCst)
}
