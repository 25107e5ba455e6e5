//! Work that goes on while mount processes die.

use efc_e2e::{Mount, wait_for, within};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// One step of a thread; any error is a panic.
pub(super) type Step = Box<dyn FnMut()>;

/// Threads that work until they are told to stop.
pub(super) struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Duration>>,
}

impl Load {
    /// `make` gives each thread its steps.
    pub(super) fn start(threads: usize, make: impl Fn(usize) -> Step + Send + Sync + 'static) -> Load {
        let (stop, done): (Arc<AtomicBool>, Arc<AtomicU64>) = Default::default();
        let make = Arc::new(make);
        let threads = (0..threads).map(|t| {
            let (stop, done, make) = (stop.clone(), done.clone(), make.clone());
            std::thread::spawn(move || {
                let (mut step, mut longest) = (make(t), Duration::ZERO);
                while !stop.load(Relaxed) {
                    let begun = Instant::now();
                    step();
                    longest = longest.max(begun.elapsed());
                    done.fetch_add(1, Relaxed);
                }
                longest
            })
        });
        Load { threads: threads.collect(), stop, done }
    }

    /// Waits until so much more was done.
    pub(super) fn more(&self, steps: u64) {
        let want = self.done.load(Relaxed) + steps;
        let fell = || self.threads.iter().any(JoinHandle::is_finished);
        wait_for("work to go on", PATIENCE, || Ok(fell() || self.done.load(Relaxed) >= want)).expect("work");
        assert!(!fell(), "a thread saw an error");
    }

    /// The longest step of all.
    pub(super) fn finish(self) -> Duration {
        self.finish_within(PATIENCE)
    }

    /// The same of steps that may take so long.
    pub(super) fn finish_within(self, patience: Duration) -> Duration {
        self.stop.store(true, Relaxed);
        let threads = self.threads;
        within(patience, move || threads.into_iter().map(|t| t.join().expect("a thread saw an error")).max())
            .unwrap_or_default()
    }

    /// Stops the mount process, and waits until another serves, and `steps` more are done. Since when it was stopped.
    pub(super) fn hang(&self, mount: &Mount, steps: u64) -> Instant {
        let pid = mount.pid();
        kill(Pid::from_raw(pid as i32), Signal::SIGSTOP).expect("stop");
        let begun = Instant::now();
        wait_for("another mount process", PATIENCE, || Ok(mount.pid() != pid)).expect("replaced");
        self.more(steps);
        begun
    }

    /// Kills the mount process, and waits for another one and that it serves.
    pub(super) fn kill(&self, mount: &Mount) {
        let pid = mount.pid();
        mount.kill_server();
        wait_for("another mount process", PATIENCE, || Ok(mount.pid() != pid)).expect("replaced");
        self.more(20);
    }
}
