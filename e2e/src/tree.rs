//! Comparing a mounted tree with what it was made from: names, types, sizes and every byte.

use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};

/// What two trees had in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Compared {
    /// Regular files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Directories, without the roots.
    pub dirs: u64,
}

/// Compares every name, type and byte of two trees with `readers` threads.
///
/// # Errors
/// At the first difference, naming the path.
pub fn compare(want: &Path, got: &Path, readers: usize) -> Result<Compared> {
    let mut sum = Compared::default();
    let mut files = Vec::new();
    walk(want, got, &mut sum, &mut files)?;
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|s| {
        let work = || -> Result<()> {
            while let Some((a, b)) = files.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
                same_bytes(a, b)?;
            }
            Ok(())
        };
        let all: Vec<_> = (0..readers.max(1)).map(|_| s.spawn(work)).collect();
        all.into_iter().try_for_each(|t| t.join().expect("reader panicked"))
    })?;
    Ok(sum)
}

fn names(dir: &Path) -> Result<BTreeMap<OsString, std::fs::Metadata>> {
    let list = std::fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))?;
    list.map(|e| e.and_then(|e| Ok((e.file_name(), e.metadata()?))).with_context(|| format!("list {}", dir.display())))
        .collect()
}

fn walk(want: &Path, got: &Path, sum: &mut Compared, files: &mut Vec<(PathBuf, PathBuf)>) -> Result<()> {
    let (a, b) = (names(want)?, names(got)?);
    let missing: Vec<_> = a.keys().filter(|k| !b.contains_key(*k)).take(3).collect();
    let extra: Vec<_> = b.keys().filter(|k| !a.contains_key(*k)).take(3).collect();
    ensure!(missing.is_empty() && extra.is_empty(), "{}: missing {missing:?}, extra {extra:?}", got.display());
    for (name, meta) in &a {
        let (x, y) = (want.join(name), got.join(name));
        ensure!(meta.is_dir() == b[name].is_dir(), "{}: another type", y.display());
        if meta.is_dir() {
            sum.dirs += 1;
            walk(&x, &y, sum, files)?;
        } else {
            ensure!(meta.len() == b[name].len(), "{}: size {} instead of {}", y.display(), b[name].len(), meta.len());
            sum.files += 1;
            sum.bytes += meta.len();
            files.push((x, y));
        }
    }
    Ok(())
}

/// Compares two files byte by byte.
///
/// # Errors
/// At the first difference, naming the file and the offset.
pub fn same_bytes(want: &Path, got: &Path) -> Result<()> {
    let mut a = std::fs::File::open(want).with_context(|| format!("open {}", want.display()))?;
    let mut b = std::fs::File::open(got).with_context(|| format!("open {}", got.display()))?;
    let (mut x, mut y) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0u64;
    loop {
        let n = fill(&mut a, &mut x)?;
        let m = fill(&mut b, &mut y).with_context(|| format!("read {} at {at}", got.display()))?;
        if let Some(i) = x[..n].iter().zip(&y[..m]).position(|(p, q)| p != q) {
            anyhow::bail!("{}: another byte at {}", got.display(), at + i as u64);
        }
        ensure!(n == m, "{}: ends at {} instead of {}", got.display(), at + m as u64, at + n as u64);
        if n == 0 {
            return Ok(());
        }
        at += n as u64;
    }
}

fn fill(from: &mut std::fs::File, buf: &mut [u8]) -> std::io::Result<usize> {
    let mut n = 0;
    while n < buf.len() {
        match from.read(&mut buf[n..])? {
            0 => break,
            k => n += k,
        }
    }
    Ok(n)
}
