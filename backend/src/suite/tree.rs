//! The part of the suite for origins that are trees: everything in [`Tree`](crate::tree::Tree) and [`OpenFile`](crate::tree::OpenFile).
//!
//! What an origin may refuse ([`Kind::Unsupported`]) is checked where it does not. Nothing here knows whether faults are injected below: an
//! answer that was lost must not show. Runs as root, because only root gives files away. The checks of open files are in [`super::open`].

use super::odd_names;
use crate::DynBackend;
use crate::connect::Connected;
use crate::tree::{Change, DynTree, New, NewNode, OpenFile, RenameMode, SetTime};
use bytes::Bytes;
use efc_common::node::{Attr, FileKind, Node, Time};
use efc_common::{Kind, Result};
use futures::TryStreamExt;
use std::path::Path;
use std::sync::Arc;

const OWNER: (u32, u32) = (1234, 4321);

/// Runs this part over an origin whose root is empty and whose back is the directory `behind`.
pub async fn run(origin: &Connected, behind: &Path) {
    let tree = origin.tree.clone().expect("a tree");
    let suite = Suite { backend: origin.backend.clone(), tree, behind };
    suite.kinds().await;
    suite.refused_names().await;
    suite.odd_names().await;
    suite.set_group_id().await;
    suite.links().await;
    suite.renames().await;
    suite.rename_refusals().await;
    suite.exchange().await;
    suite.removes().await;
    suite.attributes().await;
    suite.link_attributes().await;
    suite.sizes().await;
    suite.writes().await;
    suite.concurrent_writes().await;
    suite.unlinked().await;
    suite.ranges().await;
    suite.copies().await;
    suite.xattrs().await;
}

pub(super) struct Suite<'a> {
    pub(super) backend: DynBackend,
    pub(super) tree: DynTree,
    pub(super) behind: &'a Path,
}

fn new(what: New) -> NewNode {
    NewNode { what, mode: 0o640, uid: OWNER.0, gid: OWNER.1 }
}

pub(super) fn kind_of<T: std::fmt::Debug>(answer: Result<T>) -> Kind {
    answer.expect_err("refused").kind()
}

/// What does not change by being looked at.
fn still(attr: &Attr) -> Attr {
    Attr { atime: None, used: None, ..attr.clone() }
}

