//! What a reader notices when parts of the system die, leave, come back or misbehave: nothing but time. Every byte of every read
//! is compared, and every read goes to the mount process ([`efc_e2e::reader`]).

use anyhow::{Context, Result};
use efc_client::master::MasterClient;
use efc_client::ring::ring_of;
use efc_common::id::{ContentId, RingEpoch};
use efc_common::ring::{Ring, RingKey};
use efc_e2e::reader::{Files, Looping, check_all, check_file};
use efc_e2e::{Cluster, Mount, WorkerSpec, wait_for, within};
use efc_testkit::process::scratch;
use efc_testkit::{Action, Fault, OssOptions, OssServer, Profile, S3Ro, data};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The longest anything here may take.
const PATIENCE: Duration = Duration::from_secs(90);
/// Memory smaller than the data, so that the disk tier is read all the time; a worker that stops does not wait long for its clients.
fn worker() -> WorkerSpec {
    WorkerSpec { memory: "16MiB".into(), disk: "256MiB".into(), args: vec!["--drain-timeout".into(), "5s".into()] }
}

/// What may be logged when workers and masters die: each says once what it lost.
const DEATHS: &[&str] = &[
    "heartbeat failed; serving on",
    "the masters took this worker out; registering again",
    "no master answers; the last ring stays in use",
    "masters do not answer; reads go on",
    "a master does not answer",
    "was silent for too long and is expired",
    "no leader yet",
    "client::peers::pool: ",
];
/// What may be logged when an origin fails: a worker's failure with it is followed by a try of the mount's own.
const ORIGIN_TROUBLE: &[&str] = &[
    "origin in trouble, asking again",
    "reads go past the workers to the origin error=s3://data/ gave no answer within the deadline",
    "operation failed",
];

fn small_set(root: &Path) -> Result<Files> {
    data::make_tree(&root.join("data"), Profile::Small)?;
    Ok(Arc::new(data::plan(Profile::Small).into_iter().collect()))
}

fn mount(c: &Cluster, server: &S3Ro) -> Result<Mount> {
    let (endpoint, target) = (format!("endpoint={}", server.endpoint()), server.target());
    Mount::start("s3://data", &[&c.option(), &endpoint, "consistency=immutable"], &target.env())
}

#[test]
fn a_reader_survives_every_death_and_change() -> Result<()> {
    let dir = scratch("faults")?;
    let files = small_set(dir.path())?;
    let round = files.len() as u64;
    let server = S3Ro::start(dir.path(), Duration::ZERO)?;
    let mut c = Cluster::start(3, &[worker(), worker(), worker()])?;
    let m = mount(&c, &server)?;
    let reader = Looping::start(&m.path, &files, 2);
    reader.advance(round, PATIENCE).context("first round")?;

    c.workers[0].kill();
    reader.advance(round, PATIENCE).context("a worker was killed")?;
    c.wait_ring(&["w2", "w3"])?;
    reader.advance(round, PATIENCE).context("the ring has two workers")?;
    c.workers[0].start()?;
    c.wait_ring(&["w1", "w2", "w3"])?;
    reader.advance(round, PATIENCE).context("the worker is back")?;

    let leader = c.leader()?;
    c.masters[leader].kill();
    reader.advance(round, PATIENCE).context("the leader was killed")?;
    wait_for("a new leader", PATIENCE, || Ok(c.leader().is_ok_and(|l| l != leader)))?;
    c.start_masters()?;

    // A minute in the long run; heartbeats are missed for longer than the masters wait either way.
    let outage = Duration::from_secs(if std::env::var_os("EFC_E2E_LONG").is_some() { 60 } else { 15 });
    c.masters.iter_mut().for_each(|m| m.kill());
    let dead_since = Instant::now();
    while dead_since.elapsed() < outage {
        reader.advance(1, PATIENCE).context("all masters are dead")?;
    }
    c.start_masters()?;
    c.wait_ring(&["w1", "w2", "w3"])?;
    reader.advance(round, PATIENCE).context("the masters are back")?;

    c.workers[1].drain()?;
    c.wait_ring(&["w1", "w3"])?;
    reader.advance(round, PATIENCE).context("a worker was drained")?;
    c.workers[1].start()?;
    c.wait_ring(&["w1", "w2", "w3"])?;
    c.add_worker(&worker())?;
    c.wait_ring(&["w1", "w2", "w3", "w4"])?;
    reader.advance(round, PATIENCE).context("a worker was added")?;

    let looped = reader.stop(PATIENCE)?;
    println!("{} files read, the slowest in {:?}", looped.files, looped.slowest);
    let stats = m.stats()?;
    let errors: u64 = stats["ops"].as_object().context("ops")?.values().filter_map(|o| o["errors"].as_u64()).sum();
    assert_eq!(errors, 0, "{stats}");
    m.finish(DEATHS)?;
    c.check_logs(DEATHS)
}

