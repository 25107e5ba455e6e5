//! Fetching keys: secret files, a credentials program, the role of the machine, OIDC federation. The last two speak through reqsign's
//! providers; endpoints can be moved by the SDKs' own variables (`AWS_EC2_METADATA_SERVICE_ENDPOINT`, `AWS_ENDPOINT_URL_STS`,
//! `ALIBABA_CLOUD_ECS_METADATA_SERVICE_ENDPOINT`, `ALIBABA_CLOUD_STS_ENDPOINT`), which is also how tests do it.

use super::Held;
use crate::object::client::install_ring;
use bytes::Bytes;
use efc_common::source::{Secret, SecretRef, SourceKind, StaticKeys};
use efc_common::{Error, Kind, Result, Retry};
use reqsign_aliyun_oss::{AssumeRoleWithOidcCredentialProvider, EcsRamRoleCredentialProvider};
use reqsign_aws_v4::{AssumeRoleWithWebIdentityCredentialProvider, IMDSv2CredentialProvider};
use reqsign_core::time::Timestamp;
use reqsign_core::{Context, Env, HttpSend, ProvideCredential};
use reqsign_file_read_tokio::TokioFileRead;
use reqsign_http_send_reqwest::ReqwestHttpSend;
use serde::Deserialize;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Longest secret file or program output that is read.
const SECRET_BYTES_MAX: u64 = 64 << 10;
/// Program output that an error quotes, characters (of stderr only: stdout holds the secret).
const QUOTE_CHARS: usize = 300;
/// Deadline of one request to a metadata service or STS.
const HTTP_TIMEOUT: Duration = Duration::from_secs(8);
/// File names in a secret directory: id, secret, token. The first set is the one Fluid and the Alibaba Cloud CSI driver mount.
const FILE_SETS: [[&str; 3]; 2] =
    [["akId", "akSecret", "securityToken"], ["access-key-id", "access-key-secret", "session-token"]];

/// One place that keys are fetched from.
pub(super) enum Loader {
    Files(PathBuf),
    Program(Vec<String>),
    AwsRole(IMDSv2CredentialProvider, Context),
    EcsRole(EcsRamRoleCredentialProvider, Context),
    AwsOidc(AssumeRoleWithWebIdentityCredentialProvider, Context),
    RamOidc(AssumeRoleWithOidcCredentialProvider, Context),
}

impl Loader {
    pub(super) fn new(secret: &SecretRef, kind: SourceKind, env: impl Env + Clone) -> Result<Loader> {
        Ok(match (secret, kind) {
            (SecretRef::Dir(dir), _) => Loader::Files(dir.into()),
            (SecretRef::Process(command), _) => {
                Loader::Program(command.split_whitespace().map(str::to_string).collect())
            }
            (SecretRef::Role(name), SourceKind::Oss) => {
                let provider = EcsRamRoleCredentialProvider::new();
                let provider = if name.is_empty() { provider } else { provider.with_role_name(name) };
                Loader::EcsRole(provider, context(env, false)?)
            }
            (SecretRef::Role(_), _) => Loader::AwsRole(IMDSv2CredentialProvider::new(), context(env, false)?),
            (SecretRef::Oidc, SourceKind::Oss) => {
                Loader::RamOidc(AssumeRoleWithOidcCredentialProvider::new(), context(env, true)?)
            }
            (SecretRef::Oidc, _) => {
                Loader::AwsOidc(AssumeRoleWithWebIdentityCredentialProvider::new(), context(env, true)?)
            }
            (other, _) => return Err(Error::new(Kind::Invalid, format!("credentials `{other}` cannot be fetched"))),
        })
    }

    /// Files tell a change when they are looked at, everything else by its expiry.
    pub(super) fn is_files(&self) -> bool {
        matches!(self, Loader::Files(_))
    }

    /// Fetches keys. `previous` is given back as it is when the secret files have not changed.
    pub(super) async fn load(&self, previous: Option<Arc<Held>>) -> Result<Arc<Held>> {
        let held = match self {
            Loader::Files(dir) => {
                let dir = dir.clone();
                let read = tokio::task::spawn_blocking(move || read_files(&dir, previous.as_ref()));
                return read.await.map_err(|e| Error::new(Kind::Io, "reading the secret files failed").caused_by(e))?;
            }
            Loader::Program(command) => run_program(command).await?,
            Loader::AwsRole(p, ctx) => {
                aws(p.provide_credential(ctx).await, "this machine has no instance profile (IMDSv2)")?
            }
            Loader::EcsRole(p, ctx) => oss(p.provide_credential(ctx).await, "this machine has no RAM role")?,
            Loader::AwsOidc(p, ctx) => {
                aws(p.provide_credential(ctx).await, "set AWS_ROLE_ARN and AWS_WEB_IDENTITY_TOKEN_FILE")?
            }
            Loader::RamOidc(p, ctx) => oss(
                p.provide_credential(ctx).await,
                "set ALIBABA_CLOUD_ROLE_ARN, ALIBABA_CLOUD_OIDC_PROVIDER_ARN and ALIBABA_CLOUD_OIDC_TOKEN_FILE",
            )?,
        };
        if !held.is_valid(SystemTime::now()) {
            return Err(
                Error::new(Kind::PermissionDenied, "the keys that came have expired already").with_retry(Retry::Later)
            );
        }
        Ok(Arc::new(held))
    }
}

