//! Filling the workers' cache with parts of a mounted tree, for `efc warmup PATH`. Walks names like a look-up does, then asks the owners
//! of each block to fetch it; no file bytes come to this process.

use crate::namespace::Belief;
use crate::read::source::DataSource;
use bytes::Bytes;
use efc_client::peers::FileRef;
use efc_common::block::split_blocks;
use efc_common::node::{FileKind, Node};
use efc_common::{Error, Kind, Result};
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Blocks being filled at once.
const FILLS: usize = 16;
/// Between two progress lines.
const REPORT_EVERY: Duration = Duration::from_millis(200);
/// Failures that are listed; the others are only counted.
const ERRORS_LISTED: usize = 20;

#[derive(Default)]
struct Progress {
    files: AtomicU64,
    files_total: AtomicU64,
    bytes: AtomicU64,
    bytes_total: AtomicU64,
    origin_bytes: AtomicU64,
    failed: AtomicU64,
    errors: parking_lot::Mutex<Vec<String>>,
}

impl Progress {
    fn fail(&self, path: &str, e: &Error) {
        self.failed.fetch_add(1, Relaxed);
        let mut errors = self.errors.lock();
        if errors.len() < ERRORS_LISTED {
            errors.push(format!("{path}: {e}"));
        }
    }

    fn line(&self, done: bool) -> Value {
        let mut v = json!({
            "files": self.files.load(Relaxed),
            "files_total": self.files_total.load(Relaxed),
            "bytes": self.bytes.load(Relaxed),
            "bytes_total": self.bytes_total.load(Relaxed),
            "origin_bytes": self.origin_bytes.load(Relaxed),
            "failed": self.failed.load(Relaxed),
        });
        if done {
            v["done"] = json!(true);
            v["errors"] = json!(*self.errors.lock());
        }
        v
    }
}

/// Warms `paths` below `root`; sends progress lines, the last with `done`. Stops when the asker goes away.
pub async fn warm(source: Arc<DataSource>, root: Node, ttl: Duration, paths: Vec<String>, out: mpsc::Sender<Value>) {
    let progress = Arc::new(Progress::default());
    let work = async {
        for path in &paths {
            if let Err(e) = warm_path(&source, &root, ttl, path, &progress).await {
                progress.fail(path, &e);
            }
        }
    };
    let report = async {
        let mut next = Instant::now();
        loop {
            next += REPORT_EVERY;
            tokio::time::sleep_until(next.into()).await;
            if out.send(progress.line(false)).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        _ = work => {
            // The asker may have left.
            let _ = out.send(progress.line(true)).await;
        }
        _ = report => {}
    }
}

async fn warm_path(source: &Arc<DataSource>, root: &Node, ttl: Duration, path: &str, p: &Arc<Progress>) -> Result<()> {
    if source.peers().is_none() {
        return Err(Error::new(Kind::Unsupported, "this mount has no workers to warm"));
    }
    let mut node = root.clone();
    for name in path.split('/').filter(|n| !n.is_empty() && *n != ".") {
        node = child(source, &node, ttl, name.as_bytes()).await?;
    }
    let mut todo = vec![(path.trim_end_matches('/').to_string(), node)];
    while let Some((path, node)) = todo.pop() {
        match node.attr.kind {
            FileKind::Directory => {
                let listing = source.list(&node.locator, Belief::for_time(ttl), ttl, None).await?;
                let mut files = Vec::new();
                for e in listing.entries() {
                    let below = format!("{path}/{}", String::from_utf8_lossy(&e.name));
                    match e.node.attr.kind {
                        FileKind::Directory => todo.push((below, e.node.clone())),
                        FileKind::File => files.push((below, e.node.clone())),
                        _ => {}
                    }
                }
                fill(source, files, p).await;
            }
            FileKind::File => fill(source, vec![(path, node)], p).await,
            _ => {}
        }
    }
    Ok(())
}

async fn child(source: &Arc<DataSource>, dir: &Node, ttl: Duration, name: &[u8]) -> Result<Node> {
    if !source.shared_listing() {
        return source.lookup(&dir.locator, name).await;
    }
    let listing = source.list(&dir.locator, Belief::for_time(ttl), ttl, None).await?;
    let missing = || Error::new(Kind::NotFound, "no such file or directory");
    listing.find(name).map(|e| e.node.clone()).ok_or_else(missing)
}

async fn fill(source: &Arc<DataSource>, files: Vec<(String, Node)>, p: &Arc<Progress>) {
    p.files_total.fetch_add(files.len() as u64, Relaxed);
    p.bytes_total.fetch_add(files.iter().map(|(_, n)| n.attr.size).sum(), Relaxed);
    stream::iter(files)
        .for_each_concurrent(FILLS, |(path, node)| async move {
            match fill_file(source, &node.locator, &node.version, node.attr.size, p).await {
                Ok(()) => {
                    p.files.fetch_add(1, Relaxed);
                }
                Err(e) => p.fail(&path, &e),
            }
        })
        .await;
}

async fn fill_file(source: &DataSource, locator: &Bytes, version: &Bytes, size: u64, p: &Progress) -> Result<()> {
    let Some(peers) = source.peers() else { return Ok(()) };
    let file = FileRef { locator: locator.clone(), version: version.clone(), size };
    let blocks = stream::iter(split_blocks(0..size).collect::<Vec<_>>()).map(|block| {
        let file = &file;
        async move {
            let len = block.end - block.start;
            let fetched = peers.fill(file, block).await?;
            p.origin_bytes.fetch_add(fetched, Relaxed);
            p.bytes.fetch_add(len, Relaxed);
            Ok::<_, Error>(())
        }
    });
    let mut blocks = blocks.buffer_unordered(FILLS);
    while let Some(done) = blocks.next().await {
        done?;
    }
    Ok(())
}
