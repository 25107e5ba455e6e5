//! Does a mount answer? A thread asks it for its statistics every second; a file system that hangs lets it wait. It waits as long as it must: whoever takes the mount over answers it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// Pause between two questions.
const PAUSE: Duration = Duration::from_secs(1);

pub(super) struct Watch {
    base: Instant,
    /// When the question was asked that is not answered yet, milliseconds after `base`; 0: none.
    asked: Arc<AtomicU64>,
}

impl Watch {
    /// Begins to ask. The thread lives as long as the process.
    pub(super) fn start(mountpoint: &Path) -> Watch {
        let watch = Watch { base: Instant::now(), asked: Arc::default() };
        let (base, asked, path): (_, _, PathBuf) = (watch.base, watch.asked.clone(), mountpoint.into());
        let ask = move || {
            loop {
                asked.store(millis(base), SeqCst);
                // Any answer is one: also that the mount is gone.
                let _ = rustix::fs::statvfs(&path);
                asked.store(0, SeqCst);
                std::thread::sleep(PAUSE);
            }
        };
        if let Err(e) = std::thread::Builder::new().name("efc-watch".into()).spawn(ask) {
            tracing::error!(error = %e, "nobody notices when this mount hangs");
        }
        watch
    }

    /// How long an answer has been owed.
    pub(super) fn waits(&self) -> Duration {
        match self.asked.load(SeqCst) {
            0 => Duration::ZERO,
            asked => Duration::from_millis(millis(self.base).saturating_sub(asked)),
        }
    }

    /// The question waits for another process from now on.
    pub(super) fn begin_anew(&self) {
        // Answered this moment: then there is none.
        let _ = self.asked.fetch_update(SeqCst, SeqCst, |asked| (asked > 0).then(|| millis(self.base)));
    }
}

fn millis(base: Instant) -> u64 {
    base.elapsed().as_millis() as u64 + 1
}

/// What the threads of a process wait for in the kernel, a line each.
pub(super) fn stacks(pid: u32) -> String {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lines = tasks.map(|task| {
        let read = |name: &str| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let stack = read("stack");
        let frames: Vec<&str> = stack.lines().take(6).filter_map(|l| l.split_once("] ").map(|(_, f)| f)).collect();
        let state = read("status");
        let state = state.lines().find_map(|l| l.strip_prefix("State:")).unwrap_or("").trim().to_string();
        format!("{} [{state}] {} {}", read("comm").trim(), read("wchan").trim(), frames.join(" < "))
    });
    lines.collect::<Vec<_>>().join("; ")
}

/// Is a process over but for threads that are still in the kernel? They never come back from there to do anything: one that tells the kernel to drop a page may wait for the reader of that page,
/// whom only a successor can answer.
pub(super) fn is_dying(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name may contain anything; what follows its last parenthesis is the state.
    stat.rsplit_once(") ").is_some_and(|(_, state)| state.starts_with('Z'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_answers_is_not_waited_for() {
        let watch = Watch::start(Path::new("/"));
        std::thread::sleep(Duration::from_millis(200));
        assert!(watch.waits() < Duration::from_millis(150), "{:?}", watch.waits());
        assert!(stacks(std::process::id()).contains("efc-watch"));
    }
}
