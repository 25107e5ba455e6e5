//! Options that are taken over while a mount serves, by its process and by those that come after it.

use crate::load::PATIENCE;
use crate::read::embedded;
use crate::upgrade::efc_fuse;
use crate::write::KEYS;
use efc_e2e::{Cluster, Mount, WorkerSpec, wait_for, within};
use efc_testkit::oss::{Identity, OssOptions, OssServer};
use efc_testkit::scratch;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

fn set(m: &Mount, args: &[&str]) {
    let out = efc_fuse(m, "set", args);
    assert!(out.status.success(), "{out:?}");
}

fn refused(m: &Mount, option: &str, code: i32, why: &str) {
    let out = efc_fuse(m, "set", &[option]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.code() == Some(code) && said.contains(why), "{option}: {out:?}");
}

/// Another process serves.
pub(super) fn replaced(m: &Mount) {
    replaced_after(m, Signal::SIGKILL);
}

/// Another process serves, since this one got the signal.
pub(super) fn replaced_after(m: &Mount, signal: Signal) {
    let pid = m.pid();
    kill(Pid::from_raw(pid as i32), signal).expect("signal");
    // It is there before it answers questions.
    wait_for("another process", PATIENCE, || Ok(m.pid() != pid && m.stats().is_ok())).expect("replaced");
}

fn number(m: &Mount, pointer: &str) -> u64 {
    let stats = m.stats().expect("stats");
    stats.pointer(pointer).and_then(|v| v.as_u64()).unwrap_or_else(|| panic!("no {pointer} in {stats}"))
}

#[test]
fn read_ahead_and_logging_are_set_while_the_mount_serves() {
    let dir = scratch("options").expect("scratch");
    let cluster =
        Cluster::start(1, &[WorkerSpec { memory: "64MiB".into(), ..WorkerSpec::default() }]).expect("cluster");
    let source = format!("file://{}", dir.path().display());
    let m = Mount::start(&source, &["ro", &cluster.option()], &[]).expect("mount");
    let pid = m.pid();
    for (option, code, why) in [
        ("threads=3", 7, "--option threads=3"),
        ("readahead=much", 2, "readahead"),
        ("speed=3", 2, "unknown"),
        ("log_level=a=b=c", 2, "not a filter"),
        ("memory=1MiB", 2, "memory"),
        ("staging_size=1GiB", 1, "object stores"),
        ("cache_memory=1GiB", 1, "embedded worker"),
        ("secret=anonymous", 1, "object stores"),
    ] {
        refused(&m, option, code, why);
    }
    // Were bytes of a new file there before they were asked for? Without read-ahead a request may find what the one before it has left of its last block.
    let is_read_ahead = |name: &str| {
        let path = m.path.join(name);
        std::fs::write(dir.path().join(name), vec![7; 16 << 20]).expect("write");
        let bytes = || m.stats().expect("stats")["tiers"]["client"]["bytes"].as_u64().unwrap_or(0);
        let before = bytes();
        assert_eq!(within(PATIENCE, move || std::fs::read(path)).expect("read").len(), 16 << 20);
        (bytes() - before) as f64 > 0.05 * f64::from(16 << 20)
    };
    let traced = || m.log().expect("log").matches(" TRACE ").count();
    assert!(is_read_ahead("one"));
    assert_eq!(traced(), 0);
    set(&m, &["readahead=0", "log_level=info,h2=trace"]);
    assert!(!is_read_ahead("two"));
    wait_for("word of the session", PATIENCE, || Ok(traced() > 0)).expect("traced");
    assert_eq!(m.pid(), pid);
    replaced(&m);
    let before = traced();
    assert!(!is_read_ahead("three"));
    wait_for("word of the session", PATIENCE, || Ok(traced() > before)).expect("traced");
    // Another holder and its processes begin with that as well.
    set(&m, &["readahead=16MiB", "log_level=info"]);
    m.kill_holder().expect("another holder");
    // That must have been told everything before the process may die: both at once is the end.
    std::thread::sleep(Duration::from_millis(500));
    replaced(&m);
    let before = traced();
    assert!(is_read_ahead("four"));
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(traced(), before);
    m.finish(&["the mount process is gone", "the holder of this mount was gone"]).expect("log");
}

/// Writes from the end to the beginning, so that all of it is staged.
fn write_backwards(path: &Path, mib: u64) -> std::io::Result<()> {
    let file = File::create(path)?;
    for at in (0..mib).rev() {
        file.write_all_at(&[at as u8; 1 << 20], at << 20)?;
    }
    Ok(())
}

/// The embedded worker of a mount.
fn worker(m: &Mount) -> u32 {
    let [_, worker] = embedded(m);
    worker.expect("a worker")
}

