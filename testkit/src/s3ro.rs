//! A read-only S3 server for benchmarks: as little CPU as possible, so that the client under test is what gets measured.
//!
//! Each directory below the root is a bucket. One blocking thread per connection, bodies by `sendfile`, listings from an index made at the
//! start, an optional latency before every answer as from a far store. Path style; signatures are not looked at. `GET /-/stats` shows
//! the counters as JSON, `/-/reset` zeroes them. What it serves must not change while it runs.

use crate::listing::{Query, page};
use crate::sign::{http_date, iso_date, sha256_hex};
use crate::xml::Xml;
use anyhow::{Context, Result};
use percent_encoding::percent_decode_str;
use rustix::fs::sendfile;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

/// Longest request line or header that is read.
const LINE_LIMIT_BYTES: u64 = 64 << 10;
/// Bytes handed to one `sendfile` call.
const SEND_BYTES: u64 = 4 << 20;

/// What was served since the start or the last reset.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct S3RoStats {
    /// GETs of objects.
    pub get: u64,
    /// HEADs of objects.
    pub head: u64,
    /// Listings.
    pub list: u64,
    /// All else.
    pub other: u64,
    /// Body bytes of objects sent.
    pub bytes: u64,
}

#[derive(Debug)]
struct Entry {
    path: PathBuf,
    size: u64,
    modified: SystemTime,
    etag: String,
}

#[derive(Debug, Default)]
struct Counters {
    get: AtomicU64,
    head: AtomicU64,
    list: AtomicU64,
    other: AtomicU64,
    bytes: AtomicU64,
}

#[derive(Debug)]
struct Shared {
    buckets: BTreeMap<String, BTreeMap<Vec<u8>, Entry>>,
    latency: Duration,
    counters: Counters,
    stopping: AtomicBool,
}

/// A running server; it stops accepting on drop.
#[derive(Debug)]
pub struct S3Ro {
    shared: Arc<Shared>,
    addr: SocketAddr,
    acceptor: Option<std::thread::JoinHandle<()>>,
}

impl S3Ro {
    /// Serves the directories below `root` as buckets on any port of loopback.
    ///
    /// # Errors
    /// When the tree cannot be read or no socket can be had.
    pub fn start(root: &Path, latency: Duration) -> Result<S3Ro> {
        S3Ro::start_on(root, latency, 0)
    }

    /// Serves on a given port.
    ///
    /// # Errors
    /// As [`S3Ro::start`].
    pub fn start_on(root: &Path, latency: Duration, port: u16) -> Result<S3Ro> {
        let buckets = index(root)?;
        let listener = TcpListener::bind(("127.0.0.1", port)).with_context(|| format!("listen on 127.0.0.1:{port}"))?;
        let addr = listener.local_addr()?;
        let shared =
            Arc::new(Shared { buckets, latency, counters: Counters::default(), stopping: AtomicBool::new(false) });
        let accepting = shared.clone();
        let acceptor = std::thread::Builder::new().name("s3ro".into()).spawn(move || accept(&listener, &accepting))?;
        Ok(S3Ro { shared, addr, acceptor: Some(acceptor) })
    }

    /// `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Endpoint with keys, for set-up code.
    pub fn target(&self) -> crate::S3Target {
        crate::S3Target { endpoint: self.endpoint(), ..crate::S3Target::default() }
    }

    /// Buckets with their number of objects.
    pub fn buckets(&self) -> Vec<(&str, usize)> {
        self.shared.buckets.iter().map(|(name, objects)| (name.as_str(), objects.len())).collect()
    }

    /// The counters.
    pub fn stats(&self) -> S3RoStats {
        self.shared.counters.read()
    }

    /// Zeroes the counters.
    pub fn reset_stats(&self) {
        self.shared.counters.reset();
    }

