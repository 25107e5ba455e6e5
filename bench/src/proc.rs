//! The processes behind a mount: what they cost, and their end.
//!
//! The benchmark is a child subreaper (`PR_SET_CHILD_SUBREAPER`), so a daemon that detaches itself stays our descendant. At any time
//! one tool is mounted (EFC's second node apart), so the descendants are that tool's processes, however it starts them.

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// How often the end of processes is looked for.
const POLL: Duration = Duration::from_millis(20);

/// Becomes the parent of every orphan among our descendants.
///
/// # Errors
/// When the kernel refuses.
pub fn become_subreaper() -> Result<()> {
    nix::sys::prctl::set_child_subreaper(true).context("become a child subreaper")
}

/// pid -> (parent, state, CPU ticks used by it).
fn table() -> BTreeMap<i32, (i32, char, u64)> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    pids.filter_map(|pid| Some((pid, stat(pid)?))).collect()
}

fn stat(pid: i32) -> Option<(i32, char, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold blanks and parentheses; the fields after it do not.
    let (_, rest) = text.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split(' ').collect();
    let ticks = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    Some((fields.get(1)?.parse().ok()?, fields.first()?.chars().next()?, ticks))
}

/// Our descendants that live (no zombies).
pub fn descendants() -> BTreeSet<i32> {
    let table = table();
    let mut found = BTreeSet::new();
    let mut new = vec![std::process::id() as i32];
    while let Some(parent) = new.pop() {
        let children = table.iter().filter(|(_, (p, _, _))| *p == parent).map(|(pid, _)| *pid);
        new.extend(children.filter(|c| found.insert(*c)).collect::<Vec<_>>());
    }
    found.retain(|pid| table.get(pid).is_some_and(|(_, state, _)| *state != 'Z'));
    found
}

/// CPU seconds, user and system, that these processes have used so far. One that is gone counts as nothing.
pub fn cpu_seconds(pids: &BTreeSet<i32>) -> f64 {
    // SAFETY: sysconf only reads a constant of the system.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) }.max(1) as f64;
    pids.iter().filter_map(|p| stat(*p)).map(|(_, _, ticks)| ticks as f64 / per_second).sum()
}

/// Waits until none of `pids` lives; kills what is left after `patience`.
///
/// # Errors
/// When even SIGKILL does not end one: it hangs in the kernel.
pub fn wait_gone(pids: &BTreeSet<i32>, patience: Duration) -> Result<()> {
    for (signal, patience) in [
        (None, patience),
        (Some(Signal::SIGTERM), Duration::from_secs(3)),
        (Some(Signal::SIGKILL), Duration::from_secs(5)),
    ] {
        let deadline = Instant::now() + patience;
        let mut left = living(pids);
        if let Some(signal) = signal {
            for pid in &left {
                // It may have ended by itself just now.
                let _ = kill(Pid::from_raw(*pid), signal);
            }
        }
        while !left.is_empty() && Instant::now() < deadline {
            std::thread::sleep(POLL);
            reap(pids);
            left = living(pids);
        }
        if left.is_empty() {
            return Ok(());
        }
    }
    bail!("processes {:?} do not end", living(pids))
}

fn living(pids: &BTreeSet<i32>) -> BTreeSet<i32> {
    pids.iter().copied().filter(|p| stat(*p).is_some_and(|(_, state, _)| state != 'Z')).collect()
}

/// Takes the exit status of those that ended: orphans that came to us have no other parent.
fn reap(pids: &BTreeSet<i32>) {
    for pid in pids {
        // Not our child, or taken already: nothing to do.
        let _: nix::Result<WaitStatus> = waitpid(Pid::from_raw(*pid), Some(WaitPidFlag::WNOHANG));
    }
}

/// Empties the kernel's page, dentry and inode caches.
///
/// # Errors
/// When we are not root.
pub fn drop_caches() -> Result<()> {
    // Dirty pages are not dropped.
    nix::unistd::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("drop the kernel's caches (needs root)")
}

/// Is anything mounted at exactly this path? Reads mountinfo only.
pub fn is_mounted(path: &Path) -> bool {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let path = path.to_string_lossy();
    text.lines().any(|l| l.split(' ').nth(4) == Some(&path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountpoints_are_found() {
        assert!(is_mounted(Path::new("/proc")));
        assert!(!is_mounted(Path::new("/proc/self")));
    }
}
