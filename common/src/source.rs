//! A *source*: which origin, which path below it, how to reach it, and where its credentials come from. It is what
//! `efc-fuse mount SOURCE`, a dataset's mount and the data plane's ATTACH all carry. It never holds a secret itself: it holds a
//! [`SecretRef`], and literal keys travel separately as [`StaticKeys`].

use crate::id::SourceId;
use crate::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// Protocol of an origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceKind {
    /// A local directory that is the same on every node.
    File,
    /// NFSv3 in user space.
    Nfs,
    /// Alibaba Cloud OSS, native API.
    Oss,
    /// S3 and compatibles.
    S3,
}

impl SourceKind {
    /// URL scheme.
    pub fn scheme(self) -> &'static str {
        match self {
            SourceKind::File => "file",
            SourceKind::Nfs => "nfs",
            SourceKind::Oss => "oss",
            SourceKind::S3 => "s3",
        }
    }

    /// Is it an object store (flat keys, no owner or mode)?
    pub fn is_object_store(self) -> bool {
        matches!(self, SourceKind::Oss | SourceKind::S3)
    }
}

/// Where the credentials of a source come from. Text form in parentheses.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum SecretRef {
    /// Literal keys given beside the source (`keys`): mount options or a passwd file. They travel in ATTACH, are kept in memory only.
    Keys,
    /// The usual environment variables of the store (`env`), read by the process that mounts and sent like `Keys`.
    #[default]
    Env,
    /// A mounted secret directory (`dir:/path`): files `akId`/`akSecret`/`securityToken` or
    /// `access-key-id`/`access-key-secret`/`session-token`; re-read on change. Each process reads its own copy.
    Dir(String),
    /// A program that prints credentials as JSON (`process:/path args`).
    Process(String),
    /// The ECS RAM role or EC2 instance profile of the node (`role` or `role:NAME`).
    Role(String),
    /// OIDC federation: RRSA on ACK, IRSA on EKS (`oidc`), from the usual environment variables.
    Oidc,
    /// No signature (`anonymous`).
    Anonymous,
}

impl fmt::Display for SecretRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SecretRef::Keys => f.write_str("keys"),
            SecretRef::Env => f.write_str("env"),
            SecretRef::Dir(d) => write!(f, "dir:{d}"),
            SecretRef::Process(p) => write!(f, "process:{p}"),
            SecretRef::Role(r) if r.is_empty() => f.write_str("role"),
            SecretRef::Role(r) => write!(f, "role:{r}"),
            SecretRef::Oidc => f.write_str("oidc"),
            SecretRef::Anonymous => f.write_str("anonymous"),
        }
    }
}

impl From<SecretRef> for String {
    fn from(s: SecretRef) -> String {
        s.to_string()
    }
}

impl TryFrom<String> for SecretRef {
    type Error = Error;
    fn try_from(s: String) -> Result<Self> {
        s.parse()
    }
}

impl std::str::FromStr for SecretRef {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let (head, tail) = s.split_once(':').unwrap_or((s, ""));
        match (head, tail) {
            ("keys", "") => Ok(SecretRef::Keys),
            ("env", "") => Ok(SecretRef::Env),
            ("dir", d) if d.starts_with('/') => Ok(SecretRef::Dir(d.into())),
            ("process", p) if p.starts_with('/') => Ok(SecretRef::Process(p.into())),
            ("role", r) => Ok(SecretRef::Role(r.into())),
            ("oidc", "") => Ok(SecretRef::Oidc),
            ("anonymous", "") => Ok(SecretRef::Anonymous),
            _ => Err(Error::new(
                Kind::Invalid,
                format!(
                    "secret `{s}` is unknown; use env, dir:/path, process:/command, role[:NAME], oidc or anonymous"
                ),
            )),
        }
    }
}

