//! One suite over every kind of tier, against real files: a memfd, a directory on tmpfs, a directory on disk.

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::path::Path;

use efc_common::block::GRANULE_BYTES;
use efc_common::checksum::granule_sums;
use proptest::prelude::*;

use super::*;

/// Where the tier under test is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Memfd,
    Tmpfs,
    Disk,
}

pub(super) const PLACES: [Place; 3] = [Place::Memfd, Place::Tmpfs, Place::Disk];

impl Place {
    /// A directory that goes away with its guard.
    pub(super) fn dir(self) -> tempfile::TempDir {
        match self {
            Place::Tmpfs => tempfile::tempdir_in("/dev/shm").expect("tmpfs"),
            // Beside the test program: /tmp may be tmpfs.
            _ => {
                let exe = std::env::current_exe().expect("own path");
                tempfile::tempdir_in(exe.parent().expect("a directory")).expect("disk")
            }
        }
    }

    pub(super) fn config(self, dir: &Path, quota_bytes: u64) -> StoreConfig {
        let path = dir.to_path_buf();
        match self {
            Place::Memfd => StoreConfig { memory: Some(MemoryTier { quota_bytes, path: None }), ..Default::default() },
            Place::Tmpfs => {
                StoreConfig { memory: Some(MemoryTier { quota_bytes, path: Some(path) }), ..Default::default() }
            }
            Place::Disk => StoreConfig { disks: vec![DiskTier { path, quota_bytes }], ..Default::default() },
        }
    }
}

pub(super) fn key(n: u64) -> SegmentKey {
    SegmentKey { content: ContentId::of(&[&(n / 64).to_le_bytes()]), index: (n % 64) as u32 }
}

/// The bytes that belong under key `n`: they depend on the key and on every position.
pub(super) fn content(n: u64, len: usize) -> Bytes {
    let mut x = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        out.extend_from_slice(&x.to_le_bytes());
    }
    out.truncate(len);
    out.into()
}

/// A length for key `n`: small files, odd lengths and whole segments.
pub(super) fn len_of(n: u64) -> usize {
    let n = n.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40;
    match n % 4 {
        0 => 1 + n as usize % 5000,
        1 => 1 + n as usize % SEGMENT_BYTES as usize,
        _ => SEGMENT_BYTES as usize,
    }
}

pub(super) fn insert_with(store: &Store, n: u64, options: InsertOptions) -> Inserted {
    let bytes = content(n, len_of(n));
    // In two pieces, cut at an odd place.
    let cut = bytes.len() / 3;
    store.insert(key(n), &[bytes.slice(..cut), bytes.slice(cut..)], &granule_sums(&bytes), options)
}

pub(super) fn insert(store: &Store, n: u64) -> Inserted {
    insert_with(store, n, InsertOptions::default())
}

pub(super) fn is_right(segment: &Segment, n: u64) -> bool {
    let want = content(n, len_of(n));
    segment.key() == key(n) && segment.read(0..segment.len()).is_ok_and(|got| got == want)
}

pub(super) fn used(store: &Store) -> u64 {
    store.stats().tiers.iter().map(|t| t.used_bytes).sum()
}

/// What the file system says the files of a tier take.
pub(super) fn occupied(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::read_dir(dir).expect("dir").map(|f| f.and_then(|f| f.metadata()).expect("file").blocks() * 512).sum()
}

#[test]
fn what_goes_in_comes_out() {
    for place in PLACES {
        let dir = place.dir();
        let store = Store::open(place.config(dir.path(), 64 << 20)).expect("open");
        assert!(store.get(&key(0)).is_none());
        for n in 0..50 {
            assert!(matches!(insert(&store, n), Inserted::Stored(s) if is_right(&s, n)), "{place:?} {n}");
        }
        for n in 0..50 {
            let s = store.get(&key(n)).expect("stored");
            assert!(is_right(&s, n) && s.sums() == granule_sums(&content(n, len_of(n))), "{place:?} {n}");
            let want = content(n, len_of(n));
            let g = GRANULE_BYTES as usize;
            for (from, to) in [(0, 1), (want.len() / 2, want.len()), (want.len().min(g) - 1, want.len().min(g + 1))] {
                assert_eq!(s.read(from as u32..to as u32).expect("read"), want[from..to], "{place:?} {n} {from}..{to}");
            }
            assert!(s.read(0..s.len() + 1).is_err_and(|e| e.is(Kind::Invalid)));
            assert_eq!(s.read(5.min(s.len())..5.min(s.len())).expect("empty"), Bytes::new());
            let (file, offset) = s.file();
            let mut raw = vec![0; want.len()];
            assert_eq!(rustix::io::pread(file, &mut raw[..], offset), Ok(want.len()));
            assert_eq!(raw, want, "{place:?} {n}: the raw file");
        }
        let stats = store.stats();
        assert_eq!((stats.tiers[0].segments, stats.hits, stats.misses), (50, 50, 1), "{place:?}");
        assert!(store.contains(&key(7)) && store.remove(&key(7)) && !store.remove(&key(7)) && !store.contains(&key(7)));
        assert!(matches!(
            store.insert(key(99), &[], &[], InsertOptions::default()),
            Inserted::Bypassed(BypassReason::Malformed)
        ));
        let long = content(1, SEGMENT_BYTES as usize + 1);
        let inserted =
            store.insert(key(99), std::slice::from_ref(&long), &granule_sums(&long), InsertOptions::default());
        assert!(matches!(inserted, Inserted::Bypassed(BypassReason::Malformed)));
    }
}

