//! Who asks? Verifies OSS V1 and V4 and AWS V4 signatures, in headers and in presigned URLs.
//!
//! Sources: help.aliyun.com "Include a V1 signature in the Authorization header", "... V4 ...", "... in a URL"; docs.aws.amazon.com
//! "Authenticating Requests (AWS Signature Version 4)".

use super::error::ApiError;
use super::request::Req;
use super::{Dialect, Identity};
use crate::sign::{encode, hex, hmac_sha1, oss_v4_signature, parse_date, sha256_hex, sigv4_signature};
use base64::prelude::{BASE64_STANDARD, Engine};
use std::time::{SystemTime, UNIX_EPOCH};

/// Clocks may differ by this much.
const SKEW_S: i64 = 15 * 60;

/// How a request was signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scheme {
    /// Not at all.
    Anonymous,
    /// OSS V1 in the header.
    V1Header,
    /// OSS V1 in the URL.
    V1Query,
    /// V4 (of the dialect) in the header.
    V4Header,
    /// V4 (of the dialect) in the URL.
    V4Query,
}

impl Scheme {
    /// Name in the counters.
    pub(super) fn name(self) -> &'static str {
        match self {
            Scheme::Anonymous => "anonymous",
            Scheme::V1Header => "v1_header",
            Scheme::V1Query => "v1_query",
            Scheme::V4Header => "v4_header",
            Scheme::V4Query => "v4_query",
        }
    }
}

/// What was found out.
#[derive(Debug, Clone)]
pub(super) struct Access {
    /// How it was signed.
    pub(super) scheme: Scheme,
    /// By whom; `None` when anonymous.
    pub(super) identity: Option<Identity>,
}

/// The parts of a query string that V1 signs.
const V1_SUBRESOURCES: &[&str] = &[
    "acl",
    "append",
    "asyncFetch",
    "bucketInfo",
    "callback",
    "callback-var",
    "cname",
    "comp",
    "continuation-token",
    "cors",
    "delete",
    "encryption",
    "endTime",
    "group",
    "inventory",
    "lifecycle",
    "link",
    "live",
    "location",
    "logging",
    "objectInfo",
    "objectMeta",
    "partNumber",
    "policy",
    "position",
    "qos",
    "qosInfo",
    "referer",
    "replication",
    "requestPayment",
    "resourceGroup",
    "response-cache-control",
    "response-content-disposition",
    "response-content-encoding",
    "response-content-language",
    "response-content-type",
    "response-expires",
    "restore",
    "security-token",
    "sequential",
    "startTime",
    "stat",
    "status",
    "style",
    "styleName",
    "symlink",
    "tagging",
    "uploadId",
    "uploads",
    "versionId",
    "versioning",
    "versions",
    "vod",
    "website",
    "worm",
    "x-oss-process",
    "x-oss-request-payer",
    "x-oss-traffic-limit",
];

/// Verifies a request against the known identities.
///
/// # Errors
/// The store's own refusals: `InvalidAccessKeyId`, `SignatureDoesNotMatch`, `RequestTimeTooSkewed`, `AccessDenied` (expired) ...
pub(super) fn authenticate(req: &Req, identities: &[Identity], region: &str) -> Result<Access, ApiError> {
    let verifier = Verifier { req, identities, region, now: now_s() };
    let authorization = req.header("authorization").unwrap_or("");
    let (scheme, identity) = match req.dialect {
        _ if authorization.is_empty() && req.has(&query_name(req.dialect, "Signature")) => {
            (Scheme::V4Query, verifier.v4_query()?)
        }
        Dialect::Oss if authorization.is_empty() && req.has("Signature") => (Scheme::V1Query, verifier.v1_query()?),
        _ if authorization.is_empty() => return Ok(Access { scheme: Scheme::Anonymous, identity: None }),
        Dialect::Oss if authorization.starts_with("OSS ") => {
            (Scheme::V1Header, verifier.v1_header(&authorization["OSS ".len()..])?)
        }
        dialect => match authorization.strip_prefix(algorithm(dialect)) {
            Some(fields) => (Scheme::V4Header, verifier.v4_header(fields)?),
            None => return Err(ApiError::invalid_argument("The Authorization header is not one this server knows.")),
        },
    };
    Ok(Access { scheme, identity: Some(identity) })
}

