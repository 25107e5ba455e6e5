//! Everything that [`Objects`] promises, over every object store: our own OSS server (signatures V1 and V4 verified), its S3 dialect, SeaweedFS and moto;
//! each plain, and our own behind injected faults (calls that fail, changes whose answer is lost). What the stores differ in is chosen by the declared limits.
//! What was written is read back from behind: by the server's own memory, or over another client. Single points stand in `object_change.rs`.

use bytes::Bytes;
use efc_backend::connect::{Connected, connect_counted};
use efc_backend::object::copy_by_parts;
use efc_backend::objects::{Body, Condition, DynObjects, Metadata, ObjectLimits};
use efc_common::node::{FileKind, Node, Time};
use efc_common::source::{Secret, SecretRef, SourceSpec, StaticKeys};
use efc_common::{Error, Kind};
use efc_testkit::http::Connection;
use efc_testkit::target::object_path;
use efc_testkit::{Moto, OssOptions, OssServer, S3Target, Weed};
use futures::TryStreamExt;
use std::collections::BTreeMap;

/// A store seen by somebody else.
trait View: Sync {
    fn get(&self, key: &[u8]) -> Option<Vec<u8>>;
    /// Headers of HEAD, names in lower case.
    fn headers(&self, key: &[u8]) -> BTreeMap<String, String>;
    fn put(&self, key: &[u8], body: &[u8]);
}

impl View for OssServer {
    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.get("bucket", key).map(|b| b.to_vec())
    }

    fn headers(&self, key: &[u8]) -> BTreeMap<String, String> {
        self.headers("bucket", key).expect("an object")
    }

    fn put(&self, key: &[u8], body: &[u8]) {
        self.put("bucket", key, body.to_vec());
    }
}

impl View for S3Target {
    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        let answer = self.request("GET", &object_path("bucket", key), b"").expect("an answer");
        (answer.status != 404).then(|| answer.ok().expect("an object").body)
    }

    fn headers(&self, key: &[u8]) -> BTreeMap<String, String> {
        let mut connection = Connection::open(self.authority()).expect("connect");
        let answer = self.request_on(&mut connection, "HEAD", &object_path("bucket", key), &[], b"");
        answer.expect("an answer").ok().expect("an object").headers.into_iter().collect()
    }

    fn put(&self, key: &[u8], body: &[u8]) {
        S3Target::put(self, "bucket", key, body).expect("put");
    }
}

/// How a server falls short of the protocol, as far as we cannot find out ourselves.
#[derive(Clone, Copy, Default)]
struct Quirks {
    /// Prefix of user metadata in the server's headers.
    meta: &'static str,
    /// Keys are text, and no control characters in it.
    no_control_bytes: bool,
    /// A part for an upload that is gone is answered with an internal error.
    breaks_on_lost_uploads: bool,
    /// Directory markers keep no user metadata.
    bare_markers: bool,
}

struct Rig<'a> {
    origin: Connected,
    objects: DynObjects,
    limits: ObjectLimits,
    view: &'a dyn View,
    quirks: Quirks,
}

fn content(seed: u64, len: usize) -> Vec<u8> {
    efc_backend::suite::content(seed, len)
}

fn cut(data: &[u8], at: &[usize]) -> Body {
    let mut out = Vec::new();
    let mut start = 0;
    for end in at.iter().copied().chain([data.len()]) {
        out.push(Bytes::copy_from_slice(&data[start..end]));
        start = end;
    }
    out
}

fn whole(data: &[u8]) -> Body {
    cut(data, &[])
}

fn metadata() -> Metadata {
    Metadata {
        mode: Some(0o100_640),
        uid: Some(1000),
        gid: Some(100),
        mtime: Some(Time { secs: 1_700_000_001, nanos: 250_000_000 }),
        atime: Some(Time { secs: 1_700_000_002, nanos: 0 }),
        ctime: None,
        content_type: Some("text/x-efc".into()),
        other: [("author".to_string(), "efc  suite".to_string())].into(),
        headers: BTreeMap::new(),
    }
}

fn assert_kind<T: std::fmt::Debug>(answer: Result<T, Error>, kind: Kind) {
    match answer {
        Err(e) if e.is(kind) => {}
        other => panic!("expected {kind:?}, got {other:?}"),
    }
}

