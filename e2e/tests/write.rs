//! What applications do to a read-write mount, and what the origin has afterwards.

use efc_e2e::{Mount, within};
use efc_testkit::{Ganesha, scratch};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(120);

/// Runs `work` in the mount of a NAS-like origin; it gets the mount point and the directory behind.
fn over(origin: &str, work: fn(&Path, &Path)) {
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
    let (path, behind) = (m.path.clone(), dir.path().to_path_buf());
    within(PATIENCE, move || work(&path, &behind));
    m.finish(&[]).expect("log");
}

fn bytes(n: usize, seed: u8) -> Vec<u8> {
    (0..n).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

fn names_and_attributes(m: &Path, behind: &Path) {
    let d = m.join("d");
    fs::create_dir(&d).expect("mkdir");
    fs::write(d.join("a"), b"hello").expect("write");
    assert_eq!(fs::read(behind.join("d/a")).expect("behind"), b"hello");
    assert_eq!(fs::read(d.join("a")).expect("read"), b"hello");
    fs::rename(d.join("a"), m.join("b")).expect("rename");
    assert!(!d.join("a").exists() && behind.join("b").exists());
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
    let meta = fs::metadata(behind.join("d/c")).expect("behind");
    assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o640, 1234, 4321));
    assert_eq!(fs::metadata(d.join("c")).expect("c").mode() & 0o7777, 0o640);
    assert_eq!(fs::remove_dir(&d).expect_err("not empty").raw_os_error(), Some(39));
    // A directory moves with everything the kernel knows below it.
    fs::create_dir(d.join("e")).expect("mkdir");
    fs::write(d.join("e/f"), b"deep").expect("write");
    fs::rename(&d, m.join("g")).expect("rename a directory");
    assert_eq!(fs::read(m.join("g/e/f")).expect("moved along"), b"deep");
    fs::write(m.join("g/e/new"), b"x").expect("create below");
    assert!(behind.join("g/e/new").exists());
    let mut names: Vec<_> = fs::read_dir(m.join("g/e")).expect("list").map(|e| e.expect("entry").file_name()).collect();
    names.sort();
    assert_eq!(names, ["f", "new"]);
    fs::remove_dir_all(m.join("g")).expect("rm -r");
    assert!(!behind.join("g").exists());
}

fn content(m: &Path, behind: &Path) {
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
    assert!(fs::read(behind.join("f")).expect("behind") == model, "at the origin");
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

fn removed_while_open(m: &Path, behind: &Path) {
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
            left(behind) == 0
        });
        assert!(gone, "what was removed while open is still at the origin");
    }
}

fn mapped(m: &Path, behind: &Path) {
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
    assert!(fs::read(behind.join("map")).expect("behind") == model);
}

fn odd_flags(m: &Path, _behind: &Path) {
    let path: PathBuf = m.join("x");
    let exclusive = || OpenOptions::new().write(true).create_new(true).mode(0o400).open(&path);
    // A mode that forbids its own creator to write does not forbid it through this descriptor.
    exclusive().expect("create").write_all(b"1").expect("write");
    assert_eq!(exclusive().expect_err("exists").raw_os_error(), Some(libc::EEXIST));
    let read_only = File::open(&path).expect("open");
    assert_eq!(read_only.write_at(b"2", 0).expect_err("read-only handle").raw_os_error(), Some(libc::EBADF));
    let name = m.join("n".repeat(256));
    assert_eq!(File::create(name).expect_err("too long").raw_os_error(), Some(libc::ENAMETOOLONG));
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
    file_mapped, "file", mapped;
    nfs_mapped, "nfs", mapped;
    file_odd_flags, "file", odd_flags;
    nfs_odd_flags, "nfs", odd_flags;
}
