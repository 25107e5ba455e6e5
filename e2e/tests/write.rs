//! What applications do to a read-write mount, and what the origin has afterwards.

use efc_e2e::{Mount, wait_for, within};
use efc_testkit::oss::{OssOptions, OssServer};
use efc_testkit::{Ganesha, scratch};
use std::fs::{self, File, FileTimes, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, UNIX_EPOCH};

const PATIENCE: Duration = Duration::from_secs(120);

/// What stands behind a mount: a directory, or a bucket.
enum Behind {
    Dir(PathBuf),
    Store(Box<OssServer>),
}

impl Behind {
    fn get(&self, path: &str) -> Option<Vec<u8>> {
        match self {
            Behind::Dir(dir) => fs::read(dir.join(path)).ok(),
            Behind::Store(server) => server.get("b", path).map(|b| b.to_vec()),
        }
    }

    fn exists(&self, path: &str) -> bool {
        match self {
            Behind::Dir(dir) => dir.join(path).exists(),
            Behind::Store(server) => server.keys("b").iter().any(|k| k == path.as_bytes()),
        }
    }

    /// Names at the top.
    fn count(&self) -> usize {
        match self {
            Behind::Dir(dir) => fs::read_dir(dir).expect("list").count(),
            Behind::Store(server) => server.keys("b").iter().filter(|k| !k.starts_with(b".efc/")).count(),
        }
    }

    fn store(&self) -> &OssServer {
        match self {
            Behind::Store(server) => server,
            Behind::Dir(_) => panic!("not a bucket"),
        }
    }
}

fn server(origin: &str) -> OssServer {
    let options = if origin == "s3" { OssOptions::s3() } else { OssOptions::default() };
    let server = OssServer::start_with(options).expect("server");
    server.create_bucket("b");
    server
}

const KEYS: [(&str, &str); 4] = [
    ("AWS_ACCESS_KEY_ID", "efckey"),
    ("AWS_SECRET_ACCESS_KEY", "efcsecret"),
    ("OSS_ACCESS_KEY_ID", "efckey"),
    ("OSS_ACCESS_KEY_SECRET", "efcsecret"),
];

fn mount_bucket(origin: &str, server: &OssServer, more: &[&str]) -> Mount {
    let endpoint = format!("endpoint={}", server.endpoint());
    let region = if origin == "s3" { "region=us-east-1" } else { "region=cn-hangzhou" };
    let mut options = vec!["rw", "cache_memory=64MiB", "memory=256MiB", "umask=000", &endpoint, region];
    options.extend(more);
    Mount::start(&format!("{origin}://b"), &options, &KEYS).expect("mount")
}

/// Runs `work` in the mount of an origin; it gets the mount point and what is behind.
fn over(origin: &str, work: fn(&Path, &Behind)) {
    if matches!(origin, "s3" | "oss") {
        let behind = Behind::Store(Box::new(server(origin)));
        let m = mount_bucket(origin, behind.store(), &[]);
        let path = m.path.clone();
        // The store outlives the mount.
        let _behind = within(PATIENCE, move || {
            work(&path, &behind);
            behind
        });
        return m.finish(&[]).expect("log");
    }
    let dir = scratch("write").expect("scratch");
    let server = (origin == "nfs").then(|| Ganesha::start(dir.path()).expect("ganesha"));
    let (url, port) = match &server {
        Some(s) => (s.url(), format!("mount_port={}", s.mount_port())),
        None => (format!("file://{}", dir.path().display()), String::new()),
    };
    let mut options = vec!["rw", "cache_memory=64MiB"];
    if server.is_some() {
        options.push(&port);
    }
    let m = Mount::start(&url, &options, &[]).expect("mount");
    let (path, behind) = (m.path.clone(), Behind::Dir(dir.path().to_path_buf()));
    within(PATIENCE, move || work(&path, &behind));
    m.finish(&[]).expect("log");
}

