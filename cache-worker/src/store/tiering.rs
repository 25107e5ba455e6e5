//! Tests of memory above disks, and of what the store costs.

use super::slab::SlabSpec;
use super::suite::*;
use super::*;

fn two_tiers(dir: &std::path::Path, memory: u64, disk: u64) -> StoreConfig {
    let mut config = Place::Memfd.config(dir, memory);
    config.disks = Place::Disk.config(dir, disk).disks;
    config
}

fn tier_of(store: &Store, n: u64) -> Option<Tier> {
    store.get(&key(n)).map(|s| {
        assert!(is_right(&s, n), "{n}");
        s.tier()
    })
}

#[test]
fn what_memory_takes_is_on_disk_soon_and_survives_the_process() {
    let dir = Place::Disk.dir();
    let store = Store::open(two_tiers(dir.path(), 16 << 20, 128 << 20)).expect("open");
    for n in 0..200 {
        insert(&store, n);
        // The writer keeps up, as it does when the origin is slower than the disk.
        if n % 4 == 3 {
            store.flush();
        }
    }
    store.flush();
    let stats = store.stats();
    assert_eq!((stats.tiers[1].segments, stats.bypassed), (200, 0), "{stats:?}");
    assert!(stats.tiers.iter().all(|t| t.used_bytes <= t.capacity_bytes));
    assert!((0..200).all(|n| tier_of(&store, n).is_some()));
    drop(store);
    let store = Store::open(two_tiers(dir.path(), 16 << 20, 128 << 20)).expect("reopen");
    assert!((0..200).all(|n| tier_of(&store, n) == Some(Tier::Disk(0))));
}

#[test]
fn a_disk_writer_that_is_behind_loses_nothing_and_memory_keeps_its_quota() {
    let dir = Place::Disk.dir();
    let config = two_tiers(dir.path(), 8 << 20, 256 << 20);
    let store = Store::open(config.clone()).expect("open");
    // About 70 MiB as fast as it goes, through 8 MiB of memory.
    for n in 0..400 {
        assert!(matches!(insert(&store, n), Inserted::Stored(s) if is_right(&s, n)), "{n}");
        assert!(store.stats().tiers[0].used_bytes <= 8 << 20);
    }
    store.flush();
    assert_eq!(store.stats().bypassed, 0, "{:?}", store.stats());
    drop(store);
    let store = Store::open(config).expect("reopen");
    assert_eq!((0..400).filter(|n| tier_of(&store, *n) != Some(Tier::Disk(0))).count(), 0);
}

#[test]
fn a_burst_that_fits_memory_reaches_the_disk_in_the_end() {
    let dir = Place::Disk.dir();
    let store = Store::open(two_tiers(dir.path(), 32 << 20, 64 << 20)).expect("open");
    // About 20 MiB at once; the queue holds 4 MiB.
    (0..110).for_each(|n| assert!(matches!(insert(&store, n), Inserted::Stored(_))));
    store.flush();
    let stats = store.stats();
    assert_eq!((stats.tiers[0].segments, stats.tiers[1].segments, stats.bypassed), (110, 110, 0), "{stats:?}");
}

#[test]
fn a_disk_entry_comes_up_on_its_second_hit() {
    let dir = Place::Disk.dir();
    let config = two_tiers(dir.path(), 16 << 20, 64 << 20);
    let store = Store::open(config.clone()).expect("open");
    insert(&store, 1);
    insert(&store, 2);
    store.flush();
    drop(store);
    let store = Store::open(config).expect("reopen");
    let on_disk = Some(Tier::Disk(0));
    assert_eq!((tier_of(&store, 1), tier_of(&store, 2)), (on_disk, on_disk));
    store.flush();
    assert_eq!(tier_of(&store, 1), on_disk, "one hit is not enough");
    store.flush();
    assert_eq!(tier_of(&store, 1), Some(Tier::Memory));
    assert!(store.get(&key(1)).expect("promoted").sendable());
    assert!(store.remove(&key(1)) && tier_of(&store, 1).is_none(), "removed from both");
}

#[test]
fn a_scan_over_the_disk_does_not_churn_memory() {
    let dir = Place::Disk.dir();
    let store = Store::open(two_tiers(dir.path(), 8 << 20, 128 << 20)).expect("open");
    let bytes = content(1, 16 << 10);
    let sums = efc_common::checksum::granule_sums(&bytes);
    let pass = || {
        let mut memory_hits = 0;
        for n in 0..2048 {
            match store.get(&key(n)) {
                Some(s) => memory_hits += (s.tier() == Tier::Memory) as u32,
                None => {
                    store.insert(key(n), std::slice::from_ref(&bytes), &sums, InsertOptions::default());
                }
            }
            if n % 32 == 0 {
                store.flush();
            }
        }
        memory_hits as f64 / 2048.0
    };
    (0..3).for_each(|_| {
        pass();
    });
    let before = store.stats().evictions;
    // Memory holds 7 of 32 MiB; the rest of its quota is the disk writer's.
    let rates: Vec<f64> = (0..4).map(|_| pass()).collect();
    let moved = store.stats().evictions - before;
    assert!(rates.iter().all(|r| *r >= 0.8 * 7.0 / 32.0), "{rates:?}");
    assert!(moved < 4 * 2048 / 10, "{moved} entries moved in 4 passes");
}

