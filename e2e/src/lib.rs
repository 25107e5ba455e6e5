//! Real processes for end-to-end tests: masters, workers and mounts, started from the programs that the workspace built.
//!
//! Everything ends when its value is dropped, also after a panic; logs are printed then. All access to a mount from a test goes through
//! a thread with a deadline ([`within`]), because a hung mount would hang the test for good.

pub mod logs;
pub mod net;
pub mod reader;
pub mod tree;

use anyhow::{Context, Result, bail};
use efc_testkit::port::Port;
use efc_testkit::process::{Guarded, scratch};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tempfile::TempDir;

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

/// The first JSON object line of a process's log that has `key`.
fn ready_line(log: &Path, key: &str) -> Option<Value> {
    let text = std::fs::read_to_string(log).ok()?;
    text.lines().rev().filter_map(|l| serde_json::from_str::<Value>(l).ok()).find(|v| v.get(key).is_some())
}

/// A master process.
pub struct Master {
    /// Node id.
    pub node: u64,
    /// gRPC address.
    pub addr: String,
    /// Metrics address.
    pub http: String,
    /// The process, `None` while it is killed.
    pub child: Option<Guarded>,
    args: Vec<String>,
    dir: PathBuf,
    _ports: [Port; 2],
}

impl Master {
    fn start(&mut self) -> Result<()> {
        let mut command = Command::new(program("efc-master")?);
        command.args(&self.args).env("EFC_EVENTS_TOKEN", EVENTS_TOKEN);
        let mut child = Guarded::spawn(&format!("master{}", self.node), command, &self.dir)?;
        let log = child.log_path().to_path_buf();
        let before = std::fs::read_to_string(&log).unwrap_or_default().matches("\"grpc\"").count();
        child.wait_until("ready", READY, || {
            std::fs::read_to_string(&log).unwrap_or_default().matches("\"grpc\"").count() > before
        })?;
        self.child = Some(child);
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill_hard();
        }
    }
}

/// How a worker is to be started.
#[derive(Debug, Clone, Default)]
pub struct WorkerSpec {
    /// Memory tier, for example `256MiB`.
    pub memory: String,
    /// Quota of a disk tier, empty for none.
    pub disk: String,
    /// More arguments.
    pub args: Vec<String>,
}

/// A worker process.
pub struct Worker {
    /// Its id.
    pub id: String,
    /// Data-plane address.
    pub addr: String,
    /// Metrics address.
    pub http: String,
    /// The process, `None` while it is killed.
    pub child: Option<Guarded>,
    args: Vec<String>,
    dir: PathBuf,
}

impl Worker {
    /// Starts it, again with the same state after a kill.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(&mut self) -> Result<()> {
        let mut command = Command::new(program("efc-worker")?);
        command.args(&self.args);
        // A log of its own for each life, so that the ready line is this life's.
        let life = std::fs::read_dir(&self.dir)?.count();
        let mut child = Guarded::spawn(&format!("{}-{life}", self.id), command, &self.dir)?;
        let log = child.log_path().to_path_buf();
        child.wait_until("ready", READY, || ready_line(&log, "data").is_some())?;
        let said = ready_line(&log, "data").context("ready line")?;
        let text = |k: &str| said.get(k).and_then(Value::as_str).unwrap_or_default().to_string();
        (self.addr, self.http) = (text("data"), text("http"));
        self.child = Some(child);
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill_hard();
        }
    }

    /// SIGTERM (drain, leave), and waits for the end.
    ///
    /// # Errors
    /// When it does not end.
    pub fn drain(&mut self) -> Result<()> {
        self.end(Signal::SIGTERM)
    }

    /// SIGUSR2 (end and keep its place), and starts another.
    ///
    /// # Errors
    /// When it does not end, or the other does not come up.
    pub fn replace(&mut self) -> Result<()> {
        self.end(Signal::SIGUSR2)?;
        self.start()
    }

    fn end(&mut self, signal: Signal) -> Result<()> {
        let Some(mut child) = self.child.take() else { bail!("{} does not run", self.id) };
        child.signal(signal)?;
        match child.wait_exit(Duration::from_secs(60)) {
            Some(s) if s.success() => Ok(()),
            Some(s) => bail!("{} ended with {s}:\n{}", self.id, child.log_tail()),
            None => bail!("{} did not end after {signal}:\n{}", self.id, child.log_tail()),
        }
    }

    /// A counter of its `/metrics`, summed over labels that contain `with`.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn metric(&self, name: &str, with: &str) -> Result<f64> {
        metric(&self.http, name, with)
    }
}

