//! Budgets hold: a worker limited to 256 MiB that serves 2 GiB, and a mount limited to 256 MiB that scans 100,000 files, stay within a
//! tenth over it, counted by the kernel, and nothing fails.

use anyhow::{Result, ensure};
use efc_e2e::reader::{Files, check_all};
use efc_e2e::{Cluster, Mount, WorkerSpec, peak_rss, within};
use efc_testkit::process::scratch;
use efc_testkit::{OssOptions, OssServer, S3Ro};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

const LIMIT: u64 = 256 << 20;
const PATIENCE: Duration = Duration::from_secs(150);

/// Peak memory of a worker: what is resident and the pages of its memory tier, a memfd that is never mapped.
fn worker_peak(c: &Cluster) -> Result<u64> {
    let pid = c.workers[0].child.as_ref().map_or(0, |p| p.pid());
    let tier = c.workers[0].metric("efc_cache_used_bytes", "tier=\"memory\"")? as u64;
    let rss = peak_rss(pid)?;
    println!("worker: {} MiB resident at most, {} MiB in its memory tier", rss >> 20, tier >> 20);
    Ok(rss + tier)
}

/// Reads a file of zeros to its end.
fn read_zeros(at: &Path, size: u64) -> Result<()> {
    let mut file = File::open(at)?;
    let mut buffer = vec![0; 1 << 20];
    let mut total = 0;
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        ensure!(buffer[..n].iter().all(|b| *b == 0), "{}: not zero", at.display());
        total += n as u64;
    }
    ensure!(total == size, "{}: {total} bytes", at.display());
    Ok(())
}

#[test]
fn a_worker_of_256_mib_serves_2_gib() -> Result<()> {
    const FILES: u64 = 16;
    const SIZE: u64 = 128 << 20;
    let dir = scratch("memory")?;
    std::fs::create_dir(dir.path().join("data"))?;
    for i in 0..FILES {
        File::create(dir.path().join(format!("data/{i:02}")))?.set_len(SIZE)?;
    }
    let server = S3Ro::start(dir.path(), Duration::ZERO)?;
    let spec =
        WorkerSpec { memory: "1GiB".into(), disk: String::new(), args: vec!["--memory-limit".into(), "256MiB".into()] };
    let c = Cluster::start(1, &[spec])?;
    let (endpoint, target) = (format!("endpoint={}", server.endpoint()), server.target());
    let m = Mount::start("s3://data", &[&c.option(), &endpoint, "workers_only"], &target.env())?;
    // Eight streams at once, each reading far ahead.
    let root = m.path.clone();
    within(PATIENCE, move || -> Result<()> {
        let next = AtomicU64::new(0);
        let work = || -> Result<()> {
            loop {
                let i = next.fetch_add(1, Relaxed);
                if i >= FILES {
                    return Ok(());
                }
                read_zeros(&root.join(format!("{i:02}")), SIZE)?;
            }
        };
        std::thread::scope(|s| {
            let all: Vec<_> = (0..8).map(|_| s.spawn(work)).collect();
            all.into_iter().try_for_each(|t| t.join().expect("a reader panicked"))
        })
    })?;
    let peak = worker_peak(&c)?;
    assert!(peak <= LIMIT + LIMIT / 10, "the worker took {} MiB", peak >> 20);
    m.finish(&[])?;
    c.check_logs(&[])
}

#[test]
fn a_mount_of_256_mib_scans_100_000_files() -> Result<()> {
    const DIRS: u64 = 20;
    const PER_DIR: u64 = 5000;
    let server = OssServer::start_with(OssOptions::s3())?;
    server.create_bucket("data");
    let mut files = Vec::new();
    for i in 0..DIRS * PER_DIR {
        let path = format!("dir-{:02}/a-name-as-long-as-those-of-images-{i:06}.jpg", i / PER_DIR);
        let mut bytes = vec![0; 16];
        efc_testkit::data::fill(efc_testkit::data::seed_of(path.as_ref()), 0, &mut bytes);
        server.put("data", &path, bytes);
        files.push((path.into(), 16));
    }
    // Every file is looked at; of each directory one file in ten is read.
    let read: Files = std::sync::Arc::new(files.iter().step_by(10).cloned().collect());
    let spec = WorkerSpec { memory: "256MiB".into(), ..WorkerSpec::default() };
    let c = Cluster::start(1, &[spec])?;
    let (endpoint, target) = (format!("endpoint={}", server.endpoint()), server.target());
    let m = Mount::start("s3://data", &[&c.option(), &endpoint, "memory=256MiB"], &target.env())?;
    let root = m.path.clone();
    let seen = within(PATIENCE, move || -> Result<u64> {
        let mut seen = 0;
        for dir in std::fs::read_dir(&root)? {
            for file in std::fs::read_dir(dir?.path())? {
                let meta = file?.metadata()?;
                ensure!(meta.is_file() && meta.len() == 16, "{meta:?}");
                seen += 1;
            }
        }
        check_all(&root, &read, 4)?;
        Ok(seen)
    })?;
    assert_eq!(seen, DIRS * PER_DIR);
    let peak = peak_rss(m.pid())?;
    println!("mount: {} MiB resident at most", peak >> 20);
    assert!(peak <= LIMIT + LIMIT / 10, "the mount took {} MiB", peak >> 20);
    m.finish(&[])?;
    c.check_logs(&[])
}