#[test]
fn small_entries_cost_their_size_and_evicted_room_goes_back_to_the_file_system() {
    for place in [Place::Tmpfs, Place::Disk] {
        let dir = place.dir();
        let store = Store::open(place.config(dir.path(), 16 << 20)).expect("open");
        let small = content(1, 100);
        for n in 0..1000 {
            let done =
                store.insert(key(n), std::slice::from_ref(&small), &granule_sums(&small), InsertOptions::default());
            assert!(matches!(done, Inserted::Stored(_)));
        }
        let stats = &store.stats().tiers[0];
        assert!(stats.used_bytes >= 1000 * 4096 && stats.used_bytes < 1000 * 4096 + 200_000, "{place:?} {stats:?}");
        sync(dir.path());
        assert!(occupied(dir.path()) <= stats.used_bytes + 65_536, "{place:?} {} {stats:?}", occupied(dir.path()));
        assert_eq!(store.evict_all(), 1000);
        assert!(used(&store) < 200_000, "{place:?} {}", used(&store));
        sync(dir.path());
        assert!(occupied(dir.path()) < 300_000, "{place:?} {}", occupied(dir.path()));
    }
}

/// Lets a file system that allocates late allocate.
fn sync(dir: &Path) {
    for f in std::fs::read_dir(dir).expect("dir") {
        std::fs::File::open(f.expect("entry").path()).and_then(|f| f.sync_all()).expect("sync");
    }
}

#[test]
fn entries_expire_by_our_clock_unless_pinned() {
    for place in PLACES {
        let dir = place.dir();
        let config = StoreConfig { ttl: Some(Duration::from_secs(60)), ..place.config(dir.path(), 16 << 20) };
        let store = Store::open(config).expect("open");
        insert(&store, 1);
        insert_with(&store, 2, InsertOptions { pinned: true, ttl: None });
        insert_with(&store, 3, InsertOptions { pinned: false, ttl: Some(Duration::from_secs(600)) });
        store.tiers.clock.ahead_ms.store(59_000, Relaxed);
        assert!((1..4).all(|n| store.get(&key(n)).is_some()), "{place:?}");
        store.tiers.clock.ahead_ms.store(61_000, Relaxed);
        let found: Vec<_> = (1..4).filter(|n| store.get(&key(*n)).is_some()).collect();
        assert_eq!(found, [2, 3], "{place:?}");
        assert!(matches!(insert(&store, 1), Inserted::Stored(s) if is_right(&s, 1)), "{place:?}");
    }
}

#[test]
fn pinned_entries_stay_and_are_listed() {
    for place in PLACES {
        let dir = place.dir();
        let store = Store::open(place.config(dir.path(), 8 << 20)).expect("open");
        for n in 0..8 {
            insert_with(&store, n, InsertOptions { pinned: n % 2 == 0, ttl: None });
        }
        assert!(store.pin(&key(1), true) && store.pin(&key(0), false) && !store.pin(&key(60), true));
        for n in 64..400 {
            insert(&store, n);
        }
        let want = [1, 2, 4, 6];
        let pinned: Vec<_> =
            store.content_segments(key(0).content, 1 << 40).into_iter().filter(|s| s.pinned).map(|s| s.index).collect();
        assert_eq!(pinned, want, "{place:?}");
        store.evict_all();
        let left: Vec<_> =
            store.content_segments(key(0).content, 64 * SEGMENT_BYTES as u64).iter().map(|s| s.index).collect();
        assert_eq!(left, want, "{place:?}");
        assert!(want.iter().all(|n| is_right(&store.get(&key(*n as u64)).expect("pinned"), *n as u64)));
        let bytes: u64 = want.iter().map(|n| table::cost(len_of(*n as u64) as u32)).sum();
        assert_eq!(store.stats().tiers[0].pinned_bytes, bytes, "{place:?}");
    }
}

