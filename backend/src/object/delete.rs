//! Deleting: a thousand keys at a request where XML can carry them, one by one where it cannot.
//!
//! What must stay true: a key counts as deleted only when the store says so by name. OSS tells nothing of failures in its answer (it leaves the key
//! out), so the long answer is asked for, and what is in neither list is deleted once more alone, where the status cannot be mistaken.

use super::ObjectBackend;
use super::client::{Call, Dialect};
use super::document::{self, element};
use super::error;
use super::sign::base64;
use super::version::key_of;
use bytes::Bytes;
use efc_common::{Error, Result};
use futures::{StreamExt, stream};
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, Method};
use md5::{Digest, Md5};
use std::collections::{HashMap, HashSet};

/// Most keys of one request.
pub(crate) const BATCH_KEYS: usize = 1000;
/// Single deletions under way at once.
const SINGLE_AT_ONCE: usize = 16;

impl ObjectBackend {
    /// See [`crate::objects::Objects::delete`].
    pub(super) async fn delete_objects(&self, locators: &[Bytes]) -> Result<Vec<(usize, Error)>> {
        let mut failed = Vec::new();
        let (mut batched, mut single) = (Vec::new(), Vec::new());
        for (i, locator) in locators.iter().enumerate() {
            match key_of(locator) {
                Ok(key) => if is_plain(key) { &mut batched } else { &mut single }.push((i, key)),
                Err(e) => failed.push((i, e)),
            }
        }
        // Stores that keep directories (SeaweedFS) let go of a marker only when nothing is below it any more.
        batched.sort_by_key(|(_, key)| (key.ends_with(b"/"), std::cmp::Reverse(key.len())));
        for batch in batched.chunks(BATCH_KEYS) {
            if let [one] = batch {
                single.push(*one);
                continue;
            }
            let answer = self.delete_batch(batch).await?;
            for &(i, key) in batch {
                match answer.failed.get(key) {
                    Some(e) => failed.push((i, e.share())),
                    None if answer.deleted.contains(key) => {}
                    None => single.push((i, key)),
                }
            }
        }
        let single: Vec<_> = single.into_iter().map(|(i, key)| self.delete_numbered(i, key)).collect();
        let single: Vec<_> = stream::iter(single).buffer_unordered(SINGLE_AT_ONCE).collect().await;
        failed.extend(single.into_iter().filter_map(|(i, e)| Some((i, e?))));
        failed.sort_by_key(|(i, _)| *i);
        Ok(failed)
    }

    /// Deletes one object; a missing one is no error.
    pub(super) async fn delete_one(&self, locator: &Bytes) -> Result<()> {
        self.delete_key(key_of(locator)?).await
    }

    async fn delete_key(&self, key: &[u8]) -> Result<()> {
        match self.client.send(&Call::new(Method::DELETE, key)).await {
            Ok(answer) => self.client.collect(answer.into_body(), 64 << 10).await.map(drop),
            Err(e) if e.is(efc_common::Kind::NotFound) && e.context("code") != Some("NoSuchBucket") => Ok(()),
            Err(e) => Err(e),
        }
    }

    async fn delete_numbered(&self, i: usize, key: &[u8]) -> (usize, Option<Error>) {
        (i, self.delete_key(key).await.err())
    }

    async fn delete_batch(&self, batch: &[(usize, &[u8])]) -> Result<Deleted> {
        let mut xml = String::from("<Delete><Quiet>false</Quiet>");
        for (_, key) in batch {
            xml.push_str("<Object>");
            element(&mut xml, "Key", &String::from_utf8_lossy(key));
            xml.push_str("</Object>");
        }
        xml.push_str("</Delete>");
        let md5 = HeaderValue::from_str(&base64(&Md5::digest(xml.as_bytes())))
            .map_err(|_| Error::new(efc_common::Kind::Io, "base64 is not ASCII"))?;
        let headers = vec![
            (HeaderName::from_static("content-md5"), md5),
            (header::CONTENT_TYPE, HeaderValue::from_static("application/xml")),
        ];
        // Only OSS can be asked to spell keys in a way that survives XML.
        let query: &[(&'static str, &[u8])] = match self.client.dialect {
            Dialect::S3 => &[("delete", b"")],
            Dialect::Oss => &[("delete", b""), ("encoding-type", b"url")],
        };
        let call = Call { query, headers, body: &[xml.into()], ..Call::new(Method::POST, b"") };
        let answer = self.client.send(&call).await?;
        let mut reader = Reader::default();
        document::elements(&self.client, answer, "DeleteResult", |path, value| reader.end(path, value)).await?;
        let mut out = Deleted::default();
        out.deleted.extend(reader.deleted.iter().map(|k| document::key(k, reader.encoded)));
        for [key, code, message] in &reader.failed {
            let text = format!("<Error><Code>{}</Code><Message>{}</Message></Error>", escape(code), escape(message));
            let (e, _) = error::refused(&self.client.about, error::status_of(code), &HeaderMap::new(), text.as_bytes());
            out.failed.insert(document::key(key, reader.encoded), e);
        }
        Ok(out)
    }
}

/// Can XML carry the key, and every server's XML reader give it back? Blanks at the ends and line ends are what some of them lose.
fn is_plain(key: &[u8]) -> bool {
    std::str::from_utf8(key).is_ok_and(|k| {
        k.trim() == k
            && !k.chars().any(|c| c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}' | '\u{2028}' | '\u{2029}'))
    })
}

fn escape(text: &str) -> std::borrow::Cow<'_, str> {
    quick_xml::escape::escape(text)
}

/// What became of a batch.
#[derive(Default)]
struct Deleted {
    deleted: HashSet<Vec<u8>>,
    failed: HashMap<Vec<u8>, Error>,
}

/// The answer as it is read.
#[derive(Default)]
struct Reader {
    encoded: bool,
    fields: [String; 3],
    deleted: Vec<String>,
    failed: Vec<[String; 3]>,
}

impl Reader {
    fn end(&mut self, path: &[String], value: String) {
        let names: Vec<&str> = path.iter().skip(1).map(String::as_str).collect();
        match names.as_slice() {
            ["EncodingType"] => self.encoded = value == "url",
            ["Deleted", "Key"] => self.deleted.push(value),
            ["Error", "Key"] => self.fields[0] = value,
            ["Error", "Code"] => self.fields[1] = value,
            ["Error", "Message"] => self.fields[2] = value,
            ["Error"] => self.failed.push(std::mem::take(&mut self.fields)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_xml_can_carry() {
        for key in [&b"a/b"[..], "\u{e9}".as_bytes(), b"a b", b"<&>\"'"] {
            assert!(is_plain(key), "{}", key.escape_ascii());
        }
        for key in [&b"\xff"[..], b"a\nb", b"\x01", b" a", b"a ", b"a\0", "\u{fffe}".as_bytes(), "\u{85}".as_bytes()] {
            assert!(!is_plain(key), "{}", key.escape_ascii());
        }
    }
}
