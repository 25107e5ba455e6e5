//! An S3 endpoint with its keys, and what tests do to one from outside: make buckets, put, get, delete, upload a tree.
//! Signs with AWS Signature Version 4 (docs.aws.amazon.com, "Signature Version 4 signing process"), path style.

use crate::http::{Answer, Connection};
use crate::sign::{amz_date, encode, hex, sha256_hex, sigv4_signature};
use anyhow::{Context, Result};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::SystemTime;

/// Where an S3 server is and how to sign for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Target {
    /// `http://host:port`.
    pub endpoint: String,
    /// Region to sign for.
    pub region: String,
    /// Access key id.
    pub key_id: String,
    /// Access key secret.
    pub secret: String,
}

impl Default for S3Target {
    /// The keys that our servers accept; no endpoint.
    fn default() -> Self {
        S3Target {
            endpoint: String::new(),
            region: "us-east-1".into(),
            key_id: "efckey".into(),
            secret: "efcsecret".into(),
        }
    }
}

impl S3Target {
    /// `host:port`.
    pub fn authority(&self) -> &str {
        self.endpoint.trim_start_matches("http://")
    }

    /// The environment variables under which SDKs look for these keys.
    pub fn env(&self) -> [(&'static str, &str); 3] {
        [("AWS_ACCESS_KEY_ID", &self.key_id), ("AWS_SECRET_ACCESS_KEY", &self.secret), ("AWS_REGION", &self.region)]
    }

    /// One signed request on a connection of its own. `target` is an encoded path with an optional query.
    ///
    /// # Errors
    /// When the connection fails; a refusal is an [`Answer`].
    pub fn request(&self, method: &str, target: &str, body: &[u8]) -> Result<Answer> {
        self.request_on(&mut Connection::open(self.authority())?, method, target, &[], body)
    }

    /// One signed request with further (signed) headers on an open connection.
    ///
    /// # Errors
    /// As [`S3Target::request`].
    pub fn request_on(
        &self,
        connection: &mut Connection,
        method: &str,
        target: &str,
        extra: &[(&str, &str)],
        body: &[u8],
    ) -> Result<Answer> {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let date = amz_date(SystemTime::now());
        let digest = sha256_hex(body);
        let mut headers: Vec<(String, String)> = vec![
            ("host".into(), self.authority().into()),
            ("x-amz-content-sha256".into(), digest.clone()),
            ("x-amz-date".into(), date.clone()),
        ];
        headers.extend(extra.iter().map(|(n, v)| (n.to_ascii_lowercase(), v.to_string())));
        headers.sort();
        let mut pairs: Vec<(String, String)> = query
            .split('&')
            .filter(|p| !p.is_empty())
            .map(|p| p.split_once('=').map_or((p.to_string(), String::new()), |(k, v)| (k.into(), v.into())))
            .collect();
        pairs.sort();
        let signed: Vec<&str> = headers.iter().map(|(n, _)| n.as_str()).collect();
        let signed = signed.join(";");
        let canonical_query: Vec<String> = pairs.iter().map(|(k, v)| format!("{k}={v}")).collect();
        let canonical_headers: String = headers.iter().map(|(n, v)| format!("{n}:{v}\n")).collect();
        let canonical =
            format!("{method}\n{path}\n{}\n{canonical_headers}\n{signed}\n{digest}", canonical_query.join("&"));
        let scope = format!("{}/{}/s3/aws4_request", &date[..8], self.region);
        let signature = hex(&sigv4_signature(&self.secret, &scope, &date, &canonical));
        headers.push((
            "authorization".into(),
            format!("AWS4-HMAC-SHA256 Credential={}/{scope},SignedHeaders={signed},Signature={signature}", self.key_id),
        ));
        connection.send(method, target, &headers, body)
    }

    /// Makes a bucket.
    ///
    /// # Errors
    /// When the server refuses.
    pub fn create_bucket(&self, bucket: &str) -> Result<()> {
        self.request("PUT", &format!("/{bucket}"), b"")?.ok().with_context(|| format!("create bucket {bucket}"))?;
        Ok(())
    }

    /// Puts an object; the key is bytes, as keys are.
    ///
    /// # Errors
    /// When the server refuses.
    pub fn put(&self, bucket: &str, key: &[u8], body: &[u8]) -> Result<()> {
        let answer = self.request("PUT", &object_path(bucket, key), body)?;
        answer.ok().with_context(|| format!("put {bucket}/{}", String::from_utf8_lossy(key)))?;
        Ok(())
    }

    /// Gets a whole object.
    ///
    /// # Errors
    /// When the server refuses.
    pub fn get(&self, bucket: &str, key: &[u8]) -> Result<Vec<u8>> {
        let answer = self.request("GET", &object_path(bucket, key), b"")?;
        Ok(answer.ok().with_context(|| format!("get {bucket}/{}", String::from_utf8_lossy(key)))?.body)
    }

    /// Deletes an object.
    ///
    /// # Errors
    /// When the server refuses.
    pub fn delete(&self, bucket: &str, key: &[u8]) -> Result<()> {
        let answer = self.request("DELETE", &object_path(bucket, key), b"")?;
        answer.ok().with_context(|| format!("delete {bucket}/{}", String::from_utf8_lossy(key)))?;
        Ok(())
    }

    /// Uploads every regular file below `dir` as `prefix` + its relative path, over `threads` connections. Gives the number of files.
    ///
    /// # Errors
    /// The first refusal or broken file.
    pub fn upload_tree(&self, dir: &Path, bucket: &str, prefix: &str, threads: usize) -> Result<usize> {
        let files = crate::data::regular_files(dir)?;
        let next = AtomicUsize::new(0);
        let work = || -> Result<()> {
            let mut connection = Connection::open(self.authority())?;
            while let Some(relative) = files.get(next.fetch_add(1, Relaxed)) {
                let body = std::fs::read(dir.join(relative)).with_context(|| relative.display().to_string())?;
                let key = [prefix.as_bytes(), std::os::unix::ffi::OsStrExt::as_bytes(relative.as_os_str())].concat();
                if !connection.is_reusable() {
                    connection = Connection::open(self.authority())?;
                }
                self.request_on(&mut connection, "PUT", &object_path(bucket, &key), &[], &body)
                    .and_then(Answer::ok)
                    .with_context(|| format!("upload {}", relative.display()))?;
            }
            Ok(())
        };
        std::thread::scope(|s| {
            let workers: Vec<_> = (0..threads.max(1)).map(|_| s.spawn(work)).collect();
            workers.into_iter().try_for_each(|w| w.join().expect("an upload thread panicked"))
        })?;
        Ok(files.len())
    }
}

/// `/bucket/key`, percent-encoded as S3 signs it.
pub fn object_path(bucket: &str, key: &[u8]) -> String {
    format!("/{bucket}/{}", encode(key, true))
}