fn bytes(n: usize, seed: u8) -> Vec<u8> {
    (0..n).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

fn names_and_attributes(m: &Path, behind: &Behind) {
    let d = m.join("d");
    fs::create_dir(&d).expect("mkdir");
    fs::write(d.join("a"), b"hello").expect("write");
    assert_eq!(behind.get("d/a").expect("behind"), b"hello");
    assert_eq!(fs::read(d.join("a")).expect("read"), b"hello");
    fs::rename(d.join("a"), m.join("b")).expect("rename");
    assert!(!d.join("a").exists() && behind.exists("b"));
    fs::hard_link(m.join("b"), d.join("c")).expect("link");
    let (b, c) = (fs::metadata(m.join("b")).expect("b"), fs::metadata(d.join("c")).expect("c"));
    assert_eq!((b.ino(), b.nlink()), (c.ino(), 2));
    fs::remove_file(m.join("b")).expect("unlink");
    assert_eq!(fs::read(d.join("c")).expect("the other name"), b"hello");
    assert_eq!(fs::metadata(d.join("c")).expect("c").nlink(), 1);
    symlink("d/c", m.join("s")).expect("symlink");
    assert_eq!(fs::read(m.join("s")).expect("through the link"), b"hello");
    fs::set_permissions(d.join("c"), fs::Permissions::from_mode(0o640)).expect("chmod");
    std::os::unix::fs::chown(d.join("c"), Some(1234), Some(4321)).expect("chown");
    let Behind::Dir(dir) = behind else { panic!("not a directory") };
    let meta = fs::metadata(dir.join("d/c")).expect("behind");
    assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o640, 1234, 4321));
    assert_eq!(fs::metadata(d.join("c")).expect("c").mode() & 0o7777, 0o640);
    assert_eq!(fs::remove_dir(&d).expect_err("not empty").raw_os_error(), Some(39));
    // A directory moves with everything the kernel knows below it.
    fs::create_dir(d.join("e")).expect("mkdir");
    fs::write(d.join("e/f"), b"deep").expect("write");
    fs::rename(&d, m.join("g")).expect("rename a directory");
    assert_eq!(fs::read(m.join("g/e/f")).expect("moved along"), b"deep");
    fs::write(m.join("g/e/new"), b"x").expect("create below");
    assert!(behind.exists("g/e/new"));
    let mut names: Vec<_> = fs::read_dir(m.join("g/e")).expect("list").map(|e| e.expect("entry").file_name()).collect();
    names.sort();
    assert_eq!(names, ["f", "new"]);
    fs::remove_dir_all(m.join("g")).expect("rm -r");
    assert!(!behind.exists("g"));
}

fn content(m: &Path, behind: &Behind) {
    let path = m.join("f");
    let mut model = bytes(3 << 20, 1);
    fs::write(&path, &model).expect("write");
    let f = OpenOptions::new().read(true).write(true).open(&path).expect("open");
    for (offset, len) in [(0, 10), (4095, 2), (1 << 20, 300_000), ((3 << 20) - 5, 50), (4 << 20, 7)] {
        let new = bytes(len, offset as u8);
        f.write_all_at(&new, offset as u64).expect("write");
        model.resize(model.len().max(offset + len), 0);
        model[offset..offset + len].copy_from_slice(&new);
    }
    assert!(fs::read(&path).expect("read") == model, "read while it is open for writing");
    f.sync_all().expect("fsync");
    f.set_len(1_000_000).expect("truncate");
    model.truncate(1_000_000);
    f.set_len(1_500_000).expect("extend");
    model.resize(1_500_000, 0);
    drop(f);
    assert!(fs::read(&path).expect("read") == model, "after the last close");
    assert!(behind.get("f").expect("behind") == model, "at the origin");
    // Truncating at open, and replacing by rename.
    fs::write(&path, b"short").expect("rewrite");
    assert_eq!(fs::read(&path).expect("read"), b"short");
    fs::write(m.join("new"), b"new content").expect("write");
    fs::rename(m.join("new"), &path).expect("replace");
    assert_eq!(fs::read(&path).expect("read"), b"new content");
    // Appending goes to the end, wherever the file position is.
    let mut log = OpenOptions::new().append(true).open(&path).expect("open");
    for i in 0..100 {
        log.seek(SeekFrom::Start(0)).expect("seek");
        writeln!(log, "{i}").expect("append");
    }
    let text = fs::read_to_string(&path).expect("read");
    assert!(text.starts_with("new content0\n1\n") && text.ends_with("99\n"), "{text}");
}

