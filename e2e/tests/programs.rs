//! Real programs on read-write mounts: what users run there must just work.

use efc_e2e::{Mount, within};
use efc_testkit::oss::{OssOptions, OssServer};
use efc_testkit::{Ganesha, scratch};
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(900);

/// The acceptance's sizes with `EFC_E2E_LONG=1`, else a fifth.
fn size(full: usize) -> usize {
    if std::env::var_os("EFC_E2E_LONG").is_some() { full } else { full / 5 }
}

/// Runs `work` in the mount of a NAS-like origin; it gets the mount point and a directory beside.
fn over(origin: &str, work: fn(&Path, &Path)) {
    let dir = scratch("programs").expect("scratch");
    let (behind, beside) = (dir.path().join("origin"), dir.path().join("beside"));
    [&behind, &beside].into_iter().for_each(|d| fs::create_dir(d).expect("mkdir"));
    if origin == "s3" {
        return over_bucket(&beside, work);
    }
    let server = (origin == "nfs").then(|| Ganesha::start(&behind).expect("ganesha"));
    let (url, port) = match &server {
        Some(s) => (s.url(), format!("mount_port={}", s.mount_port())),
        None => (format!("file://{}", behind.display()), "umask=000".into()),
    };
    let m = Mount::start(&url, &["rw", "cache_memory=64MiB", &port], &[]).expect("mount");
    let path = m.path.clone();
    within(PATIENCE, move || work(&path, &beside));
    m.finish(&[]).expect("log");
}

fn over_bucket(beside: &Path, work: fn(&Path, &Path)) {
    let server = OssServer::start_with(OssOptions::s3()).expect("server");
    server.create_bucket("b");
    let (endpoint, keys) = (format!("endpoint={}", server.endpoint()), server.target());
    let m = Mount::start("s3://b", &["rw", "cache_memory=64MiB", &endpoint], &keys.env()).expect("mount");
    let (path, beside) = (m.path.clone(), beside.to_path_buf());
    within(PATIENCE, move || work(&path, &beside));
    println!("requests: {:?}", server.stats().requests);
    m.finish(&[]).expect("log");
}

fn run(dir: &Path, program: &str, args: &[&str]) -> Output {
    let out = Command::new(program).args(args).current_dir(dir).env("HOME", dir).output().expect(program);
    let text = || [&out.stdout[..], &out.stderr[..]].concat();
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&text()));
    out
}

/// A tree of `n` small files in directories of 100.
fn tree(dir: &Path, n: usize) {
    for i in 0..n {
        let sub = dir.join(format!("d{:03}", i / 100));
        if i % 100 == 0 {
            fs::create_dir_all(&sub).expect("mkdir");
        }
        fs::write(sub.join(format!("f{i}")), format!("content of {i}\n").repeat(i % 50 + 1)).expect("write");
    }
}

fn git(m: &Path, beside: &Path) {
    let repo = beside.join("repo");
    tree(&repo, size(5000));
    let git = |dir: &Path, args: &[&str]| {
        let who = ["-c", "user.name=efc", "-c", "user.email=efc@localhost", "-c", "init.defaultBranch=main"];
        run(dir, "git", &[&who[..], args].concat())
    };
    git(&repo, &["init", "-q"]);
    git(&repo, &["add", "-A"]);
    git(&repo, &["commit", "-qm", "all"]);
    let url = format!("file://{}", repo.display());
    git(m, &["clone", "-q", &url, "clone"]);
    let clone = m.join("clone");
    git(&clone, &["fsck", "--strict"]);
    assert!(git(&clone, &["status", "--porcelain"]).stdout.is_empty(), "the clone differs from its index");
    fs::write(clone.join("d000/f1"), "changed").expect("write");
    git(&clone, &["commit", "-qam", "one"]);
    git(&clone, &["gc", "-q"]);
    git(&clone, &["fsck", "--strict"]);
}

const SQLITE: &str = r#"
import sqlite3, sys, time
path, mode, who = sys.argv[1:4]
db = sqlite3.connect(path, timeout=60, isolation_level=None)
if who == "first":
    # Alone: two processes that switch the mode at once get SQLITE_BUSY on any file system.
    db.execute(f"pragma journal_mode={mode}")
    db.execute("create table t (who text, i integer)")
    sys.exit()
for i in range(100):
    db.execute("begin immediate")
    db.execute("insert into t values (?, ?)", (who, i))
    db.execute("commit")
"#;

fn sqlite(m: &Path, beside: &Path) {
    let script = beside.join("w.py");
    fs::write(&script, SQLITE).expect("write");
    for mode in ["wal", "delete"] {
        let db = m.join(format!("{mode}.db"));
        let db_name = db.to_str().expect("utf8");
        run(m, "python3", &[script.to_str().expect("utf8"), db_name, mode, "first"]);
        let both: Vec<_> = ["a", "b"]
            .map(|who| {
                let mut c = Command::new("python3");
                c.arg(&script).arg(&db).arg(mode).arg(who).spawn().expect("python3")
            })
            .into_iter()
            .collect();
        for mut child in both {
            assert!(child.wait().expect("wait").success(), "{mode}");
        }
        let check = "import sqlite3,sys; d=sqlite3.connect(sys.argv[1]); print(d.execute('pragma integrity_check').fetchone()[0], d.execute('select count(*), count(distinct who||i) from t').fetchone())";
        let out = run(m, "python3", &["-c", check, db_name]);
        assert_eq!(String::from_utf8_lossy(&out.stdout).trim(), "ok (200, 200)", "{mode}");
    }
}

