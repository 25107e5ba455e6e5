//! What an origin says of its space. It is told from memory where that is possible: the holder asks every second whether the mount answers, which is no question to a slow or dead origin, and
//! the mount is in use for as long as a question is under way.

use efc_backend::{DynBackend, FsStats};
use efc_common::Result;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the last answer is good.
const FRESH: Duration = Duration::from_secs(2);
/// An answer of this age is told while the origin is asked again; an older one if it has not said anything in time.
const OLD: Duration = Duration::from_secs(10);
/// How long an origin may take to tell of its space: it is no reason for `df` to wait.
const PATIENCE: Duration = Duration::from_secs(1);
/// Object stores have no capacity: 1 PiB.
const ENDLESS: u64 = 1 << 50;

pub(super) struct Capacity {
    backend: DynBackend,
    last: Arc<Mutex<Option<(Instant, FsStats)>>>,
    /// Held by the question that is under way.
    asking: Arc<tokio::sync::Mutex<()>>,
}

impl Capacity {
    pub(super) fn of(backend: DynBackend) -> Capacity {
        Capacity { backend, last: Arc::default(), asking: Arc::default() }
    }

    /// What it is, or was a moment ago. Of an origin that has never answered: nothing.
    pub(super) async fn get(&self) -> Result<FsStats> {
        if !self.backend.capabilities().statfs {
            let space =
                FsStats { total_bytes: ENDLESS, free_bytes: ENDLESS, available_bytes: ENDLESS, ..FsStats::default() };
            return Ok(space);
        }
        let known = *self.last.lock();
        if let Some((_, stats)) = known.filter(|(at, _)| at.elapsed() < FRESH) {
            return Ok(stats);
        }
        let Ok(asks) = self.asking.clone().try_lock_owned() else {
            if known.is_none() {
                // The first to ask is answered for all.
                let _ = tokio::time::timeout(PATIENCE, self.asking.lock()).await;
            }
            return Ok(self.last.lock().unwrap_or((Instant::now(), FsStats::default())).1);
        };
        let (backend, last) = (self.backend.clone(), self.last.clone());
        let asked = tokio::spawn(async move {
            let said = backend.statfs().await;
            if let Ok(stats) = &said {
                *last.lock() = Some((Instant::now(), *stats));
            }
            drop(asks);
            said
        });
        if let Some((_, stats)) = known.filter(|(at, _)| at.elapsed() < OLD) {
            return Ok(stats);
        }
        match tokio::time::timeout(PATIENCE, asked).await {
            Ok(Ok(said)) => said,
            // It has not said anything yet.
            Ok(Err(_)) | Err(_) => Ok(known.map(|(_, stats)| stats).unwrap_or_default()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use efc_backend::connect::connect_counted;
    use efc_common::source::{SecretRef, SourceSpec};

    #[tokio::test]
    async fn who_asks_again_does_not_wait_for_the_origin() {
        let dir = tempfile::tempdir().expect("dir");
        let options = [("fault".to_string(), "latency=400ms".to_string())].into();
        let url = format!("file://{}", dir.path().display());
        let spec = SourceSpec::parse(&url, options, SecretRef::default()).expect("spec");
        let capacity = Capacity::of(connect_counted(&spec, None).await.expect("origin").backend);
        let (one, other) = tokio::join!(capacity.get(), capacity.get());
        let (one, other) = (one.expect("space"), other.expect("space"));
        assert!(one.total_bytes > 0);
        assert_eq!(one.total_bytes, other.total_bytes, "asked once, told to both");
        tokio::time::sleep(FRESH).await;
        let begun = Instant::now();
        assert_eq!(capacity.get().await.expect("space").total_bytes, one.total_bytes);
        assert!(begun.elapsed() < Duration::from_millis(400), "{:?}", begun.elapsed());
        drop(capacity.asking.lock().await);
        let (at, _) = capacity.last.lock().expect("answered");
        assert!(at > begun, "and the origin was asked");
    }
}
