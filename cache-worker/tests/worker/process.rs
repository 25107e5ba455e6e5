//! Real efc-worker processes over a directory: signals, kills, restarts and the memory the kernel says they take.

use crate::support::{MIB, me, member, options, pattern, read, spec};
use efc_client::peers::{FileRef, Peers, PeersOptions, ReadFlags, Tier, concat, host_name};
use efc_client::ring::RingWatch;
use efc_common::id::RingEpoch;
use efc_common::ring::{Member, Ring};
use efc_common::source::SourceSpec;
use efc_testkit::{Guarded, scratch};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const READY: Duration = Duration::from_secs(20);

/// A worker process.
struct Process {
    child: Guarded,
    ready: Value,
}

impl Process {
    fn start(dir: &Path, id: &str, args: &[&str]) -> Process {
        let ready = dir.join(format!("{id}.ready"));
        let _ = std::fs::remove_file(&ready);
        // The shell opens descriptor 3, as a supervisor would.
        let mut c = Command::new("sh");
        c.args(["-c", "f=$1; shift; exec \"$@\" 3>\"$f\"", "sh"]).arg(&ready).arg(env!("CARGO_BIN_EXE_efc-worker"));
        c.args(["--id", id, "--ready-fd", "3", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]);
        c.args(args);
        let mut child = Guarded::spawn(id, c, dir).expect("spawn");
        let line = || std::fs::read_to_string(&ready).ok().filter(|t| t.ends_with('\n'));
        child.wait_until("ready", READY, || line().is_some()).expect("ready");
        let ready = serde_json::from_str(&line().expect("line")).expect("json");
        Process { child, ready }
    }

    fn text(&self, key: &str) -> &str {
        self.ready[key].as_str().expect("text")
    }

    fn member(&self, id: &str, unix: bool) -> Member {
        let mut m = member(id, self.text("data"));
        if unix {
            (m.unix, m.host) = (self.text("unix").into(), host_name());
        }
        m
    }

    fn get(&self, path: &str) -> String {
        let mut s = TcpStream::connect(self.text("http")).expect("connect");
        write!(s, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").expect("send");
        let mut all = String::new();
        s.read_to_string(&mut all).expect("read");
        assert!(all.starts_with("HTTP/1.1 200"), "{all}");
        all.split_once("\r\n\r\n").expect("body").1.into()
    }

    fn stats(&self) -> Value {
        serde_json::from_str(&self.get("/stats")).expect("json")
    }

    /// Resident memory without the pages of the memory tier, which are a file.
    fn rss_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.pid())).expect("status");
        let line = status.lines().find(|l| l.starts_with("VmRSS:")).expect("VmRSS");
        line.split_whitespace().nth(1).expect("number").parse::<u64>().expect("kB") * 1024
    }
}

/// Files on disk and how to ask for them.
struct Files {
    dir: PathBuf,
    spec: SourceSpec,
}

impl Files {
    fn new(dir: &Path) -> Files {
        let dir = dir.join("data");
        std::fs::create_dir_all(&dir).expect("dir");
        let spec = spec(dir.to_str().expect("utf-8"));
        Files { dir, spec }
    }

    async fn put(&self, name: &str, data: &[u8]) -> FileRef {
        std::fs::write(self.dir.join(name), data).expect("write");
        let backend = efc_backend::connect(&self.spec, None).await.expect("backend");
        let root = backend.root().await.expect("root");
        let node = backend.lookup(&root.locator, name.as_bytes()).await.expect("lookup");
        FileRef { locator: node.locator, version: node.version, size: node.attr.size }
    }