/// Waits until the disk tiers have stored all they will: nothing was added for a second.
fn settle(c: &Cluster) -> Result<()> {
    let mut last = (f64::NAN, Instant::now());
    wait_for("an idle disk writer", PATIENCE, || {
        let used = c.metric("efc_cache_used_bytes", "tier=\"disk\"")?;
        if used != last.0 {
            last = (used, Instant::now());
        }
        Ok(last.1.elapsed() > Duration::from_secs(1))
    })
}

#[test]
fn a_killed_worker_comes_back_warm_from_its_disk() -> Result<()> {
    let dir = scratch("faults")?;
    let files = small_set(dir.path())?;
    let server = S3Ro::start(dir.path(), Duration::ZERO)?;
    let mut c = Cluster::start(1, &[worker(), worker(), worker()])?;
    let m = mount(&c, &server)?;
    let read = |m: &Mount| {
        let (root, files) = (m.path.clone(), files.clone());
        within(PATIENCE, move || check_all(&root, &files, 2))
    };
    read(&m)?;
    settle(&c)?;
    let stored = c.workers[0].metric("efc_cache_used_bytes", "tier=\"disk\"")?;
    c.workers[0].kill();
    c.wait_ring(&["w2", "w3"])?;
    c.workers[0].start()?;
    c.wait_ring(&["w1", "w2", "w3"])?;
    m.finish(DEATHS)?;
    // A fresh mount: it knows nothing of the death.
    let m = mount(&c, &server)?;
    read(&m)?;
    let served = |tier: &str| c.workers[0].metric("efc_cache_served_bytes_total", &format!("tier=\"{tier}\""));
    let (memory, disk, origin) = (served("memory")?, served("disk")?, served("origin")?);
    println!(
        "the restarted worker had {stored} on its disk, served {memory} from memory, {disk} from disk, {origin} from the origin"
    );
    // Everything it had is asked for once; what is stored is rounded up a little per file.
    assert!(memory + disk >= 0.99 * stored - 524_288.0, "{stored} bytes on its disk, {memory} and {disk} served");
    assert!(stored > 0.0 && origin <= 0.01 * (memory + disk + origin), "{memory} {disk} {origin}");
    m.finish(&[])?;
    c.check_logs(DEATHS)
}

/// The ring that the masters hand out now.
fn ring(c: &Cluster) -> Result<Ring> {
    let master = MasterClient::new(c.masters.iter().map(|m| m.addr.clone()).collect())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(ring_of(&runtime.block_on(master.get_ring(RingEpoch(0), "", Duration::from_secs(5)))?))
}

fn placement(ring: &Ring) -> Vec<String> {
    let key = |i: u64| RingKey::block(ContentId::of(&[&i.to_le_bytes()]), 0);
    (0..20_000).filter_map(|i| Some(ring.owners(key(i), 1).first()?.id.0.clone())).collect()
}

#[test]
fn a_fourth_worker_moves_few_keys_and_gives_them_back() -> Result<()> {
    let mut c = Cluster::start(1, &[worker(), worker(), worker()])?;
    c.wait_ring(&["w1", "w2", "w3"])?;
    let three = placement(&ring(&c)?);
    c.add_worker(&worker())?;
    c.wait_ring(&["w1", "w2", "w3", "w4"])?;
    let four = placement(&ring(&c)?);
    let moved: Vec<&String> = three.iter().zip(&four).filter(|(a, b)| a != b).map(|(_, b)| b).collect();
    let share = moved.len() as f64 / three.len() as f64;
    assert!((0.15..=0.30).contains(&share), "{share} of the keys moved");
    assert!(moved.iter().all(|to| *to == "w4"), "keys moved between old workers");
    c.workers[3].drain()?;
    c.wait_ring(&["w1", "w2", "w3"])?;
    assert!(placement(&ring(&c)?) == three, "the keys did not come back");
    c.check_logs(&[])
}

/// Sixteen files of 1 MiB in an S3 server that can be told to fail.
fn faulty_origin() -> Result<(OssServer, Files)> {
    let server = OssServer::start_with(OssOptions::s3())?;
    let files: Vec<(PathBuf, u64)> = (0..16).map(|i| (format!("f{i:02}").into(), 1 << 20)).collect();
    for (path, size) in &files {
        let mut bytes = vec![0; *size as usize];
        data::fill(data::seed_of(path), 0, &mut bytes);
        server.put("data", path.as_os_str().as_encoded_bytes(), bytes);
    }
    Ok((server, Arc::new(files)))
}

