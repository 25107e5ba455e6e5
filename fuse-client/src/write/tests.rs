//! The tree over our own S3 and OSS.

use super::*;
use crate::journal::{self, Journal};
use bytes::Bytes;
use efc_backend::Backend;
use efc_backend::connect::connect_counted;
use efc_backend::tree::Allocate;
use efc_common::source::{Secret, SecretRef, SourceSpec, StaticKeys};
use efc_testkit::{Action, Fault, OssOptions, OssServer};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::fs::File;

const TTL: Duration = Duration::from_secs(60);

struct Rig {
    server: OssServer,
    tree: ObjectTree,
    root: Bytes,
    s3: bool,
    /// For what is staged, in memory and on disk.
    room: (u64, u64),
    dir: tempfile::TempDir,
}

/// A mount process, and who keeps what its successor needs.
struct Process {
    tree: ObjectTree,
    holder: Holder,
}

#[derive(Clone, Default)]
struct Holder {
    nodes: Arc<Mutex<Option<File>>>,
    staged: Arc<Mutex<HashMap<u64, OwnedFd>>>,
}

impl Holder {
    fn serve(&self, tree: &ObjectTree, before: &state::Checkpoint) {
        let staged = self.staged.lock().iter().map(|(n, fd)| (*n, fd.try_clone().expect("fd"))).collect();
        let nodes = self.nodes.clone();
        let keep = move |fd: BorrowedFd<'_>| {
            *nodes.lock() = Some(fd.try_clone_to_owned()?.into());
            Ok(())
        };
        let held = self.staged.clone();
        let keep_file = move |number, fd: Option<BorrowedFd<'_>>| {
            match fd {
                Some(fd) => drop(held.lock().insert(number, fd.try_clone_to_owned()?)),
                None => drop(held.lock().remove(&number)),
            }
            Ok(())
        };
        let journal = Arc::new(Journal::new(before, Box::new(keep)).expect("journal"));
        tree.keep(Arc::new(Kept::new(journal, Box::new(keep_file))), &before.drafts, staged);
    }

    fn said(&self) -> state::Checkpoint {
        journal::read(self.nodes.lock().as_ref().expect("kept")).expect("read")
    }
}

impl Process {
    async fn first(rig: &Rig) -> Process {
        let (holder, tree) = (Holder::default(), rig.tree(rig.space()).await);
        holder.serve(&tree, &state::Checkpoint { format: 2, ..Default::default() });
        Process { tree, holder }
    }

    /// It dies; another has what it wrote down, as after an answer.
    async fn die(self, rig: &Rig, files: Vec<Arc<dyn OpenFile>>) -> Process {
        self.tree.core.space.kept().expect("kept").commit();
        let state = self.holder.said();
        let next = self.succeed(rig, &state).await;
        // The dead do not clear up.
        std::mem::forget((self, files));
        next
    }

    async fn succeed(&self, rig: &Rig, state: &state::Checkpoint) -> Process {
        let used = state.drafts.iter().filter_map(|d| d.slot).collect();
        let memory = File::from(self.tree.staging().try_clone_to_owned().expect("fd"));
        let space = Space::inherited(rig.dir.path().into(), rig.room.0, rig.room.1, memory, &used).expect("space");
        let (holder, tree) = (self.holder.clone(), rig.tree(space).await);
        holder.serve(&tree, state);
        Process { tree, holder }
    }

    async fn open_again(&self, number: u64, locator: &Bytes) -> Arc<dyn OpenFile> {
        let file = match self.tree.resume(number) {
            Some(file) => file,
            None => self.tree.open(locator, true).await.expect("open"),
        };
        self.tree.resumed(false).await;
        file
    }
}

async fn rig(s3: bool) -> Rig {
    rig_with(s3, 1 << 20, 1 << 30).await
}