    fn peers(&self, members: Vec<Member>) -> Peers {
        let ring = RingWatch::fixed(Ring::new(RingEpoch(1), members));
        Peers::new(ring, self.spec.clone(), None, me(), PeersOptions { ..options() })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn serves_over_tcp_and_unix_and_ends_in_good_order() {
    let dir = scratch("worker-serves").expect("dir");
    let files = Files::new(dir.path());
    let data = pattern(1, (6 * MIB + 999) as usize);
    let file = files.put("f", &data).await;
    let sock = dir.path().join("w.sock");
    let args = ["--memory", "64MiB", "--allow-local-sources", "--unix", sock.to_str().expect("utf-8")];
    let mut w = Process::start(dir.path(), "w", &args);
    for unix in [false, true] {
        let peers = files.peers(vec![w.member("w", unix)]);
        for range in [0..file.size, 5..6, 4 * MIB - 1..4 * MIB + 1, 100_000..5_000_001] {
            let (got, chunks) = read(&peers, &file, range.clone()).await.expect("read");
            assert!(got == data.slice(range.start as usize..range.end as usize));
            assert!(chunks.iter().all(|c| c.local == unix));
        }
    }
    assert_eq!(w.get("/healthz"), "ok\n");
    let metrics = w.get("/metrics");
    let counted = |line: &str| metrics.lines().any(|l| l.starts_with(line));
    assert!(counted(&format!("efc_origin_bytes_total {}", file.size)), "{metrics}");
    assert!(counted("efc_cache_served_bytes_total{tier=\"memory\"}") && counted("efc_data_connections "), "{metrics}");
    let stats = w.stats();
    assert_eq!(stats["origin"]["requests"], 2);
    assert_eq!(stats["tiers"][0]["segments"], 25);
    w.child.signal(Signal::SIGTERM).expect("signal");
    assert!(w.child.wait_exit(Duration::from_secs(10)).expect("ends").success());
    assert!(!sock.exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_owner_costs_no_byte_and_no_error() {
    let dir = scratch("worker-killed").expect("dir");
    let files = Files::new(dir.path());
    let data = pattern(2, (40 * MIB) as usize);
    let file = files.put("f", &data).await;
    let args = ["--memory", "64MiB", "--allow-local-sources"];
    let mut a = Process::start(dir.path(), "a", &args);
    let b = Process::start(dir.path(), "b", &args);
    let peers = files.peers(vec![a.member("a", false), b.member("b", false)]);
    let readers: Vec<_> = (0..4)
        .map(|i| {
            let (peers, file, data) = (peers.clone(), file.clone(), data.clone());
            tokio::spawn(async move {
                let mut longest = Duration::ZERO;
                for _ in 0..6 {
                    for block in 0..10u64 {
                        let at = (block * 4 + i) % 40 * MIB;
                        let began = std::time::Instant::now();
                        let (got, _) = read(&peers, &file, at..at + MIB).await.expect("no error");
                        longest = longest.max(began.elapsed());
                        assert!(got == data.slice(at as usize..(at + MIB) as usize));
                    }
                }
                longest
            })
        })
        .collect();
    // In the middle of it.
    while a.stats()["served_bytes"]["origin"].as_u64().expect("number") < 4 * MIB {
        tokio::task::yield_now().await;
    }
    a.child.kill_hard();
    for r in readers {
        let longest = r.await.expect("reader");
        assert!(longest < Duration::from_secs(6), "{longest:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_keeps_the_disk_tier() {
    let dir = scratch("worker-restart").expect("dir");
    let files = Files::new(dir.path());
    let data = pattern(3, (48 * MIB) as usize);
    let file = files.put("f", &data).await;
    let disk = format!("{}:128MiB", dir.path().join("cache").display());
    let args = ["--memory", "64MiB", "--disk", &disk, "--allow-local-sources"];
    let mut w = Process::start(dir.path(), "w", &args);
    let (got, _) = read(&files.peers(vec![w.member("w", false)]), &file, 0..file.size).await.expect("cold");
    assert!(got == data);
    // Killed, but not before the disk writer has done its work.
    let on_disk = |w: &Process| w.stats()["tiers"][1]["segments"].as_u64().expect("number");
    let patience = std::time::Instant::now();
    while on_disk(&w) < 192 && patience.elapsed() < Duration::from_secs(20) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    w.child.kill_hard();
    let w = Process::start(dir.path(), "w", &args);
    let (got, chunks) = read(&files.peers(vec![w.member("w", false)]), &file, 0..file.size).await.expect("warm");
    assert!(got == data);
    let from_disk: usize = chunks.iter().filter(|c| c.tier == Tier::Disk).map(|c| c.bytes.len()).sum();
    assert!(from_disk as u64 * 100 >= file.size * 99, "{from_disk} of {} from disk", file.size);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_stays_within_the_limit() {
    const LIMIT: u64 = 128 << 20;
    let dir = scratch("worker-memory").expect("dir");
    let files = Files::new(dir.path());
    let data = pattern(4, (8 * MIB) as usize);
    let mut all: Vec<FileRef> = Vec::new();
    // 768 MiB: six times the limit.
    for i in 0..96 {
        all.push(files.put(&format!("f{i}"), &data).await);
    }
    let w = Process::start(dir.path(), "w", &["--memory-limit", "128MiB", "--allow-local-sources"]);
    let peers = files.peers(vec![w.member("w", false)]);
    let mut worst = 0;
    for pass in 0..2 {
        for chunk in all.chunks(8) {
            let reads = chunk.iter().map(async |file| {
                let (got, _) = read(&peers, file, 0..file.size).await.expect("read");
                assert!(got == data, "pass {pass}");
            });
            let sample = async {
                for _ in 0..3 {
                    let tier = w.stats()["tiers"][0]["used_bytes"].as_u64().expect("number");
                    worst = worst.max(w.rss_bytes() + tier);
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            futures::join!(futures::future::join_all(reads), sample);
        }
    }
    assert!(worst <= LIMIT + LIMIT / 10, "{} MiB", worst >> 20);
    assert!(w.stats()["evictions"].as_u64().expect("number") > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_origin_ends_in_an_error_within_the_deadline() {
    let dir = scratch("worker-stall").expect("dir");
    let mut files = Files::new(dir.path());
    let data = pattern(5, 300_000);
    let file = files.put("f", &data).await;
    files.spec.options.insert("fault".into(), "latency=30s".into());
    let w = Process::start(dir.path(), "w", &["--memory", "64MiB", "--allow-local-sources"]);
    let ring = RingWatch::fixed(Ring::new(RingEpoch(1), vec![w.member("w", false)]));
    let short = PeersOptions { deadline: Duration::from_millis(700), ..options() };
    let peers = Peers::new(ring, files.spec.clone(), None, me(), short);
    let began = std::time::Instant::now();
    let e = read(&peers, &file, 0..file.size).await.expect_err("no origin");
    assert!(e.is(efc_common::Kind::Timeout), "{e}");
    assert!(began.elapsed() < Duration::from_secs(3));
    // The same file without the fault is another attachment of the same worker, and it joins no stalled fetch of another block.
    files.spec.options.clear();
    let other = files.put("g", &data).await;
    let peers = files.peers(vec![w.member("w", false)]);
    let chunks =
        peers.read(&other, 0..other.size, ReadFlags::default()).expect("stream").collect().await.expect("read");
    assert!(concat(&chunks) == data);
}

#[test]
fn bad_arguments_are_told_in_a_sentence() {
    let cases: &[(&[&str], &str)] = &[
        (&["--memory", "lots"], "lots"),
        (&["--memory", "0"], "no tier"),
        (&["--disk", "/nowhere"], "PATH:SIZE"),
        (&["--policy", "fifo"], "scan, arc or lru"),
        (&["--memory-limit", "1MiB"], "--memory-limit"),
        (&["--listen", "256.0.0.1:1"], "256.0.0.1:1"),
        (&["--listen", "0.0.0.0:0", "--master", "127.0.0.1:1"], "--advertise"),
        (&["--master", "nonsense"], "nonsense"),
        (&["--ready-fd", "77"], "--ready-fd"),
        (&["--nonsense"], "--nonsense"),
    ];
    for (args, word) in cases {
        let out = Command::new(env!("CARGO_BIN_EXE_efc-worker"))
            .args(["--listen", "127.0.0.1:0"].iter().filter(|_| !args.contains(&"--listen")))
            .args(*args)
            .output()
            .expect("run");
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && said.contains(word) && !said.contains("panicked"), "{args:?}: {said}");
    }
    let help = Command::new(env!("CARGO_BIN_EXE_efc-worker")).arg("--help").output().expect("run");
    let help = String::from_utf8_lossy(&help.stdout);
    assert!(help.contains("In a cluster") && help.contains("--memory-limit"), "{help}");
}
