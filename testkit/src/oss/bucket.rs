//! Operations on the service and on buckets: list, make, remove, describe, list objects, delete many.

use super::error::ApiError;
use super::object::{check_lock, check_md5, parse_xml};
use super::request::{Answer, Req};
use super::store::State;
use super::{Dialect, Reply, bucket, bucket_mut};
use crate::listing::{Query, page};
use crate::sign::{hex, iso_date};
use crate::xml::Xml;
use serde::Deserialize;

const S3_NAMESPACE: &str = " xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"";
/// A continuation token is this and the last name in hexadecimal: opaque, so that a client that makes up its own is found out.
const TOKEN_PREFIX: &str = "efc1";

fn namespace(dialect: Dialect) -> &'static str {
    match dialect {
        Dialect::Oss => "",
        Dialect::S3 => S3_NAMESPACE,
    }
}

fn valid_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    (3..=63).contains(&name.len()) && name.chars().all(fits) && !name.starts_with('-') && !name.ends_with('-')
}

/// GET `/`.
pub(super) fn list_buckets(req: &Req, state: &State, region: &str) -> Answer {
    let (prefix, marker) = (req.param("prefix").unwrap_or(""), req.param("marker").unwrap_or(""));
    let limit = req.number("max-keys")?.unwrap_or(100).min(1000) as usize;
    let root = "ListAllMyBucketsResult";
    let mut x = Xml::new(root, namespace(req.dialect));
    let mut fitting = state.iter().filter(|(n, _)| n.starts_with(prefix) && n.as_str() > marker);
    let shown: Vec<_> = fitting.by_ref().take(limit).collect();
    let more = fitting.next().is_some();
    if !prefix.is_empty() || !marker.is_empty() || req.has("max-keys") {
        x.text("Prefix", prefix).text("Marker", marker).value("MaxKeys", limit).value("IsTruncated", more);
        if let (true, Some((last, _))) = (more, shown.last()) {
            x.text("NextMarker", last);
        }
    }
    owner(&mut x);
    x.open("Buckets");
    for (name, b) in shown {
        x.open("Bucket").text("Name", name).text("CreationDate", &iso_date(b.created));
        if req.dialect == Dialect::Oss {
            x.text("Location", &format!("oss-{region}")).text("StorageClass", "Standard").text("Region", region);
            x.text("ExtranetEndpoint", &req.host).text("IntranetEndpoint", &req.host);
        }
        x.close("Bucket");
    }
    x.close("Buckets");
    Ok(Reply::new(200).xml(x.finish(root)))
}

fn owner(x: &mut Xml) {
    x.open("Owner").text("ID", "1000").text("DisplayName", "efc").close("Owner");
}

/// PUT of a bucket.
pub(super) fn create(req: &Req, state: &mut State) -> Answer {
    let name = req.bucket_name();
    if !valid_name(name) {
        return Err(ApiError::new(400, "InvalidBucketName", "The specified bucket is not valid."));
    }
    let acl = req.own_header("acl").map(str::to_string);
    let b = state.entry(name.to_string()).or_default();
    if let Some(acl) = acl {
        b.acl = acl;
    }
    Ok(Reply::new(200).header("location", format!("/{name}")))
}

/// DELETE of a bucket.
pub(super) fn delete(req: &Req, state: &mut State) -> Answer {
    let b = bucket(state, req)?;
    if !b.objects.is_empty() || !b.uploads.is_empty() {
        return Err(ApiError::new(409, "BucketNotEmpty", "The bucket you tried to delete is not empty."));
    }
    state.remove(req.bucket_name());
    Ok(Reply::new(204))
}

/// HEAD of a bucket.
pub(super) fn head(req: &Req, state: &State) -> Answer {
    bucket(state, req)?;
    Ok(Reply::new(200))
}

/// GET `?location`.
pub(super) fn location(req: &Req, state: &State, region: &str) -> Answer {
    bucket(state, req)?;
    let root = "LocationConstraint";
    let name = match req.dialect {
        Dialect::Oss => format!("oss-{region}"),
        Dialect::S3 if region == "us-east-1" => String::new(),
        Dialect::S3 => region.to_string(),
    };
    let mut x = Xml::new(root, namespace(req.dialect));
    x.characters(&name);
    Ok(Reply::new(200).xml(x.finish(root)))
}