    /// Waits for ever: for a program that is only this server.
    pub fn join(mut self) {
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

impl Drop for S3Ro {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Relaxed);
        // Wakes the acceptor. Connection threads end with their clients.
        let _ = TcpStream::connect(self.addr);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

impl Counters {
    fn read(&self) -> S3RoStats {
        S3RoStats {
            get: self.get.load(Relaxed),
            head: self.head.load(Relaxed),
            list: self.list.load(Relaxed),
            other: self.other.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
        }
    }

    fn reset(&self) {
        for counter in [&self.get, &self.head, &self.list, &self.other, &self.bytes] {
            counter.store(0, Relaxed);
        }
    }
}

fn index(root: &Path) -> Result<BTreeMap<String, BTreeMap<Vec<u8>, Entry>>> {
    let mut buckets = BTreeMap::new();
    for entry in std::fs::read_dir(root).with_context(|| root.display().to_string())? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            continue;
        }
        let mut objects = BTreeMap::new();
        for relative in crate::data::regular_files(&entry.path())? {
            let path = entry.path().join(&relative);
            let meta = path.metadata()?;
            let modified = meta.modified()?;
            let key = relative.as_os_str().as_bytes().to_vec();
            let seed = format!("{}/{}/{modified:?}", relative.display(), meta.len());
            // Shaped like a multipart upload's: clients take a plain one for the MD5 of the bytes.
            let etag = format!("\"{}-1\"", &sha256_hex(seed.as_bytes())[..32]);
            objects.insert(key, Entry { path, size: meta.len(), modified, etag });
        }
        buckets.insert(entry.file_name().to_string_lossy().into_owned(), objects);
    }
    Ok(buckets)
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    for stream in listener.incoming().flatten() {
        if shared.stopping.load(Relaxed) {
            return;
        }
        let shared = shared.clone();
        let serve = move || {
            // A broken connection concerns its client only.
            let _ = serve(&stream, &shared);
            let _ = stream.shutdown(Shutdown::Both);
        };
        if std::thread::Builder::new().name("s3ro-conn".into()).stack_size(256 << 10).spawn(serve).is_err() {
            return;
        }
    }
}

/// The parts of a request that matter here.
#[derive(Default)]
struct Head {
    method: String,
    path: Vec<u8>,
    query: Vec<(Vec<u8>, Vec<u8>)>,
    range: Option<String>,
    if_match: Option<String>,
    if_none_match: Option<String>,
}

impl Head {
    fn param(&self, name: &str) -> Option<&[u8]> {
        self.query.iter().find(|(n, _)| n == name.as_bytes()).map(|(_, v)| v.as_slice())
    }
}

/// Reads one request with its body; `None` at the end of the connection.
fn read_head(reader: &mut impl BufRead) -> std::io::Result<Option<Head>> {
    let mut line = String::new();
    let mut next = |reader: &mut dyn BufRead| -> std::io::Result<Option<String>> {
        line.clear();
        let size = Read::take(reader, LINE_LIMIT_BYTES).read_line(&mut line)?;
        Ok((size > 0).then(|| line.trim_end().to_string()))
    };
    let Some(first) = next(reader)? else { return Ok(None) };
    let mut words = first.split(' ');
    let mut head = Head { method: words.next().unwrap_or("").to_string(), ..Head::default() };
    let target = words.next().unwrap_or("/");
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    head.path = percent_decode_str(path).collect();
    head.query = query
        .split('&')
        .filter(|p| !p.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(n, v)| (percent_decode_str(n).collect(), percent_decode_str(&v.replace('+', " ")).collect()))
        .collect();
    let mut body = 0u64;
    while let Some(line) = next(reader)?.filter(|l| !l.is_empty()) {
        let Some((name, value)) = line.split_once(':') else { continue };
        let value = value.trim().to_string();
        match name.to_ascii_lowercase().as_str() {
            "range" => head.range = Some(value),
            "if-match" => head.if_match = Some(value),
            "if-none-match" => head.if_none_match = Some(value),
            "content-length" => body = value.parse().unwrap_or(0),
            _ => {}
        }
    }
    std::io::copy(&mut Read::take(reader, body), &mut std::io::sink())?;
    Ok(Some(head))
}

fn serve(stream: &TcpStream, shared: &Shared) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    while let Some(head) = read_head(&mut reader)? {
        if let Some(side) = head.path.strip_prefix(b"/-/") {
            if side == b"reset" {
                shared.counters.reset();
            }
            let text = serde_json::to_string(&shared.counters.read()).map_err(std::io::Error::other)?;
            say(stream, 200, "application/json", &text, false)?;
            continue;
        }
        if !shared.latency.is_zero() {
            std::thread::sleep(shared.latency);
        }
        answer(stream, shared, &head)?;
    }
    Ok(())
}

fn say(mut stream: &TcpStream, status: u16, kind: &str, body: &str, head_only: bool) -> std::io::Result<()> {
    let body_sent = if head_only { "" } else { body };
    let text = format!(
        "HTTP/1.1 {status} -\r\nServer: efc-s3ro\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n{body_sent}",
        body.len()
    );
    stream.write_all(text.as_bytes())
}

fn refuse(stream: &TcpStream, status: u16, code: &str, head_only: bool) -> std::io::Result<()> {
    let mut x = Xml::new("Error", "");
    x.text("Code", code).text("Message", code);
    say(stream, status, "application/xml", &x.finish("Error"), head_only)
}

