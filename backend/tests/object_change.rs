//! Single points of changing object stores: changes whose answer is lost on the wire, conditions that somebody else decides, refusals key by key, numbers of
//! requests, bodies that do not get on, and answers that no honest server gives.

use bytes::Bytes;
use efc_backend::Backend;
use efc_backend::connect::{Connected, connect_counted};
use efc_backend::object::{self, ObjectBackend};
use efc_backend::objects::{Condition, DynObjects, Metadata, Objects, Part, UploadId};
use efc_common::node::Node;
use efc_common::source::{Secret, SecretRef, SourceSpec, StaticKeys};
use efc_common::{Error, Kind};
use efc_testkit::{Action, Fault, OssOptions, OssServer};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// A server of ours, and the whole stack over it.
struct Rig {
    server: OssServer,
    origin: Connected,
    objects: DynObjects,
    url: &'static str,
    region: String,
}

fn spec(url: &str, endpoint: &str, more: &[(&str, &str)]) -> SourceSpec {
    let fixed = [("endpoint", endpoint)];
    let options = fixed.iter().chain(more).map(|(k, v)| (k.to_string(), v.to_string())).collect();
    SourceSpec::parse(url, options, SecretRef::Keys).expect("a source")
}

fn keys() -> StaticKeys {
    StaticKeys { id: "efckey".into(), secret: Secret::new("efcsecret"), token: Secret::default() }
}

async fn rig(options: OssOptions, more: &[(&str, &str)]) -> Rig {
    let url = if options.dialect == efc_testkit::Dialect::Oss { "oss://bucket" } else { "s3://bucket" };
    let region = options.region.clone();
    // The server has a runtime, which it must not make inside of ours.
    let server = std::thread::spawn(|| OssServer::start_with(options)).join().expect("a thread").expect("a server");
    server.create_bucket("bucket");
    let more: Vec<(&str, &str)> = [("region", region.as_str())].iter().chain(more).copied().collect();
    let origin = connect_counted(&spec(url, &server.endpoint(), &more), Some(&keys())).await.expect("connect");
    let objects = origin.objects.clone().expect("an object store");
    objects.limits().await.expect("limits");
    server.reset_stats();
    Rig { server, origin, objects, url, region }
}

async fn both() -> [Rig; 2] {
    [rig(OssOptions::s3(), &[]).await, rig(OssOptions::default(), &[]).await]
}

fn key(text: &'static str) -> Bytes {
    Bytes::from_static(text.as_bytes())
}

fn body(text: &'static str) -> Vec<Bytes> {
    vec![key(text)]
}

fn assert_kind<T: std::fmt::Debug>(answer: Result<T, Error>, kind: Kind) {
    match answer {
        Err(e) if e.is(kind) => {}
        other => panic!("expected {kind:?}, got {other:?}"),
    }
}

impl Rig {
    /// The next answer to `op` is lost on the wire, after the server has done it.
    fn lose(&self, op: &str) {
        self.server.fault(Fault::on(op, Action::Drop).times(1));
    }

    /// The next request `op` is refused as by an overloaded server, which has not done it.
    fn refuse(&self, op: &str) {
        self.server.fault(Fault::on(op, Action::Status { status: 503, code: String::new() }).times(1));
    }

    async fn put(&self, name: &'static str, text: &'static str, condition: Condition) -> Result<Node, Error> {
        self.objects.put(&key(name), body(text), &Metadata::default(), &condition).await
    }

    async fn assert_is(&self, node: &Node, text: &str) {
        assert_eq!(self.server.get("bucket", &node.locator).as_deref(), Some(text.as_bytes()));
        let now = self.origin.backend.getattr(&node.locator).await.expect("getattr");
        assert_eq!(now.version, node.version, "the version that everybody sees");
    }
}

