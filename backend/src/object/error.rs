//! What a store's refusal means: HTTP status + error code → kind, retry verdict and a sentence that names the bucket, the endpoint and
//! the cure. These sentences are what a user sees when a mount fails, so they come from one place.

use super::list::{Element, each_element};
use efc_common::{Error, Kind, Retry};
use http::{HeaderMap, StatusCode};
use parking_lot::RwLock;
use std::fmt;
use std::time::SystemTime;

/// Where requests go and as whom: what error messages name.
#[derive(Debug)]
pub(crate) struct About {
    /// Bucket.
    pub(crate) bucket: String,
    /// `http[s]://host[:port]`.
    pub(crate) endpoint: String,
    /// Where the credentials come from, without any secret.
    pub(crate) credentials: Label,
}

/// A text that may change.
#[derive(Debug)]
pub(crate) struct Label(RwLock<String>);

impl Label {
    pub(crate) fn new(text: impl Into<String>) -> Label {
        Label(RwLock::new(text.into()))
    }

    pub(crate) fn replace(&self, text: impl Into<String>) {
        *self.0.write() = text.into();
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.read())
    }
}

/// The fields of an error document that we use.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Document {
    pub(crate) code: String,
    pub(crate) message: String,
    pub(crate) region: String,
    pub(crate) endpoint: String,
    pub(crate) request_id: String,
}

/// Longest text of a server's that we quote, characters.
const QUOTE_CHARS: usize = 300;

impl Document {
    /// Reads an error body; all fields are empty when it is none (HEAD has no body).
    pub(crate) fn parse(body: &[u8]) -> Document {
        let mut d = Document::default();
        // Whatever could be read before the document broke still helps.
        let _ = each_element(&String::from_utf8_lossy(body), |e| {
            if let Element::End([_, name], value) = e {
                let value: String = value.trim().chars().take(QUOTE_CHARS).collect();
                match name.as_str() {
                    "Code" => d.code = value,
                    "Message" => d.message = value,
                    "Region" => d.region = value,
                    "Endpoint" => d.endpoint = value,
                    "RequestId" => d.request_id = value,
                    _ => {}
                }
            }
            Ok(())
        });
        d
    }

    /// The temporary credentials have run out, or the key id is unknown (it may just have been rotated).
    pub(crate) fn wants_fresh_credentials(&self) -> bool {
        matches!(
            self.code.as_str(),
            "ExpiredToken"
                | "TokenRefreshRequired"
                | "InvalidToken"
                | "SecurityTokenExpired"
                | "InvalidSecurityToken"
                | "InvalidAccessKeyId"
        )
    }
}

/// The error for an answer that is no success.
pub(crate) fn refused(about: &About, status: StatusCode, headers: &HeaderMap, body: &[u8]) -> (Error, Document) {
    let mut d = Document::parse(body);
    for name in ["x-amz-request-id", "x-oss-request-id"] {
        if let (true, Some(v)) = (d.request_id.is_empty(), headers.get(name).and_then(|v| v.to_str().ok())) {
            d.request_id = v.chars().take(QUOTE_CHARS).collect();
        }
    }
    if let (true, Some(v)) = (d.region.is_empty(), headers.get("x-amz-bucket-region").and_then(|v| v.to_str().ok())) {
        d.region = v.chars().take(QUOTE_CHARS).collect();
    }
    let mut error = by_code(about, status, headers, &d).unwrap_or_else(|| by_status(about, status, &d));
    error = error.with("status", status.as_u16());
    if !d.code.is_empty() {
        error = error.with("code", &d.code);
    }
    if !d.request_id.is_empty() {
        error = error.with("request_id", &d.request_id);
    }
    (error, d)
}

