//! Tests of what a tier finds again: after a clean end, after `kill -9`, after its files were damaged, on a file system that is
//! full or gone.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::suite::*;
use super::*;

const KEPT: [Place; 2] = [Place::Tmpfs, Place::Disk];

/// Keys that a reopened store serves; every one of them must be right.
fn served(store: &Store, keys: std::ops::Range<u64>) -> Vec<u64> {
    keys.filter(|n| store.get(&key(*n)).is_some_and(|s| is_right(&s, *n))).collect()
}

fn open_file(dir: &Path, name: &str) -> std::fs::File {
    std::fs::OpenOptions::new().read(true).write(true).open(dir.join(name)).expect(name)
}

#[test]
fn a_restart_is_warm_and_keeps_pins_and_times() {
    for place in KEPT {
        let dir = place.dir();
        let config = StoreConfig { ttl: Some(Duration::from_secs(600)), ..place.config(dir.path(), 64 << 20) };
        let store = Store::open(config.clone()).expect("open");
        for n in 0..300 {
            insert_with(&store, n, InsertOptions { pinned: n == 5, ttl: None });
        }
        store.pin(&key(6), true);
        insert_with(&store, 300, InsertOptions { pinned: false, ttl: Some(Duration::from_nanos(1)) });
        let before = served(&store, 0..300);
        let stats = store.stats().tiers[0].clone();
        drop(store);
        let store = Store::open(config).expect("reopen");
        let after = store.stats().tiers[0].clone();
        assert!(!store.get(&key(5)).expect("found").sendable(), "not verified since the start");
        assert_eq!(served(&store, 0..300), before, "{place:?}");
        assert!(before.len() as u64 >= 297 && store.get(&key(5)).expect("found").sendable() == (place == Place::Tmpfs));
        assert!(store.get(&key(300)).is_none(), "{place:?}: its time had passed");
        assert_eq!(after.pinned_bytes, stats.pinned_bytes);
        assert!(after.used_bytes <= stats.used_bytes && store.stats().corrupt == 0, "{place:?}");
    }
}

#[test]
fn a_smaller_quota_keeps_the_newest_and_the_pinned() {
    for place in KEPT {
        let dir = place.dir();
        let store = Store::open(place.config(dir.path(), 64 << 20)).expect("open");
        for n in 0..200 {
            insert_with(&store, n, InsertOptions { pinned: n == 0, ttl: None });
        }
        drop(store);
        let store = Store::open(place.config(dir.path(), 8 << 20)).expect("reopen");
        let left = served(&store, 0..200);
        assert!(
            left.len() > 10 && left.contains(&0) && left.contains(&199) && !left.contains(&1),
            "{place:?} {left:?}"
        );
        assert!(used(&store) <= 8 << 20);
        store.evict_all();
        assert!(matches!(insert(&store, 500), Inserted::Stored(s) if is_right(&s, 500)));
    }
}

#[test]
fn damaged_index_records_are_dropped_and_counted_and_the_rest_is_served() {
    for place in KEPT {
        let dir = place.dir();
        let store = Store::open(place.config(dir.path(), 64 << 20)).expect("open");
        for n in 0..100 {
            insert(&store, n);
        }
        let before = served(&store, 0..100).len();
        assert_eq!(before, 100);
        drop(store);
        let index = open_file(dir.path(), "index");
        for (slot, at) in [(3u64, 0u64), (10, 9), (20, 70), (30, 127)] {
            let mut b = [0];
            index.read_exact_at(&mut b, 4096 + slot * 128 + at).expect("read");
            index.write_all_at(&[b[0] ^ 0x40], 4096 + slot * 128 + at).expect("write");
        }
        // A torn record, and one that says it is somewhere else.
        index.write_all_at(&[0; 64], 4096 + 40 * 128).expect("write");
        let mut moved = [0; 128];
        index.read_exact_at(&mut moved, 4096 + 50 * 128).expect("read");
        index.write_all_at(&moved, 4096 + 60 * 128).expect("write");
        drop(index);
        let store = Store::open(place.config(dir.path(), 64 << 20)).expect("reopen");
        assert_eq!(store.stats().corrupt, 6, "{place:?}");
        let left = served(&store, 0..100);
        assert_eq!(left.len(), 94, "{place:?}");
        for n in (0..100).filter(|n| !left.contains(n)) {
            assert!(store.get(&key(n)).is_none(), "{place:?}: {n} is there and wrong");
            assert!(matches!(insert(&store, n), Inserted::Stored(s) if is_right(&s, n)));
        }
        drop(store);
        // Nothing that can be called an index.
        std::fs::write(dir.path().join("index"), content(1, 100_000)).expect("write");
        let store = Store::open(place.config(dir.path(), 64 << 20)).expect("reopen");
        assert!(served(&store, 0..100).is_empty() && occupied(dir.path()) < 65_536, "{place:?}");
        assert!(matches!(insert(&store, 1), Inserted::Stored(s) if is_right(&s, 1)));
    }
}

