//! A mount by `efc-fuse mount`, and its processes: the holder and the one that serves.

use super::{READY, logs, net, program, wait_for};
use anyhow::{Context, Result, bail};
use efc_testkit::process::{Guarded, scratch};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;
use tempfile::TempDir;

/// A mount served by a foreground `efc-fuse`.
pub struct Mount {
    /// Where.
    pub path: PathBuf,
    child: Option<Guarded>,
    /// The holder that took the place of the process that was started; 0: none.
    holder: AtomicU32,
    _dir: TempDir,
}

impl Mount {
    /// Mounts `source`; `env` holds credentials.
    ///
    /// # Errors
    /// When the mount does not come up; the message carries its log.
    pub fn start(source: &str, options: &[&str], env: &[(&str, &str)]) -> Result<Mount> {
        Mount::start_by(Command::new(program("efc-fuse")?), source, options, env)
    }

    /// As [`Mount::start`], with the daemon in a network namespace.
    ///
    /// # Errors
    /// As [`Mount::start`].
    pub fn start_in(node: &net::Node, source: &str, options: &[&str], env: &[(&str, &str)]) -> Result<Mount> {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", node.name)).arg(program("efc-fuse")?);
        Mount::start_by(command, source, options, env)
    }

    fn start_by(mut command: Command, source: &str, options: &[&str], env: &[(&str, &str)]) -> Result<Mount> {
        let dir = scratch("mount")?;
        let path = dir.path().join("mnt");
        std::fs::create_dir(&path)?;
        let mut m = Mount { path, child: None, holder: AtomicU32::new(0), _dir: dir };
        command.args(["mount", "--foreground", source]).arg(&m.path).envs(env.iter().copied());
        let embedded = !options.iter().any(|o| o.contains("master="));
        if embedded {
            command.arg("-o").arg(format!("data_dir={}", m._dir.path().join("data").display()));
        }
        options.iter().for_each(|o| {
            command.arg("-o").arg(o);
        });
        let child = m.child.insert(Guarded::spawn("efc-fuse", command, m._dir.path())?);
        let log = child.log_path().to_path_buf();
        child.wait_until("mounted", READY, || {
            std::fs::read_to_string(&log).is_ok_and(|t| t.lines().any(|l| l == "mounted"))
        })?;
        Ok(m)
    }

    /// SIGKILL to the mount process and its holder.
    pub fn kill(&mut self) {
        let pid = self.pid();
        if let Some(child) = &mut self.child {
            child.kill_hard();
        }
        sigkill(pid);
    }

    /// The process that was started.
    pub fn started(&self) -> u32 {
        self.child.as_ref().map_or(0, Guarded::pid)
    }

    /// Waits for the daemon's end by itself.
    ///
    /// # Errors
    /// When it does not end well.
    pub fn ended(mut self) -> Result<()> {
        self.wait_end()
    }

    /// The process that holds the mount, or serves it where nobody holds it.
    pub fn holder(&self) -> u32 {
        match self.holder.load(Relaxed) {
            0 => self.started(),
            pid => pid,
        }
    }

    /// The process that serves the mount: the child of its holder, or the parent of a holder that took another's place.
    pub fn pid(&self) -> u32 {
        let holder = self.holder();
        let parent = || process(holder).map(|p| p.parent).filter(|_| holder != self.started());
        child_of(holder).or_else(|| parent().filter(|p| process(*p).is_some_and(|p| p.is_mount()))).unwrap_or(holder)
    }

    /// SIGKILL to what serves the mount; its holder, if there is one, starts another.
    pub fn kill_server(&self) {
        sigkill(self.pid());
    }

    /// SIGKILL to the holder, and waits for another.
    ///
    /// # Errors
    /// When there is none.
    pub fn kill_holder(&self) -> Result<()> {
        let (server, holder) = (self.pid(), self.holder());
        sigkill(holder);
        wait_for("another holder", READY, || {
            let next = child_of(server).filter(|pid| *pid != holder);
            self.holder.store(next.unwrap_or(holder), Relaxed);
            Ok(next.is_some())
        })
    }

