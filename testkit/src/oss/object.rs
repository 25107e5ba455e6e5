//! Operations on one object: GET, HEAD, PUT, DELETE, append, copy, symlink, tags.

use super::Dialect;
use super::error::ApiError;
use super::request::{Answer, Req};
use super::store::{Bucket, Object, ObjectKind, State};
use super::{Reply, bucket, bucket_mut};
use crate::sign::{encode, http_date, parse_date};
use crate::xml::Xml;
use base64::prelude::{BASE64_STANDARD, Engine};
use bytes::Bytes;
use md5::{Digest, Md5};
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

/// Headers of a PUT that come back with every GET.
const KEPT_HEADERS: &[&str] =
    &["content-type", "cache-control", "content-disposition", "content-encoding", "content-language", "expires"];

/// The headers of a request that an object keeps.
pub(super) fn kept_headers(req: &Req) -> BTreeMap<String, String> {
    let meta = req.dialect.header("meta-");
    let mut kept: BTreeMap<String, String> = req
        .headers
        .iter()
        .filter(|(n, _)| KEPT_HEADERS.contains(&n.as_str()) || n.starts_with(&meta))
        .map(|(n, v)| (n.clone(), v.clone()))
        .collect();
    if kept.get("content-encoding").is_some_and(|v| v == "aws-chunked") {
        kept.remove("content-encoding");
    }
    let default = match req.dialect {
        Dialect::Oss => "application/octet-stream",
        Dialect::S3 => "binary/octet-stream",
    };
    kept.entry("content-type".into()).or_insert_with(|| default.into());
    kept
}

/// User metadata of one object, names and values: S3 takes 2 KiB, OSS 8 KiB.
///
/// # Errors
/// `MetadataTooLarge` (S3) or `InvalidArgument` (OSS).
pub(super) fn check_metadata(req: &Req) -> Result<(), ApiError> {
    let meta = req.dialect.header("meta-");
    let size: usize = req.headers.iter().filter_map(|(n, v)| Some(n.strip_prefix(&meta)?.len() + v.len())).sum();
    match req.dialect {
        Dialect::S3 if size > 2 << 10 => Err(ApiError::new(
            400,
            "MetadataTooLarge",
            "Your metadata headers exceed the maximum allowed metadata size.",
        )),
        Dialect::Oss if size > 8 << 10 => Err(ApiError::invalid_argument("The user metadata is larger than 8 KB.")),
        _ => Ok(()),
    }
}

/// Refuses to touch an object that is under retention.
///
/// # Errors
/// `AccessDenied` (S3 Object Lock) or `FileImmutable` (OSS).
pub(super) fn check_lock(dialect: Dialect, bucket: &Bucket, key: &[u8]) -> Result<(), ApiError> {
    match dialect {
        _ if !bucket.locked.contains(key) => Ok(()),
        Dialect::S3 => Err(ApiError::access_denied("Access Denied because object protected by object lock.")),
        Dialect::Oss => Err(ApiError::new(409, "FileImmutable", "The object you specified is immutable.")),
    }
}

/// Refuses a body that does not fit its Content-MD5.
pub(super) fn check_md5(req: &Req) -> Result<(), ApiError> {
    match req.header("content-md5") {
        Some(want) if BASE64_STANDARD.encode(Md5::digest(&req.body)) != want => {
            Err(ApiError::new(400, "InvalidDigest", "The Content-MD5 you specified did not match what was received."))
        }
        _ => Ok(()),
    }
}

/// Refuses to replace an object when the request says so. In a bucket with versioning OSS replaces nothing and ignores the wish.
pub(super) fn check_overwrite(req: &Req, bucket: &Bucket, key: &[u8]) -> Result<(), ApiError> {
    check_lock(req.dialect, bucket, key)?;
    if bucket.versioned && req.dialect == Dialect::Oss {
        return Ok(());
    }
    let existing = bucket.objects.get(key);
    if existing.is_some() && req.own_header("forbid-overwrite") == Some("true") && req.dialect == Dialect::Oss {
        let message = "The object you specified already exists and can not be overwritten.";
        return Err(ApiError::new(409, "FileAlreadyExists", message));
    }
    if req.dialect == Dialect::S3 {
        if existing.is_some() && req.header("if-none-match") == Some("*") {
            return Err(ApiError::precondition_failed("If-None-Match"));
        }
        match (req.header("if-match"), existing) {
            (Some(_), None) => return Err(ApiError::no_such_key(key)),
            (Some(v), Some(o)) if !etag_listed(v, &o.etag) => return Err(ApiError::precondition_failed("If-Match")),
            _ => {}
        }
    }
    Ok(())
}

