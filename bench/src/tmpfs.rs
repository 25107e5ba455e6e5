//! `efc-bench warm-vs-tmpfs`: what a warm read-only mount costs beside tmpfs. Both hold the same small files; once the kernel
//! has them, an open, a read and a close on the mount should not reach our process at all.

use crate::data::Data;
use crate::run::{Settings, place};
use crate::tool::{Mounted, Tool, mount};
use crate::work;
use anyhow::{Result, ensure};
use efc_testkit::S3Ro;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// One pass may take this long.
const PASS_DEADLINE: Duration = Duration::from_secs(300);

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub struct Warm {
    /// Files per second on tmpfs, the median pass.
    pub tmpfs_files_per_s: f64,
    /// The same on the mount.
    pub mount_files_per_s: f64,
    /// Mount over tmpfs.
    pub ratio: f64,
    /// FUSE requests per file and pass after the first pass.
    pub fuse_per_file: f64,
    /// The requests after the first pass, by operation.
    pub fuse_requests: BTreeMap<String, u64>,
    /// Passes on each.
    pub passes: usize,
    /// Seconds of each pass on tmpfs.
    pub tmpfs_s: Vec<f64>,
    /// Seconds of each pass on the mount.
    pub mount_s: Vec<f64>,
}

/// Opens, reads and closes every small file below `root` with one thread; seconds. Only lengths are checked: bytes were before.
fn pass(root: &Path, data: &Data) -> Result<f64> {
    let mut buffer = vec![0; 128 << 10];
    // Paths are made before the clock runs.
    let files: Vec<_> = data.small.iter().map(|f| (root.join(&f.path), f.size)).collect();
    let start = Instant::now();
    for (path, size) in &files {
        let got = File::open(path)?.read(&mut buffer)?;
        ensure!(got as u64 == *size, "{} gave {got} of {size} bytes", path.display());
    }
    Ok(start.elapsed().as_secs_f64())
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Is a directory on tmpfs?
///
/// # Errors
/// When it cannot be asked.
pub fn is_tmpfs(dir: &Path) -> Result<bool> {
    Ok(nix::sys::statfs::statfs(dir)?.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC)
}

/// Measures; see the module. `passes` on each, taking turns.
///
/// # Errors
/// When the mount fails or gives a wrong byte.
pub fn run(settings: &Settings, efc: &Tool, server: &S3Ro, data: &Arc<Data>, passes: usize) -> Result<Warm> {
    let dir = settings.dir.join("node");
    if dir.exists() {
        fs::remove_dir_all(&dir)?;
    }
    fs::create_dir_all(&dir)?;
    let mounted = mount(efc, &place(settings, server, dir.clone()))?;
    // The first pass fills the caches and compares every byte; the kernel keeps those very pages.
    let (path, source) = (mounted.path().to_path_buf(), data.clone());
    mounted.on_it(PASS_DEADLINE, move || work::small(&path, &source, 4, false))?;
    pass(&data.dir, data)?;
    let warm = measure(&mounted, data, passes)?;
    mounted.unmount()?;
    fs::remove_dir_all(&dir)?;
    Ok(warm)
}

fn measure(mounted: &Mounted, data: &Arc<Data>, passes: usize) -> Result<Warm> {
    let before = mounted.fuse_requests()?;
    let (mut tmpfs_s, mut mount_s) = (Vec::new(), Vec::new());
    for _ in 0..passes {
        tmpfs_s.push(pass(&data.dir, data)?);
        let (path, source) = (mounted.path().to_path_buf(), data.clone());
        mount_s.push(mounted.on_it(PASS_DEADLINE, move || pass(&path, &source))?);
    }
    let since = |(op, n): (String, u64)| Some((n - before.get(&op).copied().unwrap_or(0).min(n), op));
    let fuse_requests: BTreeMap<String, u64> =
        mounted.fuse_requests()?.into_iter().filter_map(since).filter(|(n, _)| *n > 0).map(|(n, op)| (op, n)).collect();
    let files = data.small.len() as f64;
    let (tmpfs, mount) = (files / median(&tmpfs_s), files / median(&mount_s));
    Ok(Warm {
        tmpfs_files_per_s: tmpfs,
        mount_files_per_s: mount,
        ratio: mount / tmpfs,
        fuse_per_file: fuse_requests.values().sum::<u64>() as f64 / (files * passes as f64),
        fuse_requests,
        passes,
        tmpfs_s,
        mount_s,
    })
}
