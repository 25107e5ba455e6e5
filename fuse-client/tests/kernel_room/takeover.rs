//! One mount, several processes one after the other. The test holds the connection and reads; the daemons are this test binary, started
//! again with a role in the environment.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use efc_common::Kind;
use efc_fuse::kernel::handover::{HandoverLimits, HandoverServer, take};
use efc_fuse::kernel::{InitRecord, Mount, Session, SessionConfig, adopt};

use crate::support::*;

const ROLE: &str = "EFC_KERNEL_TEST_ROLE";
const RECORD: &str = "EFC_KERNEL_TEST_RECORD";
const SOCKET: &str = "EFC_KERNEL_TEST_SOCKET";

/// A file system whose reads are answered later, by other threads, so that some are always under way.
fn slow_fs(delay: Duration) -> MemFs {
    let mut fs = MemFs::new();
    fs.on_read = Some(Box::new(move |fs, node, offset, size, reply| {
        let data = fs.data(node).expect("file");
        std::thread::spawn(move || {
            std::thread::sleep(delay);
            let end = (offset as usize + size as usize).min(data.len());
            reply.bytes(&data[(offset as usize).min(end)..end]);
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
    let socket = PathBuf::from(std::env::var_os(SOCKET).unwrap_or_default());
    let config = SessionConfig::default();
    let fs = Arc::new(slow_fs(Duration::from_millis(5)));
    let inherited = || std::io::stdin().as_fd().try_clone_to_owned().expect("fd");
    let (session, state) = match role.as_str() {
        "first" => (Session::start(fs, inherited(), &config).expect("starts"), b"0".to_vec()),
        "adopt" => {
            let record = std::env::var(RECORD).expect("record");
            let record = InitRecord::from_bytes(record.as_bytes()).expect("record");
            (adopt(fs, inherited(), &record, &config).expect("adopts"), b"0".to_vec())
        }
        "take" => {
            let (fd, record, state, confirm) = take(&socket, LIMIT).expect("takes").into_parts();
            let session = adopt(fs, fd, &record, &config).expect("adopts");
            confirm.ready().expect("confirms");
            (session, state)
        }
        // Takes the mount and dies before it serves.
        "die" => {
            drop(take(&socket, LIMIT).expect("takes"));
            println!("\nDIED");
            return;
        }
        other => return println!("no role {other}"),
    };
    serve_until_handed_over(Arc::new(session), &socket, state);
}

fn serve_until_handed_over(session: Arc<Session>, socket: &Path, state: Vec<u8>) {
    let generation: u64 = String::from_utf8(state).expect("text").parse().expect("number");
    let save = Box::new(move || Ok((generation + 1).to_string().into_bytes()));
    let server = HandoverServer::start(socket, session.clone(), save, HandoverLimits::default()).expect("serves");
    let record = String::from_utf8(session.init_record().to_bytes().expect("record")).expect("text");
    println!("\nSERVING {generation} {record}");
    std::io::stdout().flush().expect("stdout");
    let (mut gone, mut ended) = (server.handed_over(), session.ended());
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
    let handed_over = runtime.block_on(async {
        tokio::select! {
            _ = gone.wait_for(|g| *g) => true,
            _ = ended.wait_for(Option::is_some) => false,
        }
    });
    println!("\nEND {handed_over}");
}

/// A daemon process; killed when the test ends.
struct Daemon {
    child: Child,
    lines: mpsc::Receiver<String>,
    _stdin: Option<ChildStdin>,
}

impl Daemon {
    fn start(role: &str, socket: &Path, fd: Option<OwnedFd>, record: &str) -> Daemon {
        let mut child = Command::new(std::env::current_exe().expect("self"))
            .args(["takeover::process_entry", "--exact", "--nocapture"])
            .envs([(ROLE, role), (RECORD, record)])
            .env(SOCKET, socket)
            .stdin(fd.map_or_else(Stdio::piped, Stdio::from))
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
        let stdin = child.stdin.take();
        Daemon { child, lines, _stdin: stdin }
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

    /// Number of the generation and the INIT record.
    fn serving(&self) -> (u64, String) {
        let line = self.expect("SERVING");
        let (generation, record) = line.split_once(' ').expect("two words");
        (generation.parse().expect("number"), record.to_string())
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
    run: tempfile::TempDir,
}

impl Held {
    fn new() -> Held {
        let (dir, run) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
        let (mount, fd) = Mount::new(&mount_config(dir.path()), |_| Ok(())).expect("mounts");
        Held { mount, fd, dir, run }
    }

    fn socket(&self) -> PathBuf {
        self.run.path().join("handover.sock")
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
fn readers_notice_neither_hand_overs_nor_a_kill() {
    let held = Held::new();
    let first = Daemon::start("first", &held.socket(), Some(held.fd()), "");
    let (generation, record) = first.serving();
    assert_eq!(generation, 0);
    let path = held.dir.path().to_path_buf();
    guarded(&held.mount, move || assert_eq!(names(&path).len(), 3));
    let readers = Readers::start(held.dir.path());
    readers.progress();

    let mut former = first;
    for expected in 1..=3 {
        let successor = Daemon::start("take", &held.socket(), None, "");
        let (generation, inherited) = successor.serving();
        assert_eq!((generation, &inherited), (expected, &record), "state and record travel with the mount");
        assert_eq!(former.expect("END"), "true");
        assert!(former.child.wait().expect("waits").success());
        readers.progress();
        former = successor;
    }

    // In flight all the time: each of the eight readers waits for an answer that takes 5 ms.
    for _ in 0..2 {
        former.kill();
        former = Daemon::start("adopt", &held.socket(), Some(held.fd()), &record);
        assert_eq!(former.serving().0, 0);
        readers.progress();
    }
    let (reads, longest) = readers.finish();
    println!("{reads} reads, none failed, the longest took {longest:?}");
    drop(former);
}

#[test]
fn a_successor_that_dies_leaves_the_mount_where_it_was() {
    let held = Held::new();
    let first = Daemon::start("first", &held.socket(), Some(held.fd()), "");
    first.serving();
    let readers = Readers::start(held.dir.path());
    readers.progress();
    for _ in 0..2 {
        let dying = Daemon::start("die", &held.socket(), None, "");
        dying.expect("DIED");
        readers.progress();
    }
    let successor = Daemon::start("take", &held.socket(), None, "");
    assert_eq!(successor.serving().0, 1);
    readers.progress();
    readers.finish();
}

#[test]
fn a_former_process_that_dies_half_way_leaves_the_mount_to_its_successor() {
    let held = Held::new();
    let first = Daemon::start("first", &held.socket(), Some(held.fd()), "");
    first.serving();
    let readers = Readers::start(held.dir.path());
    readers.progress();
    let (fd, record, _, confirm) = take(&held.socket(), LIMIT).expect("takes").into_parts();
    first.kill();
    let fs = Arc::new(slow_fs(Duration::from_millis(5)));
    let session = adopt(fs, fd, &record, &SessionConfig::default()).expect("adopts");
    confirm.ready().expect("the mount is ours");
    readers.progress();
    readers.finish();
    assert_eq!(session.drain(LIMIT).expect("drains").left, 0);
}

#[test]
fn a_successor_that_is_too_slow_is_told() {
    let m = Mounted::new(MemFs::new());
    let run = tempfile::tempdir().expect("dir");
    let socket = run.path().join("s");
    let limits = HandoverLimits { ready: Duration::from_millis(50), ..HandoverLimits::default() };
    let session = m.session.clone().expect("session");
    let server = HandoverServer::start(&socket, session, Box::new(|| Ok(vec![7])), limits).expect("serves");
    let taken = take(&socket, LIMIT).expect("takes");
    assert_eq!(taken.state, [7]);
    // An answer means that the former process has taken the mount back.
    let path = m.path("files/1");
    assert_eq!(m.guarded(move || std::fs::read(path)).expect("reads").len(), 1);
    let (.., confirm) = taken.into_parts();
    assert_eq!(confirm.ready().expect_err("too late").kind(), Kind::Unavailable);
    assert!(!*server.handed_over().borrow());
}

#[test]
fn unanswered_requests_go_to_the_successor_marked() {
    let (seen_tx, seen) = mpsc::channel();
    let seen_tx = parking_lot::Mutex::new(seen_tx);
    let mut fs = MemFs::new();
    // Never answers, but keeps what it should answer.
    fs.on_read = Some(Box::new(move |_, _, _, _, reply| seen_tx.lock().send(reply).expect("kept")));
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

#[test]
fn a_drained_session_resumes() {
    let m = Mounted::new(MemFs::new());
    for name in ["files/1", "files/4095", "files/4096"] {
        let drained = m.session().drain(Duration::from_secs(5)).expect("drains");
        assert_eq!(drained.left, 0);
        let path = m.path(name);
        let reader = std::thread::spawn(move || std::fs::read(path));
        m.session().resume().expect("resumes");
        assert!(reader.join().expect("joins").is_ok(), "{name}");
    }
    assert_eq!(*m.session().ended().borrow(), None, "a drain is no end");
}

#[test]
fn a_successor_of_another_version_is_refused_and_the_mount_goes_on() {
    let m = Mounted::new(MemFs::new());
    let run = tempfile::tempdir().expect("dir");
    let socket = run.path().join("s");
    let session = m.session.clone().expect("session");
    let server =
        HandoverServer::start(&socket, session, Box::new(|| Ok(vec![])), HandoverLimits::default()).expect("serves");
    let mut peer = std::os::unix::net::UnixStream::connect(&socket).expect("connects");
    peer.write_all(b"EFCH\x09\0\0\0").expect("says hello");
    let mut answer = Vec::new();
    std::io::Read::read_to_end(&mut peer, &mut answer).expect("reads");
    assert!(answer.starts_with(b"EFCE") && String::from_utf8_lossy(&answer).contains("version 9"), "{answer:?}");
    let path = m.path("files/1");
    assert_eq!(m.guarded(move || std::fs::read(path)).expect("reads").len(), 1);
    assert!(!*server.handed_over().borrow());
    drop(server);
    assert!(!socket.exists());
}

#[test]
fn a_state_that_cannot_be_saved_calls_the_hand_over_off() {
    let m = Mounted::new(MemFs::new());
    let run = tempfile::tempdir().expect("dir");
    let socket = run.path().join("s");
    let save = Box::new(|| Err(efc_common::Error::new(Kind::Io, "disk on fire")));
    let session = m.session.clone().expect("session");
    let _server = HandoverServer::start(&socket, session, save, HandoverLimits::default()).expect("serves");
    let e = take(&socket, LIMIT).err().expect("refused");
    assert!(e.to_string().contains("disk on fire"), "{e}");
    let path = m.path("files/4096");
    assert_eq!(m.guarded(move || std::fs::read(path)).expect("reads").len(), 4096);
}
