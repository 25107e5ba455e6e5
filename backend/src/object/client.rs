//! One HTTP/1.1 client for one bucket: addresses, signs and sends a request once, and turns every answer that is no success into an
//! error with kind, retry verdict and cure. Called by [`super::ObjectBackend`] only.
//!
//! It stands on hyper's own client (the engine below reqwest), because reqwest takes URLs only as `url::Url`, which folds `.` and
//! `..` segments of a path away, encoded or not: keys such as `a/../b` could not be asked for. It also hands us hyper's buffers untouched.
//!
//! What must stay true: the bytes that are signed are the bytes that are sent; every wait has a deadline (connect, each piece of our body that is
//! taken, and first byte: `timeout`, then `timeout` between two pieces of the answer); connections belong to the client and end with it.
//!
//! What is signed of a body: OSS never signs content. S3 takes a SHA-256 of it or the word UNSIGNED-PAYLOAD; over https we send the word, as SDKs do,
//! because TLS protects the content already; over http the hash, since nothing else guards it and some servers insist. `payload_hash` overrules.

use super::body::{Pieces, Progress, total};
use super::credentials::{Credentials, Held};
use super::error::{self, About, Label};
use super::sign::{self, Signature, Target};
use bytes::Bytes;
use efc_common::source::{SourceKind, SourceSpec};
use efc_common::task::TaskGroup;
use efc_common::units::parse_duration;
use efc_common::{Error, Kind, Result, Retry};
use http::header::{CONTENT_LENGTH, HOST, USER_AGENT};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, Uri};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client as Engine;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioTimer;
use parking_lot::RwLock;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::fmt::{self, Display};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::time::{Instant, timeout_at};
use tracing::trace;

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(15);
const DEFAULT_CONNECTIONS: usize = 64;
/// Stores close idle connections after 20 s (S3) to 60 s (OSS): we close first, so that no request meets a closing connection.
const IDLE_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest error body that is read.
const ERROR_BYTES_MAX: usize = 64 << 10;
/// Bodies up to this are hashed whatever the policy: they are documents, or cost nothing.
const HASH_ALWAYS_BYTES: u64 = 16 << 10;
/// Bodies from this on are hashed beside the runtime's threads.
const HASH_ASIDE_BYTES: u64 = 1 << 20;

/// How this store differs from its sibling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// S3.
    S3,
    /// OSS, native.
    Oss,
}

impl Dialect {
    /// The one of two that fits.
    pub(crate) fn pick<T>(self, s3: T, oss: T) -> T {
        match self {
            Dialect::S3 => s3,
            Dialect::Oss => oss,
        }
    }
}

/// A request.
pub(crate) struct Call<'a> {
    /// Method.
    pub(crate) method: Method,
    /// Raw key; empty for the bucket itself.
    pub(crate) key: &'a [u8],
    /// Parameters: name and raw value.
    pub(crate) query: &'a [(&'static str, &'a [u8])],
    /// Headers of this request.
    pub(crate) headers: Vec<(HeaderName, HeaderValue)>,
    /// The body, in pieces.
    pub(crate) body: &'a [Bytes],
    /// How much longer than `timeout` the store may work before it answers.
    pub(crate) patience: Duration,
}

impl<'a> Call<'a> {
    /// A request without parameters, headers and body.
    pub(crate) fn new(method: Method, key: &'a [u8]) -> Call<'a> {
        Call { method, key, query: &[], headers: Vec::new(), body: &[], patience: Duration::ZERO }
    }
}

/// Method, key, parameters and conditions, for logs.
impl Display for Call<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, self.key.escape_ascii())?;
        self.query.iter().try_for_each(|(name, value)| write!(f, " {name}={}", value.escape_ascii()))?;
        let conditions = self.headers.iter().filter(|(name, _)| name.as_str().contains("if-"));
        conditions.into_iter().try_for_each(|(name, value)| write!(f, " {name}: {}", value.as_bytes().escape_ascii()))
    }
}

/// See the module.
pub(crate) struct Client {
    engine: Engine<HttpsConnector<HttpConnector>, Pieces>,
    tasks: TaskGroup,
    signature: Signature,
    /// Replaced by others while requests are under way: each goes on with those that it began with.
    credentials: RwLock<Arc<Credentials>>,
    /// `http://host[:port]`, the host with the bucket unless path style.
    base: String,
    host: String,
    path_style: bool,
    hash_payload: bool,
    timeout: Duration,
    pub(crate) dialect: Dialect,
    pub(crate) about: About,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.tasks.cancel();
    }
}

