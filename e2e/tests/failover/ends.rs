//! How mounts end whose process has died: nothing is lost, and nobody waits for ever.

use crate::live::replaced;
use crate::load::PATIENCE;
use crate::upgrade::efc_fuse;
use crate::write::{KEYS, Origin, rig};
use efc_e2e::{Mount, wait_for, within};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::Write;
use std::time::Duration;

#[test]
fn what_was_put_aside_may_have_gone_with_its_directory() {
    let r = rig("nfs", &["fault=latency=500ms"]);
    let Origin::Nfs(exported, _) = &r.origin else { unreachable!("an NFS server") };
    let (here, there) = (r.mount.path.join("d"), exported.path().join("d"));
    let aside = there.clone();
    within(PATIENCE, move || {
        fs::create_dir(&here).expect("mkdir");
        let file = File::create(here.join("f")).expect("create");
        fs::remove_file(here.join("f")).expect("unlink");
        assert_eq!(fs::read_dir(aside).expect("origin").count(), 1);
        drop(file);
    });
    // The process has begun to remove it; that it is gone is known to nobody when the process dies.
    std::thread::sleep(Duration::from_millis(200));
    fs::remove_dir_all(there).expect("remove at the origin");
    replaced(&r.mount);
    r.end(&["the mount process is gone"]);
}

#[test]
fn who_is_told_to_end_while_another_takes_over_brings_everything_to_the_store() {
    let r = rig("s3", &[]);
    let Origin::Bucket(server) = &r.origin else { unreachable!("a bucket") };
    let mut options = vec!["rw".to_string(), "writeback".into(), "fault=latency=200ms".into(), r.cluster.option()];
    options.extend(r.origin.options());
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    // The successor has just begun, is about to serve, serves.
    for delay_ms in [0, 30, 300, 900, 1500] {
        let m = Mount::start(&r.origin.url(), &options, &KEYS).expect("mount");
        let (at, holder, before) = (m.path.clone(), m.holder(), m.pid());
        within(PATIENCE, move || {
            for i in 0..20 {
                fs::write(at.join(format!("{delay_ms}-{i}")), format!("file {i}")).expect("write");
            }
        });
        m.kill_server();
        wait_for("another process", PATIENCE, || Ok(![before, holder].contains(&m.pid()))).expect("another");
        let successor = m.pid();
        std::thread::sleep(Duration::from_millis(delay_ms));
        // As a terminal or a service manager does: all of them at once.
        for pid in [successor, holder] {
            // One that learns of the other's end may be gone.
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGTERM);
        }
        m.ended().expect("ends in order");
        let missing: Vec<u32> = (0..20)
            .filter(|i| server.get("b", format!("{delay_ms}-{i}")) != Some(format!("file {i}").into()))
            .collect();
        assert!(missing.is_empty(), "{delay_ms} ms: {missing:?}");
    }
    r.end(&[]);
}

#[test]
fn what_is_open_of_a_detached_mount_goes_on() {
    let r = rig("s3", &[]);
    let at = r.mount.path.join("f");
    let mut file = within(PATIENCE, move || {
        let mut file = File::create(at).expect("create");
        file.write_all(b"before ").expect("write");
        file
    });
    let out = efc_fuse(&r.mount, "umount", &["--lazy"]);
    assert!(out.status.success(), "{out:?}");
    let before = r.mount.pid();
    r.mount.kill_server();
    within(PATIENCE, move || {
        file.write_all(b"and after").expect("write");
        file.sync_all().expect("sync");
    });
    assert_ne!(r.mount.pid(), before);
    r.mount.ended().expect("ends with its last user");
    let seen = r.other.path.join("f");
    assert_eq!(within(PATIENCE, move || fs::read_to_string(seen).expect("read")), "before and after");
    r.other.finish(&[]).expect("log");
}