#[test]
fn when_everything_is_pinned_or_held_inserts_are_bypassed() {
    for place in PLACES {
        let dir = place.dir();
        let store = Store::open(place.config(dir.path(), 4 << 20)).expect("open");
        let whole: Vec<u64> = (0..200).filter(|n| len_of(*n) == SEGMENT_BYTES as usize).collect();
        let mut held = Vec::new();
        for n in &whole[..30] {
            if let Inserted::Stored(s) = insert(&store, *n) {
                held.push((*n, s));
            }
        }
        assert!(held.len() >= 12, "{place:?} {}", held.len());
        assert!(matches!(
            insert(&store, whole[40]),
            Inserted::Bypassed(BypassReason::Busy | BypassReason::NotAdmitted)
        ));
        assert!(used(&store) <= 4 << 20);
        assert!(held.iter().all(|(n, s)| is_right(s, *n) && store.contains(&key(*n))), "{place:?}");
        held.clear();
        assert!(matches!(
            insert_with(&store, whole[41], InsertOptions { pinned: true, ttl: None }),
            Inserted::Stored(_)
        ));
        for n in &whole[50..90] {
            insert_with(&store, *n, InsertOptions { pinned: true, ttl: None });
        }
        assert!(matches!(insert(&store, whole[100]), Inserted::Bypassed(BypassReason::Busy)), "{place:?}");
    }
}

#[test]
fn a_guard_outlives_eviction_and_its_room_is_counted_until_it_goes() {
    for place in PLACES {
        let dir = place.dir();
        let store = Store::open(place.config(dir.path(), 8 << 20)).expect("open");
        insert(&store, 3);
        let guard = store.get(&key(3)).expect("stored");
        let before = used(&store);
        assert!(store.remove(&key(3)) && store.get(&key(3)).is_none());
        assert_eq!(used(&store), before, "{place:?}: counted while a guard reads it");
        for n in 64..300 {
            insert(&store, n);
        }
        assert!(is_right(&guard, 3), "{place:?}");
        let full = store.evict_all();
        assert!(full > 0 && used(&store) >= table::cost(guard.len()));
        drop(guard);
        assert!(used(&store) < before, "{place:?}");
    }
}

#[test]
fn bytes_in_flight_in_a_socket_survive_the_reuse_of_their_slot() {
    for place in PLACES {
        let dir = place.dir();
        let store = Store::open(place.config(dir.path(), 4 << 20)).expect("open");
        let n = (0..).find(|n| len_of(*n) == SEGMENT_BYTES as usize).expect("a whole one");
        insert(&store, n);
        let (mut from, to) = std::os::unix::net::UnixStream::pair().expect("pair");
        rustix::net::sockopt::set_socket_send_buffer_size(&to, 4 << 20).expect("buffer");
        let sent = {
            let s = store.get(&key(n)).expect("stored");
            let (file, mut offset) = s.file();
            to.set_nonblocking(true).expect("nonblocking");
            rustix::fs::sendfile(&to, file, Some(&mut offset), s.len() as usize).expect("sendfile")
        };
        assert!(sent >= 65_536, "{sent}");
        store.evict_all();
        for n in 64..200 {
            insert(&store, n);
        }
        let mut got = vec![0; sent];
        std::io::Read::read_exact(&mut from, &mut got).expect("read");
        assert!(got == content(n, len_of(n))[..sent], "{place:?}: pages under a socket changed");
    }
}

#[test]
fn readers_and_writers_at_once_see_only_right_bytes() {
    for place in PLACES {
        let dir = place.dir();
        let store = Store::open(place.config(dir.path(), 8 << 20)).expect("open");
        let hits = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for t in 0..4u64 {
                let (store, hits) = (&store, &hits);
                scope.spawn(move || {
                    let mut held = std::collections::VecDeque::new();
                    for i in 0..600u64 {
                        // 100 keys of about 14 MiB in a tier of 8 MiB.
                        let n = (i * 7 + t * 13 + i * i % 5) % 100;
                        match store.get(&key(n)) {
                            Some(s) => {
                                hits.fetch_add(1, Relaxed);
                                held.push_back((n, s));
                            }
                            None => {
                                insert(store, n);
                            }
                        }
                        if i % 50 == 0 {
                            store.remove(&key((n + 1) % 100));
                        }
                        if held.len() > 5 {
                            let (n, s) = held.pop_front().expect("not empty");
                            assert!(is_right(&s, n), "{place:?}: {n}");
                        }
                        if i % 100 == 0 {
                            assert!(used(store) <= 8 << 20, "{place:?}: over quota");
                        }
                    }
                });
            }
        });
        assert!(hits.load(Relaxed) > 100 && store.stats().corrupt == 0, "{place:?}");
        let entries = store.stats().tiers[0].segments;
        assert_eq!(store.evict_all(), entries);
        assert!(used(&store) < 200_000, "{place:?}: {} bytes lost", used(&store));
    }
}