/// What reqsign's providers work with. `tls`: the peer is on the Internet, so system proxies apply and certificates are checked; a
/// metadata service is a plain-http neighbour that no proxy may come between.
fn context(env: impl Env + Clone, tls: bool) -> Result<Context> {
    install_ring();
    let builder = reqwest::Client::builder().connect_timeout(HTTP_TIMEOUT / 4).timeout(HTTP_TIMEOUT);
    let builder = if tls { builder } else { builder.no_proxy().tls_certs_only([]) };
    let client = builder.build().map_err(|e| {
        Error::new(Kind::Invalid, "TLS cannot be set up: are certificate authorities installed (ca-certificates)?")
            .caused_by(e)
    })?;
    let send = Sender {
        http: ReqwestHttpSend::new(client),
        aws_sts: env.var("AWS_ENDPOINT_URL_STS").filter(|u| !u.is_empty()),
    };
    Ok(Context::new().with_file_read(TokioFileRead).with_env(env).with_http_send(send))
}

/// Sends for reqsign, with the variable that moves AWS STS, which its provider does not know.
#[derive(Debug)]
struct Sender {
    http: ReqwestHttpSend,
    aws_sts: Option<String>,
}

impl HttpSend for Sender {
    async fn http_send(&self, mut request: http::Request<Bytes>) -> reqsign_core::Result<http::Response<Bytes>> {
        let host = request.uri().host().unwrap_or_default();
        if let (Some(url), true) = (&self.aws_sts, host.starts_with("sts.") && host.contains(".amazonaws.com")) {
            *request.uri_mut() = format!("{}/", url.trim_end_matches('/')).parse().map_err(|e| {
                reqsign_core::Error::config_invalid("AWS_ENDPOINT_URL_STS is no address").with_source(e)
            })?;
        }
        self.http.http_send(request).await
    }
}

fn aws(outcome: reqsign_core::Result<Option<reqsign_aws_v4::Credential>>, cure: &str) -> Result<Held> {
    let c = outcome.map_err(provider_error)?.ok_or_else(|| Error::new(Kind::Invalid, cure))?;
    Ok(held(c.access_key_id, c.secret_access_key, c.session_token, c.expires_in))
}

fn oss(outcome: reqsign_core::Result<Option<reqsign_aliyun_oss::Credential>>, cure: &str) -> Result<Held> {
    let c = outcome.map_err(provider_error)?.ok_or_else(|| Error::new(Kind::Invalid, cure))?;
    Ok(held(c.access_key_id, c.access_key_secret, c.security_token, c.expires_in))
}

fn held(id: String, secret: String, token: Option<String>, expires: Option<Timestamp>) -> Held {
    let keys = StaticKeys { id, secret: Secret::new(secret), token: Secret::new(token.unwrap_or_default()) };
    Held::new(keys, expires.map(Timestamp::as_system_time))
}

fn provider_error(e: reqsign_core::Error) -> Error {
    use reqsign_core::ErrorKind as K;
    let (kind, retry) = match e.kind() {
        K::PermissionDenied | K::CredentialInvalid => (Kind::PermissionDenied, Retry::Never),
        K::ConfigInvalid | K::RequestInvalid => (Kind::Invalid, Retry::Never),
        _ => (Kind::Unavailable, Retry::Later),
    };
    Error::new(kind, "the credentials service did not give keys").with_retry(retry).caused_by(e)
}

