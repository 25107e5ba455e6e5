//! Advisory locks between mounts: what one node has locked no other gets, whoever dies.

use efc_e2e::{Cluster, Mount, WorkerSpec, wait_for, within};
use efc_testkit::{Ganesha, scratch, venv};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(120);

struct Rig {
    cluster: Cluster,
    mounts: Vec<Mount>,
    _dir: tempfile::TempDir,
}

/// Two mounts of one directory.
fn rig(masters: usize) -> Rig {
    let dir = scratch("locks").expect("scratch");
    let worker = WorkerSpec { memory: "64MiB".into(), ..WorkerSpec::default() };
    let cluster = Cluster::start(masters, &[worker]).expect("cluster");
    let source = format!("file://{}", dir.path().display());
    let mount = || Mount::start(&source, &["rw", &cluster.option()], &[]).expect("mount");
    let mounts = vec![mount(), mount()];
    Rig { cluster, mounts, _dir: dir }
}

impl Rig {
    fn path(&self, mount: usize, name: &str) -> PathBuf {
        self.mounts[mount].path.join(name)
    }

    fn finish(self, expected: &[&str]) {
        self.mounts.into_iter().for_each(|m| m.finish(expected).expect("log"));
    }
}

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).expect("open")
}

fn range(kind: i32, start: i64, len: i64) -> libc::flock {
    let (l_type, l_whence) = (kind as i16, libc::SEEK_SET as i16);
    libc::flock { l_type, l_whence, l_start: start, l_len: len, l_pid: 0 }
}

fn set(file: &File, kind: i32, start: i64, len: i64) -> Result<i32, Errno> {
    fcntl(file.as_fd(), FcntlArg::F_SETLK(&range(kind, start, len)))
}

fn wait(file: &File, kind: i32, start: i64, len: i64) -> Result<i32, Errno> {
    fcntl(file.as_fd(), FcntlArg::F_SETLKW(&range(kind, start, len)))
}

/// What stands against a lock: kind, first byte, length.
fn test(file: &File, kind: i32, start: i64, len: i64) -> (i32, i64, i64) {
    let mut lock = range(kind, start, len);
    fcntl(file.as_fd(), FcntlArg::F_GETLK(&mut lock)).expect("F_GETLK");
    (i32::from(lock.l_type), lock.l_start, lock.l_len)
}

