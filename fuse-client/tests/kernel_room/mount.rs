//! The kernel room against the kernel: real mounts, real tools, a file system in memory.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::sync::Arc;
use std::time::Duration;

use crate::support::*;
use efc_common::Kind;
use efc_fuse::kernel::{Ended, Errno, KernelFeatures, Mount, Session, SessionConfig, Unmounted, buffers, serve};

#[test]
fn tools_see_the_tree_as_it_is() {
    let m = Mounted::new(MemFs::new());
    assert_eq!(shell(&m, "ls").split_whitespace().collect::<Vec<_>>(), ["files", "link", "many"]);
    assert_eq!(shell(&m, "find . | wc -l").trim(), (1 + 3 + MANY + SIZES.len()).to_string());
    assert_eq!(shell(&m, "readlink link").trim(), "files/114688");
    assert_eq!(shell(&m, "stat -c '%s %Y %a' link/ files/4095 | tail -1").trim(), "4095 -5 644");
    for size in SIZES {
        let expected = content(m.fs.node(&format!("files/{size}")), size);
        let path = m.path(&format!("files/{size}"));
        assert_eq!(m.guarded(move || fs::read(path)).expect("reads"), expected, "{size}");
    }
    let copy = tempfile::tempdir().expect("dir");
    let to = copy.path().display();
    shell(&m, &format!("cp -r files {to}/; for f in files/*; do cmp $f {to}/$f; done; cat link | cmp - files/114688"));
}

#[test]
fn requests_are_read_into_memory_that_is_there() {
    let before = buffers::made();
    let m = Mounted::new(MemFs::new());
    shell(&m, "ls");
    // One for each thread, if `fuser` still allocates them as it did.
    assert!(buffers::made() >= before + 2, "{}", buffers::made());
}

#[test]
fn calls_that_are_not_plain_reads() {
    let m = Mounted::new(MemFs::new());
    let big = m.path("files/8388608");
    let expected = content(m.fs.node("files/8388608"), 8 << 20);
    m.guarded(move || {
        let mut file = File::open(&big).expect("opens");
        // SAFETY: a private read-only mapping of a file that does not change while it is mapped.
        let map = unsafe {
            let at = libc::mmap(std::ptr::null_mut(), 8 << 20, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0);
            assert_ne!(at, libc::MAP_FAILED);
            std::slice::from_raw_parts(at.cast::<u8>(), 8 << 20)
        };
        assert_eq!(map, &expected[..]);
        // SAFETY: the mapping made above, not used afterwards.
        assert_eq!(unsafe { libc::munmap(map.as_ptr() as *mut libc::c_void, 8 << 20) }, 0);
        let seek = |offset, whence| {
            // SAFETY: plain system call on an open fd.
            unsafe { libc::lseek(file.as_raw_fd(), offset, whence) }
        };
        assert_eq!(seek(1000, libc::SEEK_DATA), 1000);
        assert_eq!(seek(1000, libc::SEEK_HOLE), 8 << 20);
        file.seek(SeekFrom::End(-3)).expect("seeks");
        let mut tail = Vec::new();
        file.read_to_end(&mut tail).expect("reads");
        assert_eq!(tail, &expected[(8 << 20) - 3..]);
        let direct = File::options().read(true).custom_flags(libc::O_DIRECT).open(&big).expect("opens");
        let mut part = vec![0u8; 1 << 20];
        direct.read_exact_at(&mut part, 4096).expect("reads");
        assert_eq!(part, &expected[4096..4096 + (1 << 20)]);
    });
    let largest = m.fs.largest_read.load(std::sync::atomic::Ordering::SeqCst);
    assert_eq!(largest, u64::from(m.session().negotiated().max_request_bytes), "a direct read of 1 MiB arrives whole");
    let root = m.path("");
    let (blocks, size) = m.guarded(move || {
        let s = nix::sys::statvfs::statvfs(&root).expect("statfs");
        (s.blocks(), s.fragment_size())
    });
    assert_eq!((blocks, size), (1000, 4096));
    let xattrs = "import os; p='files/1'; print(os.getxattr(p,'user.efc'), os.listxattr(p))";
    assert_eq!(shell(&m, &format!("python3 -c \"{xattrs}\"")).trim(), "b'some value' ['user.efc']");
}