#[test]
fn a_full_disk_does_not_take_what_it_would_throw_out_again() {
    let dir = Place::Disk.dir();
    let store = Store::open(Place::Disk.config(dir.path(), 8 << 20)).expect("open");
    let whole: Vec<u64> = (0..2000).filter(|n| len_of(*n) == SEGMENT_BYTES as usize).take(120).collect();
    for _ in 0..3 {
        for n in &whole {
            if store.get(&key(*n)).is_none() {
                insert(&store, *n);
            }
        }
    }
    let stats = store.stats();
    assert!(stats.evictions < 20, "{} segments written for nothing", stats.evictions);
    assert!(stats.bypassed > 200, "{stats:?}");
}

#[test]
fn removed_keys_do_not_come_back_from_the_writer() {
    let dir = Place::Disk.dir();
    let store = Store::open(two_tiers(dir.path(), 32 << 20, 64 << 20)).expect("open");
    for round in 0..20 {
        for n in 0..8 {
            insert(&store, n);
        }
        if round % 2 == 0 {
            (0..8).for_each(|n| assert!(store.remove(&key(n))));
        } else {
            store.evict_all();
        }
        store.flush();
        assert!((0..8).all(|n| !store.contains(&key(n))), "round {round}");
    }
    store.stats();
    assert!(used(&store) < 300_000, "{}", used(&store));
}

#[test]
fn pins_live_on_disk_when_there_is_one() {
    let dir = Place::Disk.dir();
    let store = Store::open(two_tiers(dir.path(), 4 << 20, 64 << 20)).expect("open");
    for n in 0..60 {
        assert!(
            matches!(insert_with(&store, n, InsertOptions { pinned: true, ttl: None }), Inserted::Stored(_)),
            "{n}"
        );
    }
    insert(&store, 100);
    store.flush();
    assert!(store.pin(&key(100), true) && store.pin(&key(3), false));
    store.evict_all();
    let left: Vec<u64> = (0..128).filter(|n| tier_of(&store, *n).is_some()).collect();
    assert_eq!(left, (0..60).filter(|n| *n != 3).chain([100]).collect::<Vec<_>>());
    assert_eq!(store.stats().tiers[0].pinned_bytes, 0);
}

#[test]
fn keys_are_shared_out_over_disks_by_quota_and_one_dead_disk_is_only_its_part() {
    let (a, b) = (Place::Disk.dir(), Place::Disk.dir());
    let mut config = Place::Disk.config(a.path(), 64 << 20);
    config.disks.extend(Place::Disk.config(b.path(), 32 << 20).disks);
    let store = Store::open(config.clone()).expect("open");
    for n in 0..200 {
        insert(&store, n);
    }
    let parts: Vec<u64> = store.stats().tiers.iter().map(|t| t.segments).collect();
    assert!(parts[0] + parts[1] == 200 && (110..160).contains(&parts[0]), "{parts:?}");
    drop(store);
    // A file where the second disk's directory should be readable: an index that is a directory cannot be opened.
    std::fs::remove_file(b.path().join("index")).expect("remove");
    std::os::unix::fs::symlink("index", b.path().join("index")).expect("a link to itself");
    let store = Store::open(config).expect("opens without it");
    let stats = store.stats();
    assert!(!stats.tiers[0].ejected && stats.tiers[1].ejected && stats.tiers[0].segments == parts[0], "{stats:?}");
    for n in 0..200 {
        assert!(store.get(&key(n)).is_some() || matches!(insert(&store, n), Inserted::Stored(_)), "{n}");
    }
}

#[test]
fn the_table_takes_at_most_256_bytes_a_segment() {
    for count in [10_000u32, 100_000, 230_000, 300_000] {
        let spec = SlabSpec {
            tier: Tier::Memory,
            name: "memory".into(),
            quota: 1 << 40,
            reserve: 0,
            policy: Policy::ScanResistant,
            whole: None,
            data: tempfile::tempfile().expect("file"),
            index: None,
            share: None,
            clock: Arc::new(Clock::new()),
            counters: Arc::new(Counters::new()),
        };
        let slab = Slab::new(spec);
        let record = |n: u32| index::Record {
            key: key(n as u64),
            len: SEGMENT_BYTES,
            pinned: false,
            generation: n as u64,
            expires_ms: 0,
            sums: [n; 16],
        };
        let records: Vec<_> = (0..count).map(|n| (n, record(n))).collect();
        slab.adopt(&records, count);
        // Requests for eight times as many keys, so that the sketch has grown to its limit.
        (0..count).for_each(|n| assert!(slab.get(&key(n as u64)).is_some()));
        (count..count * 8).for_each(|n| slab.seen(&key(n as u64)));
        let each = slab.memory_bytes() as f64 / count as f64;
        println!("{count} segments: {each:.0} bytes of table, policy and checksums each");
        assert!(each <= 256.0, "{each}");
    }
}