fn etag_listed(list: &str, etag: &str) -> bool {
    list.split(',').any(|t| t.trim() == "*" || t.trim().trim_matches('"') == etag)
}

/// The conditions of a read (or, with a prefix such as `x-oss-copy-source-`, of the source of a copy). `Some` is 304.
fn check_conditions(req: &Req, prefix: &str, object: &Object) -> Result<Option<Reply>, ApiError> {
    let header = |name: &str| req.header(&format!("{prefix}{name}"));
    let modified = object.modified.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
    let not_modified = || {
        Reply::new(304)
            .header("etag", format!("\"{}\"", object.etag))
            .header("last-modified", http_date(object.modified))
    };
    if header("if-match").is_some_and(|v| !etag_listed(v, &object.etag)) {
        return Err(ApiError::precondition_failed("If-Match"));
    }
    if header("if-match").is_none() && header("if-unmodified-since").and_then(parse_date).is_some_and(|t| modified > t)
    {
        return Err(ApiError::precondition_failed("If-Unmodified-Since"));
    }
    if let Some(v) = header("if-none-match") {
        return Ok(etag_listed(v, &object.etag).then(not_modified));
    }
    Ok(header("if-modified-since").and_then(parse_date).is_some_and(|t| modified <= t).then(not_modified))
}

/// The object of a key, following one symlink. Gives also whether one was followed.
fn resolve<'a>(bucket: &'a Bucket, key: &[u8]) -> Result<(&'a Arc<Object>, bool), ApiError> {
    let object = bucket.objects.get(key).ok_or_else(|| ApiError::no_such_key(key))?;
    let Some(target) = &object.target else { return Ok((object, false)) };
    let missing = || ApiError::new(404, "SymlinkTargetNotExist", "The symlink target object does not exist.");
    let found = bucket.objects.get(target).ok_or_else(missing)?;
    if found.target.is_some() {
        return Err(ApiError::new(400, "InvalidTargetType", "The symlink's target is a symlink."));
    }
    Ok((found, true))
}

/// Which bytes a Range header asks for.
#[derive(Debug, PartialEq, Eq)]
enum RangeAnswer {
    Whole,
    Part(u64, u64),
    Unsatisfiable,
}

/// S3 follows RFC 9110. OSS does so only with `x-oss-range-behavior: standard`; else a range that reaches beyond the object, at its
/// start or its end, is ignored and the whole object comes with 200.
fn range_of(header: Option<&str>, size: u64, standard: bool) -> RangeAnswer {
    let parsed = || -> Option<(Option<u64>, Option<u64>)> {
        let (first, last) = header?.trim().strip_prefix("bytes=")?.split_once('-')?;
        let number = |s: &str| if s.is_empty() { Some(None) } else { s.parse().ok().map(Some) };
        Some((number(first)?, number(last)?))
    };
    let (start, end) = match parsed() {
        None | Some((None, None)) => return RangeAnswer::Whole,
        Some((Some(first), Some(last))) if last < first => return RangeAnswer::Whole,
        Some((Some(first), last)) => (first, last.map_or(size, |l| l.saturating_add(1))),
        Some((None, Some(suffix))) if standard || suffix <= size => (size.saturating_sub(suffix), size),
        Some((None, Some(_))) => return RangeAnswer::Whole,
    };
    if start >= size {
        return if standard { RangeAnswer::Unsatisfiable } else { RangeAnswer::Whole };
    }
    if end > size && !standard {
        return RangeAnswer::Whole;
    }
    RangeAnswer::Part(start, end.min(size))
}

