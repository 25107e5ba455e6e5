//! `-o writeback`: close does not wait for the store; fsync, other mounts and the end of the mount do.

use efc_e2e::{Cluster, Mount, WorkerSpec, program, wait_for, within};
use efc_testkit::oss::{Action, Fault, OssOptions, OssServer};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(90);

fn server() -> OssServer {
    let server = OssServer::start_with(OssOptions::s3()).expect("server");
    server.create_bucket("b");
    server
}

fn mount(server: &OssServer, more: &[&str]) -> Mount {
    let endpoint = format!("endpoint={}", server.endpoint());
    let mut options = vec!["rw", "writeback", "cache_memory=64MiB", &endpoint, "region=us-east-1"];
    options.extend(more);
    Mount::start("s3://b", &options, &server.target().env()).expect("mount")
}

fn put_fault(key_prefix: &str, action: Action) -> Fault {
    Fault { op: "put".into(), key_prefix: key_prefix.into(), skip: 0, count: None, for_ms: None, action }
}

/// At once: what the store answers later is tried for so long that a reader would wait.
fn refused() -> Action {
    Action::Status { status: 403, code: "AccessDenied".into() }
}

/// A mount of a store that takes nothing any more.
fn mount_refused(server: &OssServer) -> Mount {
    let m = mount(server, &[]);
    server.fault(put_fault("", refused()));
    m
}

#[test]
fn a_closed_file_is_there_and_comes_to_the_store_by_itself() {
    let s = server();
    let m = mount_refused(&s);
    let path = m.path.clone();
    within(PATIENCE, move || {
        fs::write(path.join("f"), b"closed").expect("close does not wait");
        assert_eq!(fs::read(path.join("f")).expect("read"), b"closed");
        assert_eq!(fs::metadata(path.join("f")).expect("stat").len(), 6);
        fs::rename(path.join("f"), path.join("g")).expect("what the store has nothing of is renamed here");
        fs::rename(path.join("g"), path.join("f")).expect("and back");
        let names: Vec<_> = fs::read_dir(&path).expect("list").map(|e| e.expect("entry").file_name()).collect();
        assert_eq!(names, ["f"]);
        assert!(s.get("b", "f").is_none());
        s.clear_faults();
        wait_for("the object", PATIENCE, || Ok(s.get("b", "f").is_some())).expect("it comes by itself");
        assert_eq!(s.get("b", "f").expect("object"), &b"closed"[..]);
        fs::write(path.join("f"), b"again").expect("write again");
        wait_for("the second version", PATIENCE, || Ok(s.get("b", "f").is_some_and(|b| b[..] == b"again"[..])))
            .expect("it comes too");
        fs::remove_file(path.join("f")).expect("unlink");
        assert!(s.get("b", "f").is_none() && !path.join("f").exists());
    });
    m.unmount().expect("unmount");
}

/// The error of a commit is told by fsync, and what was written stays.
#[test]
fn fsync_waits_and_tells() {
    let s = server();
    let m = mount(&s, &[]);
    s.fault(put_fault("bad", refused()));
    let path = m.path.clone();
    within(PATIENCE, move || {
        let mut good = File::create(path.join("good")).expect("create");
        good.write_all(b"durable").expect("write");
        good.sync_all().expect("fsync");
        assert_eq!(s.get("b", "good").expect("after fsync"), &b"durable"[..]);
        let mut bad = File::create(path.join("bad")).expect("create");
        bad.write_all(b"kept").expect("write");
        assert_eq!(bad.sync_all().expect_err("refused").raw_os_error(), Some(libc::EACCES));
        drop(bad);
        assert_eq!(fs::read(path.join("bad")).expect("kept"), b"kept");
        s.clear_faults();
        File::open(path.join("bad")).and_then(|f| f.sync_all()).expect("opens");
        wait_for("the object", PATIENCE, || Ok(s.get("b", "bad").is_some())).expect("it comes when it may");
    });
    m.unmount().expect("unmount");
}