/// A metric of a process's `/metrics`, summed over the series whose labels contain `with`.
///
/// # Errors
/// When it cannot be asked.
pub fn metric(http: &str, name: &str, with: &str) -> Result<f64> {
    let text = efc_testkit::http::request("GET", &format!("http://{http}/metrics"), b"")?.ok()?.text();
    let series = |l: &&str| l.strip_prefix(name).is_some_and(|r| r.starts_with(['{', ' '])) && l.contains(with);
    Ok(text.lines().filter(series).filter_map(|l| l.rsplit_once(' ')?.1.parse::<f64>().ok()).sum())
}

/// Masters and workers.
pub struct Cluster {
    /// The masters.
    pub masters: Vec<Master>,
    /// The workers.
    pub workers: Vec<Worker>,
    dir: TempDir,
    host: String,
}

impl Cluster {
    /// Starts `masters` masters and one worker for each spec.
    ///
    /// # Errors
    /// When a process does not come up.
    pub fn start(masters: usize, workers: &[WorkerSpec]) -> Result<Cluster> {
        Cluster::start_at("127.0.0.1", masters, workers)
    }

    /// As [`Cluster::start`], on an address of this host.
    ///
    /// # Errors
    /// When a process does not come up.
    pub fn start_at(host: &str, masters: usize, workers: &[WorkerSpec]) -> Result<Cluster> {
        let dir = scratch("cluster")?;
        let mut c = Cluster { masters: Vec::new(), workers: Vec::new(), dir, host: host.to_string() };
        let ports: Vec<[Port; 2]> = (0..masters).map(|_| Port::lease_many()).collect::<Result<_>>()?;
        let addr = |p: &Port| format!("{host}:{}", p.number());
        let peers: Vec<String> = ports.iter().enumerate().map(|(i, p)| format!("{}={}", i + 1, addr(&p[0]))).collect();
        for (i, p) in ports.into_iter().enumerate() {
            let node = i as u64 + 1;
            let data = c.dir.path().join(format!("m{node}"));
            let args = [
                "--node-id",
                &node.to_string(),
                "--listen",
                &addr(&p[0]),
                "--http",
                &addr(&p[1]),
                "--data-dir",
                &data.display().to_string(),
                "--peers",
                &peers.join(","),
            ];
            let args = args.map(String::from).to_vec();
            let dir = c.dir.path().to_path_buf();
            c.masters.push(Master { node, addr: addr(&p[0]), http: addr(&p[1]), child: None, args, dir, _ports: p });
        }
        c.start_masters()?;
        for spec in workers {
            c.add_worker(spec)?;
        }
        Ok(c)
    }

    /// Starts every master that does not run; together, because a majority must be there before one is ready.
    ///
    /// # Errors
    /// When one does not come up.
    pub fn start_masters(&mut self) -> Result<()> {
        std::thread::scope(|s| {
            let down = self.masters.iter_mut().filter(|m| m.child.is_none());
            let all: Vec<_> = down.map(|m| s.spawn(|| m.start())).collect();
            all.into_iter().try_for_each(|t| t.join().map_err(|_| anyhow::anyhow!("start of a master panicked"))?)
        })
    }