/// Runs hyper's connection tasks in the client's group.
#[derive(Clone)]
struct Spawner(TaskGroup);

impl<F> hyper::rt::Executor<F> for Spawner
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, future: F) {
        self.0.spawn(async {
            future.await;
        });
    }
}

impl Client {
    /// Reads the options of `spec`; sends nothing.
    pub(crate) fn new(spec: &SourceSpec, credentials: Credentials) -> Result<Client> {
        let dialect = match spec.kind {
            SourceKind::S3 => Dialect::S3,
            SourceKind::Oss => Dialect::Oss,
            other => return Err(invalid(format!("{}:// is no object store", other.scheme()))),
        };
        check_bucket(&spec.bucket)?;
        let timeout = spec.option("timeout").map_or(Ok(DEFAULT_TIMEOUT), parse_duration)?;
        let connections = match spec.option("connections") {
            None => DEFAULT_CONNECTIONS,
            Some(n) => (n.parse().ok().filter(|n| (1..=4096).contains(n)))
                .ok_or_else(|| invalid(format!("connections={n} must be a number from 1 to 4096")))?,
        };
        let (scheme, service) = (spec.endpoint.split_once("://"))
            .ok_or_else(|| invalid(format!("endpoint `{}` must be http[s]://host[:port]", spec.endpoint)))?;
        let path_style = path_style(spec, scheme, service)?;
        let hash_payload = match spec.option("payload_hash") {
            None => scheme != "https",
            Some("true") => true,
            Some("false") => false,
            Some(other) => return Err(invalid(format!("payload_hash={other} must be true or false"))),
        };
        let host = if path_style { service.to_string() } else { format!("{}.{service}", spec.bucket) };
        let base = format!("{scheme}://{host}");
        base.parse::<Uri>().map_err(|e| invalid(format!("endpoint `{}` is no address", spec.endpoint)).caused_by(e))?;
        let tasks = TaskGroup::new();
        let engine = Engine::builder(Spawner(tasks.clone()))
            .pool_max_idle_per_host(connections)
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_timer(TokioTimer::new())
            .build(connector(spec, scheme == "https", timeout)?);
        let about = About {
            bucket: spec.bucket.clone(),
            endpoint: spec.endpoint.clone(),
            credentials: Label::new(credentials.label()),
        };
        let signature = signature(spec, dialect, service)?;
        Ok(Client {
            engine,
            tasks,
            signature,
            credentials: RwLock::new(Arc::new(credentials)),
            base,
            host: without_default_port(&host, scheme),
            path_style,
            hash_payload,
            timeout,
            dialect,
            about,
        })
    }

    /// Is it Amazon's own service, and not one that resembles it?
    pub(crate) fn is_amazon(&self) -> bool {
        let host = host_name(&self.host);
        self.dialect == Dialect::S3 && (host.ends_with(".amazonaws.com") || host.ends_with(".amazonaws.com.cn"))
    }

    /// From now on requests are signed with these.
    pub(crate) fn replace_credentials(&self, credentials: Credentials) {
        self.about.credentials.replace(credentials.label());
        *self.credentials.write() = Arc::new(credentials);
    }

    /// Sends `call` once. Answers with status 2xx come back as they are, with their body still to be read.
    pub(crate) async fn send(&self, call: &Call<'_>) -> Result<Response<Incoming>> {
        let credentials = self.credentials.read().clone();
        let held = credentials.get().await?;
        let payload = match held {
            Some(_) => self.payload(call.body).await?,
            None => String::new(),
        };
        let request = self.request(call, held.as_deref(), &payload)?;
        let progress = request.body().progress();
        trace!(request = %call, "asks the store");
        let answer = match self.within(&progress, call.patience, self.engine.request(request)).await? {
            Ok(answer) => {
                trace!(request = %call, status = answer.status().as_u16(), "the store answers");
                answer
            }
            Err(e) => {
                let connecting = e.is_connect();
                return Err(error::unreachable(&self.about, e, connecting));
            }
        };
        if answer.status().is_success() {
            return Ok(answer);
        }
        let (head, body) = answer.into_parts();
        // An error body that breaks off still has a status.
        let body = self.collect(body, ERROR_BYTES_MAX).await.unwrap_or_default();
        let (error, document) = error::refused(&self.about, head.status, &head.headers, &body);
        let renewed = match &held {
            Some(held) if document.wants_fresh_credentials() => credentials.refused(held),
            _ => false,
        };
        Err(if renewed { error.with_retry(Retry::Later) } else { error })
    }

