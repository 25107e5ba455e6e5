//! The walk: from dataset paths to the files they name.

use super::origin::not_there;
use super::{DatasetPath, LISTINGS, Origin, get, show};
use crate::context::Cluster;
use crate::progress::Progress;
use bytes::Bytes;
use efc_client::peers::FileRef;
use efc_client::ring::RingWatch;
use efc_common::node::{Entry, FileKind, Node};
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use futures::StreamExt;
use futures::stream::{BoxStream, FuturesUnordered, unfold};
use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Files that may wait for the work on them.
const QUEUE: usize = 1 << 16;
/// Directories of a path list whose locators are remembered.
const REMEMBERED: usize = 10_000;

/// A file of a dataset.
pub(crate) struct Found {
    /// `dataset://name/path`, for people.
    pub(crate) path: String,
    /// Where it is.
    pub(crate) origin: Arc<Origin>,
    /// Its version.
    pub(crate) file: FileRef,
}

/// Where a walk puts what it meets: files into the queue, failures into the progress, which counts both.
struct Out<'a> {
    files: mpsc::Sender<Found>,
    progress: &'a Progress,
}

/// A dataset with all its mounts connected.
pub(crate) struct Tree {
    name: String,
    origins: Vec<Arc<Origin>>,
    /// Locators of directories of paths resolved before, by (mount, path below it).
    known: HashMap<(usize, Vec<Vec<u8>>), Bytes>,
    /// The listing used last: neighbours in a list of paths need one listing, and no request each.
    last: Option<Listed>,
}

/// A directory that was listed: (mount, path below it) and the nodes by name.
struct Listed {
    key: (usize, Vec<Vec<u8>>),
    nodes: HashMap<Bytes, Node>,
}

/// A directory still to be listed.
struct Directory {
    origin: Arc<Origin>,
    /// Path in the dataset.
    parts: Vec<Vec<u8>>,
    locator: Bytes,
}

