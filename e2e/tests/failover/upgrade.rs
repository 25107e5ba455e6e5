//! Another program in the place of a mount process.

use crate::load::PATIENCE;
use crate::write::{rig, writers};
use efc_e2e::{Mount, program, wait_for};
use efc_fuse::control::{self, Request};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Runs `efc-fuse` with these arguments.
pub(super) fn efc_fuse(mount: &Mount, command: &str, args: &[&str]) -> Output {
    let mut run = Command::new("timeout");
    run.arg("60").arg(program("efc-fuse").expect("program")).arg(command).arg(&mount.path).args(args);
    run.output().expect("run")
}

/// Programs that take turns: the version before, if one was built (`./run previous` says how), and this one.
pub(super) fn versions() -> [PathBuf; 2] {
    let ours = program("efc-fuse").expect("program");
    let before = std::env::var_os("EFC_E2E_PREVIOUS").map_or_else(|| ours.clone(), PathBuf::from);
    println!("upgrades between {} and {}", before.display(), ours.display());
    [before, ours]
}

/// Has `program` take the place of the mount process.
pub(super) fn upgrade(mount: &Mount, program: &Path) {
    let out = efc_fuse(mount, "upgrade", &["--binary", program.to_str().expect("utf8")]);
    assert!(out.status.success(), "{out:?}");
}

pub(super) fn history(mount: &Mount) -> Vec<Value> {
    let out = efc_fuse(mount, "history", &["-o", "json"]);
    assert!(out.status.success(), "{out:?}");
    let said: Value = serde_json::from_slice(&out.stdout).expect("json");
    said["events"].as_array().expect("events").clone()
}

/// The metrics of the process that serves.
fn exposition(mount: &Mount) -> String {
    let mut text = String::new();
    let ask = control::ask(&mount.path, &Request::Metrics, |v| text = v["text"].as_str().expect("text").into());
    tokio::runtime::Runtime::new().expect("runtime").block_on(ask).expect("metrics");
    text
}

/// A program that does `text`.
fn script(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("write");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("chmod");
    path.display().to_string()
}

/// Upgrades back and forth between two programs under writers.
#[test]
fn upgrades_are_a_pause_for_writers() {
    let r = rig("file", &[]);
    let dir = tempfile::tempdir().expect("dir");
    let [before, ours] = versions();
    let copies = [("one", before), ("two", ours)].map(|(name, program)| {
        let path = dir.path().join(name).join("efc-fuse");
        std::fs::create_dir(dir.path().join(name)).expect("mkdir");
        std::fs::copy(program, &path).expect("copy");
        path.display().to_string()
    });
    let load = writers(&r);
    let rounds = if std::env::var_os("EFC_E2E_LONG").is_some() { 50 } else { 6 };
    let mut longest = 0;
    for n in 0..rounds {
        load.more(40);
        let pid = r.mount.pid();
        let out = efc_fuse(&r.mount, "upgrade", &["--binary", &copies[n % 2], "-o", "json"]);
        assert!(out.status.success(), "{out:?}");
        let event: Value = serde_json::from_slice(&out.stdout).expect("json");
        assert_eq!((&event["what"], &event["text"]), (&Value::from("upgrade"), &Value::from(copies[n % 2].clone())));
        assert!(r.mount.pid() != pid && event["pid"] == r.mount.pid());
        let exe = std::fs::read_link(format!("/proc/{}/exe", r.mount.pid())).expect("exe");
        assert_eq!(exe, Path::new(&copies[n % 2]));
        longest = longest.max(event["pause_ms"].as_u64().expect("pause"));
    }
    // A process that dies is replaced by what serves now, and a signal asks for the same program once more.
    load.kill(&r.mount);
    let exe = || std::fs::read_link(format!("/proc/{}/exe", r.mount.pid())).expect("exe");
    assert_eq!(exe(), Path::new(&copies[(rounds - 1) % 2]));
    let pid = r.mount.pid();
    kill(Pid::from_raw(r.mount.started() as i32), Signal::SIGUSR2).expect("signal");
    wait_for("another process", PATIENCE, || Ok(r.mount.pid() != pid)).expect("upgraded");
    load.more(40);
    println!("{rounds} upgrades, longest pause {longest} ms, longest step {:?}", load.finish());
    let what: Vec<_> = history(&r.mount).iter().map(|e| e["what"].as_str().expect("what").to_string()).collect();
    // The oldest are forgotten.
    assert!(what.iter().filter(|w| *w == "upgrade").count() >= (rounds + 1).min(45), "{what:?}");
    assert!(what.iter().any(|w| w == "crash"), "{what:?}");
    // Each takeover is counted, and so is its pause.
    let out = efc_fuse(&r.mount, "stats", &["-o", "json"]);
    let stats: Value = serde_json::from_slice(&out.stdout).expect("json");
    let takeovers = rounds as u64 + 2;
    assert_eq!((&stats["takeovers"], &stats["last_takeover"]["what"]), (&takeovers.into(), &"upgrade".into()));
    let exposed = exposition(&r.mount);
    for line in [
        format!("efc_failover_seconds_count {takeovers}"),
        format!("efc_failover_total{{reason=\"upgrade\"}} {}", takeovers - 1),
        "efc_failover_total{reason=\"crash\"} 1".into(),
    ] {
        assert!(exposed.lines().any(|l| l == line), "{line}: {exposed}");
    }
    r.finish(&["the mount process is gone"]);
}

