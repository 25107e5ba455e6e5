//! What stores say of changes in their buckets: JSON as OSS, S3, SNS and EventBridge send it, read without asking which of them it is. An *event* is an object that
//! has `bucket.name` and `object.key`, wherever it stands, also in a string that holds JSON (SNS). Keys are taken as they are and decoded: some senders
//! encode them, and a hint of a key that is not there costs nothing.

use bytes::Bytes;
use efc_common::hint::{HINT_KEYS_MAX, Hint};
use efc_common::{Error, Kind, Result};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// JSON in strings in JSON, and objects in objects.
const DEPTH_MAX: usize = 16;
/// Longest key a store has.
const KEY_BYTES_MAX: usize = 1024;
/// Events of one request.
pub(crate) const EVENTS_MAX: usize = 10_000;

/// What a request says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// Changes.
    Changes(Vec<Hint>),
    /// SNS asks whether its messages are wanted; who visits this address says yes.
    Confirm(String),
}

/// Reads a request.
///
/// # Errors
/// [`Kind::Invalid`] for what is no JSON, or names no change.
pub(crate) fn read(body: &[u8]) -> Result<Told> {
    let value: Value = serde_json::from_slice(body)
        .map_err(|e| Error::new(Kind::Invalid, format!("an event is JSON, this is not: {e}")))?;
    if value.get("Type").and_then(Value::as_str) == Some("SubscriptionConfirmation")
        && let Some(url) = value.get("SubscribeURL").and_then(Value::as_str)
    {
        return Ok(Told::Confirm(url.to_string()));
    }
    let mut found = Found::default();
    found.look(&value, 0);
    if found.events == 0 {
        return Err(Error::new(Kind::Invalid, "no event in it: an event has `bucket.name` and `object.key`"));
    }
    let hints = found.keys.into_iter().flat_map(|(bucket, keys)| {
        let keys: Vec<Bytes> = keys.into_iter().collect();
        keys.chunks(HINT_KEYS_MAX).map(|k| Hint { bucket: bucket.clone(), keys: k.to_vec() }).collect::<Vec<_>>()
    });
    Ok(Told::Changes(hints.collect()))
}

#[derive(Default)]
struct Found {
    keys: BTreeMap<String, BTreeSet<Bytes>>,
    events: usize,
}

impl Found {
    fn look(&mut self, value: &Value, depth: usize) {
        if depth > DEPTH_MAX || self.events >= EVENTS_MAX {
            return;
        }
        match value {
            Value::Object(fields) => {
                let text = |at: &str, name: &str| fields.get(at)?.get(name)?.as_str();
                if let (Some(bucket), Some(key)) = (text("bucket", "name"), text("object", "key")) {
                    self.add(bucket, key);
                    return;
                }
                fields.values().for_each(|v| self.look(v, depth + 1));
            }
            Value::Array(all) => all.iter().for_each(|v| self.look(v, depth + 1)),
            Value::String(text) if text.starts_with(['{', '[']) => {
                if let Ok(inner) = serde_json::from_str::<Value>(text) {
                    self.look(&inner, depth + 1);
                }
            }
            _ => {}
        }
    }

    fn add(&mut self, bucket: &str, key: &str) {
        self.events += 1;
        let keys = self.keys.entry(bucket.to_string()).or_default();
        for key in [key.as_bytes().to_vec(), decoded(key)] {
            if !key.is_empty() && key.len() <= KEY_BYTES_MAX {
                keys.insert(key.into());
            }
        }
    }
}

/// `application/x-www-form-urlencoded`, as S3 writes keys into its events.
fn decoded(key: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(key.len());
    let bytes = key.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let hex = bytes.get(at + 1..at + 3).and_then(|h| std::str::from_utf8(h).ok());
        match (bytes[at], hex.and_then(|h| u8::from_str_radix(h, 16).ok())) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 2;
            }
            (b'+', _) => out.push(b' '),
            (other, _) => out.push(other),
        }
        at += 1;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys(body: &str) -> Vec<(String, Vec<String>)> {
        match read(body.as_bytes()).expect("events") {
            Told::Changes(hints) => {
                let text = |k: &Bytes| String::from_utf8_lossy(k).into_owned();
                hints.into_iter().map(|h| (h.bucket, h.keys.iter().map(text).collect())).collect()
            }
            Told::Confirm(url) => panic!("{url}"),
        }
    }

    fn one(bucket: &str, keys: &[&str]) -> Vec<(String, Vec<String>)> {
        vec![(bucket.into(), keys.iter().map(ToString::to_string).collect())]
    }

    #[test]
    fn the_forms_of_the_senders() {
        let s3 = r#"{"Records":[{"eventName":"ObjectCreated:Put","s3":{"bucket":{"name":"b","arn":"x"},"object":{"key":"a+b%2Fc.txt","size":3}}}]}"#;
        assert_eq!(keys(s3), one("b", &["a b/c.txt", "a+b%2Fc.txt"]));
        let sns = serde_json::json!({"Type": "Notification", "Message": s3}).to_string();
        assert_eq!(keys(&sns), keys(s3));
        let bridge = r#"{"source":"aws.s3","detail-type":"Object Deleted","detail":{"bucket":{"name":"b"},"object":{"key":"d/f"}}}"#;
        assert_eq!(keys(bridge), one("b", &["d/f"]));
        let oss = r#"{"events":[{"eventName":"ObjectCreated:PutObject","eventSource":"acs:oss","oss":{"bucket":{"name":"b"},"object":{"key":"x"}}},
            {"eventName":"ObjectRemoved:DeleteObject","oss":{"bucket":{"name":"b"},"object":{"key":"y"}}}]}"#;
        assert_eq!(keys(oss), one("b", &["x", "y"]));
        let cloud = r#"[{"type":"oss:ObjectCreated:PutObject","source":"acs.oss","data":{"oss":{"bucket":{"name":"b"},"object":{"key":"%"}}}}]"#;
        assert_eq!(keys(cloud), one("b", &["%"]));
        let confirm = r#"{"Type":"SubscriptionConfirmation","SubscribeURL":"https://sns/?x"}"#;
        assert_eq!(read(confirm.as_bytes()).expect("read"), Told::Confirm("https://sns/?x".into()));
        for bad in ["", "x", "{}", "[]", r#"{"bucket":{"name":1},"object":{"key":"x"}}"#] {
            assert!(read(bad.as_bytes()).is_err_and(|e| e.is(Kind::Invalid)), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn garbage_is_an_error_or_sense(body in "\\PC{0,200}", key in "\\PC{0,40}") {
            let _ = read(body.as_bytes());
            let event = serde_json::json!({"bucket": {"name": "b"}, "object": {"key": key}}).to_string();
            prop_assert!(read(event.as_bytes()).is_ok());
        }
    }
}