fn removed_while_open(m: &Path, behind: &Behind) {
    for replace in [false, true] {
        let path = m.join("open");
        fs::write(&path, b"before").expect("write");
        let mut f = OpenOptions::new().read(true).write(true).open(&path).expect("open");
        if replace {
            fs::write(m.join("other"), b"other").expect("write");
            fs::rename(m.join("other"), &path).expect("rename over");
        } else {
            fs::remove_file(&path).expect("unlink");
            assert!(!path.exists());
        }
        f.seek(SeekFrom::End(0)).expect("seek");
        f.write_all(b" and after").expect("write without a name");
        let mut text = String::new();
        f.rewind().expect("rewind");
        f.read_to_string(&mut text).expect("read without a name");
        assert_eq!(text, "before and after");
        assert_eq!(f.metadata().expect("fstat").len(), 16);
        let left = |dir: &Path| fs::read_dir(dir).expect("list").count();
        assert_eq!(left(m), usize::from(replace), "nothing hidden is listed");
        drop(f);
        if replace {
            assert_eq!(fs::read(&path).expect("read"), b"other");
            fs::remove_file(&path).expect("unlink");
        }
        // RELEASE comes after close(2) has returned.
        let gone = (0..200).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            behind.count() == 0
        });
        assert!(gone, "what was removed while open is still at the origin");
    }
}

/// One makes files and closes them, another removes them at that moment: what was made was removed once, and nobody was told otherwise.
fn removed_while_closed(m: &Path, behind: &Behind) {
    const FILES: usize = 1000;
    let path = m.join("closing");
    let made = std::sync::atomic::AtomicUsize::new(0);
    let removed = std::thread::scope(|s| {
        let maker = s.spawn(|| {
            while made.load(Relaxed) < FILES {
                match File::create_new(&path) {
                    Ok(_) => made.fetch_add(1, Relaxed),
                    Err(e) if e.kind() == ErrorKind::AlreadyExists => continue,
                    Err(e) => panic!("create: {e}"),
                };
            }
        });
        let mut removed = 0;
        loop {
            let last = maker.is_finished();
            match fs::remove_file(&path) {
                Ok(()) => removed += 1,
                Err(e) if e.kind() == ErrorKind::NotFound && last => break removed,
                Err(e) => assert_eq!(e.kind(), ErrorKind::NotFound, "unlink"),
            }
        }
    });
    assert_eq!(removed, made.load(Relaxed));
    wait_for("empty directory at the origin", PATIENCE, || Ok(behind.count() == 0)).expect("nothing is left");
}

/// More directories than masters keep leases of subtrees, one after the other.
fn directories_moved(m: &Path, behind: &Behind) {
    for i in 0..400 {
        let (from, to) = (m.join(format!("d{i}")), m.join(format!("e{i}")));
        fs::create_dir(&from).expect("mkdir");
        fs::rename(&from, &to).expect("rename");
        fs::remove_dir(&to).expect("rmdir");
    }
    assert_eq!(behind.count(), 0);
}

fn mapped(m: &Path, behind: &Behind) {
    let path = m.join("map");
    fs::write(&path, bytes(100_000, 3)).expect("write");
    let f = OpenOptions::new().read(true).write(true).open(&path).expect("open");
    // SAFETY: the mapping is of a file this process alone changes, and is unmapped below.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            100_000,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            std::os::fd::AsRawFd::as_raw_fd(&f),
            0,
        )
    };
    assert_ne!(at, libc::MAP_FAILED);
    // SAFETY: inside the mapping.
    unsafe {
        std::ptr::write_bytes(at.cast::<u8>().add(5000), 0xee, 60_000);
        assert_eq!(libc::msync(at, 100_000, libc::MS_SYNC), 0);
        assert_eq!(libc::munmap(at, 100_000), 0);
    }
    drop(f);
    let mut model = bytes(100_000, 3);
    model[5000..65_000].fill(0xee);
    assert!(behind.get("map").expect("behind") == model);
}

