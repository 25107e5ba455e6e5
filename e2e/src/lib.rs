//! Real processes for end-to-end tests: masters, workers and mounts, started from the programs that the workspace built.
//!
//! Everything ends when its value is dropped, also after a panic; logs are printed then. All access to a mount from a test goes through
//! a thread with a deadline ([`within`]), because a hung mount would hang the test for good.

mod cluster;
pub mod logs;
mod mount;
pub mod net;
pub mod reader;
pub mod tree;

pub use cluster::{Cluster, EVENTS_TOKEN, Master, Worker, WorkerSpec, metric};
pub use mount::Mount;

use anyhow::{Context, Result, bail};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long a process may take to say that it serves.
const READY: Duration = Duration::from_secs(40);

/// A program of the workspace, built beside the running test.
///
/// # Errors
/// When it was not built; the message says how.
pub fn program(name: &str) -> Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let found = exe.ancestors().skip(1).take(3).map(|d| d.join(name)).find(|p| p.is_file());
    found.with_context(|| format!("{name} is not built: run `cargo build --workspace --bins` (`./run test` does)"))
}

/// Peak of the resident set of a process as the kernel counted it, bytes.
///
/// # Errors
/// When it is gone.
pub fn peak_rss(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).context("VmHWM")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib << 10)
}

/// Polls `done` until it holds.
///
/// # Errors
/// When it does not within `patience`, or its own error.
pub fn wait_for(what: &str, patience: Duration, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + patience;
    while !done()? {
        if Instant::now() > deadline {
            bail!("no {what} within {patience:?}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// A program that `./run setup` has built for the tests.
///
/// # Panics
/// Without it.
pub fn tool(name: &str) -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").expect("HOME")).join(".cache"));
    let path = cache.join("efc/tools/bin").join(name);
    assert!(path.exists(), "{} is missing: `./run setup` installs it", path.display());
    path
}

/// Runs `work` in a thread and panics when it takes longer than `patience`.
pub fn within<T: Send + 'static>(patience: Duration, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (tx, rx) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // A receiver that gave up has panicked already.
        let _ = tx.send(work());
    });
    match rx.recv_timeout(patience) {
        Ok(v) => v,
        Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("not done within {patience:?}"),
        Err(_) => panic!("the work panicked"),
    }
}