#[test]
fn a_warm_small_file_costs_no_request() {
    let m = Mounted::new(MemFs::new());
    let paths: Vec<_> = (0..MANY).map(|i| m.path(&format!("many/file-{i:05}"))).collect();
    let many = m.path("many");
    let pass = move || {
        for (i, path) in paths.iter().enumerate() {
            assert_eq!(fs::read(path).expect("reads").len(), 100 + i);
        }
    };
    let (list, first) = (many.clone(), pass.clone());
    m.guarded(move || {
        assert_eq!(names(&list).len(), MANY);
        first();
    });
    // After a listing each file has cost its one READ (a 100-byte file ends inside it) and nothing else.
    assert_eq!(m.fs.count("read"), MANY as u64);
    assert_eq!(m.fs.count("open"), 1, "answered ENOSYS once");
    assert!(m.fs.count("flush") <= 1 && m.fs.count("lookup") <= 2, "attributes came with the names");
    // Something else on the machine may drop caches or walk over all mounts for a while, so one pass out of some seconds has to be free.
    let mut asked = Vec::new();
    for _ in 0..200 {
        let (before, pass) = (m.fs.counts(), pass.clone());
        m.guarded(pass);
        asked.clear();
        asked.extend(m.fs.counts().into_iter().filter(|(op, n)| before.get(op) != Some(n)));
        if asked.is_empty() {
            break;
        }
    }
    assert!(asked.is_empty(), "a warm pass over {MANY} files asks {asked:?}");
    assert_eq!(m.session().drain(LIMIT).expect("drains").left, 0);
}

#[test]
fn every_page_of_names_carries_attributes() {
    let m = Mounted::new(MemFs::new());
    let many = m.path("many");
    assert_eq!(m.guarded(move || names(&many)).len(), MANY);
    let pages = m.fs.count("readdir");
    assert_eq!(m.fs.plain_pages.load(std::sync::atomic::Ordering::SeqCst), 0);
    // An entry takes 168 bytes: with pages of 4 KiB it would be 84 of them. Guards the size that is read off fuser's debug text.
    assert!((2..40).contains(&pages), "{pages} pages for {MANY} names");
    assert_eq!(shell(&m, "ls -l many | wc -l").trim(), (MANY + 1).to_string());
    assert!(m.fs.count("getattr") + m.fs.count("lookup") < 10, "names were looked up one by one");
}

#[test]
fn a_read_only_file_system_refuses_changes() {
    let m = Mounted::with(MemFs::new(), |c| c.read_only = false, SessionConfig::default());
    let path = move |p: &str| m.path(p);
    let code = |r: std::io::Result<()>| r.expect_err("refused").raw_os_error();
    assert_eq!(code(fs::create_dir(path("new"))), Some(libc::EROFS));
    assert_eq!(code(fs::write(path("new"), "x")), Some(libc::EROFS));
    assert_eq!(code(fs::remove_file(path("link"))), Some(libc::EROFS));
    assert_eq!(code(fs::rename(path("link"), path("l2"))), Some(libc::EROFS));
    assert_eq!(code(fs::hard_link(path("files/1"), path("l2"))), Some(libc::EROFS));
    assert_eq!(code(std::os::unix::fs::symlink("x", path("l2"))), Some(libc::EROFS));
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    assert_eq!(code(fs::set_permissions(path("files/1"), mode)), Some(libc::EROFS));
}

