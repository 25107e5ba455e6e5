//! Sockets, faults and counters of the test store; see the folder's module.

use super::auth::authenticate;
use super::error::ApiError;
use super::fault::{Action, Fault, Faults, Stats, bump};
use super::request::Req;
use super::store::{Object, State};
use super::{Dialect, Identity, OssOptions, Reply, authorize, dispatch, operation};
use anyhow::{Context as _, Result};
use axum::Router;
use axum::body::Body;
use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::http::{Request, Response, StatusCode};
use axum::serve::{IncomingStream, Listener};
use base64::prelude::{BASE64_STANDARD, Engine};
use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

/// Bodies beyond this are refused: one PUT of OSS and S3 is limited to it.
const BODY_LIMIT_BYTES: usize = 5 << 30;
/// Bodies leave in pieces of at most this size, so that counters and faults meet them finely.
const PIECE_BYTES: usize = 256 << 10;

/// What all requests share.
#[derive(Debug)]
struct Shared {
    options: OssOptions,
    identities: Mutex<Vec<Identity>>,
    state: Mutex<State>,
    faults: Mutex<Faults>,
    stats: Mutex<Stats>,
    bytes_out: AtomicU64,
    in_flight: AtomicU64,
    next_request: AtomicU64,
}

/// A running test store; stopped on drop. It has threads and a runtime of its own, so a paused clock or a blocked runtime in the test does not
/// reach it.
#[derive(Debug)]
pub struct OssServer {
    shared: Arc<Shared>,
    addr: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl OssServer {
    /// Starts an empty OSS on a port of loopback, with the identity `efckey`/`efcsecret` and the region `cn-hangzhou`.
    ///
    /// # Errors
    /// When no socket or thread can be had.
    pub fn start() -> Result<OssServer> {
        OssServer::start_with(OssOptions::default())
    }

    /// Starts with options.
    ///
    /// # Errors
    /// As [`OssServer::start`].
    pub fn start_with(options: OssOptions) -> Result<OssServer> {
        let shared = Arc::new(Shared {
            identities: Mutex::new(options.identities.clone()),
            options,
            state: Mutex::default(),
            faults: Mutex::default(),
            stats: Mutex::default(),
            bytes_out: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            next_request: AtomicU64::new(1),
        });
        let addr = SocketAddr::from(([127, 0, 0, 1], shared.options.port));
        let mut server = OssServer { shared, addr, stop: None, thread: None };
        server.start_again()?;
        Ok(server)
    }

    /// Dies as by SIGKILL: connections are cut, requests that were not worked on yet never are, further ones are refused. What it stored stays.
    pub fn kill(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }

    /// Does it serve?
    pub fn is_up(&self) -> bool {
        self.thread.is_some()
    }

    /// Serves again after [`OssServer::kill`], at the same address.
    ///
    /// # Errors
    /// As [`OssServer::start`].
    pub fn start_again(&mut self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("oss-server")
            .enable_all()
            .build()
            .context("start a runtime")?;
        let listener = runtime.block_on(TcpListener::bind(self.addr));
        let listener = listener.with_context(|| format!("listen on {}", self.addr))?;
        self.addr = listener.local_addr()?;
        let (stop, stopped) = oneshot::channel();
        let app = {
            let shared = self.shared.clone();
            let handle = move |ConnectInfo(line): ConnectInfo<Line>, request: Request<Body>| {
                answer(shared.clone(), line, request)
            };
            Router::new().fallback(handle).into_make_service_with_connect_info::<Line>()
        };
        let run = move || {
            runtime.block_on(async move {
                tokio::select! {
                    _ = axum::serve(Door(listener), app) => {}
                    _ = stopped => {}
                }
            });
            // Open connections are cut, as when a server dies.
            runtime.shutdown_background();
        };
        self.thread = Some(std::thread::Builder::new().name("oss-server".into()).spawn(run)?);
        self.stop = Some(stop);
        Ok(())
    }

    /// Address it listens on.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// `http://127.0.0.1:PORT`: path style.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Endpoint, first identity and region, for set-up code that speaks S3 (dialect S3 only).
    pub fn target(&self) -> crate::S3Target {
        let identities = self.shared.identities.lock();
        let (key_id, secret) = identities.first().map(|i| (i.key_id.clone(), i.secret.clone())).unwrap_or_default();
        crate::S3Target { endpoint: self.endpoint(), region: self.shared.options.region.clone(), key_id, secret }
    }

    /// Makes an empty private bucket without a request.
    pub fn create_bucket(&self, name: &str) {
        self.shared.state.lock().entry(name.to_string()).or_default();
    }

    /// Opens a bucket to anonymous readers (`public-read`), closes it again (`private`).
    pub fn set_acl(&self, bucket: &str, acl: &str) {
        self.shared.state.lock().entry(bucket.to_string()).or_default().acl = acl.into();
    }

    /// Puts an object without a request; makes the bucket if needed.
    pub fn put(&self, bucket: &str, key: impl AsRef<[u8]>, body: impl Into<Bytes>) {
        let headers = BTreeMap::from([("content-type".to_string(), "application/octet-stream".to_string())]);
        let object = Object::normal(self.shared.options.dialect, body.into(), headers);
        let mut state = self.shared.state.lock();
        state.entry(bucket.to_string()).or_default().objects.insert(key.as_ref().to_vec(), Arc::new(object));
    }

    /// The content of an object, read without a request.
    pub fn get(&self, bucket: &str, key: impl AsRef<[u8]>) -> Option<Bytes> {
        self.shared.state.lock().get(bucket)?.objects.get(key.as_ref()).map(|o| o.content())
    }

    /// Removes an object without a request. True if it was there.
    pub fn remove(&self, bucket: &str, key: impl AsRef<[u8]>) -> bool {
        self.shared.state.lock().get_mut(bucket).is_some_and(|b| b.objects.remove(key.as_ref()).is_some())
    }

    /// Puts a key under retention: it is neither replaced nor deleted.
    pub fn lock(&self, bucket: &str, key: impl AsRef<[u8]>) {
        self.shared.state.lock().entry(bucket.to_string()).or_default().locked.insert(key.as_ref().to_vec());
    }

    /// Turns versioning on, with which OSS ignores forbid-overwrite. Older versions are not kept.
    pub fn set_versioned(&self, bucket: &str) {
        self.shared.state.lock().entry(bucket.to_string()).or_default().versioned = true;
    }

    /// The headers an object keeps, user metadata among them, read without a request.
    pub fn headers(&self, bucket: &str, key: impl AsRef<[u8]>) -> Option<BTreeMap<String, String>> {
        self.shared.state.lock().get(bucket)?.objects.get(key.as_ref()).map(|o| o.headers.clone())
    }

    /// All keys of a bucket, in order.
    pub fn keys(&self, bucket: &str) -> Vec<Vec<u8>> {
        self.shared.state.lock().get(bucket).map_or_else(Vec::new, |b| b.objects.keys().cloned().collect())
    }

    /// Uploads of a bucket that were begun and not ended.
    pub fn open_uploads(&self, bucket: &str) -> usize {
        self.shared.state.lock().get(bucket).map_or(0, |b| b.uploads.len())
    }

    /// Replaces who may come: rotated keys, expired tokens.
    pub fn set_identities(&self, identities: Vec<Identity>) {
        *self.shared.identities.lock() = identities;
    }

    /// Adds a rule that makes requests fail.
    pub fn fault(&self, fault: Fault) {
        self.shared.faults.lock().add(fault);
    }

    /// Removes all rules. Requests already harmed stay harmed.
    pub fn clear_faults(&self) {
        self.shared.faults.lock().clear();
    }

    /// The counters.
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// Zeroes the counters.
    pub fn reset_stats(&self) {
        self.shared.reset_stats();
    }

    /// Waits for ever: for a program that is only this server.
    pub fn join(mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for OssServer {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Shared {
    fn stats(&self) -> Stats {
        Stats { bytes_out: self.bytes_out.load(Relaxed), ..self.stats.lock().clone() }
    }

    fn reset_stats(&self) {
        *self.stats.lock() = Stats::default();
        self.bytes_out.store(0, Relaxed);
    }

    /// Authenticates, authorizes and runs one operation.
    fn handle(&self, op: &str, req: &mut Req) -> Result<Reply, ApiError> {
        let identities = self.identities.lock().clone();
        let access = authenticate(req, &identities, &self.options.region)?;
        bump(&mut self.stats.lock().signatures, access.scheme.name());
        if req.own_header("content-sha256").is_some_and(|v| v.starts_with("STREAMING-")) {
            req.unchunk()?;
        }
        let mut state = self.state.lock();
        authorize(op, req, &access, &state)?;
        dispatch(op, req, &mut state, &self.options.region)
    }

    /// Gives the object other bytes of the same length.
    fn mutate(&self, req: &Req) {
        let mut state = self.state.lock();
        let Some(slot) = state.get_mut(req.bucket_name()).and_then(|b| b.objects.get_mut(&req.key)) else { return };
        let flipped: Vec<u8> = slot.content().iter().map(|b| !b).collect();
        let mut changed = Object::normal(self.options.dialect, flipped.into(), slot.headers.clone());
        // Times of object stores have whole seconds: a change shows in them.
        changed.modified = changed.modified.max(slot.modified + Duration::from_secs(1));
        *slot = Arc::new(changed);
    }
}

/// One request, from its head to the body of its answer.
async fn answer(shared: Arc<Shared>, line: Line, request: Request<Body>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let Ok(body) = Limited::new(body, BODY_LIMIT_BYTES).collect().await else {
        return plain(StatusCode::BAD_REQUEST, "the request's body ended early or is too large\n".into());
    };
    let body = body.to_bytes();
    if let Some(side) = parts.uri.path().strip_prefix("/-/") {
        return side_door(&shared, parts.method.as_str(), side, &body);
    }
    let open = InFlight::enter(shared.clone());
    let mut req = Req::new(shared.options.dialect, &shared.options.domain, &parts, body);
    let op = operation(&req);
    let actions = shared.faults.lock().strike(op, &req.key);
    {
        let mut stats = shared.stats.lock();
        bump(&mut stats.requests, op);
        stats.bytes_in += req.body.len() as u64;
        stats.range_gets += u64::from(op == "get" && req.header("range").is_some());
        stats.faults += u64::from(!actions.is_empty());
    }
    let mut forced = None;
    for action in &actions {
        match action {
            Action::Latency { ms } => tokio::time::sleep(Duration::from_millis(*ms)).await,
            Action::Mutate => shared.mutate(&req),
            Action::Status { status, code } => forced = Some(injected_error(*status, code)),
            Action::Drop => line.cut(),
            _ => {}
        }
    }
    let result = match forced {
        Some(e) => Err(e),
        None => shared.handle(op, &mut req),
    };
    let request_id = format!("EFC{:021X}", shared.next_request.fetch_add(1, Relaxed));
    let mut reply = result.unwrap_or_else(|e| {
        bump(&mut shared.stats.lock().errors, &e.code);
        error_reply(&req, &e, &request_id)
    });
    if req.method == "HEAD" {
        reply.chunks.clear();
    }
    send(reply, request_id, actions, line, open)
}

fn injected_error(status: u16, code: &str) -> ApiError {
    let usual = match status {
        403 => "AccessDenied",
        404 => "NoSuchKey",
        429 => "TooManyRequests",
        503 => "ServiceUnavailable",
        _ => "InternalError",
    };
    ApiError::new(status, if code.is_empty() { usual } else { code }, "An injected fault.")
}

/// A HEAD has no body: OSS sends the document in a header then.
fn error_reply(req: &Req, e: &ApiError, request_id: &str) -> Reply {
    let document = e.document(req.dialect, request_id, &req.host);
    let mut reply = Reply::new(e.status);
    for (name, value) in &e.headers {
        reply = reply.header(name, value.clone());
    }
    if req.dialect == Dialect::Oss {
        reply = reply.header("x-oss-ec", "0000-00000000");
        if req.method == "HEAD" {
            reply = reply.header("x-oss-err", BASE64_STANDARD.encode(&document));
        }
    }
    reply.xml(document)
}

fn plain(status: StatusCode, text: String) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    response
}

/// The unsigned side door for tests in other processes.
fn side_door(shared: &Shared, method: &str, path: &str, body: &[u8]) -> Response<Body> {
    let json = |value: serde_json::Result<String>| match value {
        Ok(text) => plain(StatusCode::OK, text + "\n"),
        Err(e) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{e}\n")),
    };
    match (method, path) {
        ("GET", "stats") => json(serde_json::to_string(&shared.stats())),
        ("GET" | "POST", "reset") => {
            shared.reset_stats();
            plain(StatusCode::OK, String::new())
        }
        ("GET", "fault") => json(serde_json::to_string(&shared.faults.lock().list())),
        ("POST", "fault") => match serde_json::from_slice::<Fault>(body) {
            Ok(fault) => {
                shared.faults.lock().add(fault);
                plain(StatusCode::OK, String::new())
            }
            Err(e) => plain(StatusCode::BAD_REQUEST, format!("not a fault: {e}\n")),
        },
        ("DELETE", "fault") => {
            shared.faults.lock().clear();
            plain(StatusCode::OK, String::new())
        }
        _ => plain(StatusCode::NOT_FOUND, "GET stats, POST reset, GET|POST|DELETE fault\n".into()),
    }
}

/// Counts a request as open while it lives; it is moved into the answer's body.
struct InFlight(Arc<Shared>);

impl InFlight {
    fn enter(shared: Arc<Shared>) -> InFlight {
        let now = shared.in_flight.fetch_add(1, Relaxed) + 1;
        let mut stats = shared.stats.lock();
        stats.in_flight_max = stats.in_flight_max.max(now);
        drop(stats);
        InFlight(shared)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Relaxed);
    }
}

/// Makes the HTTP answer, its body harmed as the faults say.
fn send(reply: Reply, request_id: String, actions: Vec<Action>, line: Line, open: InFlight) -> Response<Body> {
    let dialect = open.0.options.dialect;
    let mut builder = Response::builder().status(reply.status).header("content-length", reply.length);
    let (id, server) = match dialect {
        Dialect::Oss => ("x-oss-request-id", "AliyunOSS"),
        Dialect::S3 => ("x-amz-request-id", "AmazonS3"),
    };
    builder = builder.header(id, request_id).header("server", server);
    builder = builder.header("date", crate::sign::http_date(SystemTime::now()));
    if dialect == Dialect::Oss {
        builder = builder.header("x-oss-server-time", "1");
    }
    for (name, value) in &reply.headers {
        builder = builder.header(name, value);
    }
    if matches!(reply.status, 204 | 304)
        && let Some(headers) = builder.headers_mut()
    {
        headers.remove("content-length");
    }
    let outlet = Outlet { chunks: reply.chunks.into(), actions, sent: 0, line, open };
    let body = Body::from_stream(futures::stream::unfold(outlet, Outlet::next));
    builder.body(body).unwrap_or_else(|e| plain(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()))
}

/// The bytes of a body on their way out.
struct Outlet {
    chunks: std::collections::VecDeque<Bytes>,
    actions: Vec<Action>,
    sent: u64,
    line: Line,
    open: InFlight,
}

impl Outlet {
    async fn next(mut self) -> Option<(std::io::Result<Bytes>, Outlet)> {
        let mut room = PIECE_BYTES as u64;
        let mut at = 0;
        while at < self.actions.len() {
            let end = match &self.actions[at] {
                Action::Reset { after_bytes }
                | Action::Truncate { after_bytes }
                | Action::Pause { after_bytes, .. } => *after_bytes,
                _ => u64::MAX,
            };
            if self.sent < end {
                room = room.min(end - self.sent);
                at += 1;
                continue;
            }
            // What was given so far is flushed before the harm is done.
            tokio::task::yield_now().await;
            match self.actions.remove(at) {
                Action::Pause { ms, .. } => tokio::time::sleep(Duration::from_millis(ms)).await,
                harm => {
                    if matches!(harm, Action::Reset { .. }) {
                        self.line.cut();
                    }
                    self.chunks.clear();
                    self.actions.clear();
                    return Some((Err(std::io::Error::other("an injected fault")), self));
                }
            }
        }
        let mut front = self.chunks.pop_front()?;
        if front.len() as u64 > room {
            let rest = front.split_off(room as usize);
            self.chunks.push_front(rest);
        }
        for action in &self.actions {
            if let Action::Corrupt { at_byte } = action
                && let Some(i) = at_byte.checked_sub(self.sent).filter(|i| *i < front.len() as u64)
            {
                let mut bent = front.to_vec();
                bent[i as usize] = !bent[i as usize];
                front = bent.into();
            }
        }
        self.sent += front.len() as u64;
        self.open.0.bytes_out.fetch_add(front.len() as u64, Relaxed);
        Some((Ok(front), self))
    }
}

/// The handle by which a request's handler can cut its own connection.
#[derive(Debug, Clone, Default)]
struct Line(Arc<AtomicBool>);

impl Line {
    /// From now on nothing more is sent, and the socket is closed with a reset.
    fn cut(&self) {
        self.0.store(true, Relaxed);
    }
}

impl Connected<IncomingStream<'_, Door>> for Line {
    fn connect_info(stream: IncomingStream<'_, Door>) -> Line {
        stream.io().line.clone()
    }
}

/// The listener: its sockets can be cut.
struct Door(TcpListener);

impl Listener for Door {
    type Io = Socket;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Socket, SocketAddr) {
        let (tcp, peer) = Listener::accept(&mut self.0).await;
        let _ = tcp.set_nodelay(true);
        (Socket { tcp, line: Line::default() }, peer)
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

struct Socket {
    tcp: TcpStream,
    line: Line,
}

impl Socket {
    /// A socket with linger 0 sends RST when it is closed.
    fn check(&self) -> std::io::Result<()> {
        if self.line.0.load(Relaxed) {
            let _ = socket2::SockRef::from(&self.tcp).set_linger(Some(Duration::ZERO));
            return Err(std::io::ErrorKind::ConnectionReset.into());
        }
        Ok(())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = self.check();
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.tcp).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.tcp).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.tcp).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }
}