/// A header's value as it is signed: AWS folds runs of blanks, OSS only trims.
fn canonical(value: &str, oss: bool) -> String {
    if oss { value.trim().into() } else { value.split_whitespace().collect::<Vec<_>>().join(" ") }
}

fn now_s() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64)
}

fn algorithm(dialect: Dialect) -> &'static str {
    match dialect {
        Dialect::Oss => "OSS4-HMAC-SHA256",
        Dialect::S3 => "AWS4-HMAC-SHA256",
    }
}

/// The name of a V4 query parameter: `x-oss-signature` or `X-Amz-Signature`.
fn query_name(dialect: Dialect, name: &str) -> String {
    match dialect {
        Dialect::Oss => format!("x-oss-{}", name.to_ascii_lowercase()),
        Dialect::S3 => format!("X-Amz-{name}"),
    }
}

/// A V4 credential: `KEY/DATE/REGION/PRODUCT/TERMINATOR`. The key id itself may hold slashes.
struct Credential<'a> {
    key_id: &'a str,
    scope: &'a str,
}

impl<'a> Credential<'a> {
    fn parse(text: &'a str) -> Option<Credential<'a>> {
        let (at, _) = text.rmatch_indices('/').nth(3)?;
        Some(Credential { key_id: &text[..at], scope: &text[at + 1..] })
    }
}

struct Verifier<'a> {
    req: &'a Req,
    identities: &'a [Identity],
    region: &'a str,
    now: i64,
}

