//! A cluster of real processes: masters and workers that are started, killed, replaced and asked.

use super::{READY, logs, program, wait_for};
use anyhow::{Context, Result, bail};
use efc_testkit::port::Port;
use efc_testkit::process::{Guarded, scratch};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;

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