#[derive(Debug, Clone)]
enum Op {
    Insert(u64, bool),
    Get(u64),
    Hold(u64),
    Release,
    Remove(u64),
    Pin(u64, bool),
    EvictAll,
    /// To so many MiB.
    Resize(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let n = 0u64..60;
    prop_oneof![
        8 => (n.clone(), prop::bool::weighted(0.05)).prop_map(|(n, p)| Op::Insert(n, p)),
        6 => n.clone().prop_map(Op::Get),
        2 => n.clone().prop_map(Op::Hold),
        2 => Just(Op::Release),
        1 => n.clone().prop_map(Op::Remove),
        1 => (n, any::<bool>()).prop_map(|(n, p)| Op::Pin(n, p)),
        1 => (5u64..9).prop_map(Op::Resize),
        1 => prop::bool::weighted(0.2).prop_map(|b| if b { Op::EvictAll } else { Op::Release }),
    ]
}

#[test]
fn a_tier_takes_another_size_while_it_serves() {
    for place in PLACES {
        let dir = place.dir();
        let config = place.config(dir.path(), 16 << 20);
        let is_memory = config.memory.is_some();
        let store = Store::open(config).expect("open");
        let resize = |bytes: u64| store.resize(is_memory.then_some(bytes), (!is_memory).then_some(bytes));
        let kept = || (0..200).filter(|n| store.get(&key(*n)).is_some_and(|s| is_right(&s, *n))).count();
        (0..200).for_each(|n| drop(insert(&store, n)));
        let before = kept();
        resize(4 << 20).expect("smaller");
        assert!(used(&store) <= 4 << 20, "{place:?}: {}", used(&store));
        let small = kept();
        assert!(small > 0 && small < before / 2, "{place:?}: {small} of {before}");
        resize(64 << 20).expect("larger");
        (0..200).for_each(|n| drop(insert(&store, n)));
        assert_eq!(kept(), 200, "{place:?}");
        // What makes no sense changes nothing.
        assert!(resize(1 << 20).is_err_and(|e| e.is(Kind::Invalid)));
        let other = store.resize((!is_memory).then_some(64 << 20), is_memory.then_some(64 << 20));
        assert!(other.is_err_and(|e| e.is(Kind::Invalid) && e.message().contains("has no")));
        assert_eq!((kept(), store.stats().tiers[0].capacity_bytes), (200, 64 << 20));
    }
}

/// Runs operations against a store and a model that knows which keys may be there and which must.
fn check_against_model(place: Place, policy: Policy, ops: Vec<Op>) -> std::result::Result<(), TestCaseError> {
    let mut quota: u64 = 5 << 20;
    let dir = place.dir();
    let config = StoreConfig { policy, ..place.config(dir.path(), quota) };
    let is_memory = config.memory.is_some();
    let store = Store::open(config).expect("open");
    // true = pinned, so it must be there.
    let mut model: HashMap<u64, bool> = HashMap::new();
    let mut held: Vec<(u64, Segment)> = Vec::new();
    for op in ops {
        match op {
            Op::Insert(n, pinned) => match insert_with(&store, n, InsertOptions { pinned, ttl: None }) {
                Inserted::Stored(s) => {
                    prop_assert!(is_right(&s, n));
                    let was =
                        store.content_segments(key(n).content, 1 << 40).into_iter().find(|i| i.index == key(n).index);
                    model.insert(n, was.is_some_and(|i| i.pinned));
                    prop_assert!(!pinned || model[&n], "asked to pin {n}");
                }
                Inserted::Bypassed(_) => prop_assert!(model.get(&n) != Some(&true), "pinned and yet bypassed"),
            },
            Op::Get(n) | Op::Hold(n) => match store.get(&key(n)) {
                Some(s) => {
                    prop_assert!(
                        model.contains_key(&n) && is_right(&s, n),
                        "{n} is there and should not be, or is wrong"
                    );
                    if matches!(op, Op::Hold(_)) && held.len() < 4 {
                        held.push((n, s));
                    }
                }
                None => prop_assert!(model.remove(&n) != Some(true), "{n} was pinned and is gone"),
            },
            Op::Release => {
                if let Some((n, s)) = held.pop() {
                    prop_assert!(is_right(&s, n), "held bytes of {n} changed");
                }
            }
            Op::Remove(n) => {
                store.remove(&key(n));
                model.remove(&n);
            }
            Op::Pin(n, pinned) => {
                if store.pin(&key(n), pinned) {
                    prop_assert!(model.insert(n, pinned).is_some());
                } else {
                    prop_assert!(model.remove(&n) != Some(true));
                }
            }
            Op::EvictAll => {
                store.evict_all();
                model.retain(|_, pinned| *pinned);
            }
            Op::Resize(mib) => {
                quota = mib << 20;
                // What is held may be more than the tier that shrinks.
                held.clear();
                store.resize(is_memory.then_some(quota), (!is_memory).then_some(quota)).expect("resize");
                prop_assert_eq!(store.stats().tiers[0].capacity_bytes, quota);
            }
        }
        // What was pinned in a larger tier stays.
        let most = quota.max(store.stats().tiers[0].pinned_bytes + (1 << 20));
        prop_assert!(used(&store) <= most, "over quota: {}", used(&store));
    }
    prop_assert!(held.iter().all(|(n, s)| is_right(s, *n)));
    prop_assert!(model.iter().filter(|(_, p)| **p).all(|(n, _)| store.get(&key(*n)).is_some_and(|s| is_right(&s, *n))));
    prop_assert_eq!(store.stats().corrupt, 0);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn a_store_agrees_with_a_naive_model(
        place in prop::sample::select(&PLACES[..]),
        policy in prop::sample::select(vec![Policy::ScanResistant, Policy::Arc, Policy::Lru]),
        ops in prop::collection::vec(op(), 1..200)
    ) {
        check_against_model(place, policy, ops)?;
    }
}

/// A pass over 4 times the quota through a real store, for every policy.
#[test]
fn an_epoch_scan_over_four_times_the_quota_keeps_its_hit_rate() {
    println!("hit rate of passes 3 to 6 over 4 times the quota, 4 KiB segments, memfd (best possible: 0.25)");
    for policy in [Policy::ScanResistant, Policy::Arc, Policy::Lru] {
        let dir = Place::Memfd.dir();
        let store = Store::open(StoreConfig { policy, ..Place::Memfd.config(dir.path(), 8 << 20) }).expect("open");
        let bytes = content(1, 4096);
        let sums = granule_sums(&bytes);
        let mut before = 0;
        for pass in 0..6 {
            if pass == 2 {
                before = store.stats().hits;
            }
            for n in 0..8192 {
                if store.get(&key(n)).is_none() {
                    store.insert(key(n), std::slice::from_ref(&bytes), &sums, InsertOptions::default());
                }
            }
        }
        let rate = (store.stats().hits - before) as f64 / (4.0 * 8192.0);
        println!("{:<16} {rate:.3}", format!("{policy:?}"));
        match policy {
            Policy::ScanResistant => assert!(rate >= 0.8 * 0.25, "{rate}"),
            Policy::Lru => assert!(rate < 0.05, "{rate}"),
            Policy::Arc => {}
        }
    }
}

#[test]
fn a_failing_disk_is_bypassed_and_then_ejected_and_never_an_error() {
    let dir = Place::Disk.dir();
    let store = Store::open(Place::Disk.config(dir.path(), 16 << 20)).expect("open");
    insert(&store, 1);
    let held = store.get(&key(1)).expect("stored");
    // Under the store's descriptor the file becomes one that cannot be written and reads as empty.
    let null = std::fs::File::open("/dev/null").expect("null");
    let fd = held.file().0.as_raw_fd();
    // SAFETY: both descriptors are open; dup2 closes and replaces `fd` in one step, and its owner keeps owning the number.
    assert_eq!(unsafe { libc::dup2(null.as_raw_fd(), fd) }, fd);
    let reasons: Vec<_> = (10..30)
        .map(|n| match insert(&store, n) {
            Inserted::Bypassed(reason) => reason,
            Inserted::Stored(_) => panic!("stored on a broken disk"),
        })
        .collect();
    assert_eq!(reasons[0], BypassReason::IoError);
    assert_eq!(reasons[19], BypassReason::Ejected);
    assert!(store.stats().tiers[0].ejected && store.get(&key(1)).is_none() && store.stats().bypassed == 20);
    assert!(held.read(0..held.len()).is_err());
}