    /// Waits for `call` as long as it gets on.
    async fn within<T>(&self, progress: &Progress, patience: Duration, call: impl Future<Output = T>) -> Result<T> {
        let patience = self.timeout + patience;
        let mut call = std::pin::pin!(call);
        loop {
            if let Ok(answer) = timeout_at(progress.last() + patience, &mut call).await {
                return Ok(answer);
            }
            if progress.last() + patience <= Instant::now() {
                let (endpoint, ms) = (&self.about.endpoint, patience.as_millis());
                return Err(Error::new(Kind::Timeout, format!("{endpoint} did not answer within {ms} ms")));
            }
        }
    }

    /// What the signature says of a body; see the module.
    async fn payload(&self, body: &[Bytes]) -> Result<String> {
        let size = total(body);
        match self.dialect {
            Dialect::Oss => Ok(sign::UNSIGNED.into()),
            Dialect::S3 if size == 0 => Ok(sign::EMPTY_SHA256.into()),
            Dialect::S3 if size > HASH_ALWAYS_BYTES && !self.hash_payload => Ok(sign::UNSIGNED.into()),
            Dialect::S3 if size < HASH_ASIDE_BYTES => Ok(sign::hash(body)),
            Dialect::S3 => {
                let body = body.to_vec();
                let hashed = tokio::task::spawn_blocking(move || sign::hash(&body)).await;
                hashed.map_err(|e| Error::new(Kind::Cancelled, "the process is stopping").caused_by(e))
            }
        }
    }

    /// Reads a whole body of at most `max` bytes.
    pub(crate) async fn collect(&self, mut body: Incoming, max: usize) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        while let Some(piece) = self.piece(&mut body).await? {
            if out.len() + piece.len() > max {
                let message = format!("{} sent an answer of more than {max} bytes", self.about.endpoint);
                return Err(Error::new(Kind::Corrupt, message));
            }
            out.extend_from_slice(&piece);
        }
        Ok(out)
    }

    /// The next piece of a body; `None` at its end.
    pub(crate) async fn piece(&self, body: &mut Incoming) -> Result<Option<Bytes>> {
        loop {
            let frame = tokio::time::timeout(self.timeout, body.frame()).await.map_err(|_| {
                let (endpoint, ms) = (&self.about.endpoint, self.timeout.as_millis());
                Error::new(Kind::Timeout, format!("{endpoint} sent nothing for {ms} ms in the middle of an answer"))
            })?;
            match frame {
                None => return Ok(None),
                Some(Err(e)) => return Err(error::unreachable(&self.about, e, false)),
                // Trailers carry nothing for us.
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) if !data.is_empty() => return Ok(Some(data)),
                    _ => continue,
                },
            }
        }
    }

    fn request(&self, call: &Call<'_>, held: Option<&Held>, payload: &str) -> Result<http::Request<Pieces>> {
        let key = sign::encode_path(call.key);
        let path = if self.path_style { format!("/{}/{key}", self.about.bucket) } else { format!("/{key}") };
        let mut query: Vec<(String, String)> =
            call.query.iter().map(|(name, value)| ((*name).to_string(), sign::encode_query(value))).collect();
        query.sort();
        let mut headers: HeaderMap = call.headers.iter().cloned().collect();
        if let Some(held) = held {
            let resource = [b"/", self.about.bucket.as_bytes(), b"/", call.key].concat();
            let target = Target {
                method: call.method.as_str(),
                host: &self.host,
                path: &path,
                resource: &resource,
                query: &query,
                payload,
            };
            self.signature.sign(&held.keys, SystemTime::now(), &target, &mut headers)?;
        }
        let host =
            HeaderValue::from_str(&self.host).map_err(|_| invalid(format!("`{}` is no host name", self.host)))?;
        headers.insert(HOST, host);
        headers.insert(USER_AGENT, HeaderValue::from_static(concat!("efc/", env!("CARGO_PKG_VERSION"))));
        if matches!(call.method, Method::PUT | Method::POST) {
            // hyper leaves it out where a body is empty, and stores answer 411 then.
            headers.insert(CONTENT_LENGTH, HeaderValue::from(total(call.body)));
        }
        let mark = if query.is_empty() { "" } else { "?" };
        let uri = format!("{}{path}{mark}{}", self.base, sign::query(&query, false));
        let mut request = http::Request::builder()
            .method(call.method.clone())
            .uri(uri)
            .body(Pieces::new(call.body))
            .map_err(|e| invalid("the key is too long for a request".into()).caused_by(e))?;
        *request.headers_mut() = headers;
        Ok(request)
    }
}