impl Rig<'_> {
    fn file(&self, dir: &str, name: &str) -> Bytes {
        let dir = Bytes::from(format!("{dir}/"));
        self.objects.child(&dir, name.as_bytes(), false).expect("a name")
    }

    async fn put(&self, locator: &Bytes, data: &[u8]) -> Node {
        self.objects.put(locator, whole(data), &Metadata::default(), &Condition::Any).await.expect("put")
    }

    async fn read(&self, node: &Node) -> Vec<u8> {
        let stream = self.origin.backend.read(&node.locator, &node.version, 0..node.attr.size).await.expect("read");
        stream.try_collect::<Vec<Bytes>>().await.expect("read").concat()
    }

    /// What a change returned is what everybody sees afterwards, bytes and version.
    async fn assert_written(&self, node: &Node, data: &[u8]) {
        let key = &node.locator[..];
        let shown = key.escape_ascii();
        assert_eq!(node.attr.size, data.len() as u64, "{shown}");
        assert!(self.view.get(key).as_deref() == Some(data), "{shown}: other bytes at the store");
        let (head, _) = self.objects.head(&node.locator).await.expect("head");
        assert_eq!((&head.version, head.attr.size), (&node.version, node.attr.size), "{shown}: version of HEAD");
        assert!((head.attr.mtime.secs - node.attr.mtime.secs).abs() <= 2, "{shown}: {head:?} {node:?}");
        let (dir, name) = key.split_at(key.iter().rposition(|b| *b == b'/').expect("a directory") + 1);
        let found = self.origin.backend.lookup(&Bytes::copy_from_slice(dir), name).await.expect("lookup");
        assert_eq!(found.version, node.version, "{shown}: version of LIST");
        assert!(self.read(node).await == data, "{shown}: read under its version");
    }

    async fn whole_objects(&self) {
        for (i, (len, at)) in
            [(0, &[][..]), (0, &[0, 0]), (1, &[]), (300_000, &[1, 1, 65_537]), (6_000_001, &[4096, 4_200_000])]
                .into_iter()
                .enumerate()
        {
            let data = content(i as u64, len);
            let locator = self.file("whole", &format!("f{i} +&ü"));
            let node = self.objects.put(&locator, cut(&data, at), &metadata(), &Condition::Any).await.expect("put");
            assert_eq!(node.locator, locator);
            self.assert_written(&node, &data).await;
            let (_, kept) = self.objects.head(&locator).await.expect("head");
            assert_eq!(kept.mode, Some(0o100_640));
            assert_eq!((kept.uid, kept.gid), (Some(1000), Some(100)));
            assert_eq!((kept.mtime, kept.atime, kept.ctime), (metadata().mtime, metadata().atime, None));
            assert_eq!(kept.content_type.as_deref(), Some("text/x-efc"));
            assert_eq!(kept.other.keys().collect::<Vec<_>>(), ["author"]);
        }
        let headers = self.view.headers("whole/f0 +&ü".as_bytes());
        let meta = |name: &str| headers.get(&format!("{}{name}", self.quirks.meta)).map(String::as_str);
        assert_eq!((meta("mode"), meta("uid")), (Some("33184"), Some("1000")), "{headers:?}");
        assert_eq!((meta("mtime"), meta("atime")), (Some("1700000001.250000000"), Some("1700000002")));
        assert_eq!(meta("ctime"), None);
        // Another content gives another version, the same one the same.
        let locator = self.file("whole", "again");
        let first = self.put(&locator, b"one").await;
        let second = self.put(&locator, b"two").await;
        assert_ne!(first.version, second.version);
        self.assert_written(&second, b"two").await;
        assert_kind(self.objects.head(&self.file("whole", "none")).await, Kind::NotFound);
    }

    async fn directory_markers(&self) {
        let dir = self.objects.child(&Bytes::from_static(b"marks/"), b"sub", true).expect("a name");
        let kept = Metadata { mode: Some(0o40_750), ..Metadata::default() };
        let node = self.objects.put(&dir, Vec::new(), &kept, &Condition::Any).await.expect("put");
        assert_eq!((node.attr.kind, &node.locator), (FileKind::Directory, &dir));
        assert_eq!(self.view.headers(b"marks/sub/")["content-type"], "application/x-directory");
        let (head, found) = self.objects.head(&dir).await.expect("head");
        assert_eq!(head.attr.kind, FileKind::Directory);
        assert_eq!(found.mode, (!self.quirks.bare_markers).then_some(0o40_750));
        let page = self.origin.backend.list(&Bytes::from_static(b"marks/"), None).await.expect("list");
        assert_eq!(page.entries.iter().map(|e| &e.name[..]).collect::<Vec<_>>(), [b"sub"]);
        assert_eq!(self.objects.delete(&[dir]).await.expect("delete").len(), 0);
    }

    async fn conditions(&self) {
        let any = Metadata::default();
        let locator = self.file("if", "f");
        let put = |data: &'static [u8], c: Condition| {
            let (objects, locator, any) = (&self.objects, &locator, &any);
            async move { objects.put(locator, whole(data), any, &c).await }
        };
        let first = put(b"first", Condition::Absent).await.expect("nothing was there");
        assert_kind(put(b"late", Condition::Absent).await, Kind::Conflict);
        self.assert_written(&first, b"first").await;
        let second = put(b"second", Condition::Version(first.version.clone())).await.expect("the known version");
        assert_kind(put(b"late", Condition::Version(first.version.clone())).await, Kind::Conflict);
        self.assert_written(&second, b"second").await;
        self.objects.delete(std::slice::from_ref(&locator)).await.expect("delete");
        assert_kind(put(b"late", Condition::Version(second.version)).await, Kind::Conflict);
        assert_eq!(self.view.get(b"if/f"), None);
        let (_, kept) =
            self.objects.head(&put(b"x", Condition::Absent).await.expect("put").locator).await.expect("head");
        assert!(kept.other.is_empty(), "marks are not shown: {kept:?}");
        if self.limits.conditional {
            let race = self.file("if", "race");
            let runners = (0..8u8).map(|i| self.objects.put(&race, whole(&[i]), &any, &Condition::Absent));
            let outcomes = futures::future::join_all(runners).await;
            let won: Vec<usize> = (0..8).filter(|i| outcomes[*i].is_ok()).collect();
            assert_eq!(won.len(), 1, "{outcomes:?}");
            assert_eq!(self.view.get(b"if/race"), Some(vec![won[0] as u8]));
            assert!(outcomes.iter().filter_map(|o| o.as_ref().err()).all(|e| e.is(Kind::Conflict)), "{outcomes:?}");
        }
    }

    async fn uploads(&self) {
        let min = self.limits.part_bytes_min as usize;
        let (one, two, three) = (content(1, min), content(2, min + 1), content(3, 1000));
        let source = self.put(&self.file("parts", "source"), &content(9, min + 5000)).await;
        let locator = self.file("parts", "f");
        let id = self.objects.begin(&locator, &metadata()).await.expect("begin");
        let second = self.objects.part(&locator, &id, 2, cut(&two, &[17, 70_000])).await.expect("part 2");
        self.objects.part(&locator, &id, 1, whole(&two)).await.expect("part 1, wrong");
        let first = self.objects.part(&locator, &id, 1, whole(&one)).await.expect("part 1");
        let mut parts = vec![first, second];
        let mut data = [&one[..], &two].concat();
        if self.limits.compose {
            let from = (&source.locator, &source.version);
            let range = 4000..(min as u64 + 4500);
            parts.push(self.objects.part_copy(&locator, &id, 3, from, range).await.expect("part 3"));
            data.extend_from_slice(&content(9, min + 5000)[4000..min + 4500]);
        }
        parts.push(self.objects.part(&locator, &id, 4, whole(&three)).await.expect("part 4"));
        data.extend_from_slice(&three);
        let open = self.objects.open_uploads().await.expect("uploads");
        assert!(open.iter().any(|u| u.locator == locator && u.id == id && u.begun.secs > 1_000_000_000), "{open:?}");
        assert_eq!(self.view.get(b"parts/f"), None, "invisible until it is complete");
        let node = self.objects.complete(&locator, &id, &parts, &Condition::Absent).await.expect("complete");
        self.assert_written(&node, &data).await;
        let (_, kept) = self.objects.head(&locator).await.expect("head");
        assert_eq!((kept.mode, kept.other.len()), (Some(0o100_640), 1), "{kept:?}");
        // A lost race, and an upload that is given up.
        let id = self.objects.begin(&locator, &Metadata::default()).await.expect("begin");
        let part = self.objects.part(&locator, &id, 1, whole(b"late")).await.expect("part");
        let parts = [part];
        assert_kind(self.objects.complete(&locator, &id, &parts, &Condition::Absent).await, Kind::Conflict);
        let stale = Condition::Version(source.version.clone());
        assert_kind(self.objects.complete(&locator, &id, &parts, &stale).await, Kind::Conflict);
        self.assert_written(&node, &data).await;
        for _ in 0..2 {
            self.objects.abort(&locator, &id).await.expect("abort");
        }
        let open = self.objects.open_uploads().await.expect("uploads");
        assert!(!open.iter().any(|u| u.id == id), "{open:?}");
        if !self.quirks.breaks_on_lost_uploads {
            assert_kind(self.objects.part(&locator, &id, 1, whole(b"x")).await, Kind::NotFound);
        }
        let id = self.objects.begin(&locator, &Metadata::default()).await.expect("begin");
        let part = self.objects.part(&locator, &id, 1, whole(b"next")).await.expect("part");
        let known = Condition::Version(node.version);
        let node = self.objects.complete(&locator, &id, &[part], &known).await.expect("the known version");
        self.assert_written(&node, b"next").await;
        self.stale_parts(&source).await;
    }

    async fn stale_parts(&self, source: &Node) {
        self.put(&source.locator, &content(8, source.attr.size as usize)).await;
        let locator = self.file("parts", "stale");
        let id = self.objects.begin(&locator, &Metadata::default()).await.expect("begin");
        let from = (&source.locator, &source.version);
        assert_kind(self.objects.part_copy(&locator, &id, 1, from, 0..10).await, Kind::Stale);
        self.objects.abort(&locator, &id).await.expect("abort");
    }

    async fn appending(&self) {
        let locator = self.file("log", "f");
        let body = |text: &'static [u8]| whole(text);
        if !self.limits.append {
            assert_kind(self.objects.append(&locator, 0, body(b"x"), &metadata()).await, Kind::Unsupported);
            return;
        }
        let node = self.objects.append(&locator, 0, body(b"hello "), &metadata()).await.expect("append");
        self.assert_written(&node, b"hello ").await;
        assert_kind(self.objects.append(&locator, 3, body(b"x"), &metadata()).await, Kind::Conflict);
        assert_kind(self.objects.append(&locator, 0, body(b"x"), &metadata()).await, Kind::Conflict);
        let node = self.objects.append(&locator, 6, body(b"world"), &metadata()).await.expect("append");
        self.assert_written(&node, b"hello world").await;
        let (_, kept) = self.objects.head(&locator).await.expect("head");
        assert_eq!((kept.mode, kept.mtime), (Some(0o100_640), metadata().mtime));
        let put = self.put(&self.file("log", "put"), b"whole").await;
        assert_kind(self.objects.append(&put.locator, 5, body(b"x"), &metadata()).await, Kind::Unsupported);
    }

    async fn copies(&self) {
        let data = content(4, 100_000);
        let source = self.file("copy", "source ü+");
        let node = self.objects.put(&source, whole(&data), &metadata(), &Condition::Any).await.expect("put");
        let from = (&source, &node.version);
        let target = self.file("copy", "target");
        let copied = self.objects.copy(from, &target, None, &Condition::Absent).await.expect("copy");
        self.assert_written(&copied, &data).await;
        let (_, kept) = self.objects.head(&target).await.expect("head");
        assert_eq!((kept.mode, kept.content_type.as_deref()), (Some(0o100_640), Some("text/x-efc")));
        assert_kind(self.objects.copy(from, &target, None, &Condition::Absent).await, Kind::Conflict);
        let other = Metadata { mode: Some(0o100_600), ..Metadata::default() };
        let copied = self.objects.copy(from, &target, Some(&other), &Condition::Version(copied.version)).await;
        self.assert_written(&copied.expect("copy"), &data).await;
        let (_, kept) = self.objects.head(&target).await.expect("head");
        assert_eq!((kept.mode, kept.uid, kept.other.len()), (Some(0o100_600), None, 0));
        // Onto itself: how metadata is changed. Same bytes, same version.
        let changed = self.objects.copy(from, &source, Some(&other), &Condition::Any).await.expect("copy");
        assert_eq!(changed.version, node.version);
        self.assert_written(&changed, &data).await;
        let (_, kept) = self.objects.head(&source).await.expect("head");
        assert_eq!((kept.mode, kept.uid, kept.other.len()), (Some(0o100_600), None, 0));
        self.put(&source, b"changed").await;
        assert_kind(self.objects.copy(from, &target, None, &Condition::Any).await, Kind::Stale);
        self.objects.delete(std::slice::from_ref(&source)).await.expect("delete");
        assert_kind(self.objects.copy(from, &target, None, &Condition::Any).await, Kind::Stale);
    }

    async fn large_copies(&self) {
        let part = self.limits.part_bytes_min;
        let data = content(5, part as usize * 2 + 77);
        let source = self.file("large", "source");
        let node = self.objects.put(&source, whole(&data), &metadata(), &Condition::Any).await.expect("put");
        let target = self.file("large", "target");
        let from = (&source, &node.version);
        let copied = copy_by_parts(&*self.objects, from, &target, None, &Condition::Absent, part).await;
        self.assert_written(&copied.expect("copy"), &data).await;
        let (_, kept) = self.objects.head(&target).await.expect("head");
        assert_eq!((kept.mode, kept.mtime, kept.other.len()), (Some(0o100_640), metadata().mtime, 1));
        let again = copy_by_parts(&*self.objects, from, &target, None, &Condition::Absent, part).await;
        assert_kind(again, Kind::Conflict);
        let open = self.objects.open_uploads().await.expect("uploads");
        assert!(!open.iter().any(|u| u.locator.starts_with(b"large/")) || self.origin.counters.stats().retries > 0);
    }

    async fn deletions(&self) {
        let mut keys: Vec<Vec<u8>> = (0..30).map(|i| format!("gone/{i}&<ü>").into_bytes()).collect();
        keys.extend([&b"gone/ blank "[..], b"gone/m/", b"gone/m/x"].map(<[u8]>::to_vec));
        if !self.quirks.no_control_bytes {
            keys.extend([&b"gone/new\nline"[..], b"gone/\xff\xfe", b"gone/\x01"].map(<[u8]>::to_vec));
        }
        for key in &keys {
            self.view.put(key, if key.ends_with(b"/") { b"" } else { b"x" });
        }
        self.view.put(b"gone-not", b"x");
        let mut locators: Vec<Bytes> = keys.iter().cloned().map(Bytes::from).collect();
        locators.push(Bytes::from_static(b"gone/never was"));
        let failed = self.objects.delete(&locators).await.expect("delete");
        assert!(failed.is_empty(), "{failed:?}");
        for key in &keys {
            assert_eq!(self.view.get(key), None, "{}", key.escape_ascii());
        }
        assert!(self.view.get(b"gone-not").is_some());
        let page = self.objects.keys_below(&Bytes::from_static(b"gone/"), None).await.expect("keys");
        assert!(page.entries.is_empty(), "{page:?}");
    }

    async fn keys(&self) {
        let keys: [&[u8]; 5] = [b"tree/a", b"tree/d/", b"tree/d/b", b"tree/d/e/c", b"tree/z"];
        for key in keys {
            self.view.put(key, if key.ends_with(b"/") { b"" } else { b"1234" });
        }
        let page = self.objects.keys_below(&Bytes::from_static(b"tree/"), None).await.expect("keys");
        let mut found: Vec<Vec<u8>> = Vec::new();
        for e in &page.entries {
            // A marker's locator is that of an object here.
            found.push(e.node.locator.strip_suffix(b"\0").unwrap_or(&e.node.locator).to_vec());
            assert_eq!(e.node.attr.kind, FileKind::File);
        }
        found.sort();
        assert_eq!(found, keys);
        assert!(page.next.is_none() && page.hidden.is_empty());
        let file = page.entries.iter().find(|e| e.node.locator == "tree/d/e/c").expect("c");
        assert_eq!((&file.name[..], self.read(&file.node).await), (&b"c"[..], b"1234".to_vec()));
    }

    async fn run(&self) {
        self.whole_objects().await;
        self.directory_markers().await;
        self.conditions().await;
        self.uploads().await;
        self.appending().await;
        self.copies().await;
        self.large_copies().await;
        self.deletions().await;
        self.keys().await;
        let page = self.objects.keys_below(&Bytes::from_static(b".efc/"), None).await.expect("keys");
        assert!(page.entries.is_empty(), "trials of conditions are removed: {page:?}");
    }
}