#[tokio::test]
async fn a_conditional_put_whose_answer_is_lost_has_happened_once() {
    for r in both().await {
        r.lose("put");
        let made = r.put("f", "one", Condition::Absent).await.expect("it was us");
        r.assert_is(&made, "one").await;
        r.lose("put");
        let known = Condition::Version(made.version);
        let made = r.put("f", "two", known.clone()).await.expect("it was us");
        r.assert_is(&made, "two").await;
        // The same bytes as somebody else has put are still somebody else's: this is what O_EXCL asks.
        r.refuse("put");
        r.server.put("bucket", "lock", "");
        assert_kind(r.put("lock", "", Condition::Absent).await, Kind::Conflict);
        assert_kind(r.put("f", "three", known).await, Kind::Conflict);
        r.assert_is(&made, "two").await;
    }
}

#[tokio::test]
async fn a_completion_whose_answer_is_lost_has_happened_once() {
    for r in both().await {
        for condition in [Condition::Absent, Condition::Any] {
            let f = key("f");
            let upload = r.objects.begin(&f, &Metadata::default()).await.expect("begin");
            let part = r.objects.part(&f, &upload, 1, body("bytes")).await.expect("part");
            r.lose("complete");
            let made = r.objects.complete(&f, &upload, &[part], &condition).await.expect("it was us");
            r.assert_is(&made, "bytes").await;
            let (_, kept) = r.objects.head(&f).await.expect("head");
            assert!(kept.other.is_empty(), "{kept:?}");
        }
        // Thrown away by somebody else while we could not see: not ours.
        let f = key("f");
        let upload = r.objects.begin(&f, &Metadata::default()).await.expect("begin");
        let part = r.objects.part(&f, &upload, 1, body("late")).await.expect("part");
        r.objects.abort(&f, &upload).await.expect("abort");
        r.refuse("complete");
        assert_kind(r.objects.complete(&f, &upload, &[part], &Condition::Any).await, Kind::NotFound);
        assert_eq!(r.server.get("bucket", "f").as_deref(), Some(&b"bytes"[..]));
    }
}

#[tokio::test]
async fn an_append_whose_answer_is_lost_has_happened_once() {
    let r = rig(OssOptions::default(), &[]).await;
    let (log, none) = (key("log"), Metadata::default());
    for (at, text, all) in [(0, "one ", "one "), (4, "two", "one two")] {
        r.lose("append");
        let node = r.objects.append(&log, at, body(text), &none).await.expect("it was us");
        r.assert_is(&node, all).await;
    }
    r.refuse("append");
    assert_kind(r.objects.append(&log, 3, body("x"), &none).await, Kind::Conflict);
    assert_eq!(r.server.get("bucket", "log").as_deref(), Some(&b"one two"[..]));
}

#[tokio::test]
async fn copies_whose_answers_are_lost_have_happened_once() {
    for r in both().await {
        let f = r.put("f", "bytes", Condition::Any).await.expect("put");
        let from = (&f.locator, &f.version);
        let changed = Metadata { mode: Some(0o100_600), ..Metadata::default() };
        for metadata in [None, Some(&changed)] {
            let target = key(if metadata.is_some() { "with" } else { "without" });
            r.lose("copy");
            let made = r.objects.copy(from, &target, metadata, &Condition::Absent).await.expect("it was us");
            r.assert_is(&made, "bytes").await;
            let (_, kept) = r.objects.head(&target).await.expect("head");
            assert_eq!((kept.mode, kept.other.len()), (metadata.and(changed.mode), 0));
        }
        r.lose("copy");
        let made = r.objects.copy(from, &f.locator, Some(&changed), &Condition::Any).await.expect("onto itself");
        r.assert_is(&made, "bytes").await;
        r.refuse("copy");
        r.server.put("bucket", "taken", "other");
        assert_kind(r.objects.copy(from, &key("taken"), None, &Condition::Absent).await, Kind::Conflict);
    }
}

#[tokio::test]
async fn a_small_write_is_one_request() {
    for r in both().await {
        let node = r.put("f", "bytes", Condition::Absent).await.expect("put");
        assert_eq!((r.server.stats().of("put"), r.server.stats().total()), (1, 1), "{:?}", r.server.stats());
        r.assert_is(&node, "bytes").await;
    }
}

