//! Multipart uploads: initiate, parts, copied parts, complete, abort, listings.

use super::error::ApiError;
use super::object::{check_md5, check_metadata, check_overwrite, copy_source, kept_headers, parse_xml};
use super::request::{Answer, Req};
use super::store::{Object, Part, State, Upload};
use super::{Dialect, Reply, bucket, bucket_mut};
use crate::sign::{hex, iso_date};
use crate::xml::Xml;
use bytes::Bytes;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

/// Smallest size of a part that is not the last.
fn part_min_bytes(dialect: Dialect) -> u64 {
    match dialect {
        Dialect::Oss => 100 << 10,
        Dialect::S3 => 5 << 20,
    }
}

fn no_such_upload() -> ApiError {
    ApiError::new(404, "NoSuchUpload", "The specified upload does not exist.")
}

fn upload_of<'a>(req: &Req, state: &'a mut State) -> Result<&'a mut Upload, ApiError> {
    let id = req.param("uploadId").unwrap_or("");
    let upload = bucket_mut(state, req)?.uploads.get_mut(id).ok_or_else(no_such_upload)?;
    if upload.key == req.key { Ok(upload) } else { Err(no_such_upload()) }
}

/// POST `?uploads`.
pub(super) fn initiate(req: &Req, state: &mut State) -> Answer {
    check_metadata(req)?;
    let b = bucket_mut(state, req)?;
    check_overwrite(req, b, &req.key)?;
    let id = hex(&rand::random::<[u8; 16]>()).to_ascii_uppercase();
    let headers = kept_headers(req);
    let upload = Upload { key: req.key.clone(), headers, parts: BTreeMap::new(), started: SystemTime::now() };
    b.uploads.insert(id.clone(), upload);
    let url = req.param("encoding-type") == Some("url");
    let mut x = Xml::new("InitiateMultipartUploadResult", "");
    if url {
        x.text("EncodingType", "url");
    }
    x.text("Bucket", req.bucket_name()).key("Key", &req.key, url).text("UploadId", &id);
    Ok(Reply::new(200).xml(x.finish("InitiateMultipartUploadResult")))
}

fn part_number(req: &Req) -> Result<u32, ApiError> {
    match req.number("partNumber")? {
        Some(n @ 1..=10_000) => Ok(n as u32),
        _ => Err(ApiError::invalid_argument("Part number must be an integer between 1 and 10000.")),
    }
}

/// PUT `?partNumber&uploadId`.
pub(super) fn part(req: &Req, state: &mut State) -> Answer {
    let number = part_number(req)?;
    check_md5(req)?;
    let upload = upload_of(req, state)?;
    let part = Part::new(req.dialect, req.body.clone());
    let mut reply = Reply::new(200).header("etag", format!("\"{}\"", part.etag));
    if req.dialect == Dialect::Oss {
        reply = reply.header("x-oss-hash-crc64ecma", part.crc64.to_string());
    }
    upload.parts.insert(number, part);
    Ok(reply)
}

/// PUT `?partNumber&uploadId` with a copy source and perhaps a range of it.
pub(super) fn part_copy(req: &Req, state: &mut State) -> Answer {
    let number = part_number(req)?;
    let source = copy_source(req, state)?;
    let (start, end) = match req.own_header("copy-source-range") {
        None => (0, source.size),
        Some(text) => copy_range(text, source.size)?,
    };
    let upload = upload_of(req, state)?;
    let part = Part::new(req.dialect, Bytes::from(source.slice(start, end).concat()));
    let mut x = Xml::new("CopyPartResult", "");
    x.text("LastModified", &iso_date(part.modified)).text("ETag", &format!("\"{}\"", part.etag));
    let reply = Reply::new(200).header("etag", format!("\"{}\"", part.etag));
    upload.parts.insert(number, part);
    Ok(reply.xml(x.finish("CopyPartResult")))
}

