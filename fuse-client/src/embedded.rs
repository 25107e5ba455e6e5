//! The embedded cluster: a single master and a single worker as child processes, so that a mount works with no cluster at hand.
//!
//! They are the same programs as in a real cluster (found beside this one, or in `PATH`), talk over loopback and a unix socket, and keep
//! their state under the mount's data directory. A child that exits by itself is started again with a pause that doubles; reads go to the
//! origin meanwhile.
//!
//! They live as long as the mount: their standard input is a pipe, and its other end is with the mount process and its holder. So one that takes the
//! mount over finds them serving, with what they have in memory.

use crate::holder::Held;
use crate::holder::line::Item;
use efc_common::error::Context as _;
use efc_common::id::hex;
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use parking_lot::Mutex;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tracing::{error, info, warn};

/// How long a child may take to say that it serves.
const READY_DEADLINE: Duration = Duration::from_secs(30);
/// How long a child may take to stop in good order.
const STOP_PATIENCE: Duration = Duration::from_secs(5);
/// How long the holder of a mount that has ended may have its data directory.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

/// What the embedded cluster needs to know.
#[derive(Debug, Clone)]
pub struct EmbeddedConfig {
    /// Where state lives; see [`default_data_dir`].
    pub data_dir: PathBuf,
    /// Memory tier, bytes.
    pub cache_memory_bytes: u64,
    /// Disk tier: directory and quota in bytes.
    pub disk: Option<(PathBuf, u64)>,
    /// Log filter of the children.
    pub log_level: String,
}

/// Sizes of the worker's tiers.
#[derive(Debug)]
pub struct Sizes {
    /// Bytes.
    memory: AtomicU64,
    /// Directory and quota, bytes.
    disk: Option<(PathBuf, AtomicU64)>,
}

impl Sizes {
    fn new(config: &EmbeddedConfig) -> Sizes {
        let disk = config.disk.clone().map(|(dir, quota)| (dir, AtomicU64::new(quota)));
        Sizes { memory: AtomicU64::new(config.cache_memory_bytes), disk }
    }

    /// Is there a disk tier?
    pub fn has_disk(&self) -> bool {
        self.disk.is_some()
    }

    /// What a worker is to have that is started from now on, bytes (0: as it is).
    pub fn set(&self, memory: u64, disk: u64) {
        if memory > 0 {
            self.memory.store(memory, Relaxed);
        }
        if let (Some((_, quota)), true) = (&self.disk, disk > 0) {
            quota.store(disk, Relaxed);
        }
    }

    /// Those of memory and disk, bytes (0: there is none).
    pub fn get(&self) -> (u64, u64) {
        (self.memory.load(Relaxed), self.disk.as_ref().map_or(0, |(_, quota)| quota.load(Relaxed)))
    }

    fn args(&self) -> Vec<String> {
        let (memory, quota) = self.get();
        let disk = self.disk.iter().flat_map(|(dir, _)| ["--disk".into(), format!("{}:{quota}", dir.display())]);
        ["--memory".into(), memory.to_string()].into_iter().chain(disk).collect()
    }
}

/// A running embedded cluster.
pub struct Embedded {
    /// Address of its master.
    pub master: String,
    master_task: TaskGroup,
    worker_task: TaskGroup,
    kept: Arc<Kept>,
    /// Those of its worker.
    pub sizes: Arc<Sizes>,
    /// A predecessor started it, perhaps with others.
    pub found_worker: bool,
}

/// An embedded cluster whose mount process is gone.
#[derive(Debug)]
pub struct Orphaned {
    /// The end of the pipe for which it lives.
    pub lifeline: OwnedFd,
    /// The locked file of its data directory.
    pub lock: OwnedFd,
    /// What runs, as text.
    pub running: String,
}

/// What runs.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Running {
    master: String,
    master_pid: u32,
    worker_pid: u32,
}

/// What a successor of this process needs of the cluster, and who keeps it.
struct Kept {
    held: Option<Arc<Held>>,
    lifeline: OwnedFd,
    /// Of which the children have the other end as their standard input.
    input: OwnedFd,
    /// Locked.
    lock: OwnedFd,
    running: Mutex<Running>,
}

