//! What is special to object stores, on the wire against our own OSS and S3 server: odd keys, names over pages, numbers of requests, errors
//! that a mount shows, and faults in the middle of an answer. No retries here: the backend is the plain one.

use bytes::Bytes;
use efc_backend::object::{self, ObjectBackend};
use efc_backend::{Backend, ListPage};
use efc_common::node::{FileKind, Node};
use efc_common::source::{Secret, SecretRef, SourceSpec, StaticKeys};
use efc_common::{Error, Kind, Result, Retry};
use efc_testkit::{Action, Dialect, Fault, Identity, OssOptions, OssServer};
use futures::TryStreamExt;
use std::collections::BTreeMap;

/// A store with one bucket, and how to sign for it.
struct Store {
    server: OssServer,
    scheme: &'static str,
    sig: &'static str,
    region: String,
}

impl Store {
    fn start(options: OssOptions, sig: &'static str) -> Store {
        let scheme = if options.dialect == Dialect::Oss { "oss" } else { "s3" };
        let region = options.region.clone();
        // The server has a runtime, which it must not make inside of ours.
        let server = std::thread::spawn(|| OssServer::start_with(options)).join().expect("a thread").expect("a server");
        server.create_bucket("bucket");
        Store { server, scheme, sig, region }
    }

    fn oss() -> Store {
        Store::start(OssOptions::default(), "v4")
    }

    fn all() -> [Store; 3] {
        [Store::oss(), Store::start(OssOptions::default(), "v1"), Store::start(OssOptions::s3(), "v4")]
    }

    fn put(&self, key: impl AsRef<[u8]>, body: &str) {
        self.server.put("bucket", key, body.to_string());
    }

    fn spec(&self, path: &str, more: &[(&str, &str)], secret: SecretRef) -> SourceSpec {
        let endpoint = self.server.endpoint();
        let fixed = [("endpoint", endpoint.as_str()), ("region", &self.region), ("sig", self.sig)];
        let options = fixed.iter().chain(more).map(|(k, v)| (k.to_string(), v.to_string())).collect();
        SourceSpec::parse(&format!("{}://{path}", self.scheme), options, secret).expect("a source")
    }

    fn connect(&self, path: &str, more: &[(&str, &str)], keys: (&str, &str)) -> ObjectBackend {
        let keys = StaticKeys { id: keys.0.into(), secret: Secret::new(keys.1), token: Secret::default() };
        object::connect(&self.spec(path, more, SecretRef::Keys), Some(&keys)).expect("connect")
    }

    fn backend(&self) -> ObjectBackend {
        self.connect("bucket", &[], KEYS)
    }

    /// The node of a file that has just been put, found without the backend's help.
    async fn file(&self, backend: &ObjectBackend, key: &str, body: &str) -> Node {
        self.put(key, body);
        backend.lookup(&Bytes::new(), key.as_bytes()).await.expect("lookup")
    }
}

const KEYS: (&str, &str) = ("efckey", "efcsecret");

async fn read(backend: &ObjectBackend, node: &Node, range: std::ops::Range<u64>) -> Result<Vec<u8>> {
    let stream = backend.read(&node.locator, &node.version, range).await?;
    Ok(stream.try_collect::<Vec<Bytes>>().await?.concat())
}

async fn read_all(backend: &ObjectBackend, node: &Node) -> Result<Vec<u8>> {
    read(backend, node, 0..node.attr.size).await
}

async fn list(backend: &ObjectBackend, dir: &Bytes) -> BTreeMap<Vec<u8>, Node> {
    let mut all = BTreeMap::new();
    let mut from = None;
    loop {
        let ListPage { entries, next, hidden } = backend.list(dir, from).await.expect("list");
        assert_eq!(hidden, []);
        for e in entries {
            assert!(all.insert(e.name.to_vec(), e.node).is_none(), "{} twice", e.name.escape_ascii());
        }
        from = next;
        if from.is_none() {
            return all;
        }
    }
}

/// Every file below `dir` by its path of shown names; looks each name up again on the way.
async fn walk(backend: &ObjectBackend, dir: &Bytes) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut open = vec![(Vec::new(), dir.clone())];
    while let Some((path, dir)) = open.pop() {
        for (name, node) in list(backend, &dir).await {
            let path = [&path[..], b"/", &name].concat();
            let found = backend.lookup(&dir, &name).await;
            assert_eq!(found.expect("lookup"), node, "{}", path.escape_ascii());
            if node.attr.kind == FileKind::Directory {
                open.push((path, node.locator));
            } else {
                assert_eq!(backend.getattr(&node.locator).await.expect("getattr"), node, "{}", path.escape_ascii());
                files.insert(path, read_all(backend, &node).await.expect("read"));
            }
        }
    }
    files
}

