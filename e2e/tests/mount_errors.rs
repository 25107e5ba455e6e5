//! A mount that cannot come up: exit code, one sentence that says what and how to mend it, nothing left mounted.

use efc_e2e::program;
use efc_testkit::oss::{OssOptions, OssServer};
use efc_testkit::process::scratch;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

/// A mountpoint on which nothing stays, also after a panic.
struct Left<'a>(&'a Path);

impl Drop for Left<'_> {
    fn drop(&mut self) {
        // Nothing is mounted there any more if all went well.
        let _ = Command::new("timeout").args(["10", "umount", "-l"]).arg(self.0).output();
    }
}

/// A directory to be mounted, and where.
fn places(name: &str) -> (TempDir, PathBuf, PathBuf) {
    let dir = scratch(name).expect("dir");
    let (src, mnt) = (dir.path().join("src"), dir.path().join("mnt"));
    std::fs::create_dir(&src).expect("src");
    std::fs::create_dir(&mnt).expect("mnt");
    (dir, src, mnt)
}

/// Runs `efc-fuse mount` to its end under a deadline.
fn mount(source: &str, mountpoint: &Path, options: &str, keys: (&str, &str)) -> Output {
    let mut c = Command::new("timeout");
    c.arg("60").arg(program("efc-fuse").expect("built")).arg("mount").arg(source).arg(mountpoint);
    let data = mountpoint.with_extension("data");
    let log = mountpoint.with_extension("log");
    c.arg("-o").arg(format!("data_dir={}", data.display())).arg("--log-file").arg(log);
    if !options.is_empty() {
        c.arg("-o").arg(options);
    }
    c.env("AWS_ACCESS_KEY_ID", keys.0).env("AWS_SECRET_ACCESS_KEY", keys.1);
    c.output().expect("run efc-fuse")
}

fn umount(mountpoint: &Path) -> Output {
    let mut c = Command::new("timeout");
    c.arg("30").arg(program("efc-fuse").expect("built")).arg("umount").arg(mountpoint).output().expect("run efc-fuse")
}

fn refused(what: &str, out: &Output, code: i32, says: &[&str], mountpoint: &Path) {
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(code), "{what}: {said}");
    assert_eq!(said.trim().lines().count(), 1, "{what}: one sentence, not: {said}");
    for word in says {
        assert!(said.contains(word), "{what}: `{word}` is not in: {said}");
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    assert!(!mounts.contains(&format!(" {} ", mountpoint.display())), "{what}: left mounted");
}

#[test]
fn every_mistake_is_named_and_leaves_nothing_behind() {
    let server = OssServer::start_with(OssOptions::s3()).expect("server");
    server.create_bucket("there");
    let keys = server.target();
    let good = (keys.key_id.as_str(), keys.secret.as_str());
    let dir = scratch("errors").expect("dir");
    let mnt = dir.path().join("mnt");
    std::fs::create_dir(&mnt).expect("mountpoint");
    let endpoint = format!("endpoint={}", server.endpoint());

    let out = mount("s3://nowhere", &mnt, &endpoint, good);
    refused("wrong bucket", &out, 3, &["bucket", "nowhere"], &mnt);
    let out = mount("s3://there", &mnt, &endpoint, (good.0, "wrong"));
    refused("wrong key", &out, 4, &["refused", "secret"], &mnt);
    let out = mount("s3://there", &mnt, "endpoint=http://127.0.0.1:9,timeout=2s", good);
    refused("unreachable host", &out, 5, &["127.0.0.1:9"], &mnt);
    let out = mount("s3://there", &mnt, "nonsense=1", good);
    refused("unknown option", &out, 2, &["nonsense", "--help"], &mnt);
    let out = mount("ftp://there", &mnt, "", good);
    refused("unknown scheme", &out, 2, &["ftp"], &mnt);
    let out = mount("dataset://there", &mnt, "", good);
    refused("dataset without masters", &out, 2, &["master="], &mnt);
    let out = mount("dataset://there", &mnt, &endpoint, good);
    refused("an option that is the dataset's", &out, 2, &["endpoint", "dataset"], &mnt);
    let out = mount("file:///nonexistent/dir", &mnt, "", good);
    refused("missing directory", &out, 3, &["/nonexistent/dir"], &mnt);
    let out = mount("nfs://127.0.0.1:9/export", &mnt, "timeout=2s,mount_port=9", good);
    refused("no NFS server", &out, 5, &["127.0.0.1"], &mnt);
    let absent = dir.path().join("absent");
    let out = mount("s3://there", &absent, &endpoint, good);
    refused("missing mountpoint", &out, 3, &["absent", "create"], &absent);
    let file = dir.path().join("file");
    std::fs::write(&file, b"x").expect("file");
    let out = mount("s3://there", &file, &endpoint, good);
    refused("mountpoint is a file", &out, 3, &["not a directory"], &file);
}

