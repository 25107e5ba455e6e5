//! The answer to ListObjects (version 2), which S3 and OSS share: XML in, raw keys out. Pure and bounded: the caller limits the
//! body, this file looks at each byte once.
//!
//! We always ask for `encoding-type=url`, since XML cannot carry most control characters. Keys then come percent-encoded, and a space
//! as `+` at AWS and OSS, while SeaweedFS leaves a plus sign bare: the caller says which ([`Plus`]).

use super::version::{self, ETAG_BYTES_MAX, Version};
use efc_common::{Error, Kind, Result, Retry};
use percent_encoding::percent_decode;
use quick_xml::events::{BytesRef, Event};
use reqsign_core::time::Timestamp;
use std::borrow::Cow;

/// What a bare `+` in an encoded key stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Plus {
    /// A space, as in HTML forms.
    Space,
    /// Itself.
    Literal,
}

/// One object of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Object {
    /// Its whole key.
    pub(crate) key: Vec<u8>,
    /// Its version.
    pub(crate) version: Version,
}

/// One page.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Listing {
    /// Objects, in the server's order.
    pub(crate) objects: Vec<Object>,
    /// Common prefixes, each ending in the delimiter.
    pub(crate) prefixes: Vec<Vec<u8>>,
    /// Where the next page starts; `None` at the end.
    pub(crate) next: Option<String>,
    /// Keys that cannot be used, with the reason.
    pub(crate) unusable: Vec<(Vec<u8>, &'static str)>,
}

/// Fields of the element that is being read.
#[derive(Default)]
struct Fields {
    key: Option<String>,
    size: Option<String>,
    mtime: Option<String>,
    etag: Option<String>,
    symlink: bool,
    prefix: Option<String>,
}

/// Reads a page.
pub(crate) fn parse(body: &[u8], plus: Plus) -> Result<Listing> {
    let text = String::from_utf8_lossy(body);
    // The server ignored the encoding we asked for: what could not be spelt as UTF-8 is lost.
    let lossy = matches!(text, Cow::Owned(_));
    let mut page = Page { plus, lossy, ..Page::default() };
    let mut seen_root = false;
    each_element(&text, |event| {
        match event {
            Element::Start(path) => {
                seen_root |= path.first().is_some_and(|n| n == "ListBucketResult");
                if path.len() == 2 {
                    page.fields = Fields::default();
                }
            }
            Element::End(path, value) => page.end(path, value),
        }
        Ok(())
    })?;
    if !seen_root {
        return Err(corrupt("the answer to a list request is no ListBucketResult: is this an S3 or OSS endpoint?"));
    }
    page.finish()
}

fn corrupt(message: impl Into<String>) -> Error {
    Error::new(Kind::Corrupt, message).with_retry(Retry::Later)
}

struct Page {
    plus: Plus,
    lossy: bool,
    encoded: bool,
    truncated: bool,
    token: Option<String>,
    fields: Fields,
    objects: Vec<(String, Fields)>,
    prefixes: Vec<String>,
}

impl Default for Page {
    fn default() -> Self {
        Page {
            plus: Plus::Space,
            lossy: false,
            encoded: false,
            truncated: false,
            token: None,
            fields: Fields::default(),
            objects: Vec::new(),
            prefixes: Vec::new(),
        }
    }
}

impl Page {
    fn end(&mut self, path: &[String], value: String) {
        let names: Vec<&str> = path.iter().skip(1).map(String::as_str).collect();
        let f = &mut self.fields;
        match names.as_slice() {
            ["EncodingType"] => self.encoded = value == "url",
            ["IsTruncated"] => self.truncated = value.trim() == "true",
            ["NextContinuationToken"] => self.token = Some(value),
            ["Contents", "Key"] => f.key = Some(value),
            ["Contents", "Size"] => f.size = Some(value),
            ["Contents", "LastModified"] => f.mtime = Some(value),
            ["Contents", "ETag"] => f.etag = Some(value),
            ["Contents", "Type"] => f.symlink = value == "Symlink",
            ["CommonPrefixes", "Prefix"] => f.prefix = Some(value),
            ["Contents"] => {
                let mut fields = std::mem::take(f);
                if let Some(key) = fields.key.take() {
                    self.objects.push((key, fields));
                }
            }
            ["CommonPrefixes"] => self.prefixes.extend(f.prefix.take()),
            _ => {}
        }
    }