impl Kept {
    /// Of a new cluster.
    fn new(held: Option<Arc<Held>>, lock: OwnedFd) -> Result<Kept> {
        let (input, lifeline) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(std::io::Error::from)?;
        Ok(Kept { held, lifeline, input, lock, running: Mutex::default() })
    }

    /// Of one that is there.
    fn found(held: Option<Arc<Held>>, left: Orphaned) -> Result<Kept> {
        let running = serde_json::from_str(&left.running)
            .map_err(|e| Error::new(Kind::Corrupt, "what is said of the embedded cluster").caused_by(e))?;
        // The same pipe, by its other end.
        let place = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&left.lifeline));
        let input = File::open(place)?.into();
        let (lifeline, lock) = (left.lifeline, left.lock);
        Ok(Kept { held, lifeline, input, lock, running: Mutex::new(running) })
    }

    /// Everything is kept for a successor.
    fn keep(&self) -> Result<()> {
        let Some(held) = &self.held else { return Ok(()) };
        held.keep(Item::Lifeline, "", Some(self.lifeline.as_fd()))?;
        held.keep(Item::DataDir, "", Some(self.lock.as_fd()))?;
        self.keep_running()
    }

    /// Another process runs.
    fn keep_running(&self) -> Result<()> {
        let running = self.running.lock();
        let Some(held) = &self.held else { return Ok(()) };
        let text = serde_json::to_string(&*running).map_err(|e| Error::new(Kind::Io, "not kept").caused_by(e))?;
        held.keep(Item::Cluster, &text, None)
    }

    /// Nothing is left to a successor.
    fn drop_all(&self) {
        let Some(held) = &self.held else { return };
        for item in [Item::Cluster, Item::DataDir, Item::Lifeline] {
            if let Err(e) = held.drop_item(item) {
                warn!(error = %e, "the holder was not told that the embedded cluster ends");
            }
        }
    }
}

/// A process of the cluster.
enum Process {
    /// Started by this one.
    Child(Child),
    /// By a predecessor.
    Found(AsyncFd<OwnedFd>),
}

impl Process {
    /// The process of that number, if it still is what a predecessor started with this data directory.
    fn find(name: &str, pid: u32, data_dir: &Path) -> Option<Process> {
        let fd = pidfd_open(Pid::from_raw(i32::try_from(pid).ok()?)?, PidfdFlags::NONBLOCK).ok()?;
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line);
        let is_it = line.split('\0').next()?.ends_with(name) && line.contains(&*data_dir.to_string_lossy());
        // SAFETY: the OwnedFd is the one descriptor, stays the same and open for as long as the AsyncFd holds it.
        is_it.then(|| unsafe { AsyncFd::register(fd) }.ok().map(Process::Found))?
    }

    /// Waits for its end, and says how it was.
    async fn ended(&mut self) -> String {
        match self {
            Process::Child(child) => child.wait().await.map(|s| s.to_string()).unwrap_or_else(|e| e.to_string()),
            Process::Found(process) => {
                let ended = process.readable().await.map(|_| "not started by this process".to_string());
                ended.unwrap_or_else(|e| e.to_string())
            }
        }
    }

    fn signal(&self, signal: Signal) {
        // It may have ended this moment; then there is nobody to tell.
        let _ = match self {
            Process::Child(child) => match child.id().and_then(|p| Pid::from_raw(p as i32)) {
                Some(pid) => kill_process(pid, signal),
                None => Ok(()),
            },
            Process::Found(process) => pidfd_send_signal(process.get_ref(), signal),
        };
    }

    async fn stop(&mut self, name: &str) {
        self.signal(Signal::TERM);
        if tokio::time::timeout(STOP_PATIENCE, self.ended()).await.is_err() {
            warn!(program = name, "embedded process did not stop when told to; killing it");
            self.signal(Signal::KILL);
            self.ended().await;
        }
    }
}

#[derive(Debug, Deserialize)]
struct MasterReady {
    grpc: String,
}