#[test]
fn damaged_data_is_dropped_and_counted_and_the_rest_is_served() {
    for place in PLACES {
        let dir = place.dir();
        let store = Store::open(place.config(dir.path(), 64 << 20)).expect("open");
        for n in 0..100 {
            insert(&store, n);
        }
        for n in [7, 50, 99] {
            let s = store.get(&key(n)).expect("stored");
            let (file, offset) = s.file();
            let last = [content(n, len_of(n))[len_of(n) - 1] ^ 1];
            rustix::io::pwrite(file, &last, offset + s.len() as u64 - 1).expect("damage");
        }
        for n in 0..100 {
            let s = store.get(&key(n)).expect("not noticed yet");
            match s.read(s.len() - 1..s.len()) {
                Ok(_) => assert!(![7, 50, 99].contains(&n)),
                Err(e) => assert!([7, 50, 99].contains(&n) && e.is(Kind::Corrupt), "{place:?} {n} {e}"),
            }
        }
        assert_eq!(store.stats().corrupt, 3, "{place:?}");
        assert_eq!(served(&store, 0..100).len(), 97, "{place:?}");
        assert!(store.get(&key(7)).is_none());
        assert!(matches!(insert(&store, 7), Inserted::Stored(s) if is_right(&s, 7)));
    }
}

#[test]
fn a_data_file_that_was_cut_or_lost_is_not_believed() {
    for place in KEPT {
        let dir = place.dir();
        let store = Store::open(place.config(dir.path(), 64 << 20)).expect("open");
        for n in 0..40 {
            insert(&store, n);
        }
        drop(store);
        open_file(dir.path(), "data").set_len(20 * SEGMENT_BYTES as u64).expect("cut");
        let store = Store::open(place.config(dir.path(), 64 << 20)).expect("reopen");
        assert_eq!(served(&store, 0..40).len(), 20, "{place:?}");
        drop(store);
        std::fs::remove_file(dir.path().join("data")).expect("lose");
        let store = Store::open(place.config(dir.path(), 64 << 20)).expect("reopen");
        assert!(served(&store, 0..40).is_empty(), "{place:?}");
    }
}

/// Kills its process on drop, so that a failing test leaves none.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Both fail only when the child is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const CHILD_DIR: &str = "EFC_TEST_STORE_DIR";
const CHILD_QUOTA: u64 = 24 << 20;

/// What the child does until it is killed: inserts 300 keys round and round into room for about 160, and says how far it is.
fn insert_forever(dir: &Path) {
    let store = Store::open(Place::Disk.config(dir, CHILD_QUOTA)).expect("child opens");
    for n in (0..300).cycle() {
        if n % 17 == 0 {
            store.remove(&key(n / 2));
        }
        insert(&store, n);
        println!("\ninserted {n}");
    }
}

