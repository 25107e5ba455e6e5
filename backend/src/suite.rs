//! One suite for every implementation of [`Backend`](crate::Backend), run against real servers by `tests/suite_*.rs`.
//!
//! It fills an origin through a [`Store`] (the origin seen from behind: a local directory, a bucket) and checks through the backend what
//! callers rely on. Its checks are chosen by the declared [`Capabilities`](crate::Capabilities), never by the kind of source. The store must
//! be empty, and its root what the source's path names. Nothing here knows whether faults are injected below. What changes a tree is checked
//! by [`tree`].

mod open;
pub mod tree;

use crate::DynBackend;
use bytes::Bytes;
use efc_common::node::{Attr, Entry, FileKind, LOCATOR_BYTES_MAX, Node, VERSION_BYTES_MAX};
use efc_common::{Kind, Result};
use futures::TryStreamExt;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;

/// The origin seen from behind. Paths are relative to its root, separated by `/`. Every method panics when it fails: that is the
/// test's set-up, not what is tested.
pub trait Store: Send + Sync {
    /// Makes or replaces a file; one that is open keeps its old content. Parent directories are made.
    fn put(&self, path: &[u8], data: &[u8]);

    /// Changes a file where it is, keeping its size; false where the store has no such thing.
    fn overwrite(&self, path: &[u8], data: &[u8]) -> bool;

    /// Makes an empty directory; false where the store has none.
    fn mkdir(&self, path: &[u8]) -> bool;

    /// Makes a symbolic link. Called only if the backend says that it has them.
    fn symlink(&self, path: &[u8], target: &[u8]);

    /// Sets an extended attribute. Called only if the backend says that it has them.
    fn set_xattr(&self, path: &[u8], name: &str, value: &[u8]);

    /// Can it hold a file of this name?
    fn accepts(&self, name: &[u8]) -> bool;
}

/// A directory as a [`Store`]: the back of `file` and NFS sources.
#[derive(Debug, Clone)]
pub struct DirStore(pub PathBuf);

impl DirStore {
    fn path(&self, path: &[u8]) -> PathBuf {
        self.0.join(OsStr::from_bytes(path))
    }
}

impl Store for DirStore {
    fn put(&self, path: &[u8], data: &[u8]) {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("make parent directories");
        let new = self.0.join(".new");
        std::fs::write(&new, data).expect("write a file");
        std::fs::rename(&new, path).expect("put the file in place");
    }

    fn overwrite(&self, path: &[u8], data: &[u8]) -> bool {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::options().write(true).open(self.path(path)).expect("open the file");
        file.write_all_at(data, 0).expect("overwrite the file");
        true
    }

    fn mkdir(&self, path: &[u8]) -> bool {
        std::fs::create_dir_all(self.path(path)).expect("make a directory");
        true
    }

    fn symlink(&self, path: &[u8], target: &[u8]) {
        std::os::unix::fs::symlink(OsStr::from_bytes(target), self.path(path)).expect("make a symbolic link");
    }

    fn set_xattr(&self, path: &[u8], name: &str, value: &[u8]) {
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(self.path(path), name, value, flags).expect("set an extended attribute");
    }

    fn accepts(&self, _name: &[u8]) -> bool {
        true
    }
}

const LARGE: usize = 20 << 20;
const MANY: usize = 3000;

/// Sizes that sit on and beside the boundaries of segments, blocks and READs.
const SIZES: [(&str, usize); 6] = [
    ("empty", 0),
    ("one", 1),
    ("granule", 16 << 10),
    ("segment+1", (256 << 10) + 1),
    ("mib-1", (1 << 20) - 1),
    ("large", LARGE),
];

/// Names that are legal and make trouble.
fn odd_names() -> Vec<Vec<u8>> {
    let long = vec![b'n'; 255];
    let odd: [&[u8]; 14] = [
        b"with space",
        b" leading and trailing ",
        b"new\nline",
        b"tab\tand\rreturn",
        b"quote\"'`",
        b"back\\slash",
        b"percent%2Fencoded%00",
        b"plus+and&amp;<xml>?#",
        b"-rf",
        b"...",
        b".hidden",
        "grüße-文件-🦀".as_bytes(),
        b"not\xff\xfeutf8",
        b"*?[x]",
    ];
    odd.iter().map(|n| n.to_vec()).chain([long]).collect()
}

/// `len` bytes that depend on `seed`.
pub fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    StdRng::seed_from_u64(seed).fill_bytes(&mut data);
    data
}

