//! POSIX attributes beside the bytes of an object: user metadata `mode`, `uid`, `gid`, `mtime`, `atime`, `ctime`, as s3fs, ossfs and rclone read and write them.
//!
//! We write decimal numbers, times in seconds with a fraction only when there is one. We read what the others write as well: `mtime` as a decimal
//! fraction of any length (rclone), `mode` in octal (`rclone --metadata`): a decimal number whose type bits are no type is taken for octal
//! digits. Of the two readings at most one is a mode with a type; without type bits (`420`) it is decimal. What cannot be read stays in
//! [`Metadata::other`], so that a copy does not lose it.

use super::client::Dialect;
use crate::objects::Metadata;
use efc_common::node::Time;
use efc_common::{Error, Kind, Result};
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, header::CONTENT_TYPE};
use std::collections::BTreeMap;

/// The content type of directory markers.
pub(crate) const DIRECTORY_TYPE: &str = "application/x-directory";

/// Headers beside the content type that objects keep.
const KEPT: [HeaderName; 5] = [
    header::CACHE_CONTROL,
    header::CONTENT_DISPOSITION,
    header::CONTENT_ENCODING,
    header::CONTENT_LANGUAGE,
    header::EXPIRES,
];

fn prefix(dialect: Dialect) -> &'static str {
    dialect.pick("x-amz-meta-", "x-oss-meta-")
}

/// The headers that give an object this metadata.
///
/// # Errors
/// [`Kind::Invalid`] for what no header can carry.
pub(crate) fn headers(dialect: Dialect, m: &Metadata) -> Result<Vec<(HeaderName, HeaderValue)>> {
    let mut own: BTreeMap<&str, String> = BTreeMap::new();
    own.extend(m.mode.map(|v| ("mode", v.to_string())));
    own.extend(m.uid.map(|v| ("uid", v.to_string())));
    own.extend(m.gid.map(|v| ("gid", v.to_string())));
    for (name, time) in [("mtime", m.mtime), ("atime", m.atime), ("ctime", m.ctime)] {
        own.extend(time.map(|v| (name, time_text(v))));
    }
    for (name, value) in &m.other {
        own.entry(name).or_insert_with(|| value.clone());
    }
    let mut out = Vec::with_capacity(own.len() + 1 + m.headers.len());
    for (name, value) in own {
        let name = HeaderName::from_bytes([prefix(dialect), name].concat().as_bytes());
        out.push((name.map_err(|_| unsendable())?, value_of(&value)?));
    }
    if let Some(content_type) = &m.content_type {
        out.push((CONTENT_TYPE, value_of(content_type)?));
    }
    for (name, value) in &m.headers {
        let name = KEPT.iter().find(|k| k.as_str() == name).ok_or_else(unsendable)?;
        out.push((name.clone(), value_of(value)?));
    }
    Ok(out)
}

fn value_of(text: &str) -> Result<HeaderValue> {
    HeaderValue::from_bytes(text.trim().as_bytes()).map_err(|_| unsendable())
}

fn unsendable() -> Error {
    Error::new(
        Kind::Invalid,
        "metadata that no HTTP header can carry: names are letters, digits and `-`, values one line",
    )
}

/// The metadata that the headers of an answer describe.
pub(crate) fn read(dialect: Dialect, headers: &HeaderMap) -> Metadata {
    let text = |v: &HeaderValue| String::from_utf8_lossy(v.as_bytes()).trim().to_string();
    let mut m = Metadata { content_type: headers.get(CONTENT_TYPE).map(text), ..Metadata::default() };
    for name in &KEPT {
        if let Some(value) = headers.get(name) {
            m.headers.insert(name.as_str().to_string(), text(value));
        }
    }
    for (name, value) in headers {
        let Some(name) = name.as_str().strip_prefix(prefix(dialect)) else { continue };
        let value = text(value);
        let known = match name {
            "mode" => set(&mut m.mode, mode_of(&value)),
            "uid" => set(&mut m.uid, value.parse().ok()),
            "gid" => set(&mut m.gid, value.parse().ok()),
            "mtime" => set(&mut m.mtime, time_of(&value)),
            "atime" => set(&mut m.atime, time_of(&value)),
            "ctime" => set(&mut m.ctime, time_of(&value)),
            _ => false,
        };
        if !known {
            m.other.insert(name.to_string(), value);
        }
    }
    m
}

fn set<T>(slot: &mut Option<T>, value: Option<T>) -> bool {
    *slot = value;
    slot.is_some()
}

/// A mode in decimal or, where that is none, in octal digits.
fn mode_of(text: &str) -> Option<u32> {
    let is_mode = |m: &u32| matches!(m >> 12, 0 | 1 | 2 | 4 | 6 | 8 | 10 | 12);
    let decimal = text.parse().ok().filter(is_mode);
    decimal.or_else(|| u32::from_str_radix(text, 8).ok().filter(is_mode))
}