/// Walks `paths` and hands the files to `work`, which runs beside the walk and lags at most [`QUEUE`] files behind. What cannot be
/// opened or listed is counted as a failure of its path, and the rest goes on.
pub(crate) async fn each_file<F>(cluster: &Cluster, paths: &[DatasetPath], progress: &Progress, work: F)
where
    F: AsyncFnOnce(BoxStream<'static, Found>),
{
    let tasks = TaskGroup::new();
    let _stop = tasks.token().drop_guard();
    let ring = cluster.watch(&tasks);
    let (files, queue) = mpsc::channel(QUEUE);
    let out = Out { files, progress };
    let walk = async move {
        let mut trees: HashMap<&str, Tree> = HashMap::new();
        for path in paths {
            let tree = match trees.entry(path.name.as_str()) {
                Slot::Occupied(t) => t.into_mut(),
                Slot::Vacant(v) => match Tree::open(cluster, &ring, &path.name).await {
                    Ok(t) => v.insert(t),
                    Err(e) => {
                        progress.fail(&path.to_string(), &e);
                        continue;
                    }
                },
            };
            tree.walk(path, &out).await;
        }
        progress.all_found();
    };
    let found = unfold(queue, |mut q| async move { q.recv().await.map(|f| (f, q)) }).boxed();
    tokio::join!(walk, work(found));
}

impl Tree {
    /// Connects the mounts of dataset `name`.
    ///
    /// # Errors
    /// [`Kind::NotFound`], or what keeps a mount from being connected.
    pub(crate) async fn open(cluster: &Cluster, ring: &Arc<RingWatch>, name: &str) -> Result<Tree> {
        let dataset = get(&cluster.master, name).await?;
        let mut origins = Vec::with_capacity(dataset.mounts.len());
        for mount in &dataset.mounts {
            let opened = Origin::open(cluster, ring, &dataset, mount).await;
            origins.push(opened.map_err(|e| e.with("dataset", name).with("mount", &mount.path))?);
        }
        // The deepest first: it is the one that shows at its path.
        origins.sort_by_key(|o| std::cmp::Reverse(o.path.len()));
        Ok(Tree { name: name.into(), origins, known: HashMap::new(), last: None })
    }

    /// The node at `parts` and the mount it is of.
    ///
    /// # Errors
    /// [`Kind::NotFound`].
    pub(crate) async fn resolve(&mut self, parts: &[Vec<u8>]) -> Result<(Arc<Origin>, Node)> {
        let Some(at) = self.origins.iter().position(|o| parts.starts_with(&o.path)) else {
            let mounts: Vec<String> = self.origins.iter().map(|o| show(&o.path)).collect();
            let what =
                format!("dataset `{}` has nothing at {}; its mounts are {}", self.name, show(parts), mounts.join(", "));
            return Err(Error::new(Kind::NotFound, what));
        };
        let origin = self.origins[at].clone();
        let below = &parts[origin.path.len()..];
        let Some((name, parent)) = below.split_last() else {
            return Ok((origin.clone(), origin.backend.root().await?));
        };
        if !origin.shares_listings() {
            let dir = self.directory(at, parent).await?;
            let node = origin.backend.lookup(&dir, name).await.map_err(|e| not_there(e, below))?;
            return Ok((origin, node));
        }
        if self.last.as_ref().is_none_or(|l| l.key.0 != at || l.key.1 != parent) {
            let dir = self.directory(at, parent).await?;
            let entries = origin.list(&dir).await.map_err(|e| not_there(e, parent))?;
            let nodes = entries.into_iter().map(|e| (e.name, e.node)).collect();
            self.last = Some(Listed { key: (at, parent.to_vec()), nodes });
        }
        let node = self.last.as_ref().and_then(|l| l.nodes.get(name.as_slice())).cloned();
        node.map(|n| (origin, n)).ok_or_else(|| not_there(Error::new(Kind::NotFound, ""), below))
    }

    async fn directory(&mut self, at: usize, parts: &[Vec<u8>]) -> Result<Bytes> {
        let key = (at, parts.to_vec());
        if let Some(locator) = self.known.get(&key) {
            return Ok(locator.clone());
        }
        let node = self.origins[at].resolve(parts).await?;
        if self.known.len() >= REMEMBERED {
            self.known.clear();
        }
        self.known.insert(key, node.locator.clone());
        Ok(node.locator)
    }

    /// Feeds `out` with all files at and below `path`. Ends early when nobody listens.
    async fn walk(&mut self, path: &DatasetPath, out: &Out<'_>) {
        let mut todo = Vec::new();
        // Mounts below the path show there, whatever is at the path itself.
        let below: Vec<Arc<Origin>> = self
            .origins
            .iter()
            .filter(|o| o.path.len() > path.parts.len() && o.path.starts_with(&path.parts))
            .cloned()
            .collect();
        match self.resolve(&path.parts).await {
            Ok((origin, node)) => self.take(&origin, path.parts.clone(), node, &mut todo, out).await,
            Err(e) if e.is(Kind::NotFound) && !below.is_empty() => {}
            Err(e) => out.progress.fail(&self.url(&path.parts), &e),
        }
        for origin in below {
            match origin.backend.root().await {
                Ok(node) => self.take(&origin, origin.path.clone(), node, &mut todo, out).await,
                Err(e) => out.progress.fail(&self.url(&origin.path), &e),
            }
        }
        let mut listings = FuturesUnordered::new();
        while !out.files.is_closed() {
            while listings.len() < LISTINGS
                && let Some(dir) = todo.pop()
            {
                listings.push(async move { (dir.origin.list(&dir.locator).await, dir) });
            }
            match listings.next().await {
                None => return,
                Some((Err(e), dir)) => out.progress.fail(&self.url(&dir.parts), &e),
                Some((Ok(entries), dir)) => self.enter(&dir, entries, &mut todo, out).await,
            }
        }
    }

    async fn enter(&self, dir: &Directory, entries: Vec<Entry>, todo: &mut Vec<Directory>, out: &Out<'_>) {
        for e in entries {
            let mut parts = dir.parts.clone();
            parts.push(e.name.to_vec());
            if self.origins.iter().any(|o| o.path == parts) {
                continue;
            }
            self.take(&dir.origin, parts, e.node, todo, out).await;
        }
    }

    async fn take(
        &self,
        origin: &Arc<Origin>,
        parts: Vec<Vec<u8>>,
        node: Node,
        todo: &mut Vec<Directory>,
        out: &Out<'_>,
    ) {
        match node.attr.kind {
            FileKind::Directory => todo.push(Directory { origin: origin.clone(), parts, locator: node.locator }),
            FileKind::File => {
                let file = FileRef { locator: node.locator, version: node.version, size: node.attr.size };
                // Nobody listens any more: the loop of `walk` sees it.
                out.progress.found(file.size);
                let _ = out.files.send(Found { path: self.url(&parts), origin: origin.clone(), file }).await;
            }
            _ => {}
        }
    }

    fn url(&self, parts: &[Vec<u8>]) -> String {
        format!("dataset://{}{}", self.name, show(parts))
    }
}
