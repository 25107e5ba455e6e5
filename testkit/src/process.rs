//! Child processes that cannot outlive their test, and scratch directories that do not pile up.
//!
//! A [`Guarded`] child dies when the guard is dropped (SIGTERM, then SIGKILL to its process group) and when the test process itself dies, by
//! whatever cause (`PR_SET_PDEATHSIG`). The kernel sends that signal when the *thread* that forked ends, and test threads
//! end before servers shared by several tests, so all forks happen on one thread that lives as long as the process.

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Once, OnceLock, mpsc};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long a server may take to answer after its start.
pub const START_DEADLINE: Duration = Duration::from_secs(60);
/// How long a process may take to stop by SIGTERM before it is killed.
const TERM_DEADLINE: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(10);
const TAIL_BYTES: u64 = 8 * 1024;

/// The directory all scratch lives in: `$TMPDIR/efc-testkit`.
///
/// # Errors
/// When it cannot be made.
pub fn scratch_root() -> Result<PathBuf> {
    let root = std::env::temp_dir().join("efc-testkit");
    fs::create_dir_all(&root).with_context(|| format!("create {}", root.display()))?;
    Ok(root)
}

/// A fresh directory, removed on drop. What a killed test process left behind is removed by the next one.
///
/// # Errors
/// When it cannot be made.
pub fn scratch(name: &str) -> Result<TempDir> {
    static SWEEP: Once = Once::new();
    let root = scratch_root()?;
    SWEEP.call_once(|| sweep(&root));
    let prefix = format!("{}-{name}-", std::process::id());
    tempfile::Builder::new().prefix(&prefix).tempdir_in(&root).context("make a scratch directory")
}

/// Removes scratch whose owner (the number its name starts with) is no longer alive.
fn sweep(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|n| n.split_once('-')).and_then(|(pid, _)| pid.parse::<i32>().ok());
        if owner.is_some_and(|pid| kill(Pid::from_raw(pid), None) == Err(nix::errno::Errno::ESRCH)) {
            // Another process may sweep at the same time: the loser finds nothing, which is as good.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

type Job = (Command, mpsc::Sender<std::io::Result<Child>>);

/// Forks on the one thread that lives as long as the process; see the module.
fn spawn_on_lasting_thread(command: Command) -> std::io::Result<Child> {
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (tx, rx) = mpsc::channel::<Job>();
        std::thread::Builder::new()
            .name("spawner".into())
            .spawn(move || {
                for (mut command, answer) in rx {
                    // A caller that went away drops the child's handle; PDEATHSIG still ends the child.
                    let _ = answer.send(command.spawn());
                }
            })
            .expect("start the spawner thread");
        tx
    });
    let (tx, rx) = mpsc::channel();
    spawner.send((command, tx)).map_err(std::io::Error::other)?;
    rx.recv().map_err(std::io::Error::other)?
}

/// A child process with its log; see the module.
#[derive(Debug)]
pub struct Guarded {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Guarded {
    /// Starts `command` in a process group of its own, stdin closed, stdout and stderr appended to `dir/NAME.log`.
    ///
    /// # Errors
    /// When the log cannot be opened or the program not be started.
    pub fn spawn(name: &str, mut command: Command, dir: &Path) -> Result<Guarded> {
        let log = dir.join(format!("{name}.log"));
        let out = File::options().create(true).append(true).open(&log).with_context(|| format!("{}", log.display()))?;
        let program = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out).process_group(0);
        let parent = std::process::id();
        // SAFETY: between fork and exec only async-signal-safe calls are made: prctl and getppid.
        unsafe {
            command.pre_exec(move || {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                // The parent may have died before the prctl: then no signal would ever come.
                if libc::getppid() as u32 != parent {
                    return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
                }
                Ok(())
            });
        }
        let child = spawn_on_lasting_thread(command).with_context(|| {
            format!("start {program} (is it installed? `./run setup` installs what the tests need)")
        })?;
        Ok(Guarded { name: name.into(), child, log })
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The file that collects stdout and stderr.
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// The last 8 KiB of the log.
    pub fn log_tail(&self) -> String {
        tail(&self.log)
    }

    /// Does it still run?
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal to the process (not to its group).
    ///
    /// # Errors
    /// When the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.nix_pid(), signal).with_context(|| format!("signal {} ({})", self.name, self.pid()))
    }

    /// SIGKILL to the group, and waits until the process is reaped.
    pub fn kill_hard(&mut self) {
        if self.is_running() {
            let _ = killpg(self.nix_pid(), Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }

    /// SIGTERM to the group, SIGKILL after three seconds.
    pub fn stop(&mut self) {
        if !self.is_running() {
            return;
        }
        let _ = killpg(self.nix_pid(), Signal::SIGTERM);
        if self.wait_exit(TERM_DEADLINE).is_none() {
            self.kill_hard();
        }
    }

    /// Waits for the process to end by itself; `None` when it still runs after `patience`.
    pub fn wait_exit(&mut self, patience: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < deadline => std::thread::sleep(POLL),
                _ => return None,
            }
        }
    }

