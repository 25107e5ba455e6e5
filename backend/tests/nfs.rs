//! NFS against a real server in trouble: restarts, silence, refusals. What every origin must do is in `suite.rs`.

use bytes::Bytes;
use efc_backend::connect::{Connected, connect_counted};
use efc_backend::suite::content;
use efc_backend::tree::{New, NewNode};
use efc_backend::{DynBackend, connect};
use efc_common::node::Node;
use efc_common::source::{SecretRef, SourceSpec};
use efc_common::{Kind, Result};
use efc_testkit::ganesha::GaneshaOptions;
use efc_testkit::port::Port;
use efc_testkit::{Ganesha, scratch};
use futures::TryStreamExt;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const LEN: usize = 8 << 20;

/// A server over a directory with `sub/file` of [`LEN`] bytes.
struct Rig {
    server: Ganesha,
    dir: TempDir,
    data: Vec<u8>,
}

impl Rig {
    fn start() -> Rig {
        let dir = scratch("nfs").expect("scratch");
        let data = content(3, LEN);
        std::fs::create_dir(dir.path().join("sub")).expect("a directory");
        std::fs::write(dir.path().join("sub/file"), &data).expect("a file");
        Rig { server: Ganesha::start(dir.path()).expect("ganesha"), dir, data }
    }

    /// The source at `below` the export.
    async fn source(&self, below: &str, options: &[(&str, &str)]) -> DynBackend {
        let url = format!("{}{below}", self.server.url());
        open(&url, self.server.mount_port(), options).await
    }

    async fn read(&self, backend: &DynBackend, file: &Node) -> Result<Vec<u8>> {
        let stream = backend.read(&file.locator, &file.version, 0..LEN as u64).await?;
        Ok(stream.try_collect::<Vec<_>>().await?.concat())
    }
}

async fn connected(server: &Ganesha, options: &[(&str, &str)]) -> Connected {
    let port = server.mount_port().to_string();
    let all = options.iter().chain(&[("mount_port", &port[..])]).map(|(k, v)| (k.to_string(), v.to_string())).collect();
    let spec = SourceSpec::parse(&server.url(), all, SecretRef::Anonymous).expect("a source");
    connect_counted(&spec, None).await.expect("connect")
}

async fn open(url: &str, mount_port: u16, options: &[(&str, &str)]) -> DynBackend {
    let mut all: BTreeMap<String, String> = options.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    all.insert("mount_port".into(), mount_port.to_string());
    let spec = SourceSpec::parse(url, all, SecretRef::Anonymous).expect("a source");
    connect(&spec, None).await.expect("connect")
}