#[tokio::test]
async fn every_odd_key_is_reachable_under_its_documented_name() {
    let long = vec![b'k'; 1024];
    let long_shown = [b"/", &long[..]].concat();
    let keys: [(&[u8], &[u8]); 23] = [
        (b"a", b"/a%efc-file"),
        (b"a/b", b"/a/b"),
        (b"a-x", b"/a-x"),
        (b"//", b"/%efc-empty/%efc-empty/%efc-empty"),
        (b"//x", b"/%efc-empty/%efc-empty/x"),
        (b"d/", b"/d/%efc-empty%efc-file"),
        (b"d//y", b"/d/%efc-empty/y"),
        (b".", b"/%efc-dot"),
        (b"..", b"/%efc-dotdot%efc-file"),
        (b"../../up", b"/%efc-dotdot/%efc-dotdot/up"),
        (b"e/./f/../g", b"/e/%efc-dot/f/%efc-dotdot/g"),
        (b"nul\0nul", b"/nul%efc-nulnul"),
        (b"%efc-dot", b"/%efc-lit-dot"),
        (b"a%efc-file", b"/a%efc-lit-file"),
        (b"new\nline\r\t", b"/new\nline\r\t"),
        (b"\xff\xfe/\x80", b"/\xff\xfe/\x80"),
        (b" sp ace ", b"/ sp ace "),
        (b"plus+&amp;<x>?#%41", b"/plus+&amp;<x>?#%41"),
        (b"\xe6\x96\x87/\xe4\xbb\xb6", b"/\xe6\x96\x87/\xe4\xbb\xb6"),
        (b"back\\slash", b"/back\\slash"),
        (b"~*'()!:@$,;=", b"/~*'()!:@$,;="),
        (b"\x01\x7f", b"/\x01\x7f"),
        (&long, &long_shown),
    ];
    for store in Store::all() {
        for (i, (key, _)) in keys.iter().enumerate() {
            store.put(key, &format!("content {i}"));
        }
        store.put("marker/", "");
        let expected: BTreeMap<Vec<u8>, Vec<u8>> = keys
            .iter()
            .enumerate()
            .map(|(i, (_, name))| (name.to_vec(), format!("content {i}").into_bytes()))
            .collect();
        let backend = store.backend();
        let got = walk(&backend, &Bytes::new()).await;
        let (got_names, names): (Vec<_>, Vec<_>) = (got.keys().collect(), expected.keys().collect());
        assert_eq!(got_names, names, "{} {}", store.scheme, store.sig);
        assert_eq!(got, expected, "{} {}", store.scheme, store.sig);
        let root = list(&backend, &Bytes::new()).await;
        assert!(list(&backend, &root[&b"marker"[..]].locator).await.is_empty());
    }
}

#[tokio::test]
async fn a_listing_costs_one_request_a_page_and_nothing_else() {
    let store = Store::oss();
    for i in 0..2500 {
        store.put(format!("dir/{i:05}"), "x");
    }
    let backend = store.connect("bucket/dir", &[], KEYS);
    let root = backend.root().await.expect("root");
    assert_eq!(root.locator, "dir/");
    let all = list(&backend, &root.locator).await;
    assert_eq!(all.len(), 2500);
    assert_eq!(read_all(&backend, &all[&b"01234"[..]]).await.expect("read"), b"x");
    let stats = store.server.stats();
    assert_eq!((stats.of("list"), stats.of("location"), stats.of("get"), stats.total()), (3, 1, 1, 5), "{stats:?}");
}

#[tokio::test]
async fn an_object_and_a_directory_of_one_name_on_different_pages() {
    let store = Store::oss();
    store.put("a", "object");
    store.put("a-b", "object too");
    for i in 0..1500 {
        store.put(format!("a-{i:04}"), "");
    }
    for i in 0..1500 {
        store.put(format!("a-b-{i:04}"), "");
    }
    store.put("a-b/x", "below");
    store.put("a/x", "below");
    let backend = store.backend();
    let all = list(&backend, &Bytes::new()).await;
    assert_eq!(all.len(), 3004);
    for (name, kind) in [
        (&b"a"[..], FileKind::Directory),
        (b"a-b", FileKind::Directory),
        (b"a%efc-file", FileKind::File),
        (b"a-b%efc-file", FileKind::File),
    ] {
        assert_eq!(all[name].attr.kind, kind);
        // The listing behind the look-up shows only the first neighbours: the directory is found all the same.
        assert_eq!(backend.lookup(&Bytes::new(), name).await.expect("lookup"), all[name]);
    }
    for absent in [&b"a-0000%efc-file"[..], b"a-", b"%efc-x", b"a-b-", b"x"] {
        let found = backend.lookup(&Bytes::new(), absent).await;
        assert!(found.as_ref().is_err_and(|e| e.is(Kind::NotFound)), "{found:?}");
    }
}