fn odd_flags(m: &Path, behind: &Behind) {
    let path: PathBuf = m.join("x");
    let exclusive = || OpenOptions::new().write(true).create_new(true).mode(0o400).open(&path);
    // A mode that forbids its own creator to write does not forbid it through this descriptor.
    exclusive().expect("create").write_all(b"1").expect("write");
    assert_eq!(exclusive().expect_err("exists").raw_os_error(), Some(libc::EEXIST));
    let read_only = File::open(&path).expect("open");
    assert_eq!(read_only.write_at(b"2", 0).expect_err("read-only handle").raw_os_error(), Some(libc::EBADF));
    let longest = if matches!(behind, Behind::Store(_)) { 1024 } else { 255 };
    let name = m.join("n".repeat(longest + 1));
    assert_eq!(File::create(name).expect_err("too long").raw_os_error(), Some(libc::ENAMETOOLONG));
}

/// The names and attributes that an object store can hold.
fn object_names(m: &Path, behind: &Behind) {
    let d = m.join("d");
    fs::create_dir(&d).expect("mkdir");
    assert!(behind.exists("d/"));
    fs::write(d.join("a"), b"hello").expect("write");
    assert_eq!(behind.get("d/a").expect("behind"), b"hello");
    assert_eq!(fs::read(d.join("a")).expect("read"), b"hello");
    fs::rename(d.join("a"), m.join("b")).expect("rename");
    assert!(!d.join("a").exists() && behind.exists("b") && !behind.exists("d/a"));
    assert_eq!(fs::read(m.join("b")).expect("read"), b"hello");
    assert_eq!(fs::hard_link(m.join("b"), d.join("c")).expect_err("no links").raw_os_error(), Some(libc::EPERM));
    symlink("b", m.join("s")).expect("symlink");
    assert_eq!(fs::read_link(m.join("s")).expect("readlink"), Path::new("b"));
    assert_eq!(fs::read(m.join("s")).expect("through the link"), b"hello");
    fs::set_permissions(m.join("b"), fs::Permissions::from_mode(0o640)).expect("chmod");
    std::os::unix::fs::chown(m.join("b"), Some(1234), Some(4321)).expect("chown");
    let meta = fs::metadata(m.join("b")).expect("b");
    assert_eq!((meta.mode(), meta.uid(), meta.gid()), (0o100640, 1234, 4321));
    let prefix = if behind.store().headers("b", "b").expect("b").keys().any(|k| k.starts_with("x-oss-")) {
        "x-oss-meta"
    } else {
        "x-amz-meta"
    };
    let kept = behind.store().headers("b", "b").expect("b");
    assert_eq!((kept[&format!("{prefix}-mode")].as_str(), kept[&format!("{prefix}-uid")].as_str()), ("33184", "1234"));
    fs::set_permissions(&d, fs::Permissions::from_mode(0o750)).expect("chmod of a directory");
    assert_eq!(fs::metadata(&d).expect("d").mode(), 0o40750);
    fs::create_dir(d.join("e")).expect("mkdir");
    assert_eq!(fs::remove_dir(&d).expect_err("not empty").raw_os_error(), Some(libc::ENOTEMPTY));
    fs::write(d.join("e/f"), b"deep").expect("write");
    let mut names: Vec<_> = fs::read_dir(m).expect("list").map(|e| e.expect("entry").file_name()).collect();
    names.sort();
    assert_eq!(names, ["b", "d", "s"]);
    // A directory moves with everything the kernel knows below it.
    fs::rename(&d, m.join("g")).expect("rename a directory");
    assert_eq!(fs::read(m.join("g/e/f")).expect("moved along"), b"deep");
    assert_eq!(fs::metadata(m.join("g")).expect("g").mode(), 0o40750);
    fs::write(m.join("g/e/new"), b"x").expect("create below");
    assert!(behind.exists("g/e/new") && !behind.exists("d/") && !d.exists());
    let mut names: Vec<_> = fs::read_dir(m.join("g/e")).expect("list").map(|e| e.expect("entry").file_name()).collect();
    names.sort();
    assert_eq!(names, ["f", "new"]);
    fs::rename(m.join("g"), &d).expect("and back");
    assert_eq!(fs::read_dir(d.join("e")).expect("list").count(), 2);
    fs::remove_dir_all(&d).expect("rm -r");
    assert!(!behind.exists("d/"));
    for i in 0..50 {
        fs::write(m.join(format!("n{i:02}")), format!("{i}")).expect("write");
    }
    let listed = fs::read_dir(m).expect("list").count();
    assert!(listed >= 52, "{listed}");
    let before = behind.store().stats();
    for i in 0..50 {
        assert_eq!(fs::metadata(m.join(format!("n{i:02}"))).expect("stat").mode(), 0o100644);
        assert_eq!(fs::read_to_string(m.join(format!("n{i:02}"))).expect("read"), i.to_string());
    }
    let after = behind.store().stats();
    assert!(after.of("head") - before.of("head") < 5, "what was written here is known: {before:?} {after:?}");
}

