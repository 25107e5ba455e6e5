//! Conformance suites over real mounts: pjdfstest (the Rust port, every test of it) and fsx. What fails is held against the lists below, each with its reason; one
//! that passes although it is listed fails the test as well, so that the lists stay true. `docs/SEMANTICS.md` shows the counts.

use efc_e2e::{Mount, within};
use efc_testkit::oss::{OssOptions, OssServer};
use efc_testkit::{Ganesha, scratch};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(600);

/// Tests of pjdfstest that fail over Ganesha, and why.
const NFS_FAILURES: &[(&str, &str)] = &[
    (
        "utimensat::follow_symlink",
        "Ganesha answers SETATTR of a symbolic link's times with success and does not set them",
    ),
    ("utimensat::y2038", "times of NFSv3 have 32 bits (RFC 1813, nfstime3): they end in 2106"),
];

fn tool(name: &str) -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").expect("HOME")).join(".cache"));
    let path = cache.join("efc/tools/bin").join(name);
    assert!(path.exists(), "{} is missing: `./run setup` installs it", path.display());
    path
}

/// A read-write mount with what stands behind it.
struct Rig {
    mount: Mount,
    _server: Option<Ganesha>,
    _dir: tempfile::TempDir,
}

fn rig(origin: &str) -> Rig {
    let dir = scratch("conformance").expect("scratch");
    // The suite plays other users: they must get there.
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("chmod");
    let server = (origin == "nfs").then(|| Ganesha::start(dir.path()).expect("ganesha"));
    let (url, port) = match &server {
        Some(s) => (s.url(), format!("mount_port={}", s.mount_port())),
        None => (format!("file://{}", dir.path().display()), "umask=000".into()),
    };
    let mount = Mount::start(&url, &["rw", "cache_memory=64MiB", &port], &[]).expect("mount");
    Rig { mount, _server: server, _dir: dir }
}

/// Runs pjdfstest on `path`: the names of what failed, and how many passed.
fn pjdfstest(path: &Path, config: &Path) -> (Vec<String>, usize) {
    let out = Command::new(tool("pjdfstest")).arg("-c").arg(config).arg("-p").arg(path).output().expect("pjdfstest");
    let text = String::from_utf8_lossy(&out.stdout);
    let last = |what: &str| {
        text.lines()
            .filter(|l| l.trim_end().ends_with(what))
            .filter_map(|l| l.split_whitespace().next())
            .map(str::to_string)
            .collect::<Vec<_>>()
    };
    let (failed, passed) = (last(" FAILED"), last(" ok").len());
    assert!(passed > 300, "pjdfstest did not run: {text}\n{}", String::from_utf8_lossy(&out.stderr));
    (failed, passed)
}

fn suite(origin: &str, expected: &'static [(&'static str, &'static str)]) {
    let r = rig(origin);
    let config = r.mount.path.with_extension("pjdfstest.toml");
    std::fs::write(&config, "[features]\nposix_fallocate = {}\nutime_now = {}\nutimensat = {}\nrename_ctime = {}\n[settings]\nnaptime = 0.01\nallow_remount = false\nexpected_failures = []\n[dummy_auth]\nentries = [[\"nobody\", \"nogroup\"], [\"tests\", \"tests\"]]\n").expect("config");
    let path = r.mount.path.clone();
    let (mut failed, passed) = within(PATIENCE, move || pjdfstest(&path, &config));
    failed.sort();
    let listed: Vec<&str> = expected.iter().map(|(name, _)| *name).collect();
    println!("{origin}: {passed} passed, {} failed: {failed:?}", failed.len());
    assert_eq!(failed, listed, "{origin}: not what the list says");
    r.mount.finish(&[]).expect("log");
}

fn fsx(origin: &str, seed: u32) {
    fsx_in(rig(origin), seed);
}

fn fsx_in(r: Rig, seed: u32) {
    let path = r.mount.path.join("fsx");
    // The acceptance's million operations: EFC_E2E_LONG=1.
    let operations = if std::env::var_os("EFC_E2E_LONG").is_some() { "1000000" } else { "10000" };
    let patience = if operations.len() > 5 { 6 * PATIENCE } else { PATIENCE };
    let out = within(patience, move || {
        Command::new(tool("fsx")).args(["-N", operations, "-S", &seed.to_string()]).arg(&path).output().expect("fsx")
    });
    let text = [out.stdout, out.stderr].concat();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&text));
    r.mount.finish(&[]).expect("log");
}

#[test]
fn pjdfstest_over_file() {
    suite("file", &[]);
}

#[test]
fn pjdfstest_over_nfs() {
    suite("nfs", NFS_FAILURES);
}

#[test]
fn fsx_over_s3() {
    let server = OssServer::start_with(OssOptions::s3()).expect("server");
    server.create_bucket("b");
    let endpoint = format!("endpoint={}", server.endpoint());
    let keys = server.target();
    let mount = Mount::start("s3://b", &["rw", "cache_memory=64MiB", &endpoint], &keys.env()).expect("mount");
    fsx_in(Rig { mount, _server: None, _dir: scratch("conformance").expect("scratch") }, 9);
}

#[test]
fn fsx_over_file() {
    fsx("file", 7);
}

#[test]
fn fsx_over_nfs() {
    fsx("nfs", 8);
}