/// GET and HEAD.
pub(super) fn get(req: &Req, state: &State) -> Answer {
    let (object, linked) = resolve(bucket(state, req)?, &req.key)?;
    if let Some(not_modified) = check_conditions(req, "", object)? {
        return Ok(not_modified);
    }
    let oss = req.dialect == Dialect::Oss;
    let standard = !oss || req.own_header("range-behavior") == Some("standard");
    let (status, start, end) = match range_of(req.header("range"), object.size, standard) {
        RangeAnswer::Whole => (200, 0, object.size),
        RangeAnswer::Part(start, end) => (206, start, end),
        RangeAnswer::Unsatisfiable => {
            let message = "The requested range cannot be satisfied.";
            return Err(
                ApiError::new(416, "InvalidRange", message).header("content-range", format!("bytes */{}", object.size))
            );
        }
    };
    let mut reply = Reply::new(status)
        .header("etag", format!("\"{}\"", object.etag))
        .header("last-modified", http_date(object.modified))
        .header("accept-ranges", "bytes");
    if status == 206 {
        reply = reply.header("content-range", format!("bytes {start}-{}/{}", end - 1, object.size));
    }
    for (name, value) in &object.headers {
        let wanted = req.param(&format!("response-{name}")).unwrap_or(value);
        reply = reply.header(name, wanted);
    }
    if oss {
        let kind = if linked { ObjectKind::Symlink } else { object.kind };
        reply = reply.header("x-oss-object-type", kind.name()).header("x-oss-storage-class", "Standard");
        reply = reply.header("x-oss-hash-crc64ecma", object.crc64.to_string());
        if object.kind == ObjectKind::Appendable {
            reply = reply.header("x-oss-next-append-position", object.size.to_string());
        }
        if !object.tags.is_empty() {
            reply = reply.header("x-oss-tagging-count", object.tags.len().to_string());
        }
    }
    Ok(reply.chunks(object.slice(start, end), end - start))
}

/// HEAD with `objectMeta`: the least there is to know, of a symlink itself.
pub(super) fn object_meta(req: &Req, state: &State) -> Answer {
    let object = bucket(state, req)?.objects.get(&req.key).ok_or_else(|| ApiError::no_such_key(&req.key))?;
    Ok(Reply::new(200)
        .header("etag", format!("\"{}\"", object.etag))
        .header("last-modified", http_date(object.modified))
        .header("x-oss-hash-crc64ecma", object.crc64.to_string())
        .chunks(object.slice(0, object.size), object.size))
}

fn stored(dialect: Dialect, object: &Object) -> Reply {
    let reply = Reply::new(200).header("etag", format!("\"{}\"", object.etag));
    match dialect {
        Dialect::Oss => reply.header("x-oss-hash-crc64ecma", object.crc64.to_string()),
        Dialect::S3 => reply,
    }
}

/// PUT of an object.
pub(super) fn put(req: &Req, state: &mut State) -> Answer {
    check_md5(req)?;
    check_metadata(req)?;
    let bucket = bucket_mut(state, req)?;
    check_overwrite(req, bucket, &req.key)?;
    let mut object = Object::normal(req.dialect, req.body.clone(), kept_headers(req));
    object.tags = header_tags(req);
    let reply = stored(req.dialect, &object);
    bucket.objects.insert(req.key.clone(), Arc::new(object));
    Ok(reply)
}

/// DELETE of an object; one that does not exist is deleted just as well.
pub(super) fn delete(req: &Req, state: &mut State) -> Answer {
    let bucket = bucket_mut(state, req)?;
    check_lock(req.dialect, bucket, &req.key)?;
    bucket.objects.remove(&req.key);
    Ok(Reply::new(204))
}

/// POST `?append&position=N`.
pub(super) fn append(req: &Req, state: &mut State) -> Answer {
    let position = req.number("position")?.ok_or_else(|| ApiError::invalid_argument("position is missing."))?;
    check_md5(req)?;
    check_metadata(req)?;
    if position > 0 && req.headers.iter().any(|(n, _)| n.starts_with("x-oss-meta-")) {
        return Err(ApiError::invalid_argument("User metadata can be given to the first append only."));
    }
    let bucket = bucket_mut(state, req)?;
    check_overwrite(req, bucket, &req.key)?;
    let existing = bucket.objects.get(&req.key);
    if existing.is_some_and(|o| o.kind != ObjectKind::Appendable) {
        return Err(ApiError::new(409, "ObjectNotAppendable", "The object is not appendable."));
    }
    let (length, crc64) = existing.map_or((0, 0), |o| (o.size, o.crc64));
    if position != length {
        let message = "Position is not equal to file length.";
        return Err(ApiError::new(409, "PositionNotEqualToLength", message)
            .header("x-oss-next-append-position", length.to_string())
            .header("x-oss-hash-crc64ecma", crc64.to_string()));
    }
    let object = match existing {
        Some(o) => o.appended(req.dialect, req.body.clone()),
        None => {
            let mut fresh = Object::normal(req.dialect, Bytes::new(), kept_headers(req));
            fresh.kind = ObjectKind::Appendable;
            fresh.appended(req.dialect, req.body.clone())
        }
    };
    let reply = stored(req.dialect, &object).header("x-oss-next-append-position", object.size.to_string());
    bucket.objects.insert(req.key.clone(), Arc::new(object));
    Ok(reply)
}