/// With so much room for what is staged, in memory and on disk.
async fn rig_with(s3: bool, memory: u64, disk: u64) -> Rig {
    let options = if s3 { OssOptions::s3() } else { OssOptions::default() };
    let region = options.region.clone();
    // It has a runtime of its own, which is not made inside another.
    let started = std::thread::spawn(|| OssServer::start_with(options).expect("server"));
    let server = started.join().expect("started");
    server.create_bucket("b");
    let dir = tempfile::tempdir().expect("dir");
    let space = Space::new(dir.path().join("staging"), memory, disk).expect("space");
    let tree = tree(&server, s3, &region, space).await;
    let root = tree.core.root.clone();
    Rig { server, tree, root, s3, room: (memory, disk), dir }
}

async fn tree(server: &OssServer, s3: bool, region: &str, space: Arc<Space>) -> ObjectTree {
    let options = [("endpoint", server.endpoint()), ("region", region.to_string()), ("deadline", "5s".into())];
    let options = options.into_iter().map(|(k, v)| (k.to_string(), v)).collect();
    let url = if s3 { "s3://b/m" } else { "oss://b/m" };
    let spec = SourceSpec::parse(url, options, SecretRef::Keys).expect("source");
    let keys = StaticKeys { id: "efckey".into(), secret: Secret::new("efcsecret"), token: Secret::new("") };
    let origin = connect_counted(&spec, Some(&keys)).await.expect("origin");
    let root = origin.backend.root().await.expect("root").locator;
    ObjectTree::new((origin.objects.expect("objects"), origin.backend), root, space, TTL, None, rand::random())
}

fn new(what: New) -> NewNode {
    NewNode { what, mode: 0o644, uid: 1, gid: 2 }
}

impl Rig {
    fn space(&self) -> Arc<Space> {
        Space::new(self.dir.path().join("staging"), self.room.0, self.room.1).expect("space")
    }

    async fn tree(&self, space: Arc<Space>) -> ObjectTree {
        let region = if self.s3 { OssOptions::s3().region } else { OssOptions::default().region };
        tree(&self.server, self.s3, &region, space).await
    }

    async fn make(&self, name: &str, content: &[u8]) -> Arc<dyn OpenFile> {
        self.make_in(&self.tree, name, content).await
    }

    async fn make_in(&self, tree: &ObjectTree, name: &str, content: &[u8]) -> Arc<dyn OpenFile> {
        let node = tree.create(&self.root, name.as_bytes(), &new(New::File)).await.expect("create");
        let file = tree.open(&node.locator, true).await.expect("open");
        if !content.is_empty() {
            file.write(0, Bytes::copy_from_slice(content)).await.expect("write");
        }
        file
    }

    fn behind(&self, name: &str) -> Option<Bytes> {
        self.server.get("b", format!("m/{name}"))
    }
}

#[derive(Debug, Clone)]
enum Op {
    Write(u64, usize, u8),
    Append(usize, u8),
    Truncate(u64),
    Zero(u64, u64),
    Read(u64, u64),
    Sync,
    Reopen,
    Die,
}

fn op() -> impl Strategy<Value = Op> {
    // Places around the borders: of memory (1 MiB), of one PUT (16 MiB), of parts (8 MiB).
    let at = prop_oneof![
        0u64..3000,
        (1u64 << 20) - 900..(1 << 20) + 900,
        (8u64 << 20) - 900..(8 << 20) + 900,
        (16u64 << 20) - 900..(16 << 20) + 900,
        0u64..26 << 20
    ];
    prop_oneof![
        4 => (at.clone(), 1usize..5000, any::<u8>()).prop_map(|(at, n, b)| Op::Write(at, n, b)),
        2 => (1usize..9 << 20, any::<u8>()).prop_map(|(n, b)| Op::Append(n, b)),
        2 => at.clone().prop_map(Op::Truncate),
        1 => (at.clone(), 1u64..100_000).prop_map(|(at, n)| Op::Zero(at, n)),
        3 => (at, 1u64..2 << 20).prop_map(|(at, n)| Op::Read(at, n)),
        2 => Just(Op::Sync),
        1 => Just(Op::Reopen),
        2 => Just(Op::Die),
    ]
}