async fn run(url: &str, options: &[(&str, &str)], view: &dyn View, quirks: Quirks, faults: bool) -> ObjectLimits {
    let mut options: BTreeMap<String, String> = options.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    if faults {
        options.insert("fault".into(), "error=0.1,short=0.05,reset=0.15,seed=21".into());
    }
    let spec = SourceSpec::parse(url, options, SecretRef::Keys).expect("a source");
    let keys = StaticKeys { id: "efckey".into(), secret: Secret::new("efcsecret"), token: Secret::default() };
    let origin = connect_counted(&spec, Some(&keys)).await.expect("connect");
    let objects = origin.objects.clone().expect("an object store can be changed");
    let limits = objects.limits().await.expect("limits");
    let rig = Rig { origin, objects, limits, view, quirks };
    rig.run().await;
    let stats = rig.origin.counters.stats();
    assert_eq!(faults, stats.retries > 20, "{stats:?}");
    assert!(stats.bytes_sent > 10 << 10 && stats.requests["put"] > 20, "{stats:?}");
    limits
}

/// A server of ours has a runtime, which it must not make inside of ours.
fn start(options: OssOptions) -> OssServer {
    let server = std::thread::spawn(|| OssServer::start_with(options)).join().expect("a thread");
    let server = server.expect("a server");
    server.create_bucket("bucket");
    server
}

