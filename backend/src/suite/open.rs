//! The part of the suite of trees that is about open files.

use super::content;
use super::tree::{Suite, kind_of};
use crate::tree::{Allocate, Change, New, RenameMode};
use bytes::Bytes;
use efc_common::Kind;

const LARGE: usize = 16 << 20;

impl Suite<'_> {
    pub(super) async fn sizes(&self) {
        let dir = self.dir("sizes-of").await;
        let data = content(1, 300_000);
        let node = self.file(&dir, "file", &data).await;
        let open = self.open(&node).await;
        for size in [200_001, 7, 0, 400_000] {
            let change = Change { size: Some(size), ..Change::default() };
            let before = open.attr().await.expect("attr");
            let got = if size % 2 == 1 {
                open.set_attr(&change).await
            } else {
                self.tree.set_attr(&node.locator, &change).await
            };
            let got = got.expect("set");
            assert_eq!(got.attr.size, size);
            assert_ne!(got.version, before.version);
            let mut want = data[..(size as usize).min(7)].to_vec();
            if size == 200_001 {
                want = data[..200_001].to_vec();
            } else if size == 400_000 {
                // It was cut to nothing before.
                want = vec![0; 400_000];
            }
            assert!(self.read(&got).await == want, "{size}");
            assert!(open.read(0..1 << 20).await.expect("read") == want, "{size}");
        }
        assert!(open.set_attr(&Change { size: Some(u64::MAX), ..Change::default() }).await.is_err());
    }

    pub(super) async fn writes(&self) {
        let dir = self.dir("writes").await;
        let node = self.make(&dir, "file", New::File).await;
        let open = self.open(&node).await;
        let first = open.write(10_000_000, Bytes::from_static(b"end")).await.expect("write");
        assert_eq!(first.attr.size, 10_000_003);
        assert_ne!(first.version, node.version);
        let seen = self.backend.getattr(&node.locator).await.expect("getattr");
        assert_eq!((seen.attr.size, seen.locator), (10_000_003, first.locator), "others see it at once");
        assert_eq!(open.read(9_999_998..20_000_000).await.expect("read"), &b"\0\0end"[..]);
        assert!(open.read(5..1_000_000).await.expect("a hole").iter().all(|b| *b == 0));
        assert_eq!(open.write(20_000_000, Bytes::new()).await.expect("nothing").attr.size, 10_000_003);
        assert!(open.write(u64::MAX, Bytes::from_static(b"ab")).await.is_err());

        let large = Bytes::from(content(2, LARGE));
        open.write(3, large.clone()).await.expect("write");
        let synced = open.sync(true).await.expect("sync");
        assert_eq!(synced.attr.size, LARGE as u64 + 3);
        assert!(self.read(&synced).await[3..] == large);
        assert!(open.read(0..u64::MAX).await.expect("read")[3..] == large);
        assert!(std::fs::read(self.behind.join("writes/file")).expect("behind")[3..] == large);
        for at in [0, 1, 4095, LARGE as u64 + 2, LARGE as u64 + 3, u64::MAX - 1] {
            let end = (at + 1).min(LARGE as u64 + 3);
            let want = if at < end {
                open.read(0..u64::MAX).await.expect("read").slice(at as usize..end as usize)
            } else {
                Bytes::new()
            };
            assert_eq!(open.read(at..at + 1).await.expect("read"), want, "{at}");
        }
        let again = self.tree.open(&node.locator, false).await.expect("open to read");
        assert!(again.read(3..1003).await.expect("read") == large[..1000]);
        assert_eq!(again.attr().await.expect("attr"), open.sync(false).await.expect("sync with nothing to do"));
    }

    pub(super) async fn concurrent_writes(&self) {
        const PIECE: usize = 65_000;
        let dir = self.dir("concurrent").await;
        let node = self.make(&dir, "file", New::File).await;
        let data = content(3, PIECE * 128);
        let files = [self.open(&node).await, self.open(&node).await];
        let writes = data.chunks(PIECE).enumerate().map(|(i, piece)| {
            let open = &files[i % 2];
            async move {
                open.write((i * PIECE) as u64, Bytes::copy_from_slice(piece)).await.expect("write");
                if i % 16 == 0 {
                    open.sync(true).await.expect("sync");
                }
            }
        });
        futures::future::join_all(writes).await;
        let node = files[0].sync(false).await.expect("sync");
        assert_eq!(node.attr.size as usize, data.len());
        assert!(self.read(&node).await == data);
        // Many files at once in one directory, all there afterwards.
        let many = (0..64).map(|i| {
            let dir = &dir;
            async move { self.file(dir, &format!("many-{i}"), format!("{i}").as_bytes()).await }
        });
        for (i, made) in futures::future::join_all(many).await.into_iter().enumerate() {
            assert_eq!(self.read(&made).await, format!("{i}").as_bytes());
        }
    }

    pub(super) async fn unlinked(&self) {
        let dir = self.dir("unlinked").await;
        let node = self.file(&dir, "file", b"content").await;
        let open = self.open(&node).await;
        let moved = self.tree.rename((&dir.locator, b"file"), (&dir.locator, b"moved"), RenameMode::Replace).await;
        assert_eq!(moved.expect("rename").attr.fileid, node.attr.fileid);
        assert_eq!(open.write(7, Bytes::from_static(b" more")).await.expect("renamed").attr.size, 12);
        self.tree.remove(&dir.locator, b"moved", false).await.expect("remove");
        match open.attr().await {
            Ok(node) => {
                assert_eq!((node.attr.nlink, node.attr.size), (0, 12));
                assert_eq!(open.write(0, Bytes::from_static(b"C")).await.expect("write").attr.nlink, 0);
                assert_eq!(
                    open.set_attr(&Change { size: Some(4), ..Change::default() }).await.expect("set").attr.size,
                    4
                );
                assert_eq!(open.read(0..100).await.expect("read"), &b"Cont"[..]);
                open.sync(false).await.expect("sync");
            }
            // NFSv3: the server forgets a file with its last name. It says so.
            Err(e) => assert!(e.is(Kind::Stale), "{e:?}"),
        }
    }

    pub(super) async fn ranges(&self) {
        let dir = self.dir("ranges").await;
        let data = content(4, 1 << 20);
        let node = self.file(&dir, "file", &data).await;
        let open = self.open(&node).await;
        let reserved = match open.allocate(0..3 << 20, Allocate::Reserve { keep_size: true }).await {
            Ok(node) => node,
            Err(e) => return assert!(e.is(Kind::Unsupported), "{e:?}"),
        };
        assert_eq!(reserved.attr.size, 1 << 20);
        assert!(reserved.attr.used.expect("used") >= 3 << 20);
        let grown = open.allocate(0..2 << 20, Allocate::Reserve { keep_size: false }).await.expect("reserve");
        assert_eq!(grown.attr.size, 2 << 20);
        let punched = open.allocate(65_536..131_072, Allocate::PunchHole).await.expect("punch");
        assert_eq!(punched.attr.size, 2 << 20);
        let mut want = data.clone();
        want[65_536..131_072].fill(0);
        want.resize(2 << 20, 0);
        assert!(open.read(0..u64::MAX).await.expect("read") == want);
        match open.allocate(1..3, Allocate::Zero { keep_size: false }).await {
            Ok(_) => assert_eq!(open.read(0..4).await.expect("read"), [data[0], 0, 0, data[3]].to_vec()),
            Err(e) => assert!(e.is(Kind::Unsupported), "{e:?}"),
        }
        assert_eq!(kind_of(open.allocate(5..5, Allocate::PunchHole).await), Kind::Invalid);
        let sparse = self.make(&dir, "sparse", New::File).await;
        let open = self.open(&sparse).await;
        open.write(1 << 20, Bytes::from(vec![1; 65_536])).await.expect("write");
        open.set_attr(&Change { size: Some(4 << 20), ..Change::default() }).await.expect("grow");
        match open.seek(0, false).await {
            Ok(first) => assert!((1..=1 << 20).contains(&first), "{first}"),
            Err(e) => return assert!(e.is(Kind::Unsupported), "{e:?}"),
        }
        assert_eq!(open.seek(0, true).await.expect("a hole"), 0);
        let hole = open.seek(1 << 20, true).await.expect("the next hole");
        assert!(((1 << 20) + 65_536..4 << 20).contains(&hole), "{hole}");
        assert_eq!(kind_of(open.seek(hole, false).await), Kind::NotFound);
        assert_eq!(kind_of(open.seek(4 << 20, true).await), Kind::NotFound);
    }

    pub(super) async fn copies(&self) {
        let dir = self.dir("copies").await;
        let data = content(5, 3 << 20);
        let (source, target) = (self.file(&dir, "source", &data).await, self.file(&dir, "target", b"0123456789").await);
        let (source, target) = (self.open(&source).await, self.open(&target).await);
        let (n, node) = match target.copy(&*source, 1000..2_001_000, 5).await {
            Ok(done) => done,
            Err(e) => return assert!(e.is(Kind::Unsupported), "{e:?}"),
        };
        assert_eq!((n, node.attr.size), (2_000_000, 2_000_005));
        let got = self.read(&node).await;
        assert!(got[..5] == *b"01234" && got[5..] == data[1000..2_001_000]);
        let (n, _) = target.copy(&*source, (3 << 20) - 10..u64::MAX, 0).await.expect("cut at the end");
        assert_eq!(n, 10);
        assert_eq!(target.copy(&*source, 1 << 40..1 << 41, 0).await.expect("beyond the end").0, 0);
    }
}