async fn run(rig: &Rig, name: &str, ops: Vec<Op>) -> std::result::Result<(), TestCaseError> {
    let mut process = Process::first(rig).await;
    let mut file = rig.make_in(&process.tree, name, b"").await;
    let mut model: Vec<u8> = Vec::new();
    for op in ops {
        match op {
            Op::Write(at, n, byte) => {
                let end = at as usize + n;
                model.resize(model.len().max(end), 0);
                model[at as usize..end].fill(byte);
                file.write(at, vec![byte; n].into()).await.expect("write");
            }
            Op::Append(n, byte) => {
                let n = n.min((28 << 20) - model.len().min(28 << 20));
                for _ in 0..n.div_ceil(1 << 20) {
                    let piece = vec![byte; n.min(1 << 20)];
                    file.write(model.len() as u64, piece.clone().into()).await.expect("append");
                    model.extend(piece);
                }
            }
            Op::Truncate(size) => {
                model.resize(size as usize, 0);
                file.set_attr(&Change { size: Some(size), ..Change::default() }).await.expect("truncate");
            }
            Op::Zero(at, n) => {
                let end = (at + n) as usize;
                model.resize(model.len().max(end), 0);
                model[at as usize..end].fill(0);
                file.allocate(at..at + n, Allocate::Zero { keep_size: false }).await.expect("zero");
            }
            Op::Read(at, n) => {
                let end = ((at + n) as usize).min(model.len());
                let got = file.read(at..at + n).await.expect("read");
                prop_assert!(got == *model.get(at as usize..end).unwrap_or(&[]), "{at} {n}");
            }
            Op::Sync => {
                let node = file.sync(false).await.expect("sync");
                prop_assert_eq!(node.attr.size, model.len() as u64);
                prop_assert!(rig.behind(name).is_some_and(|b| b == model), "behind");
            }
            Op::Reopen => {
                file.close().await.expect("close");
                let locator = rig.tree.child(&rig.root, name.as_bytes()).expect("child");
                drop(file);
                prop_assert!(process.tree.core.file(&locator).is_none(), "a clean file that is closed is forgotten");
                prop_assert_eq!(process.tree.checkpoint().len(), 0);
                prop_assert_eq!(process.holder.staged.lock().len(), 0);
                file = process.tree.open(&locator, true).await.expect("open");
            }
            Op::Die => {
                let (number, locator) = (file.number(), file.attr().await.expect("attr").locator);
                process = process.die(rig, vec![file]).await;
                file = process.open_again(number, &locator).await;
            }
        }
        prop_assert_eq!(file.attr().await.expect("attr").attr.size, model.len() as u64);
    }
    file.close().await.expect("close");
    prop_assert!(rig.behind(name).is_some_and(|b| b == model), "behind at the end");
    Ok(())
}