/// What the store refuses is shown with its reason, and can be given up.
#[test]
fn what_is_refused_is_shown_and_can_be_discarded() {
    let s = server();
    s.put("b", "old", "as it was");
    let m = mount_refused(&s);
    let dirty = |more: &[&str]| {
        let program = program("efc-fuse").expect("built");
        let out = Command::new(program).arg("dirty").arg(&m.path).args(more).output().expect("efc-fuse");
        (out.status.success(), String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned())
    };
    let path = m.path.clone();
    within(PATIENCE, move || {
        fs::write(path.join("new"), b"refused").expect("write");
        fs::write(path.join("old"), b"changed").expect("write");
    });
    let refused = || dirty(&[]).1.lines().filter(|l| l.contains("AccessDenied")).count();
    wait_for("two refusals", PATIENCE, || Ok(refused() == 2)).expect("shown");
    let (ok, text) = dirty(&["--discard", "new"]);
    assert!(ok && text.contains("1 files") && text.contains("old"), "{text}");
    let (ok, text) = dirty(&["--discard", "old"]);
    assert!(ok && text.contains("0 files"), "{text}");
    let (ok, text) = dirty(&["--discard", "nonsense"]);
    assert!(!ok && text.contains("no file of this name"), "{text}");
    s.clear_faults();
    let path = m.path.clone();
    within(PATIENCE, move || {
        assert!(!path.join("new").exists());
        assert_eq!(fs::read(path.join("old")).expect("read"), b"as it was");
    });
    m.unmount().expect("unmount");
    assert_eq!(s.keys("b"), [b"old".to_vec()]);
}

/// Two minutes are given to a store that refuses; who unmounts is told.
#[test]
fn who_unmounts_is_told_what_the_store_refused() {
    let s = server();
    let m = mount_refused(&s);
    let path = m.path.clone();
    within(PATIENCE, move || fs::write(path.join("f"), b"refused").expect("close does not wait"));
    let out = Command::new(program("efc-fuse").expect("built")).arg("umount").arg(&m.path).output().expect("efc-fuse");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.code() == Some(1) && said.contains("waiting for its process"), "{out:?}");
    assert!(said.contains("not all that was written is at the source") && said.contains("AccessDenied"), "{said}");
    m.ended().expect_err("so does its own exit status");
}

#[test]
fn the_end_of_a_mount_waits_for_the_store() {
    let s = server();
    let m = mount(&s, &[]);
    s.fault(put_fault("", Action::Latency { ms: 200 }));
    let path = m.path.clone();
    within(PATIENCE, move || {
        (0..300).for_each(|i| fs::write(path.join(format!("f{i}")), format!("{i}")).expect("write"))
    });
    m.finish(&[]).expect("unmount, and nothing to warn of");
    assert_eq!(s.keys("b").len(), 300);
    assert_eq!(s.get("b", "f299").expect("object"), &b"299"[..]);
}

#[test]
fn a_killed_mount_has_what_was_synced() {
    let s = server();
    let mut m = mount(&s, &[]);
    s.fault(put_fault("late", Action::Latency { ms: 3_600_000 }));
    let path = m.path.clone();
    within(PATIENCE, move || {
        for i in 0..50 {
            let mut f = File::create(path.join(format!("f{i}"))).expect("create");
            f.write_all(&vec![i; 5000]).expect("write");
            f.sync_all().expect("fsync");
        }
        fs::write(path.join("late"), b"only closed").expect("write");
    });
    m.kill();
    for i in 0..50u8 {
        assert_eq!(s.get("b", format!("f{i}")).expect("synced"), vec![i; 5000]);
    }
    assert!(s.get("b", "late").is_none(), "closed, not synced: lost, as SEMANTICS says");
}

/// What is closed on one mount is what the other reads, although the store has nothing of it yet.
#[test]
fn another_mount_waits_for_what_it_looks_at() {
    let s = server();
    let cluster =
        Cluster::start(1, &[WorkerSpec { memory: "64MiB".into(), ..WorkerSpec::default() }]).expect("cluster");
    let masters = cluster.option();
    let (a, b) = (mount(&s, &[&masters]), mount(&s, &[&masters]));
    s.fault(put_fault("", Action::Latency { ms: 100 }));
    let (on_a, on_b) = (a.path.clone(), b.path.clone());
    within(PATIENCE, move || {
        let checkpoint = |root: &Path, n: u32| root.join(format!("checkpoint-{n}"));
        for n in 0..20 {
            let temporary = on_a.join("temporary");
            fs::write(&temporary, format!("step {n}")).expect("write");
            fs::rename(&temporary, checkpoint(&on_a, n)).expect("rename");
            assert_eq!(fs::read_to_string(checkpoint(&on_b, n)).expect("at once"), format!("step {n}"));
            assert_eq!(fs::read_dir(&on_b).expect("list").count() as u32, n + 1);
        }
    });
    a.unmount().expect("unmount");
    b.unmount().expect("unmount");
}
