//! Read-write mounts: what was asked for is done once, though the process that was doing it dies.

use crate::load::{Load, PATIENCE, Step};
use crate::upgrade::history;
use efc_e2e::{Cluster, Mount, WorkerSpec, within};
use efc_testkit::oss::{OssOptions, OssServer};
use efc_testkit::{Ganesha, scratch};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Length of one record of a log, bytes.
const RECORD: usize = 64;

/// Of the bucket's server.
pub(super) const KEYS: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", "efckey"), ("AWS_SECRET_ACCESS_KEY", "efcsecret")];

/// What is mounted.
pub(super) enum Origin {
    Dir(tempfile::TempDir),
    Nfs(tempfile::TempDir, Ganesha),
    Bucket(Box<OssServer>),
}

pub(super) struct Rig {
    pub(super) mount: Mount,
    pub(super) other: Mount,
    pub(super) cluster: Cluster,
    pub(super) origin: Origin,
}

impl Origin {
    fn start(origin: &str) -> Origin {
        let dir = || scratch("failover").expect("scratch");
        match origin {
            "file" => Origin::Dir(dir()),
            "nfs" => {
                let dir = dir();
                let server = Ganesha::start(dir.path()).expect("ganesha");
                Origin::Nfs(dir, server)
            }
            _ => {
                let server = OssServer::start_with(OssOptions::s3()).expect("server");
                server.create_bucket("b");
                Origin::Bucket(Box::new(server))
            }
        }
    }

    pub(super) fn url(&self) -> String {
        match self {
            Origin::Dir(dir) => format!("file://{}", dir.path().display()),
            Origin::Nfs(_, server) => server.url(),
            Origin::Bucket(_) => "s3://b".into(),
        }
    }

    pub(super) fn options(&self) -> Vec<String> {
        match self {
            Origin::Dir(_) => vec!["umask=000".into()],
            Origin::Nfs(_, server) => vec![format!("mount_port={}", server.mount_port())],
            Origin::Bucket(server) => {
                vec![format!("endpoint={}", server.endpoint()), "region=us-east-1".into(), "umask=000".into()]
            }
        }
    }

    fn has_links(&self) -> bool {
        !matches!(self, Origin::Bucket(_))
    }

    /// What EFC has put there for itself.
    pub(super) fn own(&self) -> Vec<String> {
        let names: Vec<String> = match self {
            Origin::Dir(dir) | Origin::Nfs(dir, _) => {
                let names = fs::read_dir(dir.path()).expect("origin").map(|e| e.expect("entry").file_name());
                names.map(|n| n.to_string_lossy().into_owned()).collect()
            }
            Origin::Bucket(server) => {
                server.keys("b").iter().map(|k| String::from_utf8_lossy(k).into_owned()).collect()
            }
        };
        // What a process left when it died is thrown away after a minute.
        let swept = |n: &String| n.starts_with(".efc/uploads-") || n.starts_with(".efc/probe-");
        names.into_iter().filter(|n| n.contains(".efc") && !swept(n)).collect()
    }
}

pub(super) fn rig(origin: &str, more: &[&str]) -> Rig {
    let origin = Origin::start(origin);
    let worker = WorkerSpec { memory: "64MiB".into(), ..WorkerSpec::default() };
    let cluster = Cluster::start(1, &[worker]).expect("cluster");
    let mut options = vec!["rw".to_string(), cluster.option()];
    options.extend(origin.options());
    options.extend(more.iter().map(ToString::to_string));
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let start = || Mount::start(&origin.url(), &options, &KEYS).expect("mount");
    let (mount, other) = (start(), start());
    Rig { mount, other, cluster, origin }
}

/// Appends numbered records; what was appended before is there, once and whole.
fn appends(path: PathBuf) -> Step {
    let mut file = OpenOptions::new().append(true).create(true).open(path.join("log")).expect("create");
    let mut n = 0u64;
    Box::new(move || {
        file.write_all(format!("{n:0w$}\n", w = RECORD - 1).as_bytes()).expect("append");
        n += 1;
        if n.is_multiple_of(50) {
            assert_eq!(fs::metadata(path.join("log")).expect("stat").len(), n * RECORD as u64);
        }
    })
}

fn check_log(path: &Path) {
    let log = fs::read(path.join("log")).expect("read");
    for (n, record) in log.chunks(RECORD).enumerate() {
        assert_eq!(std::str::from_utf8(record).expect("text"), format!("{n:0w$}\n", w = RECORD - 1), "record {n}");
    }
}

