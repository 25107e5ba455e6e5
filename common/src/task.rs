//! Owned tasks. Every spawn has an owner: a [`TaskGroup`] that can stop its tasks and wait for them, so that nothing outlives
//! the thing it works for.

use std::future::Future;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A set of tasks with one stop signal. Clones share the set.
#[derive(Debug, Clone, Default)]
pub struct TaskGroup {
    tracker: TaskTracker,
    stop: CancellationToken,
}

impl TaskGroup {
    /// A group with its own stop signal.
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs `future` in the group; it is dropped at its next await once the group stops.
    pub fn spawn<F>(&self, future: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let stop = self.stop.clone();
        self.tracker.spawn(async move {
            tokio::select! {
                _ = stop.cancelled() => {}
                _ = future => {}
            }
        });
    }

    /// Runs `future` in the group to its end: it looks at [`TaskGroup::stopped`] itself and ends in good order.
    pub fn spawn_graceful<F>(&self, future: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.tracker.spawn(future);
    }

    /// Resolves when the group is told to stop.
    pub async fn stopped(&self) {
        self.stop.cancelled().await;
    }

    /// Has the group been told to stop?
    pub fn is_stopped(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// The stop signal itself, to hand to code that wants a token.
    pub fn token(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Tells every task to stop without waiting.
    pub fn cancel(&self) {
        self.stop.cancel();
    }

    /// Tells every task to stop and waits up to `patience` for them; true if all ended.
    pub async fn shutdown(&self, patience: Duration) -> bool {
        self.stop.cancel();
        self.tracker.close();
        tokio::time::timeout(patience, self.tracker.wait()).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

    #[tokio::test]
    async fn shutdown_ends_plain_tasks_and_waits_for_graceful_ones() {
        let g = TaskGroup::new();
        let done = Arc::new(AtomicBool::new(false));
        g.spawn(std::future::pending());
        g.spawn_graceful({
            let (g, done) = (g.clone(), done.clone());
            async move {
                g.stopped().await;
                done.store(true, SeqCst);
            }
        });
        assert!(g.shutdown(Duration::from_secs(5)).await);
        assert!(done.load(SeqCst) && g.is_stopped());
    }
}
