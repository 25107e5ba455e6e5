//! Sources that clients attached: one backend per (source, credentials, options) in the process, whoever asks.
//!
//! A source that reads files of this host or starts programs on it is taken from the unix socket only (which belongs to our own
//! user), unless the worker was told to trust the network.

use efc_backend::DynBackend;
use efc_common::id::{ContentId, SourceId};
use efc_common::source::{SecretRef, SourceKind, SourceSpec, StaticKeys};
use efc_common::{Error, Kind, Result};
use futures::future::BoxFuture;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;

/// Backends of one process.
const SOURCES_MAX: usize = 256;

/// Makes a backend of a source: [`efc_backend::connect`], or a test's own.
pub type Connector =
    Arc<dyn Fn(SourceSpec, Option<StaticKeys>) -> BoxFuture<'static, Result<DynBackend>> + Send + Sync>;

/// An attached source.
pub(crate) struct Source {
    pub(crate) id: SourceId,
    pub(crate) backend: DynBackend,
}

/// All attached sources.
pub(crate) struct Sources {
    connect: Connector,
    trust_network: bool,
    known: Mutex<HashMap<ContentId, Arc<Source>>>,
}

impl Sources {
    pub(crate) fn new(connect: Connector, trust_network: bool) -> Self {
        Sources { connect, trust_network, known: Mutex::default() }
    }

    /// The source of an `Attach`. `own_user`: it came through the unix socket.
    pub(crate) async fn attach(&self, spec_json: &str, keys_json: &str, own_user: bool) -> Result<Arc<Source>> {
        let spec = checked_spec(spec_json)?;
        let keys: Option<StaticKeys> = if keys_json.is_empty() {
            None
        } else {
            // The parser's own message could quote the text, and with it a secret.
            let malformed = |_| Error::new(Kind::Invalid, "attach: malformed keys");
            Some(serde_json::from_str(keys_json).map_err(malformed)?)
        };
        let ours = spec.kind == SourceKind::File || matches!(spec.secret, SecretRef::Process(_));
        if ours && !own_user && !self.trust_network {
            return Err(Error::new(
                Kind::PermissionDenied,
                "the worker takes sources that read its host's files or run its programs from its unix socket only; \
                 start efc-worker with --allow-local-sources to take them from the network",
            ));
        }
        let name = ContentId::of(&[b"attach", canonical(&spec)?.as_bytes(), keys_json.as_bytes()]);
        if let Some(s) = self.known.lock().get(&name) {
            return Ok(s.clone());
        }
        let id = spec.id();
        let backend = (self.connect)(spec, keys).await?;
        if backend.source_id() != id {
            return Err(Error::new(Kind::Invalid, "source and its backend have different identities"));
        }
        let mut known = self.known.lock();
        if let Some(s) = known.get(&name) {
            return Ok(s.clone());
        }
        if known.len() >= SOURCES_MAX {
            known.retain(|_, s| Arc::strong_count(s) > 1);
        }
        if known.len() >= SOURCES_MAX {
            return Err(Error::new(Kind::Exhausted, "the worker serves too many sources").with("most", SOURCES_MAX));
        }
        let source = Arc::new(Source { id, backend });
        known.insert(name, source.clone());
        Ok(source)
    }
}

fn canonical(spec: &SourceSpec) -> Result<String> {
    serde_json::to_string(spec).map_err(|e| Error::new(Kind::Invalid, "attach: source cannot be written").caused_by(e))
}

/// Parses a source and checks that it is one our own parser makes.
fn checked_spec(json: &str) -> Result<SourceSpec> {
    let spec: SourceSpec =
        serde_json::from_str(json).map_err(|e| Error::new(Kind::Invalid, "attach: malformed source").caused_by(e))?;
    let again = SourceSpec::parse(&spec.url(), spec.options.clone(), spec.secret.clone())?;
    if again != spec {
        return Err(Error::new(Kind::Invalid, "attach: source contradicts itself").with("source", spec.url()));
    }
    Ok(spec)
}