/// `bytes=first-last`, both given and inside the source.
fn copy_range(text: &str, size: u64) -> Result<(u64, u64), ApiError> {
    let invalid = || ApiError::new(400, "InvalidArgument", "The copy source range is not valid for the source object.");
    let (first, last) = text.strip_prefix("bytes=").and_then(|r| r.split_once('-')).ok_or_else(invalid)?;
    let (first, last): (u64, u64) = (first.parse().map_err(|_| invalid())?, last.parse().map_err(|_| invalid())?);
    if first > last || last >= size {
        return Err(invalid());
    }
    Ok((first, last + 1))
}

#[derive(Deserialize)]
struct Complete {
    #[serde(rename = "Part", default)]
    parts: Vec<CompletePart>,
}

#[derive(Deserialize)]
struct CompletePart {
    #[serde(rename = "PartNumber")]
    number: u32,
    #[serde(rename = "ETag")]
    etag: String,
}

/// POST `?uploadId`.
pub(super) fn complete(req: &Req, state: &mut State) -> Answer {
    let dialect = req.dialect;
    let all = dialect == Dialect::Oss && req.own_header("complete-all").is_some_and(|v| v.eq_ignore_ascii_case("yes"));
    let upload = upload_of(req, state)?;
    let wanted = if all {
        upload.parts.iter().map(|(n, p)| CompletePart { number: *n, etag: p.etag.clone() }).collect()
    } else {
        parse_xml::<Complete>(&req.body)?.parts
    };
    let object = assemble(dialect, upload, &wanted)?;
    let b = bucket_mut(state, req)?;
    check_overwrite(req, b, &req.key)?;
    b.uploads.remove(req.param("uploadId").unwrap_or(""));
    let url = req.param("encoding-type") == Some("url");
    let mut x = Xml::new("CompleteMultipartUploadResult", "");
    if url {
        x.text("EncodingType", "url");
    }
    x.text("Location", &format!("http://{}{}", req.host, req.raw_path)).text("Bucket", req.bucket_name());
    x.key("Key", &req.key, url).text("ETag", &format!("\"{}\"", object.etag));
    let mut reply = Reply::new(200).header("etag", format!("\"{}\"", object.etag));
    reply = reply.xml(x.finish("CompleteMultipartUploadResult"));
    if dialect == Dialect::Oss {
        reply = reply.header("x-oss-hash-crc64ecma", object.crc64.to_string());
    }
    b.objects.insert(req.key.clone(), Arc::new(object));
    Ok(reply)
}

fn assemble(dialect: Dialect, upload: &Upload, wanted: &[CompletePart]) -> Result<Object, ApiError> {
    if wanted.is_empty() {
        return Err(ApiError::new(400, "MalformedXML", "You must specify at least one part."));
    }
    if wanted.windows(2).any(|w| w[0].number >= w[1].number) {
        return Err(ApiError::new(400, "InvalidPartOrder", "The list of parts was not in ascending order."));
    }
    let mut parts = Vec::with_capacity(wanted.len());
    for w in wanted {
        let fits = |p: &&Part| p.etag.eq_ignore_ascii_case(w.etag.trim_matches('"'));
        let part = upload.parts.get(&w.number).filter(fits).ok_or_else(|| {
            let message = "One or more of the specified parts could not be found or its ETag did not match.";
            ApiError::new(400, "InvalidPart", message).detail("PartNumber", w.number.to_string())
        })?;
        parts.push(part);
    }
    let (_, front) = parts.split_last().expect("at least one part was asked for");
    if front.iter().any(|p| p.size < part_min_bytes(dialect)) {
        return Err(ApiError::new(400, "EntityTooSmall", "Your proposed upload is smaller than the minimum allowed."));
    }
    Ok(Object::assembled(dialect, &parts, upload.headers.clone()))
}