#[tokio::test]
async fn directories_live_by_their_keys() {
    let store = Store::oss();
    let backend = store.connect("bucket/empty", &[], KEYS);
    let root = backend.root().await.expect("an empty prefix can be mounted");
    assert!(list(&backend, &root.locator).await.is_empty());
    assert_eq!(backend.getattr(&root.locator).await.expect("getattr").attr.kind, FileKind::Directory);
    let gone = Bytes::from_static(b"gone/");
    assert!(backend.list(&gone, None).await.is_err_and(|e| e.is(Kind::NotFound)));
    assert!(backend.getattr(&gone).await.is_err_and(|e| e.is(Kind::NotFound)));
    store.put("made/", "");
    let made = backend.getattr(&Bytes::from_static(b"made/")).await.expect("a marker makes a directory");
    assert!(made.attr.mtime.secs > 1_700_000_000, "the marker's time: {made:?}");
    store.put("file", "x");
    let file = Bytes::from_static(b"file");
    assert!(backend.list(&file, None).await.is_err_and(|e| e.is(Kind::NotADirectory)));
    assert!(backend.lookup(&file, b"x").await.is_err_and(|e| e.is(Kind::NotADirectory)));
    assert!(backend.read(&gone, &Bytes::new(), 0..1).await.is_err_and(|e| e.is(Kind::IsADirectory)));
}

fn assert_error(e: &Error, kind: Kind, retry: Retry, text: &str) {
    assert_eq!((e.kind(), e.retry()), (kind, retry), "{e}");
    assert!(e.to_string().contains(text), "`{e}` lacks `{text}`");
}

#[tokio::test]
async fn a_mount_that_cannot_work_says_why() {
    for store in Store::all() {
        let root = |path: &'static str, keys| {
            let backend = store.connect(path, &[], keys);
            async move { backend.root().await.expect_err("must fail") }
        };
        let e = root("other", KEYS).await;
        let text = format!("bucket `other` does not exist at {}: check the name", store.server.endpoint());
        assert_error(&e, Kind::NotFound, Retry::Never, &text);
        let e = root("bucket", ("nobody", "efcsecret")).await;
        assert_error(&e, Kind::PermissionDenied, Retry::Never, "access key id from the given keys");
        let e = root("bucket", ("efckey", "wrong")).await;
        assert_error(&e, Kind::PermissionDenied, Retry::Never, "access key secret from the given keys is wrong");
    }
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("its address");
    for (endpoint, text) in
        [(format!("http://{free}"), "cannot reach"), ("http://nowhere.invalid".into(), "cannot reach")]
    {
        let options = BTreeMap::from([("endpoint".into(), endpoint.clone())]);
        let spec = SourceSpec::parse("s3://bucket", options, SecretRef::Anonymous).expect("a source");
        let e = object::connect(&spec, None).expect("connect").root().await.expect_err("nobody is there");
        assert_error(&e, Kind::Unavailable, Retry::Later, text);
        assert!(e.to_string().contains(&endpoint), "{e}");
    }
}

#[tokio::test]
async fn root_falls_back_to_a_list_when_the_location_may_not_be_asked() {
    for (status, code) in [(403, "AccessDenied"), (501, "NotImplemented"), (405, "MethodNotAllowed")] {
        let store = Store::oss();
        store.put("p/", "");
        store.server.fault(Fault::on("location", Action::Status { status, code: code.into() }));
        let root = store.connect("bucket/p", &[], KEYS).root().await.expect("root");
        assert!(root.attr.mtime.secs > 0);
        assert_eq!(store.server.stats().of("list"), 1);
    }
    let store = Store::oss();
    store.server.set_acl("bucket", "public-read");
    let backend = object::connect(&store.spec("bucket", &[], SecretRef::Anonymous), None).expect("connect");
    assert_eq!(backend.root().await.expect("a public bucket").attr.kind, FileKind::Directory);
}