    /// Starts one more worker; gives its index.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn add_worker(&mut self, spec: &WorkerSpec) -> Result<usize> {
        let id = format!("w{}", self.workers.len() + 1);
        let home = self.dir.path().join(&id);
        std::fs::create_dir_all(&home)?;
        let unix = home.join("data.sock");
        let mut args: Vec<String> =
            ["--id", &id, "--master", &self.master_addrs(), "--listen"].map(String::from).to_vec();
        args.push(format!("{}:0", self.host));
        args.extend(["--http", "127.0.0.1:0", "--unix", &unix.display().to_string()].map(String::from));
        args.extend(["--memory".into(), spec.memory.clone()]);
        if !spec.disk.is_empty() {
            args.extend(["--disk".into(), format!("{}:{}", home.join("disk").display(), spec.disk)]);
        }
        args.extend(spec.args.iter().cloned());
        let mut worker = Worker { id, addr: String::new(), http: String::new(), child: None, args, dir: home };
        worker.start()?;
        self.workers.push(worker);
        Ok(self.workers.len() - 1)
    }

    /// Addresses of all masters, comma separated.
    pub fn master_addrs(&self) -> String {
        self.masters.iter().map(|m| m.addr.clone()).collect::<Vec<_>>().join(",")
    }

    /// The mount option that joins this cluster.
    pub fn option(&self) -> String {
        format!("master={}", self.master_addrs().replace(',', ";"))
    }

    /// Runs `efc ARGS -o json` against this cluster.
    ///
    /// # Errors
    /// When it fails; the message carries what it said.
    pub fn efc(&self, args: &[&str]) -> Result<Value> {
        let out = Command::new(program("efc")?)
            .args(["--master", &self.master_addrs()])
            .args(args)
            .args(["-o", "json"])
            .output()?;
        if !out.status.success() {
            bail!("efc {args:?}: {}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        }
        Ok(serde_json::from_slice(&out.stdout)?)
    }

    /// Index of the leader among the masters.
    ///
    /// # Errors
    /// When nobody leads.
    pub fn leader(&self) -> Result<usize> {
        let status = self.efc(&["status"])?;
        let leader = status["leader"].as_u64().filter(|n| *n > 0).with_context(|| format!("no leader in {status}"))?;
        self.masters.iter().position(|m| m.node == leader).with_context(|| format!("master {leader} is not ours"))
    }

    /// Ids of the workers in the ring, as the masters see them.
    ///
    /// # Errors
    /// When no master answers.
    pub fn ring_members(&self) -> Result<Vec<String>> {
        let ring = self.efc(&["ring", "show"])?;
        let members = ring["members"].as_array().with_context(|| format!("members in {ring}"))?;
        Ok(members.iter().filter_map(|m| m["id"].as_str().map(String::from)).collect())
    }

    /// Waits until exactly these workers are in the ring.
    ///
    /// # Errors
    /// When they are not within a minute.
    pub fn wait_ring(&self, ids: &[&str]) -> Result<()> {
        wait_for(&format!("a ring of {ids:?}"), Duration::from_secs(60), || {
            Ok(self.ring_members().is_ok_and(|m| m == ids))
        })
    }

    /// A metric of all running workers, summed as [`Worker::metric`] does.
    ///
    /// # Errors
    /// When one cannot be asked.
    pub fn metric(&self, name: &str, with: &str) -> Result<f64> {
        self.workers.iter().filter(|w| w.child.is_some()).map(|w| w.metric(name, with)).sum()
    }

    /// Fails if a master or worker logged a WARN or ERROR that contains none of `expected`.
    ///
    /// # Errors
    /// The lines.
    pub fn check_logs(&self, expected: &[&str]) -> Result<()> {
        logs::check(self.dir(), expected)
    }

    /// A directory of this cluster's run, for what a test needs beside.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}

/// Who tells the masters of events must know it.
pub const EVENTS_TOKEN: &str = "word";

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
