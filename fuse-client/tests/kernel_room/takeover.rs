//! One mount, several processes one after the other. The test holds the connection and reads; the daemons are this test binary, started
//! again with a role in the environment.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use efc_fuse::kernel::{InitRecord, Mount, Outcomes, Session, SessionConfig, adopt};

use crate::support::*;

const ROLE: &str = "EFC_KERNEL_TEST_ROLE";
const RECORD: &str = "EFC_KERNEL_TEST_RECORD";

/// A file system whose reads are answered later, by other threads, so that some are always under way.
fn slow_fs(delay: Duration) -> MemFs {
    let mut fs = MemFs::new();
    fs.on_read = Some(Box::new(move |fs, node, at, reply| {
        let data = fs.data(node).expect("file");
        std::thread::spawn(move || {
            std::thread::sleep(delay);
            let end = (at.offset as usize + at.size as usize).min(data.len());
            reply.bytes(&data[(at.offset as usize).min(end)..end]);
        });
    }));
    fs
}

/// A daemon of the mount, when started with a role; else the check that starting again works.
#[test]
fn process_entry() {
    let Ok(role) = std::env::var(ROLE) else {
        let out = Command::new(std::env::current_exe().expect("self"))
            .args(["takeover::process_entry", "--exact", "--nocapture"])
            .env(ROLE, "nobody")
            .output()
            .expect("runs");
        assert!(String::from_utf8_lossy(&out.stdout).contains("no role nobody"), "{out:?}");
        return;
    };
    let config = SessionConfig::default();
    let fs = Arc::new(slow_fs(Duration::from_millis(5)));
    let inherited = || std::io::stdin().as_fd().try_clone_to_owned().expect("fd");
    let session = match role.as_str() {
        "first" => Session::start(fs, inherited(), &config).expect("starts"),
        "adopt" => {
            let record = std::env::var(RECORD).expect("record");
            let record = InitRecord::from_bytes(record.as_bytes()).expect("record");
            adopt(fs, inherited(), &record, &config).expect("adopts")
        }
        other => return println!("no role {other}"),
    };
    println!("\nSERVING {}", String::from_utf8(session.init_record().to_bytes().expect("record")).expect("text"));
    std::io::stdout().flush().expect("stdout");
    let mut ended = session.ended();
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
    runtime.block_on(async { ended.wait_for(Option::is_some).await.map(drop) }).expect("ends");
}

