//! Real `efc-master` processes for the tests. They die with the test process, and with the guard that holds them.

use efc_client::master::MasterClient;
use efc_common::source::{SecretRef, SourceSpec};
use efc_proto::control::{Dataset, Mount, StatusReply, WorkerInfo};
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// Anything in these tests that takes longer has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A port that is free now, below the range the kernel hands out itself, so that it stays free over a restart.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let base = 10_000 + (std::process::id() % 2000) as u16 * 10;
    loop {
        let port = base.wrapping_add(NEXT.fetch_add(1, Relaxed)).clamp(10_000, 32_000);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// One master process.
pub(crate) struct Proc {
    child: Option<Child>,
    pub(crate) args: Vec<String>,
    pub(crate) dir: PathBuf,
    pub(crate) grpc: String,
    pub(crate) http: String,
}

impl Proc {
    /// Flags of node `id` with its data and log below `root`, tuned for quick tests.
    pub(crate) fn new(root: &Path, id: u64, more: &[String]) -> Proc {
        let dir = root.join(format!("m{id}"));
        let log = root.join(format!("m{id}.log"));
        let mut args: Vec<String> = [
            "--heartbeat-ms",
            "60",
            "--election-ms",
            "400",
            "--parent-death",
            "--ready-fd",
            "1",
            "--http",
            "127.0.0.1:0",
        ]
        .map(String::from)
        .to_vec();
        args.extend(["--node-id".into(), id.to_string(), "--data-dir".into(), dir.display().to_string()]);
        args.extend(["--log-file".into(), log.display().to_string()]);
        args.extend(more.iter().cloned());
        Proc { child: None, args, dir, grpc: String::new(), http: String::new() }
    }

    /// Starts it without waiting.
    pub(crate) fn spawn(&mut self) -> tokio::process::ChildStdout {
        let mut child = Command::new(env!("CARGO_BIN_EXE_efc-master"))
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("start efc-master");
        let out = child.stdout.take().expect("stdout");
        self.child = Some(child);
        out
    }

    /// Takes the ready line.
    pub(crate) async fn ready(&mut self, out: tokio::process::ChildStdout) {
        let mut line = String::new();
        let mut out = BufReader::new(out);
        timeout(PATIENCE, out.read_line(&mut line)).await.expect("ready in time").expect("read");
        let v: serde_json::Value = serde_json::from_str(&line)
            .unwrap_or_else(|e| panic!("ready line {line:?}: {e}; args {:?}; log {}", self.args, self.log()));
        self.grpc = v["grpc"].as_str().expect("grpc").into();
        self.http = v["http"].as_str().expect("http").into();
    }

    pub(crate) async fn start(&mut self) {
        let out = self.spawn();
        self.ready(out).await;
    }

    /// SIGKILL, and waits until the process is gone.
    pub(crate) async fn kill(&mut self) {
        if let Some(mut c) = self.child.take() {
            c.kill().await.expect("kill");
        }
    }

    /// SIGTERM, and waits; true if it exited with success.
    pub(crate) async fn terminate(&mut self) -> bool {
        let mut c = self.child.take().expect("runs");
        let pid = nix::unistd::Pid::from_raw(c.id().expect("pid") as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("signal");
        timeout(PATIENCE, c.wait()).await.expect("stops").expect("wait").success()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.with_extension("log")).unwrap_or_default()
    }

    pub(crate) fn client(&self) -> MasterClient {
        client(&[&self.grpc])
    }

    pub(crate) async fn status(&self) -> StatusReply {
        self.client().status_of(&self.grpc).await.expect("status")
    }

    /// Body of a GET, with the status code in front.
    pub(crate) async fn http_get(&self, path: &str) -> String {
        let mut s = tokio::net::TcpStream::connect(&self.http).await.expect("connect");
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        s.write_all(request.as_bytes()).await.expect("write");
        let mut text = String::new();
        timeout(PATIENCE, s.read_to_string(&mut text)).await.expect("in time").expect("read");
        let (head, body) = text.split_once("\r\n\r\n").expect("response");
        format!("{} {body}", head.split(' ').nth(1).expect("code"))
    }
}

/// A client that is patient over an election.
pub(crate) fn client(addrs: &[&str]) -> MasterClient {
    MasterClient::new(addrs.iter().map(|a| a.to_string()).collect()).expect("client").with_deadline(PATIENCE)
}

/// A group formed by a static list, all ready. `nodes[0]` is node 1.
pub(crate) struct Group {
    pub(crate) nodes: Vec<Proc>,
    /// After the processes: they are killed before their data goes.
    _root: tempfile::TempDir,
}

impl Group {
    pub(crate) async fn start(n: u64, more: &[&str]) -> Group {
        let root = tempfile::tempdir().expect("dir");
        let peers: Vec<(u64, u16)> = (1..=n).map(|id| (id, free_port())).collect();
        let list = peers.iter().map(|(id, p)| format!("{id}=127.0.0.1:{p}")).collect::<Vec<_>>().join(",");
        let mut nodes = Vec::new();
        for (id, port) in &peers {
            let mut args = vec!["--peers".into(), list.clone(), "--listen".into(), format!("127.0.0.1:{port}")];
            args.extend(more.iter().map(|s| s.to_string()));
            nodes.push(Proc::new(root.path(), *id, &args));
        }
        let mut g = Group { nodes, _root: root };
        g.start_all().await;
        g
    }

    /// Starts those that do not run, together.
    pub(crate) async fn start_all(&mut self) {
        let outs: Vec<_> = self.nodes.iter_mut().map(|n| n.child.is_none().then(|| n.spawn())).collect();
        for (n, out) in self.nodes.iter_mut().zip(outs) {
            if let Some(out) = out {
                n.ready(out).await;
            }
        }
    }

    pub(crate) fn client(&self) -> MasterClient {
        client(&self.nodes.iter().map(|n| n.grpc.as_str()).collect::<Vec<_>>())
    }

    /// Position of the leader in `nodes`, once one leads.
    pub(crate) async fn leader(&self) -> usize {
        let c = self.client();
        // Only a leader answers this.
        c.list_workers().await.expect("a leader");
        let addr = c.leader().expect("known");
        self.nodes.iter().position(|n| n.grpc == addr).expect("one of ours")
    }

    /// Position of a follower.
    pub(crate) async fn follower(&self) -> usize {
        (self.leader().await + 1) % self.nodes.len()
    }
}

pub(crate) fn dataset(name: &str) -> Dataset {
    let spec = SourceSpec::parse("s3://bucket/prefix", BTreeMap::new(), SecretRef::Env).expect("source");
    Dataset {
        name: name.into(),
        mounts: vec![Mount {
            path: "/".into(),
            source_json: serde_json::to_string(&spec).expect("json"),
            read_only: true,
        }],
        consistency: "immutable".into(),
        ..Default::default()
    }
}

pub(crate) fn worker(id: &str) -> WorkerInfo {
    WorkerInfo {
        id: id.into(),
        addr: "127.0.0.1:9000".into(),
        host: "h".into(),
        capacity_bytes: 64 << 20,
        ..Default::default()
    }
}

/// Asks again until `good`, or fails the test. For facts that have no event to wait for from outside.
pub(crate) async fn eventually<T, F: Future<Output = T>>(
    what: &str,
    mut ask: impl FnMut() -> F,
    good: impl Fn(&T) -> bool,
) -> T {
    let end = tokio::time::Instant::now() + PATIENCE;
    loop {
        let got = ask().await;
        if good(&got) {
            return got;
        }
        assert!(tokio::time::Instant::now() < end, "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