    fn key(&self, text: &str) -> Vec<u8> {
        if !self.encoded {
            return text.as_bytes().to_vec();
        }
        match self.plus {
            Plus::Space if text.contains('+') => percent_decode(text.replace('+', " ").as_bytes()).collect(),
            _ => percent_decode(text.as_bytes()).collect(),
        }
    }

    /// `Err` with the reason when the key was damaged on its way.
    fn usable_key(&self, text: &str) -> std::result::Result<Vec<u8>, (Vec<u8>, &'static str)> {
        if self.lossy && text.contains('\u{fffd}') {
            return Err((text.as_bytes().to_vec(), "the server lists this key with bytes it cannot spell"));
        }
        Ok(self.key(text))
    }

    fn finish(self) -> Result<Listing> {
        let mut out = Listing::default();
        for prefix in &self.prefixes {
            match self.usable_key(prefix) {
                Ok(key) => out.prefixes.push(key),
                Err(hidden) => out.unusable.push(hidden),
            }
        }
        for (key, fields) in &self.objects {
            let key = match self.usable_key(key) {
                Ok(key) => key,
                Err(hidden) => {
                    out.unusable.push(hidden);
                    continue;
                }
            };
            match version_of(fields) {
                Ok(version) => out.objects.push(Object { key, version }),
                Err(reason) => out.unusable.push((key, reason)),
            }
        }
        if self.truncated {
            let token = self.token.filter(|t| !t.is_empty());
            out.next = Some(token.ok_or_else(|| corrupt("a truncated list page has no NextContinuationToken"))?);
        }
        Ok(out)
    }
}

fn version_of(fields: &Fields) -> std::result::Result<Version, &'static str> {
    if fields.symlink {
        return Err("OSS symbolic links are not shown");
    }
    let size = fields.size.as_deref().and_then(|s| s.trim().parse().ok()).ok_or("the server lists no size for it")?;
    let mtime_secs = fields
        .mtime
        .as_deref()
        .and_then(|t| t.trim().parse::<Timestamp>().ok())
        .map(|t| t.as_second())
        .ok_or("the server lists no modification time for it")?;
    let etag = version::bare_etag(fields.etag.as_deref().unwrap_or_default().as_bytes()).to_vec();
    if etag.len() > ETAG_BYTES_MAX || etag.iter().any(u8::is_ascii_control) {
        return Err("its ETag cannot be used");
    }
    Ok(Version { size, mtime_secs, etag })
}