async fn find(backend: &DynBackend, path: &str) -> Node {
    let mut node = backend.root().await.expect("root");
    for name in path.split('/') {
        node = backend.lookup(&node.locator, name.as_bytes()).await.expect("lookup");
    }
    node
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_of_the_server_costs_a_pause() {
    let mut rig = Rig::start();
    let backend = rig.source("", &[("timeout", "5s"), ("deadline", "30s")]).await;
    let file = find(&backend, "sub/file").await;
    let mut stream = backend.read(&file.locator, &file.version, 0..LEN as u64).await.expect("open");
    let mut got = stream.try_next().await.expect("the first piece").expect("not empty").to_vec();
    rig.server.kill();
    let (data, back) = {
        let backend = backend.clone();
        let locator = file.locator.clone();
        let asked = tokio::spawn(async move { backend.getattr(&locator).await });
        let rest = tokio::spawn(async move { stream.try_collect::<Vec<_>>().await });
        let mut server = rig;
        let server = tokio::task::spawn_blocking(move || {
            server.server.restart().expect("restart");
            server
        });
        rig = server.await.expect("restarted");
        (rest.await.expect("joined").expect("the rest of the stream"), asked.await.expect("joined").expect("getattr"))
    };
    got.extend_from_slice(&data.concat());
    assert!(got == rig.data, "the bytes differ");
    assert_eq!((back.locator, back.version), (file.locator, file.version), "handles survive a restart");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_falls_silent_is_an_error_after_the_deadline_and_recovers() {
    let rig = Rig::start();
    let backend = rig.source("", &[("timeout", "1s"), ("deadline", "3s")]).await;
    let file = find(&backend, "sub/file").await;
    rig.server.freeze().expect("freeze");
    let began = Instant::now();
    let (attributes, bytes) = tokio::join!(backend.getattr(&file.locator), rig.read(&backend, &file));
    for e in [attributes.expect_err("silent"), bytes.expect_err("silent")] {
        assert_eq!(e.kind(), Kind::Timeout, "{e}");
        assert!(e.context("attempts").is_some(), "{e}");
    }
    assert!(began.elapsed() >= Duration::from_secs(3) && began.elapsed() < Duration::from_secs(8));
    rig.server.thaw().expect("thaw");
    assert!(rig.read(&backend, &file).await.expect("read") == rig.data);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_below_the_export_can_be_the_source() {
    let rig = Rig::start();
    let backend = rig.source("/sub", &[]).await;
    let file = find(&backend, "file").await;
    assert!(rig.read(&backend, &file).await.expect("read") == rig.data);
    // A worker is given a locator and never mounts: the MOUNT port is wrong here and nobody minds.
    let port = Port::lease().expect("port");
    let worker = open(&rig.server.url(), port.number(), &[]).await;
    assert!(rig.read(&worker, &file).await.expect("read") == rig.data);
    let space = backend.statfs().await.expect("statfs");
    let real = rustix::fs::statvfs(rig.dir.path()).expect("statvfs");
    assert_eq!(space.total_bytes, real.f_blocks * real.f_frsize);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_cannot_be_mounted_says_why() {
    let rig = Rig::start();
    let quick = [("timeout", "2s")];
    let export = rig.dir.path().to_str().expect("utf-8").to_string();
    let e = rig.source("/absent", &quick).await.root().await.expect_err("absent");
    assert!(e.is(Kind::NotFound) && e.to_string().contains("/absent"), "{e}");
    let e = rig.source("/sub/file", &quick).await.root().await.expect_err("a file");
    assert!(e.is(Kind::NotADirectory) && e.to_string().contains("/sub/file"), "{e}");

    let host = format!("nfs://127.0.0.1:{}", rig.server.port());
    let e =
        open(&format!("{host}/not/exported"), rig.server.mount_port(), &quick).await.root().await.expect_err("foreign");
    assert!(matches!(e.kind(), Kind::NotFound | Kind::PermissionDenied), "{e:?}");
    assert!(e.to_string().contains("/not/exported") && e.to_string().contains(&export), "{e}");

    let closed = Port::lease().expect("port");
    let began = Instant::now();
    let e = open(&rig.server.url(), closed.number(), &quick).await.root().await.expect_err("closed");
    assert!(e.is(Kind::Timeout) && e.to_string().contains(&closed.number().to_string()), "{e}");
    assert!(began.elapsed() < Duration::from_secs(5));
    let e = open("nfs://no-such-host.invalid/x", 1, &quick).await.root().await.expect_err("no host");
    assert!(e.to_string().contains("no-such-host.invalid"), "{e}");
}

/// Kills the server and starts it again, off the async threads.
async fn crash(mut rig: Rig) -> Rig {
    let work = move || {
        rig.server.kill();
        // Ganesha's verifier is the second of its start. It must not be the old one.
        std::thread::sleep(Duration::from_millis(1100));
        rig.server.restart().expect("restart");
        rig
    };
    tokio::task::spawn_blocking(work).await.expect("restarted")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarts_in_the_middle_of_writes_lose_nothing() {
    const PIECE: usize = 96 << 10;
    const COUNT: usize = 512;
    let metrics = efc_common::metrics::install().expect("the only recorder of this process");
    let mut rig = Rig::start();
    let origin = connected(&rig.server, &[("timeout", "5s"), ("deadline", "60s")]).await;
    let (backend, tree) = (origin.backend, origin.tree.expect("a tree"));
    let root = backend.root().await.expect("root");
    let new = NewNode { what: New::File, mode: 0o644, uid: 1234, gid: 4321 };
    let node = tree.create(&root.locator, b"new", &new).await.expect("create");
    let open = tree.open(&node.locator, true).await.expect("open");
    let data = content(9, PIECE * COUNT);
    let done = Arc::new(AtomicUsize::new(0));
    let writer = tokio::spawn({
        let (data, done) = (Bytes::from(data.clone()), done.clone());
        async move {
            for i in 0..COUNT {
                open.write((i * PIECE) as u64, data.slice(i * PIECE..(i + 1) * PIECE)).await.expect("write");
                done.fetch_add(1, SeqCst);
            }
            // The last restart falls between the last write and the sync.
            while done.load(SeqCst) <= COUNT {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            open.sync(false).await.expect("sync")
        }
    });
    for at in [COUNT / 4, COUNT / 2, COUNT] {
        while done.load(SeqCst) < at {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        rig = crash(rig).await;
    }
    done.fetch_add(1, SeqCst);
    let synced = writer.await.expect("the writer");
    assert_eq!((synced.attr.size as usize, synced.attr.uid), (data.len(), Some(1234)));
    assert!(std::fs::read(rig.dir.path().join("new")).expect("behind") == data, "the bytes differ");
    let stats = origin.counters.stats();
    assert!(stats.bytes_sent as usize == data.len() && stats.retries > 0, "{stats:?}");
    let text = metrics.render();
    let resent = text.lines().find_map(|line| line.strip_prefix("efc_nfs_resent_total ")).expect("a counter");
    assert!(resent.parse::<usize>().expect("a number") >= COUNT, "all was uncommitted at the last restart: {resent}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_squashes_root_refuses_to_give_files_away_and_says_so() {
    let dir = scratch("nfs-squash").expect("scratch");
    rustix::fs::chmod(dir.path(), rustix::fs::Mode::from_raw_mode(0o777)).expect("chmod");
    let options = GaneshaOptions { root_squash: true, ..GaneshaOptions::default() };
    let server = Ganesha::start_with(dir.path(), &options).expect("ganesha");
    let origin = connected(&server, &[("timeout", "5s")]).await;
    let (root, tree) = (origin.backend.root().await.expect("root"), origin.tree.expect("a tree"));
    let new = NewNode { what: New::File, mode: 0o644, uid: 1234, gid: 4321 };
    let e = tree.create(&root.locator, b"new", &new).await.expect_err("squashed");
    assert!(e.is(Kind::PermissionDenied) && e.to_string().contains("no_root_squash"), "{e:?}");
    assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 0, "nothing is left behind");
    // Ganesha lets us name the owner in the call that makes a directory; another server may refuse.
    match tree.create(&root.locator, b"dir", &NewNode { what: New::Directory, ..new }).await {
        Ok(node) => assert_eq!((node.attr.uid, node.attr.gid), (Some(1234), Some(4321))),
        Err(e) => assert!(e.is(Kind::PermissionDenied), "{e:?}"),
    }
}