async fn oss(sig: &str, faults: bool) {
    let server = start(OssOptions::default());
    let options = [("endpoint", server.endpoint()), ("region", "cn-hangzhou".into()), ("sig", sig.into())];
    let options: Vec<(&str, &str)> = options.iter().map(|(k, v)| (*k, v.as_str())).collect();
    let quirks = Quirks { meta: "x-oss-meta-", ..Quirks::default() };
    let limits = run("oss://bucket/", &options, &server, quirks, faults).await;
    assert_eq!((limits.append, limits.conditional, limits.conditional_version), (true, true, false));
}

async fn s3(payload_hash: &str, faults: bool) {
    let server = start(OssOptions::s3());
    let options = [("endpoint", server.endpoint()), ("payload_hash", payload_hash.to_string())];
    let options: Vec<(&str, &str)> = options.iter().map(|(k, v)| (*k, v.as_str())).collect();
    let quirks = Quirks { meta: "x-amz-meta-", ..Quirks::default() };
    let limits = run("s3://bucket/", &options, &server, quirks, faults).await;
    assert_eq!((limits.append, limits.conditional, limits.conditional_version), (false, true, true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn oss_v4() {
    oss("v4", false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn oss_v1() {
    oss("v1", false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn oss_with_faults() {
    oss("v4", true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s3_with_signed_payload() {
    s3("true", false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s3_with_unsigned_payload_and_faults() {
    s3("false", true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn seaweedfs() {
    let server = Weed::start().expect("weed");
    let target = server.target();
    target.create_bucket("bucket").expect("bucket");
    let endpoint = target.endpoint.clone();
    let quirks = Quirks { meta: "x-amz-meta-", no_control_bytes: true, bare_markers: true, ..Quirks::default() };
    let limits =
        run("s3://bucket/", &[("endpoint", &endpoint), ("payload_hash", "false")], &target, quirks, false).await;
    assert!(limits.conditional && limits.conditional_version && limits.compose, "{limits:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn moto() {
    let server = Moto::start().expect("moto");
    let target = server.target();
    target.create_bucket("bucket").expect("bucket");
    let endpoint = target.endpoint.clone();
    let quirks =
        Quirks { meta: "x-amz-meta-", no_control_bytes: true, breaks_on_lost_uploads: true, ..Quirks::default() };
    let limits = run("s3://bucket/", &[("endpoint", &endpoint)], &target, quirks, false).await;
    // It looks at `If-Match` in PUT only, and not at all at the version of what is copied.
    assert!(limits.conditional && !limits.conditional_version && !limits.compose, "{limits:?}");
}