/// A secret text: never printed, not even by `Debug`.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    pub fn new(text: impl Into<String>) -> Self {
        Secret(text.into())
    }

    /// The text itself: for signing and for the ATTACH message only.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "Secret(empty)" } else { "Secret(***)" })
    }
}

/// Literal access keys.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StaticKeys {
    /// Access key id.
    pub id: String,
    /// Access key secret.
    pub secret: Secret,
    /// Session (STS) token, empty if none.
    #[serde(default)]
    pub token: Secret,
}

/// A source: see the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceSpec {
    /// Protocol.
    pub kind: SourceKind,
    /// `http[s]://host[:port]` (object stores), `host:port` (NFS), empty (`file`).
    pub endpoint: String,
    /// Bucket (object stores), else empty.
    pub bucket: String,
    /// What is mounted below it: key prefix without leading slash and ending in `/` unless empty; export path; directory.
    pub path: String,
    /// Options by name, see [`OPTIONS`].
    #[serde(default)]
    pub options: BTreeMap<String, String>,
    /// Where the credentials come from.
    #[serde(default)]
    pub secret: SecretRef,
}

/// A source option: name, which kinds take it, help.
#[derive(Debug, Clone, Copy)]
pub struct SourceOption {
    /// Name as written in `-o name=value`.
    pub name: &'static str,
    /// Kinds that accept it.
    pub kinds: &'static [SourceKind],
    /// One line for `--help`.
    pub help: &'static str,
}

const OBJECT: &[SourceKind] = &[SourceKind::Oss, SourceKind::S3];
const REMOTE: &[SourceKind] = &[SourceKind::Oss, SourceKind::S3, SourceKind::Nfs];
const ANY: &[SourceKind] = &[SourceKind::Oss, SourceKind::S3, SourceKind::Nfs, SourceKind::File];

/// Every source option. Unknown ones are refused.
pub const OPTIONS: &[SourceOption] = &[
    SourceOption { name: "endpoint", kinds: OBJECT, help: "service address, http[s]://host[:port]" },
    SourceOption {
        name: "region",
        kinds: OBJECT,
        help: "region to sign for (S3 default us-east-1; OSS: needed by sig=v4)",
    },
    SourceOption { name: "sig", kinds: OBJECT, help: "signature: v4 (default), or v1 for OSS" },
    SourceOption {
        name: "path_style",
        kinds: OBJECT,
        help: "true: http://host/bucket/key instead of http://bucket.host/key (default true for S3 with endpoint=)",
    },
    SourceOption {
        name: "payload_hash",
        kinds: &[SourceKind::S3],
        help: "true: sign the content of uploads too, at the cost of a SHA-256 (default: over http only)",
    },
    SourceOption { name: "ca_file", kinds: OBJECT, help: "PEM file of an own certificate authority" },
    SourceOption {
        name: "connections",
        kinds: REMOTE,
        help: "connections to one server: NFS default 4, HTTP idle pool default 64",
    },
    SourceOption { name: "request_rate", kinds: ANY, help: "requests a second at most, per process (0 = no limit)" },
    SourceOption {
        name: "bandwidth",
        kinds: ANY,
        help: "bytes a second at most, per process, for example 1GiB (0 = no limit)",
    },
    SourceOption { name: "timeout", kinds: REMOTE, help: "one request's deadline (default 15s)" },
    SourceOption {
        name: "deadline",
        kinds: REMOTE,
        help: "a request with all its retries ends after this (default 60s)",
    },
    SourceOption {
        name: "nfs_port",
        kinds: &[SourceKind::Nfs],
        help: "port of NFS, if not 2049 or asked of the portmapper",
    },
    SourceOption {
        name: "mount_port",
        kinds: &[SourceKind::Nfs],
        help: "port of the MOUNT service, if not asked of the portmapper",
    },
    SourceOption {
        name: "fault",
        kinds: ANY,
        help: "testing only: injected faults, for example latency=5ms,error=0.01",
    },
];