fn answer(stream: &TcpStream, shared: &Shared, head: &Head) -> std::io::Result<()> {
    let head_only = head.method == "HEAD";
    let path = head.path.strip_prefix(b"/").unwrap_or(&head.path);
    let slash = path.iter().position(|b| *b == b'/').unwrap_or(path.len());
    let name = String::from_utf8_lossy(&path[..slash]);
    let key = path.get(slash + 1..).unwrap_or(&[]);
    let count = |counter: &AtomicU64| counter.fetch_add(1, Relaxed);
    if !head_only && head.method != "GET" {
        count(&shared.counters.other);
        return refuse(stream, 403, "AccessDenied", false);
    }
    let Some(objects) = shared.buckets.get(name.as_ref()) else {
        count(&shared.counters.other);
        return match name.is_empty() {
            true => say(stream, 200, "application/xml", &list_buckets(shared), head_only),
            false => refuse(stream, 404, "NoSuchBucket", head_only),
        };
    };
    if key.is_empty() {
        let location = head.param("location").is_some();
        count(if head_only || location { &shared.counters.other } else { &shared.counters.list });
        let body = match location {
            true => Xml::new("LocationConstraint", "").finish("LocationConstraint"),
            false => list(&name, objects, head),
        };
        return say(stream, 200, "application/xml", if head_only { "" } else { &body }, head_only);
    }
    count(if head_only { &shared.counters.head } else { &shared.counters.get });
    match objects.get(key) {
        Some(entry) => object(stream, shared, head, entry),
        None => refuse(stream, 404, "NoSuchKey", head_only),
    }
}

fn object(mut stream: &TcpStream, shared: &Shared, head: &Head, entry: &Entry) -> std::io::Result<()> {
    let head_only = head.method == "HEAD";
    let matches = |list: &str| {
        list.split(',').any(|t| t.trim() == "*" || t.trim().trim_matches('"') == entry.etag.trim_matches('"'))
    };
    if head.if_match.as_ref().is_some_and(|v| !matches(v)) {
        return refuse(stream, 412, "PreconditionFailed", head_only);
    }
    if head.if_none_match.as_ref().is_some_and(|v| matches(v)) {
        let text = format!("HTTP/1.1 304 -\r\nETag: {}\r\n\r\n", entry.etag);
        return stream.write_all(text.as_bytes());
    }
    let (start, end) = match byte_range(head.range.as_deref(), entry.size) {
        Some(range) => range,
        None => return refuse(stream, 416, "InvalidRange", head_only),
    };
    let partial = head.range.is_some();
    let content_range = match partial {
        true => format!("Content-Range: bytes {start}-{}/{}\r\n", end.saturating_sub(1), entry.size),
        false => String::new(),
    };
    let text = format!(
        "HTTP/1.1 {} -\r\nServer: efc-s3ro\r\nAccept-Ranges: bytes\r\nContent-Type: binary/octet-stream\r\nLast-Modified: {}\r\nETag: {}\r\n{content_range}Content-Length: {}\r\n\r\n",
        if partial { 206 } else { 200 },
        http_date(entry.modified),
        entry.etag,
        end - start
    );
    let file = if head_only { None } else { Some(File::open(&entry.path)?) };
    stream.write_all(text.as_bytes())?;
    let Some(file) = file else { return Ok(()) };
    let mut at = start;
    while at < end {
        let size = (end - at).min(SEND_BYTES) as usize;
        let sent = sendfile(stream, &file, Some(&mut at), size)?;
        if sent == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        shared.counters.bytes.fetch_add(sent as u64, Relaxed);
    }
    Ok(())
}

/// `None` when the range cannot be satisfied. A header this server does not understand asks for the whole object.
fn byte_range(header: Option<&str>, size: u64) -> Option<(u64, u64)> {
    let Some((first, last)) = header.and_then(|h| h.strip_prefix("bytes=")).and_then(|r| r.split_once('-')) else {
        return Some((0, size));
    };
    let (start, end) = match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), Ok(last)) => (first, last.saturating_add(1).min(size)),
        (Ok(first), Err(_)) => (first, size),
        (Err(_), Ok(suffix)) => (size.saturating_sub(suffix), size),
        (Err(_), Err(_)) => (0, size),
    };
    (start < end).then_some((start, end))
}

fn list_buckets(shared: &Shared) -> String {
    let root = "ListAllMyBucketsResult";
    let mut x = Xml::new(root, "");
    x.open("Buckets");
    for name in shared.buckets.keys() {
        x.open("Bucket").text("Name", name).text("CreationDate", &iso_date(SystemTime::UNIX_EPOCH)).close("Bucket");
    }
    x.close("Buckets");
    x.finish(root)
}

