//! In-process workers before an origin that counts, and real sockets between.

use bytes::Bytes;
use efc_client::peers::{FileRef, PeersOptions, ReadFlags, ReadItem, Tier, concat};
use efc_client::wire::{Connection, Endpoint, Identity};
use efc_common::block::{SEGMENT_BYTES, widen};
use efc_common::checksum::{granule_sums, verify};
use efc_common::policy::CachePolicy;
use efc_common::{Error, Kind};
use efc_proto::data;
use efc_proto::frame::{self, Frame, HEADER_BYTES, Message, PROTOCOL_VERSION};
use efc_proto::status::from_fail;
use efc_worker::WorkerConfig;
use efc_worker::store::StoreConfig;
use std::ops::Range;

use crate::support::*;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout};

const SEG: u64 = SEGMENT_BYTES as u64;

fn ask(file: &FileRef, range: Range<u64>) -> data::Read {
    data::Read {
        slot: 1,
        locator: file.locator.clone(),
        version: file.version.clone(),
        size: file.size,
        offset: range.start,
        length: (range.end - range.start) as u32,
        fill_only: false,
        cached_only: false,
        by_place: false,
    }
}

/// All frames of one read over a raw connection, joined.
async fn read_raw(c: &Connection, read: data::Read, limit: Duration) -> Result<(Vec<u8>, Vec<data::Data>), Error> {
    let mut answers = c.ask(read.into(), limit, 4 << 20).await?;
    let (mut bytes, mut heads) = (Vec::new(), Vec::new());
    loop {
        let f = answers.next().await?;
        match f.message {
            Message::Data(d) => {
                verify(&f.bulk, &d.sums).expect("sums of the worker");
                bytes.extend_from_slice(&f.bulk);
                let last = d.last;
                heads.push(d);
                if last {
                    return Ok((bytes, heads));
                }
            }
            Message::Fail(f) => return Err(from_fail(&f)),
            m => panic!("{m:?}"),
        }
    }
}

