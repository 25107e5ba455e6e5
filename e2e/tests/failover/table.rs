//! The table of `docs/SEMANTICS.md` ("When the processes of a mount go"): every kind of state, and every way in which a process of the mount can go.

use crate::live::{replaced, replaced_after};
use crate::load::PATIENCE;
use crate::read::embedded;
use crate::upgrade::{efc_fuse, upgrade};
use crate::write::{Origin, Rig, rig};
use efc_e2e::{Mount, program, wait_for, within};
use efc_testkit::scratch;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc;
use nix::sys::signal::Signal;
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, ReadDir};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

/// More than the C library takes at once.
const NAMES: usize = 2000;
/// Longer than the time of a session that nobody renews.
const LEASE_OVER: Duration = Duration::from_secs(15);
/// What the log says of it.
const SAID: [&str; 3] = ["the mount process is gone", "does not answer", "the holder of this mount was gone"];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Crash,
    Hang,
    Upgrade,
    Holder,
}

const WAYS: [Way; 4] = [Way::Crash, Way::Hang, Way::Upgrade, Way::Holder];

fn befalls(m: &Mount, way: Way) {
    let pid = m.pid();
    match way {
        Way::Crash => replaced(m),
        Way::Hang => replaced_after(m, Signal::SIGSTOP),
        Way::Upgrade => upgrade(m, &program("efc-fuse").expect("program")),
        Way::Holder => {
            m.kill_holder().expect("another holder");
            // That must have been told everything before the next one goes.
            std::thread::sleep(Duration::from_millis(500));
        }
    }
    assert_eq!(m.pid() == pid, way == Way::Holder, "{way:?}");
}

/// Pages of a file that no want of memory makes the kernel drop.
struct Pinned(usize, usize);

impl Pinned {
    fn new(file: &File, len: usize) -> Pinned {
        let (how, fd) = (libc::PROT_READ, file.as_raw_fd());
        // SAFETY: a new mapping, into which nothing points; it is taken away when this is dropped.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, how, libc::MAP_SHARED, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        // SAFETY: as above.
        assert_eq!(unsafe { libc::mlock(at, len) }, 0);
        Pinned(at as usize, len)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { libc::munmap(self.0 as *mut libc::c_void, self.1) };
    }
}

/// READ requests that the process has had.
fn reads(m: &Mount) -> u64 {
    m.stats().expect("stats")["ops"]["read"]["requests"].as_u64().unwrap_or(0)
}

/// What a program has of a mount that can be written to.
struct Open {
    /// Locked, changed, not closed.
    held: File,
    number: u64,
    removed: File,
    page: File,
    listing: ReadDir,
    listed: BTreeSet<String>,
}

fn name(entry: std::io::Result<fs::DirEntry>) -> String {
    entry.expect("the open directory goes on").file_name().into_string().expect("utf8")
}

/// Names in the directory `list`, and the file `page`.
fn fill(origin: &Origin) {
    let names = (0..NAMES).map(|i| format!("list/a name that is not short {i}")).chain(["page".into()]);
    match origin {
        Origin::Dir(dir) | Origin::Nfs(dir, _) => {
            fs::create_dir(dir.path().join("list")).expect("mkdir");
            names.for_each(|n| fs::write(dir.path().join(n), "page").expect("write"));
        }
        Origin::Bucket(server) => names.for_each(|n| server.put("b", n, "page")),
    }
}

impl Open {
    fn new(dir: &Path) -> Open {
        let create = |name| {
            let mut how = OpenOptions::new();
            how.read(true).write(true).create(true).truncate(true).open(dir.join(name)).expect("create")
        };
        let held = create("held");
        held.lock().expect("lock");
        held.write_all_at(b"before", 0).expect("write");
        let removed = create("removed");
        removed.write_all_at(b"removed", 0).expect("write");
        fs::remove_file(dir.join("removed")).expect("unlink");
        let page = File::open(dir.join("page")).expect("open");
        let mut listing = fs::read_dir(dir.join("list")).expect("list");
        let listed = listing.by_ref().take(10).map(name).collect();
        let number = held.metadata().expect("stat").ino();
        let open = Open { held, number, removed, page, listing, listed };
        open.look();
        open
    }