/// Makes, moves and removes names; each call must do just what it says.
pub(super) fn names(path: PathBuf, has_links: bool) -> Step {
    let mut n = 0;
    Box::new(move || {
        n += 1;
        let dir = path.join(format!("dir{n}"));
        let at = |name: &str| dir.join(name);
        fs::create_dir(&dir).expect("mkdir");
        drop(File::create_new(at("a")).expect("create"));
        fs::write(at("b"), "b").expect("write");
        if has_links {
            fs::hard_link(at("a"), at("c")).expect("link");
        }
        symlink("a", at("s")).expect("symlink");
        fs::rename(at("b"), at("a")).expect("rename");
        assert_eq!(fs::metadata(at("b")).err().map(|e| e.kind()), Some(ErrorKind::NotFound));
        assert_eq!(fs::read(at("s")).expect("read"), b"b");
        let moved = path.join(format!("moved{n}"));
        fs::rename(&dir, &moved).expect("rename");
        let names = if has_links { &["a", "c", "s"][..] } else { &["a", "s"] };
        let mut seen: Vec<_> = fs::read_dir(&moved).expect("list").map(|e| e.expect("entry").file_name()).collect();
        seen.sort();
        assert_eq!(seen, names);
        names.iter().for_each(|name| fs::remove_file(moved.join(name)).expect("unlink"));
        fs::remove_dir(&moved).expect("rmdir");
    })
}

/// Changes an open file here and there; it is what a vector is, and at the end also under its name.
pub(super) fn changes(path: PathBuf) -> Step {
    const LEN: usize = 200_000;
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path.join("model"));
    let file = file.expect("create");
    let mut model = vec![0u8; LEN];
    file.set_len(LEN as u64).expect("truncate");
    let mut seed = 1u64;
    Box::new(move || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let (at, n) = ((seed >> 20) as usize % (LEN - 9000), (seed >> 50) as usize % 9000 + 1);
        let bytes = vec![(seed >> 30) as u8; n];
        file.write_all_at(&bytes, at as u64).expect("write");
        model[at..at + n].copy_from_slice(&bytes);
        if seed.is_multiple_of(7) {
            file.sync_all().expect("sync");
        }
        let at = (seed >> 10) as usize % (LEN - 30_000);
        let mut got = vec![0; 30_000];
        file.read_exact_at(&mut got, at as u64).expect("read");
        assert!(got == model[at..at + 30_000], "the file is not what was written");
    })
}

/// Files that are removed, or replaced, while they are open.
fn unnamed(path: PathBuf) -> Step {
    let mut n = 0;
    Box::new(move || {
        n += 1;
        let at = path.join("unnamed");
        let open = || OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&at).expect("create");
        let file = open();
        file.write_all_at(b"first", 0).expect("write");
        if n % 2 == 0 {
            fs::remove_file(&at).expect("unlink");
        } else {
            fs::write(path.join("next"), "next").expect("write");
            fs::rename(path.join("next"), &at).expect("rename");
        }
        for i in 0..20 {
            file.write_all_at(b"!", 5 + i).expect("write");
        }
        let mut got = vec![0; 25];
        file.read_exact_at(&mut got, 0).expect("read");
        assert_eq!(got, b"first!!!!!!!!!!!!!!!!!!!!");
        assert_eq!(file.metadata().expect("stat").nlink(), 0);
        assert_eq!(at.exists(), n % 2 != 0);
    })
}

/// Trees that are filled, and removed as they are listed.
pub(super) fn trees(path: PathBuf) -> Step {
    Box::new(move || {
        let at = path.join("tree");
        fs::create_dir(&at).expect("mkdir");
        for i in 0..150 {
            fs::write(at.join(format!("a file with a long name, so that pages are short {i}")), [i]).expect("write");
        }
        fs::remove_dir_all(&at).expect("rm -r");
    })
}

/// What one file is locked by is locked for the other mount, all the time.
pub(super) fn locked(mine: PathBuf, others: PathBuf) -> Step {
    let file = File::create(mine.join("locked")).expect("create");
    let held = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| e).expect("lock");
    let theirs = OpenOptions::new().write(true).open(others.join("locked")).expect("open");
    let mut theirs = Some(theirs);
    Box::new(move || {
        let _keep = &held;
        let Some(file) = theirs.take() else { return };
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(_) => panic!("a lock that is held was given to another mount"),
            Err((file, e)) => {
                assert_eq!(e, nix::errno::Errno::EWOULDBLOCK);
                theirs = Some(file);
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    })
}

/// The acceptance's 200 with `EFC_E2E_LONG=1`.
fn kills() -> u64 {
    if std::env::var_os("EFC_E2E_LONG").is_some() { 200 } else { 12 }
}

/// All kinds of writers.
pub(super) fn writers(r: &Rig) -> Load {
    let (path, others, has_links) = (r.mount.path.clone(), r.other.path.clone(), r.has_links());
    Load::start(6, move |t| match t {
        0 => appends(path.clone()),
        1 => names(path.clone(), has_links),
        2 => changes(path.clone()),
        3 => unnamed(path.clone()),
        4 => trees(path.clone()),
        _ => locked(path.clone(), others.clone()),
    })
}

impl Rig {
    /// The writers have ended: what they left is right, and nothing else is there.
    pub(super) fn finish(self, expected: &[&str]) {
        for path in [self.mount.path.clone(), self.other.path.clone()] {
            within(PATIENCE, move || check_log(&path));
        }
        self.end(expected);
    }

    /// Can files have several names?
    pub(super) fn has_links(&self) -> bool {
        self.origin.has_links()
    }