fn faulty_mount(c: &Cluster, server: &OssServer, more: &[&str]) -> Result<Mount> {
    let (endpoint, option, target) = (format!("endpoint={}", server.endpoint()), c.option(), server.target());
    let mut options = vec![option.as_str(), &endpoint, "consistency=immutable", "timeout=2s"];
    options.extend(more);
    Mount::start("s3://data", &options, &target.env())
}

/// 5xx for some seconds, stalled answers, stalled and broken bodies, refused connections: reads wait and succeed.
#[test]
fn reads_outlast_an_origin_that_fails_for_a_while() -> Result<()> {
    let (server, files) = faulty_origin()?;
    let c = Cluster::start(1, &[worker(), worker()])?;
    let m = faulty_mount(&c, &server, &[])?;
    let while_ = Duration::from_secs(if std::env::var_os("EFC_E2E_LONG").is_some() { 30 } else { 6 });
    let busy = Action::Status { status: 503, code: String::new() };
    server.fault(Fault::on("*", busy).lasting(while_));
    let faults = [
        Fault::on("get", Action::Latency { ms: 20_000 }).times(3),
        Fault::on("get", Action::Pause { after_bytes: 300_000, ms: 20_000 }).times(2),
        Fault::on("get", Action::Reset { after_bytes: 300_000 }).times(4),
        Fault::on("get", Action::Truncate { after_bytes: 500_000 }).times(4),
        Fault::on("*", Action::Drop).times(4),
    ];
    let begun = Instant::now();
    let (root, list) = (m.path.clone(), files.clone());
    let first = within(PATIENCE, move || check_all(&root, &list, 1));
    first.context("503 from all operations")?;
    assert!(begun.elapsed() >= while_, "read within {:?}, the origin refused for {while_:?}", begun.elapsed());
    for fault in faults {
        let what = format!("{:?}", fault.action);
        c.efc(&["cache", "evict", "--all"])?;
        let struck = server.stats().faults;
        server.fault(fault);
        let (root, list) = (m.path.clone(), files.clone());
        within(PATIENCE, move || check_all(&root, &list, 2)).context(what.clone())?;
        assert!(server.stats().faults > struck, "{what} was never met");
        server.clear_faults();
    }
    m.finish(ORIGIN_TROUBLE)?;
    c.check_logs(ORIGIN_TROUBLE)
}

const READ_DEADLINE: Duration = Duration::from_secs(3);

/// With short deadlines reads end with EIO in time, and the same files are read well when the origin is well again.
#[test]
fn reads_fail_in_time_and_recover_by_themselves() -> Result<()> {
    let (server, files) = faulty_origin()?;
    let c = Cluster::start(1, &[worker(), worker()])?;
    let m = faulty_mount(&c, &server, &["deadline=2s", &format!("read_deadline={}s", READ_DEADLINE.as_secs())])?;
    let (path, size) = files[0].clone();
    let root = m.path.clone();
    // Names are known, so that only content fails.
    within(PATIENCE, move || check_file(&root, &path, size))?;
    for action in [
        Action::Status { status: 500, code: String::new() },
        Action::Latency { ms: 60_000 },
        Action::Drop,
        Action::Pause { after_bytes: 0, ms: 60_000 },
    ] {
        c.efc(&["cache", "evict", "--all"])?;
        server.fault(Fault::on("get", action.clone()));
        for (path, _) in &files[..1] {
            let (at, begun) = (m.path.join(path), Instant::now());
            let failed = within(PATIENCE, move || read_uncached(&at)).expect_err("the origin is broken");
            assert_eq!(failed.raw_os_error(), Some(nix::libc::EIO), "{action:?}: {failed}");
            // One read of an application is up to two of the kernel: its read-ahead, and when that failed the page itself, at once.
            let most = READ_DEADLINE + READ_DEADLINE / 10 + Duration::from_secs(1);
            assert!(begun.elapsed() < most, "{action:?}: EIO after {:?}", begun.elapsed());
        }
        server.clear_faults();
        let (root, list) = (m.path.clone(), files.clone());
        within(PATIENCE, move || check_all(&root, &list, 2)).with_context(|| format!("after {action:?}"))?;
    }
    m.finish(ORIGIN_TROUBLE)?;
    c.check_logs(ORIGIN_TROUBLE)
}

fn read_uncached(at: &Path) -> std::io::Result<Vec<u8>> {
    let mut file = std::fs::File::open(at)?;
    nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut file, &mut bytes)?;
    Ok(bytes)
}
