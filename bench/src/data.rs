//! The data every tool reads: one large file, many small files in one directory, a tree with very many tiny files.
//!
//! Bytes follow from path and offset (`efc_testkit::data::fill`), so the digests that reads are compared with are computed, never read from
//! disk. A directory of the same plan is used again; the plan is written beside the data.

use anyhow::{Context, Result};
use efc_testkit::data::{fill, seed_of};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use xxhash_rust::xxh3::xxh3_64;

/// Name of the bucket with the data.
pub const BUCKET: &str = "data";
/// The large file's path in the bucket.
pub const BIG: &str = "big/1g.bin";
/// The directory of small files.
pub const SMALL: &str = "small";
/// The tree that `find` walks.
pub const TREE: &str = "tree";
/// The large file is verified in pages of this size: the smallest read of any test.
pub const PAGE_BYTES: usize = 4096;
/// Files per directory of the tree.
const TREE_FANOUT: u64 = 1000;
/// Bytes written at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// How much of everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Size of the large file, bytes; a multiple of 1 MiB.
    pub big_bytes: u64,
    /// Number of small files, of about 112 KiB each.
    pub small_files: u64,
    /// Number of files in the tree.
    pub tree_files: u64,
}

impl Plan {
    /// The sizes of the issue times `scale`.
    pub fn scaled(scale: f64) -> Plan {
        let times = |n: u64| ((n as f64 * scale).ceil() as u64).max(1);
        Plan { big_bytes: times(1024) << 20, small_files: times(10_000), tree_files: times(100_000) }
    }
}

/// One small file.
#[derive(Debug, Clone)]
pub struct SmallFile {
    /// Path in the bucket.
    pub path: PathBuf,
    /// Size, bytes.
    pub size: u64,
    /// XXH3 of its bytes.
    pub digest: u64,
}

/// The data on disk and what reads of it must give.
#[derive(Debug)]
pub struct Data {
    /// Sizes.
    pub plan: Plan,
    /// Directory of the bucket.
    pub dir: PathBuf,
    /// XXH3 of every page of the large file.
    pub pages: Vec<u64>,
    /// The small files in name order.
    pub small: Vec<SmallFile>,
}

/// Size of small file `i`: 96 to 128 KiB, 112 on average, rarely a multiple of anything.
fn small_size(i: u64) -> u64 {
    (96 << 10) + (i.wrapping_mul(2_654_435_761) >> 7) % (32 << 10)
}

/// Path and size of file `i` of the tree. A third is empty; the others are holes, so that making them costs no memory.
pub fn tree_file(i: u64) -> (PathBuf, u64) {
    let size = if i.is_multiple_of(3) { 0 } else { i * 7919 % 100_000 };
    (format!("{TREE}/d{:03}/{i:06}", i / TREE_FANOUT).into(), size)
}

/// Runs `work` for 0..count on two threads.
fn in_parallel<T: Send + Default + Clone>(count: usize, work: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    let next = AtomicUsize::new(0);
    let one = || -> Result<Vec<(usize, T)>> {
        let mut out = Vec::new();
        loop {
            let i = next.fetch_add(1, Relaxed);
            if i >= count {
                return Ok(out);
            }
            out.push((i, work(i)?));
        }
    };
    let parts = std::thread::scope(|s| {
        let threads: Vec<_> = (0..2).map(|_| s.spawn(one)).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p))).collect::<Vec<_>>()
    });
    let mut all = vec![T::default(); count];
    for part in parts {
        part?.into_iter().for_each(|(i, t)| all[i] = t);
    }
    Ok(all)
}