    /// The file whose pages the kernel may have.
    fn look(&self) {
        let mut got = [0; 4];
        self.page.read_exact_at(&mut got, 0).expect("read");
        assert_eq!(&got, b"page");
    }

    /// All of it goes on; `len`: bytes that were written by now.
    fn goes_on(&mut self, len: usize) {
        assert_eq!(self.held.metadata().expect("stat").ino(), self.number);
        let mut got = vec![0; len];
        self.held.read_exact_at(&mut got, 0).expect("read");
        assert!(got.starts_with(b"before") && got[6..].iter().all(|b| *b == b'+'), "{got:?}");
        self.held.write_all_at(b"+", len as u64).expect("write");
        let mut got = [0; 7];
        self.removed.read_exact_at(&mut got, 0).expect("read");
        assert_eq!(&got, b"removed");
        self.listed.extend(self.listing.by_ref().take(300).map(name));
    }
}

/// Is the lock of `held` another mount's?
fn is_locked(other: &Path) -> bool {
    let file = OpenOptions::new().write(true).open(other.join("held")).expect("open");
    file.try_lock().is_err()
}

/// What the store has of `held`.
fn stored(origin: &Origin) -> Option<Vec<u8>> {
    match origin {
        Origin::Dir(dir) | Origin::Nfs(dir, _) => fs::read(dir.path().join("held")).ok(),
        Origin::Bucket(server) => server.get("b", "held").map(|b| b.to_vec()),
    }
}

fn opened(origin: &str) -> (Rig, Open) {
    let r = rig(origin, &[]);
    fill(&r.origin);
    let at = r.mount.path.clone();
    let open = within(PATIENCE, move || Open::new(&at));
    (r, open)
}

/// Mounts that can be written to, one way after the other.
fn written(origin: &str) {
    let (r, mut open) = opened(origin);
    let is_bucket = matches!(r.origin, Origin::Bucket(_));
    let mut len = "before".len();
    for way in WAYS {
        // What others wrote has taken its pages away.
        let (pinned, kept) = within(PATIENCE, move || (Pinned::new(&open.page, 4096), open));
        open = kept;
        befalls(&r.mount, way);
        // Nothing was closed or synced: a NAS has it all the same.
        if !is_bucket {
            assert_eq!(stored(&r.origin).map(|b| b.len()), Some(len), "{way:?}");
        }
        open = within(PATIENCE, move || {
            open.goes_on(len);
            open
        });
        len += 1;
        // What was written needed a lease; pages of the time before are not believed since.
        let before = reads(&r.mount);
        open = within(PATIENCE, move || {
            open.look();
            drop(pinned);
            open
        });
        assert_eq!(reads(&r.mount) == before, way == Way::Holder, "{way:?}");
        let other = r.other.path.clone();
        let took = within(PATIENCE, move || {
            assert!(is_locked(&other), "{way:?}");
            let begun = Instant::now();
            fs::write(other.join(format!("{way:?}")), "leases pass on").expect("write");
            begun.elapsed()
        });
        assert!(took < LEASE_OVER, "{way:?}: {took:?}");
    }
    within(PATIENCE, move || {
        open.listed.extend(open.listing.by_ref().map(name));
        assert_eq!(open.listed.len(), NAMES);
        open.held.sync_all().expect("sync");
        drop(open);
    });
    wait_for("the end of what was removed", PATIENCE, || Ok(r.origin.own().is_empty())).expect("gone");
    assert_eq!(stored(&r.origin).map(|b| b.len()), Some(len));
    r.end(&SAID);
}

#[test]
fn what_is_open_on_a_nas_goes_on() {
    written("nfs");
}

#[test]
fn what_is_open_on_a_bucket_goes_on() {
    written("s3");
}

