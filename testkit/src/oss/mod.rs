//! Our own object store for tests: OSS's native API, or S3's, with signatures verified, faults on demand and counters.
//!
//! Nothing else that can be installed speaks native OSS, so the official SDKs are its judges (`testkit/judge/`). It runs inside the
//! test process ([`OssServer`]) or as `efc-oss-server`. Everything lives in memory. [`serve`] owns sockets, faults and counters; [`auth`] says who
//! asks; [`dispatch`] picks the operation; the others answer. One lock guards the state, and no operation waits while it holds it.

mod auth;
mod bucket;
mod error;
mod fault;
mod multipart;
mod object;
mod request;
mod serve;
mod store;

pub use fault::{Action, Fault, Stats};
pub use serve::OssServer;

use auth::Access;
use bytes::Bytes;
use error::ApiError;
use request::{Answer, Req};
use serde::{Deserialize, Serialize};
use store::{Bucket, State};

/// Whose API is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dialect {
    /// Alibaba Cloud OSS.
    Oss,
    /// Amazon S3.
    S3,
}

impl Dialect {
    /// The dialect's own header: `x-oss-NAME` or `x-amz-NAME`.
    pub fn header(self, name: &str) -> String {
        match self {
            Dialect::Oss => format!("x-oss-{name}"),
            Dialect::S3 => format!("x-amz-{name}"),
        }
    }
}

/// Somebody whose signatures are accepted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Access key id.
    pub key_id: String,
    /// Access key secret.
    pub secret: String,
    /// Security token that must come with it (STS).
    pub token: Option<String>,
    /// Only reads are allowed.
    pub read_only: bool,
}

impl Identity {
    /// An identity that may do everything.
    pub fn new(key_id: &str, secret: &str) -> Identity {
        Identity { key_id: key_id.into(), secret: secret.into(), token: None, read_only: false }
    }
}

/// How a server is set up.
#[derive(Debug, Clone)]
pub struct OssOptions {
    /// Whose API is spoken.
    pub dialect: Dialect,
    /// Region that V4 signatures must name.
    pub region: String,
    /// Own host name: `BUCKET.domain` addresses a bucket, every other host is path style.
    pub domain: String,
    /// Port of loopback; 0 for any.
    pub port: u16,
    /// Who may come.
    pub identities: Vec<Identity>,
}

impl Default for OssOptions {
    fn default() -> Self {
        OssOptions {
            dialect: Dialect::Oss,
            region: "cn-hangzhou".into(),
            domain: "oss.test".into(),
            port: 0,
            identities: vec![Identity::new("efckey", "efcsecret")],
        }
    }
}

impl OssOptions {
    /// The S3 dialect with the keys and the region of [`crate::S3Target::default`].
    pub fn s3() -> Self {
        OssOptions { dialect: Dialect::S3, region: "us-east-1".into(), domain: "s3.test".into(), ..Self::default() }
    }
}

/// An answer before it is sent.
#[derive(Debug)]
struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    chunks: Vec<Bytes>,
    length: u64,
}

impl Reply {
    fn new(status: u16) -> Reply {
        Reply { status, headers: Vec::new(), chunks: Vec::new(), length: 0 }
    }

    fn header(mut self, name: &str, value: impl Into<String>) -> Reply {
        self.headers.push((name.to_string(), value.into()));
        self
    }

    fn chunks(mut self, chunks: Vec<Bytes>, length: u64) -> Reply {
        (self.chunks, self.length) = (chunks, length);
        self
    }

    fn xml(self, document: String) -> Reply {
        let length = document.len() as u64;
        self.header("content-type", "application/xml").chunks(vec![document.into()], length)
    }
}

fn bucket<'a>(state: &'a State, req: &Req) -> Result<&'a Bucket, ApiError> {
    let name = req.bucket_name();
    state.get(name).ok_or_else(|| ApiError::no_such_bucket(name))
}

fn bucket_mut<'a>(state: &'a mut State, req: &Req) -> Result<&'a mut Bucket, ApiError> {
    let name = req.bucket_name();
    state.get_mut(name).ok_or_else(|| ApiError::no_such_bucket(name))
}