/// Options that say how much may be asked of a source, not what is there: each mount has its own.
pub const RATES: [&str; 2] = ["request_rate", "bandwidth"];

impl SourceSpec {
    /// Parses `oss://bucket/prefix`, `s3://bucket/prefix`, `nfs://host[:port]/export/path` or `file:///dir`, with options.
    ///
    /// # Errors
    /// [`Kind::Invalid`] that names the part of the URL or the option and how to mend it.
    pub fn parse(url: &str, options: BTreeMap<String, String>, secret: SecretRef) -> Result<Self> {
        let invalid = |what: String| Err(Error::new(Kind::Invalid, what));
        let Some((scheme, rest)) = url.split_once("://") else {
            return invalid(format!(
                "source `{url}` has no scheme; write oss://, s3://, nfs://, file:// or dataset://"
            ));
        };
        let kind = match scheme {
            "file" => SourceKind::File,
            "nfs" => SourceKind::Nfs,
            "oss" => SourceKind::Oss,
            "s3" => SourceKind::S3,
            _ => return invalid(format!("source scheme `{scheme}` is unknown; use oss, s3, nfs, file or dataset")),
        };
        for name in options.keys() {
            match OPTIONS.iter().find(|o| o.name == name) {
                None => {
                    return invalid(format!("option `{name}` is unknown; `efc-fuse mount --help` lists all options"));
                }
                Some(o) if !o.kinds.contains(&kind) => {
                    return invalid(format!("option `{name}` does not apply to {scheme}:// sources"));
                }
                Some(_) => {}
            }
        }
        let (host, path) = rest.split_once('/').map_or((rest, ""), |(h, p)| (h, p));
        let mut spec =
            SourceSpec { kind, endpoint: String::new(), bucket: String::new(), path: String::new(), options, secret };
        match kind {
            SourceKind::File => {
                if !host.is_empty() {
                    return invalid(format!("source `{url}` names a host; a local directory is written file:///dir"));
                }
                spec.path = format!("/{}", path.trim_end_matches('/'));
            }
            SourceKind::Nfs => {
                if host.is_empty() {
                    return invalid(format!("source `{url}` has no host; write nfs://host[:port]/export"));
                }
                let port = spec.options.get("nfs_port").map_or("2049", String::as_str);
                spec.endpoint = if has_port(host) { host.into() } else { format!("{host}:{port}") };
                spec.path = format!("/{}", path.trim_end_matches('/'));
            }
            SourceKind::Oss | SourceKind::S3 => {
                if host.is_empty() {
                    return invalid(format!("source `{url}` has no bucket; write {scheme}://bucket/prefix"));
                }
                spec.bucket = host.into();
                let prefix = path.trim_end_matches('/');
                spec.path = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
                spec.endpoint = spec.object_endpoint()?;
            }
        }
        Ok(spec)
    }

    fn object_endpoint(&self) -> Result<String> {
        let region = self.option("region");
        let text = match (self.option("endpoint"), self.kind, region) {
            (Some(e), _, _) => e.trim_end_matches('/').to_string(),
            (None, SourceKind::S3, r) => format!("https://s3.{}.amazonaws.com", r.unwrap_or("us-east-1")),
            (None, _, Some(r)) => format!("https://oss-{}.aliyuncs.com", r.trim_start_matches("oss-")),
            (None, _, None) => {
                return Err(Error::new(
                    Kind::Invalid,
                    "an oss:// source needs `-o endpoint=https://oss-REGION.aliyuncs.com` or `-o region=REGION`",
                ));
            }
        };
        let text = if text.contains("://") { text } else { format!("https://{text}") };
        let host = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
        match host {
            Some(h) if !h.is_empty() && !h.contains('/') => Ok(text),
            _ => Err(Error::new(
                Kind::Invalid,
                format!("endpoint `{text}` must be http[s]://host[:port] without a path"),
            )),
        }
    }

