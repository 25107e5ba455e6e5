//! What is done on a mount: the four workloads. Each times itself, checks every byte or size it gets, and fails on the first wrong one.
//!
//! The checking (XXH3, some 0.1 s per GiB) is inside the measured time, the same for every tool. Nothing here has a deadline of its own:
//! callers run it under [`efc_testkit::FuseGuard::with_timeout`].

use crate::data::{BIG, Data, SMALL, TREE, tree_file};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::xxh3_64;

/// Size of one read of the sequential test, bytes.
const SEQUENTIAL_BYTES: usize = 1 << 20;
/// Buffer of the small-file readers, bytes: no small file is larger.
const SMALL_BUFFER_BYTES: usize = 128 << 10;

/// What a workload did.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Tally {
    /// Files read or listed, or reads of a random test.
    pub ops: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// 99th percentile of one operation (random: one read; small: open to close), microseconds; 0 where it has no meaning.
    pub p99_us: u64,
}

/// Reads the large file from start to end.
///
/// # Errors
/// When a read fails or gives a wrong byte.
pub fn sequential(mount: &Path, data: &Data) -> Result<Tally> {
    let path = mount.join(BIG);
    let mut buffer = vec![0; SEQUENTIAL_BYTES];
    let start = Instant::now();
    let mut file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
    let mut at = 0;
    loop {
        let size = read_full(&mut file, &mut buffer).with_context(|| format!("read {BIG} at {at}"))?;
        if size == 0 {
            break;
        }
        ensure!(data.is_right(at, &buffer[..size]), "wrong bytes in {BIG} between {at} and {}", at + size as u64);
        at += size as u64;
    }
    ensure!(at == data.plan.big_bytes, "{BIG} has {at} bytes instead of {}", data.plan.big_bytes);
    Ok(Tally { ops: 1, bytes: at, seconds: start.elapsed().as_secs_f64(), p99_us: 0 })
}

fn read_full(file: &mut File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut size = 0;
    while size < buffer.len() {
        match file.read(&mut buffer[size..])? {
            0 => break,
            n => size += n,
        }
    }
    Ok(size)
}

/// Runs `job(number, latencies)` on `jobs` threads; the first error stops all by `failed`.
fn threads(
    jobs: usize,
    failed: &AtomicBool,
    job: impl Fn(usize, &mut Vec<u32>) -> Result<u64> + Sync,
) -> Result<Tally> {
    let start = Instant::now();
    let all = Mutex::new((0, Vec::new(), None));
    std::thread::scope(|s| {
        for i in 0..jobs {
            let (job, all) = (&job, &all);
            s.spawn(move || {
                let mut latencies = Vec::new();
                let done = job(i, &mut latencies);
                failed.fetch_or(done.is_err(), Relaxed);
                let mut all = all.lock().unwrap_or_else(|e| e.into_inner());
                all.1.append(&mut latencies);
                match done {
                    Ok(bytes) => all.0 += bytes,
                    Err(e) => all.2 = Some(e),
                }
            });
        }
    });
    let seconds = start.elapsed().as_secs_f64();
    let (bytes, mut latencies, error) = all.into_inner().unwrap_or_else(|e| e.into_inner());
    if let Some(e) = error {
        return Err(e);
    }
    latencies.sort_unstable();
    let p99_us = latencies.get(latencies.len().saturating_sub(1) * 99 / 100).copied().unwrap_or(0);
    Ok(Tally { ops: latencies.len() as u64, bytes, seconds, p99_us: p99_us.into() })
}