/// Holder and mount process are gone, and nobody kept what they had.
fn lost(origin: &str) {
    let (mut r, open) = opened(origin);
    r.mount.kill();
    let (at, other) = (r.mount.path.clone(), r.other.path.clone());
    within(PATIENCE, move || {
        // A call that is under way when the connection ends is told that it was given up.
        let said = [Some(libc::ENOTCONN), Some(libc::ECONNABORTED)];
        let gone = |e: std::io::Error| assert!(said.contains(&e.raw_os_error()), "{e}");
        gone(File::open(at.join("page")).expect_err("gone"));
        gone(open.held.write_all_at(b"+", 6).expect_err("gone"));
        gone(open.removed.write_all_at(b"+", 7).expect_err("gone"));
        // The C library had read some of it.
        assert!(open.listing.map(|e| e.map(drop)).any(|e| e.is_err()));
        let begun = Instant::now();
        fs::write(other.join("new"), "leases pass on").expect("write");
        let mut took = begun.elapsed();
        while other.join("held").exists() && is_locked(&other) && took < LEASE_OVER {
            std::thread::sleep(Duration::from_millis(100));
            took = begun.elapsed();
        }
        assert!(took < LEASE_OVER, "{took:?}");
    });
    let wanted = (!matches!(r.origin, Origin::Bucket(_))).then(|| b"before".to_vec());
    assert_eq!(stored(&r.origin).filter(|b| !b.is_empty()), wanted);
    let out = efc_fuse(&r.mount, "umount", &["--force"]);
    assert!(out.status.success(), "{out:?}");
    r.other.finish(&[]).expect("log");
}

#[test]
fn of_both_processes_a_nas_has_what_was_written() {
    lost("nfs");
}

#[test]
fn of_both_processes_a_bucket_has_what_was_synced() {
    lost("s3");
}

/// A read-only mount with a cluster of its own, one way after the other.
#[test]
fn what_is_remembered_of_what_is_read_stays() {
    const LEN: usize = 1 << 20;
    let dir = scratch("table").expect("scratch");
    fs::write(dir.path().join("f"), vec![7; LEN]).expect("write");
    let m = Mount::start(&format!("file://{}", dir.path().display()), &["ro", "memory=512MiB"], &[]).expect("mount");
    let open = || File::open(m.path.join("f")).expect("open");
    let file = open();
    file.lock().expect("lock");
    let read = |drop_pages: bool| {
        let file = file.try_clone().expect("clone");
        within(PATIENCE, move || {
            if drop_pages {
                posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).expect("fadvise");
            }
            let mut got = vec![0; LEN];
            file.read_exact_at(&mut got, 0).expect("read");
            assert!(got.iter().all(|b| *b == 7));
        });
    };
    let number = |pointer: &str| m.stats().expect("stats").pointer(pointer).and_then(|v| v.as_u64()).expect("number");
    read(false);
    let (cluster, fetched) = (embedded(&m), number("/workers/0/origin_bytes"));
    assert!(cluster.iter().all(Option::is_some));
    for (i, way) in (1..).zip(WAYS) {
        let out = efc_fuse(&m, "set", &[&format!("memory={}MiB", 512 + 64 * i)]);
        assert!(out.status.success(), "{out:?}");
        read(true);
        let page = file.try_clone().expect("clone");
        let pinned = within(PATIENCE, move || Pinned::new(&page, LEN));
        let (before, budget) = (reads(&m), number("/budget/1"));
        assert!(before > 0);
        befalls(&m, way);
        read(false);
        drop(pinned);
        // The kernel has its pages, so nothing is asked for; the counters of a process begin at 0.
        assert_eq!(reads(&m), if way == Way::Holder { before } else { 0 }, "{way:?}");
        assert_eq!(number("/budget/1"), budget, "{way:?}: what was set goes on");
        assert!(open().try_lock().is_err(), "{way:?}: the lock is the kernel's");
        read(true);
        assert_eq!((embedded(&m), number("/workers/0/origin_bytes")), (cluster, fetched), "{way:?}");
    }
    drop(file);
    m.finish(&SAID).expect("log");
}