/// GET `?bucketInfo`.
pub(super) fn info(req: &Req, state: &State, region: &str) -> Answer {
    let b = bucket(state, req)?;
    let mut x = Xml::new("BucketInfo", "");
    x.open("Bucket").text("Name", req.bucket_name()).text("CreationDate", &iso_date(b.created));
    x.text("Location", &format!("oss-{region}")).text("StorageClass", "Standard");
    x.text("ExtranetEndpoint", &req.host).text("IntranetEndpoint", &req.host).text("DataRedundancyType", "LRS");
    owner(&mut x);
    x.open("AccessControlList").text("Grant", &b.acl).close("AccessControlList").close("Bucket");
    Ok(Reply::new(200).xml(x.finish("BucketInfo")))
}

/// GET `?stat`.
pub(super) fn stat(req: &Req, state: &State) -> Answer {
    let b = bucket(state, req)?;
    let bytes: u64 = b.objects.values().map(|o| o.size).sum();
    let mut x = Xml::new("BucketStat", "");
    x.value("Storage", bytes).value("ObjectCount", b.objects.len());
    x.value("MultipartUploadCount", b.uploads.len()).value("LiveChannelCount", 0).value("LastModifiedTime", 0);
    x.value("StandardStorage", bytes).value("StandardObjectCount", b.objects.len());
    Ok(Reply::new(200).xml(x.finish("BucketStat")))
}

/// `?acl`: GET and PUT.
pub(super) fn acl(req: &Req, state: &mut State) -> Answer {
    let b = bucket_mut(state, req)?;
    if req.method == "PUT" {
        b.acl = req.own_header("acl").unwrap_or("private").to_string();
        return Ok(Reply::new(200));
    }
    let mut x = Xml::new("AccessControlPolicy", "");
    owner(&mut x);
    x.open("AccessControlList").text("Grant", &b.acl).close("AccessControlList");
    Ok(Reply::new(200).xml(x.finish("AccessControlPolicy")))
}

/// GET `?versioning`: never switched on.
pub(super) fn versioning(req: &Req, state: &State) -> Answer {
    bucket(state, req)?;
    Ok(Reply::new(200)
        .xml(Xml::new("VersioningConfiguration", namespace(req.dialect)).finish("VersioningConfiguration")))
}

fn token_of(name: &[u8]) -> String {
    format!("{TOKEN_PREFIX}{}", hex(name))
}

fn name_of(token: &str) -> Result<Vec<u8>, ApiError> {
    let invalid = || ApiError::invalid_argument("The continuation token provided is incorrect.");
    let digits = token.strip_prefix(TOKEN_PREFIX).filter(|d| d.is_ascii() && d.len() % 2 == 0).ok_or_else(invalid)?;
    (0..digits.len()).step_by(2).map(|i| u8::from_str_radix(&digits[i..i + 2], 16).map_err(|_| invalid())).collect()
}

/// OSS lists 100 names unless told and refuses more than 1,000; S3 lists 1,000 and cuts down.
fn limit_of(req: &Req) -> Result<usize, ApiError> {
    let asked = req.number("max-keys")?;
    match (req.dialect, asked) {
        (Dialect::Oss, None) => Ok(100),
        (Dialect::Oss, Some(n)) if (1..=1000).contains(&n) => Ok(n as usize),
        (Dialect::Oss, Some(_)) => {
            Err(ApiError::invalid_argument("Argument max-keys must be an integer between 1 and 1000."))
        }
        (Dialect::S3, n) => Ok(n.unwrap_or(1000).min(1000) as usize),
    }
}