#[tokio::test]
async fn oss_with_versioning_ignores_forbid_overwrite_and_is_found_out() {
    let server = std::thread::spawn(OssServer::start).join().expect("a thread").expect("a server");
    server.create_bucket("bucket");
    server.set_versioned("bucket");
    let source = spec("oss://bucket/dir", &server.endpoint(), &[("sig", "v1")]);
    let objects = connect_counted(&source, Some(&keys())).await.expect("connect").objects.expect("objects");
    let limits = objects.limits().await.expect("limits");
    assert!(!limits.conditional && !limits.conditional_version, "{limits:?}");
    assert!(server.keys("bucket").is_empty(), "nothing stays behind: {:?}", server.keys("bucket"));
    let put = |text| {
        let objects = &objects;
        async move { objects.put(&key("dir/f"), body(text), &Metadata::default(), &Condition::Absent).await }
    };
    put("one").await.expect("put");
    assert_kind(put("two").await, Kind::Conflict);
    assert_eq!(server.get("bucket", "dir/f").as_deref(), Some(&b"one"[..]));
}

#[tokio::test]
async fn who_may_not_write_beside_the_tree_still_writes_in_it() {
    let r = rig(OssOptions::s3(), &[]).await;
    let server = &r.server;
    server.fault(Fault::on("put", Action::Status { status: 403, code: String::new() }).keys(".efc/"));
    let fresh = connect_counted(&spec("s3://bucket", &server.endpoint(), &[]), Some(&keys())).await.expect("connect");
    let objects = fresh.objects.expect("objects");
    let limits = objects.limits().await.expect("limits");
    assert!(!limits.conditional, "{limits:?}");
    let put = |text| {
        let objects = &objects;
        async move { objects.put(&key("f"), body(text), &Metadata::default(), &Condition::Absent).await }
    };
    put("one").await.expect("put");
    assert_kind(put("two").await, Kind::Conflict);
}

#[tokio::test]
async fn deletions_fail_key_by_key_and_pass_when_the_fault_does() {
    for r in both().await {
        let names: Vec<String> = (0..2300).map(|i| format!("d/{i:04}")).collect();
        for name in &names {
            r.server.put("bucket", name, "x");
        }
        for i in [7, 1500] {
            r.server.lock("bucket", &names[i]);
        }
        r.server.fault(Fault::on("delete_many", Action::Drop).after(1).times(1));
        let locators: Vec<Bytes> = names.iter().cloned().map(Bytes::from).collect();
        let failed = r.objects.delete(&locators).await.expect("delete");
        assert_eq!(failed.iter().map(|(i, _)| *i).collect::<Vec<_>>(), [7, 1500], "{failed:?}");
        let kinds: Vec<Kind> = failed.iter().map(|(_, e)| e.kind()).collect();
        assert!(kinds.iter().all(|k| matches!(k, Kind::PermissionDenied | Kind::NotPermitted)), "{failed:?}");
        assert_eq!(r.server.keys("bucket").len(), 2);
        assert_eq!(r.server.stats().of("delete_many"), 4, "three batches, one of them twice");
    }
}

#[tokio::test]
async fn all_keys_below_a_directory_come_page_by_page() {
    let r = rig(OssOptions::default(), &[]).await;
    let mut names: Vec<String> = (0..2500).map(|i| format!("d/{}/{i:04}", i % 7)).collect();
    names.sort();
    for name in &names {
        r.server.put("bucket", name, "x");
    }
    r.server.put("bucket", "d-outside", "x");
    let mut found = Vec::new();
    let mut from = None;
    loop {
        let page = r.objects.keys_below(&key("d/"), from).await.expect("keys");
        found.extend(page.entries.into_iter().map(|e| String::from_utf8(e.node.locator.to_vec()).expect("text")));
        from = page.next;
        if from.is_none() {
            break;
        }
    }
    assert_eq!(found, names);
    assert_eq!(r.server.stats().of("list"), 3);
}

