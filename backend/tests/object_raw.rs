//! Answers that no honest server gives (wrong ranges, too many bytes, other versions, redirects, floods), and TLS with an own authority: a
//! server of canned answers, plain or behind TLS. `tests/data` holds the authority and a certificate for `localhost`, valid until 2126.

use bytes::Bytes;
use efc_backend::Backend;
use efc_backend::object::{self, ObjectBackend};
use efc_common::source::{SecretRef, SourceSpec};
use efc_common::{Error, Kind, Result, Retry};
use futures::TryStreamExt;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

const CA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/ca.pem");
const CERTIFICATE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/server.pem");
const KEY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/server.key.pem");

/// The first line of a request to the bytes of an answer.
type Script = Arc<dyn Fn(&str) -> Vec<u8> + Send + Sync>;

/// Serves one request a connection, and stops on drop.
struct Canned {
    addr: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Canned {
    fn start(tls: bool, script: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static) -> Canned {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let addr = listener.local_addr().expect("its address");
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, script): (_, Script) = (Arc::clone(&stop), Arc::new(script));
        let config = tls.then(server_config);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if stopped.load(Relaxed) {
                    return;
                }
                // A client that hangs up early (it refuses our certificate) is not our failure.
                let _ = match &config {
                    None => serve(stream, &script),
                    Some(config) => {
                        let session = rustls::ServerConnection::new(Arc::clone(config)).expect("a session");
                        serve(rustls::StreamOwned::new(session, stream), &script)
                    }
                };
            }
        });
        Canned { addr, stop, thread: Some(thread) }
    }

    fn backend(&self, scheme: &str, more: &[(&str, &str)]) -> ObjectBackend {
        let endpoint = format!("{scheme}://localhost:{}", self.addr.port());
        let options = [("endpoint", endpoint.as_str())];
        let options = options.iter().chain(more).map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let spec = SourceSpec::parse("s3://bucket", options, SecretRef::Anonymous).expect("a source");
        object::connect(&spec, None).expect("connect")
    }
}

impl Drop for Canned {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        drop(TcpStream::connect(self.addr));
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}

fn server_config() -> Arc<rustls::ServerConfig> {
    let chain: Vec<_> = CertificateDer::pem_file_iter(CERTIFICATE)
        .expect("certificate")
        .collect::<std::result::Result<_, _>>()
        .expect("PEM");
    let key = PrivateKeyDer::from_pem_file(KEY).expect("key");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    Arc::new(config.expect("versions").with_no_client_auth().with_single_cert(chain, key).expect("a fitting key"))
}

fn serve(stream: impl Read + Write, script: &Script) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head)? == 0 {
            return Ok(());
        }
    }
    let mut stream = reader.into_inner();
    stream.write_all(&script(head.lines().next().unwrap_or_default()))?;
    stream.flush()
}

fn answer(status: &str, headers: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\nConnection: close\r\n{headers}\r\n{body}").into_bytes()
}

/// Everything about the one object there is, a listing that names it, and `get` for its content.
fn store(get: &'static str, headers: &'static str, body: &'static str) -> Canned {
    Canned::start(false, move |request| {
        if request.starts_with("GET /bucket/?") {
            let xml = "<ListBucketResult><Contents><Key>f</Key><Size>10</Size><ETag>\"e\"</ETag>\
                <LastModified>2026-01-01T00:00:00Z</LastModified></Contents></ListBucketResult>";
            answer("200 OK", &format!("Content-Length: {}\r\n", xml.len()), xml)
        } else {
            answer(get, headers, body)
        }
    })
}

async fn read(backend: &ObjectBackend, range: std::ops::Range<u64>) -> Result<Vec<u8>> {
    let node = backend.lookup(&Bytes::new(), b"f").await.expect("lookup");
    let stream = backend.read(&node.locator, &node.version, range).await?;
    Ok(stream.try_collect::<Vec<Bytes>>().await?.concat())
}

fn assert_error(e: &Error, kind: Kind, retry: Retry, text: &str) {
    assert_eq!((e.kind(), e.retry()), (kind, retry), "{e}");
    assert!(e.to_string().contains(text), "`{e}` lacks `{text}`");
}