/// The source of a copy, after its conditions.
pub(super) fn copy_source(req: &Req, state: &State) -> Result<Arc<Object>, ApiError> {
    let text = req.own_header("copy-source").unwrap_or("");
    let decoded: Vec<u8> = percent_decode_str(text.trim_start_matches('/')).collect();
    let malformed = || ApiError::invalid_argument("The copy source must be /bucket/key.");
    let slash = decoded.iter().position(|b| *b == b'/').ok_or_else(malformed)?;
    let name = String::from_utf8_lossy(&decoded[..slash]);
    let from = state.get(name.as_ref()).ok_or_else(|| ApiError::no_such_bucket(&name))?;
    let (object, _) = resolve(from, &decoded[slash + 1..])?;
    match check_conditions(req, &req.dialect.header("copy-source-"), object)? {
        Some(_) => Err(ApiError::precondition_failed("copy-source")),
        None => Ok(object.clone()),
    }
}

/// Largest object that one request copies.
fn copy_max_bytes(dialect: Dialect) -> u64 {
    match dialect {
        Dialect::Oss => 1 << 30,
        Dialect::S3 => 5 << 30,
    }
}

/// PUT with a copy source.
pub(super) fn copy(req: &Req, state: &mut State) -> Answer {
    let source = copy_source(req, state)?;
    check_metadata(req)?;
    let replaces = req.own_header("metadata-directive").is_some_and(|d| d.eq_ignore_ascii_case("REPLACE"));
    let onto_itself = bucket(state, req)?.objects.get(&req.key).is_some_and(|o| Arc::ptr_eq(o, &source));
    if req.dialect == Dialect::S3 && onto_itself && !replaces {
        let message = "This copy request is illegal because it is trying to copy an object to itself without changing \
            the object's metadata.";
        return Err(ApiError::new(400, "InvalidRequest", message));
    }
    if source.size > copy_max_bytes(req.dialect) {
        return Err(ApiError::new(400, "InvalidRequest", "The specified copy source is larger than the maximum."));
    }
    let bucket = bucket_mut(state, req)?;
    check_overwrite(req, bucket, &req.key)?;
    let mut object = Object::clone(&source);
    object.modified = std::time::SystemTime::now();
    if object.kind == ObjectKind::Appendable {
        object.kind = ObjectKind::Normal;
    }
    if replaces {
        object.headers = kept_headers(req);
    }
    if req.own_header("tagging-directive").is_some_and(|d| d.eq_ignore_ascii_case("REPLACE")) {
        object.tags = header_tags(req);
    }
    let mut x = Xml::new("CopyObjectResult", "");
    x.text("LastModified", &crate::sign::iso_date(object.modified)).text("ETag", &format!("\"{}\"", object.etag));
    let reply = stored(req.dialect, &object).xml(x.finish("CopyObjectResult"));
    bucket.objects.insert(req.key.clone(), Arc::new(object));
    Ok(reply)
}

/// PUT `?symlink`.
pub(super) fn put_symlink(req: &Req, state: &mut State) -> Answer {
    let target = req.own_header("symlink-target").filter(|t| !t.is_empty());
    let target = target.ok_or_else(|| ApiError::invalid_argument("x-oss-symlink-target is missing."))?;
    let bucket = bucket_mut(state, req)?;
    check_overwrite(req, bucket, &req.key)?;
    let target: Vec<u8> = percent_decode_str(target).collect();
    let mut object = Object::normal(req.dialect, Bytes::new(), kept_headers(req));
    object.etag = crate::sign::hex(&Md5::digest(&target)).to_ascii_uppercase();
    object.kind = ObjectKind::Symlink;
    object.target = Some(target);
    let reply = Reply::new(200).header("etag", format!("\"{}\"", object.etag));
    bucket.objects.insert(req.key.clone(), Arc::new(object));
    Ok(reply)
}