impl Verifier<'_> {
    fn identity(&self, key_id: &str) -> Result<&Identity, ApiError> {
        self.identities.iter().find(|i| i.key_id == key_id).ok_or_else(|| {
            let message = "The access key id you provided does not exist in our records.";
            ApiError::new(403, "InvalidAccessKeyId", message).detail("OSSAccessKeyId", key_id)
        })
    }

    fn check(
        &self,
        identity: &Identity,
        token: Option<&str>,
        want: &str,
        got: &str,
        to_sign: &[u8],
    ) -> Result<Identity, ApiError> {
        if want != got {
            let message = "The request signature we calculated does not match the signature you provided.";
            return Err(ApiError::new(403, "SignatureDoesNotMatch", message)
                .detail("OSSAccessKeyId", identity.key_id.clone())
                .detail("SignatureProvided", got)
                .detail("StringToSign", String::from_utf8_lossy(to_sign)));
        }
        let code = match self.req.dialect {
            Dialect::Oss => "InvalidSecurityToken",
            Dialect::S3 => "InvalidToken",
        };
        if identity.token.as_deref() != token {
            return Err(ApiError::new(403, code, "The security token you provided is invalid."));
        }
        Ok(identity.clone())
    }

    fn check_clock(&self, date: &str) -> Result<(), ApiError> {
        let at = parse_date(date).ok_or_else(|| ApiError::access_denied("The request has no valid date."))?;
        if (at - self.now).abs() > SKEW_S {
            let message = "The difference between the request time and the current time is too large.";
            return Err(ApiError::new(403, "RequestTimeTooSkewed", message).detail("RequestTime", date));
        }
        Ok(())
    }

    fn expired(&self) -> ApiError {
        ApiError::access_denied("Request has expired.").detail("ServerTime", self.now.to_string())
    }

    fn v1_header(&self, fields: &str) -> Result<Identity, ApiError> {
        let (key_id, signature) = fields
            .trim()
            .split_once(':')
            .ok_or_else(|| ApiError::invalid_argument("The Authorization header must be `OSS KEY:SIGNATURE`."))?;
        let identity = self.identity(key_id)?;
        let date = self.req.header("x-oss-date").or(self.req.header("date")).unwrap_or("");
        self.check_clock(date)?;
        let to_sign = self.v1_string_to_sign(date);
        let want = BASE64_STANDARD.encode(hmac_sha1(identity.secret.as_bytes(), &to_sign));
        self.check(identity, self.req.header("x-oss-security-token"), &want, signature, &to_sign)
    }

    fn v1_query(&self) -> Result<Identity, ApiError> {
        let identity = self.identity(self.req.param("OSSAccessKeyId").unwrap_or(""))?;
        let expires = self.req.param("Expires").unwrap_or("");
        let to_sign = self.v1_string_to_sign(expires);
        let want = BASE64_STANDARD.encode(hmac_sha1(identity.secret.as_bytes(), &to_sign));
        let signature = self.req.param("Signature").unwrap_or("");
        let identity = self.check(identity, self.req.param("security-token"), &want, signature, &to_sign)?;
        if expires.parse::<i64>().map_or(true, |t| t < self.now) {
            return Err(self.expired());
        }
        Ok(identity)
    }

    fn v1_string_to_sign(&self, date: &str) -> Vec<u8> {
        let req = self.req;
        let plain = |name| req.header(name).unwrap_or("");
        let mut text =
            format!("{}\n{}\n{}\n{date}\n", req.method, plain("content-md5"), plain("content-type")).into_bytes();
        let mut own: Vec<_> = req.headers.iter().filter(|(n, _)| n.starts_with("x-oss-")).collect();
        own.sort();
        for (name, value) in own {
            text.extend_from_slice(format!("{name}:{}\n", value.trim()).as_bytes());
        }
        text.push(b'/');
        if let Some(bucket) = &req.bucket {
            text.extend_from_slice(bucket.as_bytes());
            text.push(b'/');
            text.extend_from_slice(&req.key);
        }
        let is_signed = |name: &[u8]| V1_SUBRESOURCES.iter().any(|s| s.as_bytes() == name);
        let mut signed: Vec<_> = req.query.iter().filter(|(n, _)| is_signed(n)).collect();
        signed.sort();
        for (i, (name, value)) in signed.into_iter().enumerate() {
            text.push(if i == 0 { b'?' } else { b'&' });
            text.extend_from_slice(name);
            if !value.is_empty() {
                text.push(b'=');
                text.extend_from_slice(value);
            }
        }
        text
    }

    fn v4_header(&self, fields: &str) -> Result<Identity, ApiError> {
        let field = |name: &str| {
            fields.split(',').find_map(|f| f.trim().strip_prefix(name)?.strip_prefix('=')).map(str::to_string)
        };
        let dialect = self.req.dialect;
        let date_header = self.req.own_header("date").or(self.req.header("date")).unwrap_or("");
        self.check_clock(date_header)?;
        let date = match parse_date(date_header) {
            Some(_) if date_header.len() == 16 => date_header.to_string(),
            Some(at) => crate::sign::amz_date(UNIX_EPOCH + std::time::Duration::from_secs(at as u64)),
            None => String::new(),
        };
        let (credential, signature) = (field("Credential").unwrap_or_default(), field("Signature").unwrap_or_default());
        let signed = match dialect {
            Dialect::Oss => field("AdditionalHeaders").unwrap_or_default(),
            Dialect::S3 => field("SignedHeaders").unwrap_or_default(),
        };
        let payload = self.req.own_header("content-sha256").unwrap_or("UNSIGNED-PAYLOAD");
        if dialect == Dialect::S3 && payload.len() == 64 && payload != sha256_hex(&self.req.body) {
            let message = "The provided x-amz-content-sha256 header does not match what was computed.";
            return Err(ApiError::new(400, "XAmzContentSHA256Mismatch", message));
        }
        let token = self.req.own_header("security-token");
        self.v4(&credential, &signature, &signed, &date, payload, token)
    }

    fn v4_query(&self) -> Result<Identity, ApiError> {
        let param = |name: &str| self.req.param(&query_name(self.req.dialect, name)).unwrap_or("");
        let signed = match self.req.dialect {
            Dialect::Oss => param("Additional-Headers"),
            Dialect::S3 => param("SignedHeaders"),
        };
        let token = Some(param("Security-Token")).filter(|t| !t.is_empty());
        let date = param("Date");
        let identity = self.v4(param("Credential"), param("Signature"), signed, date, "UNSIGNED-PAYLOAD", token)?;
        let start = parse_date(date).ok_or_else(|| self.expired())?;
        let lifetime: i64 = param("Expires").parse().map_err(|_| self.expired())?;
        if start + lifetime < self.now || start > self.now + SKEW_S {
            return Err(self.expired());
        }
        Ok(identity)
    }

    fn v4(
        &self,
        credential: &str,
        signature: &str,
        signed: &str,
        date: &str,
        payload: &str,
        token: Option<&str>,
    ) -> Result<Identity, ApiError> {
        let malformed = |message: &str| ApiError::new(400, "AuthorizationHeaderMalformed", message);
        let credential = Credential::parse(credential).ok_or_else(|| malformed("The credential is malformed."))?;
        let identity = self.identity(credential.key_id)?;
        let scope: Vec<&str> = credential.scope.split('/').collect();
        let (product, terminator) = match self.req.dialect {
            Dialect::Oss => ("oss", "aliyun_v4_request"),
            Dialect::S3 => ("s3", "aws4_request"),
        };
        if !date.starts_with(scope[0]) || scope[2..] != [product, terminator] {
            return Err(malformed("The credential's scope does not fit the request."));
        }
        if scope[1] != self.region {
            let message = format!("The region `{}` is wrong; expecting `{}`.", scope[1], self.region);
            return Err(malformed(&message).detail("Region", self.region));
        }
        let canonical = self.v4_canonical_request(signed, payload);
        let want = match self.req.dialect {
            Dialect::Oss => oss_v4_signature(&identity.secret, credential.scope, date, &canonical),
            Dialect::S3 => sigv4_signature(&identity.secret, credential.scope, date, &canonical),
        };
        self.check(identity, token, &hex(&want), signature, canonical.as_bytes())
    }

    /// OSS signs its own headers, content-type and content-md5 whether named or not, and the others that are named; S3 signs
    /// exactly the named ones. A parameter without value is written `name` by OSS, `name=` by S3. S3 signs the path as sent, OSS
    /// always with the bucket in it.
    fn v4_canonical_request(&self, signed: &str, payload: &str) -> String {
        let req = self.req;
        let oss = req.dialect == Dialect::Oss;
        let named: Vec<&str> = signed.split(';').filter(|n| !n.is_empty()).collect();
        let always = |n: &str| oss && (n.starts_with("x-oss-") || n == "content-type" || n == "content-md5");
        let mut headers: Vec<(&str, String)> = req
            .headers
            .iter()
            .filter(|(n, _)| always(n) || named.contains(&n.as_str()))
            .map(|(n, v)| (n.as_str(), canonical(v, oss)))
            .collect();
        headers.sort();
        let headers: String = headers.iter().map(|(n, v)| format!("{n}:{v}\n")).collect();
        let path = match (&req.bucket, oss) {
            (_, false) => req.raw_path.clone(),
            (Some(bucket), true) => format!("/{}/{}", encode(bucket.as_bytes(), false), encode(&req.key, true)),
            (None, true) => "/".into(),
        };
        let own_signature = query_name(req.dialect, "Signature");
        let mut query: Vec<(String, String)> = req
            .query
            .iter()
            .filter(|(n, _)| n != own_signature.as_bytes())
            .map(|(n, v)| (encode(n, false), encode(v, false)))
            .collect();
        query.sort();
        let pair = |(n, v): &(String, String)| if oss && v.is_empty() { n.clone() } else { format!("{n}={v}") };
        let query: Vec<String> = query.iter().map(pair).collect();
        format!("{}\n{path}\n{}\n{headers}\n{signed}\n{payload}", req.method, query.join("&"))
    }
}
