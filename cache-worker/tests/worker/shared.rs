//! A worker's memory read by its neighbours, over a real unix socket with real descriptors.

use crate::support::*;
use bytes::Bytes;
use efc_client::peers::{FileRef, Peers};
use efc_client::wire::{Connection, Endpoint};
use efc_common::block::SEGMENT_BYTES;
use efc_common::id::ContentId;
use efc_common::policy::CachePolicy;
use efc_proto::data;
use efc_proto::frame::Message;
use efc_worker::{Worker, WorkerConfig};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep};

const SEG: u64 = SEGMENT_BYTES as u64;

/// A worker with `bytes` of memory, reachable by its unix socket alone, and its clients.
async fn neighbour(dir: &Path, bytes: u64, origin: &Arc<Origin>) -> (Worker, PathBuf, Peers) {
    let path = dir.join("w.sock");
    let worker = start(WorkerConfig { unix: Some(path.clone()), ..config("w", memory(bytes)) }, origin).await;
    let mut m = member("w0", "127.0.0.1:1");
    (m.unix, m.host) = (path.display().to_string(), efc_client::peers::host_name());
    (worker, path, peers_with(vec![m], options()))
}

fn content(file: &FileRef) -> ContentId {
    ContentId::new(spec("/t").id(), &file.locator, &file.version)
}