#[tokio::test]
async fn open_uploads_come_page_by_page_and_only_from_the_mounted_prefix() {
    for r in both().await {
        let plain = r.objects.clone();
        for i in 0..1100 {
            plain.begin(&Bytes::from(format!("dir/{:03}", i / 2)), &Metadata::default()).await.expect("begin");
        }
        plain.begin(&key("other"), &Metadata::default()).await.expect("begin");
        assert_eq!(plain.open_uploads().await.expect("uploads").len(), 1101);
        assert_eq!(r.server.stats().of("list_uploads"), 2);
        let url = format!("{}/dir", r.url);
        let below = spec(&url, &r.server.endpoint(), &[("region", &r.region)]);
        let below = connect_counted(&below, Some(&keys())).await.expect("connect").objects.expect("objects");
        let open = below.open_uploads().await.expect("uploads");
        assert_eq!(open.len(), 1100);
        let mut ids: Vec<_> = open.iter().map(|u| &u.id).collect();
        ids.sort_by(|a, b| a.0.cmp(&b.0));
        ids.dedup();
        assert_eq!(ids.len(), 1100, "none twice");
    }
}

/// A plain client, without the stack, of a server that `serve` plays: it gets each connection.
fn against(
    more: &[(&str, &str)],
    mut serve: impl FnMut(TcpStream) -> std::io::Result<()> + Send + 'static,
) -> ObjectBackend {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let endpoint = format!("http://{}", listener.local_addr().expect("its address"));
    // Ends with the process; a client that hangs up is not our failure.
    std::thread::spawn(move || listener.incoming().flatten().for_each(|s| drop(serve(s))));
    object::connect(&spec("s3://bucket", &endpoint, more), Some(&keys())).expect("connect")
}

/// Reads a request's head; its lines in lower case.
fn head(reader: &mut impl BufRead) -> std::io::Result<Vec<String>> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        match line.trim_end() {
            "" => return Ok(lines),
            line => lines.push(line.to_ascii_lowercase()),
        }
    }
}

fn length(lines: &[String]) -> usize {
    let value = lines.iter().find_map(|l| l.strip_prefix("content-length: ")).expect("a PUT or POST has a length");
    value.parse().expect("a number")
}

async fn put_large(store: &ObjectBackend, bytes: usize) -> Result<Node, Error> {
    let pieces = vec![Bytes::from(vec![7u8; 1 << 20]); bytes >> 20];
    store.put(&key("f"), pieces, &Metadata::default(), &Condition::Any).await
}

#[tokio::test]
async fn an_upload_that_does_not_get_on_ends_after_the_timeout() {
    let options = [("timeout", "1s"), ("payload_hash", "false")];
    let mut held = Vec::new();
    let store = against(&options, move |stream| {
        // Never reads.
        held.push(stream);
        Ok(())
    });
    let began = Instant::now();
    let e = put_large(&store, 64 << 20).await.expect_err("stalled");
    assert!(e.is(Kind::Timeout), "{e}");
    assert!((0.9..3.0).contains(&began.elapsed().as_secs_f64()), "{:?}", began.elapsed());
}

#[tokio::test]
async fn an_upload_that_gets_on_slowly_may_take_longer_than_the_timeout() {
    let options = [("timeout", "1s"), ("payload_hash", "false")];
    let store = against(&options, |stream| {
        // Small buffers, so that the pace is the reader's.
        let mut reader = BufReader::new(stream);
        let mut left = length(&head(&mut reader)?);
        let mut piece = vec![0u8; 512 << 10];
        while left > 0 {
            let n = left.min(piece.len());
            reader.read_exact(&mut piece[..n])?;
            left -= n;
            std::thread::sleep(Duration::from_millis(40));
        }
        reader.get_mut().write_all(b"HTTP/1.1 200 OK\r\nETag: \"e\"\r\nContent-Length: 0\r\n\r\n")
    });
    let began = Instant::now();
    let node = put_large(&store, 32 << 20).await.expect("slow, but sure");
    assert_eq!(node.attr.size, 32 << 20);
    assert!(began.elapsed() > Duration::from_secs(2), "{:?}", began.elapsed());
}