/// In which order small files are read: `i` of `count`.
fn order(i: usize, count: usize, shuffled: bool) -> usize {
    // A step without a common divisor visits every file once.
    let step = (count * 618 / 1000..).find(|s| *s > 0 && gcd(*s, count) == 1).unwrap_or(1);
    if shuffled { i * step % count } else { i }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Opens, reads and closes every small file, by `readers` threads that take the next name each.
///
/// # Errors
/// When a read fails or gives a wrong byte.
pub fn small(mount: &Path, data: &Data, readers: usize, shuffled: bool) -> Result<Tally> {
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    threads(readers, &failed, |_, latencies| {
        let mut buffer = vec![0; SMALL_BUFFER_BYTES];
        let mut bytes = 0;
        while !failed.load(Relaxed) {
            let i = next.fetch_add(1, Relaxed);
            if i >= data.small.len() {
                break;
            }
            let want = &data.small[order(i, data.small.len(), shuffled)];
            let start = Instant::now();
            let mut file =
                File::open(mount.join(&want.path)).with_context(|| format!("open {}", want.path.display()))?;
            let size = read_full(&mut file, &mut buffer).with_context(|| format!("read {}", want.path.display()))?;
            drop(file);
            latencies.push(start.elapsed().as_micros() as u32);
            let right = size as u64 == want.size && xxh3_64(&buffer[..size]) == want.digest;
            ensure!(right, "wrong bytes in {} ({size} of {} bytes read)", want.path.display(), want.size);
            bytes += size as u64;
        }
        Ok(bytes)
    })
}

/// Reads `size` bytes at random aligned offsets of the large file for `time`, by `jobs` threads. `seed` decides the offsets.
///
/// # Errors
/// When a read fails or gives a wrong byte.
pub fn random(mount: &Path, data: &Data, size: usize, jobs: usize, time: Duration, seed: u64) -> Result<Tally> {
    let failed = AtomicBool::new(false);
    let path = mount.join(BIG);
    let slots = (data.plan.big_bytes / size as u64).max(1);
    let deadline = Instant::now() + time;
    threads(jobs, &failed, |job, latencies| {
        let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        let mut buffer = vec![0; size];
        let mut state = seed ^ (job as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut bytes = 0;
        // Once at least, however late the thread began.
        while (latencies.is_empty() || Instant::now() < deadline) && !failed.load(Relaxed) {
            // Xorshift64* (Vigna 2016).
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            let at = (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % slots * size as u64;
            let start = Instant::now();
            file.read_exact_at(&mut buffer, at).with_context(|| format!("read {size} bytes of {BIG} at {at}"))?;
            latencies.push(start.elapsed().as_micros() as u32);
            ensure!(data.is_right(at, &buffer), "wrong bytes in {BIG} at {at}");
            bytes += size as u64;
        }
        Ok(bytes)
    })
}

/// Runs `find -type f -printf '%s %f\n'` over the small files or the tree and checks every size.
///
/// # Errors
/// When `find` fails, or a file is missing, foreign or of a wrong size.
pub fn find(mount: &Path, data: &Data, tree: bool) -> Result<Tally> {
    let root = mount.join(if tree { TREE } else { SMALL });
    let start = Instant::now();
    let mut command = Command::new("find");
    command.arg(&root).args(["-type", "f", "-printf", "%s %f\\n"]);
    let output = command.stdin(Stdio::null()).stderr(Stdio::piped()).output().context("start find")?;
    let seconds = start.elapsed().as_secs_f64();
    if !output.status.success() {
        bail!("find failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let found: BTreeMap<&str, &str> = text.lines().filter_map(|l| l.split_once(' ').map(|(s, n)| (n, s))).collect();
    let name = |p: &Path| p.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let want: BTreeMap<String, u64> = match tree {
        true => (0..data.plan.tree_files).map(tree_file).map(|(p, s)| (name(&p), s)).collect(),
        false => data.small.iter().map(|f| (name(&f.path), f.size)).collect(),
    };
    ensure!(found.len() == want.len(), "find saw {} files instead of {}", found.len(), want.len());
    for (name, size) in &want {
        let seen = found.get(name.as_str()).with_context(|| format!("find did not see {name}"))?;
        ensure!(**seen == size.to_string(), "find gave {seen} as the size of {name} instead of {size}");
    }
    Ok(Tally { ops: want.len() as u64, bytes: 0, seconds, p99_us: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Plan;

    #[test]
    fn every_workload_accepts_the_data_and_refuses_a_wrong_byte() {
        let dir = efc_testkit::scratch("bench-work").unwrap();
        let plan = Plan { big_bytes: 2 << 20, small_files: 9, tree_files: 11 };
        let data = Data::make(&dir.path().join("origin"), plan).unwrap();
        let at = data.dir.clone();
        let time = Duration::from_millis(30);
        assert_eq!(sequential(&at, &data).unwrap().bytes, 2 << 20);
        let done = small(&at, &data, 4, true).unwrap();
        assert_eq!((done.ops, done.bytes), (9, data.small.iter().map(|f| f.size).sum()));
        let done = random(&at, &data, 262_144, 2, time, 1).unwrap();
        assert!(done.ops > 0 && done.bytes == done.ops * 262_144);
        assert_eq!(find(&at, &data, true).unwrap().ops, 11);
        assert_eq!(find(&at, &data, false).unwrap().ops, 9);

        let big = File::options().write(true).open(at.join(BIG)).unwrap();
        (0..512).for_each(|page| big.write_all_at(b"?", page * 4096 + 77).unwrap());
        assert!(sequential(&at, &data).unwrap_err().to_string().contains("wrong bytes"));
        assert!(random(&at, &data, 4096, 2, time, 1).unwrap_err().to_string().contains("wrong bytes"));
        let third = File::options().write(true).open(at.join(&data.small[3].path)).unwrap();
        third.write_all_at(b"?", 100_000 - 5_000).unwrap();
        assert!(small(&at, &data, 2, false).unwrap_err().to_string().contains("00003.dat"));
        third.set_len(5).unwrap();
        assert!(find(&at, &data, false).unwrap_err().to_string().contains("00003.dat"));
        std::fs::remove_file(at.join(tree_file(4).0)).unwrap();
        assert!(find(&at, &data, true).is_err());
    }

    #[test]
    fn shuffling_visits_every_file_once() {
        for count in [1, 2, 9, 1000] {
            let mut seen: Vec<usize> = (0..count).map(|i| order(i, count, true)).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..count).collect::<Vec<_>>());
        }
        assert_ne!(order(1, 1000, true), 1);
    }
}
