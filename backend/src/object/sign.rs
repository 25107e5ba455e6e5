//! Request signatures: AWS Signature Version 4 for S3, OSS header signatures V1 and V4.
//!
//! Our own, about a hundred lines, because the `reqsign` signers decode keys as UTF-8 and so cannot sign a request for a key (or a list
//! prefix) that is not; the tests hold ours against theirs for the keys both can sign, and against published examples.
//! Called by `client` only, which hands over exactly what it will send: signature and request cannot drift apart.
//!
//! Sources: AWS "Signature Calculations for the Authorization Header: Transferring Payload in a Single Chunk"; Alibaba Cloud OSS
//! "Include a V1 signature in the Authorization header", "Include a V4 signature in the Authorization header".

use bytes::Bytes;
use efc_common::source::StaticKeys;
use efc_common::{Error, Kind, Result};
use http::HeaderMap;
use http::header::{AUTHORIZATION, CONTENT_TYPE, DATE, HeaderName, HeaderValue};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use reqsign_core::time::Timestamp;
use ring::{digest, hmac};
use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

/// SHA-256 of nothing.
pub(crate) const EMPTY_SHA256: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// Stands for the hash of a body that is not signed.
pub(crate) const UNSIGNED: &str = "UNSIGNED-PAYLOAD";

/// Bytes that both signatures leave unencoded in a query.
const QUERY: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
/// The same for a path, which keeps its slashes.
const PATH: &AsciiSet = &QUERY.remove(b'/');

/// Of the parameters we send those that V1 signs.
const V1_SUBRESOURCES: [&str; 9] = [
    "append",
    "bucketInfo",
    "continuation-token",
    "delete",
    "location",
    "partNumber",
    "position",
    "uploadId",
    "uploads",
];

/// Percent-encodes raw bytes for a path; slashes stay.
pub(crate) fn encode_path(bytes: &[u8]) -> String {
    percent_encode(bytes, PATH).to_string()
}

/// Percent-encodes raw bytes for a query.
pub(crate) fn encode_query(bytes: &[u8]) -> String {
    percent_encode(bytes, QUERY).to_string()
}

/// SHA-256 of a body, in hexadecimal.
pub(crate) fn hash(pieces: &[Bytes]) -> String {
    let mut context = digest::Context::new(&digest::SHA256);
    pieces.iter().for_each(|p| context.update(p));
    efc_common::id::hex(context.finish().as_ref())
}

/// Which signature, with the region it is made for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Signature {
    /// AWS V4, service `s3`.
    S3 { region: String },
    /// OSS V1 (HMAC-SHA1).
    OssV1,
    /// OSS V4.
    OssV4 { region: String },
}

/// A request as it will be sent.
pub(crate) struct Target<'a> {
    /// Method.
    pub(crate) method: &'a str,
    /// Value of the Host header.
    pub(crate) host: &'a str,
    /// Path as sent, percent-encoded.
    pub(crate) path: &'a str,
    /// `/bucket/key`, raw.
    pub(crate) resource: &'a [u8],
    /// Encoded names and values, sorted by name.
    pub(crate) query: &'a [(String, String)],
    /// Hash of the body, or [`UNSIGNED`].
    pub(crate) payload: &'a str,
}

impl Signature {
    /// Adds the headers that prove who asks. `headers` holds what will be sent already.
    pub(crate) fn sign(
        &self,
        keys: &StaticKeys,
        now: SystemTime,
        target: &Target<'_>,
        headers: &mut HeaderMap,
    ) -> Result<()> {
        match self {
            Signature::S3 { region } => sign_s3(region, keys, now, target, headers),
            Signature::OssV1 => sign_oss_v1(keys, now, target, headers),
            Signature::OssV4 { region } => sign_oss_v4(region, keys, now, target, headers),
        }
    }
}

fn sign_s3(region: &str, keys: &StaticKeys, now: SystemTime, t: &Target<'_>, headers: &mut HeaderMap) -> Result<()> {
    let time = Moment::at(now);
    put(headers, "x-amz-content-sha256", t.payload)?;
    put(headers, "x-amz-date", &time.long)?;
    if !keys.token.expose().is_empty() {
        put(headers, "x-amz-security-token", keys.token.expose())?;
    }
    let wanted = |name: &str| name.starts_with("x-amz-") || name == "content-type" || name == "content-md5";
    let mut signed = canonical_headers(headers, wanted, Some(t.host));
    for (_, value) in &mut signed {
        // AWS signs runs of blanks as one; OSS does not.
        value.dedup_by(|a, b| (*a, *b) == (b' ', b' '));
    }
    let names = signed.iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>().join(";");
    let mut request = format!("{}\n{}\n{}\n", t.method, t.path, query(t.query, true)).into_bytes();
    push_headers(&mut request, &signed);
    request.extend_from_slice(format!("\n{names}\n{}", t.payload).as_bytes());
    let scope = format!("{}/{region}/s3/aws4_request", time.short);
    let signature =
        chain(b"AWS4", keys, [&time.short, region, "s3", "aws4_request"], "AWS4-HMAC-SHA256", &time, &scope, &request);
    authorize(
        headers,
        &format!("AWS4-HMAC-SHA256 Credential={}/{scope}, SignedHeaders={names}, Signature={signature}", keys.id),
    )
}