/// What another mount wrote: its modes and links.
fn seen_by_another(origin: &str) {
    let server = server(origin);
    let a = mount_bucket(origin, &server, &[]);
    let (path, endpoint) = (a.path.clone(), server.endpoint());
    within(PATIENCE, move || {
        fs::create_dir(path.join("p")).expect("mkdir");
        fs::write(path.join("p/x"), b"by a").expect("write");
        fs::set_permissions(path.join("p/x"), fs::Permissions::from_mode(0o711)).expect("chmod");
        symlink("x", path.join("p/l")).expect("symlink");
    });
    assert_eq!(endpoint, server.endpoint());
    let b = mount_bucket(origin, &server, &["consistency=ttl=1"]);
    let path = b.path.clone();
    within(PATIENCE, move || {
        assert_eq!(fs::metadata(path.join("p/x")).expect("x").mode(), 0o100711);
        assert_eq!(fs::read_link(path.join("p/l")).expect("l"), Path::new("x"));
        let kinds: Vec<_> =
            fs::read_dir(path.join("p")).expect("list").map(|e| e.expect("entry").file_type()).collect();
        assert_eq!(kinds.iter().filter(|k| k.as_ref().is_ok_and(|k| k.is_symlink())).count(), 1, "{kinds:?}");
    });
    b.finish(&[]).expect("log");
    a.finish(&[]).expect("log");
}

/// A long file: parts behind the writer, then a change in its middle.
fn long_file(m: &Path, behind: &Behind) {
    const LEN: usize = 64 << 20;
    let mut model: Vec<u8> = (0..LEN).map(|i| (i / 4096 * 7 + i) as u8).collect();
    let path = m.join("long");
    let mut f = File::create(&path).expect("create");
    for piece in model.chunks(1 << 20) {
        f.write_all(piece).expect("write");
    }
    wait_for("parts that are sent behind the writer", PATIENCE, || Ok(behind.store().stats().of("part") >= 5))
        .expect("sent");
    assert!(!behind.exists("long"), "and nothing is seen before the close");
    // As `cp -p` and tar do, when the upload has long begun.
    let time = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    f.set_times(FileTimes::new().set_accessed(time).set_modified(time)).expect("times");
    drop(f);
    let headers = behind.store().headers("b", "long").expect("object");
    for name in ["-meta-mtime", "-meta-atime"] {
        let kept = headers.iter().find(|(k, _)| k.ends_with(name)).map(|(_, v)| v.as_str());
        assert_eq!(kept, Some("1000000000"), "{headers:?}");
    }
    assert_eq!(fs::metadata(&path).expect("stat").modified().expect("mtime"), time);
    assert!(behind.get("long").expect("behind") == model);
    let before = behind.store().stats();
    let f = OpenOptions::new().read(true).write(true).open(&path).expect("open");
    f.write_all_at(&[0xab; 4096], 33_000_000).expect("write");
    model[33_000_000..33_004_096].fill(0xab);
    f.sync_all().expect("fsync");
    assert!(behind.get("long").expect("behind") == model);
    let stats = behind.store().stats();
    let more = |op| stats.of(op) - before.of(op);
    assert_eq!((more("part"), more("part_copy")), (1, 7), "{stats:?}");
    drop(f);
    assert!(fs::read(&path).expect("read") == model);
}

