//! `efc warmup`: fills the workers' cache with files before they are read. Nothing passes through this process: workers fetch from
//! the origin and say how much that was. What is cached already costs the origin nothing, so the command can be repeated.

use crate::context::Context;
use crate::dataset::{DatasetPath, Found, each_file};
use crate::mounts::{self, WarmLine};
use crate::progress::{Failure, Progress};
use clap::Args;
use efc_common::block::split_blocks;
use efc_common::error::Context as _;
use efc_common::units::show_bytes;
use efc_common::{Error, Kind, Result};
use efc_proto::data::manage::Action;
use futures::StreamExt;
use futures::stream::{BoxStream, iter};
use serde::Serialize;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const EXAMPLES: &str = "Examples:\n  efc warmup dataset://images/train\n  efc warmup /mnt/images/train\n  efc warmup --list-from files.txt \
--concurrency 64\n  efc warmup dataset://images --dry-run -o json";

/// Arguments of `efc warmup`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct WarmupArgs {
    /// Files or directories (with all below them): dataset://name/path, or a path inside an EFC mount.
    #[arg(required_unless_present = "list_from")]
    paths: Vec<OsString>,
    /// Read more paths from a file, one a line (`-`: stdin); lines that begin with # are skipped.
    #[arg(long, value_name = "FILE")]
    list_from: Option<PathBuf>,
    /// Blocks of 4 MiB filled at once.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    concurrency: u32,
    /// Only count files, bytes and the requests the origin would get.
    #[arg(long)]
    dry_run: bool,
}

/// JSON of `efc warmup`.
#[derive(Debug, Serialize)]
struct Report {
    /// Nothing was fetched, only counted.
    dry_run: bool,
    /// Ctrl-C ended it early.
    cancelled: bool,
    /// Files that are wholly in the cache now; 0 in a dry run.
    files: u64,
    /// Files found.
    files_total: u64,
    /// Bytes that are in the cache now; 0 in a dry run.
    bytes: u64,
    /// Bytes found.
    bytes_total: u64,
    /// Of `bytes`: fetched from the origin for this command.
    origin_bytes: u64,
    /// Of `bytes`: there already.
    cached_bytes: u64,
    /// Range requests that filling an empty cache with these files takes; null when another process did the work.
    gets_max: Option<u64>,
    /// How long it took.
    seconds: f64,
    /// Paths that failed.
    failed: u64,
    /// The first 10,000 of them.
    errors: Vec<Failure>,
}

/// What is to be warmed.
#[derive(Debug, Default, PartialEq)]
struct Targets {
    datasets: Vec<DatasetPath>,
    /// Paths in each mount, by mountpoint.
    mounts: BTreeMap<PathBuf, Vec<String>>,
}

pub(crate) async fn run(context: &Context, args: WarmupArgs) -> Result<()> {
    let mut paths = args.paths;
    if let Some(file) = &args.list_from {
        paths.extend(read_list(file)?);
    }
    let targets = sort(&paths)?;
    let progress = Progress::new();
    let cancelled = progress.drive(warm(context, &targets, args.concurrency as usize, args.dry_run, &progress)).await?;
    let report = report(&progress, args.dry_run, cancelled, targets.mounts.is_empty() || args.dry_run);
    context.output.print(&report, show)?;
    progress.verdict(cancelled, "warmed")
}

async fn warm(context: &Context, targets: &Targets, at_once: usize, dry_run: bool, progress: &Progress) -> Result<()> {
    if !targets.datasets.is_empty() {
        let cluster = context.cluster().await?;
        if cluster.ring.is_empty() && !dry_run {
            let what = "the cluster has no live cache worker to warm; start efc-worker (`efc nodes` shows all)";
            return Err(Error::new(Kind::Unavailable, what));
        }
        let work = async |files: BoxStream<'static, Found>| match dry_run {
            true => files.for_each(async |_| ()).await,
            false => fill(files, at_once, progress).await,
        };
        each_file(&cluster, &targets.datasets, progress, work).await;
    }
    for (mountpoint, paths) in &targets.mounts {
        if dry_run {
            count_mounted(mountpoint, paths, progress);
        } else if let Err(e) = warm_mounted(mountpoint, paths, progress).await {
            progress.fail(&mountpoint.display().to_string(), &e);
        }
    }
    Ok(())
}

/// A file whose blocks are being filled.
struct Filling {
    found: Found,
    blocks_left: AtomicU64,
    failed: AtomicBool,
}