#[test]
fn sizes_are_set_while_the_mount_serves() {
    const MIB: u64 = 1 << 20;
    let s = OssServer::start_with(OssOptions::s3()).expect("server");
    s.create_bucket("b");
    (0..12u8).for_each(|i| s.put("b", format!("f{i}"), vec![i; 4 << 20]));
    let disk = scratch("disk").expect("scratch");
    let cache_dir = format!("cache_dir={}", disk.path().display());
    let endpoint = format!("endpoint={}", s.endpoint());
    let options = ["rw", &endpoint, "memory=64MiB", "cache_memory=64MiB", &cache_dir, "cache_size=64MiB"];
    let m = Mount::start("s3://b", &options, &KEYS).expect("mount");
    let read_all = || {
        let path = m.path.clone();
        within(PATIENCE, move || {
            (0..12u8).for_each(|i| assert!(fs::read(path.join(format!("f{i}"))).expect("read") == vec![i; 4 << 20]));
        });
    };
    read_all();
    // The budget of the process: a quarter each is for listings and for what is written.
    assert_eq!(number(&m, "/budget/1"), 32 * MIB);
    set(&m, &["memory=256MiB"]);
    assert_eq!(number(&m, "/budget/1"), 128 * MIB);
    set(&m, &["memory=64MiB"]);
    assert_eq!(number(&m, "/budget/1"), 32 * MIB);
    read_all();
    // Room for what the store does not have yet: where it ends, a file goes there before it is closed.
    let early = |name: &str| {
        let (path, before) = (m.path.join(name), m.log().expect("log").matches("before it is closed").count());
        within(PATIENCE, move || write_backwards(&path, 64)).expect("write");
        let stored = s.get("b", name).expect("stored");
        assert!(stored.len() == 64 << 20 && (0..64).all(|i| stored[i << 20] == i as u8));
        m.log().expect("log").matches("before it is closed").count() > before
    };
    assert!(!early("one"));
    set(&m, &["staging_size=24MiB"]);
    assert!(early("two"));
    set(&m, &["staging_size=1GiB"]);
    assert!(!early("three"));
    // The tiers of the embedded worker: what is too much goes at once.
    let capacity = || number(&m, "/workers/0/capacity_bytes");
    assert_eq!(capacity(), 128 * MIB);
    set(&m, &["cache_memory=32MiB", "cache_size=32MiB"]);
    assert_eq!(capacity(), 64 * MIB);
    assert!(number(&m, "/workers/0/used_bytes") <= 64 * MIB);
    read_all();
    set(&m, &["cache_memory=200MiB"]);
    assert_eq!(capacity(), 232 * MIB);
    refused(&m, "cache_memory=3MiB", 2, "cache_memory");
    refused(&m, "cache_size=1", 1, "too small");
    assert_eq!(capacity(), 232 * MIB);
    // A worker that is started again has them, and so has a mount process.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(worker(&m) as i32), nix::sys::signal::Signal::SIGKILL)
        .expect("kill");
    let is_back = || Ok(m.stats()?.pointer("/workers/0/capacity_bytes").is_some_and(|c| *c == 232 * MIB));
    wait_for("the worker", PATIENCE, is_back).expect("back");
    replaced(&m);
    assert_eq!((capacity(), number(&m, "/budget/1")), (232 * MIB, 32 * MIB));
    // Nor need an upgrade start another worker for that.
    let before = worker(&m);
    let out = efc_fuse(&m, "upgrade", &["--option", "cache_memory=100MiB"]);
    assert!(out.status.success(), "{out:?}");
    assert_eq!((capacity(), worker(&m)), (132 * MIB, before));
    read_all();
    m.finish(&["the mount process is gone", "embedded process ended", "client::peers::pool", "client::ring"])
        .expect("log");
}

#[test]
fn credentials_are_set_while_the_mount_serves() {
    let s = OssServer::start_with(OssOptions::s3()).expect("server");
    s.create_bucket("b");
    (0..8u8).for_each(|i| s.put("b", format!("f{i}"), vec![i; 100_000]));
    let dir = scratch("keys").expect("scratch");
    let keys = |name: &str, text: &str| -> PathBuf {
        let path = dir.path().join(name);
        fs::write(&path, text).expect("write");
        fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).expect("chmod");
        path
    };
    let option = |path: &Path| format!("passwd_file={}", path.display());
    let first = option(&keys("first", "efckey:efcsecret"));
    let (other, wrong) = (option(&keys("other", "otherkey:othersecret")), option(&keys("wrong", "otherkey:no")));
    let cluster =
        Cluster::start(1, &[WorkerSpec { memory: "64MiB".into(), ..WorkerSpec::default() }]).expect("cluster");
    let options = ["rw", &format!("endpoint={}", s.endpoint()), &cluster.option(), &first];
    let m = Mount::start("s3://b", &options, &[]).expect("mount");
    let works = |n: u8| {
        let path = m.path.clone();
        within(PATIENCE, move || {
            assert!(fs::read(path.join(format!("f{n}"))).expect("read") == vec![n; 100_000]);
            fs::write(path.join(format!("w{n}")), [n]).expect("write");
        });
        assert_eq!(s.get("b", format!("w{n}")).expect("stored")[..], [n]);
    };
    works(0);
    let pid = m.pid();
    let other_key = || Identity::new("otherkey", "othersecret");
    // Not yet known to the store: the mount goes on as it was.
    refused(&m, &other, 1, "goes on with the credentials of before");
    s.set_identities(vec![Identity::new("efckey", "efcsecret"), other_key()]);
    refused(&m, &wrong, 1, "goes on with the credentials of before");
    refused(&m, "passwd_file=/none", 2, "passwd_file");
    works(1);
    set(&m, &[&other]);
    // Now the first is revoked: neither the mount process nor the workers use it any more.
    s.set_identities(vec![other_key()]);
    works(2);
    assert_eq!(m.pid(), pid);
    assert!(number(&m, "/workers/0/origin_requests") > 0);
    replaced(&m);
    works(3);
    // Files of a directory take the place of the one file.
    let secret = dir.path().join("secret");
    fs::create_dir(&secret).expect("mkdir");
    fs::write(secret.join("access-key-id"), "thirdkey").expect("write");
    fs::write(secret.join("access-key-secret"), "thirdsecret").expect("write");
    s.set_identities(vec![other_key(), Identity::new("thirdkey", "thirdsecret")]);
    set(&m, &[&format!("secret=dir:{}", secret.display())]);
    s.set_identities(vec![Identity::new("thirdkey", "thirdsecret")]);
    fs::remove_file(dir.path().join("other")).expect("remove");
    works(4);
    replaced(&m);
    works(5);
    m.finish(&["the mount process is gone"]).expect("log");
}