fn invalid(message: String) -> Error {
    Error::new(Kind::Invalid, message)
}

fn check_bucket(bucket: &str) -> Result<()> {
    let fits = (1..=255).contains(&bucket.len())
        && bucket.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
        && bucket.bytes().any(|b| b != b'.');
    if fits {
        Ok(())
    } else {
        Err(invalid(format!("`{bucket}` is not a bucket name: use letters, digits, `-` and `.`")))
    }
}

/// Host and port as HTTP clients write them into Host (and the signature covers them): without the scheme's own port.
fn without_default_port(host: &str, scheme: &str) -> String {
    let port = if scheme == "https" { ":443" } else { ":80" };
    host.strip_suffix(port).unwrap_or(host).to_string()
}

/// The host without its port.
fn host_name(service: &str) -> &str {
    match service.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => service,
    }
}

fn path_style(spec: &SourceSpec, scheme: &str, service: &str) -> Result<bool> {
    let name = host_name(service);
    match spec.option("path_style") {
        Some("true") => Ok(true),
        Some("false") => Ok(false),
        Some(other) => Err(invalid(format!("path_style={other} must be true or false"))),
        // An address cannot be put behind a bucket name.
        None if name == "localhost" || name.starts_with('[') || name.parse::<std::net::Ipv4Addr>().is_ok() => Ok(true),
        // A wildcard certificate does not cover a name with one more dot.
        None => Ok(spec.kind == SourceKind::S3
            && (spec.option("endpoint").is_some() || (scheme == "https" && spec.bucket.contains('.')))),
    }
}

fn signature(spec: &SourceSpec, dialect: Dialect, service: &str) -> Result<Signature> {
    let name = host_name(service);
    let sig = spec.option("sig").unwrap_or("v4");
    match (dialect, sig) {
        (Dialect::S3, "v4") => {
            let from_host = name.strip_prefix("s3.").and_then(|n| n.strip_suffix(".amazonaws.com"));
            let region = spec.option("region").or(from_host).unwrap_or("us-east-1");
            Ok(Signature::S3 { region: region.to_string() })
        }
        (Dialect::Oss, "v1") => Ok(Signature::OssV1),
        (Dialect::Oss, "v4") => {
            let from_host = name.strip_prefix("oss-").and_then(|n| n.split('.').next());
            let from_host = from_host.map(|r| r.strip_suffix("-internal").unwrap_or(r)).filter(|r| r.contains('-'));
            let region = spec.option("region").map(|r| r.trim_start_matches("oss-")).or(from_host);
            let region = region.ok_or_else(|| {
                invalid(
                    "OSS signature v4 needs the bucket's region: set region= (for example cn-hangzhou), or sig=v1"
                        .into(),
                )
            })?;
            Ok(Signature::OssV4 { region: region.to_string() })
        }
        (Dialect::S3, other) => Err(invalid(format!("sig={other} is not offered for s3://: use v4"))),
        (Dialect::Oss, other) => Err(invalid(format!("sig={other} is unknown: use v4 or v1"))),
    }
}

/// Makes ring the process's TLS provider, once; whoever was first stays.
pub(crate) fn install_ring() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}

fn connector(spec: &SourceSpec, tls: bool, timeout: Duration) -> Result<HttpsConnector<HttpConnector>> {
    install_ring();
    let mut http = HttpConnector::new();
    http.set_nodelay(true);
    http.set_keepalive(Some(Duration::from_secs(60)));
    http.set_connect_timeout(Some(timeout));
    http.enforce_http(false);
    let mut extra = Vec::new();
    if let Some(path) = spec.option("ca_file") {
        let certificates =
            CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>);
        extra = certificates.map_err(|e| invalid(format!("ca_file={path} cannot be read as PEM: {e}")))?;
        if extra.is_empty() {
            return Err(invalid(format!("ca_file={path} holds no certificate")));
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|e| invalid("TLS cannot be set up".into()).caused_by(e))?;
    let config = if tls {
        let verifier = rustls_platform_verifier::Verifier::new_with_extra_roots(extra, provider).map_err(|e| {
            invalid("no certificate authorities on this machine: install ca-certificates, or set ca_file=".into())
                .caused_by(e)
        })?;
        config.dangerous().with_custom_certificate_verifier(Arc::new(verifier)).with_no_client_auth()
    } else {
        // Plain http never asks it.
        config.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth()
    };
    Ok(HttpsConnectorBuilder::new().with_tls_config(config).https_or_http().enable_http1().wrap_connector(http))
}