/// DELETE `?uploadId`.
pub(super) fn abort(req: &Req, state: &mut State) -> Answer {
    upload_of(req, state)?;
    bucket_mut(state, req)?.uploads.remove(req.param("uploadId").unwrap_or(""));
    Ok(Reply::new(204))
}

/// GET `?uploadId`.
pub(super) fn list_parts(req: &Req, state: &mut State) -> Answer {
    let after = req.number("part-number-marker")?.unwrap_or(0) as u32;
    let limit = req.number("max-parts")?.unwrap_or(1000).min(1000) as usize;
    let id = req.param("uploadId").unwrap_or("").to_string();
    let upload = upload_of(req, state)?;
    let url = req.param("encoding-type") == Some("url");
    let mut rest = upload.parts.range(after + 1..);
    let shown: Vec<_> = rest.by_ref().take(limit).collect();
    let mut x = Xml::new("ListPartsResult", "");
    if url {
        x.text("EncodingType", "url");
    }
    x.text("Bucket", req.bucket_name()).key("Key", &req.key, url).text("UploadId", &id);
    x.value("PartNumberMarker", after).value("MaxParts", limit).value("IsTruncated", rest.next().is_some());
    x.value("NextPartNumberMarker", shown.last().map_or(after, |(n, _)| **n));
    for (number, part) in shown {
        x.open("Part").value("PartNumber", number).text("LastModified", &iso_date(part.modified));
        x.text("ETag", &format!("\"{}\"", part.etag)).value("Size", part.size);
        x.text("HashCrc64ecma", &part.crc64.to_string()).close("Part");
    }
    Ok(Reply::new(200).xml(x.finish("ListPartsResult")))
}

/// GET `?uploads`: pages by key and id. The marker's own key comes again only with ids behind the marker's.
pub(super) fn list_uploads(req: &Req, state: &State) -> Answer {
    let b = bucket(state, req)?;
    let url = req.param("encoding-type") == Some("url");
    let prefix = req.param_bytes("prefix").unwrap_or(&[]);
    let limit = match req.number("max-uploads")?.unwrap_or(1000) {
        n @ 1..=1000 => n as usize,
        _ => return Err(ApiError::invalid_argument("Argument max-uploads must be an integer between 1 and 1000.")),
    };
    let (key_marker, id_marker) = (req.param_bytes("key-marker").unwrap_or(&[]), req.param("upload-id-marker"));
    let behind = |key: &[u8], id: &str| match id_marker.filter(|_| !key_marker.is_empty()) {
        Some(marker) => (key, id) > (key_marker, marker),
        None => key_marker.is_empty() || key > key_marker,
    };
    let mut uploads: Vec<_> =
        b.uploads.iter().filter(|(id, u)| u.key.starts_with(prefix) && behind(&u.key, id)).collect();
    uploads.sort_by(|a, b| (&a.1.key, a.0).cmp(&(&b.1.key, b.0)));
    let more = uploads.len() > limit;
    uploads.truncate(limit);
    let mut x = Xml::new("ListMultipartUploadsResult", "");
    if url {
        x.text("EncodingType", "url");
    }
    x.text("Bucket", req.bucket_name()).key("Prefix", prefix, url).value("MaxUploads", limit);
    x.value("IsTruncated", more).key("KeyMarker", key_marker, url).text("UploadIdMarker", id_marker.unwrap_or(""));
    match uploads.last().filter(|_| more) {
        Some((id, last)) => x.key("NextKeyMarker", &last.key, url).text("NextUploadIdMarker", id),
        None => x.text("NextKeyMarker", "").text("NextUploadIdMarker", ""),
    };
    for (id, upload) in uploads {
        x.open("Upload").key("Key", &upload.key, url).text("UploadId", id);
        x.text("StorageClass", "Standard").text("Initiated", &iso_date(upload.started)).close("Upload");
    }
    Ok(Reply::new(200).xml(x.finish("ListMultipartUploadsResult")))
}