    /// The value of an option.
    pub fn option(&self, name: &str) -> Option<&str> {
        self.options.get(name).map(String::as_str)
    }

    /// Takes the [`RATES`] over that `options` name.
    pub fn take_rates(&mut self, options: &BTreeMap<String, String>) {
        let rates = options.iter().filter(|(name, _)| RATES.contains(&name.as_str()));
        self.options.extend(rates.map(|(name, value)| (name.clone(), value.clone())));
    }

    /// Identity of the origin: equal for every path of one store, whatever the options.
    pub fn id(&self) -> SourceId {
        SourceId::of(&[self.kind.scheme().as_bytes(), self.endpoint.as_bytes(), self.bucket.as_bytes()])
    }

    /// The source as a URL, without options.
    pub fn url(&self) -> String {
        match self.kind {
            SourceKind::File => format!("file://{}", self.path),
            SourceKind::Nfs => format!("nfs://{}{}", self.endpoint, self.path),
            SourceKind::Oss | SourceKind::S3 => format!("{}://{}/{}", self.kind.scheme(), self.bucket, self.path),
        }
    }
}

fn has_port(host: &str) -> bool {
    match host.rsplit_once(']') {
        Some((_, after)) => after.starts_with(':'),
        None => host.contains(':'),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opts(list: &[(&str, &str)]) -> BTreeMap<String, String> {
        list.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    fn parse(url: &str, list: &[(&str, &str)]) -> Result<SourceSpec> {
        SourceSpec::parse(url, opts(list), SecretRef::Env)
    }

    #[test]
    fn urls() {
        let s = parse("s3://b/a/b/", &[("endpoint", "http://127.0.0.1:9000/")]).expect("s3");
        assert_eq!((s.endpoint.as_str(), s.bucket.as_str(), s.path.as_str()), ("http://127.0.0.1:9000", "b", "a/b/"));
        let n = parse("nfs://nas/export/x/", &[]).expect("nfs");
        assert_eq!((n.endpoint.as_str(), n.path.as_str()), ("nas:2049", "/export/x"));
        assert_eq!(parse("nfs://[::1]:12049/e", &[]).expect("v6").endpoint, "[::1]:12049");
        assert_eq!(parse("file:///data/", &[]).expect("file").path, "/data");
        assert_eq!(
            parse("oss://b", &[("region", "cn-hangzhou")]).expect("oss").endpoint,
            "https://oss-cn-hangzhou.aliyuncs.com"
        );
        for url in ["bucket/x", "ftp://x", "s3:///x", "nfs:///x", "file://host/x", "oss://b"] {
            assert!(parse(url, &[]).is_err_and(|e| e.is(Kind::Invalid)), "{url}");
        }
    }

    #[test]
    fn prefixes_of_one_bucket_share_the_identity() {
        let a = parse("s3://b/x", &[]).expect("a");
        let b = parse("s3://b/y", &[("request_rate", "5")]).expect("b");
        assert_eq!(a.id(), b.id());
        assert_ne!(a.id(), parse("s3://c/x", &[]).expect("c").id());
    }

    #[test]
    fn unknown_or_misplaced_options_are_refused_by_name() {
        assert!(parse("s3://b", &[("nonsense", "1")]).is_err_and(|e| e.message().contains("nonsense")));
        assert!(parse("file:///d", &[("region", "x")]).is_err_and(|e| e.message().contains("region")));
        assert!(parse("s3://b", &[("endpoint", "ftp://x")]).is_err());
    }

    #[test]
    fn secrets_do_not_print_and_refs_round_trip() {
        assert_eq!(format!("{:?}", Secret::new("hunter2")), "Secret(***)");
        for text in ["keys", "env", "dir:/etc/x", "process:/bin/p a", "role", "role:r", "oidc", "anonymous"] {
            assert_eq!(text.parse::<SecretRef>().expect(text).to_string(), text);
        }
        assert!("dir:relative".parse::<SecretRef>().is_err());
    }
}