/// The operation that a request names, as counters and faults call it.
fn operation(req: &Req) -> &'static str {
    let copies = req.own_header("copy-source").is_some();
    let (bucket, key) = (req.bucket.is_some(), !req.key.is_empty());
    match req.method.as_str() {
        "GET" if !bucket => "list_buckets",
        "GET" if !key && req.has("uploads") => "list_uploads",
        "GET" if !key && req.has("bucketInfo") => "bucket_info",
        "GET" if !key && req.has("location") => "location",
        "GET" if !key && req.has("stat") => "stat",
        "GET" if !key && req.has("acl") => "acl",
        "GET" if !key && req.has("versioning") => "versioning",
        "GET" if !key => "list",
        "GET" | "PUT" | "DELETE" if key && req.has("tagging") => "tagging",
        "GET" if req.has("uploadId") => "list_parts",
        "GET" if req.has("symlink") => "get_symlink",
        "GET" => "get",
        "HEAD" if !key => "head_bucket",
        "HEAD" if req.has("objectMeta") => "object_meta",
        "HEAD" => "head",
        "PUT" if !key && req.has("acl") => "acl",
        "PUT" if !key => "create_bucket",
        "PUT" if req.has("uploadId") && copies => "part_copy",
        "PUT" if req.has("uploadId") => "part",
        "PUT" if req.has("symlink") => "put_symlink",
        "PUT" if copies => "copy",
        "PUT" => "put",
        "POST" if !key && req.has("delete") => "delete_many",
        "POST" if key && req.has("uploads") => "initiate",
        "POST" if key && req.has("uploadId") => "complete",
        "POST" if key && req.has("append") => "append",
        "DELETE" if !key => "delete_bucket",
        "DELETE" if req.has("uploadId") => "abort",
        "DELETE" => "delete",
        _ => "unknown",
    }
}

/// May whoever asks do this? Writers need an identity that is not read-only, or a bucket open to all.
fn authorize(op: &str, req: &Req, access: &Access, state: &State) -> Result<(), ApiError> {
    let reads = matches!(op, "get" | "head" | "list" | "head_bucket" | "object_meta" | "get_symlink");
    let acl = req.bucket.as_ref().and_then(|b| state.get(b)).map_or("private", |b| b.acl.as_str());
    let denied = || ApiError::access_denied("You have no right to access this object because of bucket acl.");
    match &access.identity {
        Some(identity) if identity.read_only && !reads && req.method != "GET" => Err(denied()),
        Some(_) => Ok(()),
        None if acl == "public-read-write" || (acl == "public-read" && reads) => Ok(()),
        None => Err(denied()),
    }
}

/// Runs the operation.
fn dispatch(op: &str, req: &Req, state: &mut State, region: &str) -> Answer {
    let oss_only = matches!(op, "append" | "put_symlink" | "get_symlink" | "object_meta" | "bucket_info" | "stat");
    if oss_only && req.dialect != Dialect::Oss {
        return Err(ApiError::new(501, "NotImplemented", "S3 does not offer this."));
    }
    if req.key.len() > 1024 {
        return Err(ApiError::new(400, "InvalidObjectName", "The key is longer than 1024 bytes."));
    }
    match op {
        "list_buckets" => bucket::list_buckets(req, state, region),
        "create_bucket" => bucket::create(req, state),
        "delete_bucket" => bucket::delete(req, state),
        "head_bucket" => bucket::head(req, state),
        "bucket_info" => bucket::info(req, state, region),
        "location" => bucket::location(req, state, region),
        "stat" => bucket::stat(req, state),
        "acl" => bucket::acl(req, state),
        "versioning" => bucket::versioning(req, state),
        "list" => bucket::list(req, state),
        "delete_many" => bucket::delete_many(req, state),
        "get" | "head" => object::get(req, state),
        "object_meta" => object::object_meta(req, state),
        "put" => object::put(req, state),
        "delete" => object::delete(req, state),
        "append" => object::append(req, state),
        "copy" => object::copy(req, state),
        "put_symlink" => object::put_symlink(req, state),
        "get_symlink" => object::get_symlink(req, state),
        "tagging" => object::tagging(req, state),
        "initiate" => multipart::initiate(req, state),
        "part" => multipart::part(req, state),
        "part_copy" => multipart::part_copy(req, state),
        "complete" => multipart::complete(req, state),
        "abort" => multipart::abort(req, state),
        "list_parts" => multipart::list_parts(req, state),
        "list_uploads" => multipart::list_uploads(req, state),
        _ => Err(ApiError::method_not_allowed()),
    }
}
