//! Conformance suites over real mounts: pjdfstest (the Rust port, every test of it) and fsx. What fails is held against the lists in `conformance/`, each with its reason; one
//! that passes although it is listed fails the test as well, so that the lists stay true. The table in `docs/SEMANTICS.md` is held against the same.

use efc_e2e::{Mount, tool, within};
use efc_testkit::oss::{OssOptions, OssServer};
use efc_testkit::{Ganesha, scratch};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(600);

/// A read-write mount with what stands behind it.
struct Rig {
    mount: Mount,
    _server: Box<dyn std::any::Any>,
    _dir: tempfile::TempDir,
}

fn rig(origin: &str) -> Rig {
    if origin == "s3" {
        return rig_s3();
    }
    let dir = scratch("conformance").expect("scratch");
    // The suite plays other users: they must get there.
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("chmod");
    let server = (origin == "nfs").then(|| Ganesha::start(dir.path()).expect("ganesha"));
    let (url, port) = match &server {
        Some(s) => (s.url(), format!("mount_port={}", s.mount_port())),
        None => (format!("file://{}", dir.path().display()), "umask=000".into()),
    };
    let mount = Mount::start(&url, &["rw", "cache_memory=64MiB", &port], &[]).expect("mount");
    Rig { mount, _server: Box::new(server), _dir: dir }
}

fn rig_s3() -> Rig {
    let server = OssServer::start_with(OssOptions::s3()).expect("server");
    server.create_bucket("b");
    let endpoint = format!("endpoint={}", server.endpoint());
    let options = ["rw", "cache_memory=64MiB", "umask=000", &endpoint];
    let mount = Mount::start("s3://b/top", &options, &server.target().env()).expect("mount");
    Rig { mount, _server: Box::new(server), _dir: scratch("conformance").expect("scratch") }
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
    assert!(passed + failed.len() > 370, "pjdfstest did not run: {text}\n{}", String::from_utf8_lossy(&out.stderr));
    (failed, passed)
}

/// A list of what fails: lines of reasons, below each the names, indented.
fn listed(text: &str) -> Vec<(&str, Vec<&str>)> {
    let mut reasons: Vec<(&str, Vec<&str>)> = Vec::new();
    for line in text.lines().filter(|l| !l.starts_with('#')) {
        match (line.strip_prefix("  "), reasons.last_mut()) {
            (Some(name), Some((_, names))) => names.push(name),
            _ => reasons.push((line, Vec::new())),
        }
    }
    reasons
}

fn suite(origin: &str, list: &str) {
    let r = rig(origin);
    let config = r.mount.path.with_extension("pjdfstest.toml");
    // POSIX leaves it to the implementation whether a rename changes the ctime of what is renamed: object stores do not keep one through it.
    let renames = if origin == "s3" { "" } else { "rename_ctime = {}\n" };
    std::fs::write(&config, format!("[features]\nposix_fallocate = {{}}\nutime_now = {{}}\nutimensat = {{}}\n{renames}[settings]\nnaptime = 0.01\nallow_remount = false\nexpected_failures = []\n[dummy_auth]\nentries = [[\"nobody\", \"nogroup\"], [\"tests\", \"tests\"]]\n")).expect("config");
    let path = r.mount.path.clone();
    let (mut failed, passed) = within(PATIENCE, move || pjdfstest(&path, &config));
    failed.sort();
    let reasons = listed(list);
    let mut expected: Vec<&str> = reasons.iter().flat_map(|(_, names)| names.iter().copied()).collect();
    expected.sort();
    println!("{origin}: {passed} passed, {} failed:\n{}", failed.len(), failed.join("\n"));
    assert_eq!(failed, expected, "{origin}: not what the list says");
    let docs = include_str!("../../docs/SEMANTICS.md");
    let mut rows = vec![format!("| `{origin}` | {passed} | {} |", failed.len())];
    rows.extend(reasons.iter().map(|(reason, names)| format!("| `{origin}` | {reason} | {} |", names.len())));
    for row in rows {
        assert!(docs.lines().any(|l| l == row), "docs/SEMANTICS.md lacks the row {row}");
    }
    r.mount.finish(&[]).expect("log");
}

fn fsx(origin: &str, seed: u32) {
    let r = rig(origin);
    let path = r.mount.path.join("fsx");
    // The acceptance's million operations: EFC_E2E_LONG=1. In runs of ten thousand, because fsx does not unmap what it reads through a mapping.
    let runs = if std::env::var_os("EFC_E2E_LONG").is_some() { 100 } else { 1 };
    for seed in seed..seed + runs {
        let path = path.clone();
        let out = within(PATIENCE, move || {
            Command::new(tool("fsx")).args(["-N", "10000", "-S", &seed.to_string()]).arg(&path).output().expect("fsx")
        });
        let text = [out.stdout, out.stderr].concat();
        assert!(out.status.success(), "seed {seed}: {}", String::from_utf8_lossy(&text));
    }
    r.mount.finish(&[]).expect("log");
}

#[test]
fn pjdfstest_over_file() {
    suite("file", include_str!("conformance/file.txt"));
}

#[test]
fn pjdfstest_over_nfs() {
    suite("nfs", include_str!("conformance/nfs.txt"));
}

#[test]
fn pjdfstest_over_s3() {
    suite("s3", include_str!("conformance/s3.txt"));
}

#[test]
fn fsx_over_s3() {
    fsx("s3", 9);
}

#[test]
fn fsx_over_file() {
    fsx("file", 7);
}

#[test]
fn fsx_over_nfs() {
    fsx("nfs", 8);
}