    /// Nothing of EFC's own is left at the origin.
    pub(super) fn end(self, expected: &[&str]) {
        assert_eq!(self.origin.own(), [""; 0]);
        self.mount.finish(expected).expect("log");
        self.other.finish(&[]).expect("log");
        drop(self.cluster);
    }
}

fn storm(origin: &str, more: &[&str], kills: u64) {
    let r = rig(origin, more);
    let load = writers(&r);
    for n in 0..kills {
        load.more(30 + (n * 37) % 50);
        if n % 10 == 5 {
            r.mount.kill_holder().expect("another holder");
            load.more(20);
        }
        load.kill(&r.mount);
        if n % 4 == 3 {
            // Ten that die at once would be one too many.
            std::thread::sleep(Duration::from_millis(2500));
        }
    }
    println!("{origin}: {kills} kills, longest step {:?}", load.finish());
    r.finish(&["the mount process is gone", "the holder of this mount was gone"]);
}

#[test]
fn writers_of_a_directory_see_no_error_and_nothing_is_done_twice() {
    storm("file", &[], kills());
}

#[test]
fn writers_of_an_nfs_export_see_no_error_and_nothing_is_done_twice() {
    storm("nfs", &[], kills());
}

#[test]
fn writers_of_a_bucket_see_no_error_and_nothing_is_done_twice() {
    storm("s3", &[], kills());
}

#[test]
fn writers_of_a_bucket_behind_whom_it_is_committed_see_no_error() {
    storm("s3", &["writeback"], kills());
}

/// A file that is open, with pages that were changed through a mapping and not written.
struct Mapped {
    file: File,
    at: usize,
}

impl Mapped {
    const LEN: usize = 1 << 20;
    const PAGES: usize = 40;

    fn new(path: &Path) -> Mapped {
        fs::write(path, vec![1; Mapped::LEN]).expect("write");
        let file = OpenOptions::new().read(true).write(true).open(path).expect("open");
        let (rw, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_raw_fd());
        // SAFETY: a new mapping; only bytes that stay in the file are touched, and it is unmapped at the end.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), Mapped::LEN, rw, libc::MAP_SHARED, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        // SAFETY: as above.
        (0..Mapped::PAGES).for_each(|i| unsafe { at.cast::<u8>().add(i * 4096 + 5).write_volatile(2) });
        Mapped { file, at: at as usize }
    }

    fn close(self) {
        // SAFETY: it was mapped above, and nothing points into it.
        assert_eq!(unsafe { libc::munmap(self.at as *mut libc::c_void, Mapped::LEN) }, 0);
    }

    /// As it was changed, and of this length?
    fn check(path: &Path, len: usize) {
        let got = fs::read(path).expect("read");
        let mut model = vec![1; len];
        (0..Mapped::PAGES).for_each(|i| model[i * 4096 + 5] = 2);
        assert!(got == model, "{}: {} bytes", path.display(), got.len());
    }
}

/// Before it drops pages the kernel writes those that were changed, one by one, and of a file that is being shortened it writes none: whoever waits for the one waits for the other.
fn mapped(origin: &str) {
    let r = rig(origin, &[]);
    let (path, others) = (r.mount.path.clone(), r.other.path.clone());
    let (kept, shortened) =
        within(PATIENCE, move || (Mapped::new(&path.join("kept")), Mapped::new(&path.join("short"))));
    kill(Pid::from_raw(r.mount.pid() as i32), Signal::SIGSTOP).expect("stop");
    let shortened = std::thread::spawn(move || {
        shortened.file.set_len(Mapped::LEN as u64 / 2).expect("truncate");
        shortened
    });
    std::thread::sleep(Duration::from_millis(300));
    let begun = Instant::now();
    r.mount.kill_server();
    within(PATIENCE, move || {
        let shortened = shortened.join().expect("no error");
        assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
        kept.close();
        shortened.close();
        Mapped::check(&others.join("kept"), Mapped::LEN);
        Mapped::check(&others.join("short"), Mapped::LEN / 2);
    });
    r.end(&["the mount process is gone"]);
}

#[test]
fn mapped_files_hold_up_no_successor() {
    ["file", "s3"].into_iter().for_each(mapped);
}

#[test]
fn a_mount_process_that_hangs_is_replaced_and_its_locks_are_kept() {
    let r = rig("file", &[]);
    let load = writers(&r);
    load.more(50);
    let begun = load.hang(&r.mount, 50);
    println!("replaced after {:?}, longest step {:?}", begun.elapsed(), load.finish());
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    // What it was doing can be looked at.
    let event = history(&r.mount).pop().expect("an event");
    let text = event["text"].as_str().expect("text");
    let (_, saved) = text.split_once("its stacks are in ").expect("where");
    assert!(event["what"] == "hang" && fs::read_to_string(saved).expect("saved").contains("signal_stop"), "{event}");
    fs::remove_file(saved).expect("remove");
    r.finish(&["the mount process is gone", "does not answer"]);
}
