//! What SEMANTICS.md promises of freshness, over an object store that changes behind the mount's back.

use efc_e2e::{Mount, within};
use efc_testkit::oss::{OssOptions, OssServer};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

fn server() -> OssServer {
    let s = OssServer::start_with(OssOptions::s3()).expect("server");
    s.create_bucket("b");
    s
}

fn mount(s: &OssServer, consistency: &str) -> Mount {
    let (endpoint, consistency) = (format!("endpoint={}", s.endpoint()), format!("consistency={consistency}"));
    let keys = s.target();
    Mount::start("s3://b", &[&endpoint, &consistency, "cache_memory=64MiB"], &keys.env()).expect("mount")
}

/// Looks until `seen` holds, and gives how long that took.
fn time_until(what: &str, limit: Duration, mut seen: impl FnMut() -> bool) -> Duration {
    let begun = Instant::now();
    while !seen() {
        assert!(begun.elapsed() < limit, "{what}: not seen within {limit:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    begun.elapsed()
}

fn read(path: &Path) -> Option<Vec<u8>> {
    std::fs::read(path).ok()
}

#[test]
fn changes_are_seen_within_the_ttl() {
    let s = server();
    s.put("b", "d/old", "one");
    s.put("b", "d/gone", "x");
    let m = mount(&s, "ttl=2");
    let path = m.path.clone();
    within(PATIENCE, move || {
        let d = path.join("d");
        assert_eq!(read(&d.join("old")).as_deref(), Some(b"one".as_slice()));
        assert!(d.join("gone").exists() && !d.join("new").exists());
        let inode = std::fs::metadata(d.join("old")).expect("stat").ino();
        s.put("b", "d/old", "second");
        s.put("b", "d/new", "n");
        assert!(s.remove("b", "d/gone"));
        // The promise is 2 s; the rest is for a busy machine.
        let limit = Duration::from_secs(4);
        time_until("changed content", limit, || read(&d.join("old")).as_deref() == Some(b"second"));
        time_until("new file", limit, || d.join("new").exists());
        time_until("removed file", limit, || !d.join("gone").exists());
        assert_ne!(std::fs::metadata(d.join("old")).expect("stat").ino(), inode, "a new version is a new node");
    });
    m.unmount().expect("unmount");
}

/// With a ttl nobody would wait for, `efc-fuse refresh` shows what changed.
#[test]
fn refresh_shows_what_others_changed() {
    let s = server();
    s.put("b", "d/f", "one");
    s.put("b", "d/sub/g", "one");
    let m = mount(&s, "ttl=3600");
    let path = m.path.clone();
    within(PATIENCE, move || {
        let (f, g) = (path.join("d/f"), path.join("d/sub/g"));
        assert_eq!((read(&f).as_deref(), read(&g).as_deref()), (Some(&b"one"[..]), Some(&b"one"[..])));
        s.put("b", "d/f", "second");
        s.put("b", "d/sub/g", "second");
        s.put("b", "d/new", "n");
        assert_eq!(read(&f).as_deref(), Some(&b"one"[..]));
        assert!(!path.join("d/new").exists());
        let refresh = |at: &Path| {
            let program = efc_e2e::program("efc-fuse").expect("built");
            std::process::Command::new(program).arg("refresh").arg(at).output().expect("efc-fuse")
        };
        let out = refresh(&path.join("d"));
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert_eq!((read(&f).as_deref(), read(&g).as_deref()), (Some(&b"second"[..]), Some(&b"second"[..])));
        assert!(path.join("d/new").exists());
        assert_eq!(refresh(Path::new("/proc")).status.code(), Some(3), "no EFC mount");
    });
    m.unmount().expect("unmount");
}

#[test]
fn immutable_is_never_asked_again() {
    let s = server();
    s.put("b", "f", "one");
    let m = mount(&s, "immutable");
    let path = m.path.join("f");
    within(PATIENCE, move || {
        assert_eq!(read(&path).as_deref(), Some(b"one".as_slice()));
        s.put("b", "f", "changed");
        s.reset_stats();
        std::thread::sleep(Duration::from_secs(2));
        assert_eq!(read(&path).as_deref(), Some(b"one".as_slice()));
        assert_eq!(s.stats().total(), 0, "the origin was asked");
    });
    m.unmount().expect("unmount");
}

const BIG: usize = 24 << 20;

fn version(n: u8) -> Vec<u8> {
    (0..BIG).map(|i| ((i >> 12) as u8).wrapping_mul(31).wrapping_add(n)).collect()
}

/// Reads a file piece by piece and changes it in the middle. Everything read from the open file must be of the first version, up to
/// the end or to ESTALE.
fn read_across_a_change(path: PathBuf, change: impl FnOnce()) -> bool {
    let (old, mut change) = (version(1), Some(change));
    let file = std::fs::File::open(&path).expect("open");
    let mut piece = vec![0; 64 << 10];
    for at in (0..BIG).step_by(piece.len()) {
        if at == 4 << 20
            && let Some(change) = change.take()
        {
            change();
        }
        match file.read_exact_at(&mut piece, at as u64) {
            Ok(()) => assert!(piece == old[at..at + piece.len()], "a byte of another version near {at}"),
            Err(e) => {
                assert_eq!(e.raw_os_error(), Some(nix::libc::ESTALE), "at {at}: {e}");
                return true;
            }
        }
    }
    false
}

#[test]
fn an_open_file_never_mixes_versions() {
    let s = server();
    s.put("b", "big", version(1));
    // No read-ahead, so that most of the file is still to be fetched when it changes.
    let (endpoint, keys) = (format!("endpoint={}", s.endpoint()), s.target());
    let options = [endpoint.as_str(), "consistency=ttl=2", "cache_memory=64MiB", "readahead=0"];
    let m = Mount::start("s3://b", &options, &keys.env()).expect("mount");
    let path = m.path.join("big");
    within(PATIENCE, move || {
        let stale = read_across_a_change(path.clone(), || s.put("b", "big", version(2)));
        assert!(stale, "the old version is gone from the origin and was not cached: ESTALE was due");
        let begun = Instant::now();
        time_until("the new version", Duration::from_secs(4), || read(&path).as_deref() == Some(version(2).as_slice()));
        assert!(begun.elapsed() < Duration::from_secs(4));
    });
    m.unmount().expect("unmount");
}

#[test]
fn an_open_directory_keeps_its_snapshot() {
    let s = server();
    for i in 0..3000 {
        s.put("b", format!("d/{i:05}"), "x");
    }
    let m = mount(&s, "ttl=1");
    let path = m.path.join("d");
    within(PATIENCE, move || {
        let mut open = std::fs::read_dir(&path).expect("list");
        let first = open.next().expect("entry").expect("entry").file_name();
        for i in 0..3000 {
            s.remove("b", format!("d/{i:05}"));
            s.put("b", format!("d/new{i:05}"), "y");
        }
        time_until("another process sees the new names", Duration::from_secs(5), || {
            std::fs::read_dir(&path)
                .expect("list")
                .flatten()
                .all(|e| e.file_name().to_string_lossy().starts_with("new"))
        });
        let mut names: Vec<_> = open.map(|e| e.expect("entry").file_name()).collect();
        names.push(first);
        names.sort();
        let want: Vec<_> = (0..3000).map(|i| std::ffi::OsString::from(format!("{i:05}"))).collect();
        assert_eq!(names, want);
    });
    m.unmount().expect("unmount");
}
