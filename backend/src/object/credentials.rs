//! Access keys and where they come from, one [`SecretRef`] per source. Called by `client` before each request.
//!
//! What must stay true: at most one refresh runs at a time, and everybody who needs its outcome waits for that one; keys are renewed
//! before they expire; while a refresh fails, keys that are still valid stay in use; no secret is ever printed. `load.rs` fetches.

mod load;

use efc_common::source::{Secret, SecretRef, SourceKind, SourceSpec, StaticKeys};
use efc_common::{Error, Kind, Result};
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use load::Loader;
use parking_lot::Mutex;
use reqsign_core::{Env, OsEnv};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// A refresh takes no longer.
const LOAD_TIMEOUT: Duration = Duration::from_secs(20);
/// Secret files are looked at no more often.
const DIR_INTERVAL: Duration = Duration::from_secs(1);
/// After a failed refresh the old keys are used for this long before the next try.
const FAILURE_PAUSE: Duration = Duration::from_secs(5);
/// Keys the store refused are renewed no more often.
const REFUSED_INTERVAL: Duration = Duration::from_secs(10);
/// Keys are renewed this long before they expire, or a fifth of their life if that is less.
const EARLY_MAX: Duration = Duration::from_secs(300);

/// Keys in use.
#[derive(Debug)]
pub(crate) struct Held {
    /// What to sign with.
    pub(crate) keys: StaticKeys,
    /// When they stop being valid.
    expires: Option<SystemTime>,
    obtained: SystemTime,
    /// Which state of the secret files they were read from.
    stamp: Vec<u8>,
}

impl Held {
    fn new(keys: StaticKeys, expires: Option<SystemTime>) -> Held {
        Held { keys, expires, obtained: SystemTime::now(), stamp: Vec::new() }
    }

    fn wants_renewal(&self, now: SystemTime) -> bool {
        self.expires.is_some_and(|end| {
            let life = end.duration_since(self.obtained).unwrap_or_default();
            now + EARLY_MAX.min(life / 5) >= end
        })
    }

    fn is_valid(&self, now: SystemTime) -> bool {
        self.expires.is_none_or(|end| now < end)
    }
}

type Flight = Shared<BoxFuture<'static, std::result::Result<Arc<Held>, Arc<Error>>>>;

#[derive(Default)]
struct State {
    held: Option<Arc<Held>>,
    /// The refresh under way.
    flight: Option<Flight>,
    /// Not before this is `held` looked at again.
    rest_until: Option<Instant>,
    /// The store refused `held`.
    refused: bool,
    refused_at: Option<Instant>,
}

/// See the module.
pub(crate) struct Credentials {
    source: Source,
    label: String,
}

enum Source {
    Anonymous,
    Fixed(Arc<Held>),
    Renewed { loader: Arc<Loader>, state: Mutex<State> },
}

impl Credentials {
    /// The credentials `spec` refers to; `keys` are the literal ones that came beside it. Reads the environment at most.
    pub(crate) fn new(spec: &SourceSpec, keys: Option<&StaticKeys>) -> Result<Credentials> {
        Credentials::with_env(spec, keys, OsEnv)
    }

    fn with_env(spec: &SourceSpec, keys: Option<&StaticKeys>, env: impl Env + Clone) -> Result<Credentials> {
        let fixed = |keys: StaticKeys| {
            if keys.id.is_empty() || keys.secret.expose().is_empty() {
                return Err(Error::new(
                    Kind::Invalid,
                    "the access key id or its secret is empty: check the credentials",
                ));
            }
            Ok(Source::Fixed(Arc::new(Held::new(keys, None))))
        };
        let source = match (&spec.secret, keys) {
            (SecretRef::Keys | SecretRef::Env, Some(keys)) => fixed(keys.clone())?,
            (SecretRef::Keys, None) => {
                return Err(Error::new(Kind::Invalid, "the source says that keys come beside it, but none came"));
            }
            (SecretRef::Env, None) => fixed(env_keys(spec.kind, &env)?)?,
            (SecretRef::Anonymous, _) => Source::Anonymous,
            (secret, _) => {
                let loader = Loader::new(secret, spec.kind, env)?;
                Source::Renewed { loader: Arc::new(loader), state: Mutex::default() }
            }
        };
        let label = match &spec.secret {
            SecretRef::Keys => "the given keys".to_string(),
            SecretRef::Env => "the environment".to_string(),
            // Arguments may hold what should not be shown.
            SecretRef::Process(p) => format!("process:{}", p.split_whitespace().next().unwrap_or_default()),
            other => other.to_string(),
        };
        Ok(Credentials { source, label })
    }

    /// Where the keys come from, for messages.
    pub(crate) fn label(&self) -> &str {
        &self.label
    }

