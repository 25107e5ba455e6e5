//! JuiceFS as a peer. It keeps files in chunks of its own with names in a database (SQLite here), so it cannot read the bucket of
//! the others: the same files are imported before, with a directory as its object store, and that directory is then served as a bucket by the
//! same read-only S3 server.

use crate::data::{Data, SMALL, tree_file};
use crate::proc::descendants;
use crate::tool::{Mounted, Place, start};
use anyhow::{Context, Result};
use efc_testkit::FuseGuard;
use efc_testkit::process::run_to_end;
use efc_testkit::venv;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

/// Bucket of its chunks.
const BUCKET: &str = "juicefs";
/// Threads that copy files in.
const IMPORTERS: usize = 4;
/// The whole import ends after this.
const IMPORT_DEADLINE: Duration = Duration::from_secs(1200);

/// Its program.
///
/// # Errors
/// When it is not installed: `./run setup --bench`.
pub fn program() -> Result<PathBuf> {
    venv::program("juicefs").context("JuiceFS comes with `./run setup --bench`")
}

fn url(meta: &Path) -> String {
    format!("sqlite3://{}", meta.display())
}

/// Its read-only mount over the S3 server.
///
/// # Errors
/// When it is not installed.
pub fn mount(meta: &Path, endpoint: &str, cache: &Path, mountpoint: &Path) -> Result<Command> {
    let mut c = Command::new(program()?);
    c.args(["mount", "--read-only", "--no-bgjob", "--no-usage-report", "--storage", "s3", "--bucket"]);
    c.arg(format!("{endpoint}/{BUCKET}")).arg("--cache-dir").arg(cache).arg(url(meta)).arg(mountpoint);
    Ok(c)
}

/// Makes the volume and copies all files into it, unless an earlier run with the same plan did.
///
/// # Errors
/// When JuiceFS fails.
pub fn import(place: &Place, data: &Arc<Data>) -> Result<()> {
    let stamp = place.juicefs_meta.with_extension("plan.json");
    let plan = serde_json::to_vec(&data.plan)?;
    if fs::read(&stamp).is_ok_and(|have| have == plan) {
        return Ok(());
    }
    let bucket = place.origin.join(BUCKET);
    for (path, is_dir) in [(&bucket, true), (&place.juicefs_meta, false)] {
        if path.exists() {
            if is_dir { fs::remove_dir_all(path)? } else { fs::remove_file(path)? }
        }
    }
    fs::create_dir_all(&bucket)?;
    let mut format = Command::new(program()?);
    format.args(["format", "--storage", "file", "--no-update", "--trash-days", "0", "--bucket"]);
    // It takes the path as a prefix of names: the slash makes it a directory.
    format.arg(format!("{}/", bucket.display())).arg(url(&place.juicefs_meta)).arg("bench");
    run_to_end("juicefs-format", format, Duration::from_secs(60))?;
    let mounted = mount_for_import(place)?;
    let (target, source) = (mounted.path().to_path_buf(), data.clone());
    mounted.on_it(IMPORT_DEADLINE, move || copy(&source, &target))?;
    mounted.unmount()?;
    fs::write(&stamp, plan)?;
    Ok(())
}

fn mount_for_import(place: &Place) -> Result<Mounted> {
    let mountpoint = place.dir.join("mnt");
    let guard = Arc::new(FuseGuard::new(&mountpoint)?);
    let mut c = Command::new(program()?);
    c.args(["mount", "--no-usage-report", "--backup-meta", "0", "--cache-size", "0", "--cache-dir"]);
    c.arg(place.dir.join("cache")).arg(url(&place.juicefs_meta)).arg(guard.path());
    start("juicefs-import", c, guard, place, descendants())
}

fn copy(data: &Data, target: &Path) -> Result<()> {
    fs::create_dir_all(target.join(SMALL))?;
    let big = Path::new(crate::data::BIG);
    fs::create_dir_all(target.join(big).parent().context("parent")?)?;
    fs::copy(data.dir.join(big), target.join(big)).context("copy the large file")?;
    for i in 0..data.plan.tree_files {
        let path = target.join(tree_file(i).0);
        let dir = path.parent().context("parent")?;
        if i % 1000 == 0 {
            fs::create_dir_all(dir)?;
        }
    }
    let next = AtomicUsize::new(0);
    let total = data.small.len() + data.plan.tree_files as usize;
    let one = |i: usize| -> Result<()> {
        if let Some(f) = data.small.get(i) {
            fs::copy(data.dir.join(&f.path), target.join(&f.path))
                .with_context(|| format!("copy {}", f.path.display()))?;
            return Ok(());
        }
        let (path, size) = tree_file((i - data.small.len()) as u64);
        let file = File::create(target.join(&path)).with_context(|| format!("make {}", path.display()))?;
        if size > 0 {
            file.set_len(size)?;
        }
        Ok(())
    };
    let worker = || -> Result<()> {
        loop {
            let i = next.fetch_add(1, Relaxed);
            if i >= total {
                return Ok(());
            }
            one(i).inspect_err(|_| next.store(total, Relaxed))?;
        }
    };
    std::thread::scope(|s| {
        let threads: Vec<_> = (0..IMPORTERS).map(|_| s.spawn(worker)).collect();
        threads.into_iter().try_for_each(|t| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p)))
    })
}