#[test]
fn kill_9_in_mid_insert_leaves_a_cache_that_opens_and_is_right() {
    if let Some(dir) = std::env::var_os(CHILD_DIR) {
        return insert_forever(Path::new(&dir));
    }
    let dir = Place::Disk.dir();
    for round in 0..6 {
        let name = "store::restart::kill_9_in_mid_insert_leaves_a_cache_that_opens_and_is_right";
        let child = Command::new(std::env::current_exe().expect("own path"))
            .args(["--exact", name, "--nocapture"])
            .env(CHILD_DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .expect("child");
        let mut child = Killed(child);
        let out = BufReader::new(child.0.stdout.take().expect("stdout"));
        let lines = out.lines().map_while(std::result::Result::ok).filter(|l| l.starts_with("inserted "));
        assert_eq!(lines.take(150 + 61 * round).count(), 150 + 61 * round, "the child ended by itself");
        child.0.kill().expect("kill -9");
        child.0.wait().expect("reap");
        let store = Store::open(Place::Disk.config(dir.path(), CHILD_QUOTA)).expect("reopen");
        let stats = store.stats();
        assert_eq!(stats.corrupt, 0, "round {round}");
        assert_eq!(served(&store, 0..300).len() as u64, stats.tiers[0].segments, "round {round}: a wrong byte");
        assert!(stats.tiers[0].segments > 80 && used(&store) <= CHILD_QUOTA, "round {round}: {stats:?}");
        let files = ["data", "index"].map(|f| std::fs::File::open(dir.path().join(f)).expect(f));
        files.iter().for_each(|f| f.sync_all().expect("sync"));
        let (on_disk, counted) = (occupied(dir.path()), used(&store));
        assert!(on_disk <= counted + 65_536, "round {round}: {on_disk} on disk, {counted} counted: orphans");
    }
}

/// A tmpfs of its own, unmounted on drop.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new(bytes: u64) -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let options = std::ffi::CString::new(format!("size={bytes}")).expect("options");
        rustix::mount::mount("tmpfs", dir.path(), "tmpfs", rustix::mount::MountFlags::empty(), options.as_c_str())
            .expect("mounting a tmpfs needs root, as all tests of mounts do");
        Mounted(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.path(), rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn a_file_system_smaller_than_the_quota_costs_one_bypass_and_then_eviction() {
    let fs = Mounted::new(8 << 20);
    let store = Store::open(Place::Disk.config(&fs.path().join("cache"), 64 << 20)).expect("open");
    let mut reasons = Vec::new();
    for n in 0..300 {
        // As a reader would: ask first, so that a later round is preferred to what nobody asks for.
        if store.get(&key(n)).is_none()
            && let Inserted::Bypassed(r) = insert(&store, n)
        {
            reasons.push(r);
        }
        assert!(n < 300 && !store.stats().tiers[0].ejected, "ejected at {n}");
    }
    assert!(reasons.contains(&BypassReason::IoError), "it was full");
    let failed = reasons.iter().filter(|r| **r == BypassReason::IoError).count();
    assert!(failed < 10, "{failed} of {} failed", reasons.len());
    assert_eq!(served(&store, 0..300).len() as u64, store.stats().tiers[0].segments);
    assert!(served(&store, 0..300).len() > 30);
}

#[test]
fn a_full_file_system_is_ejected_and_memory_serves_on() {
    let fs = Mounted::new(8 << 20);
    let mut config = Place::Memfd.config(fs.path(), 16 << 20);
    config.disks = Place::Disk.config(&fs.path().join("cache"), 64 << 20).disks;
    let store = Store::open(config.clone()).expect("open");
    std::fs::write(fs.path().join("others"), content(1, 6 << 20)).expect("half");
    // The rest to the last page: the write that fails is the point.
    let rest = std::fs::write(fs.path().join("more"), content(1, 8 << 20));
    assert!(rest.is_err_and(|e| e.kind() == std::io::ErrorKind::StorageFull));
    for n in 0..40 {
        assert!(matches!(insert(&store, n), Inserted::Stored(s) if is_right(&s, n)), "{n}");
        store.flush();
    }
    let stats = store.stats();
    assert!(stats.tiers[1].ejected && !stats.tiers[0].ejected, "{stats:?}");
    assert_eq!(served(&store, 20..40).len(), 20);
    drop(store);
    std::fs::remove_dir_all(fs.path().join("cache")).expect("remove");
    std::fs::write(fs.path().join("more2"), content(1, 1 << 20)).expect_err("still full");
    let store = Store::open(config).expect("a full disk is left out");
    assert!(store.stats().tiers[1].ejected && matches!(insert(&store, 1), Inserted::Stored(_)));
}

#[test]
fn configurations_that_cannot_work_are_refused_with_a_cure() {
    let dir = Place::Disk.dir();
    let message = |config: StoreConfig| match Store::open(config) {
        Ok(_) => panic!("opened"),
        Err(e) => (e.kind(), e.to_string()),
    };
    assert!(message(StoreConfig::default()).1.contains("no tier"));
    let (kind, text) = message(Place::Disk.config(dir.path(), 1 << 20));
    assert!(kind == Kind::Invalid && text.contains("4 MiB"), "{text}");
    std::fs::write(dir.path().join("file"), b"x").expect("write");
    let (_, text) = message(Place::Disk.config(&dir.path().join("file/below"), 8 << 20));
    assert!(text.contains("file/below"), "{text}");
    let first = Store::open(Place::Disk.config(dir.path(), 8 << 20)).expect("open");
    let (kind, text) = message(Place::Disk.config(dir.path(), 8 << 20));
    assert!(kind == Kind::Busy && text.contains("another worker"), "{text}");
    drop(first);
    assert!(Store::open(Place::Disk.config(dir.path(), 8 << 20)).is_ok());
}
