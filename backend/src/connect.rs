//! Builds the backend of a source and stacks its decorators: the one place that says who wraps whom.
//!
//! ```text
//! Retry    again after passing faults, resumes broken streams      outermost: everything below may fail and be asked again
//! Limit    requests and bytes a second, patience                   each attempt pays; its waits are not the origin's latency
//! Count    requests, errors, latency, bytes                        sees each attempt, and injected faults like real ones
//! Fault    only with the option `fault`
//! File | Nfs | object store                                        plain protocol clients that never retry
//! ```
//!
//! The tree of an origin that has one is under the same policies (the same counters, limits and faults, not others alike), with `Settled`
//! for `Retry`: it retries too, and makes sure that what must not happen twice does not.
//!
//! What changes an object store ([`Objects`](crate::objects::Objects)) goes through decorators of the same names, which share limits, counters and
//! faults with those above; its `Retry` also finds out whether a change whose answer was lost has happened.

use crate::DynBackend;
use crate::count::{Count, Counters};
use crate::fault::{Fault, Knobs};
use crate::file::File;
use crate::limit::{Limit, Limits, Rates};
use crate::nfs::Nfs;
use crate::object;
use crate::objects::{self, DynObjects};
use crate::retry::{Policy, Retry};
use crate::tree::DynTree;
use crate::tree::around::Decorated;
use crate::tree::settle::Settled;
use efc_common::error::Context;
use efc_common::source::{SourceKind, SourceSpec, StaticKeys};
use efc_common::units::parse_duration;
use efc_common::{Error, Kind, Result};
use std::sync::Arc;
use std::time::Duration;

/// A backend with the counters of its origin.
#[derive(Clone)]
pub struct Connected {
    /// The stack.
    pub backend: DynBackend,
    /// The same origin for changes, if it is a tree (`file` and `nfs`).
    pub tree: Option<DynTree>,
    /// The same origin for changes, if it is an object store.
    pub objects: Option<DynObjects>,
    /// What its requests are signed with, if it is an object store.
    pub signer: Option<object::Signer>,
    /// How much of it may be asked.
    pub limits: Arc<Limits>,
    /// What it has asked of the origin.
    pub counters: Arc<Counters>,
}

/// Makes the backend of `spec`. Touches no network beyond what credentials need: an origin that is down is seen by the first call
/// ([`Backend::root`] is the mount's check), and one that comes back needs no new backend.
///
/// # Errors
/// [`Kind::Invalid`] naming the option or credential that makes no sense.
pub async fn connect(spec: &SourceSpec, keys: Option<&StaticKeys>) -> Result<DynBackend> {
    Ok(connect_counted(spec, keys).await?.backend)
}

/// As [`connect`], with the counters of the origin.
///
/// # Errors
/// As [`connect`].
pub async fn connect_counted(spec: &SourceSpec, keys: Option<&StaticKeys>) -> Result<Connected> {
    let settings = Settings {
        timeout: duration(spec, "timeout", Duration::from_secs(15))?,
        deadline: duration(spec, "deadline", Duration::from_secs(60))?,
        rates: Rates::of(spec)?,
    };
    let raw = plain(spec, keys, settings.timeout)?;
    let raw = match spec.option("fault") {
        Some(text) => raw.under(|backend| Ok(Fault::new(backend, Knobs::parse(text)?)))?,
        None => raw,
    };
    Ok(stack(raw, spec.url(), &settings))
}

/// What the decorators take from the source's options.
pub(crate) struct Settings {
    pub(crate) timeout: Duration,
    pub(crate) deadline: Duration,
    pub(crate) rates: Rates,
}

/// A protocol client, bare or under faults.
pub(crate) struct Raw {
    pub(crate) backend: DynBackend,
    pub(crate) tree: Option<DynTree>,
    pub(crate) objects: Option<DynObjects>,
    pub(crate) signer: Option<object::Signer>,
}

impl Raw {
    /// Puts the faults that `make` gives around all of them.
    fn under(self, make: impl FnOnce(DynBackend) -> Result<Fault>) -> Result<Raw> {
        let fault = make(self.backend)?;
        let tree = self.tree.map(|tree| fault.tree(tree));
        let objects = self.objects.map(|objects| fault.objects(objects));
        Ok(Raw { backend: Arc::new(fault), tree, objects, signer: self.signer })
    }
}