#[tokio::test]
async fn a_changed_object_is_stale_and_never_mixed() {
    for store in Store::all() {
        let backend = store.backend();
        let node = store.file(&backend, "f", "old content").await;
        assert_eq!(read(&backend, &node, 4..7).await.expect("a range"), b"con");
        store.put("f", "new content");
        assert_error(&read_all(&backend, &node).await.expect_err("stale"), Kind::Stale, Retry::Never, "changed");
        let node = backend.getattr(&node.locator).await.expect("getattr");
        assert_eq!(read_all(&backend, &node).await.expect("read"), b"new content");
        store.put("f", "shorter");
        assert_error(&read(&backend, &node, 9..11).await.expect_err("stale"), Kind::Stale, Retry::Never, "changed");
        store.server.remove("bucket", "f");
        assert_error(&read_all(&backend, &node).await.expect_err("stale"), Kind::Stale, Retry::Never, "removed");
        let node = store.file(&backend, "g", "0123456789").await;
        store.server.fault(Fault::on("get", Action::Mutate).times(1));
        assert_error(&read_all(&backend, &node).await.expect_err("stale"), Kind::Stale, Retry::Never, "changed");
    }
}

#[tokio::test]
async fn faults_have_a_verdict() {
    let store = Store::oss();
    let backend = store.connect("bucket", &[("timeout", "300ms")], KEYS);
    let body = "x".repeat(1 << 20);
    let node = store.file(&backend, "f", &body).await;
    for (action, kind, text) in [
        (Action::Status { status: 503, code: "SlowDown".into() }, Kind::Unavailable, "overloaded"),
        (Action::Status { status: 500, code: "InternalError".into() }, Kind::Unavailable, "failed"),
        (Action::Drop, Kind::Unavailable, "broke the connection"),
        (Action::Truncate { after_bytes: 1000 }, Kind::Unavailable, "broke the connection"),
        (Action::Reset { after_bytes: 1000 }, Kind::Unavailable, "broke the connection"),
        (Action::Latency { ms: 2000 }, Kind::Timeout, "did not answer within 300 ms"),
        (Action::Pause { after_bytes: 1000, ms: 2000 }, Kind::Timeout, "sent nothing for 300 ms"),
    ] {
        store.server.fault(Fault::on("get", action.clone()).times(1));
        let e = read_all(&backend, &node).await.expect_err("must fail");
        assert_error(&e, kind, Retry::Later, text);
        store.server.clear_faults();
        assert!(read_all(&backend, &node).await.expect("works again") == body.as_bytes(), "after {action:?}");
    }
    store.server.fault(Fault::on("list", Action::Truncate { after_bytes: 100 }).times(1));
    let e = backend.list(&Bytes::new(), None).await.expect_err("must fail");
    assert_eq!(e.retry(), Retry::Later, "{e}");
}

#[tokio::test]
async fn a_stream_outlives_its_backend() {
    let store = Store::oss();
    let backend = store.backend();
    let body = "y".repeat(8 << 20);
    let node = store.file(&backend, "f", &body).await;
    let stream = backend.read(&node.locator, &node.version, 0..node.attr.size).await.expect("read");
    drop(backend);
    let got = stream.try_collect::<Vec<Bytes>>().await.expect("the rest").concat();
    assert!(got == body.as_bytes());
}

#[tokio::test]
async fn rotated_secret_files_are_picked_up() {
    let store = Store::oss();
    let dir = tempfile::tempdir().expect("a directory");
    let write = |id: &str, secret: &str| {
        std::fs::write(dir.path().join("akId"), format!("{id}\n")).expect("write");
        std::fs::write(dir.path().join("akSecret"), secret).expect("write");
    };
    write("efckey", "efcsecret");
    let spec = store.spec("bucket", &[], SecretRef::Dir(dir.path().display().to_string()));
    let backend = object::connect(&spec, None).expect("connect");
    backend.root().await.expect("the first keys");
    store.server.set_identities(vec![Identity::new("next", "nextsecret")]);
    write("next", "nextsecret");
    // The old keys may be used once more: their refusal asks for new ones.
    if let Err(e) = backend.root().await {
        assert_error(&e, Kind::PermissionDenied, Retry::Later, "access key id");
        backend.root().await.expect("the new keys");
    }
    // Keys that are wrong and stay wrong are not asked for again and again.
    store.server.set_identities(vec![Identity::new("third", "thirdsecret")]);
    let mut last = None;
    for _ in 0..3 {
        last = backend.root().await.err();
    }
    assert_error(&last.expect("an error"), Kind::PermissionDenied, Retry::Never, "dir:/");
}