/// A step of [`each_element`]: the names from the root down to the element, and its text.
pub(crate) enum Element<'a> {
    /// Opened.
    Start(&'a [String]),
    /// Closed.
    End(&'a [String], String),
}

/// Deepest nesting that is read.
const DEPTH_MAX: usize = 16;

/// Walks an XML document; namespaces are ignored.
pub(crate) fn each_element(text: &str, mut step: impl FnMut(Element<'_>) -> Result<()>) -> Result<()> {
    let bad = |e: quick_xml::Error| corrupt("the server's answer is not XML").caused_by(e);
    let mut reader = quick_xml::Reader::from_str(text);
    let mut path: Vec<String> = Vec::new();
    let mut value = String::new();
    loop {
        match reader.read_event().map_err(bad)? {
            Event::Start(tag) => {
                if path.len() == DEPTH_MAX {
                    return Err(corrupt("the server's XML is nested too deeply"));
                }
                path.push(tag.local_name().as_ref().to_string());
                value.clear();
                step(Element::Start(&path))?;
            }
            Event::Empty(tag) => {
                path.push(tag.local_name().as_ref().to_string());
                step(Element::Start(&path))?;
                step(Element::End(&path, String::new()))?;
                path.pop();
                value.clear();
            }
            Event::End(_) => {
                step(Element::End(&path, std::mem::take(&mut value)))?;
                path.pop();
            }
            Event::Text(t) => value.push_str(&t.xml10_content()),
            Event::CData(t) => value.push_str(&t.xml10_content()),
            Event::GeneralRef(r) => push_reference(&mut value, &r).map_err(bad)?,
            Event::Eof if path.is_empty() => return Ok(()),
            Event::Eof => return Err(corrupt("the server's XML ends early")),
            _ => {}
        }
    }
}

fn push_reference(value: &mut String, r: &BytesRef<'_>) -> std::result::Result<(), quick_xml::Error> {
    if let Some(c) = r.resolve_char_ref()? {
        value.push(c);
    } else if let Some(text) = quick_xml::escape::resolve_predefined_entity(&r.xml10_content()) {
        value.push_str(text);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name><Prefix>d/</Prefix><EncodingType>url</EncodingType>
<IsTruncated>true</IsTruncated><NextContinuationToken>a&amp;b==</NextContinuationToken>
<Contents><Key>d/a+b%2Bc%0A%FF</Key><LastModified>2026-01-01T00:00:01.500Z</LastModified><ETag>&quot;ab-1&#34;</ETag><Size>12</Size>
<Owner><ID>o</ID></Owner><StorageClass>STANDARD</StorageClass></Contents>
<Contents><Key>d/link</Key><LastModified>2026-01-01T00:00:01Z</LastModified><ETag>"x"</ETag><Type>Symlink</Type><Size>1</Size></Contents>
<Contents><Key>d/odd</Key><ETag>"x"</ETag><Size>1</Size></Contents>
<CommonPrefixes><Prefix>d/e%2F/</Prefix></CommonPrefixes></ListBucketResult>"#;

    #[test]
    fn a_page() {
        let page = parse(PAGE.as_bytes(), Plus::Space).expect("page");
        let version = Version { size: 12, mtime_secs: 1_767_225_601, etag: b"ab-1".to_vec() };
        assert_eq!(page.objects, [Object { key: b"d/a b+c\n\xff".to_vec(), version }]);
        assert_eq!(page.prefixes, [b"d/e//".to_vec()]);
        assert_eq!(page.next.as_deref(), Some("a&b=="));
        assert_eq!(page.unusable.iter().map(|(k, _)| &k[..]).collect::<Vec<_>>(), [&b"d/link"[..], b"d/odd"]);
        let literal = parse(PAGE.as_bytes(), Plus::Literal).expect("page");
        assert_eq!(literal.objects[0].key, b"d/a+b+c\n\xff");
    }

    #[test]
    fn a_server_that_ignores_the_encoding() {
        let body = b"<ListBucketResult><Contents><Key>a+%20</Key><Size>1</Size><LastModified>2026-01-01T00:00:00Z</LastModified>\
            </Contents><Contents><Key>\xff</Key></Contents><CommonPrefixes><Prefix>\xfe/</Prefix></CommonPrefixes></ListBucketResult>";
        let page = parse(body, Plus::Space).expect("page");
        assert_eq!(page.objects[0].key, b"a+%20");
        assert_eq!(page.unusable.len(), 2);
    }

    #[test]
    fn what_is_no_listing_is_refused() {
        for body in [
            "",
            "<html></html>",
            "<ListBucketResult>",
            "{}",
            "<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>",
        ] {
            assert!(parse(body.as_bytes(), Plus::Space).is_err_and(|e| e.is(Kind::Corrupt)), "{body}");
        }
    }

    proptest! {
        #[test]
        fn damaged_pages_never_panic(at in 0usize..PAGE.len(), byte: u8) {
            let mut body = PAGE.as_bytes().to_vec();
            body[at] = byte;
            let _ = parse(&body, Plus::Space);
            prop_assert!(parse(&body[..at], Plus::Space).is_err());
        }
    }
}