fn read_files(dir: &Path, previous: Option<&Arc<Held>>) -> Result<Arc<Held>> {
    let missing = || {
        let [[id, secret, _], [id2, secret2, _]] = FILE_SETS;
        let dir = dir.display();
        Error::new(Kind::Invalid, format!("{dir} holds neither {id} and {secret} nor {id2} and {secret2}"))
            .with_retry(Retry::Later)
    };
    // Kubernetes swaps the whole directory at once: what was read counts if nothing changed meanwhile.
    for _ in 0..5 {
        let (set, stamp) = FILE_SETS.iter().find_map(|set| Some((set, stamp(dir, set)?))).ok_or_else(missing)?;
        if let Some(same) = previous.filter(|p| p.stamp == stamp) {
            return Ok(Arc::clone(same));
        }
        let [id, secret, token] = set.map(|name| read_file(&dir.join(name)));
        if self::stamp(dir, set).is_some_and(|now| now == stamp) {
            let (id, secret) = (id?.unwrap_or_default(), secret?.unwrap_or_default());
            if id.is_empty() || secret.is_empty() {
                return Err(missing());
            }
            let keys = StaticKeys { id, secret: Secret::new(secret), token: Secret::new(token?.unwrap_or_default()) };
            return Ok(Arc::new(Held { stamp, ..Held::new(keys, None) }));
        }
    }
    Err(Error::new(Kind::Unavailable, format!("the files in {} keep changing", dir.display())))
}

/// Names one state of the files: inode, times and size of each. `None` unless id and secret are there.
fn stamp(dir: &Path, set: &[&str; 3]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    for (i, name) in set.iter().enumerate() {
        match std::fs::metadata(dir.join(name)) {
            Ok(m) => {
                for number in
                    [m.ino(), m.mtime() as u64, m.mtime_nsec() as u64, m.ctime() as u64, m.ctime_nsec() as u64, m.len()]
                {
                    out.extend_from_slice(&number.to_le_bytes());
                }
            }
            Err(_) if i == 2 => {}
            Err(_) => return None,
        }
    }
    Some(out)
}

/// A file's text without white space around it; `None` when there is none.
fn read_file(path: &Path) -> Result<Option<String>> {
    use std::io::Read;
    let open = match std::fs::File::open(path) {
        Ok(f) => f,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::from(e).with("path", path.display())),
    };
    let mut text = String::new();
    open.take(SECRET_BYTES_MAX).read_to_string(&mut text).map_err(|e| Error::from(e).with("path", path.display()))?;
    Ok(Some(text.trim().to_string()))
}

/// What a credentials program prints: the AWS `credential_process` form, the STS form of OSS, or that of the Alibaba Cloud CLI.
#[derive(Deserialize)]
struct Printed {
    #[serde(rename = "AccessKeyId", alias = "access_key_id")]
    id: String,
    #[serde(rename = "SecretAccessKey", alias = "AccessKeySecret", alias = "access_key_secret")]
    secret: String,
    #[serde(rename = "SessionToken", alias = "SecurityToken", alias = "sts_token")]
    token: Option<String>,
    #[serde(rename = "Expiration", alias = "expiration")]
    expiration: Option<String>,
}

async fn run_program(command: &[String]) -> Result<Held> {
    let (program, arguments) =
        command.split_first().ok_or_else(|| Error::new(Kind::Invalid, "process: names no program"))?;
    let failed = |what: String| Error::new(Kind::Unavailable, format!("{program} {what}"));
    let mut child = tokio::process::Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| Error::new(Kind::Invalid, format!("{program} cannot be run: check the path")).caused_by(e))?;
    let (out, err) = tokio::join!(drain(child.stdout.take()), drain(child.stderr.take()));
    let (out, err) = (out?, err?);
    let status = child.wait().await?;
    if !status.success() {
        let said: String = String::from_utf8_lossy(&err).trim().chars().take(QUOTE_CHARS).collect();
        return Err(failed(format!("ended with {status}: {said}")));
    }
    // The parser's message could quote the secret: it is not passed on.
    let printed: Printed = serde_json::from_slice(&out).map_err(|_| {
        failed("did not print credentials as JSON with AccessKeyId, and SecretAccessKey or AccessKeySecret".into())
    })?;
    let expires = match printed.expiration.as_deref().filter(|t| !t.is_empty()) {
        None => None,
        Some(t) => Some(t.parse().map_err(|_| failed("printed an Expiration that is no RFC 3339 time".into()))?),
    };
    if printed.id.is_empty() || printed.secret.is_empty() {
        return Err(failed("printed an empty key".into()));
    }
    Ok(held(printed.id, printed.secret, printed.token, expires))
}

/// Reads a pipe to its end, which keeps the program from blocking, and keeps the first bytes.
async fn drain(pipe: Option<impl AsyncRead + Unpin>) -> Result<Vec<u8>> {
    let mut kept = Vec::new();
    if let Some(mut pipe) = pipe {
        (&mut pipe).take(SECRET_BYTES_MAX).read_to_end(&mut kept).await?;
        tokio::io::copy(&mut pipe, &mut tokio::io::sink()).await?;
    }
    Ok(kept)
}