impl Suite<'_> {
    pub(super) async fn make(&self, dir: &Node, name: &str, what: New) -> Node {
        self.tree.create(&dir.locator, name.as_bytes(), &new(what)).await.unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// A new directory below the root.
    pub(super) async fn dir(&self, name: &str) -> Node {
        let root = self.backend.root().await.expect("root");
        self.make(&root, name, New::Directory).await
    }

    /// A new file with content.
    pub(super) async fn file(&self, dir: &Node, name: &str, data: &[u8]) -> Node {
        let node = self.make(dir, name, New::File).await;
        let open = self.open(&node).await;
        open.write(0, Bytes::copy_from_slice(data)).await.expect("write");
        open.sync(false).await.expect("sync")
    }

    pub(super) async fn open(&self, node: &Node) -> Arc<dyn OpenFile> {
        self.tree.open(&node.locator, true).await.expect("open")
    }

    async fn find(&self, dir: &Node, name: &str) -> Node {
        self.backend.lookup(&dir.locator, name.as_bytes()).await.unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    async fn absent(&self, dir: &Node, name: &str) {
        assert_eq!(kind_of(self.backend.lookup(&dir.locator, name.as_bytes()).await), Kind::NotFound, "{name}");
    }

    /// The content, through the backend's versioned reads.
    pub(super) async fn read(&self, node: &Node) -> Vec<u8> {
        let stream = self.backend.read(&node.locator, &node.version, 0..node.attr.size).await.expect("read");
        stream.try_collect::<Vec<_>>().await.expect("stream").concat()
    }

    async fn kinds(&self) {
        let dir = self.dir("kinds").await;
        let kinds = [
            ("file", New::File, FileKind::File),
            ("directory", New::Directory, FileKind::Directory),
            ("symlink", New::Symlink(Bytes::from_static(b"../\xff nowhere")), FileKind::Symlink),
            ("fifo", New::Fifo, FileKind::Fifo),
            ("socket", New::Socket, FileKind::Socket),
            ("char", New::CharDevice(0x0012_0103), FileKind::CharDevice),
            ("block", New::BlockDevice(0x801), FileKind::BlockDevice),
        ];
        for (name, what, kind) in kinds {
            for mode in [0o640, 0o666, 0o7751, 0] {
                let name = format!("{name}-{mode:o}");
                let wanted = NewNode { what: what.clone(), mode, uid: OWNER.0, gid: OWNER.1 };
                let made = self.tree.create(&dir.locator, name.as_bytes(), &wanted).await;
                let made = made.unwrap_or_else(|e| panic!("{name}: {e}"));
                let attr = &made.attr;
                assert_eq!((attr.kind, attr.uid, attr.gid), (kind, Some(OWNER.0), Some(OWNER.1)), "{name}");
                if kind != FileKind::Symlink {
                    assert_eq!(attr.mode, Some(mode), "{name}");
                }
                let device = match what {
                    New::CharDevice(n) | New::BlockDevice(n) => n,
                    _ => 0,
                };
                assert_eq!((attr.rdev, attr.nlink > 0), (device, true), "{name}");
                let found = self.find(&dir, &name).await;
                assert_eq!((&found.locator, still(&found.attr)), (&made.locator, still(attr)), "{name}");
                assert_eq!(found.version, made.version, "{name}");
                assert_eq!(
                    kind_of(self.tree.create(&dir.locator, name.as_bytes(), &wanted).await),
                    Kind::AlreadyExists
                );
                let other = NewNode { what: New::File, ..wanted };
                assert_eq!(kind_of(self.tree.create(&dir.locator, name.as_bytes(), &other).await), Kind::AlreadyExists);
                assert_eq!(still(&self.find(&dir, &name).await.attr), still(attr), "{name} is left alone");
            }
        }
        let link = self.find(&dir, "symlink-640").await;
        assert_eq!(self.backend.readlink(&link.locator).await.expect("readlink"), &b"../\xff nowhere"[..]);
        let file = self.find(&dir, "file-640").await;
        assert_eq!((file.attr.size, file.attr.nlink), (0, 1));
        for bad in [&dir, &link] {
            let refused = match self.tree.open(&bad.locator, false).await {
                // NFS opens by the first read.
                Ok(open) => open.read(0..10).await.map(drop),
                Err(e) => Err(e),
            };
            assert!(refused.is_err(), "only regular files are opened");
        }
    }

    async fn refused_names(&self) {
        let dir = self.dir("refused").await;
        let file = self.file(&dir, "file", b"x").await;
        for name in [&b""[..], b".", b"..", b"a/b", b"a\0b"] {
            for what in [New::File, New::Directory, New::Symlink("x".into())] {
                let answer = self.tree.create(&dir.locator, name, &new(what)).await;
                assert_eq!(kind_of(answer), Kind::Invalid, "{}", name.escape_ascii());
            }
            assert_eq!(kind_of(self.tree.link(&file.locator, &dir.locator, name).await), Kind::Invalid);
            assert_eq!(kind_of(self.tree.remove(&dir.locator, name, false).await), Kind::Invalid);
            let (from, to) = ((&dir.locator, &b"file"[..]), (&dir.locator, name));
            assert_eq!(kind_of(self.tree.rename(from, to, RenameMode::Replace).await), Kind::Invalid);
            assert_eq!(kind_of(self.tree.rename(to, from, RenameMode::Replace).await), Kind::Invalid);
        }
        let long = [b'n'; 256];
        assert_eq!(kind_of(self.tree.create(&dir.locator, &long, &new(New::File)).await), Kind::NameTooLong);
        assert_eq!(kind_of(self.tree.create(&dir.locator, &long, &new(New::Directory)).await), Kind::NameTooLong);
        assert_eq!(kind_of(self.tree.create(&file.locator, b"x", &new(New::File)).await), Kind::NotADirectory);
        let gone = self.make(&dir, "gone", New::Directory).await;
        self.tree.remove(&dir.locator, b"gone", true).await.expect("remove");
        let answer = self.tree.create(&gone.locator, b"x", &new(New::File)).await;
        assert!(matches!(kind_of(answer), Kind::NotFound | Kind::Stale));
        assert_eq!(self.read(&self.find(&dir, "file").await).await, b"x");
    }

    async fn odd_names(&self) {
        let dir = self.dir("odd").await;
        for (i, name) in odd_names().iter().enumerate() {
            let shown = name.escape_ascii();
            let made = self.tree.create(&dir.locator, name, &new(New::File)).await;
            let made = made.unwrap_or_else(|e| panic!("{shown}: {e}"));
            assert_eq!(self.backend.lookup(&dir.locator, name).await.expect("lookup").locator, made.locator);
            let other = format!("plain-{i}").into_bytes();
            let (from, to) = ((&dir.locator, &name[..]), (&dir.locator, &other[..]));
            self.tree.rename(from, to, RenameMode::Replace).await.unwrap_or_else(|e| panic!("{shown}: {e}"));
            let linked =
                self.tree.link(&self.find(&dir, &format!("plain-{i}")).await.locator, &dir.locator, name).await;
            assert_eq!(linked.unwrap_or_else(|e| panic!("{shown}: {e}")).attr.nlink, 2);
            self.tree.remove(&dir.locator, &other, false).await.expect("remove");
            let target = Bytes::copy_from_slice(name);
            let link =
                self.tree.create(&dir.locator, &other, &new(New::Symlink(target.clone()))).await.expect("symlink");
            assert_eq!(self.backend.readlink(&link.locator).await.expect("readlink"), target);
        }
    }

    async fn set_group_id(&self) {
        let top = self.dir("setgid").await;
        let shared = NewNode { what: New::Directory, mode: 0o2775, uid: 0, gid: 777 };
        let dir = self.tree.create(&top.locator, b"shared", &shared).await.expect("create");
        assert_eq!((dir.attr.mode, dir.attr.gid), (Some(0o2775), Some(777)));
        for (name, what, mode) in [
            ("file", New::File, Some(0o640)),
            ("directory", New::Directory, Some(0o2640)),
            ("fifo", New::Fifo, Some(0o640)),
            ("symlink", New::Symlink("x".into()), None),
        ] {
            let made = self.make(&dir, name, what).await;
            assert_eq!((made.attr.uid, made.attr.gid), (Some(OWNER.0), Some(777)), "{name}");
            if mode.is_some() {
                assert_eq!(made.attr.mode, mode, "{name}");
            }
            assert_eq!(still(&self.find(&dir, name).await.attr), still(&made.attr));
        }
        let asked = NewNode { mode: 0o2755, ..new(New::File) };
        let made = self.tree.create(&dir.locator, b"asked", &asked).await.expect("create");
        assert_eq!(made.attr.mode, Some(0o2755), "a file keeps the bit that was asked for");
    }

    async fn links(&self) {
        let dir = self.dir("links").await;
        let other = self.make(&dir, "other", New::Directory).await;
        let file = self.file(&dir, "file", b"content").await;
        let second = self.tree.link(&file.locator, &other.locator, b"second").await.expect("link");
        assert_eq!((second.attr.nlink, second.attr.fileid), (2, file.attr.fileid));
        assert_eq!(self.find(&other, "second").await.locator, second.locator);
        assert_eq!(kind_of(self.tree.link(&file.locator, &other.locator, b"second").await), Kind::AlreadyExists);
        let refused = kind_of(self.tree.link(&other.locator, &dir.locator, b"directory").await);
        assert!(matches!(refused, Kind::NotPermitted | Kind::IsADirectory | Kind::Invalid), "{refused:?}");
        let symlink = self.make(&dir, "symlink", New::Symlink("file".into())).await;
        let twin = self.tree.link(&symlink.locator, &dir.locator, b"twin").await.expect("link");
        assert_eq!((twin.attr.kind, twin.attr.nlink), (FileKind::Symlink, 2), "the link itself, not what it points to");
        self.tree.remove(&dir.locator, b"file", false).await.expect("remove");
        let left = self.find(&other, "second").await;
        assert_eq!((left.attr.nlink, self.read(&left).await), (1, b"content".to_vec()));
        // Both names of one file: nothing happens.
        let twins = ((&dir.locator, &b"symlink"[..]), (&dir.locator, &b"twin"[..]));
        let same = self.tree.rename(twins.0, twins.1, RenameMode::Replace).await.expect("rename");
        assert_eq!(same.attr.fileid, twin.attr.fileid);
    }

    async fn renames(&self) {
        let (a, b) = (self.dir("rename-a").await, self.dir("rename-b").await);
        let file = self.file(&a, "one", b"first").await;
        let (one, two) = ((&a.locator, &b"one"[..]), (&b.locator, &b"two"[..]));
        let moved = self.tree.rename(one, two, RenameMode::Replace).await.expect("rename");
        assert_eq!((moved.attr.fileid, self.read(&moved).await), (file.attr.fileid, b"first".to_vec()));
        assert_eq!(self.find(&b, "two").await.locator, moved.locator);
        self.absent(&a, "one").await;

        self.file(&a, "one", b"second").await;
        assert_eq!(kind_of(self.tree.rename(one, two, RenameMode::NoReplace).await), Kind::AlreadyExists);
        assert_eq!(self.read(&self.find(&b, "two").await).await, b"first");
        let moved = self.tree.rename(one, two, RenameMode::Replace).await.expect("replace");
        assert_eq!(self.read(&moved).await, b"second");
        self.absent(&a, "one").await;
        let three = (&b.locator, &b"three"[..]);
        let moved = self.tree.rename(two, three, RenameMode::NoReplace).await.expect("no target");
        assert_eq!(self.read(&moved).await, b"second");
        assert_eq!(self.read(&self.find(&b, "three").await).await, b"second");

        let dir = self.make(&a, "dir", New::Directory).await;
        self.file(&dir, "inside", b"deep").await;
        self.make(&b, "empty", New::Directory).await;
        let to = (&b.locator, &b"empty"[..]);
        let moved = self.tree.rename((&a.locator, b"dir"), to, RenameMode::Replace).await.expect("onto an empty one");
        assert_eq!((moved.attr.kind, moved.attr.fileid), (FileKind::Directory, dir.attr.fileid));
        assert_eq!(self.read(&self.find(&moved, "inside").await).await, b"deep");
        let link = self.make(&a, "link", New::Symlink("x".into())).await;
        let moved = self.tree.rename((&a.locator, b"link"), two, RenameMode::Replace).await.expect("a link");
        assert_eq!((moved.attr.kind, moved.attr.fileid), (FileKind::Symlink, link.attr.fileid));
    }

    async fn rename_refusals(&self) {
        let dir = self.dir("rename-no").await;
        self.file(&dir, "file", b"file").await;
        self.make(&dir, "empty", New::Directory).await;
        let full = self.make(&dir, "full", New::Directory).await;
        self.file(&full, "inside", b"x").await;
        for mode in [RenameMode::Replace, RenameMode::NoReplace] {
            let rename = |from: &'static str, to: &'static str| {
                let (at, tree) = (dir.locator.clone(), self.tree.clone());
                async move { kind_of(tree.rename((&at, from.as_bytes()), (&at, to.as_bytes()), mode).await) }
            };
            assert_eq!(rename("absent", "new").await, Kind::NotFound);
            let exists = |kind| if mode == RenameMode::Replace { kind } else { Kind::AlreadyExists };
            assert_eq!(rename("file", "empty").await, exists(Kind::IsADirectory));
            assert_eq!(rename("empty", "file").await, exists(Kind::NotADirectory));
            assert_eq!(rename("empty", "full").await, exists(Kind::NotEmpty));
        }
        let inside = (&full.locator, &b"below"[..]);
        assert_eq!(
            kind_of(self.tree.rename((&dir.locator, b"full"), inside, RenameMode::Replace).await),
            Kind::Invalid
        );
        assert_eq!(self.read(&self.find(&dir, "file").await).await, b"file");
        assert_eq!(self.read(&self.find(&full, "inside").await).await, b"x");
    }

    async fn exchange(&self) {
        let dir = self.dir("exchange").await;
        let file = self.file(&dir, "file", b"content").await;
        let other = self.make(&dir, "other", New::Directory).await;
        let (from, to) = ((&dir.locator, &b"file"[..]), (&dir.locator, &b"other"[..]));
        match self.tree.rename(from, to, RenameMode::Exchange).await {
            Ok(node) => assert_eq!(node.attr.fileid, file.attr.fileid),
            Err(e) if e.is(Kind::Unsupported) => return,
            Err(e) => panic!("exchange: {e}"),
        }
        assert_eq!(self.find(&dir, "file").await.attr.fileid, other.attr.fileid);
        assert_eq!(self.read(&self.find(&dir, "other").await).await, b"content");
        // An odd number of swaps, however often answers are lost.
        for _ in 0..21 {
            self.tree.rename(from, to, RenameMode::Exchange).await.expect("exchange");
        }
        assert_eq!(self.find(&dir, "file").await.attr.fileid, file.attr.fileid);
        let absent = (&dir.locator, &b"absent"[..]);
        assert_eq!(kind_of(self.tree.rename(from, absent, RenameMode::Exchange).await), Kind::NotFound);
    }

    async fn removes(&self) {
        let dir = self.dir("remove").await;
        self.file(&dir, "file", b"x").await;
        let full = self.make(&dir, "full", New::Directory).await;
        self.file(&full, "inside", b"x").await;
        let remove = |name: &'static str, directory| {
            let (at, tree) = (dir.locator.clone(), self.tree.clone());
            async move { tree.remove(&at, name.as_bytes(), directory).await }
        };
        assert_eq!(kind_of(remove("absent", false).await), Kind::NotFound);
        assert_eq!(kind_of(remove("absent", true).await), Kind::NotFound);
        assert_eq!(kind_of(remove("file", true).await), Kind::NotADirectory);
        assert_eq!(kind_of(remove("full", false).await), Kind::IsADirectory);
        assert_eq!(kind_of(remove("full", true).await), Kind::NotEmpty);
        self.tree.remove(&full.locator, b"inside", false).await.expect("remove");
        remove("full", true).await.expect("an empty one");
        remove("file", false).await.expect("a file");
        for (name, what) in [("link", New::Symlink("full".into())), ("fifo", New::Fifo), ("socket", New::Socket)] {
            self.make(&dir, name, what).await;
            remove(name, false).await.expect(name);
            self.absent(&dir, name).await;
        }
        self.absent(&dir, "file").await;
        // Many in a row: an answer that is lost is neither an error nor a second removal.
        for i in 0..100 {
            let name = format!("many-{i}");
            self.make(&dir, &name, New::Directory).await;
            self.tree.remove(&dir.locator, name.as_bytes(), true).await.expect("remove");
            self.absent(&dir, &name).await;
        }
    }

    async fn attributes(&self) {
        let dir = self.dir("attributes").await;
        let node = self.file(&dir, "file", b"content").await;
        let at = |secs, nanos| Time { secs, nanos };
        let set = |change: Change| {
            let (tree, locator) = (self.tree.clone(), node.locator.clone());
            async move { tree.set_attr(&locator, &change).await.unwrap_or_else(|e| panic!("{change:?}: {e}")) }
        };
        let none = Change::default();
        let got = set(Change { mode: Some(0o4711), ..none }).await;
        assert_eq!((got.attr.mode, got.attr.mtime), (Some(0o4711), node.attr.mtime));
        assert_ne!(got.version, node.version, "a change of attributes is a new version");
        assert_eq!(set(Change { uid: Some(7), ..none }).await.attr.uid, Some(7));
        assert_eq!(set(Change { gid: Some(8), ..none }).await.attr.gid, Some(8));
        let (uid, gid, mode) = (Some(9), Some(10), Some(0o6755));
        let got = set(Change { uid, gid, mode, ..none }).await.attr;
        assert_eq!(
            (got.uid, got.gid, got.mode),
            (uid, gid, mode),
            "set-id bits survive the change of owner beside them"
        );
        let (atime, mtime) = (at(1_234_567_890, 123_456_789), at(987_654_321, 1));
        let got = set(Change { atime: Some(SetTime::At(atime)), ..none }).await.attr;
        assert_eq!((got.atime, got.mtime), (Some(atime), node.attr.mtime));
        let got = set(Change { mtime: Some(SetTime::At(mtime)), ..none }).await.attr;
        assert_eq!((got.atime, got.mtime), (Some(atime), mtime));
        let got = set(Change { mtime: Some(SetTime::Now), ..none }).await.attr;
        assert_eq!(got.atime, Some(atime));
        assert!((got.mtime.secs - node.attr.mtime.secs).abs() < 600, "{:?}", got.mtime);
        let got = set(Change { atime: Some(SetTime::Now), ..none }).await.attr;
        assert!((got.atime.expect("atime").secs - node.attr.mtime.secs).abs() < 600);
        let all = Change {
            mode: Some(0o600),
            uid: Some(11),
            gid: Some(12),
            size: Some(3),
            atime: Some(SetTime::At(atime)),
            mtime: Some(SetTime::At(mtime)),
        };
        let got = set(all).await;
        let attr = &got.attr;
        assert_eq!((attr.mode, attr.uid, attr.gid, attr.size), (Some(0o600), Some(11), Some(12), 3));
        assert_eq!((attr.atime, attr.mtime), (Some(atime), mtime), "times come last");
        assert_eq!(still(&self.find(&dir, "file").await.attr), still(attr));
        assert_eq!(self.read(&got).await, b"con");
        assert_eq!(set(none).await.attr.size, 3, "no change at all");
        let open = self.open(&node).await;
        assert_eq!(
            open.set_attr(&Change { mode: Some(0o644), size: Some(1), ..none }).await.expect("open").attr.size,
            1
        );
        let got = self.tree.set_attr(&dir.locator, &Change { mode: Some(0o1777), ..none }).await.expect("directory");
        assert_eq!(got.attr.mode, Some(0o1777));
        let refused = kind_of(self.tree.set_attr(&dir.locator, &Change { size: Some(0), ..none }).await);
        assert!(matches!(refused, Kind::IsADirectory | Kind::Invalid), "{refused:?}");
    }

    /// Attributes of links and special files are their own.
    async fn link_attributes(&self) {
        let dir = self.dir("link-attributes").await;
        let target = self.file(&dir, "target", b"x").await;
        let link = self.make(&dir, "link", New::Symlink("target".into())).await;
        let fifo = self.make(&dir, "fifo", New::Fifo).await;
        let time = Time { secs: 1_000_000_000, nanos: 5 };
        let change = Change { uid: Some(5), gid: Some(6), mtime: Some(SetTime::At(time)), ..Change::default() };
        for node in [&link, &fifo] {
            let got = self.tree.set_attr(&node.locator, &change).await.expect("set").attr;
            assert_eq!((got.uid, got.gid), (Some(5), Some(6)));
            // Ganesha leaves the times of links alone, and says so in the answer.
            assert!(got.mtime == time || (got.kind == FileKind::Symlink && got.mtime == node.attr.mtime), "{got:?}");
        }
        let mode = Change { mode: Some(0o600), ..Change::default() };
        assert_eq!(self.tree.set_attr(&fifo.locator, &mode).await.expect("mode").attr.mode, Some(0o600));
        match self.tree.set_attr(&link.locator, &mode).await {
            // Ganesha takes it and leaves the link as it is.
            Ok(node) => assert_eq!(node.attr.mode, link.attr.mode),
            Err(e) => assert!(e.is(Kind::Unsupported), "{e:?}"),
        }
        assert_eq!(self.find(&dir, "target").await, target, "what the link points to is as it was");
    }

    async fn xattrs(&self) {
        let dir = self.dir("xattrs-of").await;
        let node = self.file(&dir, "file", b"x").await;
        let set = |name: &'static str, value: &'static [u8], flags| {
            let (tree, locator) = (self.tree.clone(), node.locator.clone());
            async move { tree.set_xattr(&locator, name.as_bytes(), value, flags).await }
        };
        let remove = || self.tree.remove_xattr(&node.locator, b"user.efc.one");
        if !self.backend.capabilities().xattr {
            assert_eq!(kind_of(set("user.efc.one", b"1", 0).await), Kind::Unsupported);
            assert_eq!(kind_of(remove().await), Kind::Unsupported);
            return;
        }
        let (create, replace) = (1, 2);
        assert_eq!(kind_of(set("user.efc.one", b"1", replace).await), Kind::NoData);
        set("user.efc.one", b"1\0\xff", create).await.expect("create");
        assert_eq!(kind_of(set("user.efc.one", b"2", create).await), Kind::AlreadyExists);
        let found = self.backend.xattrs(&node.locator).await.expect("xattrs");
        assert!(found.contains(&(Bytes::from_static(b"user.efc.one"), Bytes::from_static(b"1\0\xff"))), "{found:?}");
        set("user.efc.one", b"", replace).await.expect("replace");
        set("user.efc.two", b"2", 0).await.expect("set");
        remove().await.expect("remove");
        assert_eq!(kind_of(remove().await), Kind::NoData);
        let found = self.backend.xattrs(&node.locator).await.expect("xattrs");
        assert!(found.iter().all(|(name, _)| name != "user.efc.one"), "{found:?}");
        let fifo = self.make(&dir, "fifo", New::Fifo).await;
        let answer = self.tree.set_xattr(&fifo.locator, b"user.efc.one", b"1", 0).await;
        assert_eq!(kind_of(answer), Kind::NotPermitted, "as everywhere on Linux");
    }
}