/// Runs the suite.
pub async fn run(backend: DynBackend, store: &dyn Store) {
    let suite = Suite { backend, store };
    suite.root().await;
    suite.names().await;
    suite.paging().await;
    suite.sizes().await;
    suite.ranges().await;
    suite.concurrent().await;
    suite.stale_before().await;
    suite.stale_in_the_middle().await;
    suite.links().await;
    suite.xattrs().await;
    suite.statfs().await;
    suite.odd_names().await;
    suite.nonsense().await;
}

struct Suite<'a> {
    backend: DynBackend,
    store: &'a dyn Store,
}

impl Suite<'_> {
    async fn top(&self) -> Node {
        self.backend.root().await.expect("root")
    }

    /// The node at a `/`-separated path.
    async fn find(&self, path: &str) -> Node {
        let mut node = self.top().await;
        for name in path.split('/') {
            node = self
                .backend
                .lookup(&node.locator, name.as_bytes())
                .await
                .unwrap_or_else(|e| panic!("lookup {path}: {e}"));
        }
        self.check_node(&node);
        node
    }

    fn check_node(&self, node: &Node) {
        assert!((1..=LOCATOR_BYTES_MAX).contains(&node.locator.len()) || node.attr.kind == FileKind::Directory);
        assert!(node.version.len() <= VERSION_BYTES_MAX);
        assert_eq!(node.version.is_empty(), node.attr.kind == FileKind::Directory, "only directories have no version");
        let posix = self.backend.capabilities().posix_attr;
        assert_eq!((node.attr.mode.is_some(), node.attr.uid.is_some()), (posix, posix));
    }

    async fn read(&self, node: &Node, range: Range<u64>) -> Result<Vec<u8>> {
        let stream = self.backend.read(&node.locator, &node.version, range.clone()).await?;
        let pieces: Vec<Bytes> = stream.try_collect().await?;
        let data = pieces.concat();
        assert_eq!(data.len() as u64, range.end - range.start, "a stream that ends well is complete");
        Ok(data)
    }

    async fn read_all(&self, node: &Node) -> Vec<u8> {
        self.read(node, 0..node.attr.size).await.expect("read")
    }

    /// All entries of a directory; every page but the last says where to go on.
    async fn list(&self, dir: &Node) -> BTreeMap<Vec<u8>, Entry> {
        let mut all = BTreeMap::new();
        let mut from = None;
        loop {
            let page = self.backend.list(&dir.locator, from).await.expect("list");
            assert_eq!(page.hidden, [], "nothing was put there that cannot be shown");
            for entry in page.entries {
                self.check_node(&entry.node);
                let name = entry.name.to_vec();
                assert!(all.insert(name.clone(), entry).is_none(), "{} twice", name.escape_ascii());
            }
            from = page.next;
            if from.is_none() {
                return all;
            }
        }
    }

    async fn root(&self) {
        let root = self.top().await;
        assert_eq!(root.attr.kind, FileKind::Directory);
        self.check_node(&root);
        assert_eq!(self.backend.getattr(&root.locator).await.expect("getattr").attr.kind, FileKind::Directory);
        assert!(self.list(&root).await.is_empty(), "the store is empty");
    }

    async fn names(&self) {
        self.store.put(b"names/a/b/file", b"deep");
        let file = self.find("names/a/b/file").await;
        assert_eq!((file.attr.kind, file.attr.size), (FileKind::File, 4));
        assert_eq!(self.read_all(&file).await, b"deep");
        let again = self.backend.getattr(&file.locator).await.expect("getattr");
        assert_eq!((&again.locator, &again.version), (&file.locator, &file.version));
        let dir = self.find("names/a").await;
        assert_eq!(dir.attr.kind, FileKind::Directory);
        let absent = self.backend.lookup(&dir.locator, b"absent").await;
        assert!(absent.as_ref().is_err_and(|e| e.is(Kind::NotFound)), "{absent:?}");
        let prefix = self.backend.lookup(&dir.locator, b"b/file").await;
        assert!(prefix.is_err(), "a name has no slash: {prefix:?}");
        let through = self.backend.lookup(&file.locator, b"x").await;
        assert!(through.as_ref().is_err_and(|e| e.is(Kind::NotADirectory) || e.is(Kind::NotFound)), "{through:?}");
        if self.store.mkdir(b"names/void") {
            assert!(self.list(&self.find("names/void").await).await.is_empty());
        }
        let listed = self.list(&self.find("names/a/b").await).await;
        let entry = listed.get(&b"file"[..]).expect("listed");
        let node = Node { attr: Attr { atime: file.attr.atime, ..entry.node.attr.clone() }, ..entry.node.clone() };
        assert_eq!(node, file, "a listing and a lookup say the same; reading moved the access time");
    }

    async fn paging(&self) {
        for i in 0..MANY {
            self.store.put(format!("many/file-{i:05}").as_bytes(), format!("{i}").as_bytes());
        }
        let dir = self.find("many").await;
        let all = self.list(&dir).await;
        assert_eq!(all.len(), MANY);
        for (i, (name, entry)) in all.iter().enumerate() {
            assert_eq!(name, format!("file-{i:05}").as_bytes());
            assert_eq!(entry.node.attr.size, format!("{i}").len() as u64);
        }
        let entry = &all[&b"file-01234"[..]];
        assert_eq!(self.read_all(&entry.node).await, b"1234");
    }

    async fn sizes(&self) {
        for (seed, (name, len)) in SIZES.into_iter().enumerate() {
            let data = content(seed as u64, len);
            self.store.put(format!("sizes/{name}").as_bytes(), &data);
            let node = self.find(&format!("sizes/{name}")).await;
            assert_eq!(node.attr.size, len as u64);
            assert!(self.read_all(&node).await == data, "the bytes of {name} differ");
        }
    }

    async fn ranges(&self) {
        let data = content(5, LARGE);
        let node = self.find("sizes/large").await;
        let mib = 1 << 20;
        let end = LARGE as u64;
        let edges = [
            0..1,
            1..2,
            4095..4097,
            mib - 1..mib + 1,
            3..3 * mib + 5,
            end - 1..end,
            end - mib - 3..end,
            7..7,
            end..end,
        ];
        let mut chance = StdRng::seed_from_u64(99);
        let random = (0..40).map(|_| {
            let start = chance.random_range(0..end);
            start..(start + chance.random_range(0..3 * mib)).min(end)
        });
        for range in edges.into_iter().chain(random.collect::<Vec<_>>()) {
            let got = self.read(&node, range.clone()).await.expect("read");
            assert!(got == data[range.start as usize..range.end as usize], "the bytes of {range:?} differ");
        }
    }

    async fn concurrent(&self) {
        let data = Arc::new(content(5, LARGE));
        let node = self.find("sizes/large").await;
        let reads = (0..64u64).map(|seed| {
            let (data, node) = (&data, &node);
            async move {
                let mut chance = StdRng::seed_from_u64(seed);
                for _ in 0..8 {
                    let start = chance.random_range(0..LARGE as u64);
                    let range = start..(start + chance.random_range(1..600 << 10)).min(LARGE as u64);
                    let got = self.read(node, range.clone()).await.expect("read");
                    assert!(got == data[range.start as usize..range.end as usize], "the bytes of {range:?} differ");
                }
            }
        });
        futures::future::join_all(reads).await;
    }

    /// The file was replaced, then overwritten, between the look at it and the read of it.
    async fn stale_before(&self) {
        let len = 300 << 10;
        self.store.put(b"stale/before", &content(1, len));
        let first = self.find("stale/before").await;
        self.store.put(b"stale/before", &content(2, len));
        self.expect_stale(&first, &content(1, len)).await;
        let second = self.find("stale/before").await;
        assert_ne!(first.version, second.version);
        assert!(self.read_all(&second).await == content(2, len));
        if self.store.overwrite(b"stale/before", &content(3, len)) {
            self.expect_stale(&second, &content(2, len)).await;
            let third = self.find("stale/before").await;
            assert_ne!(second.version, third.version);
            assert!(self.read_all(&third).await == content(3, len));
        }
    }

    /// A conditional read of a version that is gone is stale; where the origin kept the old content for us, that is right too.
    async fn expect_stale(&self, old: &Node, was: &[u8]) {
        if !self.backend.capabilities().conditional_read {
            return;
        }
        match self.read(old, 0..old.attr.size).await {
            Ok(data) => assert!(data == was, "a read of an old version gave other bytes"),
            Err(e) => assert!(e.is(Kind::Stale), "{e:?}"),
        }
    }

    /// The file changes while a stream of it is open: what comes is the old content, to its end or to a `Stale`.
    async fn stale_in_the_middle(&self) {
        for in_place in [false, true] {
            self.store.put(b"stale/middle", &content(10, LARGE));
            let node = self.find("stale/middle").await;
            let mut stream = self.backend.read(&node.locator, &node.version, 0..LARGE as u64).await.expect("open");
            let mut got = stream.try_next().await.expect("the first piece").expect("not empty").to_vec();
            if in_place {
                if !self.store.overwrite(b"stale/middle", &content(11, LARGE)) {
                    return;
                }
            } else {
                self.store.put(b"stale/middle", &content(11, LARGE));
            }
            let end = loop {
                match stream.try_next().await {
                    Ok(Some(piece)) => got.extend_from_slice(&piece),
                    Ok(None) => break None,
                    Err(e) => break Some(e),
                }
            };
            assert!(got == content(10, LARGE)[..got.len()], "bytes of two versions were mixed (in place: {in_place})");
            match end {
                None => assert_eq!(got.len(), LARGE),
                Some(e) => assert!(e.is(Kind::Stale), "{e:?}"),
            }
            assert!(self.read_all(&self.find("stale/middle").await).await == content(11, LARGE));
        }
    }

    async fn links(&self) {
        if !self.backend.capabilities().symlinks {
            return;
        }
        self.store.put(b"links/file", b"x");
        for (name, target) in [("relative", &b"file"[..]), ("absolute", b"/etc/passwd"), ("odd", b"../\xff dangling")] {
            self.store.symlink(format!("links/{name}").as_bytes(), target);
            let link = self.find(&format!("links/{name}")).await;
            assert_eq!(link.attr.kind, FileKind::Symlink);
            assert_eq!(self.backend.readlink(&link.locator).await.expect("readlink"), target);
        }
        let dir = self.find("links").await;
        let kinds: Vec<FileKind> = self.list(&dir).await.values().map(|e| e.node.attr.kind).collect();
        assert_eq!(kinds, [FileKind::Symlink, FileKind::File, FileKind::Symlink, FileKind::Symlink]);
        let file = self.find("links/file").await;
        assert!(self.backend.readlink(&file.locator).await.is_err_and(|e| e.is(Kind::Invalid)));
    }

    async fn xattrs(&self) {
        self.store.put(b"xattrs/file", b"x");
        if !self.backend.capabilities().xattr {
            let file = self.find("xattrs/file").await;
            assert_eq!(self.backend.xattrs(&file.locator).await.expect("xattrs"), []);
            return;
        }
        self.store.set_xattr(b"xattrs/file", "user.efc.one", b"1\0\xff");
        self.store.set_xattr(b"xattrs/file", "user.efc.two", b"");
        let file = self.find("xattrs/file").await;
        let mut found = self.backend.xattrs(&file.locator).await.expect("xattrs");
        found.retain(|(name, _)| name.starts_with(b"user."));
        found.sort();
        let want = [(&b"user.efc.one"[..], &b"1\0\xff"[..]), (b"user.efc.two", b"")];
        assert_eq!(found, want.map(|(n, v)| (Bytes::from_static(n), Bytes::from_static(v))));
    }

    async fn statfs(&self) {
        match self.backend.statfs().await {
            Ok(s) => {
                assert!(self.backend.capabilities().statfs);
                assert!(
                    s.total_bytes > 0 && s.free_bytes <= s.total_bytes && s.available_bytes <= s.free_bytes,
                    "{s:?}"
                );
            }
            Err(e) => assert!(e.is(Kind::Unsupported) && !self.backend.capabilities().statfs, "{e:?}"),
        }
    }

    async fn odd_names(&self) {
        let names: Vec<Vec<u8>> = odd_names().into_iter().filter(|n| self.store.accepts(n)).collect();
        for name in &names {
            self.store.put(&[b"odd/", &name[..]].concat(), name);
        }
        let dir = self.find("odd").await;
        let listed = self.list(&dir).await;
        assert_eq!(listed.len(), names.len());
        for name in &names {
            let entry = listed.get(name).unwrap_or_else(|| panic!("{} is not listed", name.escape_ascii()));
            assert_eq!(self.read_all(&entry.node).await, *name);
            let found = self.backend.lookup(&dir.locator, name).await;
            assert_eq!(found.expect("lookup").version, entry.node.version, "{}", name.escape_ascii());
        }
    }

    /// Locators, versions and places come from peers: garbage is an error.
    async fn nonsense(&self) {
        let file = self.find("names/a/b/file").await;
        let garbage = Bytes::from_static(b"\xff/../../etc/passwd");
        let far = Bytes::from(vec![b'x'; LOCATOR_BYTES_MAX]);
        for bad in [&garbage, &far] {
            assert!(self.backend.getattr(bad).await.is_err());
            assert!(self.backend.lookup(bad, b"x").await.is_err());
            assert!(self.read(&Node { locator: bad.clone(), ..file.clone() }, 0..1).await.is_err());
            assert!(self.read(&Node { version: bad.clone(), ..file.clone() }, 0..1).await.is_err());
        }
        for name in [&b""[..], b".", b"..", b"a/b", b"a\0b"] {
            let dir = self.find("names").await;
            assert!(self.backend.lookup(&dir.locator, name).await.is_err(), "{}", name.escape_ascii());
        }
    }
}