#[test]
fn a_lost_or_panicking_request_is_eio_and_the_mount_goes_on() {
    let mut fs = MemFs::new();
    let (lost, broken) = (fs.node("files/1"), fs.node("files/4095"));
    fs.on_read = Some(Box::new(move |fs, node, at, reply| match node {
        n if n == lost => drop(reply),
        n if n == broken => panic!("on purpose"),
        _ => answer_read(fs, node, at, reply),
    }));
    // More panics than threads: none may be lost to one.
    let m = Mounted::with(fs, |_| {}, SessionConfig { threads: 2, ..SessionConfig::default() });
    for _ in 0..3 {
        for name in ["files/1", "files/4095"] {
            let path = m.path(name);
            let e = m.guarded(move || fs::read(path)).expect_err("fails");
            assert_eq!(e.raw_os_error(), Some(libc::EIO), "{name}");
        }
    }
    let path = m.path("files/4096");
    assert_eq!(m.guarded(move || fs::read(path)).expect("reads").len(), 4096);
    assert_eq!(m.session().drain(LIMIT).expect("drains").left, 0);
}

#[test]
fn mounting_fails_with_a_reason_and_leaves_nothing() {
    let dir = tempfile::tempdir().expect("dir");
    let fails = |path: &std::path::Path| {
        let e = serve(Arc::new(MemFs::new()), &mount_config(path), &SessionConfig::default(), |_| Ok(()))
            .err()
            .expect("fails");
        (e.kind(), e.to_string())
    };
    let (kind, text) = fails(&dir.path().join("absent"));
    assert_eq!(kind, Kind::NotFound);
    assert!(text.contains("absent does not exist"), "{text}");
    fs::write(dir.path().join("file"), "").expect("writes");
    assert_eq!(fails(&dir.path().join("file")).0, Kind::NotADirectory);

    let m = Mounted::new(MemFs::new());
    let (kind, text) = fails(&m.path(""));
    assert_eq!(kind, Kind::Busy);
    assert!(text.contains("fuse.efc from efc test,with comma"), "{text}");
    // Also through a symbolic link, and the first mount still works.
    std::os::unix::fs::symlink(m.path(""), dir.path().join("ln")).expect("links");
    assert_eq!(fails(&dir.path().join("ln")).0, Kind::Busy);
    let path = m.path("files/1");
    assert_eq!(m.guarded(move || fs::read(path)).expect("reads").len(), 1);

    // A session that cannot start takes its mount away again: the fd it gets is no FUSE connection.
    let (mount, fd) = Mount::new(&mount_config(dir.path()), |_| Ok(())).expect("mounts");
    let null = File::open("/dev/null").expect("opens");
    assert!(Session::start(Arc::new(MemFs::new()), null.into(), &SessionConfig::default()).is_err());
    drop(fd);
    assert_eq!(mount.unmount(true).expect("unmounts"), Unmounted::Clean);
    assert!(!mount.is_mounted().expect("asks"));
    assert_eq!(Mount::existing(dir.path()).expect_err("gone").kind(), Kind::NotFound);
}

#[test]
fn a_mount_in_use_is_refused_detached_or_aborted() {
    let m = Mounted::new(MemFs::new());
    assert_eq!(Mount::existing(&m.path("")).expect("found"), m.mount);
    let path = m.path("files/1");
    let mut open = m.guarded(move || File::open(path)).expect("opens");
    assert_eq!(m.mount.unmount(false).expect_err("in use").kind(), Kind::Busy);
    assert!(m.mount.is_mounted().expect("asks"));
    assert_eq!(m.mount.unmount(true).expect("detaches"), Unmounted::Detached);
    assert_eq!(m.mount.unmount(true).expect("asks"), Unmounted::NotMounted);
    // Out of the tree, and still served for who has it open.
    let mut open = m.guarded(move || {
        assert_eq!(open.read(&mut [0u8; 8]).expect("reads"), 1);
        open
    });
    let mut ended = m.session().ended();
    assert_eq!(*ended.borrow(), None);
    m.mount.abort().expect("aborts");
    m.guarded(move || {
        assert!(
            open.seek(SeekFrom::Start(0)).and_then(|_| open.metadata()).is_err() || open.read(&mut [0u8; 8]).is_ok()
        )
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("runtime");
    let end = runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(10), ended.wait_for(Option::is_some))
            .await
            .expect("ends")
            .expect("told")
            .clone()
    });
    assert_eq!(end, Some(Ended::Unmounted));
}

