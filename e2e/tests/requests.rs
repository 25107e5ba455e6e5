//! What reading costs: requests at the origin for 10,000 small files of one directory, cold, by one mount and by two at
//! the same time; and FUSE requests for the same files when they are warm.

use anyhow::{Result, ensure};
use efc_e2e::{Cluster, Mount, WorkerSpec, within};
use efc_testkit::data::make_flat;
use efc_testkit::process::scratch;
use efc_testkit::{Manifest, S3Ro};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

const FILES: u64 = 10_000;
const SIZE: u64 = 112 << 10;
const READERS: usize = 4;
const PASSES: u64 = 6;
const PATIENCE: Duration = Duration::from_secs(180);

fn worker() -> WorkerSpec {
    WorkerSpec { memory: "700MiB".into(), ..WorkerSpec::default() }
}

fn mount(c: &Cluster, server: &S3Ro) -> Result<Mount> {
    let (endpoint, target) = (format!("endpoint={}", server.endpoint()), server.target());
    Mount::start("s3://data", &[&c.option(), &endpoint, "consistency=immutable"], &target.env())
}

/// Opens, reads and closes every file, as a training job does; gives the time.
fn read_all(dir: &Path) -> Result<Duration> {
    let begun = Instant::now();
    let work = |reader: usize| -> Result<()> {
        let mut buffer = vec![0; SIZE as usize + 1];
        for i in (reader as u64..FILES).step_by(READERS) {
            let mut file = File::open(dir.join(format!("{i:05}.dat")))?;
            let mut have = 0;
            loop {
                match file.read(&mut buffer[have..])? {
                    0 => break,
                    n => have += n,
                }
            }
            ensure!(have as u64 == SIZE, "{i:05}.dat: {have} bytes");
        }
        Ok(())
    };
    std::thread::scope(|s| {
        let all: Vec<_> = (0..READERS).map(|r| s.spawn(move || work(r))).collect();
        all.into_iter().try_for_each(|t| t.join().expect("a reader panicked"))
    })?;
    Ok(begun.elapsed())
}

fn check_cost(server: &S3Ro) {
    let cost = server.stats();
    assert!(cost.list <= 11 && cost.head == 0 && cost.get <= 10_200, "{cost:?}");
    assert_eq!(cost.bytes, FILES * SIZE, "{cost:?}");
}

fn data() -> Result<(tempfile::TempDir, Manifest, S3Ro)> {
    let dir = scratch("requests")?;
    let manifest = make_flat(&dir.path().join("data"), FILES, SIZE)?;
    let server = S3Ro::start(dir.path(), Duration::ZERO)?;
    Ok((dir, manifest, server))
}

/// One mount: the cost cold; warm it costs nothing at all, and every byte is right.
#[test]
fn one_mount_cold_then_warm() -> Result<()> {
    let (dir, manifest, server) = data()?;
    let c = Cluster::start(1, &[worker(), worker(), worker()])?;
    let m = mount(&c, &server)?;
    let path = m.path.clone();
    within(PATIENCE, move || manifest.verify(&path, READERS))?;
    check_cost(&server);

    // Every name was listed and every page read: the kernel needs nobody for another open, read and close. It may take pages back at any time, as a
    // machine with little memory or a container's limit makes it; reading those again is a READ each and nothing else. So the best of some passes
    // counts, and in all of them no operation but READ may appear.
    let plain = dir.path().join("data");
    let (first, _) = m.fuse_requests()?;
    let (mut warm, mut local, mut fewest) = (Duration::MAX, Duration::MAX, u64::MAX);
    for _ in 0..PASSES {
        let (_, before) = m.fuse_requests()?;
        let path = m.path.clone();
        warm = warm.min(within(PATIENCE, move || read_all(&path))?);
        let (_, after) = m.fuse_requests()?;
        fewest = fewest.min(after - before);
        local = local.min(read_all(&plain)?);
    }
    let (last, _) = m.fuse_requests()?;
    assert!(fewest <= FILES / 1000, "{fewest} requests for {FILES} warm files in the best of {PASSES} passes");
    for (op, before) in first.iter().filter(|(op, _)| *op != "read") {
        assert!(
            last[op] - before <= PASSES,
            "{PASSES} warm passes over {FILES} files: {op} {before} became {}",
            last[op]
        );
    }
    check_cost(&server);
    println!("warm: {fewest} requests, {warm:?}; the same files in the local page cache: {local:?}");
    m.finish(&[])?;
    c.check_logs(&[])
}

/// Two mounts from cold at the same time cost the origin what one costs.
#[test]
fn two_mounts_at_once_cost_one() -> Result<()> {
    let (_dir, manifest, server) = data()?;
    let c = Cluster::start(1, &[worker(), worker(), worker()])?;
    let (a, b) = (mount(&c, &server)?, mount(&c, &server)?);
    let paths = [a.path.clone(), b.path.clone()];
    within(PATIENCE, move || -> Result<()> {
        std::thread::scope(|s| {
            let both: Vec<_> = paths.iter().map(|p| s.spawn(|| manifest.verify(p, READERS))).collect();
            both.into_iter().try_for_each(|t| t.join().expect("a reader panicked").map(|_| ()))
        })
    })?;
    check_cost(&server);
    assert_eq!(c.metric("efc_origin_bytes_total", "")? as u64, FILES * SIZE);
    for m in [a, b] {
        let stats = m.stats()?;
        assert_eq!(stats["origin_requests"]["get"].as_u64().unwrap_or(0), 0, "{stats}");
        m.finish(&[])?;
    }
    c.check_logs(&[])
}