#[test]
fn an_upgrade_to_a_broken_program_leaves_the_old_one_serving() {
    let r = rig("file", &[]);
    let dir = tempfile::tempdir().expect("dir");
    let load = writers(&r);
    load.more(40);
    let serves = program("efc-fuse").expect("program").display().to_string();
    let says = |journal: u32| {
        let init = efc_fuse::kernel::INIT_RECORD_FORMAT;
        let agreed = serde_json::json!({"journal": journal, "init": init, "read_write": true, "strict": true});
        serde_json::json!({"version": "9", "agreed": agreed}).to_string()
    };
    let newest = *efc_fuse::journal::FORMATS.end();
    let (ours, other) = (says(newest), says(newest + 1));
    // Refused before the old process has done anything: it ends at once, hangs, is of another format, is none.
    for (name, text, why) in [
        ("ends", "echo no such thing >&2; exit 3", "no such thing"),
        ("other", &format!("echo '{other}'"), "cannot go on with this mount"),
        ("hangs", "exec sleep 1000", "did not say"),
    ] {
        let pid = r.mount.pid();
        let out = efc_fuse(&r.mount, "upgrade", &["--binary", &script(dir.path(), name, text)]);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && said.contains(why), "{name}: {said}");
        assert_eq!(r.mount.pid(), pid, "{name}");
    }
    let out = efc_fuse(&r.mount, "upgrade", &["--binary", "/no/such/program"]);
    assert!(!out.status.success(), "{out:?}");
    let out = efc_fuse(&r.mount, "upgrade", &["--option", "consistency=ttl=5"]);
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("cannot go on"), "{out:?}");
    assert!(history(&r.mount).is_empty());
    // One that looks well and does not serve: the program of before goes on.
    for (name, then) in [("dies", "exit 1"), ("sleeps", "exec sleep 1000")] {
        let text = format!("[ -n \"$EFC_PREFLIGHT\" ] && echo '{ours}' && exit 0\n{then}");
        let out = efc_fuse(&r.mount, "upgrade", &["--binary", &script(dir.path(), name, &text)]);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && said.contains("the old one goes on"), "{name}: {said}");
        load.more(40);
        let exe = std::fs::read_link(format!("/proc/{}/exe", r.mount.pid())).expect("exe");
        assert_eq!(exe.display().to_string(), serves);
    }
    let all = history(&r.mount);
    assert!(all.len() == 2 && all.iter().all(|e| e["what"] == "upgrade_failed" && e["pid"] != 0), "{all:?}");
    println!("longest step {:?}", load.finish());
    r.finish(&[
        "could not take the mount over",
        "no other program takes over",
        "does not answer",
        "was not told what is kept",
    ]);
}
