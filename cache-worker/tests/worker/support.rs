//! An origin that counts, stalls, fails and holds back on demand, and in-process workers with clients before it.

use async_trait::async_trait;
use bytes::Bytes;
use efc_backend::{Backend, ByteStream, Capabilities, FsStats, ListPage};
use efc_client::peers::{Chunk, FileRef, Peers, PeersOptions, ReadFlags, concat};
use efc_client::ring::RingWatch;
use efc_client::wire::{Connection, Endpoint, Identity};
use efc_common::block::split_blocks;
use efc_common::id::{RingEpoch, SourceId, WorkerId};
use efc_common::node::{Attr, Entry, Node, Time};
use efc_common::policy::CachePolicy;
use efc_common::ring::{Member, Ring};
use efc_common::source::{SecretRef, SourceSpec};
use efc_common::{Error, Kind, Result};
use efc_worker::store::{DiskTier, MemoryTier, StoreConfig};
use efc_worker::{Connector, Worker, WorkerConfig};
use futures::StreamExt;
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;
use tokio::sync::{Semaphore, watch};

pub(crate) const MIB: u64 = 1 << 20;

/// Reproducible bytes that differ everywhere.
pub(crate) fn pattern(seed: u64, len: usize) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out.into()
}

/// The origin.
pub(crate) struct Origin {
    files: Mutex<HashMap<Bytes, (Bytes, Bytes)>>,
    dirs: Mutex<HashMap<Bytes, Vec<Vec<Entry>>>>,
    /// Ranges asked for.
    pub(crate) reads: Mutex<Vec<Range<u64>>>,
    pub(crate) lists: AtomicU64,
    /// The next read or page fails like this.
    pub(crate) fail_next: Mutex<Option<Kind>>,
    /// Bytes of a read that are delivered before it waits for `gate`; `u64::MAX`: all at once.
    pub(crate) free_bytes: AtomicU64,
    pub(crate) gate: watch::Sender<bool>,
    /// Bytes of a piece of a stream.
    pub(crate) piece: AtomicUsize,
    /// A page of a listing takes a permit.
    pub(crate) pages: Semaphore,
}

impl Origin {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Origin {
            files: Mutex::default(),
            dirs: Mutex::default(),
            reads: Mutex::default(),
            lists: AtomicU64::new(0),
            fail_next: Mutex::default(),
            free_bytes: AtomicU64::new(u64::MAX),
            gate: watch::Sender::new(true),
            piece: AtomicUsize::new(100_003),
            pages: Semaphore::new(Semaphore::MAX_PERMITS),
        })
    }

    pub(crate) fn put(&self, name: &str, version: &str, data: Bytes) -> FileRef {
        let (locator, version) = (Bytes::from(name.to_string()), Bytes::from(version.to_string()));
        let size = data.len() as u64;
        self.files.lock().insert(locator.clone(), (version.clone(), data));
        FileRef { locator, version, size }
    }

    pub(crate) fn put_dir(&self, name: &str, pages: Vec<Vec<Entry>>) -> Bytes {
        let locator = Bytes::from(name.to_string());
        self.dirs.lock().insert(locator.clone(), pages);
        locator
    }

    pub(crate) fn read_count(&self) -> usize {
        self.reads.lock().len()
    }

    /// Holds streams back after `bytes`.
    pub(crate) fn hold_after(&self, bytes: u64) {
        self.gate.send_replace(false);
        self.free_bytes.store(bytes, SeqCst);
    }

    pub(crate) fn release(&self) {
        self.free_bytes.store(u64::MAX, SeqCst);
        self.gate.send_replace(true);
    }

    pub(crate) fn connector(self: &Arc<Self>) -> Connector {
        let me = self.clone();
        Arc::new(move |spec, _| {
            let origin: efc_backend::DynBackend = Arc::new(Handle { origin: me.clone(), id: spec.id() });
            Box::pin(async move { Ok(origin) })
        })
    }
}

pub(crate) fn entry(name: &str, version: &str) -> Entry {
    let attr = Attr::object(7, Time { secs: 1, nanos: 0 });
    let node = Node { locator: Bytes::from(format!("d/{name}")), version: Bytes::from(version.to_string()), attr };
    Entry { name: Bytes::from(name.to_string()), node }
}

struct Handle {
    origin: Arc<Origin>,
    id: SourceId,
}

fn unsupported<T>() -> Result<T> {
    Err(Error::new(Kind::Unsupported, "not in this test"))
}

#[async_trait]
impl Backend for Handle {
    fn source_id(&self) -> SourceId {
        self.id
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { shared_listing: true, conditional_read: true, ..Default::default() }
    }

    async fn root(&self) -> Result<Node> {
        unsupported()
    }

    async fn lookup(&self, _: &Bytes, _: &[u8]) -> Result<Node> {
        unsupported()
    }

    async fn getattr(&self, _: &Bytes) -> Result<Node> {
        unsupported()
    }