fn tar(m: &Path, beside: &Path) {
    let n = size(20_000);
    tree(&beside.join("t"), n);
    run(beside, "tar", &["cf", "t.tar", "t"]);
    run(m, "tar", &["xf", beside.join("t.tar").to_str().expect("utf8")]);
    run(beside, "diff", &["-r", "t", m.join("t").to_str().expect("utf8")]);
    fs::remove_dir_all(m.join("t")).expect("rm -r");
    assert_eq!(fs::read_dir(m).expect("list").count(), 0);
}

fn rsync(m: &Path, beside: &Path) {
    tree(&beside.join("t"), 1000);
    let (from, to) = (format!("{}/", beside.join("t").display()), format!("{}/", m.display()));
    let args = ["-a", "--inplace", "--itemize-changes", &from, &to];
    assert!(!run(beside, "rsync", &args).stdout.is_empty());
    let again = run(beside, "rsync", &args);
    assert!(again.stdout.is_empty(), "sent again: {}", String::from_utf8_lossy(&again.stdout));
    run(beside, "diff", &["-r", "t", m.to_str().expect("utf8")]);
}

fn fio(m: &Path, beside: &Path) {
    let dir = format!("--directory={}", m.display());
    let args = [
        "--name=verify",
        &dir,
        "--rw=randrw",
        "--bs=4k-64k",
        "--size=16m",
        "--numjobs=4",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--end_fsync=1",
        "--do_verify=1",
        "--group_reporting",
    ];
    run(beside, "fio", &args);
}

/// A checkpoint as trainers write it: beside, synced, renamed over the last one.
fn checkpoint(m: &Path, beside: &Path) {
    let script = "import os,sys\nfor i in range(5):\n d=os.urandom(1<<20)*8\n t=sys.argv[1]+'.tmp'\n f=open(t,'wb'); f.write(d); f.flush(); os.fsync(f.fileno()); f.close()\n os.rename(t,sys.argv[1])\n assert open(sys.argv[1],'rb').read()==d\n";
    run(beside, "python3", &["-c", script, m.join("model.pt").to_str().expect("utf8")]);
    assert_eq!(fs::read_dir(m).expect("list").count(), 1);
}

/// Listing a directory while it is emptied, from the start again and again, as `rm -r` of some systems does.
fn rewound(m: &Path, _beside: &Path) {
    tree(m, 100);
    let script = "import os,sys\nd=sys.argv[1]\nwhile True:\n n=os.listdir(d)\n if not n: break\n os.unlink(os.path.join(d,n[0]))\n";
    run(m, "python3", &["-c", script, m.join("d000").to_str().expect("utf8")]);
    fs::remove_dir(m.join("d000")).expect("rmdir");
}

fn locks(m: &Path, _beside: &Path) {
    let script = "import fcntl,sys,subprocess\nf=open(sys.argv[1],'w')\nother='import fcntl,sys\\nf=open(sys.argv[1],\"r+\")\\ntry: fcntl.%s(f,fcntl.LOCK_EX|fcntl.LOCK_NB)\\nexcept BlockingIOError: sys.exit(7)\\n'\nfor how in ('flock','lockf'):\n getattr(fcntl,how)(f,fcntl.LOCK_EX)\n assert subprocess.run([sys.executable,'-c',other%how,sys.argv[1]]).returncode==7, how\n getattr(fcntl,how)(f,fcntl.LOCK_UN)\n assert subprocess.run([sys.executable,'-c',other%how,sys.argv[1]]).returncode==0, how\n";
    run(m, "python3", &["-c", script, m.join("lock").to_str().expect("utf8")]);
}

macro_rules! on {
    ($($work:ident => $file:ident, $nfs:ident, $s3:ident;)+) => {$(
        #[test]
        fn $file() {
            over("file", $work);
        }
        #[test]
        fn $nfs() {
            over("nfs", $work);
        }
        #[test]
        fn $s3() {
            over("s3", $work);
        }
    )+};
}

on! {
    git => git_over_file, git_over_nfs, git_over_s3;
    sqlite => sqlite_over_file, sqlite_over_nfs, sqlite_over_s3;
    tar => tar_over_file, tar_over_nfs, tar_over_s3;
    rsync => rsync_over_file, rsync_over_nfs, rsync_over_s3;
    fio => fio_over_file, fio_over_nfs, fio_over_s3;
    checkpoint => checkpoint_over_file, checkpoint_over_nfs, checkpoint_over_s3;
    rewound => rewound_over_file, rewound_over_nfs, rewound_over_s3;
    locks => locks_over_file, locks_over_nfs, locks_over_s3;
}