#[test]
fn files_are_what_a_vector_is() {
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    // With little memory; with enough of it to keep what was written last; with so little room on disk that files go to the store before they are closed.
    for (s3, memory, disk) in [(true, 1 << 20, 1 << 30), (false, 64 << 20, 1 << 30), (true, 64 << 20, 6 << 20)] {
        let rig = runtime.block_on(rig_with(s3, memory, disk));
        let mut runner = TestRunner::new(Config::with_cases(30));
        let outcome = runner.run(&vec(op(), 1..20), |ops| {
            let name = format!("f{:x}", rand::random::<u64>());
            runtime.block_on(run(&rig, &name, ops))
        });
        outcome.expect("as the model says");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_dead_had_brought_to_the_store_is_not_taken_for_somebody_elses() {
    for len in [1000usize, 20 << 20] {
        let rig = rig(true).await;
        let process = Process::first(&rig).await;
        let file = rig.make_in(&process.tree, "f", &vec![7; len]).await;
        file.sync(false).await.expect("an object");
        file.write(0, Bytes::from(vec![8; len])).await.expect("write");
        // The store does it and does not say so; the process is gone when it asks again.
        for what in ["put", "complete"] {
            rig.server.fault(Fault::on(what, Action::Drop).times(1));
            rig.server.fault(Fault::on(what, Action::Latency { ms: 600_000 }).after(1));
        }
        assert!(tokio::time::timeout(Duration::from_secs(2), file.sync(false)).await.is_err());
        rig.server.clear_faults();
        assert!(rig.behind("f").is_some_and(|b| b == vec![8; len]));
        let state = process.holder.said();
        assert_eq!(state.drafts[0].attempts.len(), 1, "{:?}", state.drafts);
        let next = process.succeed(&rig, &state).await;
        let again = next.open_again(file.number(), &Bytes::new()).await;
        again.write(1, Bytes::from_static(b"x")).await.expect("write");
        again.sync(false).await.expect("no conflict");
        std::mem::forget((process, file));
        let now = rig.behind("f").expect("there");
        assert!(now.len() == len && now[0] == 8 && now[1] == b'x' && now[2..].iter().all(|b| *b == 8));
        assert!(!rig.server.keys("b").iter().any(|k| k.windows(8).any(|w| w == b"conflict")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_the_dead_were_making_is_found_by_who_makes_it_again() {
    let rig = rig(true).await;
    let process = Process::first(&rig).await;
    let (root, file) = (rig.root.clone(), new(New::File));
    process.tree.create(&root, b"f", &file).await.expect("create");
    let next = process.die(&rig, Vec::new()).await;
    next.tree.resumed(true).await;
    assert_eq!(rig.behind("f").expect("brought to the store before others may come"), "");
    next.tree.forget(&root, None).await;
    let again = next.tree.in_doubt().expect("a tree");
    let node = again.create(&root, b"f", &file).await.expect("it is the one");
    let open = next.tree.open(&node.locator, true).await.expect("open");
    open.write(0, Bytes::from_static(b"content")).await.expect("write");
    open.close().await.expect("no conflict");
    assert_eq!(rig.behind("f").expect("there"), "content");
    next.tree.forget(&root, None).await;
    let taken = again.create(&root, b"f", &file).await.expect_err("it is not the one that was being made");
    assert!(taken.is(Kind::AlreadyExists), "{taken}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_fails_keeps_everything_for_the_next() {
    for len in [1000usize, 20 << 20] {
        let rig = rig(true).await;
        let file = rig.make("f", &vec![7; len]).await;
        rig.server.fault(Fault::on("put", Action::Status { status: 403, code: "AccessDenied".into() }));
        rig.server.fault(Fault::on("complete", Action::Status { status: 403, code: "AccessDenied".into() }));
        assert!(file.close().await.is_err());
        drop(file);
        let locator = rig.tree.child(&rig.root, b"f").expect("child");
        let node = rig.tree.getattr(&locator).await.expect("it is here");
        assert_eq!(node.attr.size, len as u64);
        let file = rig.tree.open(&locator, true).await.expect("open again");
        assert!(file.sync(false).await.is_err() && rig.behind("f").is_none());
        rig.server.clear_faults();
        file.sync(false).await.expect("now");
        assert!(rig.behind("f").is_some_and(|b| b == vec![7; len]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_seen_before_the_store_has_them_and_go_with_their_drafts() {
    let rig = rig(true).await;
    let asked = Instant::now();
    let file = rig.make("new", b"x").await;
    let seen = rig.tree.find_overlay(&rig.root, b"new", Instant::now()).flatten().expect("seen");
    assert_eq!((seen.attr.size, seen.attr.mode, seen.attr.uid), (1, Some(0o644), Some(1)));
    assert!(rig.tree.create(&rig.root, b"new", &new(New::File)).await.is_err_and(|e| e.is(Kind::AlreadyExists)));
    rig.tree.rename((&rig.root, b"new"), (&rig.root, b"other"), RenameMode::Replace).await.expect("rename");
    assert_eq!(rig.tree.find_overlay(&rig.root, b"new", asked), Some(None));
    file.close().await.expect("close");
    assert!(rig.behind("other").is_some() && rig.behind("new").is_none());
    rig.tree.remove(&rig.root, b"other", false).await.expect("remove");
    assert_eq!(rig.tree.find_overlay(&rig.root, b"other", asked), Some(None));
    assert_eq!(rig.tree.find_overlay(&rig.root, b"other", Instant::now()), None, "a listing made now is right");
    assert_eq!(&file.read(0..10).await.expect("held")[..], b"x");
    // A directory that is only a prefix outlives its last file.
    rig.server.put("b", "m/p/only", "x");
    let prefix = rig.tree.lookup(&rig.root, b"p").await.expect("p").locator;
    rig.tree.remove(&prefix, b"only", false).await.expect("remove");
    assert_eq!(rig.server.keys("b").last().map(Vec::as_slice), Some(&b"m/p/"[..]));
    rig.tree.remove(&rig.root, b"p", true).await.expect("rmdir");
    assert!(rig.tree.getattr(&prefix).await.is_err_and(|e| e.is(Kind::NotFound)));
    let draft = rig.make("draft", b"never committed").await;
    rig.tree.remove(&rig.root, b"draft", false).await.expect("remove");
    draft.close().await.expect("nothing to do");
    assert!(rig.behind("draft").is_none());
    // A file that is still open, and that others have removed, does not keep its name.
    let kept = rig.make("kept", b"x").await;
    kept.close().await.expect("close");
    assert!(rig.tree.create(&rig.root, b"kept", &new(New::File)).await.is_err_and(|e| e.is(Kind::AlreadyExists)));
    rig.server.remove("b", "m/kept");
    rig.make("kept", b"y").await.close().await.expect("made again");
    assert_eq!(&rig.behind("kept").expect("there")[..], b"y");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_moves_with_everything_below() {
    for s3 in [true, false] {
        let rig = rig(s3).await;
        let (tree, root) = (&rig.tree, &rig.root);
        let d = tree.create(root, b"d", &new(New::Directory)).await.expect("mkdir").locator;
        let e = tree.create(&d, b"e", &new(New::Directory)).await.expect("mkdir").locator;
        for i in 0..40 {
            rig.server.put("b", format!("m/d/e/{i}"), format!("{i}"));
        }
        let made = tree.create(&e, b"draft", &new(New::File)).await.expect("create");
        let file = tree.open(&made.locator, true).await.expect("open");
        file.write(0, Bytes::from_static(b"draft")).await.expect("write");
        let below = tree.rename((root, b"d"), (&d, b"x"), RenameMode::Replace).await.expect_err("below itself");
        assert!(below.is(Kind::Invalid), "{below}");
        tree.create(root, b"full", &new(New::Directory)).await.expect("mkdir");
        rig.server.put("b", "m/full/x", "x");
        let full = tree.rename((root, b"d"), (root, b"full"), RenameMode::Replace).await.expect_err("not empty");
        assert!(full.is(Kind::NotEmpty), "{full}");
        tree.create(root, b"g", &new(New::Directory)).await.expect("mkdir");
        tree.rename((root, b"d"), (root, b"g"), RenameMode::Replace).await.expect("over an empty one");
        let keys: Vec<String> = rig.server.keys("b").into_iter().map(|k| String::from_utf8(k).expect("text")).collect();
        assert!(keys.iter().all(|k| !k.starts_with("m/d/") && !k.starts_with("m/.efc/")), "{keys:?}");
        assert_eq!(keys.iter().filter(|k| k.starts_with("m/g/")).count(), 43, "{keys:?}");
        assert_eq!(rig.behind("g/e/draft").expect("draft")[..], b"draft"[..]);
        file.write(5, Bytes::from_static(b"!")).await.expect("goes on");
        file.close().await.expect("close");
        assert_eq!(rig.behind("g/e/draft").expect("draft")[..], b"draft!"[..]);
        assert_eq!(tree.find_overlay(root, b"d", Instant::now() - Duration::from_millis(500)), Some(None));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_of_a_mount_that_died_are_swept_and_those_of_others_are_not() {
    for begun in [true, false] {
        let rig = rig(true).await;
        let key = Bytes::from_static(b"m/big");
        ledger::leave_open(&rig.tree.core, &key, begun).await;
        // Somebody else's, of another key; and one that this mount has open.
        let theirs =
            rig.tree.core.objects.begin(&Bytes::from_static(b"m/theirs"), &Metadata::default()).await.expect("begin");
        let space = Space::new("/nonexistent".into(), 1 << 20, 0).expect("space");
        let next = tree(&rig.server, true, &OssOptions::s3().region, space).await;
        let own = next.core.begin(&Bytes::from_static(b"m/own"), &Metadata::default()).await.expect("begin");
        assert_eq!(next.sweep_uploads(rename::DEAD_AFTER).await.expect("sweep"), 1, "its owner may live");
        assert_eq!(next.core.objects.open_uploads().await.expect("list").len(), 3);
        assert_eq!(next.sweep_uploads(Duration::ZERO).await.expect("sweep"), 0);
        let mut left: Vec<_> =
            next.core.objects.open_uploads().await.expect("list").into_iter().map(|u| u.id).collect();
        let mut wanted = vec![theirs, own.id.clone()];
        left.sort_by(|a, b| a.0.cmp(&b.0));
        wanted.sort_by(|a, b| a.0.cmp(&b.0));
        assert_eq!(left, wanted, "begun: {begun}");
        // The first was only asleep: it finds out, and begins anew.
        rig.tree.core.beat_ledger().await.expect("beat");
        let file = rig.make("big", &vec![7; 30 << 20]).await;
        let open = rig.tree.core.objects.open_uploads().await.expect("list");
        let upload = open.into_iter().find(|u| u.locator == key).expect("it is sent behind the writer").id;
        rig.tree.core.objects.abort(&key, &upload).await.expect("abort");
        file.close().await.expect("sent again");
        assert!(rig.behind("big").is_some_and(|b| b == vec![7; 30 << 20]));
        next.core.ended(&own);
        next.settle_all().await.expect("end");
        rig.tree.settle_all().await.expect("end");
        let journals = rig.server.keys("b").into_iter().filter(|k| k.starts_with(b"m/.efc/")).count();
        assert_eq!(journals, 1, "of the first mount, which does not know that its upload was thrown away");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rename_that_was_cut_short_leaves_the_old_tree_or_the_new_one() {
    for copied in [false, true] {
        let rig = rig(true).await;
        for i in 0..10 {
            rig.server.put("b", format!("m/d/{i}"), format!("{i}"));
        }
        let (source, target) = (Bytes::from_static(b"m/d/"), Bytes::from_static(b"m/g/"));
        rename::cut_short(&rig.tree.core, &source, &target, copied).await;
        rig.server.remove("b", if copied { "m/d/3" } else { "m/g/3" });
        // Somebody else's, made since.
        rig.server.put("b", if copied { "m/d/new" } else { "m/g/new" }, "n");
        assert_eq!(rig.tree.recover_renames(rename::DEAD_AFTER).await.expect("recover"), 1, "it may be under way");
        assert_eq!(rig.tree.recover_renames(Duration::ZERO).await.expect("recover"), 0);
        let (kept, gone) = if copied { ("m/g/", "m/d/") } else { ("m/d/", "m/g/") };
        let mut wanted: Vec<String> = (0..10).map(|i| format!("{kept}{i}")).collect();
        wanted.push(format!("{gone}new"));
        wanted.sort();
        let keys: Vec<String> = rig.server.keys("b").into_iter().map(|k| String::from_utf8(k).expect("text")).collect();
        assert_eq!(keys, wanted);
    }
}