/// A daemon process; killed when the test ends.
struct Daemon {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Daemon {
    fn start(role: &str, fd: OwnedFd, record: &str) -> Daemon {
        let mut child = Command::new(std::env::current_exe().expect("self"))
            .args(["takeover::process_entry", "--exact", "--nocapture"])
            .envs([(ROLE, role), (RECORD, record)])
            .stdin(Stdio::from(fd))
            .stdout(Stdio::piped())
            .spawn()
            .expect("spawns");
        let (tx, lines) = mpsc::channel();
        let stdout = child.stdout.take().expect("stdout");
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if tx.send(line).is_err() {
                    break;
                }
            }
        });
        Daemon { child, lines }
    }

    /// Waits for a line that begins with `word` and gives the rest.
    fn expect(&self, word: &str) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).unwrap_or_else(|e| panic!("daemon said no {word}: {e}"));
            if let Some(rest) = line.strip_prefix(word) {
                return rest.trim().to_string();
            }
        }
    }

    /// The INIT record.
    fn serving(&self) -> String {
        self.expect("SERVING")
    }

    fn kill(mut self) {
        self.child.kill().expect("kills");
        self.child.wait().expect("waits");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|s| s.is_none()) {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

/// Eight threads that read without the page cache and compare every byte.
struct Readers {
    stop: Arc<AtomicBool>,
    reads: Arc<AtomicU64>,
    longest_us: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Readers {
    fn start(dir: &Path) -> Readers {
        let (stop, reads, longest_us) = (Arc::default(), Arc::default(), Arc::default());
        let node = |name: &str| MemFs::new().node(name);
        let files = ["files/114688", "files/1048579", "files/4096"].map(|name| {
            let size = name.split_once('/').expect("size").1.parse().expect("size");
            (dir.join(name), content(node(name), size))
        });
        let threads = (0..8usize)
            .map(|seed| {
                let (stop, reads, longest): (Arc<AtomicBool>, Arc<AtomicU64>, Arc<AtomicU64>) =
                    (Arc::clone(&stop), Arc::clone(&reads), Arc::clone(&longest_us));
                let (path, expected) = files[seed % 3].clone();
                std::thread::spawn(move || {
                    let mut at = seed * 4096;
                    let mut buffer = vec![0u8; 65_536];
                    while !stop.load(SeqCst) {
                        at = (at + 40_960) % expected.len();
                        let want = buffer.len().min(expected.len() - at);
                        let begun = Instant::now();
                        let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(&path).expect("opens");
                        file.read_exact_at(&mut buffer[..want], at as u64).expect("reads");
                        assert_eq!(buffer[..want], expected[at..at + want], "wrong bytes at {at}");
                        longest.fetch_max(begun.elapsed().as_micros() as u64, SeqCst);
                        reads.fetch_add(1, SeqCst);
                    }
                })
            })
            .collect();
        Readers { stop, reads, longest_us, threads }
    }

    /// Waits until every thread can have read again, on average.
    fn progress(&self) {
        let (from, deadline) = (self.reads.load(SeqCst), Instant::now() + LIMIT);
        while self.reads.load(SeqCst) < from + 200 {
            assert!(Instant::now() < deadline, "readers are stuck at {from} reads");
            assert!(self.threads.iter().all(|t| !t.is_finished()), "a reader failed");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Number of reads and the longest one; fails if any reader failed.
    fn finish(self) -> (u64, Duration) {
        self.stop.store(true, SeqCst);
        for thread in self.threads {
            thread.join().expect("a reader failed");
        }
        (self.reads.load(SeqCst), Duration::from_micros(self.longest_us.load(SeqCst)))
    }
}

/// The mount of a test, held here as a holder process would.
struct Held {
    mount: Mount,
    fd: OwnedFd,
    dir: tempfile::TempDir,
}

impl Held {
    fn new() -> Held {
        let dir = tempfile::tempdir().expect("dir");
        let (mount, fd) = Mount::new(&mount_config(dir.path()), |_| Ok(())).expect("mounts");
        Held { mount, fd, dir }
    }

    fn fd(&self) -> OwnedFd {
        self.fd.try_clone().expect("fd")
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Always: a daemon that was killed would leave callers hanging.
        if let Err(e) = self.mount.abort() {
            eprintln!("abort: {e}");
        }
        tear_down(&self.mount);
    }
}

#[test]
fn readers_do_not_notice_that_a_process_is_killed() {
    let held = Held::new();
    let mut daemon = Daemon::start("first", held.fd(), "");
    let record = daemon.serving();
    let path = held.dir.path().to_path_buf();
    guarded(&held.mount, move || assert_eq!(names(&path).len(), 3));
    let readers = Readers::start(held.dir.path());
    readers.progress();
    // In flight all the time: each of the eight readers waits for an answer that takes 5 ms.
    for _ in 0..3 {
        daemon.kill();
        daemon = Daemon::start("adopt", held.fd(), &record);
        assert_eq!(daemon.serving(), record);
        readers.progress();
    }
    let (reads, longest) = readers.finish();
    println!("{reads} reads, none failed, the longest took {longest:?}");
    drop(daemon);
}

#[test]
fn unanswered_requests_go_to_the_successor_marked() {
    let (seen_tx, seen) = mpsc::channel();
    let seen_tx = parking_lot::Mutex::new(seen_tx);
    let mut fs = MemFs::new();
    // Never answers, but keeps what it should answer.
    fs.on_read = Some(Box::new(move |_, _, _, reply| seen_tx.lock().send(reply).expect("kept")));
    let m = Mounted::new(fs);
    let path = m.path("files/4095");
    let reader = std::thread::spawn(move || std::fs::read(path));
    let kept = seen.recv_timeout(LIMIT).expect("the read arrives");
    let drained = m.session().drain(Duration::from_millis(50)).expect("drains");
    assert_eq!(drained.left, 1);
    // Too late: this process has given the request up.
    kept.bytes(b"wrong");
    let (record, fd) = (m.session().init_record().clone(), m.session().fd().try_clone_to_owned().expect("fd"));
    let fs = Arc::new(MemFs::new());
    let successor = adopt(fs.clone(), fd, &record, &SessionConfig::default()).expect("adopts");
    assert!(successor.negotiated().adopted);
    let data = reader.join().expect("joins").expect("reads");
    assert_eq!(data, content(m.fs.node("files/4095"), 4095));
    assert_eq!(fs.count("resent read"), 1, "the read came marked as sent again");
    let path = m.path("files/1");
    assert_eq!(m.guarded(move || std::fs::read(path)).expect("reads").len(), 1);
}

/// As on a kernel before 6.9: nobody hangs, and who was not answered can try again.
#[test]
fn what_is_not_sent_again_is_ended_by_the_successor() {
    let (seen_tx, seen) = mpsc::channel();
    let seen_tx = parking_lot::Mutex::new(seen_tx);
    let outcomes = Arc::new(Outcomes::new(None).expect("memory"));
    let mut fs = MemFs::new();
    fs.on_read = Some(Box::new(move |_, _, _, reply| seen_tx.lock().send(reply).expect("kept")));
    fs.outcomes = Some(outcomes.clone());
    let config = SessionConfig { resend: false, ..SessionConfig::default() };
    let m = Mounted::with(fs, |_| {}, config.clone());
    let path = m.path("files/4095");
    let read = move || File::options().read(true).custom_flags(libc::O_DIRECT).open(&path)?.read_at(&mut [0; 4095], 0);
    let reader = std::thread::spawn(read.clone());
    let kept = seen.recv_timeout(LIMIT).expect("the read arrives");
    assert_eq!(m.session().drain(Duration::from_millis(50)).expect("drains").left, 1);
    kept.bytes(b"too late");
    let (record, fd) = (m.session().init_record().clone(), m.session().fd().try_clone_to_owned().expect("fd"));
    let mut fs = MemFs::new();
    let left = File::from(outcomes.fd().try_clone_to_owned().expect("fd"));
    fs.outcomes = Some(Arc::new(Outcomes::new(Some(&left)).expect("memory")));
    let successor = adopt(Arc::new(fs), fd, &record, &config).expect("adopts");
    let error = reader.join().expect("joins").expect_err("nobody will answer");
    assert_eq!(error.raw_os_error(), Some(libc::EINTR));
    assert_eq!(m.guarded(read).expect("reads"), 4095);
    drop(successor);
}