#[tokio::test]
async fn only_the_answer_for_this_range_of_this_version_is_taken() {
    use Kind::*;
    use Retry::*;
    for (status, headers, body, outcome) in [
        ("206 P", "ETag: \"e\"\r\nContent-Range: bytes 2-5/10\r\nContent-Length: 4\r\n", "2345", Ok(())),
        (
            "206 P",
            "ETag: W/\"e\"\r\nContent-Range: bytes 2-5/*\r\nTransfer-Encoding: chunked\r\n",
            "4\r\n2345\r\n0\r\n\r\n",
            Ok(()),
        ),
        (
            "206 P",
            "ETag: \"x\"\r\nContent-Range: bytes 2-5/10\r\nContent-Length: 4\r\n",
            "2345",
            Err((Stale, Never, "ETag")),
        ),
        (
            "206 P",
            "ETag: \"e\"\r\nContent-Range: bytes 2-5/11\r\nContent-Length: 4\r\n",
            "2345",
            Err((Stale, Never, "length")),
        ),
        ("206 P", "Content-Range: bytes 2-5/10\r\nContent-Length: 4\r\n", "2345", Err((Stale, Never, "ETag"))),
        (
            "206 P",
            "ETag: \"e\"\r\nContent-Range: bytes 3-6/10\r\nContent-Length: 4\r\n",
            "3456",
            Err((Corrupt, Later, "asked for bytes 2-5")),
        ),
        ("206 P", "ETag: \"e\"\r\nContent-Length: 4\r\n", "2345", Err((Corrupt, Later, "Content-Range"))),
        (
            "206 P",
            "ETag: \"e\"\r\nContent-Range: bytes 2-5/10\r\nContent-Length: 5\r\n",
            "23456",
            Err((Corrupt, Later, "length")),
        ),
        ("206 P", "ETag: \"e\"\r\nContent-Range: bytes 2-5/10\r\n", "234567", Err((Corrupt, Later, "length"))),
        ("206 P", "ETag: \"e\"\r\nContent-Range: bytes 2-5/10\r\n", "234", Err((Unavailable, Later, "1 bytes early"))),
        (
            "206 P",
            "ETag: \"e\"\r\nContent-Range: bytes 2-5/10\r\nContent-Length: 4\r\n",
            "23",
            Err((Unavailable, Later, "broke")),
        ),
        ("200 OK", "ETag: \"e\"\r\nContent-Length: 10\r\n", "0123456789", Err((Unsupported, Never, "range"))),
        ("412 No", "Content-Length: 0\r\n", "", Err((Stale, Never, "changed"))),
        ("416 No", "Content-Length: 0\r\n", "", Err((Stale, Never, "changed"))),
        ("404 No", "Content-Length: 0\r\n", "", Err((Stale, Never, "removed"))),
        ("garbage", "", "", Err((Unavailable, Later, "broke"))),
    ] {
        let server = store(status, headers, body);
        match (read(&server.backend("http", &[]), 2..6).await, outcome) {
            (Ok(data), Ok(())) => assert_eq!(data, b"2345"),
            (Err(e), Err((kind, retry, text))) => assert_error(&e, kind, retry, text),
            (got, _) => panic!("{status} {headers:?} {body:?} gave {got:?}"),
        }
    }
}

#[tokio::test]
async fn a_server_without_ranges_can_give_whole_files() {
    let server = store("200 OK", "ETag: \"e\"\r\nContent-Length: 10\r\n", "0123456789");
    assert_eq!(read(&server.backend("http", &[]), 0..10).await.expect("whole"), b"0123456789");
    assert_eq!(read(&server.backend("http", &[]), 3..3).await.expect("nothing is asked"), b"");
    let e = read(&server.backend("http", &[]), 5..11).await.expect_err("behind the end");
    assert!(e.is(Kind::Invalid), "{e}");
    let server = store("200 OK", "ETag: \"e\"\r\nContent-Length: 9\r\n", "012345678");
    assert!(read(&server.backend("http", &[]), 0..10).await.is_err_and(|e| e.is(Kind::Stale)));
}

#[tokio::test]
async fn listings_are_bounded_and_must_advance() {
    let flood = "x".repeat(17 << 20);
    let server =
        Canned::start(false, move |_| answer("200 OK", &format!("Content-Length: {}\r\n", flood.len()), &flood));
    let e = server.backend("http", &[]).list(&Bytes::new(), None).await.expect_err("too much");
    assert!(e.is(Kind::Corrupt) && e.message().contains("more than"), "{e}");
    let xml = "<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken></ListBucketResult>";
    let server = Canned::start(false, move |_| answer("200 OK", &format!("Content-Length: {}\r\n", xml.len()), xml));
    let backend = server.backend("http", &[]);
    let page = backend.list(&Bytes::new(), None).await.expect("the first page");
    let e = backend.list(&Bytes::new(), page.next).await.expect_err("the same again");
    assert!(e.is(Kind::Corrupt) && e.message().contains("advance"), "{e}");
    let server = Canned::start(false, |_| answer("200 OK", "Content-Length: 15\r\n", "<html>hi</html>"));
    let e = server.backend("http", &[]).list(&Bytes::new(), None).await.expect_err("a portal");
    assert!(e.to_string().contains("is this an S3 or OSS endpoint"), "{e}");
}

#[tokio::test]
async fn a_bucket_in_another_region_is_named() {
    let server = Canned::start(false, |_| {
        answer("301 Moved Permanently", "x-amz-bucket-region: eu-west-1\r\nContent-Length: 0\r\n", "")
    });
    let e = server.backend("http", &[]).root().await.expect_err("elsewhere");
    assert_error(&e, Kind::Invalid, Retry::Never, "region `eu-west-1`");
}

#[tokio::test]
async fn tls_with_an_own_authority() {
    let server = Canned::start(true, |_| answer("200 OK", "Content-Length: 21\r\n", "<LocationConstraint/>"));
    server.backend("https", &[("ca_file", CA)]).root().await.expect("trusted");
    let e = server.backend("https", &[]).root().await.expect_err("not trusted");
    assert_error(&e, Kind::Invalid, Retry::Never, "set ca_file=");
}