fn sign_oss_v4(
    region: &str,
    keys: &StaticKeys,
    now: SystemTime,
    t: &Target<'_>,
    headers: &mut HeaderMap,
) -> Result<()> {
    let time = Moment::at(now);
    put(headers, "x-oss-content-sha256", UNSIGNED)?;
    put(headers, "x-oss-date", &time.long)?;
    if !keys.token.expose().is_empty() {
        put(headers, "x-oss-security-token", keys.token.expose())?;
    }
    let default = |name: &str| name.starts_with("x-oss-") || name == "content-type" || name == "content-md5";
    let signed = canonical_headers(headers, default, None);
    let mut request = format!("{}\n{}\n{}\n", t.method, encode_path(t.resource), query(t.query, false)).into_bytes();
    push_headers(&mut request, &signed);
    // No additional signed headers: an empty line.
    request.extend_from_slice(format!("\n\n{UNSIGNED}").as_bytes());
    let scope = format!("{}/{region}/oss/aliyun_v4_request", time.short);
    let steps = [time.short.as_str(), region, "oss", "aliyun_v4_request"];
    let signature = chain(b"aliyun_v4", keys, steps, "OSS4-HMAC-SHA256", &time, &scope, &request);
    authorize(headers, &format!("OSS4-HMAC-SHA256 Credential={}/{scope},Signature={signature}", keys.id))
}

fn sign_oss_v1(keys: &StaticKeys, now: SystemTime, t: &Target<'_>, headers: &mut HeaderMap) -> Result<()> {
    let date = httpdate::fmt_http_date(now);
    put(headers, DATE.as_str(), &date)?;
    if !keys.token.expose().is_empty() {
        put(headers, "x-oss-security-token", keys.token.expose())?;
    }
    let value = |name: &str| headers.get(name).map_or(&b""[..], HeaderValue::as_bytes);
    let mut text =
        [t.method.as_bytes(), value("content-md5"), value(CONTENT_TYPE.as_str()), date.as_bytes(), b""].join(&b'\n');
    push_headers(&mut text, &canonical_headers(headers, |name| name.starts_with("x-oss-"), None));
    text.extend_from_slice(t.resource);
    let mut mark = b'?';
    for (name, value) in t.query.iter().filter(|(n, _)| V1_SUBRESOURCES.contains(&n.as_str())) {
        text.push(mark);
        mark = b'&';
        text.extend_from_slice(name.as_bytes());
        if !value.is_empty() {
            text.push(b'=');
            text.extend(percent_encoding::percent_decode_str(value));
        }
    }
    let key = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, keys.secret.expose().as_bytes());
    let signature = base64(hmac::sign(&key, &text).as_ref());
    authorize(headers, &format!("OSS {}:{signature}", keys.id))
}

/// One instant in the two forms V4 signatures want.
struct Moment {
    long: String,
    short: String,
}

impl Moment {
    fn at(now: SystemTime) -> Moment {
        let secs = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let stamp = Timestamp::from_second(i64::try_from(secs).unwrap_or(0)).unwrap_or_default();
        Moment { long: stamp.format_iso8601(), short: stamp.format_date() }
    }
}

/// The signature of V4: a key derived step by step from the secret signs a text that holds the hash of the request.
fn chain(
    first: &[u8],
    keys: &StaticKeys,
    steps: [&str; 4],
    algorithm: &str,
    time: &Moment,
    scope: &str,
    request: &[u8],
) -> String {
    let mut key = [first, keys.secret.expose().as_bytes()].concat();
    for step in steps {
        key = sha256_mac(&key, step.as_bytes()).as_ref().to_vec();
    }
    let hash = efc_common::id::hex(digest::digest(&digest::SHA256, request).as_ref());
    let text = format!("{algorithm}\n{}\n{scope}\n{hash}", time.long);
    efc_common::id::hex(sha256_mac(&key, text.as_bytes()).as_ref())
}

fn sha256_mac(key: &[u8], text: &[u8]) -> hmac::Tag {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text)
}

/// The headers that are signed, sorted by name, with `host` if given.
fn canonical_headers(headers: &HeaderMap, wanted: impl Fn(&str) -> bool, host: Option<&str>) -> Vec<(String, Vec<u8>)> {
    let mut out: Vec<(String, Vec<u8>)> = headers
        .iter()
        .filter(|(name, _)| wanted(name.as_str()))
        .map(|(name, value)| (name.as_str().to_string(), value.as_bytes().trim_ascii().to_vec()))
        .collect();
    out.extend(host.map(|h| ("host".to_string(), h.as_bytes().to_vec())));
    out.sort();
    out
}

fn push_headers(text: &mut Vec<u8>, headers: &[(String, Vec<u8>)]) {
    for (name, value) in headers {
        text.extend_from_slice(name.as_bytes());
        text.push(b':');
        text.extend_from_slice(value);
        text.push(b'\n');
    }
}

/// The query as sent (`name`) or in the form AWS signs it (`name=`) where a value is empty.
pub(crate) fn query(pairs: &[(String, String)], always_equals: bool) -> String {
    pairs.iter().fold(String::new(), |mut out, (name, value)| {
        if !out.is_empty() {
            out.push('&');
        }
        // Writing to a String cannot fail.
        let _ = write!(out, "{name}");
        if always_equals || !value.is_empty() {
            let _ = write!(out, "={value}");
        }
        out
    })
}

fn put(headers: &mut HeaderMap, name: &'static str, value: &str) -> Result<()> {
    headers.insert(HeaderName::from_static(name), header_value(value)?);
    Ok(())
}

fn authorize(headers: &mut HeaderMap, value: &str) -> Result<()> {
    let mut value = header_value(value)?;
    value.set_sensitive(true);
    headers.insert(AUTHORIZATION, value);
    Ok(())
}

fn header_value(value: &str) -> Result<HeaderValue> {
    HeaderValue::from_str(value).map_err(|_| {
        Error::new(
            Kind::Invalid,
            "the access key id or token has characters that cannot be sent: check the credentials",
        )
    })
}

/// Base64 with padding.
pub(crate) fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |w, b| w << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            out.push(if i <= chunk.len() { char::from(DIGITS[(word >> (18 - 6 * i)) as usize & 63]) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests;