/// Where the embedded cluster of a mountpoint keeps its state by default: `/var/lib/efc/NAME-HASH`.
pub fn default_data_dir(mountpoint: &Path) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    let hash = efc_common::id::ContentId::of(&[b"mountpoint", mountpoint.as_os_str().as_bytes()]);
    let name = mountpoint.file_name().map_or("root".into(), |n| n.to_string_lossy().into_owned());
    PathBuf::from("/var/lib/efc").join(format!("{name}-{}", hex(&hash.0[..4])))
}

impl Embedded {
    /// Starts master and worker and waits until both serve; those of a predecessor are gone on with.
    ///
    /// # Errors
    /// [`Kind::Busy`] when another mount uses the data directory; else what kept a child from starting, with its last words.
    pub async fn start(config: &EmbeddedConfig, held: Option<Arc<Held>>, left: Option<Orphaned>) -> Result<Embedded> {
        let dir = &config.data_dir;
        std::fs::create_dir_all(dir).map_err(|e| Error::from(e).with("data_dir", dir.display()))?;
        let kept = Arc::new(match left {
            Some(left) => Kept::found(held, left)?,
            None => Kept::new(held, lock(dir)?.into())?,
        });
        let before = kept.running.lock().clone();
        let arg = |p: &Path| p.to_string_lossy().into_owned();
        let log = |name: &str| {
            vec!["--log-level".into(), config.log_level.clone(), "--log-file".into(), arg(&dir.join(name))]
        };
        // A restart must come back at the address that workers and this process know.
        let listen = if before.master.is_empty() { "127.0.0.1:0" } else { &before.master };
        let mut args: Vec<String> = vec!["--node-id".into(), "1".into(), "--listen".into(), listen.into()];
        args.extend(["--http".into(), "127.0.0.1:0".into(), "--data-dir".into(), arg(&dir.join("master"))]);
        args.extend(log("master.log"));
        let mut master =
            Supervised { name: "efc-master", args, log: dir.join("master.log"), kept: kept.clone(), sizes: None };
        let process = match Process::find("efc-master", before.master_pid, dir) {
            Some(found) => found,
            None => {
                let (child, ready) = master.spawn().await?;
                let ready: MasterReady = serde_json::from_str(&ready).map_err(|e| {
                    Error::new(Kind::Corrupt, format!("efc-master said `{ready}` when ready")).caused_by(e)
                })?;
                master.args[3] = ready.grpc.clone();
                kept.running.lock().master = ready.grpc;
                child
            }
        };
        let master_task = TaskGroup::new();
        master.supervise(&master_task, process);

        let address = kept.running.lock().master.clone();
        let mut args: Vec<String> = vec!["--id".into(), "embedded".into(), "--master".into(), address.clone()];
        args.extend(["--listen".into(), "127.0.0.1:0".into(), "--http".into(), "127.0.0.1:0".into()]);
        args.extend(["--unix".into(), arg(&dir.join("worker.sock"))]);
        args.extend(log("worker.log"));
        let sizes = Arc::new(Sizes::new(config));
        let (log, kept_too, of_tiers) = (dir.join("worker.log"), kept.clone(), Some(sizes.clone()));
        let worker = Supervised { name: "efc-worker", args, log, kept: kept_too, sizes: of_tiers };
        let found = Process::find("efc-worker", before.worker_pid, dir);
        let found_worker = found.is_some();
        let process = match found {
            Some(found) => found,
            None => worker.spawn().await?.0,
        };
        let worker_task = TaskGroup::new();
        worker.supervise(&worker_task, process);
        kept.keep()?;
        info!(master = address, data_dir = %dir.display(), "embedded cluster is up");
        Ok(Embedded { master: address, master_task, worker_task, kept, sizes, found_worker })
    }

    /// Stops both children in good order: the worker says goodbye to a master that still listens. A successor begins with others.
    pub async fn stop(self) {
        for task in [self.worker_task, self.master_task] {
            if !task.shutdown(STOP_PATIENCE * 2).await {
                warn!("embedded cluster did not stop in time; its processes were killed");
            }
        }
        self.kept.drop_all();
    }
}