/// The status that a code comes with, where a document comes without its own: one key of many, or behind a status that was sent too early.
pub(crate) fn status_of(code: &str) -> StatusCode {
    match code {
        "AccessDenied" => StatusCode::FORBIDDEN,
        "NoSuchKey" | "NoSuchUpload" | "NoSuchBucket" => StatusCode::NOT_FOUND,
        "PreconditionFailed" => StatusCode::PRECONDITION_FAILED,
        "ConditionalRequestConflict" | "OperationAborted" => StatusCode::CONFLICT,
        "NotImplemented" => StatusCode::NOT_IMPLEMENTED,
        "EntityTooSmall" | "MalformedXML" => StatusCode::BAD_REQUEST,
        code if code.starts_with("Invalid") => StatusCode::BAD_REQUEST,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// Codes that say more than their status.
fn by_code(about: &About, status: StatusCode, headers: &HeaderMap, d: &Document) -> Option<Error> {
    let About { bucket, endpoint, credentials } = about;
    let denied = |what: String| Some(Error::new(Kind::PermissionDenied, what));
    match d.code.as_str() {
        "NoSuchBucket" => {
            Some(Error::new(Kind::NotFound, format!("bucket `{bucket}` does not exist at {endpoint}: check the name")))
        }
        "InvalidBucketName" => {
            Some(Error::new(Kind::Invalid, format!("`{bucket}` is not a bucket name: check the name")))
        }
        "InvalidAccessKeyId" => denied(format!(
            "{endpoint} does not know the access key id from {credentials}: check the key, or that it belongs to this store"
        )),
        "SignatureDoesNotMatch" => denied(format!(
            "{endpoint} refused the signature: the access key secret from {credentials} is wrong, or the region or `sig` option does not fit"
        )),
        "RequestTimeTooSkewed" => denied(format!(
            "this machine's clock differs from {endpoint}'s{}: synchronise it (NTP)",
            skew(headers).map_or(String::new(), |s| format!(" by {s} s"))
        )),
        "ExpiredToken" | "TokenRefreshRequired" | "InvalidToken" | "SecurityTokenExpired" | "InvalidSecurityToken" => {
            denied(format!("the session token from {credentials} has expired or is not valid: renew the credentials"))
        }
        "PermanentRedirect" | "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException" => {
            Some(elsewhere(about, d))
        }
        // OSS says it this way when the bucket is in another region.
        "AccessDenied" if !d.endpoint.is_empty() && !endpoint.ends_with(&d.endpoint) => Some(elsewhere(about, d)),
        "InvalidObjectState" => {
            Some(Error::new(Kind::Io, "the object is archived: restore it at the store before reading it"))
        }
        "UserDisable" => denied(format!("the account of the access key from {credentials} is disabled or overdue")),
        "FileAlreadyExists" | "ObjectAlreadyExists" => {
            Some(Error::new(Kind::Conflict, "the object exists already, nothing was overwritten"))
        }
        "PositionNotEqualToLength" => {
            Some(Error::new(Kind::Conflict, "the object has another size than the appended bytes were meant for"))
        }
        "ObjectNotAppendable" => Some(Error::new(
            Kind::Unsupported,
            "the object was not made by appending, so nothing can be appended to it",
        )),
        "FileImmutable" => Some(Error::new(Kind::NotPermitted, "the object is under retention: nothing may change it")),
        "EntityTooLarge" => Some(Error::new(Kind::TooLarge, format!("{endpoint} takes no object this large"))),
        "KeyTooLongError" | "KeyTooLong" => {
            Some(Error::new(Kind::NameTooLong, format!("{endpoint} takes no key this long")))
        }
        "BadDigest" | "InvalidDigest" | "XAmzContentSHA256Mismatch" => {
            let what = format!("{endpoint} received other bytes than were sent");
            Some(Error::new(Kind::Corrupt, what).with_retry(Retry::Later))
        }
        "XMinioStorageFull" | "InsufficientStorage" => Some(Error::new(Kind::NoSpace, format!("{endpoint} is full"))),
        "QuotaExceeded" | "BucketQuotaExceeded" | "XMinioAdminBucketQuotaExceeded" => {
            Some(Error::new(Kind::NoQuota, format!("the quota of bucket `{bucket}` is used up")))
        }
        "SlowDown" | "ServiceUnavailable" | "RequestLimitExceeded" | "ThrottlingException" | "QpsLimitExceeded" => {
            Some(Error::new(Kind::Unavailable, format!("{endpoint} is overloaded or limits our request rate")))
        }
        "RequestTimeout" => Some(Error::new(Kind::Timeout, format!("{endpoint} gave the request up"))),
        "SecondLevelDomainForbidden" => Some(Error::new(
            Kind::Invalid,
            format!("{endpoint} wants the bucket in the host name: set path_style=false"),
        )),
        _ if status.is_redirection() && status != StatusCode::NOT_MODIFIED => Some(elsewhere(about, d)),
        _ => None,
    }
}

fn elsewhere(about: &About, d: &Document) -> Error {
    let About { bucket, endpoint, .. } = about;
    let (place, cure) = match (d.region.as_str(), d.endpoint.as_str()) {
        ("", "") => ("elsewhere".to_string(), "set endpoint= and region= to the bucket's own".to_string()),
        ("", e) => (format!("at {e}"), format!("set endpoint={}", e.strip_prefix(&format!("{bucket}.")).unwrap_or(e))),
        (r, _) => (format!("in region `{r}`"), format!("set region={r} and its endpoint")),
    };
    Error::new(Kind::Invalid, format!("bucket `{bucket}` is {place}, not at {endpoint}: {cure}"))
}

/// Seconds between the store's clock and ours.
fn skew(headers: &HeaderMap) -> Option<u64> {
    let theirs = httpdate::parse_http_date(headers.get(http::header::DATE)?.to_str().ok()?).ok()?;
    let now = SystemTime::now();
    now.duration_since(theirs).or_else(|_| theirs.duration_since(now)).ok().map(|d| d.as_secs())
}

fn by_status(about: &About, status: StatusCode, d: &Document) -> Error {
    let About { bucket, endpoint, credentials } = about;
    let said = match (d.code.as_str(), d.message.as_str()) {
        ("", "") => String::new(),
        (c, "") => format!(" ({c})"),
        (c, m) => format!(" ({c}: {m})"),
    };
    let (kind, what) = match status.as_u16() {
        400 | 411 | 414 | 431 => {
            (Kind::Invalid, format!("{endpoint} calls our request for bucket `{bucket}` malformed{said}"))
        }
        401 | 403 => (
            Kind::PermissionDenied,
            format!(
                "{endpoint} refuses access to bucket `{bucket}` with the credentials from {credentials}{said}: check the key's policy"
            ),
        ),
        404 | 410 => (Kind::NotFound, format!("no such object in bucket `{bucket}`{said}")),
        405 | 501 => (Kind::Unsupported, format!("{endpoint} does not offer this request{said}")),
        408 => (Kind::Timeout, format!("{endpoint} gave the request up{said}")),
        409 => (Kind::Busy, format!("{endpoint} is busy with a conflicting request{said}")),
        412 | 416 => (Kind::Stale, format!("the object changed{said}")),
        413 => (Kind::TooLarge, format!("{endpoint} takes no request this large{said}")),
        507 => (Kind::NoSpace, format!("{endpoint} is full{said}")),
        429 => (Kind::Unavailable, format!("{endpoint} limits our request rate{said}")),
        500..=599 => (Kind::Unavailable, format!("{endpoint} failed{said}")),
        _ => (Kind::Io, format!("{endpoint} gave an answer that means nothing here{said}")),
    };
    let error = Error::new(kind, what);
    if status.as_u16() == 409 { error.with_retry(Retry::Later) } else { error }
}

/// Looks for TLS's verdict below an error. An I/O error hides the one it carries from `source`.
fn refuses_certificate(e: &(dyn std::error::Error + 'static)) -> bool {
    if let Some(rustls::Error::InvalidCertificate(_)) = e.downcast_ref() {
        return true;
    }
    let carried = e.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    carried.is_some_and(|c| refuses_certificate(c)) || e.source().is_some_and(refuses_certificate)
}

/// The error for a request that got no answer.
pub(crate) fn unreachable(
    about: &About,
    cause: impl std::error::Error + Send + Sync + 'static,
    connecting: bool,
) -> Error {
    let endpoint = &about.endpoint;
    if refuses_certificate(&cause) {
        let what = format!(
            "{endpoint} shows a certificate that is not trusted here: set ca_file= to its authority's PEM file"
        );
        return Error::new(Kind::Invalid, what).caused_by(cause);
    }
    let what = if connecting {
        format!("cannot reach {endpoint}: check the endpoint, and the network from this machine")
    } else {
        format!("{endpoint} broke the connection")
    };
    Error::new(Kind::Unavailable, what).caused_by(cause)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about() -> About {
        About { bucket: "b".into(), endpoint: "http://h".into(), credentials: Label::new("env") }
    }

    fn answer(status: u16, body: &str) -> Error {
        refused(&about(), StatusCode::from_u16(status).expect("status"), &HeaderMap::new(), body.as_bytes()).0
    }

    fn code(status: u16, code: &str) -> Error {
        answer(
            status,
            &format!(
                "<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>m</Message><RequestId>r</RequestId></Error>"
            ),
        )
    }

    #[test]
    fn kinds_verdicts_and_cures() {
        use Kind::*;
        use Retry::*;
        for (e, kind, retry, text) in [
            (code(404, "NoSuchBucket"), NotFound, Never, "bucket `b` does not exist at http://h: check the name"),
            (code(404, "NoSuchKey"), NotFound, Never, "no such object"),
            (code(403, "AccessDenied"), PermissionDenied, Never, "credentials from env"),
            (code(403, "InvalidAccessKeyId"), PermissionDenied, Never, "access key id from env"),
            (code(403, "SignatureDoesNotMatch"), PermissionDenied, Never, "secret from env"),
            (code(403, "RequestTimeTooSkewed"), PermissionDenied, Never, "clock"),
            (code(400, "ExpiredToken"), PermissionDenied, Never, "expired"),
            (code(503, "SlowDown"), Unavailable, Later, "overloaded"),
            (code(500, "InternalError"), Unavailable, Later, "failed"),
            (code(501, "NotImplemented"), Unsupported, Never, "does not offer"),
            (code(412, "PreconditionFailed"), Stale, Never, "changed"),
            (code(409, "OperationAborted"), Busy, Later, "busy"),
            (code(409, "ConditionalRequestConflict"), Busy, Later, "busy"),
            (code(409, "FileAlreadyExists"), Conflict, Never, "exists already"),
            (code(409, "PositionNotEqualToLength"), Conflict, Never, "another size"),
            (code(409, "ObjectNotAppendable"), Unsupported, Never, "appending"),
            (code(400, "EntityTooLarge"), TooLarge, Never, "this large"),
            (code(400, "KeyTooLongError"), NameTooLong, Never, "this long"),
            (code(400, "BadDigest"), Corrupt, Later, "other bytes"),
            (answer(507, ""), NoSpace, Never, "full"),
            (answer(502, "<html>"), Unavailable, Later, "failed"),
            (answer(429, ""), Unavailable, Later, "rate"),
            (answer(301, ""), Invalid, Never, "elsewhere"),
        ] {
            assert_eq!((e.kind(), e.retry()), (kind, retry), "{e}");
            assert!(e.to_string().contains(text), "{e} lacks `{text}`");
        }
    }

    #[test]
    fn another_region_is_named() {
        let e = answer(403, "<Error><Code>AccessDenied</Code><Endpoint>oss-cn-beijing.aliyuncs.com</Endpoint></Error>");
        assert!(e.is(Kind::Invalid) && e.message().contains("endpoint=oss-cn-beijing.aliyuncs.com"), "{e}");
        let e = answer(400, "<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-1</Region></Error>");
        assert!(e.message().contains("region `eu-west-1`"), "{e}");
        let mut headers = HeaderMap::new();
        headers.insert("x-amz-bucket-region", http::HeaderValue::from_static("ap-south-1"));
        let (e, _) = refused(&about(), StatusCode::MOVED_PERMANENTLY, &headers, b"");
        assert!(e.message().contains("ap-south-1"), "{e}");
    }
}