async fn odd_ranges(store: StoreConfig, unix: bool, warm_tier: Tier) {
    let dir = tempfile::tempdir().expect("dir");
    let origin = Origin::new();
    let data = pattern(1, (9 * MIB + 12_345) as usize);
    let file = origin.put("f", "1", data.clone());
    let path = dir.path().join("w.sock");
    let worker = start(WorkerConfig { unix: unix.then(|| path.clone()), ..config("w", store) }, &origin).await;
    let mut m = member("w0", worker.addr());
    if unix {
        (m.unix, m.host) = (path.display().to_string(), efc_client::peers::host_name());
        // Nobody listens there: only the unix socket can have answered.
        m.addr = "127.0.0.1:1".into();
    }
    let peers = peers_with(vec![m], options());
    let size = file.size;
    let ranges = [
        0..1,
        size - 1..size,
        16_383..16_385,
        SEG - 1..SEG + 1,
        4 * MIB - 5..4 * MIB + 5,
        12_345..3 * MIB + 77,
        0..size,
        7..size - 7,
        8 * MIB..size,
    ];
    for pass in 0..2 {
        for r in &ranges {
            let (got, chunks) = read(&peers, &file, r.clone()).await.expect("read");
            assert!(got == data.slice(r.start as usize..r.end as usize), "pass {pass} {r:?}");
            assert!(chunks.iter().all(|c| c.local == unix));
            if pass == 1 {
                assert!(chunks.iter().all(|c| c.tier == warm_tier), "{:?}", chunks[0].tier);
            }
        }
    }
    // Every segment came once.
    let fetched: u64 = origin.reads.lock().iter().map(|r| r.end - r.start).sum();
    assert_eq!(fetched, size);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_ranges_from_memory_over_tcp() {
    odd_ranges(memory(64 << 20), false, Tier::Memory).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_ranges_from_memory_over_unix() {
    odd_ranges(memory(64 << 20), true, Tier::Memory).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_ranges_from_disk_over_unix() {
    let dir = tempfile::tempdir().expect("dir");
    odd_ranges(disk(dir.path(), 64 << 20), true, Tier::Disk).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_cold_readers_cost_one_request_a_block() {
    let origin = Origin::new();
    let data = pattern(2, (9 * MIB) as usize);
    let file = origin.put("f", "1", data.clone());
    let worker = start(config("w", memory(64 << 20)), &origin).await;
    let clients: Vec<_> = (0..4).map(|_| peers(&[&worker])).collect();
    let readers = (0..200).map(|i| {
        let (peers, file, data) = (clients[i % 4].clone(), file.clone(), data.clone());
        tokio::spawn(async move {
            let (got, _) = read(&peers, &file, 0..file.size).await.expect("read");
            assert!(got == data);
        })
    });
    for r in futures::future::join_all(readers).await {
        r.expect("reader");
    }
    let mut reads = origin.reads.lock().clone();
    reads.sort_by_key(|r| r.start);
    assert_eq!(reads, [0..4 * MIB, 4 * MIB..8 * MIB, 8 * MIB..9 * MIB]);
}

#[tokio::test]
async fn a_small_read_fetches_its_segment_and_a_run_of_missing_ones_is_one_request() {
    let origin = Origin::new();
    let data = pattern(3, (4 * MIB) as usize);
    let file = origin.put("f", "1", data.clone());
    let worker = start(config("w", memory(64 << 20)), &origin).await;
    let peers = peers(&[&worker]);
    let at = 5 * SEG + 100;
    let (got, chunks) = read(&peers, &file, at..at + 4096).await.expect("read");
    assert!(got == data.slice(at as usize..at as usize + 4096) && chunks[0].tier == Tier::Origin);
    assert_eq!(std::mem::take(&mut *origin.reads.lock()), vec![5 * SEG..6 * SEG; 1]);
    read(&peers, &file, 0..4 * MIB).await.expect("read all");
    let mut reads = origin.reads.lock().clone();
    reads.sort_by_key(|r| r.start);
    assert_eq!(reads, [0..5 * SEG, 6 * SEG..4 * MIB]);
}

#[tokio::test]
async fn the_first_segment_is_usable_before_the_last_has_come() {
    let origin = Origin::new();
    let data = pattern(4, (4 * MIB) as usize);
    let file = origin.put("f", "1", data.clone());
    origin.piece.store(65_536, std::sync::atomic::Ordering::SeqCst);
    origin.hold_after(300_000);
    let worker = start(config("w", memory(64 << 20)), &origin).await;
    let peers = peers(&[&worker]);
    let mut stream = peers.read(&file, 0..4 * MIB, ReadFlags::default()).expect("stream");
    let first = timeout(Duration::from_secs(5), stream.next()).await.expect("in time").expect("read").expect("chunk");
    assert_eq!((first.offset, first.bytes.len()), (0, SEG as usize));
    origin.release();
    let rest = stream.collect().await.expect("rest");
    assert!([&first.bytes[..], &concat(&rest)[..]].concat() == data);
    assert_eq!(origin.read_count(), 1);
}

#[tokio::test]
async fn a_batch_of_128_small_files_is_one_request_and_bad_items_fail_alone() {
    let origin = Origin::new();
    let files: Vec<(FileRef, Bytes)> = (0..126)
        .map(|i| {
            let data = pattern(100 + i, 100 + 1_777 * i as usize);
            (origin.put(&format!("f{i}"), "1", data.clone()), data)
        })
        .collect();
    let gone = FileRef { locator: "gone".into(), version: "1".into(), size: 10 };
    let changed = FileRef { version: "0".into(), ..files[3].0.clone() };
    let worker = start(config("w", memory(64 << 20)), &origin).await;
    let c = raw(&worker).await;
    let mut items: Vec<data::Read> = files.iter().map(|(f, _)| ask(f, 0..f.size)).collect();
    items.push(ask(&gone, 0..10));
    items.push(ask(&changed, 0..changed.size));
    for pass in 0..2 {
        let mut answers = c
            .ask(data::ReadMany { items: items.clone() }.into(), Duration::from_secs(10), 64 << 20)
            .await
            .expect("ask");
        let mut got = vec![Vec::new(); 126];
        let (mut done, mut failed) = (0, Vec::new());
        while done + failed.len() < 128 {
            let f = answers.next().await.expect("answer");
            match f.message {
                Message::Data(d) => {
                    verify(&f.bulk, &d.sums).expect("sums");
                    got[d.item as usize].extend_from_slice(&f.bulk);
                    done += d.last as usize;
                }
                Message::Fail(x) => failed.push((x.item, from_fail(&x).kind())),
                m => panic!("{m:?}"),
            }
        }
        assert!(files.iter().zip(&got).all(|((_, data), got)| data == got), "pass {pass}");
        failed.sort_by_key(|f| f.0);
        assert_eq!(failed, [(126, Kind::NotFound), (127, Kind::Stale)]);
    }
    // The two bad ones were asked again, nothing else.
    assert_eq!(origin.read_count(), 128 + 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn read_many_goes_to_all_owners_and_survives_a_dead_one() {
    let origin = Origin::new();
    let files: Vec<(FileRef, Bytes)> = (0..300)
        .map(|i| {
            let data = pattern(i, 1 + 911 * i as usize % 70_000);
            (origin.put(&format!("f{i}"), "1", data.clone()), data)
        })
        .collect();
    let a = start(config("a", memory(64 << 20)), &origin).await;
    let b = start(config("b", memory(64 << 20)), &origin).await;
    let peers = peers(&[&a, &b]);
    let items: Vec<ReadItem> = files.iter().map(|(f, _)| ReadItem { file: f.clone(), range: 0..f.size }).collect();
    let mut a = Some(a);
    for pass in 0..2 {
        let mut stream = peers.read_many(items.clone(), ReadFlags::default());
        let mut seen = vec![false; files.len()];
        while let Some((i, got)) = stream.next().await {
            assert!(concat(&got.expect("item")) == files[i].1, "pass {pass} item {i}");
            assert!(!std::mem::replace(&mut seen[i], true));
        }
        assert!(seen.iter().all(|s| *s));
        if pass == 0 {
            assert_eq!(origin.read_count(), 300);
            drop(a.take());
        }
    }
}

#[tokio::test]
async fn a_waiter_that_goes_away_does_not_end_the_fetch() {
    let origin = Origin::new();
    let data = pattern(5, MIB as usize);
    let file = origin.put("f", "1", data.clone());
    origin.hold_after(0);
    let worker = start(config("w", memory(64 << 20)), &origin).await;
    let peers = peers(&[&worker]);
    let first = tokio::spawn({
        let (peers, file) = (peers.clone(), file.clone());
        async move { read(&peers, &file, 0..file.size).await }
    });
    while origin.read_count() == 0 {
        tokio::task::yield_now().await;
    }
    first.abort();
    assert!(first.await.is_err_and(|e| e.is_cancelled()));
    let second = tokio::spawn({
        let (peers, file) = (peers.clone(), file.clone());
        async move { read(&peers, &file, 0..file.size).await }
    });
    origin.release();
    assert!(second.await.expect("task").expect("read").0 == data);
    assert_eq!(origin.read_count(), 1);
}

#[tokio::test]
async fn errors_of_the_origin_keep_their_kind_and_the_next_ask_starts_anew() {
    let origin = Origin::new();
    let data = pattern(6, 1000);
    let file = origin.put("f", "2", data.clone());
    let worker = start(config("w", memory(64 << 20)), &origin).await;
    let peers = peers(&[&worker]);
    for kind in [Kind::PermissionDenied, Kind::Stale, Kind::NotFound, Kind::Io, Kind::Timeout] {
        *origin.fail_next.lock() = Some(kind);
        let e = read(&peers, &file, 0..file.size).await.expect_err("injected");
        assert_eq!(e.kind(), kind);
    }
    let old = FileRef { version: "1".into(), ..file.clone() };
    assert!(read(&peers, &old, 0..file.size).await.is_err_and(|e| e.is(Kind::Stale)));
    assert!(read(&peers, &file, 0..file.size).await.expect("read").0 == data);
}

#[tokio::test]
async fn a_wrong_size_poisons_nothing() {
    let origin = Origin::new();
    let data = pattern(7, 100_000);
    let file = origin.put("f", "1", data.clone());
    let worker = start(config("w", memory(64 << 20)), &origin).await;
    let peers = peers(&[&worker]);
    let liar = FileRef { size: 50_000, ..file.clone() };
    assert!(read(&peers, &liar, 0..50_000).await.expect("its own lie").0 == data.slice(..50_000));
    let (got, chunks) = read(&peers, &file, 0..file.size).await.expect("read");
    assert!(got == data && chunks.iter().all(|c| c.tier == Tier::Origin));
}

#[tokio::test]
async fn the_deadline_holds_while_the_origin_stalls() {
    let origin = Origin::new();
    let file = origin.put("f", "1", pattern(8, MIB as usize));
    origin.hold_after(0);
    let worker = start(config("w", memory(64 << 20)), &origin).await;
    let c = raw(&worker).await;
    let began = Instant::now();
    // The client waits longer than it says, so it is the worker that keeps the deadline.
    let mut answers = c.ask(ask(&file, 0..4096).into(), Duration::from_millis(300), 4 << 20).await.expect("ask");
    let e = match answers.next().await {
        Ok(Frame { message: Message::Fail(f), .. }) => from_fail(&f),
        Ok(f) => panic!("{f:?}"),
        Err(e) => e,
    };
    assert!(e.is(Kind::Timeout), "{e}");
    assert!(began.elapsed() < Duration::from_secs(3));
    // Other requests of the connection are not held up, and a slow origin is not a dead worker.
    c.ping(&me(), Duration::from_secs(3)).await.expect("alive");
    origin.release();
    read_raw(&c, ask(&file, 0..4096), Duration::from_secs(5)).await.expect("after the stall");
}

#[tokio::test]
async fn cached_only_fill_and_administration() {
    let origin = Origin::new();
    let data = pattern(9, (2 * MIB) as usize);
    let file = origin.put("f", "1", data.clone());
    let worker = start(config("w", memory(64 << 20)), &origin).await;
    let peers = peers(&[&worker]);
    let cached = ReadFlags { cached_only: true };
    let e = peers.read(&file, 0..100, cached).expect("stream").collect().await.expect_err("cold");
    assert!(e.is(Kind::NotFound) && origin.read_count() == 0);
    assert_eq!(peers.fill(&file, 0..MIB).await.expect("fill"), MIB);
    assert_eq!(peers.fill(&file, 0..MIB).await.expect("fill again"), 0);
    let got = peers.read(&file, 0..MIB, cached).expect("stream").collect().await.expect("warm");
    assert!(concat(&got) == data.slice(..MIB as usize));
    use data::manage::Action;
    let stat = peers.manage(&file, Action::Pin).await.expect("pin");
    assert_eq!((stat.segments, stat.bytes, stat.pinned_bytes), (4, MIB, MIB));
    let after = peers.evict_all().await;
    assert_eq!(after[0].1.as_ref().expect("stats").tiers[0].segments, 4);
    assert_eq!(peers.manage(&file, Action::Unpin).await.expect("unpin").segments, 4);
    assert_eq!(peers.manage(&file, Action::Evict).await.expect("evict").segments, 4);
    assert_eq!(peers.manage(&file, Action::Stat).await.expect("stat").segments, 0);
    let stats = peers.cache_stat().await;
    let s = stats[0].1.as_ref().expect("stats");
    assert_eq!((s.origin_requests, s.served_memory_bytes, s.tiers[0].segments), (1, MIB, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dataset_says_how_its_data_is_kept() {
    let origin = Origin::new();
    let file = origin.put("f", "1", pattern(11, MIB as usize));
    let worker = start(config("w", memory(64 << 20)), &origin).await;
    let with = |cache| peers_with(vec![member("w0", worker.addr())], PeersOptions { cache, ..options() });
    let brief = with(CachePolicy { ttl: Some(Duration::from_millis(300)), pin: false });
    let began = Instant::now();
    read(&brief, &file, 0..MIB).await.expect("read");
    read(&brief, &file, 0..MIB).await.expect("again");
    assert!(origin.read_count() == 1 || began.elapsed() > Duration::from_millis(300));
    tokio::time::sleep(Duration::from_millis(400)).await;
    let before = origin.read_count();
    read(&brief, &file, 0..MIB).await.expect("after its time");
    assert_eq!(origin.read_count(), before + 1);
    let pinned = with(CachePolicy { ttl: None, pin: true });
    let other = origin.put("g", "1", pattern(12, MIB as usize));
    read(&pinned, &other, 0..MIB).await.expect("read");
    let stats = pinned.evict_all().await;
    let s = &stats[0].1.as_ref().expect("stats").tiers[0];
    assert_eq!((s.segments, s.pinned), (4, MIB), "{s:?}");
    let before = origin.read_count();
    read(&brief, &other, 0..MIB).await.expect("read");
    assert_eq!(origin.read_count(), before, "what is pinned is there for all");
}

#[tokio::test]
async fn listings_are_walked_once_per_window() {
    let origin = Origin::new();
    let pages: Vec<Vec<_>> = (0..20)
        .map(|p| (0..1000).map(|i| entry(&format!("{p:03}-{i:04}-{}", "x".repeat(60)), "1")).collect())
        .collect();
    let all = pages.concat();
    let dir = origin.put_dir("d/", pages.clone());
    let worker = start(config("w", memory(64 << 20)), &origin).await;
    let clients: Vec<_> = (0..8).map(|_| peers(&[&worker])).collect();
    let hour = Duration::from_secs(3600);
    let lists = clients.iter().map(|p| p.list(&dir, hour, 0));
    let got = futures::future::try_join_all(lists).await.expect("list");
    assert!(got.iter().all(|l| l.entries == all && l.version == got[0].version));
    let asked = |n| assert_eq!(origin.lists.load(std::sync::atomic::Ordering::SeqCst), n);
    asked(20);
    let known = clients[0].list(&dir, hour, got[0].version).await.expect("known");
    assert!(known.unchanged && known.entries.is_empty() && !known.from_origin);
    asked(20);
    // Asked for the present: walked again, and unchanged.
    let now = clients[0].list(&dir, Duration::ZERO, got[0].version).await.expect("now");
    assert!(now.unchanged && now.from_origin);
    asked(40);
    let mut changed = pages;
    changed[7][7].node.version = "2".into();
    origin.put_dir("d/", changed.clone());
    let new = clients[1].list(&dir, Duration::ZERO, got[0].version).await.expect("new");
    assert!(!new.unchanged && new.version != got[0].version && new.entries == changed.concat());
    assert!(clients[0].list(&"nowhere/".into(), hour, 0).await.is_err_and(|e| e.is(Kind::NotFound)));
    origin.put_dir("empty/", vec![vec![]]);
    assert!(clients[0].list(&"empty/".into(), hour, 0).await.expect("empty").entries.is_empty());
}

#[tokio::test]
async fn who_asks_for_the_present_does_not_get_a_walk_that_began_before() {
    let origin = Origin::new();
    let dir = origin.put_dir("d/", vec![vec![entry("a", "1")]]);
    let worker = start(config("w", memory(64 << 20)), &origin).await;
    let peers = peers(&[&worker]);
    origin.pages.forget_permits(tokio::sync::Semaphore::MAX_PERMITS);
    let list = |age| {
        let (peers, dir) = (peers.clone(), dir.clone());
        tokio::spawn(async move { peers.list(&dir, age, 0).await.expect("list").version })
    };
    let old = list(Duration::ZERO);
    while origin.lists.load(std::sync::atomic::Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    tokio::time::sleep(Duration::from_millis(20)).await;
    let (new, patient) = (list(Duration::ZERO), list(Duration::from_secs(60)));
    tokio::time::sleep(Duration::from_millis(50)).await;
    origin.pages.add_permits(10);
    let versions = (old.await.expect("old"), new.await.expect("new"), patient.await.expect("patient"));
    assert!(versions.0 == versions.1 && versions.1 == versions.2);
    assert_eq!(origin.lists.load(std::sync::atomic::Ordering::SeqCst), 2);
}

/// Sends bytes to the worker after a good handshake and returns what is left when it has closed the connection.
async fn after_handshake(addr: &str, bytes: &[u8]) -> usize {
    let mut s = TcpStream::connect(addr).await.expect("connect");
    let hello = data::Hello { protocol: PROTOCOL_VERSION, ..Default::default() };
    s.write_all(&frame::encode_head(0, 0, &hello.into(), 0).expect("hello")).await.expect("send");
    frame::read_frame(&mut s).await.expect("greeting").expect("frame");
    // The worker may close before all is sent.
    let _ = s.write_all(bytes).await;
    let _ = s.shutdown().await;
    let mut rest = Vec::new();
    let _ = timeout(Duration::from_secs(5), s.read_to_end(&mut rest)).await.expect("the worker closes the connection");
    rest.len()
}

#[tokio::test]
async fn what_is_not_a_request_is_refused() {
    let origin = Origin::new();
    let file = origin.put("f", "1", pattern(10, 1000));
    let worker = start(config("w", memory(64 << 20)), &origin).await;
    let good = frame::encode_head(1, 0, &ask(&file, 0..10).into(), 0).expect("encode").to_vec();
    let mut oversized = good.clone();
    oversized[20..24].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut with_bulk = good.clone();
    with_bulk[24..28].copy_from_slice(&4096u32.to_le_bytes());
    let mut flipped = good.clone();
    flipped[HEADER_BYTES + 3] ^= 1;
    let answer = frame::encode_head(1, 0, &data::Managed::default().into(), 0).expect("encode").to_vec();
    let cases = [
        pattern(11, 5000).to_vec(),
        oversized,
        with_bulk,
        flipped,
        answer,
        good[..good.len() - 1].to_vec(),
        good[..10].to_vec(),
    ];
    for (i, bytes) in cases.iter().enumerate() {
        assert_eq!(after_handshake(worker.addr(), bytes).await, 0, "case {i}");
    }
    // Garbage instead of a greeting.
    let mut s = TcpStream::connect(worker.addr()).await.expect("connect");
    s.write_all(&pattern(12, 100)).await.expect("send");
    let mut rest = Vec::new();
    let _ = timeout(Duration::from_secs(5), s.read_to_end(&mut rest)).await.expect("closed");
    assert!(rest.is_empty());
    // A slot that was not attached: an error, and the connection lives.
    let at = Endpoint::Tcp(worker.addr().into());
    let c = Connection::open(&at, &me(), Duration::from_secs(5)).await.expect("connect");
    assert!(read_raw(&c, ask(&file, 0..10), Duration::from_secs(5)).await.is_err_and(|e| e.is(Kind::Invalid)));
    c.attach(1, &spec("/t"), None, CachePolicy::default(), Duration::from_secs(5)).await.expect("attach");
    for bad in [
        data::Read { length: 0, ..ask(&file, 0..10) },
        data::Read { offset: 995, ..ask(&file, 0..10) },
        data::Read { offset: u64::MAX, ..ask(&file, 0..10) },
        data::Read { size: u64::MAX, ..ask(&file, 0..10) },
        data::Read { size: 9 << 20, offset: (4 << 20) - 1, ..ask(&file, 0..10) },
        data::Read { locator: Bytes::new(), ..ask(&file, 0..10) },
        data::Read { locator: vec![b'x'; efc_common::node::LOCATOR_BYTES_MAX + 1].into(), ..ask(&file, 0..10) },
        data::Read { version: vec![b'x'; 300].into(), ..ask(&file, 0..10) },
    ] {
        let e = read_raw(&c, bad.clone(), Duration::from_secs(5)).await.expect_err("refused");
        assert!(e.is(Kind::Invalid), "{bad:?}: {e}");
    }
    assert_eq!(origin.read_count(), 0);
    read_raw(&c, ask(&file, 0..10), Duration::from_secs(5)).await.expect("still serving");
}

#[tokio::test]
async fn versions_and_clusters_must_match_and_sources_of_the_host_need_trust() {
    let origin = Origin::new();
    let worker = start(WorkerConfig::new("w", memory(64 << 20)), &origin).await;
    let mut s = TcpStream::connect(worker.addr()).await.expect("connect");
    let hello = data::Hello { protocol: PROTOCOL_VERSION + 1, ..Default::default() };
    s.write_all(&frame::encode_head(0, 0, &hello.into(), 0).expect("hello")).await.expect("send");
    let f = frame::read_frame(&mut s).await.expect("answer").expect("frame");
    assert!(matches!(f.message, Message::Fail(f) if from_fail(&f).is(Kind::Unsupported)));
    assert!(frame::read_frame(&mut s).await.expect("end").is_none());
    let at = Endpoint::Tcp(worker.addr().into());
    let c = Connection::open(&at, &me(), Duration::from_secs(5)).await.expect("connect");
    let e = c
        .attach(1, &spec("/t"), None, CachePolicy::default(), Duration::from_secs(5))
        .await
        .expect_err("file:// from the network");
    assert!(e.is(Kind::PermissionDenied) && e.to_string().contains("--allow-local-sources"), "{e}");
    let peers = peers(&[&worker]);
    let file = origin.put("f", "1", pattern(13, 10));
    assert!(read(&peers, &file, 0..10).await.is_err_and(|e| e.is(Kind::Unavailable)));
}

#[tokio::test]
async fn a_reader_that_does_not_read_costs_little_and_is_cut_off() {
    let origin = Origin::new();
    let data = pattern(14, (32 * MIB) as usize);
    let file = origin.put("f", "1", data.clone());
    let dir = tempfile::tempdir().expect("dir");
    let mut c = config("w", disk(dir.path(), 64 << 20));
    c.inflight_bytes = 16 << 20;
    c.limits.stall = Duration::from_secs(1);
    c.http = Some("127.0.0.1:0".into());
    let worker = start(c, &origin).await;
    let mut s = TcpStream::connect(worker.addr()).await.expect("connect");
    let send = async |s: &mut TcpStream, request: u64, m: Message| {
        s.write_all(&frame::encode_head(request, 30_000, &m, 0).expect("encode")).await
    };
    send(&mut s, 0, data::Hello { protocol: PROTOCOL_VERSION, ..Default::default() }.into()).await.expect("hello");
    let spec_json = serde_json::to_string(&spec("/t")).expect("json");
    send(&mut s, 1, data::Attach { slot: 1, spec_json, keys_json: String::new(), ..Default::default() }.into())
        .await
        .expect("attach");
    // 200 whole blocks: 800 MB of answers that nobody takes. The worker stops reading long before all are sent.
    let mut taken = 0;
    for i in 0..200u64 {
        let block = i % 8 * 4 * MIB;
        let m = ask(&file, block..block + 4 * MIB).into();
        match timeout(Duration::from_millis(200), send(&mut s, 2 + i, m)).await {
            Ok(Ok(())) => taken += 1,
            _ => break,
        }
    }
    assert!(taken > 0);
    // Meanwhile others are served.
    let peers = peers(&[&worker]);
    let (got, _) =
        timeout(Duration::from_secs(30), read(&peers, &file, 0..8 * MIB)).await.expect("in time").expect("read");
    assert!(got == data.slice(..(8 * MIB) as usize));
    let stats = http_json(&worker, "/stats").await;
    assert!(stats["inflight_bytes"].as_u64().expect("number") <= 16 << 20, "{stats}");
    // Cut off: the socket ends after what was already under way.
    let mut sink = vec![0; 1 << 20];
    let drained = async { while s.read(&mut sink).await.is_ok_and(|n| n > 0) {} };
    tokio::time::sleep(Duration::from_millis(1500)).await;
    timeout(Duration::from_secs(10), drained).await.expect("the connection ends");
}

async fn http_json(worker: &efc_worker::Worker, path: &str) -> serde_json::Value {
    let mut s = TcpStream::connect(worker.http().expect("http")).await.expect("connect");
    let ask = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    s.write_all(ask.as_bytes()).await.expect("send");
    let mut all = String::new();
    s.read_to_string(&mut all).await.expect("read");
    let body = all.split_once("\r\n\r\n").expect("body").1;
    serde_json::from_str(body).expect("json")
}

/// What a scripted worker does with a read.
#[derive(Clone, Copy, PartialEq)]
enum Script {
    WrongSums,
    Silence,
    HangUp,
    TooMuch,
    /// Names places in memory that it never shared.
    Places,
}

/// A worker that greets and attaches as it should, and then misbehaves.
async fn scripted(script: Script) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let addr = listener.local_addr().expect("addr").to_string();
    tokio::spawn(async move {
        while let Ok((mut s, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut silent = false;
                while let Ok(Some(f)) = frame::read_frame(&mut s).await {
                    let (message, bulk): (Message, Bytes) = match f.message {
                        Message::Hello(_) if silent => continue,
                        Message::Hello(h) => (h.into(), Bytes::new()),
                        Message::Attach(_) => {
                            let source_id = Bytes::copy_from_slice(&spec("/t").id().0);
                            (data::Attached { source_id }.into(), Bytes::new())
                        }
                        Message::Read(r) => {
                            silent = script == Script::Silence;
                            let wide = widen(r.offset..r.offset + r.length as u64, r.size);
                            let extra = if script == Script::TooMuch { 100_000 } else { 0 };
                            let bulk = Bytes::from(vec![7; (wide.end - wide.start) as usize + extra]);
                            let mut sums = granule_sums(&bulk);
                            sums[0] ^= 1;
                            let head = data::Data { offset: wide.start, last: true, ..Default::default() };
                            match script {
                                Script::HangUp => return,
                                Script::Silence => continue,
                                Script::WrongSums | Script::TooMuch => (data::Data { sums, ..head }.into(), bulk),
                                Script::Places => {
                                    let places = vec![data::Place { at: 0, seal: 0, len: SEGMENT_BYTES, sums }];
                                    let placed = (wide.end - wide.start) as u32;
                                    (data::Data { places, placed, ..head }.into(), Bytes::new())
                                }
                            }
                        }
                        _ => return,
                    };
                    let head = frame::encode_head(f.request, 0, &message, bulk.len()).expect("encode");
                    let sent = async {
                        s.write_all(&head).await?;
                        s.write_all(&bulk).await
                    };
                    if sent.await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    addr
}

#[tokio::test]
async fn a_misbehaving_owner_costs_bounded_time_and_no_wrong_byte() {
    for script in [Script::WrongSums, Script::HangUp, Script::TooMuch, Script::Silence, Script::Places] {
        let origin = Origin::new();
        let worker = start(config("good", memory(64 << 20)), &origin).await;
        let members = vec![member("bad", &scripted(script).await), member("good", worker.addr())];
        let hedge_after = Duration::from_millis(200);
        let peers = peers_with(members, PeersOptions { hedge_after, ..options() });
        let began = Instant::now();
        for i in 0..40 {
            let data = pattern(i, 50_000);
            let file = origin.put(&format!("f{i}"), "1", data.clone());
            assert!(read(&peers, &file, 1..file.size).await.expect("read").0 == data.slice(1..));
        }
        // One silence costs twice `hedge_after`; all 40 reads must not pay it.
        assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
        assert_eq!(origin.read_count(), 40);
    }
}

#[tokio::test]
async fn a_slow_origin_is_not_asked_twice() {
    let origin = Origin::new();
    let data = pattern(15, 50_000);
    let file = origin.put("f", "1", data.clone());
    let a = start(config("a", memory(64 << 20)), &origin).await;
    let b = start(config("b", memory(64 << 20)), &origin).await;
    let members = vec![member("a", a.addr()), member("b", b.addr())];
    let peers = peers_with(members, PeersOptions { hedge_after: Duration::from_millis(50), ..options() });
    origin.hold_after(0);
    let reader = tokio::spawn({
        let (peers, file) = (peers.clone(), file.clone());
        async move { read(&peers, &file, 0..file.size).await }
    });
    // Many times `hedge_after`.
    tokio::time::sleep(Duration::from_millis(700)).await;
    origin.release();
    assert!(reader.await.expect("task").expect("read").0 == data);
    assert_eq!(origin.read_count(), 1);
}

#[tokio::test]
async fn a_worker_that_comes_back_is_used_again() {
    let origin = Origin::new();
    let data = pattern(16, 50_000);
    let file = origin.put("f", "1", data.clone());
    let worker = start(config("w", memory(64 << 20)), &origin).await;
    let (addr, peers) = (worker.addr().to_string(), peers(&[&worker]));
    read(&peers, &file, 0..file.size).await.expect("read");
    worker.stop(Duration::ZERO).await;
    assert!(read(&peers, &file, 0..file.size).await.is_err_and(|e| e.is(Kind::Unavailable)));
    let began = Instant::now();
    for _ in 0..100 {
        assert!(read(&peers, &file, 0..file.size).await.is_err());
    }
    assert!(began.elapsed() < Duration::from_millis(200), "an open circuit costs nothing");
    let _again = start(WorkerConfig { listen: addr, ..config("w", memory(64 << 20)) }, &origin).await;
    let back = async {
        while read(&peers, &file, 0..file.size).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(Duration::from_secs(10), back).await.expect("the probe finds it");
}

#[tokio::test]
async fn the_greeting_names_the_cluster() {
    let origin = Origin::new();
    let worker = start(config("w", memory(64 << 20)), &origin).await;
    let at = Endpoint::Tcp(worker.addr().into());
    // Stand-alone: any cluster is welcome.
    let from = Identity { cluster: "c".into(), ..me() };
    let c = Connection::open(&at, &from, Duration::from_secs(5)).await.expect("connect");
    assert_eq!((c.worker(), c.cluster()), ("w", ""));
}