fn list(bucket: &str, objects: &BTreeMap<Vec<u8>, Entry>, head: &Head) -> String {
    let bytes = |name: &str| head.param(name).unwrap_or(&[]).to_vec();
    let v2 = head.param("list-type") == Some(b"2");
    let url = head.param("encoding-type") == Some(b"url");
    let after = ["continuation-token", "start-after", "marker"].iter().map(|n| bytes(n)).find(|v| !v.is_empty());
    let limit = std::str::from_utf8(&bytes("max-keys")).ok().and_then(|v| v.parse().ok()).unwrap_or(1000).min(1000);
    let query =
        Query { prefix: bytes("prefix"), delimiter: bytes("delimiter"), after: after.unwrap_or_default(), limit };
    let found = page(objects, &query);
    let root = "ListBucketResult";
    let mut x = Xml::new(root, " xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"");
    x.text("Name", bucket).key("Prefix", &query.prefix, url).key("Delimiter", &query.delimiter, url);
    x.value("MaxKeys", limit).value("IsTruncated", found.next.is_some());
    if url {
        x.text("EncodingType", "url");
    }
    if v2 {
        x.value("KeyCount", found.contents.len() + found.prefixes.len());
    }
    if let Some(next) = &found.next {
        x.key(if v2 { "NextContinuationToken" } else { "NextMarker" }, next, url && !v2);
    }
    for (key, entry) in found.contents {
        x.open("Contents").key("Key", key, url).text("LastModified", &iso_date(entry.modified));
        x.text("ETag", &entry.etag).value("Size", entry.size).text("StorageClass", "STANDARD").close("Contents");
    }
    for prefix in found.prefixes {
        x.open("CommonPrefixes").key("Prefix", &prefix, url).close("CommonPrefixes");
    }
    x.finish(root)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::Connection;

    #[test]
    fn serves_ranges_listings_and_counts() {
        let dir = crate::scratch("s3ro").unwrap();
        std::fs::create_dir_all(dir.path().join("bkt/d")).unwrap();
        std::fs::write(dir.path().join("bkt/a b"), b"0123456789").unwrap();
        std::fs::write(dir.path().join("bkt/d/empty"), b"").unwrap();
        let server = S3Ro::start(dir.path(), Duration::ZERO).unwrap();
        assert_eq!(server.buckets(), [("bkt", 2)]);
        let target = server.target();
        let mut connection = Connection::open(target.authority()).unwrap();
        let mut get =
            |path: &str, extra: &[(&str, &str)]| target.request_on(&mut connection, "GET", path, extra, b"").unwrap();
        let whole = get("/bkt/a%20b", &[]);
        assert_eq!((whole.status, whole.body.as_slice()), (200, b"0123456789".as_slice()));
        let etag = whole.header("etag").unwrap().to_string();
        let part = get("/bkt/a%20b", &[("range", "bytes=2-4"), ("if-match", &etag)]);
        assert_eq!(
            (part.status, part.body.as_slice(), part.header("content-range")),
            (206, b"234".as_slice(), Some("bytes 2-4/10"))
        );
        assert_eq!(get("/bkt/a%20b", &[("range", "bytes=-3")]).body, b"789");
        assert_eq!(get("/bkt/a%20b", &[("range", "bytes=10-")]).status, 416);
        assert_eq!(get("/bkt/a%20b", &[("if-match", "\"x\"")]).status, 412);
        assert_eq!(get("/bkt/a%20b", &[("if-none-match", &etag)]).status, 304);
        assert_eq!(get("/bkt/d/empty", &[]).body, b"");
        assert_eq!(get("/bkt/none", &[]).status, 404);
        assert_eq!(get("/none/x", &[]).status, 404);
        let listing = get("/bkt?list-type=2&delimiter=%2F&max-keys=1", &[]).text();
        assert!(listing.contains("<Key>a b</Key>") && listing.contains("<NextContinuationToken>a b<"), "{listing}");
        let listing = get("/bkt?list-type=2&delimiter=%2F&continuation-token=a%20b", &[]).text();
        assert!(listing.contains("<Prefix>d/</Prefix>") && !listing.contains("<Key>"), "{listing}");
        assert_eq!(server.stats(), S3RoStats { get: 8, head: 0, list: 2, other: 1, bytes: 16 });
        assert!(get("/-/stats", &[]).text().contains("\"get\":8"));
        server.reset_stats();
        assert_eq!(server.stats(), S3RoStats::default());
    }
}
