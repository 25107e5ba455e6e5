//! The embedded cluster: a single master and a single worker as child processes, so that a mount works with no cluster at hand.
//!
//! They are the same programs as in a real cluster (found beside this one, or in `PATH`), talk over loopback and a unix socket, keep
//! their state under the mount's data directory and die with the mount process. A child that exits by itself is started again
//! with a pause that doubles; reads go to the origin meanwhile.

use efc_common::error::Context as _;
use efc_common::id::hex;
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use serde::Deserialize;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tracing::{error, info, warn};

/// How long a child may take to say that it serves.
const READY_DEADLINE: Duration = Duration::from_secs(30);
/// How long a child may take to stop in good order.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

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

/// A running embedded cluster.
pub struct Embedded {
    /// Address of its master.
    pub master: String,
    master_task: TaskGroup,
    worker_task: TaskGroup,
    _lock: File,
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
    /// Starts master and worker and waits until both serve.
    ///
    /// # Errors
    /// [`Kind::Busy`] when another mount uses the data directory; else what kept a child from starting, with its last words.
    pub async fn start(config: &EmbeddedConfig) -> Result<Embedded> {
        let dir = &config.data_dir;
        std::fs::create_dir_all(dir).map_err(|e| Error::from(e).with("data_dir", dir.display()))?;
        let lock = lock(dir)?;
        let (master_task, worker_task) = (TaskGroup::new(), TaskGroup::new());
        let arg = |p: &Path| p.to_string_lossy().into_owned();
        let log = |name: &str| {
            vec!["--log-level".into(), config.log_level.clone(), "--log-file".into(), arg(&dir.join(name))]
        };
        let mut master_args: Vec<String> =
            vec!["--node-id".into(), "1".into(), "--listen".into(), "127.0.0.1:0".into()];
        master_args.extend(["--http".into(), "127.0.0.1:0".into(), "--data-dir".into(), arg(&dir.join("master"))]);
        master_args.extend(log("master.log"));
        let (child, ready) = spawn("efc-master", &master_args, &dir.join("master.log")).await?;
        let ready: MasterReady = serde_json::from_str(&ready)
            .map_err(|e| Error::new(Kind::Corrupt, format!("efc-master said `{ready}` when ready")).caused_by(e))?;
        // A restart must come back at the address that workers and this process know.
        master_args[3] = ready.grpc.clone();
        supervise(&master_task, "efc-master", child, master_args, dir.join("master.log"));

        let mut worker_args: Vec<String> =
            vec!["--id".into(), "embedded".into(), "--master".into(), ready.grpc.clone()];
        worker_args.extend(["--listen".into(), "127.0.0.1:0".into(), "--http".into(), "127.0.0.1:0".into()]);
        worker_args.extend(["--unix".into(), arg(&dir.join("worker.sock"))]);
        worker_args.extend(["--memory".into(), config.cache_memory_bytes.to_string()]);
        if let Some((path, quota)) = &config.disk {
            worker_args.extend(["--disk".into(), format!("{}:{quota}", path.display())]);
        }
        worker_args.extend(log("worker.log"));
        let (child, _) = spawn("efc-worker", &worker_args, &dir.join("worker.log")).await?;
        supervise(&worker_task, "efc-worker", child, worker_args, dir.join("worker.log"));
        info!(master = ready.grpc, data_dir = %dir.display(), "embedded cluster is up");
        Ok(Embedded { master: ready.grpc, master_task, worker_task, _lock: lock })
    }

    /// Stops both children in good order: the worker says goodbye to a master that still listens.
    pub async fn stop(self) {
        for task in [self.worker_task, self.master_task] {
            if !task.shutdown(STOP_PATIENCE * 2).await {
                warn!("embedded cluster did not stop in time; its processes were killed");
            }
        }
    }
}

fn lock(dir: &Path) -> Result<File> {
    let path = dir.join("lock");
    let file = File::create(&path).map_err(|e| Error::from(e).with("data_dir", dir.display()))?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        Error::new(
            Kind::Busy,
            format!("data directory {} is in use by another mount; give `-o data_dir=`", dir.display()),
        )
    })?;
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

/// Starts a child and waits for the line it writes to stdout when it serves.
async fn spawn(name: &str, args: &[String], log: &Path) -> Result<(Child, String)> {
    let path = program(name);
    let stderr = File::options().create(true).append(true).open(log)?;
    let mut child = Command::new(&path)
        .args(args)
        .arg("--parent-death")
        .stdin(Stdio::null())
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
        Ok(Ok(n)) if n > 0 => Ok((child, line.trim().to_string())),
        Ok(_) => {
            let status = child.wait().await.map(|s| s.to_string()).unwrap_or_default();
            Err(Error::new(Kind::Unavailable, format!("{name} ended before it served ({status}): {}", last_words(log))))
        }
        Err(_) => Err(Error::new(
            Kind::Timeout,
            format!("{name} did not serve within {}s, see {}", READY_DEADLINE.as_secs(), log.display()),
        )),
    }
}

fn last_words(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines = || text.lines().rev().filter(|l| !l.trim().is_empty());
    let said = lines().find(|l| l.to_lowercase().contains("error")).or_else(|| lines().next());
    said.unwrap_or("it said nothing").to_string()
}

fn supervise(tasks: &TaskGroup, name: &'static str, mut child: Child, args: Vec<String>, log: PathBuf) {
    let group = tasks.clone();
    tasks.spawn_graceful(async move {
        let mut pause = Duration::from_millis(500);
        loop {
            tokio::select! {
                _ = group.stopped() => return stop(name, child).await,
                status = child.wait() => {
                    let status = status.map(|s| s.to_string()).unwrap_or_else(|e| e.to_string());
                    error!(program = name, status, "embedded process ended by itself; starting it again");
                }
            }
            child = loop {
                tokio::select! {
                    _ = group.stopped() => return,
                    _ = tokio::time::sleep(pause) => {}
                }
                pause = (pause * 2).min(Duration::from_secs(30));
                match spawn(name, &args, &log).await {
                    Ok((child, _)) => break child,
                    Err(e) => error!(program = name, error = %e, "embedded process could not be started again"),
                }
            };
        }
    });
}

async fn stop(name: &str, mut child: Child) {
    if let Some(pid) = child.id().and_then(|p| rustix::process::Pid::from_raw(p as i32)) {
        // It may have ended this moment; then there is nobody to tell.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    if tokio::time::timeout(STOP_PATIENCE, child.wait()).await.is_err() {
        warn!(program = name, "embedded process did not stop when told to; killing it");
        let _ = child.kill().await;
    }
}