#[tokio::test]
async fn an_empty_body_has_a_length() {
    let store = against(&[], |stream| {
        let mut reader = BufReader::new(stream);
        let lines = head(&mut reader)?;
        assert_eq!(length(&lines), 0);
        reader.get_mut().write_all(b"HTTP/1.1 200 OK\r\nETag: \"e\"\r\nContent-Length: 0\r\n\r\n")
    });
    store.put(&key("f"), Vec::new(), &Metadata::default(), &Condition::Any).await.expect("put");
}

/// A server that answers with status 200 and this document where there should be one.
fn answering(xml: &'static str) -> ObjectBackend {
    against(&[], move |stream| {
        let mut reader = BufReader::new(stream);
        let lines = head(&mut reader)?;
        let (method, bare) = (lines[0].split(' ').next().unwrap_or_default(), !lines[0].contains('?'));
        let plain_put = method == "put" && bare && !lines.iter().any(|l| l.starts_with("x-amz-copy-source"));
        if matches!(method, "put" | "post") {
            reader.read_exact(&mut vec![0u8; length(&lines)])?;
        }
        let answer = match method {
            "head" => {
                "200 OK\r\nETag: \"e\"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\nContent-Length: 5\r\n\r\n"
                    .into()
            }
            "delete" => "204 No Content\r\n\r\n".into(),
            _ if plain_put => "200 OK\r\nETag: \"e\"\r\nContent-Length: 0\r\n\r\n".into(),
            _ => format!("200 OK\r\nContent-Length: {}\r\n\r\n{xml}", xml.len()),
        };
        let answer = format!("HTTP/1.1 {}", answer.replacen("\r\n", "\r\nConnection: close\r\n", 1));
        reader.get_mut().write_all(answer.as_bytes())
    })
}

#[tokio::test]
async fn a_success_that_carries_an_error_is_an_error() {
    let upload = UploadId("u".into());
    let parts = [Part { number: 1, etag: b"e".to_vec() }];
    let version = Bytes::from([&[2u8][..], &5u64.to_le_bytes(), &0i64.to_le_bytes(), b"e"].concat());
    for (xml, kind) in [
        ("\n  \n<?xml version=\"1.0\"?><Error><Code>InternalError</Code></Error>", Kind::Unavailable),
        ("<Error><Code>SlowDown</Code><Message>m</Message></Error>", Kind::Unavailable),
        ("<Error><Code>AccessDenied</Code></Error>", Kind::PermissionDenied),
        ("<html>portal</html>", Kind::Corrupt),
        ("", Kind::Corrupt),
        ("<CompleteMultipartUploadResult><ETag>", Kind::Corrupt),
    ] {
        let store = answering(xml);
        assert_kind(store.complete(&key("f"), &upload, &parts, &Condition::Any).await, kind);
        let from = (&key("s"), &version);
        assert_kind(store.copy(from, &key("f"), None, &Condition::Any).await, kind);
        assert_kind(store.part_copy(&key("f"), &upload, 1, from, 0..5).await, kind);
        assert_kind(store.begin(&key("f"), &Metadata::default()).await, kind);
    }
}

#[tokio::test]
async fn an_answer_without_an_etag_is_asked_for_once_more() {
    let store = against(&[], |stream| {
        let mut reader = BufReader::new(stream);
        let lines = head(&mut reader)?;
        let answer: &[u8] = if lines[0].starts_with("head") {
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\nContent-Length: 1\r\n\r\n"
        } else {
            let mut body = vec![0u8; length(&lines)];
            reader.read_exact(&mut body)?;
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        };
        reader.get_mut().write_all(answer)
    });
    let node = store.put(&key("f"), body("x"), &Metadata::default(), &Condition::Any).await.expect("put");
    assert_eq!(node.attr.mtime.secs, 1_767_225_600);
    assert_eq!(store.getattr(&key("f")).await.expect("getattr"), node);
}