async fn fill(files: BoxStream<'static, Found>, at_once: usize, progress: &Progress) {
    let blocks = files.flat_map(|found| {
        let mut ranges: Vec<Range<u64>> = split_blocks(0..found.file.size).collect();
        if ranges.is_empty() {
            // An empty file has one empty range, so that it is counted when its turn comes.
            ranges.push(0..0);
        }
        let left = AtomicU64::new(ranges.len() as u64);
        let file = Arc::new(Filling { found, blocks_left: left, failed: AtomicBool::new(false) });
        iter(ranges.into_iter().map(move |r| (file.clone(), r)))
    });
    blocks.for_each_concurrent(at_once, async |(file, range)| fill_block(&file, range, progress).await).await;
}

async fn fill_block(file: &Filling, range: Range<u64>, progress: &Progress) {
    let bytes = range.end - range.start;
    let Found { path, origin, file: version } = &file.found;
    if bytes > 0 && !file.failed.load(Ordering::Relaxed) {
        match origin.peers.fill(version, range).await {
            Ok(from_origin) => {
                progress.bytes.fetch_add(bytes, Ordering::Relaxed);
                progress.origin_bytes.fetch_add(from_origin, Ordering::Relaxed);
            }
            // One failure a file is told.
            Err(e) if !file.failed.swap(true, Ordering::Relaxed) => progress.fail(path, &explain(e)),
            Err(_) => {}
        }
    }
    // The last one to end sees what all others did.
    if file.blocks_left.fetch_sub(1, Ordering::AcqRel) > 1 || file.failed.load(Ordering::Relaxed) {
        return;
    }
    if origin.pin
        && version.size > 0
        && let Err(e) = origin.peers.manage(version, Action::Pin).await
    {
        return progress.fail(path, &e);
    }
    progress.files.fetch_add(1, Ordering::Relaxed);
}

fn explain(e: Error) -> Error {
    match e.kind() {
        Kind::Stale => Error::new(Kind::Stale, "it changed since its directory was listed; run the warm-up again"),
        _ => e,
    }
}

async fn warm_mounted(mountpoint: &Path, paths: &[String], progress: &Progress) -> Result<()> {
    let mut before = WarmLine::default();
    let each = |line: WarmLine| {
        let add = |to: &AtomicU64, now: u64, then: u64| to.fetch_add(now.saturating_sub(then), Ordering::Relaxed);
        add(&progress.files, line.files, before.files);
        add(&progress.files_total, line.files_total, before.files_total);
        add(&progress.bytes, line.bytes, before.bytes);
        add(&progress.bytes_total, line.bytes_total, before.bytes_total);
        add(&progress.origin_bytes, line.origin_bytes, before.origin_bytes);
        let new = line.errors.iter().filter(|e| !before.errors.contains(e));
        new.for_each(|e| progress.fail_text(failure(mountpoint, e)));
        if line.done {
            progress.fail_untold(line.failed.saturating_sub(line.errors.len() as u64));
        }
        before = line;
    };
    mounts::warm(mountpoint, paths, each).await
}

/// A failure as a mount process tells it.
fn failure(mountpoint: &Path, told: &serde_json::Value) -> Failure {
    let field = |name: &str| told.get(name).and_then(|v| v.as_str());
    let path = field("path").map_or_else(|| mountpoint.to_path_buf(), |p| mountpoint.join(p.trim_start_matches('/')));
    let error = told.as_str().or(field("error")).map_or_else(|| told.to_string(), str::to_string);
    Failure { path: path.display().to_string(), error }
}

/// Counts files as the mount shows them. Blocks the thread: a dry run has nothing else to do, and Ctrl-C ends the process.
fn count_mounted(mountpoint: &Path, paths: &[String], progress: &Progress) {
    let mut todo: Vec<PathBuf> = paths.iter().map(|p| mountpoint.join(p)).collect();
    while let Some(path) = todo.pop() {
        let looked = path.symlink_metadata().and_then(|m| {
            if m.is_file() {
                progress.found(m.len());
            } else if m.is_dir() {
                for entry in path.read_dir()? {
                    todo.push(entry?.path());
                }
            }
            Ok(())
        });
        if let Err(e) = looked {
            progress.fail(&path.display().to_string(), &Error::from(e));
        }
    }
}