    /// Keys to sign with now; `None` for anonymous requests.
    pub(crate) async fn get(&self) -> Result<Option<Arc<Held>>> {
        let (loader, state) = match &self.source {
            Source::Anonymous => return Ok(None),
            Source::Fixed(held) => return Ok(Some(Arc::clone(held))),
            Source::Renewed { loader, state } => (loader, state),
        };
        let flight = {
            let mut s = state.lock();
            if let Some(held) = s.fresh(loader.is_files()) {
                return Ok(Some(held));
            }
            let previous = s.held.clone().filter(|_| !s.refused);
            s.flight.get_or_insert_with(|| start(Arc::clone(loader), previous)).clone()
        };
        let outcome = flight.clone().await;
        let mut s = state.lock();
        // The first of those who waited enters the outcome.
        if s.flight.as_ref().is_some_and(|f| f.ptr_eq(&flight)) {
            s.flight = None;
            s.enter(&outcome, loader.is_files(), &self.label);
        }
        match outcome {
            Ok(held) => Ok(Some(held)),
            Err(e) => match s.held.clone().filter(|h| !s.refused && h.is_valid(SystemTime::now())) {
                Some(held) => Ok(Some(held)),
                None => {
                    Err(Error::new(e.kind(), format!("no credentials from {}: {e}", self.label)).with_retry(e.retry()))
                }
            },
        }
    }

    /// The store refused `held`. True if a request with other keys may succeed: they have been renewed since, or will be before the
    /// next request.
    pub(crate) fn refused(&self, held: &Arc<Held>) -> bool {
        let Source::Renewed { state, .. } = &self.source else { return false };
        let mut s = state.lock();
        if !s.held.as_ref().is_some_and(|current| Arc::ptr_eq(current, held)) {
            return true;
        }
        let now = Instant::now();
        if s.refused_at.is_some_and(|at| now < at + REFUSED_INTERVAL) {
            return s.refused;
        }
        s.refused = true;
        s.refused_at = Some(now);
        true
    }
}

impl State {
    fn fresh(&self, files: bool) -> Option<Arc<Held>> {
        let held = self.held.as_ref().filter(|_| !self.refused)?;
        let now = SystemTime::now();
        let resting = self.rest_until.is_some_and(|t| Instant::now() < t) && held.is_valid(now);
        (resting || !(files || held.wants_renewal(now))).then(|| Arc::clone(held))
    }

    fn enter(&mut self, outcome: &std::result::Result<Arc<Held>, Arc<Error>>, files: bool, label: &str) {
        let now = Instant::now();
        match outcome {
            Ok(held) => {
                self.held = Some(Arc::clone(held));
                self.refused = false;
                self.rest_until = files.then(|| now + DIR_INTERVAL);
            }
            Err(e) => {
                self.rest_until = Some(now + FAILURE_PAUSE);
                if self.held.is_some() {
                    tracing::warn!(credentials = label, error = %e, "credentials were not renewed; the old ones are used as long as they are valid");
                }
            }
        }
    }
}

fn start(loader: Arc<Loader>, previous: Option<Arc<Held>>) -> Flight {
    let load = async move {
        match tokio::time::timeout(LOAD_TIMEOUT, loader.load(previous)).await {
            Ok(outcome) => outcome.map_err(Arc::new),
            Err(_) => {
                Err(Arc::new(Error::new(Kind::Timeout, format!("nothing came within {} s", LOAD_TIMEOUT.as_secs()))))
            }
        }
    };
    load.boxed().shared()
}

/// Access keys from the usual environment variables of the store: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`
/// for S3; `OSS_ACCESS_KEY_ID`, `OSS_ACCESS_KEY_SECRET`, `OSS_SESSION_TOKEN`, else the same with `ALIBABA_CLOUD_` (the token is
/// `ALIBABA_CLOUD_SECURITY_TOKEN`) for OSS.
///
/// # Errors
/// [`Kind::Invalid`] that names the variables to set.
pub fn keys_from_env(kind: SourceKind) -> Result<StaticKeys> {
    env_keys(kind, &OsEnv)
}

/// The literal keys that the process which mounts sends along with `spec`: for an object store with [`SecretRef::Env`] those of its own
/// environment, else `given`.
///
/// # Errors
/// As [`keys_from_env`].
pub fn keys_to_send(spec: &SourceSpec, given: Option<&StaticKeys>) -> Result<Option<StaticKeys>> {
    match spec.secret {
        SecretRef::Env if spec.kind.is_object_store() => keys_from_env(spec.kind).map(Some),
        _ => Ok(given.cloned()),
    }
}

fn env_keys(kind: SourceKind, env: &impl Env) -> Result<StaticKeys> {
    const AWS: [&str; 3] = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"];
    const OSS: [&str; 3] = ["OSS_ACCESS_KEY_ID", "OSS_ACCESS_KEY_SECRET", "OSS_SESSION_TOKEN"];
    const ALIBABA: [&str; 3] =
        ["ALIBABA_CLOUD_ACCESS_KEY_ID", "ALIBABA_CLOUD_ACCESS_KEY_SECRET", "ALIBABA_CLOUD_SECURITY_TOKEN"];
    let sets: &[[&str; 3]] = if kind == SourceKind::Oss { &[OSS, ALIBABA] } else { &[AWS] };
    let value = |name: &str| env.var(name).filter(|v| !v.is_empty());
    for [id, secret, token] in sets {
        if let (Some(id), Some(secret)) = (value(id), value(secret)) {
            return Ok(StaticKeys {
                id,
                secret: Secret::new(secret),
                token: Secret::new(value(token).unwrap_or_default()),
            });
        }
    }
    let [id, secret, _] = sets[0];
    Err(Error::new(
        Kind::Invalid,
        format!(
            "no access key in the environment: set {id} and {secret}, or say where the credentials come from with secret="
        ),
    ))
}

#[cfg(test)]
mod tests;