#[test]
fn an_abort_frees_readers_of_a_daemon_that_hangs() {
    let mut fs = MemFs::new();
    let (held_tx, held_rx) = std::sync::mpsc::channel();
    let held_tx = parking_lot::Mutex::new(held_tx);
    fs.on_read = Some(Box::new(move |_, _, _, reply| held_tx.lock().send(reply).expect("kept")));
    let m = Mounted::new(fs);
    let path = m.path("files/4096");
    let reader = std::thread::spawn(move || fs::read(path));
    let held = held_rx.recv_timeout(LIMIT).expect("the read arrives");
    m.mount.abort().expect("aborts");
    let e = reader.join().expect("joins").expect_err("fails");
    assert!(matches!(e.raw_os_error(), Some(libc::ECONNABORTED | libc::ENOTCONN | libc::EIO)), "{e}");
    // An answer that comes too late is nobody's error.
    held.bytes(b"late");
    assert_eq!(m.session().drain(LIMIT).expect("drains").left, 0);
}

#[test]
fn session_settings_reach_the_kernel() {
    let config = SessionConfig { bdi_read_ahead_kb: Some(2048), max_background: 64, ..SessionConfig::default() };
    let m = Mounted::with(MemFs::new(), |_| {}, config);
    let device = m.guarded({
        let root = m.path("");
        move || fs::metadata(root).expect("stat").dev()
    });
    let minor = (device & 0xff) | ((device >> 12) & 0xfff00);
    assert_eq!(m.mount.connection() as u64, minor);
    let setting = fs::read_to_string(format!("/sys/class/bdi/0:{minor}/read_ahead_kb")).expect("reads");
    assert_eq!(setting.trim(), "2048");
    let n = m.session().negotiated();
    assert_eq!((n.max_background, n.adopted), (64, false));
    assert_eq!(n.granted & !n.offered, 0);
    let background = fs::read_to_string(format!("/sys/fs/fuse/connections/{minor}/max_background"));
    if let Ok(background) = background {
        assert_eq!(background.trim(), "64");
    }
}

#[test]
fn requests_are_counted_by_operation() {
    let metrics = efc_common::metrics::install().expect("no recorder yet");
    let mut fs = MemFs::new();
    let lost = fs.node("files/4095");
    fs.on_read = Some(Box::new(move |fs, node, at, reply| match node {
        n if n == lost => reply.error(Errno::EACCES),
        _ => answer_read(fs, node, at, reply),
    }));
    let m = Mounted::with(fs, |_| {}, SessionConfig { bdi_read_ahead_kb: None, ..SessionConfig::default() });
    let (good, bad, none) = (m.path("files/4096"), m.path("files/4095"), m.path("files/asked-each-time"));
    m.guarded(move || {
        assert_eq!(fs::read(good).expect("reads").len(), 4096);
        assert_eq!(fs::read(bad).expect_err("fails").raw_os_error(), Some(libc::EACCES));
        assert!(!none.exists());
    });
    assert_eq!(m.session().drain(LIMIT).expect("drains").left, 0);
    let text = metrics.render();
    let at_least = |series: &str, least: u64| {
        let line = text.lines().find_map(|l| l.strip_prefix(series)).unwrap_or_else(|| panic!("no {series} in {text}"));
        assert!(line.trim().parse::<u64>().expect("number") >= least, "{series}{line}");
    };
    // Other tests of this process count as well.
    at_least("efc_fuse_requests_total{op=\"read\"}", 2);
    at_least("efc_fuse_request_seconds_count{op=\"lookup\"}", 3);
    at_least("efc_fuse_read_bytes_total", 4096);
    at_least("efc_fuse_errors_total{op=\"read\",errno=\"EACCES\"}", 1);
    assert!(!text.contains("op=\"lookup\",errno=\"ENOENT\""), "a missing name is no error");
}

#[test]
fn the_probe_says_what_a_mount_finds() {
    let features = KernelFeatures::probe().expect("probes");
    let m = Mounted::new(MemFs::new());
    let n = m.session().negotiated();
    assert_eq!(features, KernelFeatures::from_offer(n.abi, n.offered));
    assert!(features.abi.0 == 7 && features.readdirplus && features.no_open);
}
