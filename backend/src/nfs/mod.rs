//! NFSv3 in user space: a client of our own over the codecs of `nfs3_types`, no kernel NFS, no privileges but a reserved port where we may.
//!
//! `rpc` moves calls over several TCP connections, `mount` finds the root handle, `ops` and `changes` are the procedures, `status` the one table of
//! errors; `tree` changes the export, `open` are open files. This file makes a [`Backend`] of them: locator = file handle, version = fileid + ctime + mtime + size. READ is
//! conditional although NFSv3 has no such thing: each reply carries the file's attributes, and one that does not match ends the stream.
//! Reading needs the handle alone, so a worker never mounts. Names and handles are the server's word and are checked.

mod changes;
#[cfg(test)]
mod fake;
mod mount;
mod open;
mod ops;
mod outgoing;
mod rpc;
mod status;
mod tree;
mod xdr;

use crate::{Backend, ByteStream, Capabilities, FsStats, ListPage};
use async_trait::async_trait;
use bytes::{BufMut, Bytes, BytesMut};
use efc_common::error::Context;
use efc_common::id::SourceId;
use efc_common::node::{Attr, Entry, FileKind, Node, Time};
use efc_common::source::SourceSpec;
use efc_common::{Error, Kind, Result};
use futures::{StreamExt, TryStreamExt, stream};
use nfs3_types::nfs3::{fattr3, ftype3, nfstime3};
use open::KeptFiles;
use ops::{Found, Place};
use parking_lot::Mutex;
use rpc::Client;
use std::hash::RandomState;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::OnceCell;

/// Connections to one server, unless the source says otherwise.
const CONNECTIONS: usize = 4;
/// Most connections a source may ask for.
const CONNECTIONS_MAX: usize = 64;
/// Largest READ or WRITE we send, bytes, if the server takes it (its rtmax, wtmax).
const UNIT_BYTES_MAX: u32 = 1024 * 1024;
/// READs in flight for one stream: hides the round trip and keeps all connections busy.
const READ_AHEAD: usize = 4;
/// LOOKUPs in flight for the entries of a page that came without attributes.
const LOOKUPS: usize = 16;
/// Bytes of a version token.
const VERSION_BYTES: usize = 32;

/// An NFSv3 export.
pub(crate) struct Nfs {
    id: SourceId,
    shared: Arc<Shared>,
    host: String,
    mount_port: Option<u16>,
    path: String,
    timeout: Duration,
    root: Mutex<Option<Bytes>>,
}

/// What streams and open files need after the call that made them.
struct Shared {
    client: Client,
    units: OnceCell<Units>,
    /// What the server may lose.
    kept: KeptFiles,
    /// Keys of the verifiers of CREATE.
    keys: RandomState,
}

/// Bytes of one READ and one WRITE: what the server takes, cut at our own limit.
#[derive(Debug, Clone, Copy)]
struct Units {
    read: u32,
    write: u32,
}

impl Nfs {
    /// A client for `spec`. Touches no network: the server may be down and come back.
    ///
    /// # Errors
    /// [`Kind::Invalid`] naming the option that makes no sense.
    pub(crate) fn new(spec: &SourceSpec, timeout: Duration) -> Result<Nfs> {
        let host = spec.endpoint.rsplit_once(':').map_or(spec.endpoint.as_str(), |(host, _)| host);
        let connections = number(spec, "connections", CONNECTIONS_MAX)?.unwrap_or(CONNECTIONS);
        Ok(Nfs {
            id: spec.id(),
            shared: Arc::new(Shared {
                client: Client::new(ops::NFS, &spec.endpoint, connections, timeout),
                units: OnceCell::new(),
                kept: KeptFiles::default(),
                keys: RandomState::new(),
            }),
            host: host.into(),
            mount_port: number(spec, "mount_port", u16::MAX as usize)?.map(|p| p as u16),
            path: spec.path.clone(),
            timeout,
            root: Mutex::new(None),
        })
    }

    /// The root's handle, mounting at the first need. Two that need it at once may both mount, which is harmless.
    async fn root_handle(&self) -> Result<Bytes> {
        let known = self.root.lock().clone();
        match known {
            Some(handle) => Ok(handle),
            None => {
                let handle = self.mount().await?;
                *self.root.lock() = Some(handle.clone());
                Ok(handle)
            }
        }
    }

    async fn root_attributes(&self) -> Result<(Bytes, fattr3)> {
        let handle = self.root_handle().await?;
        let attributes = ops::getattr(&self.shared.client, &handle).await?;
        Ok((handle, attributes))
    }

    async fn mount(&self) -> Result<Bytes> {
        let export = mount::mount(&self.host, self.mount_port, &self.path, self.timeout).await?;
        let mut handle = export.handle;
        for name in export.below.split('/').filter(|n| !n.is_empty()) {
            let found = ops::lookup(&self.shared.client, &handle, name.as_bytes()).await;
            handle = found.context(format!("cannot open {} on {}", self.path, self.host))?.handle;
        }
        Ok(handle)
    }
}