#[test]
fn what_was_unmounted_can_be_mounted_again_at_once() {
    let (_dir, src, mnt) = places("again");
    let _left = Left(&mnt);
    for _ in 0..3 {
        for out in [mount(&format!("file://{}", src.display()), &mnt, "", ("", "")), umount(&mnt)] {
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        }
    }
}

#[test]
fn a_busy_mountpoint_is_refused_and_left_as_it_was() {
    let (_dir, src, mnt) = places("busy");
    let _left = Left(&mnt);
    let source = format!("file://{}", src.display());
    let first = mount(&source, &mnt, "", ("", ""));
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    let again = mount(&source, &mnt, "", ("", ""));
    let gone = umount(&mnt);
    let said = String::from_utf8_lossy(&again.stderr);
    assert_eq!(again.status.code(), Some(6), "{said}");
    assert!(said.contains("already a mount point"), "{said}");
    assert!(gone.status.success(), "{}", String::from_utf8_lossy(&gone.stderr));
    // A second unmount says so.
    assert_eq!(umount(&mnt).status.code(), Some(3));
}

#[test]
fn what_is_in_use_for_a_moment_is_unmounted() {
    let (_dir, src, mnt) = places("moment");
    std::fs::write(src.join("f"), "there").expect("file");
    let _left = Left(&mnt);
    let done = mount(&format!("file://{}", src.display()), &mnt, "", ("", ""));
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let file = std::fs::File::open(mnt.join("f")).expect("open");
    let refused = umount(&mnt);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    let closed = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(100));
        drop(file);
    });
    let gone = umount(&mnt);
    closed.join().expect("closed");
    assert!(refused.status.code() == Some(6) && said.contains("in use"), "{said}");
    assert!(gone.status.success(), "{}", String::from_utf8_lossy(&gone.stderr));
}

/// A link in /sbin, where mount(8) looks for helpers; removed on drop. A link that is there already is not ours.
struct Helper(bool);

impl Helper {
    fn install() -> Helper {
        Helper(std::os::unix::fs::symlink(program("efc-fuse").expect("built"), "/sbin/mount.efc").is_ok())
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        if self.0 {
            let _ = std::fs::remove_file("/sbin/mount.efc");
        }
    }
}

#[test]
fn mount_8_mounts_and_umount_8_unmounts() {
    let _helper = Helper::install();
    let (dir, src, mnt) = places("mount8");
    std::fs::write(src.join("hello"), "there").expect("file");
    let options = format!("noatime,uid=5,data_dir={}", dir.path().join("data").display());
    let run = |program: &str, args: &[&str]| {
        let out = Command::new("timeout").arg("60").arg(program).args(args).output().expect("run");
        assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).into_owned()
    };
    let (source, at) = (format!("file://{}", src.display()), mnt.display().to_string());
    run("mount", &["-t", "efc", &source, &at, "-o", &options]);
    let said = run("cat", &[&format!("{at}/hello")]);
    let owner = run("stat", &["-c", "%u", &format!("{at}/hello")]);
    run("umount", &[&at]);
    assert_eq!((said.as_str(), owner.trim()), ("there", "5"));
}

#[test]
fn without_dev_fuse_the_cure_is_named() {
    let dir = scratch("nofuse").expect("dir");
    let mnt = dir.path().join("mnt");
    std::fs::create_dir(&mnt).expect("mnt");
    // A mount namespace of its own, where /dev holds nothing but null.
    let script = "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && exec \"$0\" \"$@\"";
    let out = Command::new("timeout")
        .args(["60", "unshare", "-m", "sh", "-c", script])
        .arg(program("efc-fuse").expect("built"))
        .arg("mount")
        .arg(format!("file://{}", dir.path().display()))
        .arg(&mnt)
        .output()
        .expect("run");
    refused("no /dev/fuse", &out, 7, &["/dev/fuse"], &mnt);
}