/// Puts the decorators on; see the module.
pub(crate) fn stack(raw: Raw, source: String, s: &Settings) -> Connected {
    let counters = Arc::new(Counters::new(raw.backend.capabilities()));
    let limits = Arc::new(Limits::new(s.rates, s.timeout));
    let policy = Arc::new(Policy::new(source, s.deadline, counters.clone()));
    let counted = Arc::new(Count::new(raw.backend, counters.clone()));
    let limited = Arc::new(Limit::new(counted, limits.clone()));
    let backend: DynBackend = Arc::new(Retry::new(limited, policy.clone(), s.timeout));
    let tree = raw.tree.map(|tree| -> DynTree {
        let counted = Arc::new(Decorated::new(tree, counters.clone()));
        let limited = Arc::new(Decorated::new(counted, limits.clone()));
        Arc::new(Settled::new(limited, backend.clone(), policy.clone()))
    });
    let objects = raw.objects.map(|objects| -> DynObjects {
        let counted = Arc::new(objects::count::Count::new(objects, counters.clone()));
        let limited = Arc::new(objects::limit::Limit::new(counted, limits.clone()));
        Arc::new(objects::retry::Retry::new(limited, policy))
    });
    Connected { backend, tree, objects, signer: raw.signer, limits, counters }
}

/// The plain protocol client.
fn plain(spec: &SourceSpec, keys: Option<&StaticKeys>, timeout: Duration) -> Result<Raw> {
    Ok(match spec.kind {
        SourceKind::File => {
            let file = Arc::new(File::new(spec));
            Raw { backend: file.clone(), tree: Some(file), objects: None, signer: None }
        }
        SourceKind::Nfs => {
            let nfs = Arc::new(Nfs::new(spec, timeout)?);
            Raw { backend: nfs.clone(), tree: Some(nfs), objects: None, signer: None }
        }
        SourceKind::Oss | SourceKind::S3 => {
            let store = Arc::new(object::connect(spec, keys)?);
            let signer = Some(store.signer());
            Raw { backend: store.clone(), tree: None, objects: Some(store), signer }
        }
    })
}

