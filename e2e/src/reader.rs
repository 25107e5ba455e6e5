//! Readers of a mount that compare every byte: once over, or in a loop while a test breaks things.
//!
//! Every read goes to the mount process: the kernel's pages of a file are dropped before it is read, else a loop would only read the page cache.

use anyhow::{Context, Result, bail, ensure};
use efc_testkit::data::{fill, seed_of};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Reads one file whose bytes are those of `efc_testkit::data` for `relative`, and compares them.
///
/// # Errors
/// What the mount answered, or where the bytes differ.
pub fn check_file(root: &Path, relative: &Path, size: u64) -> Result<()> {
    let at = root.join(relative);
    let mut file = File::open(&at).with_context(|| format!("open {}", at.display()))?;
    let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
    nix::fcntl::posix_fadvise(&file, 0, 0, advice).context("drop the kernel's pages")?;
    let seed = seed_of(relative);
    let (mut got, mut want) = (vec![0; 256 << 10], vec![0; 256 << 10]);
    let mut offset = 0u64;
    loop {
        let n = file.read(&mut got).with_context(|| format!("read {} at {offset}", at.display()))?;
        if n == 0 {
            break;
        }
        fill(seed, offset, &mut want[..n]);
        if let Some(i) = got[..n].iter().zip(&want[..n]).position(|(a, b)| a != b) {
            bail!("{}: another byte at {}", at.display(), offset + i as u64);
        }
        offset += n as u64;
    }
    ensure!(offset == size, "{}: {offset} bytes instead of {size}", at.display());
    Ok(())
}

/// Files to read: path below the mount, size.
pub type Files = Arc<Vec<(PathBuf, u64)>>;

/// Reads every file once with `readers` threads.
///
/// # Errors
/// The first.
pub fn check_all(root: &Path, files: &Files, readers: usize) -> Result<()> {
    let next = AtomicU64::new(0);
    let work = || -> Result<()> {
        while let Some((path, size)) = files.get(next.fetch_add(1, Relaxed) as usize) {
            check_file(root, path, *size)?;
        }
        Ok(())
    };
    std::thread::scope(|s| {
        let all: Vec<_> = (0..readers).map(|_| s.spawn(work)).collect();
        all.into_iter().try_for_each(|t| t.join().expect("a reader panicked"))
    })
}

/// What a loop did.
#[derive(Debug, Clone, Copy)]
pub struct Looped {
    /// Files read.
    pub files: u64,
    /// The longest time one file took.
    pub slowest: Duration,
}

/// Readers that go round and round until they are stopped.
pub struct Looping {
    stop: Arc<AtomicBool>,
    files: Arc<AtomicU64>,
    slowest_ms: Arc<AtomicU64>,
    ends: mpsc::Receiver<Result<()>>,
    readers: usize,
}

impl Looping {
    /// Starts `readers` threads over `files` below `root`.
    pub fn start(root: &Path, files: &Files, readers: usize) -> Looping {
        let (tx, ends) = mpsc::channel();
        let l = Looping { stop: Arc::default(), files: Arc::default(), slowest_ms: Arc::default(), ends, readers };
        for reader in 0..readers {
            let (root, list, tx) = (root.to_path_buf(), files.clone(), tx.clone());
            let (stop, count, slowest) = (l.stop.clone(), l.files.clone(), l.slowest_ms.clone());
            std::thread::spawn(move || {
                let work = || -> Result<()> {
                    for i in reader * list.len() / readers.max(1).. {
                        if stop.load(Relaxed) {
                            break;
                        }
                        let (path, size) = &list[i % list.len()];
                        let begun = Instant::now();
                        check_file(&root, path, *size)?;
                        slowest.fetch_max(begun.elapsed().as_millis() as u64, Relaxed);
                        count.fetch_add(1, Relaxed);
                    }
                    Ok(())
                };
                // The test may be gone after a failure of its own.
                let _ = tx.send(work());
            });
        }
        l
    }

    /// Files read so far.
    pub fn files(&self) -> u64 {
        self.files.load(Relaxed)
    }

    /// Waits until `more` more files have been read.
    ///
    /// # Errors
    /// What a reader met, or that they stand still for `patience`.
    pub fn advance(&self, more: u64, patience: Duration) -> Result<()> {
        let (goal, deadline) = (self.files() + more, Instant::now() + patience);
        while self.files() < goal {
            match self.ends.recv_timeout(Duration::from_millis(20)) {
                Ok(ended) => return ended.and_then(|()| bail!("a reader ended early")),
                Err(_) => ensure!(Instant::now() < deadline, "readers stand still at file {}", self.files()),
            }
        }
        Ok(())
    }

    /// Ends the readers.
    ///
    /// # Errors
    /// What any of them met.
    pub fn stop(self, patience: Duration) -> Result<Looped> {
        self.stop.store(true, Relaxed);
        for _ in 0..self.readers {
            self.ends.recv_timeout(patience).context("a reader hangs")??;
        }
        Ok(Looped { files: self.files(), slowest: Duration::from_millis(self.slowest_ms.load(Relaxed)) })
    }
}
