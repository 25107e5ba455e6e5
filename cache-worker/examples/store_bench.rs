//! Speed of the cache store alone: `cargo run --release -p efc-worker --example store_bench [DISK_DIR]`.
//! Prints inserts, look-ups and verified reads per second for a memory tier and, with a directory, for a disk tier in it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use efc_common::block::SEGMENT_BYTES;
use efc_common::checksum::granule_sums;
use efc_common::id::{ContentId, SegmentKey};
use efc_worker::store::{DiskTier, InsertOptions, MemoryTier, Policy, Store, StoreConfig};

const MIB: u64 = 1 << 20;

fn key(n: u64) -> SegmentKey {
    SegmentKey { content: ContentId::of(&[&n.to_le_bytes()]), index: 0 }
}

/// Runs `work` on `threads` threads with `count` numbers each, prints the rate.
fn rate(name: &str, threads: u64, count: u64, bytes: usize, work: impl Fn(u64) + Sync) {
    let start = Instant::now();
    std::thread::scope(|s| {
        for t in 0..threads {
            let work = &work;
            s.spawn(move || (t * count..(t + 1) * count).for_each(work));
        }
    });
    let seconds = start.elapsed().as_secs_f64();
    let per_second = (threads * count) as f64 / seconds;
    let mib = per_second * bytes as f64 / MIB as f64;
    println!("{name:<44} {per_second:>12.0} /s {mib:>9.0} MiB/s {:>8.2} us", 1e6 * threads as f64 / per_second);
}

fn measure(name: &str, store: &Arc<Store>, len: usize, count: u64, turnover: u64) {
    let bytes = Bytes::from(vec![0x5a; len]);
    let sums = granule_sums(&bytes);
    let keys: Vec<SegmentKey> = (0..count + 2 * turnover).map(key).collect();
    let insert = |n: u64| {
        store.insert(keys[n as usize], std::slice::from_ref(&bytes), &sums, InsertOptions::default());
    };
    let label = |what: &str| format!("{name} {} KiB: {what}", len >> 10);
    rate(&label("insert into free room"), 1, count, len, insert);
    for threads in [1, 2] {
        rate(&label(&format!("get, {threads} thread(s)")), threads, 2_000_000 / threads, 0, |n| {
            std::hint::black_box(store.get(&keys[(n * 7919 % count) as usize]));
        });
    }
    rate(&label("get + read + verify"), 1, count, len, |n| {
        let segment = store.get(&keys[n as usize]).expect("stored");
        std::hint::black_box(segment.read(0..segment.len()).expect("reads"));
    });
    rate(&label("insert with eviction, 2 threads"), 2, turnover, len, |n| insert(n + count));
}

fn main() {
    let open = |quota_bytes: u64, disk: Option<PathBuf>, policy| {
        let memory = disk.is_none().then_some(MemoryTier { quota_bytes, path: None });
        let disks = disk.map(|path| DiskTier { path, quota_bytes }).into_iter().collect();
        Store::open(StoreConfig { memory, disks, policy, ttl: None }).expect("opens")
    };
    for policy in [Policy::ScanResistant, Policy::Lru] {
        let name = format!("memory {policy:?}");
        measure(&name, &open(1024 * MIB, None, policy), SEGMENT_BYTES as usize, 4000, 4000);
        measure(&name, &open(1024 * MIB, None, policy), 4096, 200_000, 100_000);
    }
    if let Some(dir) = std::env::args().nth(1) {
        let path = PathBuf::from(dir).join("store-bench");
        // LRU, because the default does not write to a full disk what nobody has asked for twice.
        measure("disk Lru", &open(1024 * MIB, Some(path.clone()), Policy::Lru), SEGMENT_BYTES as usize, 4000, 4000);
        std::fs::remove_dir_all(path).expect("removes what it made");
    }
}