fn lock(dir: &Path) -> Result<File> {
    let path = dir.join("lock");
    let file = File::create(&path).map_err(|e| Error::from(e).with("data_dir", dir.display()))?;
    let begun = Instant::now();
    // The holder of a mount that has just ended lets go of it a moment later.
    while rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
        if begun.elapsed() > LOCK_PATIENCE {
            let text = format!("data directory {} is in use by another mount; give `-o data_dir=`", dir.display());
            return Err(Error::new(Kind::Busy, text));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(file)
}

/// The program of that name beside this one, else from `PATH`.
fn program(name: &str) -> PathBuf {
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(name)));
    match beside {
        Some(path) if path.exists() => path,
        _ => PathBuf::from(name),
    }
}

/// A program that is to run as long as the mount.
struct Supervised {
    name: &'static str,
    args: Vec<String>,
    log: PathBuf,
    kept: Arc<Kept>,
    /// Of the worker: with those of the moment it is started.
    sizes: Option<Arc<Sizes>>,
}

impl Supervised {
    /// Starts it and waits for the line it writes to stdout when it serves.
    async fn spawn(&self) -> Result<(Process, String)> {
        let (name, path) = (self.name, program(self.name));
        let stderr = File::options().create(true).append(true).open(&self.log)?;
        let mut child = Command::new(&path)
            .args(&self.args)
            .args(self.sizes.iter().flat_map(|s| s.args()))
            .arg("--lifeline")
            .stdin(self.kept.input.try_clone()?)
            .stdout(Stdio::piped())
            .stderr(stderr)
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| Error::from(e).with("program", path.display()))
            .context(format!("{name} could not be started; it must stand beside efc-fuse or in PATH"))?;
        let stdout = child.stdout.take().ok_or_else(|| Error::new(Kind::Io, "child without stdout"))?;
        let mut line = String::new();
        let mut reader = BufReader::new(stdout);
        let said = tokio::time::timeout(READY_DEADLINE, reader.read_line(&mut line)).await;
        match said {
            Ok(Ok(n)) if n > 0 => {
                let pid = child.id().unwrap_or_default();
                let mut running = self.kept.running.lock();
                *(if name == "efc-master" { &mut running.master_pid } else { &mut running.worker_pid }) = pid;
                Ok((Process::Child(child), line.trim().to_string()))
            }
            Ok(_) => {
                let status = child.wait().await.map(|s| s.to_string()).unwrap_or_default();
                let text = format!("{name} ended before it served ({status}): {}", last_words(&self.log));
                Err(Error::new(Kind::Unavailable, text))
            }
            Err(_) => Err(Error::new(
                Kind::Timeout,
                format!("{name} did not serve within {}s, see {}", READY_DEADLINE.as_secs(), self.log.display()),
            )),
        }
    }

    /// Starts it again whenever it ends, until the group is stopped.
    fn supervise(self, tasks: &TaskGroup, mut process: Process) {
        let group = tasks.clone();
        let name = self.name;
        tasks.spawn_graceful(async move {
            let mut pause = Duration::from_millis(500);
            loop {
                tokio::select! {
                    _ = group.stopped() => return process.stop(name).await,
                    status = process.ended() => {
                        error!(program = name, status, "embedded process ended by itself; starting it again");
                    }
                }
                process = loop {
                    tokio::select! {
                        _ = group.stopped() => return,
                        _ = tokio::time::sleep(pause) => {}
                    }
                    pause = (pause * 2).min(Duration::from_secs(30));
                    match self.spawn().await {
                        Ok((process, _)) => break process,
                        Err(e) => error!(program = name, error = %e, "embedded process could not be started again"),
                    }
                };
                if let Err(e) = self.kept.keep_running() {
                    warn!(error = %e, "a successor would start the embedded cluster anew");
                }
            }
        });
    }
}

fn last_words(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines = || text.lines().rev().filter(|l| !l.trim().is_empty());
    let said = lines().find(|l| l.to_lowercase().contains("error")).or_else(|| lines().next());
    said.unwrap_or("it said nothing").to_string()
}