impl Data {
    /// Makes the data below `root/data`, or takes what an earlier run with the same plan left there.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn make(root: &Path, plan: Plan) -> Result<Data> {
        let dir = root.join(BUCKET);
        let stamp = root.with_extension("plan.json");
        let have = fs::read(&stamp).ok().and_then(|b| serde_json::from_slice::<Plan>(&b).ok()) == Some(plan);
        if !have {
            if dir.exists() {
                fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display()))?;
            }
            make_tree(&dir, plan)?;
        }
        let small = in_parallel(plan.small_files as usize, |i| {
            let (path, size) = (PathBuf::from(format!("{SMALL}/{i:05}.dat")), small_size(i as u64));
            let mut bytes = vec![0; size as usize];
            fill(seed_of(&path), 0, &mut bytes);
            let digest = xxh3_64(&bytes);
            if !have {
                write(&dir.join(&path), &bytes)?;
            }
            Ok((path, size, digest))
        })?;
        let small = small.into_iter().map(|(path, size, digest)| SmallFile { path, size, digest }).collect();
        let pages = make_big(&dir.join(BIG), plan.big_bytes, !have)?;
        if !have {
            fs::write(&stamp, serde_json::to_vec(&plan)?)?;
        }
        Ok(Data { plan, dir, pages, small })
    }

    /// Does `bytes`, read at a page boundary of the large file, hold what was written there?
    pub fn is_right(&self, offset: u64, bytes: &[u8]) -> bool {
        let first = (offset / PAGE_BYTES as u64) as usize;
        let want = self.pages.get(first..);
        want.is_some_and(|want| bytes.chunks(PAGE_BYTES).zip(want).all(|(b, w)| xxh3_64(b) == *w))
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).with_context(|| format!("write {}", path.display()))
}

fn make_tree(dir: &Path, plan: Plan) -> Result<()> {
    fs::create_dir_all(dir.join(SMALL)).with_context(|| format!("make {}", dir.display()))?;
    if let Some(big) = dir.join(BIG).parent() {
        fs::create_dir_all(big)?;
    }
    for d in 0..plan.tree_files.div_ceil(TREE_FANOUT) {
        fs::create_dir_all(dir.join(format!("{TREE}/d{d:03}")))?;
    }
    in_parallel(plan.tree_files as usize, |i| {
        let (path, size) = tree_file(i as u64);
        let file = File::create(dir.join(&path)).with_context(|| format!("make {}", path.display()))?;
        Ok(file.set_len(size)?)
    })?;
    Ok(())
}

fn make_big(path: &Path, size: u64, write: bool) -> Result<Vec<u64>> {
    let file = if write { Some(File::create(path).with_context(|| path.display().to_string())?) } else { None };
    let seed = seed_of(Path::new(BIG));
    let chunks = in_parallel((size as usize).div_ceil(CHUNK_BYTES), |i| {
        let at = i as u64 * CHUNK_BYTES as u64;
        let mut bytes = vec![0; CHUNK_BYTES.min((size - at) as usize)];
        fill(seed, at, &mut bytes);
        if let Some(file) = &file {
            file.write_all_at(&bytes, at)?;
        }
        Ok(bytes.chunks(PAGE_BYTES).map(xxh3_64).collect::<Vec<_>>())
    })?;
    Ok(chunks.concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn data_is_the_same_again_and_digests_tell_a_wrong_page() {
        let dir = efc_testkit::scratch("bench-data").unwrap();
        let root = dir.path().join("origin");
        let plan = Plan { big_bytes: 3 << 20, small_files: 5, tree_files: 7 };
        let first = Data::make(&root, plan).unwrap();
        let modified = fs::metadata(first.dir.join(BIG)).unwrap().ino();
        let again = Data::make(&root, plan).unwrap();
        assert_eq!(fs::metadata(again.dir.join(BIG)).unwrap().ino(), modified);
        assert_eq!(first.pages, again.pages);
        let mut bytes = fs::read(again.dir.join(BIG)).unwrap();
        assert!(again.is_right(0, &bytes));
        assert!(again.is_right(8192, &bytes[8192..12288]));
        assert!(!again.is_right(4096, &bytes[8192..12288]), "another page's bytes");
        bytes[5000] ^= 1;
        assert!(!again.is_right(0, &bytes));
        for f in &again.small {
            let bytes = fs::read(again.dir.join(&f.path)).unwrap();
            assert_eq!((bytes.len() as u64, xxh3_64(&bytes)), (f.size, f.digest));
        }
        let sizes: Vec<u64> = (0..7).map(|i| fs::metadata(again.dir.join(tree_file(i).0)).unwrap().len()).collect();
        assert_eq!(sizes, (0..7).map(|i| tree_file(i).1).collect::<Vec<_>>());
    }

    #[test]
    fn small_files_are_about_112_kib() {
        let mean = (0..10_000).map(small_size).sum::<u64>() / 10_000;
        assert!((110 << 10..114 << 10).contains(&mean), "{mean}");
        let scaled = Plan::scaled(0.1);
        assert_eq!((scaled.small_files, scaled.tree_files), (1000, 10_000));
    }
}