/// Seconds, with a fraction when there is one. `nanos` go forward, the text does not: half a second before 1970 is `-0.5`.
fn time_text(t: Time) -> String {
    match (t.secs, t.nanos) {
        (secs, 0) => secs.to_string(),
        (secs, nanos) if secs >= 0 => format!("{secs}.{nanos:09}"),
        (secs, nanos) => format!("-{}.{:09}", (secs + 1).unsigned_abs(), 1_000_000_000 - nanos.min(999_999_999)),
    }
}

fn time_of(text: &str) -> Option<Time> {
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |d| (true, d));
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if whole.is_empty() || !whole.bytes().chain(fraction.bytes()).all(|b| b.is_ascii_digit()) {
        return None;
    }
    let secs: i64 = whole.parse().ok()?;
    let nanos = fraction.bytes().chain(std::iter::repeat(b'0')).take(9).fold(0, |n, b| n * 10 + u32::from(b - b'0'));
    Some(match (negative, nanos) {
        (false, nanos) => Time { secs, nanos },
        (true, 0) => Time { secs: -secs, nanos: 0 },
        (true, nanos) => Time { secs: -secs - 1, nanos: 1_000_000_000 - nanos },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read_one(name: &'static str, value: &str) -> Metadata {
        let mut headers = HeaderMap::new();
        headers.insert(HeaderName::from_static(name), HeaderValue::from_str(value).expect("value"));
        read(Dialect::S3, &headers)
    }

    #[test]
    fn what_others_write_is_read() {
        for (text, secs, nanos) in [
            ("1700000000", 1_700_000_000, 0),
            ("1700000000.5", 1_700_000_000, 500_000_000),
            ("1700000000.123456789", 1_700_000_000, 123_456_789),
            ("1700000000.1234567891", 1_700_000_000, 123_456_789),
            ("-1.25", -2, 750_000_000),
            ("-0.5", -1, 500_000_000),
        ] {
            assert_eq!(read_one("x-amz-meta-mtime", text).mtime, Some(Time { secs, nanos }), "{text}");
        }
        for (text, mode) in [
            ("33188", 0o100_644),
            ("100644", 0o100_644),
            ("16877", 0o40755),
            ("40755", 0o40755),
            ("120777", 0o120_777),
            ("420", 0o644),
        ] {
            assert_eq!(read_one("x-amz-meta-mode", text).mode, Some(mode), "{text}");
        }
        for (name, text) in [
            ("x-amz-meta-mode", "-rw-r--r--"),
            ("x-amz-meta-uid", "root"),
            ("x-amz-meta-mtime", "yesterday"),
            ("x-amz-meta-mtime", "1."),
            ("x-amz-meta-mtime", "2024-01-01T00:00:00Z"),
        ] {
            let m = read_one(name, text);
            if text == "1." {
                assert_eq!(m.mtime, Some(Time { secs: 1, nanos: 0 }));
                continue;
            }
            assert_eq!((m.mode, m.uid, m.mtime, m.other.len()), (None, None, None, 1), "{text} is kept as it is");
        }
    }

    #[test]
    fn what_cannot_be_sent_is_refused() {
        for m in [
            Metadata { other: [("a b".into(), "v".into())].into(), ..Metadata::default() },
            Metadata { other: [("a".into(), "two\nlines".into())].into(), ..Metadata::default() },
            Metadata { content_type: Some("x\r\ny".into()), ..Metadata::default() },
            Metadata { headers: [("authorization".into(), "x".into())].into(), ..Metadata::default() },
        ] {
            assert!(headers(Dialect::S3, &m).is_err_and(|e| e.is(Kind::Invalid)), "{m:?}");
        }
    }

    proptest! {
        #[test]
        fn round_trip(
            mode in proptest::option::of(prop_oneof![Just(0o100_644u32), Just(0o40755), Just(0o120_777), 0u32..0o10000]),
            uid: Option<u32>,
            gid: Option<u32>,
            secs in -10_000_000_000i64..10_000_000_000,
            nanos in 0u32..1_000_000_000,
            oss: bool,
        ) {
            let m = Metadata {
                mode,
                uid,
                gid,
                mtime: Some(Time { secs, nanos }),
                atime: gid.map(|secs| Time { secs: secs.into(), nanos }),
                ctime: uid.map(|secs| Time { secs: secs.into(), nanos: 0 }),
                content_type: Some("text/plain".into()),
                other: [("author".to_string(), "who else".to_string())].into(),
                headers: [("cache-control".to_string(), "no-cache".to_string())].into(),
            };
            let dialect = if oss { Dialect::Oss } else { Dialect::S3 };
            let sent: HeaderMap = headers(dialect, &m).expect("headers").into_iter().collect();
            prop_assert_eq!(read(dialect, &sent), m);
        }

        #[test]
        fn garbage_never_panics(text in "[-.0-9a-z]{0,30}") {
            let _ = (mode_of(&text), time_of(&text));
        }
    }
}