fn duration(spec: &SourceSpec, name: &str, default: Duration) -> Result<Duration> {
    let Some(text) = spec.option(name) else { return Ok(default) };
    match parse_duration(text).context(format!("option {name}"))? {
        Duration::ZERO => Err(Error::new(Kind::Invalid, format!("option {name}={text} must be longer than nothing"))),
        d => Ok(d),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::{Cut, Script};
    use crate::suite::content;
    use crate::tree::{New, NewNode, RenameMode};
    use efc_common::Retry as Verdict;
    use efc_common::node::Node;
    use efc_common::source::SecretRef;
    use futures::TryStreamExt;
    use tempfile::TempDir;
    use tokio::time::Instant;

    const LEN: usize = 5 << 20;

    /// A local directory with one file of [`LEN`] bytes, under the whole stack with faults to order.
    struct Rig {
        _dir: TempDir,
        script: Script,
        origin: Connected,
        data: Vec<u8>,
    }

    fn rig_with(settings: Settings) -> Rig {
        let dir = tempfile::tempdir().expect("a directory");
        let data = content(1, LEN);
        std::fs::write(dir.path().join("f"), &data).expect("a file");
        let url = format!("file://{}", dir.path().display());
        let spec = SourceSpec::parse(&url, Default::default(), SecretRef::Anonymous).expect("a source");
        let mut script = Script::default();
        let scripted = |backend| {
            let (fault, ordered) = Fault::scripted(backend);
            script = ordered;
            Ok(fault)
        };
        let raw = plain(&spec, None, settings.timeout).expect("plain").under(scripted).expect("faults");
        Rig { _dir: dir, script, origin: stack(raw, spec.url(), &settings), data }
    }

    fn seconds(timeout: u64, deadline: u64) -> Settings {
        let s = Duration::from_secs;
        Settings { timeout: s(timeout), deadline: s(deadline), rates: Rates::default() }
    }

    impl Rig {
        async fn file(&self) -> Node {
            let root = self.origin.backend.root().await.expect("root");
            self.origin.backend.lookup(&root.locator, b"f").await.expect("lookup")
        }

        async fn read(&self, node: &Node) -> Result<Vec<u8>> {
            let all = self.origin.backend.read(&node.locator, &node.version, 0..LEN as u64).await?;
            Ok(all.try_collect::<Vec<_>>().await?.concat())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn passing_faults_are_asked_again_and_others_are_not() {
        let rig = rig_with(seconds(15, 60));
        let node = rig.file().await;
        rig.script.fail_next(3, Kind::Unavailable);
        assert_eq!(rig.origin.backend.getattr(&node.locator).await.expect("getattr"), node);
        let before = rig.script.calls();
        for kind in [Kind::PermissionDenied, Kind::Stale, Kind::Io] {
            rig.script.fail_next(1, kind);
            let e = rig.origin.backend.getattr(&node.locator).await.expect_err("refused");
            assert_eq!(e.kind(), kind);
        }
        assert_eq!(rig.script.calls() - before, 3);
        let stats = rig.origin.counters.stats();
        assert_eq!((stats.retries, stats.errors, stats.requests["getattr"]), (3, 6, 7));
    }

    #[tokio::test(start_paused = true)]
    async fn the_deadline_ends_it_and_the_error_tells_the_story() {
        let rig = rig_with(seconds(15, 60));
        let node = rig.file().await;
        rig.script.fail_next(10_000, Kind::Unavailable);
        let began = Instant::now();
        let e = rig.origin.backend.getattr(&node.locator).await.expect_err("down");
        assert_eq!((e.kind(), e.retry()), (Kind::Timeout, Verdict::Never));
        assert_eq!(began.elapsed().as_secs(), 60);
        let attempts: u32 = e.context("attempts").expect("attempts").parse().expect("a number");
        assert!((40..200).contains(&attempts), "{attempts}");
        assert!(e.to_string().contains("injected failure") && e.context("elapsed").is_some(), "{e}");
        let began = Instant::now();
        let e = rig.origin.backend.root().await.expect_err("down");
        assert_eq!(
            (e.kind(), began.elapsed().as_secs()),
            (Kind::Timeout, 15),
            "a mount waits no longer than one timeout"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_hangs_is_given_up_and_asked_again() {
        let rig = rig_with(seconds(4, 60));
        let node = rig.file().await;
        rig.script.stall_next();
        let began = Instant::now();
        assert_eq!(rig.origin.backend.getattr(&node.locator).await.expect("getattr"), node);
        assert!(began.elapsed() >= Duration::from_secs(5) && began.elapsed() < Duration::from_secs(6));
    }

    #[tokio::test(start_paused = true)]
    async fn a_broken_stream_goes_on_where_it_stopped() {
        for how in [Cut::Break, Cut::End, Cut::Stall] {
            let rig = rig_with(seconds(15, 60));
            let node = rig.file().await;
            rig.script.cut_read(3_000_001, how);
            rig.script.cut_read(7, how);
            assert!(rig.read(&node).await.expect("read") == rig.data);
            let len = LEN as u64;
            assert_eq!(rig.script.ranges(), [0..len, 3_000_001..len, 3_000_008..len], "{how:?}");
            assert_eq!(rig.origin.counters.stats().bytes, len, "nothing was fetched twice");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_gets_the_deadline_anew_after_each_byte_and_ends_when_none_comes() {
        let rig = rig_with(seconds(15, 20));
        let node = rig.file().await;
        for _ in 0..5 {
            rig.script.cut_read(100_000, Cut::Stall);
        }
        let began = Instant::now();
        assert!(rig.read(&node).await.expect("read") == rig.data);
        assert!(began.elapsed() > Duration::from_secs(90), "longer than the deadline, because it got on");
        for _ in 0..5 {
            rig.script.cut_read(0, Cut::Stall);
        }
        let began = Instant::now();
        let e = rig.read(&node).await.expect_err("no byte at all");
        assert_eq!(e.kind(), Kind::Timeout);
        assert!(began.elapsed() < Duration::from_secs(40), "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_file_is_never_asked_again() {
        let rig = rig_with(seconds(15, 60));
        let node = rig.file().await;
        rig.script.cut_read(1_000_000, Cut::Stale);
        assert!(rig.read(&node).await.is_err_and(|e| e.is(Kind::Stale)));
        assert_eq!(rig.script.ranges().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn bandwidth_and_request_rate_hold() {
        let rig = rig_with(Settings { rates: Rates { bytes: 1 << 20, requests: 0 }, ..seconds(15, 60) });
        let node = rig.file().await;
        let began = Instant::now();
        assert!(rig.read(&node).await.expect("read") == rig.data);
        // 5 MiB at 1 MiB/s, of which one second's worth comes at once.
        assert!((3.9..4.5).contains(&began.elapsed().as_secs_f64()), "{:?}", began.elapsed());
        let rig = rig_with(Settings { rates: Rates { requests: 10, bytes: 0 }, ..seconds(15, 60) });
        let node = rig.file().await;
        let began = Instant::now();
        for _ in 0..38 {
            rig.origin.backend.getattr(&node.locator).await.expect("getattr");
        }
        assert!((2.9..3.5).contains(&began.elapsed().as_secs_f64()), "{:?}", began.elapsed());
    }

    fn new(what: New) -> NewNode {
        NewNode { what, mode: 0o700, uid: 0, gid: 0 }
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_whose_answer_was_lost_is_done_once() {
        let rig = rig_with(seconds(15, 60));
        let (tree, root) = (rig.origin.tree.clone().expect("a tree"), rig.origin.backend.root().await.expect("root"));
        let dir = &root.locator;
        for (i, what) in [New::File, New::Directory, New::Symlink("x".into()), New::Fifo].into_iter().enumerate() {
            let (name, to) = (format!("new-{i}").into_bytes(), format!("moved-{i}").into_bytes());
            rig.script.lose_next(2);
            let made = tree.create(dir, &name, &new(what.clone())).await.expect("create");
            let refused = tree.create(dir, &name, &new(what.clone())).await.expect_err("it is there");
            assert!(refused.is(Kind::AlreadyExists), "{refused:?}");
            if what != New::Directory {
                rig.script.lose_next(1);
                assert_eq!(tree.link(&made.locator, dir, &to).await.expect("link").attr.nlink, 2);
                tree.remove(dir, &to, false).await.expect("remove");
            }
            for mode in [RenameMode::Replace, RenameMode::NoReplace, RenameMode::Exchange] {
                let (from, to) = ((dir, &name[..]), (dir, &to[..]));
                if mode == RenameMode::Exchange {
                    tree.create(dir, to.1, &new(New::File)).await.expect("create");
                }
                rig.script.lose_next(1);
                assert_eq!(tree.rename(from, to, mode).await.expect("rename").attr.fileid, made.attr.fileid);
                if mode == RenameMode::Exchange {
                    tree.remove(dir, from.1, false).await.expect("remove");
                }
                tree.rename(to, from, RenameMode::NoReplace).await.expect("back");
            }
            rig.script.lose_next(1);
            tree.remove(dir, &name, what == New::Directory).await.expect("remove");
            let gone = tree.remove(dir, &name, what == New::Directory).await.expect_err("it is gone");
            assert!(gone.is(Kind::NotFound), "{gone:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_there_before_is_not_taken_for_ours() {
        let rig = rig_with(seconds(4, 60));
        let (tree, root) = (rig.origin.tree.clone().expect("a tree"), rig.origin.backend.root().await.expect("root"));
        let dir = &root.locator;
        let file = rig.file().await;
        tree.create(dir, b"mine", &new(New::File)).await.expect("create");
        // Certainly not executed: the refusal is believed although the file looks right.
        rig.script.fail_next(2, Kind::Unavailable);
        let refused = tree.create(dir, b"mine", &new(New::File)).await.expect_err("it is there");
        assert!(refused.is(Kind::AlreadyExists), "{refused:?}");
        rig.script.fail_next(2, Kind::Unavailable);
        assert!(tree.remove(dir, b"absent", false).await.is_err_and(|e| e.is(Kind::NotFound)));
        // Perhaps executed: but what is there is not what was wanted.
        for what in [New::File, New::Directory, New::Symlink("x".into()), New::CharDevice(1)] {
            rig.script.stall_next();
            let refused = tree.create(dir, b"f", &new(what)).await.expect_err("it is there");
            assert!(refused.is(Kind::AlreadyExists), "{refused:?}");
        }
        rig.script.stall_next();
        let refused = tree.link(&file.locator, dir, b"mine").await.expect_err("it is there");
        assert!(refused.is(Kind::AlreadyExists), "{refused:?}");
        rig.script.stall_next();
        let refused = tree.rename((dir, b"mine"), (dir, b"f"), RenameMode::NoReplace).await.expect_err("it is there");
        assert!(refused.is(Kind::AlreadyExists), "{refused:?}");
        assert!(rig.read(&rig.file().await).await.expect("read") == rig.data);
    }

    #[tokio::test]
    async fn what_another_process_may_have_done_is_found_in_doubt() {
        let rig = rig_with(seconds(15, 60));
        let (tree, root) = (rig.origin.tree.clone().expect("a tree"), rig.origin.backend.root().await.expect("root"));
        let (doubt, dir) = (tree.in_doubt().expect("a tree in doubt"), &root.locator);
        let file = rig.file().await;
        for (i, what) in [New::File, New::Directory, New::Symlink("x".into()), New::Fifo].into_iter().enumerate() {
            let (name, to) = (format!("new-{i}").into_bytes(), format!("moved-{i}").into_bytes());
            let wanted = new(what.clone());
            let made = tree.create(dir, &name, &wanted).await.expect("create");
            let found = doubt.create(dir, &name, &wanted).await.expect("made already");
            assert_eq!((found.attr.fileid, found.attr.mode), (made.attr.fileid, made.attr.mode));
            let refused = tree.create(dir, &name, &wanted).await.expect_err("certainly there before");
            assert!(refused.is(Kind::AlreadyExists), "{refused:?}");
            let (from, onto) = ((dir, &name[..]), (dir, &to[..]));
            for mode in [RenameMode::Replace, RenameMode::NoReplace] {
                tree.rename(from, onto, mode).await.expect("rename");
                let moved = doubt.rename(from, onto, mode).await.expect("moved already");
                assert_eq!(moved.attr.fileid, made.attr.fileid);
                assert!(tree.rename(from, onto, mode).await.is_err_and(|e| e.is(Kind::NotFound)));
                tree.rename(onto, from, mode).await.expect("back");
            }
            let directory = what == New::Directory;
            tree.remove(dir, &name, directory).await.expect("remove");
            doubt.remove(dir, &name, directory).await.expect("removed already");
            assert!(tree.remove(dir, &name, directory).await.is_err_and(|e| e.is(Kind::NotFound)));
        }
        tree.link(&file.locator, dir, b"twin").await.expect("link");
        assert_eq!(doubt.link(&file.locator, dir, b"twin").await.expect("linked already").attr.nlink, 2);
        let refused = doubt.create(dir, b"twin", &new(New::File)).await.expect_err("it has content");
        assert!(refused.is(Kind::AlreadyExists), "{refused:?}");
        // What was not done yet is done.
        let made = doubt.create(dir, b"first", &new(New::File)).await.expect("create");
        let refused = doubt.link(&file.locator, dir, b"first").await.expect_err("another file");
        assert!(refused.is(Kind::AlreadyExists), "{refused:?}");
        let refused = doubt.rename((dir, b"first"), (dir, b"f"), RenameMode::NoReplace).await.expect_err("it is there");
        assert!(refused.is(Kind::AlreadyExists), "{refused:?}");
        let moved = doubt.rename((dir, b"first"), (dir, b"second"), RenameMode::Replace).await.expect("rename");
        assert_eq!(moved.attr.fileid, made.attr.fileid);
        doubt.remove(dir, b"second", false).await.expect("remove");
    }

    #[tokio::test]
    async fn what_another_process_left_unfinished_is_finished_in_doubt() {
        let rig = rig_with(seconds(15, 60));
        let (tree, root) = (rig.origin.tree.clone().expect("a tree"), rig.origin.backend.root().await.expect("root"));
        let doubt = tree.in_doubt().expect("a tree in doubt");
        let shared = NewNode { what: New::Directory, mode: 0o2775, uid: 0, gid: 777 };
        let shared = tree.create(&root.locator, b"shared", &shared).await.expect("create");
        let link = New::Symlink("x".into());
        for (i, what) in [New::File, New::Directory, link, New::Fifo, New::CharDevice(0x103)].into_iter().enumerate() {
            for (dir, group, bit) in [(&root.locator, 6, 0), (&shared.locator, 777, 0o2000)] {
                let wanted = NewNode { what: what.clone(), mode: 0o4751, uid: 5, gid: 6 };
                // As made, and given away without the whole mode.
                for (j, (uid, gid, mode)) in [(0, 0, 0o751), (0, 0, 0o600), (5, 6, 0o711)].into_iter().enumerate() {
                    let name = format!("new-{i}-{j}").into_bytes();
                    let left = NewNode { mode, uid, gid, ..wanted.clone() };
                    let left = tree.create(dir, &name, &left).await.expect("create");
                    let made = doubt.create(dir, &name, &wanted).await.expect("finished").attr;
                    assert_eq!((made.fileid, made.uid, made.gid), (left.attr.fileid, Some(5), Some(group)), "{what:?}");
                    let inherited = if what == New::Directory { bit } else { 0 };
                    if !matches!(what, New::Symlink(_)) {
                        assert_eq!(made.mode, Some(0o4751 | inherited), "{what:?}");
                    }
                }
                // Of somebody else, and with rights that were not asked for.
                for (j, (uid, gid, mode)) in [(7, 6, 0o751), (5, 7, 0o751), (0, 0, 0o755)].into_iter().enumerate() {
                    if (gid == 7 && bit != 0) || (mode == 0o755 && matches!(what, New::Symlink(_))) {
                        continue;
                    }
                    let name = format!("other-{i}-{j}").into_bytes();
                    tree.create(dir, &name, &NewNode { mode, uid, gid, ..wanted.clone() }).await.expect("create");
                    let refused = doubt.create(dir, &name, &wanted).await.expect_err("not ours");
                    assert!(refused.is(Kind::AlreadyExists), "{refused:?}");
                    let still = rig.origin.backend.lookup(dir, &name).await.expect("lookup").attr;
                    assert_eq!(still.uid, Some(uid), "left alone");
                }
            }
        }
    }

    #[tokio::test]
    async fn an_open_file_without_a_name_goes_on_in_another_process() {
        let rig = rig_with(seconds(15, 60));
        let tree = rig.origin.tree.clone().expect("a tree");
        let (root, file) = (rig.origin.backend.root().await.expect("root"), rig.file().await);
        let open = tree.open(&file.locator, true).await.expect("open");
        tree.remove(&root.locator, b"f", false).await.expect("remove");
        let fd = open.descriptor().expect("a descriptor").try_clone_to_owned().expect("another");
        drop(open);
        let open = tree.reopen(fd, &file.locator).expect("the same file");
        open.resumed();
        let node = open.write(LEN as u64, "end".into()).await.expect("write");
        assert_eq!((node.attr.nlink, node.attr.size, node.locator), (0, LEN as u64 + 3, file.locator));
        assert!(open.read(0..LEN as u64).await.expect("read") == rig.data);
        open.sync(false).await.expect("sync");
        assert_eq!(rig.origin.counters.stats().requests["write"], 1, "under the same policies");
        let other = tree.create(&root.locator, b"copy", &new(New::File)).await.expect("create");
        let other = tree.open(&other.locator, true).await.expect("open");
        match other.copy(&*open, 0..10, 0).await {
            Ok((n, _)) => assert_eq!(n, 10),
            Err(e) => assert!(e.to_string().contains("file systems"), "{e}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_open_file_is_under_the_same_policies() {
        let rig = rig_with(Settings { rates: Rates { bytes: 1 << 20, requests: 0 }, ..seconds(15, 60) });
        let tree = rig.origin.tree.clone().expect("a tree");
        let open = tree.open(&rig.file().await.locator, true).await.expect("open");
        let began = Instant::now();
        rig.script.fail_next(1, Kind::Unavailable);
        rig.script.lose_next(1);
        open.write(0, rig.data.clone().into()).await.expect("write");
        open.sync(false).await.expect("sync");
        assert!(open.read(0..LEN as u64).await.expect("read") == rig.data);
        assert!((8.5..9.9).contains(&began.elapsed().as_secs_f64()), "{:?}", began.elapsed());
        let stats = rig.origin.counters.stats();
        assert_eq!((stats.bytes_sent, stats.bytes, stats.retries), (LEN as u64, LEN as u64, 2), "{stats:?}");
        assert_eq!((stats.requests["write"], stats.requests["sync"]), (3, 1), "{stats:?}");
    }

    #[tokio::test]
    async fn options_that_make_no_sense_are_refused_by_name() {
        for (name, value) in [
            ("timeout", "0"),
            ("deadline", "soon"),
            ("bandwidth", "fast"),
            ("connections", "0"),
            ("mount_port", "70000"),
            ("fault", "error=2"),
            ("fault", "earthquake"),
        ] {
            let options = [(name.to_string(), value.to_string())].into();
            let spec = SourceSpec::parse("nfs://127.0.0.1/x", options, SecretRef::Anonymous).expect("a source");
            let e = connect(&spec, None).await.err().expect("refused");
            assert!(e.is(Kind::Invalid) && e.to_string().contains(name), "{name}={value}: {e}");
        }
    }
}