/// GET of a bucket: ListObjects (v1) or ListObjectsV2.
pub(super) fn list(req: &Req, state: &State) -> Answer {
    let b = bucket(state, req)?;
    let v2 = req.param("list-type") == Some("2");
    let bytes = |name: &str| req.param_bytes(name).unwrap_or(&[]).to_vec();
    let url = req.param("encoding-type") == Some("url");
    let after = match req.param("continuation-token").filter(|t| v2 && !t.is_empty()) {
        Some(token) => name_of(token)?,
        None if v2 => bytes("start-after"),
        None => bytes("marker"),
    };
    let query = Query { prefix: bytes("prefix"), delimiter: bytes("delimiter"), after, limit: limit_of(req)? };
    let found = page(&b.objects, &query);
    let mut x = Xml::new("ListBucketResult", namespace(req.dialect));
    x.text("Name", req.bucket_name()).key("Prefix", &query.prefix, url).value("MaxKeys", query.limit);
    x.key("Delimiter", &query.delimiter, url).value("IsTruncated", found.next.is_some());
    if url {
        x.text("EncodingType", "url");
    }
    if v2 {
        x.value("KeyCount", found.contents.len() + found.prefixes.len());
        x.key("StartAfter", &bytes("start-after"), url);
        if let Some(token) = req.param("continuation-token") {
            x.text("ContinuationToken", token);
        }
        if let Some(next) = &found.next {
            x.text("NextContinuationToken", &token_of(next));
        }
    } else {
        x.key("Marker", &bytes("marker"), url);
        // S3 names the next marker only when names were grouped; else the client takes the last key.
        if let Some(next) = found.next.as_ref().filter(|_| req.dialect == Dialect::Oss || !query.delimiter.is_empty()) {
            x.key("NextMarker", next, url);
        }
    }
    for (key, object) in found.contents {
        x.open("Contents").key("Key", key, url).text("LastModified", &iso_date(object.modified));
        x.text("ETag", &format!("\"{}\"", object.etag));
        if req.dialect == Dialect::Oss {
            x.text("Type", object.kind.name());
        }
        x.value("Size", object.size);
        x.text("StorageClass", if req.dialect == Dialect::Oss { "Standard" } else { "STANDARD" });
        if !v2 || req.param("fetch-owner") == Some("true") {
            owner(&mut x);
        }
        x.close("Contents");
    }
    for prefix in found.prefixes {
        x.open("CommonPrefixes").key("Prefix", &prefix, url).close("CommonPrefixes");
    }
    Ok(Reply::new(200).xml(x.finish("ListBucketResult")))
}

#[derive(Deserialize)]
struct DeleteMany {
    #[serde(rename = "Quiet", default)]
    quiet: bool,
    #[serde(rename = "Object", default)]
    objects: Vec<DeleteOne>,
}

#[derive(Deserialize)]
struct DeleteOne {
    #[serde(rename = "Key")]
    key: String,
}

/// POST `?delete`. Both stores want the body's digest; S3 names what it could not delete, OSS leaves it out of the answer.
pub(super) fn delete_many(req: &Req, state: &mut State) -> Answer {
    let digest = |(n, _): &(String, String)| n == "content-md5" || n.starts_with("x-amz-checksum-");
    if !req.headers.iter().any(digest) {
        return Err(match req.dialect {
            Dialect::S3 => {
                let message = "Missing required header for this request: Content-MD5 OR x-amz-checksum-*";
                ApiError::new(400, "InvalidRequest", message)
            }
            Dialect::Oss => ApiError::new(400, "MissingArgument", "Missing Some Required Arguments: Content-MD5"),
        });
    }
    check_md5(req)?;
    let b = bucket_mut(state, req)?;
    let wanted: DeleteMany = parse_xml(&req.body)?;
    if wanted.objects.is_empty() || wanted.objects.len() > 1000 {
        return Err(ApiError::new(400, "MalformedXML", "Between 1 and 1000 keys can be deleted at once."));
    }
    let url = req.param("encoding-type") == Some("url") && req.dialect == Dialect::Oss;
    let mut x = Xml::new("DeleteResult", namespace(req.dialect));
    if url {
        x.text("EncodingType", "url");
    }
    for object in wanted.objects {
        let key = object.key.as_bytes();
        match check_lock(req.dialect, b, key) {
            Ok(()) => {
                b.objects.remove(key);
                if !wanted.quiet {
                    x.open("Deleted").key("Key", key, url).close("Deleted");
                }
            }
            Err(e) if req.dialect == Dialect::S3 => {
                x.open("Error").key("Key", key, url).text("Code", &e.code).text("Message", &e.message).close("Error");
            }
            Err(_) => {}
        }
    }
    Ok(Reply::new(200).xml(x.finish("DeleteResult")))
}