fn here(peers: &Peers, file: &FileRef, range: Range<u64>) -> Option<Bytes> {
    peers.read_here(content(file), &range).map(|pieces| pieces.concat().into())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_read_once_is_read_again_without_the_worker_who_hears_of_it_later() {
    let dir = tempfile::tempdir().expect("dir");
    let origin = Origin::new();
    let data = pattern(1, (5 * MIB + 777) as usize);
    let file = origin.put("f", "1", data.clone());
    let (_worker, _, peers) = neighbour(dir.path(), 64 << 20, &origin).await;
    assert!(here(&peers, &file, 0..10).is_none(), "nothing is known of it");
    read(&peers, &file, 0..file.size).await.expect("read");
    let served = |stats: Vec<(_, efc_common::Result<data::CacheStats>)>| {
        let s = stats[0].1.as_ref().expect("stats");
        (s.served_memory_bytes + s.served_origin_bytes, s.hits)
    };
    let before = served(peers.cache_stat().await);
    let ranges =
        [0..1, 16_383..16_385, SEG - 1..SEG + 1, 4 * MIB - 5..4 * MIB + 5, 0..file.size, file.size - 1..file.size];
    let mut sum = 0;
    for r in ranges {
        let got = here(&peers, &file, r.clone()).unwrap_or_else(|| panic!("{r:?} is not known"));
        assert!(got == data.slice(r.start as usize..r.end as usize), "{r:?}");
        sum += r.end - r.start;
    }
    assert_eq!(served(peers.cache_stat().await).0, before.0, "the worker was asked for nothing");
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let now = served(peers.cache_stat().await);
        if now.0 == before.0 + sum {
            // 21 segments of this file, each touched at least once.
            assert!(now.1 >= before.1 + 21, "{now:?} {before:?}");
            break;
        }
        assert!(
            Instant::now() < end && now.0 < before.0 + sum,
            "the worker heard of {} of {sum} bytes",
            now.0 - before.0
        );
        sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(origin.reads.lock().iter().map(|r| r.end - r.start).sum::<u64>(), file.size);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_evicted_is_known_no_more_and_what_took_its_place_is_not_mistaken_for_it() {
    let dir = tempfile::tempdir().expect("dir");
    let origin = Origin::new();
    let (a, b) = (pattern(1, MIB as usize), pattern(2, MIB as usize));
    let (fa, fb) = (origin.put("a", "1", a.clone()), origin.put("b", "1", b.clone()));
    let (_worker, _, peers) = neighbour(dir.path(), 64 << 20, &origin).await;
    read(&peers, &fa, 0..MIB).await.expect("read");
    assert!(here(&peers, &fa, 0..MIB).is_some_and(|got| got == a));
    peers.evict_all().await;
    assert!(here(&peers, &fa, 0..10).is_none());
    read(&peers, &fb, 0..MIB).await.expect("read");
    assert!((0..4).all(|i| here(&peers, &fa, i * SEG..i * SEG + 5000).is_none()));
    assert!(here(&peers, &fb, 0..MIB).is_some_and(|got| got == b));
    assert!(read(&peers, &fa, 0..MIB).await.expect("read").0 == a);
}

/// Memory for an eighth of the data, readers of both kinds at once: every slot changes hands all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_reader_sees_another_segments_bytes_while_slots_change_hands() {
    let dir = tempfile::tempdir().expect("dir");
    let origin = Origin::new();
    let files: Vec<(FileRef, Bytes)> = (0..32)
        .map(|i| {
            let data = pattern(i, (2 * MIB) as usize - 1000 * i as usize);
            (origin.put(&format!("f{i}"), "1", data.clone()), data)
        })
        .collect();
    let files = Arc::new(files);
    let (_worker, _, peers) = neighbour(dir.path(), 8 << 20, &origin).await;
    let end = Instant::now() + Duration::from_secs(4);
    let readers = (0..6u64).map(|seed| {
        let (files, peers) = (files.clone(), peers.clone());
        tokio::spawn(async move {
            let (mut state, mut direct, mut asked) = (seed + 1, 0u64, 0u64);
            while Instant::now() < end {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let (file, data) = &files[(state >> 40) as usize % files.len()];
                let from = (state >> 20) % (file.size - 1);
                let range = from..(from + 1 + (state >> 33) % 100_000).min(file.size);
                let want = data.slice(range.start as usize..range.end as usize);
                match here(&peers, file, range.clone()) {
                    Some(got) => {
                        assert!(got == want, "{range:?} read directly");
                        direct += 1;
                    }
                    None => {
                        assert!(read(&peers, file, range.clone()).await.expect("read").0 == want, "{range:?}");
                        asked += 1;
                    }
                }
                tokio::task::yield_now().await;
            }
            (direct, asked)
        })
    });
    let counts = futures::future::join_all(readers).await;
    let sum = counts.into_iter().map(|c| c.expect("a reader")).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
    println!("{} reads directly, {} through the worker", sum.0, sum.1);
    assert!(sum.0 > 100 && sum.1 > 100, "{sum:?}: both kinds are needed for the test to mean something");
}

/// Descriptors of this process that keep a memory tier alive.
fn memory_files() -> usize {
    let files = std::fs::read_dir("/proc/self/fd").expect("fds").flatten();
    files.filter(|f| std::fs::read_link(f.path()).is_ok_and(|l| l.to_string_lossy().contains("efc-cache"))).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_is_shared_over_the_unix_socket_only_and_only_as_long_as_the_worker_lives() {
    let dir = tempfile::tempdir().expect("dir");
    let origin = Origin::new();
    let data = pattern(3, 300_000);
    let file = origin.put("f", "1", data.clone());
    let (worker, path, peers) = neighbour(dir.path(), 64 << 20, &origin).await;
    let limit = Duration::from_secs(5);
    let tcp = Connection::open(&Endpoint::Tcp(worker.addr().into()), &me(), limit).await.expect("tcp");
    let unix = Connection::open(&Endpoint::Unix(path), &me(), limit).await.expect("unix");
    assert!(tcp.shared().is_none() && unix.shared().is_some());
    for c in [&tcp, &unix] {
        c.attach(1, &spec("/t"), None, CachePolicy::default(), limit).await.expect("attach");
        let read = data::Read {
            slot: 1,
            locator: file.locator.clone(),
            version: file.version.clone(),
            size: file.size,
            offset: 0,
            length: 100,
            by_place: true,
            ..Default::default()
        };
        let frame = c.ask(read.into(), limit, 1 << 20).await.expect("ask").next().await.expect("answer");
        let Message::Data(d) = frame.message else { panic!("{:?}", frame.message) };
        match c.shared() {
            Some(shared) => {
                assert!(frame.bulk.is_empty() && d.sums.is_empty() && d.placed == 16_384, "{d:?}");
                let got = shared.read_run(&d.places, 0, 16_384).expect("read").expect("sealed");
                assert!(got == data.slice(..16_384));
            }
            None => assert!(d.places.is_empty() && frame.bulk == data.slice(..16_384)),
        }
    }
    read(&peers, &file, 0..file.size).await.expect("read");
    assert!(here(&peers, &file, 0..10).is_some() && memory_files() > 2);
    worker.stop(limit).await;
    let end = Instant::now() + limit;
    // Nobody used these connections since; its memory must not live on in them.
    while unix.shared().is_some() || memory_files() > 0 {
        assert!(Instant::now() < end, "a dead worker's memory is kept");
        sleep(Duration::from_millis(20)).await;
    }
    assert!(here(&peers, &file, 0..10).is_none());
}