    async fn list(&self, dir: &Bytes, from: Option<Bytes>) -> Result<ListPage> {
        self.origin.lists.fetch_add(1, SeqCst);
        self.origin.pages.acquire().await.expect("open").forget();
        if let Some(kind) = self.origin.fail_next.lock().take() {
            return Err(Error::new(kind, "injected"));
        }
        let at = from.map_or(0, |f| String::from_utf8_lossy(&f).parse::<usize>().expect("ours"));
        let dirs = self.origin.dirs.lock();
        let pages = dirs.get(dir).ok_or_else(|| Error::new(Kind::NotFound, "no such directory"))?;
        let next = (at + 1 < pages.len()).then(|| Bytes::from((at + 1).to_string()));
        Ok(ListPage { entries: pages.get(at).cloned().unwrap_or_default(), next, hidden: Vec::new() })
    }

    async fn read(&self, locator: &Bytes, version: &Bytes, range: Range<u64>) -> Result<ByteStream> {
        self.origin.reads.lock().push(range.clone());
        if let Some(kind) = self.origin.fail_next.lock().take() {
            return Err(Error::new(kind, "injected"));
        }
        let found = self.origin.files.lock().get(locator).cloned();
        let (now, data) = found.ok_or_else(|| Error::new(Kind::NotFound, "no such file"))?;
        if now != *version {
            return Err(Error::new(Kind::Stale, "file has changed"));
        }
        let data = data.slice(range.start as usize..range.end as usize);
        let piece = self.origin.piece.load(SeqCst);
        let free = self.origin.free_bytes.load(SeqCst);
        let gate = self.origin.gate.subscribe();
        let pieces: Vec<Bytes> =
            (0..data.len()).step_by(piece).map(|at| data.slice(at..(at + piece).min(data.len()))).collect();
        let mut sent = 0u64;
        Ok(futures::stream::iter(pieces)
            .then(move |p| {
                let mut gate = gate.clone();
                let wait = sent >= free;
                sent += p.len() as u64;
                async move {
                    if wait {
                        let _ = gate.wait_for(|open| *open).await;
                    }
                    Ok(p)
                }
            })
            .boxed())
    }

    async fn readlink(&self, _: &Bytes) -> Result<Bytes> {
        unsupported()
    }

    async fn xattrs(&self, _: &Bytes) -> Result<Vec<(Bytes, Bytes)>> {
        unsupported()
    }

    async fn statfs(&self) -> Result<FsStats> {
        unsupported()
    }
}

pub(crate) fn memory(bytes: u64) -> StoreConfig {
    StoreConfig { memory: Some(MemoryTier { quota_bytes: bytes, path: None }), ..Default::default() }
}

pub(crate) fn disk(dir: &Path, bytes: u64) -> StoreConfig {
    StoreConfig { disks: vec![DiskTier { path: dir.into(), quota_bytes: bytes }], ..Default::default() }
}

pub(crate) fn config(id: &str, store: StoreConfig) -> WorkerConfig {
    WorkerConfig { allow_local_sources: true, ..WorkerConfig::new(id, store) }
}

pub(crate) async fn start(config: WorkerConfig, origin: &Arc<Origin>) -> Worker {
    Worker::start(config, origin.connector(), None).await.expect("worker starts")
}

pub(crate) fn spec(path: &str) -> SourceSpec {
    SourceSpec::parse(&format!("file://{path}"), BTreeMap::new(), SecretRef::Anonymous).expect("spec")
}

pub(crate) fn member(id: &str, addr: &str) -> Member {
    Member {
        id: WorkerId(id.into()),
        addr: addr.into(),
        unix: String::new(),
        host: String::new(),
        zone: String::new(),
        weight: 100,
    }
}

pub(crate) fn me() -> Identity {
    Identity { cluster: String::new(), peer: "test:1".into(), epoch: 0 }
}

pub(crate) fn options() -> PeersOptions {
    PeersOptions { deadline: Duration::from_secs(20), ..PeersOptions::default() }
}

pub(crate) fn peers_with(members: Vec<Member>, options: PeersOptions) -> Peers {
    Peers::new(RingWatch::fixed(Ring::new(RingEpoch(1), members)), spec("/t"), None, me(), options)
}

pub(crate) fn peers(workers: &[&Worker]) -> Peers {
    let members = workers.iter().enumerate().map(|(i, w)| member(&format!("w{i}"), w.addr())).collect();
    peers_with(members, options())
}

/// Reads any range of a file, block by block.
pub(crate) async fn read(peers: &Peers, file: &FileRef, range: Range<u64>) -> Result<(Bytes, Vec<Chunk>)> {
    let mut all = Vec::new();
    for piece in split_blocks(range) {
        all.extend(peers.read(file, piece, ReadFlags::default())?.collect().await?);
    }
    Ok((concat(&all), all))
}

/// A raw connection with the source attached under slot 1.
pub(crate) async fn raw(worker: &Worker) -> Arc<Connection> {
    let at = Endpoint::Tcp(worker.addr().into());
    let c = Connection::open(&at, &me(), Duration::from_secs(5)).await.expect("connect");
    c.attach(1, &spec("/t"), None, CachePolicy::default(), Duration::from_secs(5)).await.expect("attach");
    c
}