/// GET `?symlink`.
pub(super) fn get_symlink(req: &Req, state: &State) -> Answer {
    let object = bucket(state, req)?.objects.get(&req.key).ok_or_else(|| ApiError::no_such_key(&req.key))?;
    let target = object.target.as_ref();
    let target = target.ok_or_else(|| ApiError::new(400, "NotSymlink", "The object is not a symlink."))?;
    Ok(Reply::new(200)
        .header("x-oss-symlink-target", encode(target, true))
        .header("etag", format!("\"{}\"", object.etag))
        .header("last-modified", http_date(object.modified)))
}

fn header_tags(req: &Req) -> Vec<(String, String)> {
    let text = |s: &str| percent_decode_str(s).decode_utf8_lossy().into_owned();
    let pairs = req.own_header("tagging").unwrap_or("").split('&').filter(|p| !p.is_empty());
    pairs.map(|p| p.split_once('=').map_or((text(p), String::new()), |(k, v)| (text(k), text(v)))).collect()
}

#[derive(Deserialize)]
struct Tagging {
    #[serde(rename = "TagSet")]
    set: TagSet,
}

#[derive(Deserialize)]
struct TagSet {
    #[serde(rename = "Tag", default)]
    tags: Vec<Tag>,
}

#[derive(Deserialize)]
struct Tag {
    #[serde(rename = "Key")]
    key: String,
    #[serde(rename = "Value", default)]
    value: String,
}

/// `?tagging`: GET, PUT, DELETE.
pub(super) fn tagging(req: &Req, state: &mut State) -> Answer {
    let bucket = bucket_mut(state, req)?;
    let object = bucket.objects.get_mut(&req.key).ok_or_else(|| ApiError::no_such_key(&req.key))?;
    match req.method.as_str() {
        "GET" => {
            let mut x = Xml::new("Tagging", "");
            x.open("TagSet");
            for (key, value) in &object.tags {
                x.open("Tag").text("Key", key).text("Value", value).close("Tag");
            }
            x.close("TagSet");
            Ok(Reply::new(200).xml(x.finish("Tagging")))
        }
        "PUT" => {
            let parsed: Tagging = parse_xml(&req.body)?;
            let mut changed = Object::clone(object);
            changed.tags = parsed.set.tags.into_iter().map(|t| (t.key, t.value)).collect();
            *object = Arc::new(changed);
            Ok(Reply::new(200))
        }
        "DELETE" => {
            let mut changed = Object::clone(object);
            changed.tags.clear();
            *object = Arc::new(changed);
            Ok(Reply::new(204))
        }
        _ => Err(ApiError::method_not_allowed()),
    }
}

/// A body that should be an XML document.
///
/// # Errors
/// `MalformedXML` when it is not.
pub(super) fn parse_xml<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let malformed =
        |e: String| ApiError::new(400, "MalformedXML", format!("The XML you provided was not well-formed: {e}"));
    let text = std::str::from_utf8(body).map_err(|e| malformed(e.to_string()))?;
    quick_xml::de::from_str(text).map_err(|e| malformed(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_both_stores() {
        use RangeAnswer::{Part, Unsatisfiable, Whole};
        let cases = [
            ("bytes=0-9", Part(0, 10), Part(0, 10)),
            ("bytes=500-", Part(500, 1000), Part(500, 1000)),
            ("bytes=-100", Part(900, 1000), Part(900, 1000)),
            ("bytes=500-2000", Part(500, 1000), Whole),
            ("bytes=1000-2000", Unsatisfiable, Whole),
            ("bytes=-2000", Part(0, 1000), Whole),
            ("bytes=9-0", Whole, Whole),
            ("bytes=x-", Whole, Whole),
            ("lines=0-9", Whole, Whole),
            ("bytes=-", Whole, Whole),
        ];
        for (header, standard, oss) in cases {
            assert_eq!(range_of(Some(header), 1000, true), standard, "{header}");
            assert_eq!(range_of(Some(header), 1000, false), oss, "{header}");
        }
        assert_eq!(range_of(None, 0, true), Whole);
        assert_eq!(range_of(Some("bytes=0-0"), 0, true), Unsatisfiable);
    }
}