/// The paths of a list file.
fn read_list(file: &Path) -> Result<Vec<OsString>> {
    let text = if file.as_os_str() == "-" {
        let mut text = Vec::new();
        std::io::Read::read_to_end(&mut std::io::stdin(), &mut text).map(|_| text)
    } else {
        std::fs::read(file)
    };
    let text = text.map_err(Error::from).context(format!("list {} cannot be read", file.display()))?;
    let lines = text.split(|b| *b == b'\n').map(|l| l.strip_suffix(b"\r").unwrap_or(l));
    Ok(lines.filter(|l| !l.is_empty() && !l.starts_with(b"#")).map(|l| OsStr::from_bytes(l).to_os_string()).collect())
}

fn sort(paths: &[OsString]) -> Result<Targets> {
    let mut targets = Targets::default();
    for path in paths {
        match DatasetPath::parse(path)? {
            Some(p) => targets.datasets.push(p),
            None => {
                let at = mounts::locate(Path::new(path))?;
                targets.mounts.entry(at.mountpoint).or_default().push(at.path);
            }
        }
    }
    if targets == Targets::default() {
        return Err(Error::new(Kind::Invalid, "the list names no path; write one a line"));
    }
    Ok(targets)
}

fn report(p: &Progress, dry_run: bool, cancelled: bool, own: bool) -> Report {
    let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
    let (failed, errors) = p.failures();
    Report {
        dry_run,
        cancelled,
        files: get(&p.files),
        files_total: get(&p.files_total),
        bytes: get(&p.bytes),
        bytes_total: get(&p.bytes_total),
        origin_bytes: get(&p.origin_bytes),
        cached_bytes: get(&p.bytes).saturating_sub(get(&p.origin_bytes)),
        gets_max: own.then(|| get(&p.blocks_total)),
        seconds: p.elapsed().as_secs_f64(),
        failed,
        errors,
    }
}

fn show(r: &Report) -> String {
    if r.dry_run {
        let gets = r.gets_max.unwrap_or_default();
        return format!("{} files, {}; an empty cache takes {gets} GETs", r.files_total, show_bytes(r.bytes_total));
    }
    format!(
        "warmed {} of {} files, {}: {} from the origin, {} cached already, in {:.1} s ({}/s)",
        r.files,
        r.files_total,
        show_bytes(r.bytes),
        show_bytes(r.origin_bytes),
        show_bytes(r.cached_bytes),
        r.seconds,
        show_bytes((r.bytes as f64 / r.seconds.max(0.001)) as u64),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_sorted() {
        let dir = tempfile::tempdir().expect("dir");
        let list = dir.path().join("list");
        std::fs::write(&list, "# all\ndataset://x/a b\r\n\ndataset://y\n").expect("write");
        let targets = sort(&read_list(&list).expect("read")).expect("sort");
        let shown: Vec<String> = targets.datasets.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["dataset://x/a b", "dataset://y/"]);
        assert!(sort(&[]).is_err_and(|e| e.is(Kind::Invalid)));
        assert!(sort(&["/proc".into()]).is_err_and(|e| e.to_string().contains("EFC mount")));
        assert!(read_list(&dir.path().join("none")).is_err_and(|e| e.is(Kind::NotFound)));
    }

    #[test]
    fn failures_of_a_mount_are_named() {
        let told = |v| failure(Path::new("/mnt"), &v);
        let text = told(serde_json::json!("no"));
        assert_eq!((text.path.as_str(), text.error.as_str()), ("/mnt", "no"));
        let object = told(serde_json::json!({ "path": "/a/b", "error": "gone" }));
        assert_eq!((object.path.as_str(), object.error.as_str()), ("/mnt/a/b", "gone"));
    }

    #[test]
    fn a_tree_is_counted_through_the_file_system() {
        let dir = tempfile::tempdir().expect("dir");
        std::fs::create_dir(dir.path().join("d")).expect("dir");
        std::fs::write(dir.path().join("d/a"), b"12345").expect("write");
        std::fs::write(dir.path().join("b"), b"").expect("write");
        let p = Progress::new();
        count_mounted(dir.path(), &["d".into(), "b".into(), "none".into()], &p);
        let r = report(&p, true, false, true);
        assert_eq!((r.files_total, r.bytes_total, r.gets_max, r.failed), (2, 5, Some(1), 1));
        assert_eq!(show(&r), "2 files, 5 B; an empty cache takes 1 GETs");
    }
}