#[test]
fn rates_are_set_while_the_mount_serves() {
    const MIB: usize = 1 << 20;
    let s = OssServer::start_with(OssOptions::s3()).expect("server");
    s.create_bucket("b");
    (0..4u8).for_each(|i| s.put("b", format!("f{i}"), vec![i; 4 * MIB]));
    (0..80).for_each(|i| s.put("b", format!("d{i}/f"), vec![1]));
    let cluster =
        Cluster::start(1, &[WorkerSpec { memory: "64MiB".into(), ..WorkerSpec::default() }]).expect("cluster");
    let options = ["rw", &format!("endpoint={}", s.endpoint()), &cluster.option(), "bandwidth=1GiB"];
    let m = Mount::start("s3://b", &options, &KEYS).expect("mount");
    let pid = m.pid();
    refused(&m, "bandwidth=much", 2, "bandwidth");
    refused(&m, "request_rate=-1", 2, "request_rate");
    // A burst is one second's worth: these take longer than (bytes / rate - 1) seconds when the rate holds.
    let read_of = |m: &Mount, name: &str, byte: u8| {
        let (path, began) = (m.path.join(name), Instant::now());
        within(PATIENCE, move || assert!(fs::read(path).expect("read") == vec![byte; 4 * MIB]));
        began.elapsed().as_secs_f64()
    };
    let read = |n: u8| read_of(&m, &format!("f{n}"), n);
    let written = |name: &str| {
        let (path, began) = (m.path.join(name), Instant::now());
        within(PATIENCE, move || fs::write(path, vec![9; 4 * MIB])).expect("write");
        assert_eq!(s.get("b", name).expect("stored").len(), 4 * MIB);
        began.elapsed().as_secs_f64()
    };
    let (unlimited, limited) = (0.0..2.0, 2.9..30.0);
    let checked = |took: f64, wanted: &Range<f64>| assert!(wanted.contains(&took), "{took} s, and not {wanted:?}");
    checked(read(0), &unlimited);
    checked(written("w0"), &unlimited);
    // Here for what is written, and at the worker for what is read.
    set(&m, &["bandwidth=1MiB"]);
    checked(read(1), &limited);
    checked(written("w1"), &limited);
    assert!(number(&m, "/workers/0/origin_bytes") >= 4 * MIB as u64);
    // Another process begins with it.
    replaced(&m);
    assert_ne!(m.pid(), pid);
    checked(read(2), &limited);
    set(&m, &["bandwidth=0"]);
    checked(read(3), &unlimited);
    // Who waits for a request that the rate before would permit a minute later does not.
    set(&m, &["request_rate=1"]);
    let path = m.path.clone();
    let names = move |i: u32| fs::read_dir(path.join(format!("d{i}"))).expect("list").count();
    let lists = std::thread::spawn(move || (0..80).map(names).sum::<usize>());
    std::thread::sleep(Duration::from_secs(3));
    assert!(!lists.is_finished());
    set(&m, &["request_rate=0"]);
    assert_eq!(within(PATIENCE, move || lists.join().expect("lists")), 80);
    // A dataset has rates of its own, and a mount of it others.
    let dir = scratch("dataset").expect("scratch");
    fs::write(dir.path().join("f"), vec![5; 4 * MIB]).expect("write");
    let source = format!("file://{}", dir.path().display());
    cluster.efc(&["dataset", "create", "data", &source, "-O", "bandwidth=1"]).expect("dataset");
    let of_dataset = Mount::start("dataset://data", &[&cluster.option(), "bandwidth=1MiB"], &[]).expect("mount");
    checked(read_of(&of_dataset, "f", 5), &limited);
    set(&of_dataset, &["bandwidth=0"]);
    fs::write(dir.path().join("g"), vec![6; 4 * MIB]).expect("write");
    checked(read_of(&of_dataset, "g", 6), &unlimited);
    of_dataset.finish(&[]).expect("log");
    m.finish(&["the mount process is gone"]).expect("log");
}