    /// Polls `ready` until it holds.
    ///
    /// # Errors
    /// When the process ends first or `patience` runs out; the message carries the log's tail.
    pub fn wait_until(&mut self, what: &str, patience: Duration, mut ready: impl FnMut() -> bool) -> Result<()> {
        let deadline = Instant::now() + patience;
        while !ready() {
            if let Ok(Some(status)) = self.child.try_wait() {
                bail!("{} ended ({status}) before {what}:\n{}", self.name, self.log_tail());
            }
            if Instant::now() > deadline {
                bail!("{}: no {what} within {patience:?}:\n{}", self.name, self.log_tail());
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Waits until a TCP port of loopback accepts connections.
    ///
    /// # Errors
    /// As [`Guarded::wait_until`].
    pub fn wait_port(&mut self, port: u16) -> Result<()> {
        self.wait_until(&format!("port {port} answered"), START_DEADLINE, || connects(port))
    }

    fn nix_pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {} ({}), end of its log ---\n{}", self.name, self.pid(), self.log_tail());
        }
        self.stop();
    }
}

/// Does a TCP port of loopback accept connections?
pub fn connects(port: u16) -> bool {
    TcpStream::connect_timeout(&SocketAddr::from(([127, 0, 0, 1], port)), Duration::from_secs(1)).is_ok()
}

fn tail(path: &Path) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        file.seek(SeekFrom::Start(size.saturating_sub(TAIL_BYTES)))?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    };
    read().unwrap_or_else(|e| format!("({}: {e})", path.display()))
}

/// Runs a command to its end with a deadline and gives its stdout.
///
/// # Errors
/// When it cannot start, fails or takes longer than `patience` (it is killed then); the message carries its output.
pub fn run_to_end(name: &str, command: Command, patience: Duration) -> Result<String> {
    let dir = scratch(name)?;
    let mut child = Guarded::spawn(name, command, dir.path())?;
    let status = child.wait_exit(patience);
    let output = fs::read(child.log_path()).map(|b| String::from_utf8_lossy(&b).into_owned())?;
    match status {
        Some(s) if s.success() => Ok(output),
        Some(s) => Err(anyhow!("{name} failed ({s}):\n{output}")),
        None => Err(anyhow!("{name} did not end within {patience:?}:\n{output}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper() -> Command {
        let mut c = Command::new("sleep");
        c.arg("1000");
        c
    }

    fn alive(pid: u32) -> bool {
        kill(Pid::from_raw(pid as i32), None).is_ok()
    }

    #[test]
    fn drop_ends_the_child_and_its_children() {
        let dir = scratch("guard").unwrap();
        let mut c = Command::new("sh");
        c.args(["-c", "sleep 1000 & echo $!; wait"]);
        let mut g = Guarded::spawn("sh", c, dir.path()).unwrap();
        let log = g.log_path().to_path_buf();
        g.wait_until("the grandchild's pid", START_DEADLINE, || {
            fs::read_to_string(&log).is_ok_and(|t| t.ends_with('\n'))
        })
        .unwrap();
        let grandchild: u32 = fs::read_to_string(&log).unwrap().trim().parse().unwrap();
        let pid = g.pid();
        drop(g);
        assert!(!alive(pid));
        // An orphan is reaped by init, in its own time.
        let deadline = Instant::now() + Duration::from_secs(10);
        while alive(grandchild) && Instant::now() < deadline {
            let stat = fs::read_to_string(format!("/proc/{grandchild}/stat")).unwrap_or_default();
            if stat.contains(") Z ") {
                return;
            }
            std::thread::sleep(POLL);
        }
        assert!(!alive(grandchild));
    }

    #[test]
    fn a_child_survives_the_thread_that_asked_for_it() {
        let dir = scratch("guard").unwrap();
        let path = dir.path().to_path_buf();
        let mut g = std::thread::spawn(move || Guarded::spawn("sleep", sleeper(), &path).unwrap()).join().unwrap();
        assert!(g.wait_exit(Duration::from_millis(200)).is_none());
        assert!(g.is_running());
    }

    #[test]
    fn an_early_end_is_reported_with_the_log() {
        let dir = scratch("guard").unwrap();
        let mut c = Command::new("sh");
        c.args(["-c", "echo the reason >&2; exit 3"]);
        let mut g = Guarded::spawn("sh", c, dir.path()).unwrap();
        let e = g.wait_until("readiness", START_DEADLINE, || false).unwrap_err().to_string();
        assert!(e.contains("the reason") && e.contains("3"), "{e}");
    }

    #[test]
    fn scratch_of_dead_processes_is_swept() {
        let mut child = sleeper().spawn().unwrap();
        let root = tempfile::tempdir().unwrap();
        let dead = root.path().join(format!("{}-x-1", child.id()));
        let live = root.path().join(format!("{}-x-1", std::process::id()));
        fs::create_dir(&dead).unwrap();
        fs::create_dir(&live).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        sweep(root.path());
        assert!(!dead.exists() && live.exists());
    }
}