/// A numeric option between 1 and `max`.
fn number(spec: &SourceSpec, name: &str, max: usize) -> Result<Option<usize>> {
    let Some(text) = spec.option(name) else { return Ok(None) };
    match text.parse() {
        Ok(n) if (1..=max).contains(&n) => Ok(Some(n)),
        _ => Err(Error::new(Kind::Invalid, format!("option {name}={text} must be a number from 1 to {max}"))),
    }
}

#[async_trait]
impl Backend for Nfs {
    fn source_id(&self) -> SourceId {
        self.id
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            shared_listing: false,
            path_locators: false,
            conditional_read: true,
            symlinks: true,
            xattr: false,
            posix_attr: true,
            statfs: true,
        }
    }

    async fn root(&self) -> Result<Node> {
        let found = match self.root_attributes().await {
            // The export was made anew since we mounted it.
            Err(e) if e.is(Kind::Stale) => {
                *self.root.lock() = None;
                self.root_attributes().await
            }
            other => other,
        };
        let (handle, attributes) = found.context(format!("cannot open {} on {}", self.path, self.host))?;
        if attributes.type_ != ftype3::NF3DIR {
            return Err(Error::new(Kind::NotADirectory, format!("{} on {} is no directory", self.path, self.host)));
        }
        Ok(node(handle, &attributes))
    }

    async fn lookup(&self, dir: &Bytes, name: &[u8]) -> Result<Node> {
        check_name(name)?;
        self.shared.resolve(dir, name).await
    }

    async fn getattr(&self, locator: &Bytes) -> Result<Node> {
        Ok(node(locator.clone(), &ops::getattr(&self.shared.client, locator).await?))
    }

    async fn list(&self, dir: &Bytes, from: Option<Bytes>) -> Result<ListPage> {
        let place = from.map_or(Ok(Place::default()), |token| place_of(&token))?;
        let page = ops::list(&self.shared.client, dir, place).await?;
        let mut hidden = Vec::new();
        let mut shown = Vec::with_capacity(page.entries.len());
        for entry in page.entries {
            match unfit(&entry.name) {
                Some(why) => hidden.push((entry.name, why)),
                None => shown.push(entry),
            }
        }
        let entries = stream::iter(shown)
            .map(|e| async move {
                match (e.handle, e.attributes) {
                    (Some(handle), Some(attributes)) => {
                        Ok(Some(Entry { name: e.name, node: node(handle, &attributes) }))
                    }
                    _ => match self.shared.resolve(dir, &e.name).await {
                        Ok(node) => Ok(Some(Entry { name: e.name, node })),
                        // Removed since the server made the page.
                        Err(gone) if gone.is(Kind::NotFound) => Ok(None),
                        Err(other) => Err(other),
                    },
                }
            })
            .buffered(LOOKUPS)
            .try_filter_map(|e| async move { Ok(e) })
            .try_collect()
            .await?;
        Ok(ListPage { entries, next: page.next.map(token_of), hidden })
    }

    async fn read(&self, locator: &Bytes, version: &Bytes, range: Range<u64>) -> Result<ByteStream> {
        let size = size_of(version)?;
        let range = range.start..range.end.min(size);
        if range.is_empty() {
            return Ok(stream::empty().boxed());
        }
        let unit = self.shared.units(locator).await?.read as u64;
        let (shared, locator, version) = (self.shared.clone(), locator.clone(), version.clone());
        let cuts = stream::iter(std::iter::successors(Some(range.start), move |at| Some((at / unit + 1) * unit)))
            .take_while({
                let end = range.end;
                move |at| std::future::ready(*at < end)
            })
            .map(move |at| {
                let (shared, locator, version) = (shared.clone(), locator.clone(), version.clone());
                let piece = at..((at / unit + 1) * unit).min(range.end);
                async move { shared.read_piece(&locator, &version, piece).await }
            });
        Ok(cuts.buffered(READ_AHEAD).map_ok(|parts| stream::iter(parts.into_iter().map(Ok))).try_flatten().boxed())
    }

    async fn readlink(&self, locator: &Bytes) -> Result<Bytes> {
        ops::readlink(&self.shared.client, locator).await
    }

    async fn xattrs(&self, _locator: &Bytes) -> Result<Vec<(Bytes, Bytes)>> {
        Ok(Vec::new())
    }

    async fn statfs(&self) -> Result<FsStats> {
        let s = ops::fsstat(&self.shared.client, &self.root_handle().await?).await?;
        Ok(FsStats {
            total_bytes: s.tbytes,
            free_bytes: s.fbytes,
            available_bytes: s.abytes,
            total_files: s.tfiles,
            free_files: s.ffiles,
        })
    }
}

impl Shared {
    /// Asked once.
    async fn units(&self, handle: &[u8]) -> Result<Units> {
        let ask = || async {
            let info = ops::fsinfo(&self.client, handle).await?;
            let unit = |max: u32| max.clamp(4096, UNIT_BYTES_MAX);
            Ok(Units { read: unit(info.rtmax), write: unit(info.wtmax) })
        };
        self.units.get_or_try_init(ask).await.copied()
    }

