//! A request taken apart: bucket and key from host or path, query, headers, the whole body.

use super::error::ApiError;
use super::{Dialect, Reply};
use axum::http::request::Parts;
use bytes::{Bytes, BytesMut};
use percent_encoding::percent_decode_str;
use std::net::IpAddr;

/// One request.
#[derive(Debug)]
pub(super) struct Req {
    /// Which store's names headers have.
    pub(super) dialect: Dialect,
    /// GET, PUT ...
    pub(super) method: String,
    /// Host header.
    pub(super) host: String,
    /// The path as sent.
    pub(super) raw_path: String,
    /// Bucket, if one is named.
    pub(super) bucket: Option<String>,
    /// Key, decoded; empty if none.
    pub(super) key: Vec<u8>,
    /// Query parameters, decoded, as sent.
    pub(super) query: Vec<(Vec<u8>, Vec<u8>)>,
    /// Headers, names in lower case.
    pub(super) headers: Vec<(String, String)>,
    /// The body.
    pub(super) body: Bytes,
}

impl Req {
    /// Takes a request apart. `domain` is the service's own host name: `BUCKET.domain` addresses a bucket.
    pub(super) fn new(dialect: Dialect, domain: &str, parts: &Parts, body: Bytes) -> Req {
        let headers: Vec<(String, String)> = parts
            .headers
            .iter()
            .map(|(n, v)| (n.as_str().to_string(), String::from_utf8_lossy(v.as_bytes()).into_owned()))
            .collect();
        let host = headers.iter().find(|(n, _)| n == "host").map(|(_, v)| v.clone()).unwrap_or_default();
        let raw_path = parts.uri.path().to_string();
        let in_path: Vec<u8> = percent_decode_str(raw_path.strip_prefix('/').unwrap_or(&raw_path)).collect();
        let (bucket, key) = match bucket_of_host(&host, domain) {
            Some(bucket) => (Some(bucket), in_path),
            None => {
                let (bucket, key) = match in_path.iter().position(|b| *b == b'/') {
                    Some(at) => (in_path[..at].to_vec(), in_path[at + 1..].to_vec()),
                    None => (in_path, Vec::new()),
                };
                let bucket = String::from_utf8_lossy(&bucket).into_owned();
                (Some(bucket).filter(|b| !b.is_empty()), key)
            }
        };
        let query = parts.uri.query().unwrap_or("").split('&').filter(|p| !p.is_empty()).map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode_query(name), decode_query(value))
        });
        let method = parts.method.as_str().to_string();
        Req { dialect, method, host, bucket, key, query: query.collect(), headers, raw_path, body }
    }

    /// A header's value.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// A header of the dialect: `x-oss-NAME` or `x-amz-NAME`.
    pub(super) fn own_header(&self, name: &str) -> Option<&str> {
        self.header(&self.dialect.header(name))
    }

    /// A query parameter's bytes.
    pub(super) fn param_bytes(&self, name: &str) -> Option<&[u8]> {
        self.query.iter().find(|(n, _)| n == name.as_bytes()).map(|(_, v)| v.as_slice())
    }

    /// A query parameter's text.
    pub(super) fn param(&self, name: &str) -> Option<&str> {
        self.param_bytes(name).and_then(|v| std::str::from_utf8(v).ok())
    }

    /// Is the query parameter there at all?
    pub(super) fn has(&self, name: &str) -> bool {
        self.param_bytes(name).is_some()
    }

    /// The bucket's name; only for requests that name one.
    pub(super) fn bucket_name(&self) -> &str {
        self.bucket.as_deref().unwrap_or("")
    }

    /// A number in the query.
    ///
    /// # Errors
    /// `InvalidArgument` when it is none.
    pub(super) fn number(&self, name: &str) -> Result<Option<u64>, ApiError> {
        self.param(name)
            .map(|v| v.parse().map_err(|_| ApiError::invalid_argument(format!("{name} must be a number"))))
            .transpose()
    }

    /// Undoes `aws-chunked`: the body's chunks without their signatures. Trailing checksums are not looked at.
    ///
    /// # Errors
    /// `IncompleteBody` when the framing is broken.
    pub(super) fn unchunk(&mut self) -> Result<(), ApiError> {
        let broken = || ApiError::new(400, "IncompleteBody", "The aws-chunked body is broken.");
        let mut rest = self.body.clone();
        let mut out = BytesMut::new();
        loop {
            let end = rest.windows(2).position(|w| w == b"\r\n").ok_or_else(broken)?;
            let line = std::str::from_utf8(&rest[..end]).map_err(|_| broken())?;
            let size = line.split(';').next().and_then(|s| usize::from_str_radix(s, 16).ok()).ok_or_else(broken)?;
            let _ = rest.split_to(end + 2);
            if size == 0 {
                self.body = out.freeze();
                return Ok(());
            }
            if rest.len() < size + 2 {
                return Err(broken());
            }
            out.extend_from_slice(&rest.split_to(size));
            let _ = rest.split_to(2);
        }
    }
}

/// In a query `+` is a blank, as forms write it.
fn decode_query(text: &str) -> Vec<u8> {
    percent_decode_str(&text.replace('+', " ")).collect()
}

fn bucket_of_host(host: &str, domain: &str) -> Option<String> {
    let name = host.rsplit_once(':').map_or(host, |(name, port)| if port.contains(']') { host } else { name });
    if name.parse::<IpAddr>().is_ok() {
        return None;
    }
    let bucket = name.strip_suffix(domain)?.strip_suffix('.')?;
    Some(bucket.to_string()).filter(|b| !b.is_empty())
}

/// What a handler gives.
pub(super) type Answer = Result<Reply, ApiError>;

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::Request;

    fn req(uri: &str, host: &str) -> Req {
        let (parts, ()) = Request::builder().uri(uri).header("Host", host).body(()).unwrap().into_parts();
        Req::new(Dialect::Oss, "oss.test", &parts, Bytes::new())
    }

    #[test]
    fn path_and_virtual_host_name_the_same() {
        let path = req("/bkt/a%20b//c?acl&x=1%2B2+3", "127.0.0.1:80");
        let host = req("/a%20b//c", "bkt.oss.test:80");
        for r in [&path, &host] {
            assert_eq!((r.bucket_name(), r.key.as_slice()), ("bkt", b"a b//c".as_slice()));
        }
        assert!(path.has("acl") && path.param("x") == Some("1+2 3"));
        assert_eq!(req("/", "oss.test").bucket, None);
        assert_eq!(req("/bkt", "oss.test").bucket.as_deref(), Some("bkt"));
        assert_eq!(req("/bkt/", "[::1]:80").bucket.as_deref(), Some("bkt"));
    }

    #[test]
    fn aws_chunked() {
        let mut r = req("/b/k", "h");
        r.body = Bytes::from_static(b"3;chunk-signature=x\r\nabc\r\n2\r\nde\r\n0\r\nx-amz-checksum-crc32:AAAA\r\n\r\n");
        r.unchunk().unwrap();
        assert_eq!(&r.body[..], b"abcde");
        for bad in ["", "zz\r\nabc", "5\r\nabc\r\n"] {
            r.body = Bytes::copy_from_slice(bad.as_bytes());
            assert!(r.unchunk().is_err(), "{bad:?}");
        }
    }
}