fn flock(file: &File, how: i32) -> io::Result<()> {
    // SAFETY: a system call on a descriptor that is open.
    if unsafe { libc::flock(file.as_raw_fd(), how) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Waits for a lock in a thread, which then says how long it took.
fn waiting(path: PathBuf, kind: i32, start: i64, len: i64) -> JoinHandle<(File, Result<i32, Errno>)> {
    let thread = std::thread::spawn(move || {
        let file = open(&path);
        let outcome = wait(&file, kind, start, len);
        (file, outcome)
    });
    std::thread::sleep(Duration::from_millis(300));
    assert!(!thread.is_finished(), "it waits");
    thread
}

const READ: i32 = libc::F_RDLCK;
const WRITE: i32 = libc::F_WRLCK;
const NONE: i32 = libc::F_UNLCK;

#[test]
fn ranges_are_locked_for_all_mounts() {
    let r = rig(1);
    let (a, b) = (r.path(0, "f"), r.path(1, "f"));
    within(PATIENCE, move || {
        let (a, other) = (open(&a), open(&b));
        set(&a, WRITE, 0, 10).expect("free");
        assert_eq!(set(&other, READ, 5, 1), Err(Errno::EAGAIN));
        set(&other, WRITE, 10, 10).expect("another range");
        assert_eq!(test(&other, READ, 0, 30), (WRITE, 0, 10));
        assert_eq!(test(&a, WRITE, 0, 0), (WRITE, 10, 10));
        assert_eq!(test(&a, WRITE, 0, 10).0, NONE, "one's own does not count");
        set(&a, NONE, 2, 6).expect("unlock the middle");
        set(&other, READ, 2, 6).expect("free now");
        assert_eq!(set(&a, WRITE, 0, 10), Err(Errno::EAGAIN));
        set(&a, READ, 0, 10).expect("readers go together");
        assert_eq!(
            test(&other, WRITE, 0, 0),
            (READ, 0, 10),
            "a write lock was turned into a read lock, and is one piece"
        );
        // Who waits is let in when the last byte is free.
        let waits = waiting(b.clone(), WRITE, 8, 2);
        set(&a, NONE, 0, 10).expect("unlock");
        let (file, outcome) = waits.join().expect("thread");
        outcome.expect("granted");
        assert_eq!(set(&a, READ, 9, 1), Err(Errno::EAGAIN));
        // Any close of the file ends all POSIX locks of the process there.
        drop(file);
        set(&a, WRITE, 0, 0).expect("all is free");
    });
    r.finish(&[]);
}

#[test]
fn flock_holds_until_the_last_close() {
    let r = rig(1);
    let (a, b) = (r.path(0, "f"), r.path(1, "f"));
    within(PATIENCE, move || {
        let (first, other) = (open(&a), open(&b));
        flock(&first, libc::LOCK_EX).expect("free");
        let copy = first.try_clone().expect("dup");
        drop(first);
        let denied = flock(&other, libc::LOCK_SH | libc::LOCK_NB).expect_err("held by the copy");
        assert_eq!(denied.raw_os_error(), Some(libc::EWOULDBLOCK));
        flock(&copy, libc::LOCK_SH).expect("downgrade");
        flock(&other, libc::LOCK_SH | libc::LOCK_NB).expect("shared");
        flock(&other, libc::LOCK_UN).expect("unlock");
        drop(copy);
        // The kernel does not wait for us when a file is closed.
        let free = || Ok(flock(&other, libc::LOCK_EX | libc::LOCK_NB).is_ok());
        wait_for("the lock of a closed file to go", Duration::from_secs(5), free).expect("free");
    });
    r.finish(&[]);
}

#[test]
fn a_deadlock_over_two_mounts_is_told() {
    let r = rig(1);
    let paths = [(0, "x"), (1, "y"), (0, "y"), (1, "x")].map(|(m, n)| r.path(m, n));
    within(PATIENCE, move || {
        let [ax, by, ay, bx] = paths;
        let (x, y) = (open(&ax), open(&by));
        set(&x, WRITE, 0, 1).expect("a has x");
        set(&y, WRITE, 0, 1).expect("b has y");
        let waits = waiting(ay, WRITE, 0, 1);
        let bx = open(&bx);
        assert_eq!(wait(&bx, WRITE, 0, 1), Err(Errno::EDEADLK));
        set(&y, NONE, 0, 1).expect("b lets go");
        waits.join().expect("thread").1.expect("a has both");
    });
    r.finish(&[]);
}

#[test]
fn a_signal_ends_waiting() {
    let r = rig(1);
    let (a, b) = (r.path(0, "f"), r.path(1, "f"));
    within(PATIENCE, move || {
        let held = open(&a);
        flock(&held, libc::LOCK_EX).expect("free");
        for signal in [nix::sys::signal::SIGTERM, nix::sys::signal::SIGKILL] {
            let mut child = Command::new("flock").arg(&b).arg("true").spawn().expect("flock(1)");
            std::thread::sleep(Duration::from_millis(500));
            assert!(child.try_wait().expect("wait").is_none(), "it waits");
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), signal).expect("kill");
            let end = Instant::now() + Duration::from_secs(5);
            while child.try_wait().expect("wait").is_none() {
                assert!(Instant::now() < end, "{signal} does not end it");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        // What it wanted is not wanted any more.
        flock(&held, libc::LOCK_UN).expect("unlock");
        flock(&open(&b), libc::LOCK_EX | libc::LOCK_NB).expect("nobody has it");
    });
    r.finish(&[]);
}

/// A mount that dies, and then the leader: locks of the dead pass on within the lease time, those of the living are kept.
#[test]
fn locks_outlive_leaders_but_not_their_mounts() {
    let mut r = rig(3);
    let (a, b) = (r.path(0, "f"), r.path(1, "f"));
    let (_held, waits) = within(PATIENCE, move || {
        let held = open(&a);
        set(&held, WRITE, 0, 0).expect("free");
        (held, waiting(b, WRITE, 0, 0))
    });
    let leader = r.cluster.leader().expect("leader");
    r.cluster.masters[leader].kill();
    std::thread::sleep(Duration::from_secs(8));
    assert!(!waits.is_finished(), "the next leader knows whose it is");
    r.mounts[0].kill();
    let (b, outcome) = within(PATIENCE, move || waits.join().expect("thread"));
    outcome.expect("granted");
    // The third mount is the first of a new life.
    let source = format!("file://{}", r._dir.path().display());
    let third = Mount::start(&source, &["rw", &r.cluster.option()], &[]).expect("mount");
    let c = third.path.join("f");
    within(PATIENCE, move || {
        let c = open(&c);
        assert_eq!(set(&c, READ, 0, 1), Err(Errno::EAGAIN));
        set(&b, NONE, 0, 0).expect("unlock");
        set(&c, READ, 0, 1).expect("free");
    });
    third.finish(&[]).expect("log");
    r.mounts.remove(0);
    r.finish(&[]);
}

/// SQLite locks ranges of one file, from two nodes, for each of its transactions.
#[test]
fn sqlite_counts_right_from_two_nodes() {
    let dir = scratch("locks").expect("scratch");
    let server = Ganesha::start(dir.path()).expect("ganesha");
    let worker = WorkerSpec { memory: "64MiB".into(), ..WorkerSpec::default() };
    let cluster = Cluster::start(1, &[worker]).expect("cluster");
    let mount = || Mount::start(&server.url(), &["rw", &cluster.option()], &[]).expect("mount");
    let mounts = [mount(), mount()];
    let script = r#"
import sqlite3, sys, random, time
db = sqlite3.connect(sys.argv[1], timeout=100, isolation_level=None)
db.execute("create table if not exists t (n integer)")
for i in range(40):
    while True:
        try:
            db.execute("begin immediate")
            n = db.execute("select count(*), coalesce(max(n), 0) from t").fetchone()
            assert n[0] == n[1], n
            db.execute("insert into t values (?)", (n[0] + 1,))
            db.execute("commit")
            break
        except sqlite3.OperationalError as e:
            if "locked" not in str(e): raise
            if db.in_transaction: db.execute("rollback")
            time.sleep(random.random() * 0.02)
"#;
    let writers: Vec<_> = mounts
        .iter()
        .map(|m| {
            let python = venv::program("python").expect("python (./run setup)");
            Command::new(python).args(["-c", script]).arg(m.path.join("db")).spawn().expect("python")
        })
        .collect();
    let path = mounts[0].path.join("db");
    within(PATIENCE, move || {
        for mut w in writers {
            assert!(w.wait().expect("wait").success());
        }
        assert!(fs::metadata(path).expect("db").len() > 0);
    });
    let path = mounts[1].path.join("db");
    let counted = within(PATIENCE, move || {
        let python = venv::program("python").expect("python");
        let script = "import sqlite3,sys; db=sqlite3.connect(sys.argv[1]); print(db.execute('select count(*), max(n) from t').fetchone(), db.execute('pragma integrity_check').fetchone()[0])";
        Command::new(python).args(["-c", script]).arg(path).output().expect("python")
    });
    assert_eq!(String::from_utf8_lossy(&counted.stdout).trim(), "(80, 80) ok");
    mounts.into_iter().for_each(|m| m.finish(&[]).expect("log"));
}