    async fn resolve(&self, dir: &[u8], name: &[u8]) -> Result<Node> {
        let Found { handle, attributes } = ops::lookup(&self.client, dir, name).await?;
        let attributes = match attributes {
            Some(a) => a,
            None => ops::getattr(&self.client, &handle).await?,
        };
        Ok(node(handle, &attributes))
    }

    /// The bytes `range`, in as many parts as the server wants.
    async fn read_piece(&self, file: &Bytes, version: &Bytes, range: Range<u64>) -> Result<Vec<Bytes>> {
        let mut parts = Vec::with_capacity(1);
        let mut at = range.start;
        while at < range.end {
            let piece = ops::read(&self.client, file, at, (range.end - at) as u32).await?;
            let attributes = match piece.attributes {
                Some(a) => a,
                // Attributes as of after the READ serve as well: if they match now they matched then.
                None => ops::getattr(&self.client, file).await?,
            };
            if version_of(&attributes) != version[..] {
                return Err(Error::new(Kind::Stale, "the file changed while it was read").with("offset", at));
            }
            if piece.data.is_empty() {
                let what = if piece.eof { "says end of file before the size it reports" } else { "sends no data" };
                return Err(Error::new(Kind::Io, format!("{} {what}", self.client.address())).with("offset", at));
            }
            at += piece.data.len() as u64;
            parts.push(piece.data);
        }
        Ok(parts)
    }
}

/// Why a name cannot be shown, if it cannot.
fn unfit(name: &[u8]) -> Option<&'static str> {
    match name {
        b"" => Some("empty name"),
        b"." | b".." => Some("`.` or `..`"),
        n if n.contains(&b'/') => Some("name contains `/`"),
        n if n.contains(&0) => Some("name contains NUL"),
        n if n.len() > 255 => Some("name longer than 255 bytes"),
        _ => None,
    }
}

/// Fails unless `name` can be one.
fn check_name(name: &[u8]) -> Result<()> {
    match unfit(name) {
        None => Ok(()),
        Some(why) => {
            let kind = if name.len() > 255 { Kind::NameTooLong } else { Kind::Invalid };
            Err(Error::new(kind, format!("that is no name: {why}")))
        }
    }
}

/// Linux' 32-bit encoding of a device number: 12 bits of major in the middle of 20 bits of minor.
fn device(major: u32, minor: u32) -> u32 {
    minor & 0xff | (major & 0xfff) << 8 | (minor & 0xfff00) << 12
}

fn time(t: nfstime3) -> Time {
    Time { secs: t.seconds.into(), nanos: t.nseconds.min(999_999_999) }
}

fn node(locator: Bytes, a: &fattr3) -> Node {
    let kind = match a.type_ {
        ftype3::NF3REG => FileKind::File,
        ftype3::NF3DIR => FileKind::Directory,
        ftype3::NF3LNK => FileKind::Symlink,
        ftype3::NF3BLK => FileKind::BlockDevice,
        ftype3::NF3CHR => FileKind::CharDevice,
        ftype3::NF3SOCK => FileKind::Socket,
        ftype3::NF3FIFO => FileKind::Fifo,
    };
    let version = if kind == FileKind::Directory { Bytes::new() } else { Bytes::copy_from_slice(&version_of(a)) };
    let attr = Attr {
        kind,
        size: a.size,
        mtime: time(a.mtime),
        ctime: time(a.ctime),
        mode: Some(a.mode & 0o7777),
        uid: Some(a.uid),
        gid: Some(a.gid),
        nlink: a.nlink,
        fileid: a.fileid,
        used: Some(a.used),
        atime: Some(time(a.atime)),
        rdev: device(a.rdev.specdata1, a.rdev.specdata2),
    };
    Node { locator, version, attr }
}

/// fileid, ctime, mtime, size, each big endian.
fn version_of(a: &fattr3) -> [u8; VERSION_BYTES] {
    let mut token = [0; VERSION_BYTES];
    let mut out = &mut token[..];
    out.put_u64(a.fileid);
    for t in [a.ctime, a.mtime] {
        out.put_u32(t.seconds);
        out.put_u32(t.nseconds);
    }
    out.put_u64(a.size);
    token
}

/// The size that a version had.
fn size_of(version: &[u8]) -> Result<u64> {
    match version.last_chunk::<8>() {
        Some(size) if version.len() == VERSION_BYTES => Ok(u64::from_be_bytes(*size)),
        _ => Err(Error::new(Kind::Invalid, format!("{} bytes are no version of an NFS file", version.len()))),
    }
}

fn token_of(place: Place) -> Bytes {
    let mut token = BytesMut::with_capacity(16);
    token.put_u64(place.cookie);
    token.put_slice(&place.verifier);
    token.freeze()
}

fn place_of(token: &[u8]) -> Result<Place> {
    match (token.first_chunk::<8>(), token.last_chunk::<8>()) {
        (Some(cookie), Some(verifier)) if token.len() == 16 => {
            Ok(Place { cookie: u64::from_be_bytes(*cookie), verifier: *verifier })
        }
        _ => Err(Error::new(Kind::Invalid, format!("{} bytes are no place in an NFS directory", token.len()))),
    }
}