    /// What the daemon logged.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn log(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self._dir.path().join("efc-fuse.log"))?)
    }

    /// `efc-fuse stats -o json`.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn stats(&self) -> Result<Value> {
        let out = Command::new(program("efc-fuse")?).arg("stats").arg(&self.path).args(["-o", "json"]).output()?;
        if !out.status.success() {
            bail!("efc-fuse stats: {}", String::from_utf8_lossy(&out.stderr));
        }
        Ok(serde_json::from_slice(&out.stdout)?)
    }

    /// Requests by FUSE operation since the mount, and their sum. Without STATFS: no test asks for it, but whoever looks at the disks of this machine meanwhile
    /// (`df`, a monitor) asks every mount.
    ///
    /// # Errors
    /// As [`Mount::stats`].
    pub fn fuse_requests(&self) -> Result<(BTreeMap<String, u64>, u64)> {
        let stats = self.stats()?;
        let ops = stats["ops"].as_object().context("ops")?.iter().filter(|(op, _)| *op != "statfs");
        let ops: BTreeMap<String, u64> = ops.map(|(k, v)| (k.clone(), v["requests"].as_u64().unwrap_or(0))).collect();
        let sum = ops.values().sum();
        Ok((ops, sum))
    }

    /// Unmounts, waits for the daemon's end, and fails if it (or its embedded cluster) logged a WARN or ERROR that
    /// contains none of `expected`.
    ///
    /// # Errors
    /// When one of these fails.
    pub fn finish(mut self, expected: &[&str]) -> Result<()> {
        self.end()?;
        logs::check(self._dir.path(), expected)
    }

    /// Unmounts and waits for the daemon's end.
    ///
    /// # Errors
    /// When either fails.
    pub fn unmount(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let out = Command::new(program("efc-fuse")?).arg("umount").arg(&self.path).output()?;
        if !out.status.success() {
            bail!("efc-fuse umount: {}", String::from_utf8_lossy(&out.stderr));
        }
        self.wait_end()
    }

    fn wait_end(&mut self) -> Result<()> {
        let holder = self.holder();
        let Some(mut child) = self.child.take() else { return Ok(()) };
        if holder != child.pid() {
            return wait_for("end of the holder", READY, || Ok(process(holder).is_none_or(|p| !p.is_mount())));
        }
        match child.wait_exit(Duration::from_secs(20)) {
            Some(s) if s.success() => Ok(()),
            Some(s) => bail!("efc-fuse ended with {s}:\n{}", child.log_tail()),
            None => bail!("efc-fuse did not end after its unmount:\n{}", child.log_tail()),
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // The kernel lets go of the mount first, so that nothing can hang on it while the daemon ends.
        let _ = nix::mount::umount2(&self.path, nix::mount::MntFlags::MNT_DETACH);
        drop(self.child.take());
    }
}

/// What the kernel says of a process.
struct Process {
    name: String,
    state: String,
    parent: u32,
}

impl Process {
    /// Is it an `efc-fuse`, and not one that is only waited for?
    fn is_mount(&self) -> bool {
        self.name == "efc-fuse" && self.state != "Z"
    }
}

fn process(pid: u32) -> Option<Process> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (name, rest) = stat.split_once('(')?.1.rsplit_once(") ")?;
    let mut rest = rest.split(' ');
    Some(Process { name: name.into(), state: rest.next()?.into(), parent: rest.next()?.parse().ok()? })
}

/// The `efc-fuse` that a process, in any of its threads, has started.
fn child_of(pid: u32) -> Option<u32> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = threads.filter_map(|t| std::fs::read_to_string(t.path().join("children")).ok());
    let all: Vec<u32> =
        children.flat_map(|c| c.split_whitespace().filter_map(|p| p.parse().ok()).collect::<Vec<_>>()).collect();
    all.into_iter().find(|p| process(*p).is_some_and(|p| p.is_mount()))
}

fn sigkill(pid: u32) {
    // It may have ended by itself.
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::Signal::SIGKILL);
}