#[cfg(test)]
mod tests {
    use super::*;
    use efc_common::source::SecretRef;

    fn client(url: &str, options: &[(&str, &str)]) -> Result<Client> {
        let options = options.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let spec = SourceSpec::parse(url, options, SecretRef::Anonymous)?;
        Client::new(&spec, Credentials::new(&spec, None)?)
    }

    #[test]
    fn addresses() {
        for (url, options, base, path_style) in [
            ("s3://b", &[][..], "https://b.s3.us-east-1.amazonaws.com", false),
            ("s3://b.c", &[], "https://s3.us-east-1.amazonaws.com", true),
            ("s3://b", &[("endpoint", "http://minio:9000")], "http://minio:9000", true),
            ("s3://b", &[("endpoint", "http://minio:9000"), ("path_style", "false")], "http://b.minio:9000", false),
            ("oss://b", &[("region", "cn-hangzhou")], "https://b.oss-cn-hangzhou.aliyuncs.com", false),
            ("oss://b", &[("endpoint", "http://127.0.0.1:80"), ("sig", "v1")], "http://127.0.0.1:80", true),
            ("oss://b", &[("endpoint", "http://[::1]:80"), ("sig", "v1")], "http://[::1]:80", true),
        ] {
            let c = client(url, options).expect(url);
            assert_eq!((c.base.as_str(), c.path_style), (base, path_style), "{url} {options:?}");
        }
        assert_eq!(client("oss://b", &[("endpoint", "http://h:80"), ("sig", "v1")]).expect("c").host, "b.h");
    }

    #[test]
    fn regions() {
        for (url, options, signature) in [
            (
                "s3://b",
                &[("endpoint", "https://s3.eu-west-1.amazonaws.com")][..],
                Signature::S3 { region: "eu-west-1".into() },
            ),
            ("s3://b", &[("endpoint", "http://h")], Signature::S3 { region: "us-east-1".into() }),
            (
                "oss://b",
                &[("endpoint", "oss-cn-beijing-internal.aliyuncs.com")],
                Signature::OssV4 { region: "cn-beijing".into() },
            ),
            (
                "oss://b",
                &[("endpoint", "http://h"), ("region", "oss-cn-x")],
                Signature::OssV4 { region: "cn-x".into() },
            ),
            ("oss://b", &[("endpoint", "http://h"), ("sig", "v1")], Signature::OssV1),
        ] {
            assert_eq!(client(url, options).expect(url).signature, signature, "{options:?}");
        }
    }

    #[test]
    fn bad_options_are_refused_with_a_cure() {
        for (url, options, text) in [
            ("oss://b", &[("endpoint", "https://oss-accelerate.aliyuncs.com")][..], "region="),
            ("s3://b", &[("sig", "v1")], "use v4"),
            ("s3://b", &[("connections", "0")], "connections=0"),
            ("s3://b", &[("path_style", "yes")], "path_style=yes"),
            ("s3://b", &[("payload_hash", "md5")], "payload_hash=md5"),
            ("s3://b", &[("ca_file", "/nonexistent.pem")], "/nonexistent.pem"),
            ("s3://a?b", &[], "bucket name"),
        ] {
            let e = client(url, options).err().expect(text);
            assert!(e.is(Kind::Invalid) && e.to_string().contains(text), "{e}");
        }
    }

    #[test]
    fn any_key_is_sent_as_it_is() {
        let c = client("s3://b", &[("endpoint", "http://h:1")]).expect("client");
        for (key, path) in [
            (&b"a/../b/./c"[..], "/b/a/../b/./c"),
            (b"..", "/b/.."),
            (b"//x//", "/b///x//"),
            (b"\xff\n\0 +?#%", "/b/%FF%0A%00%20%2B%3F%23%25"),
        ] {
            let call = Call { query: &[("prefix", b"a b"), ("delimiter", b"/")], ..Call::new(Method::GET, key) };
            let request = c.request(&call, None, "").expect("request");
            assert_eq!(
                request.uri().path_and_query().expect("path").as_str(),
                format!("{path}?delimiter=%2F&prefix=a%20b")
            );
        }
    }
}