/// Descriptors that children of the writer close do not end the writing; the last close of all does.
fn closed_by_children(m: &Path, behind: &Behind) {
    let path = m.join("parent");
    let mut f = File::create(&path).expect("create");
    f.write_all(b"half").expect("write");
    // It closes its copy when it begins to run `true`, which has none.
    assert!(Command::new("true").status().expect("true").success());
    assert!(!behind.exists("parent"), "nobody has closed the file");
    nix::fcntl::fcntl(&f, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).expect("inherited");
    let script = format!("printf ' and' >&{}", f.as_raw_fd());
    assert!(Command::new("bash").args(["-c", &script]).status().expect("sh").success());
    assert!(!behind.exists("parent"), "the child has, its parent has not");
    f.write_all(b" half").expect("write");
    drop(f);
    assert_eq!(behind.get("parent").as_deref(), Some(&b"half and half"[..]));
    // A shell whose child goes on writing when the opener is gone.
    let script = format!("exec >{}; (sleep 1; echo late) & echo early", m.join("orphan").display());
    assert!(Command::new("sh").args(["-c", &script]).status().expect("sh").success());
    assert_eq!(behind.get("orphan").as_deref(), Some(&b"early\n"[..]));
    let late = || Ok(behind.get("orphan").as_deref() == Some(&b"early\nlate\n"[..]));
    wait_for("what was written last", PATIENCE, late).expect("late");
}

/// Two writers: who comes late finds what it wrote beside.
fn two_writers(m: &Path, behind: &Behind) {
    for len in [10usize, 20 << 20] {
        let path = m.join("raced");
        fs::write(&path, vec![1; len]).expect("write");
        let mut f = OpenOptions::new().write(true).open(&path).expect("open");
        f.write_all(&vec![2; len]).expect("write");
        behind.store().put("b", "raced", vec![3; 5]);
        assert_eq!(f.sync_all().expect_err("lost").raw_os_error(), Some(libc::ESTALE));
        drop(f);
        let keys = behind.store().keys("b");
        let beside: Vec<_> = keys.iter().filter(|k| k.starts_with(b"raced.efc-conflict-")).collect();
        assert_eq!(beside.len(), 1, "{keys:?}");
        assert!(behind.store().get("b", beside[0]).expect("beside") == vec![2; len]);
        assert_eq!(behind.get("raced").expect("theirs"), [3; 5]);
        for name in fs::read_dir(m).expect("list") {
            fs::remove_file(name.expect("entry").path()).expect("rm");
        }
        assert_eq!(behind.count(), 0);
    }
}

fn lost_races(origin: &str) {
    let behind = Behind::Store(Box::new(server(origin)));
    let m = mount_bucket(origin, behind.store(), &["consistency=ttl=1"]);
    let path = m.path.clone();
    let _behind = within(PATIENCE, move || {
        two_writers(&path, &behind);
        behind
    });
    m.finish(&["somebody else changed the file meanwhile"]).expect("log");
}

#[test]
fn s3_lost_races() {
    lost_races("s3");
}

#[test]
fn oss_lost_races() {
    lost_races("oss");
}

#[test]
fn s3_seen_by_another() {
    seen_by_another("s3");
}

#[test]
fn oss_seen_by_another() {
    seen_by_another("oss");
}

macro_rules! on {
    ($($name:ident, $origin:literal, $work:ident;)+) => {$(
        #[test]
        fn $name() {
            over($origin, $work);
        }
    )+};
}

on! {
    file_names_and_attributes, "file", names_and_attributes;
    nfs_names_and_attributes, "nfs", names_and_attributes;
    file_content, "file", content;
    nfs_content, "nfs", content;
    file_removed_while_open, "file", removed_while_open;
    nfs_removed_while_open, "nfs", removed_while_open;
    file_removed_while_closed, "file", removed_while_closed;
    nfs_removed_while_closed, "nfs", removed_while_closed;
    file_directories_moved, "file", directories_moved;
    file_mapped, "file", mapped;
    nfs_mapped, "nfs", mapped;
    file_odd_flags, "file", odd_flags;
    nfs_odd_flags, "nfs", odd_flags;
    s3_names, "s3", object_names;
    oss_names, "oss", object_names;
    s3_content, "s3", content;
    oss_content, "oss", content;
    s3_removed_while_open, "s3", removed_while_open;
    oss_removed_while_open, "oss", removed_while_open;
    s3_mapped, "s3", mapped;
    oss_mapped, "oss", mapped;
    s3_odd_flags, "s3", odd_flags;
    s3_closed_by_children, "s3", closed_by_children;
    oss_odd_flags, "oss", odd_flags;
    s3_long_file, "s3", long_file;
    oss_long_file, "oss", long_file;
}
