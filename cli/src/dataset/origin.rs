//! One mount of a dataset, connected: its backend and the workers as its cache.

use super::show;
use crate::context::Cluster;
use bytes::Bytes;
use efc_backend::object::keys_to_send;
use efc_backend::{DynBackend, connect};
use efc_client::master::MasterClient;
use efc_client::peers::{Peers, PeersOptions};
use efc_client::ring::RingWatch;
use efc_common::id::SourceId;
use efc_common::node::{Entry, Node};
use efc_common::policy::Consistency;
use efc_common::source::SourceSpec;
use efc_common::{Error, Kind, Result};
use efc_proto::control::{Dataset, Mount};
use efc_proto::convert::cache_policy;
use std::sync::Arc;
use std::time::Duration;

/// See the module.
pub(crate) struct Origin {
    /// Where in the dataset it appears.
    pub(crate) path: Vec<Vec<u8>>,
    /// Identity of the store.
    pub(crate) id: SourceId,
    /// The origin itself.
    pub(crate) backend: DynBackend,
    /// The workers.
    pub(crate) peers: Peers,
    /// The dataset's policy: what is warmed is pinned.
    pub(crate) pin: bool,
    max_age: Duration,
}

/// The dataset `name`.
///
/// # Errors
/// [`Kind::NotFound`] that says how to find its right name.
pub(crate) async fn get(master: &MasterClient, name: &str) -> Result<Dataset> {
    match master.get_dataset(name).await {
        Err(e) if e.is(Kind::NotFound) => {
            Err(Error::new(Kind::NotFound, format!("there is no dataset `{name}`; `efc dataset list` shows all")))
        }
        other => other,
    }
}

/// The source of a dataset's mount.
///
/// # Errors
/// [`Kind::Corrupt`] when the master's description cannot be read.
pub(crate) fn source_of(dataset: &str, mount: &Mount) -> Result<SourceSpec> {
    serde_json::from_str(&mount.source_json).map_err(|e| {
        let what = format!(
            "the source of dataset `{dataset}` at {} cannot be read; is `efc` older than the master?",
            mount.path
        );
        Error::new(Kind::Corrupt, what).caused_by(e)
    })
}

impl Origin {
    /// Connects to the origin of `mount`.
    ///
    /// # Errors
    /// What the backend has against its options or credentials.
    pub(crate) async fn open(
        cluster: &Cluster,
        ring: &Arc<RingWatch>,
        dataset: &Dataset,
        mount: &Mount,
    ) -> Result<Arc<Origin>> {
        let spec = source_of(&dataset.name, mount)?;
        let keys = keys_to_send(&spec, None)?;
        let backend = connect(&spec, keys.as_ref()).await?;
        let consistency: Consistency = dataset.consistency.parse()?;
        let cache = cache_policy(dataset.cache);
        let options = PeersOptions { cache, ..Default::default() };
        Ok(Arc::new(Origin {
            path: mount.path.split('/').filter(|p| !p.is_empty()).map(|p| p.as_bytes().to_vec()).collect(),
            id: spec.id(),
            backend,
            peers: Peers::new(ring.clone(), spec, keys, cluster.me.clone(), options),
            pin: cache.pin,
            max_age: consistency.ttl(),
        }))
    }

    /// Are directories listed through the workers?
    pub(crate) fn shares_listings(&self) -> bool {
        self.backend.capabilities().shared_listing && self.peers.any()
    }

    /// All entries of directory `dir`: from the workers where they share listings, else (and when none answers) from the origin.
    ///
    /// # Errors
    /// What the origin says.
    pub(crate) async fn list(&self, dir: &Bytes) -> Result<Vec<Entry>> {
        if self.shares_listings() {
            match self.peers.list(dir, self.max_age, 0).await {
                Ok(l) => return Ok(l.entries),
                Err(e) if e.is(Kind::Unavailable) => {
                    tracing::warn!(error = %e, "no worker could list a directory; asking the origin");
                }
                Err(e) => return Err(e),
            }
        }
        let mut entries = Vec::new();
        let mut from = None;
        loop {
            let page = self.backend.list(dir, from).await?;
            entries.extend(page.entries);
            match page.next {
                Some(next) => from = Some(next),
                None => return Ok(entries),
            }
        }
    }

    /// The node of `parts` below the origin's root.
    ///
    /// # Errors
    /// [`Kind::NotFound`] naming the part that is not there.
    pub(crate) async fn resolve(&self, parts: &[Vec<u8>]) -> Result<Node> {
        let mut node = self.backend.root().await?;
        for (i, part) in parts.iter().enumerate() {
            node = self.backend.lookup(&node.locator, part).await.map_err(|e| not_there(e, &parts[..=i]))?;
        }
        Ok(node)
    }
}

/// An error of a look-up, in words of the path.
pub(super) fn not_there(e: Error, parts: &[Vec<u8>]) -> Error {
    match e.kind() {
        Kind::NotFound => Error::new(Kind::NotFound, format!("there is no {} at the origin", show(parts))),
        Kind::NotADirectory => Error::new(Kind::NotADirectory, format!("{} is below a file", show(parts))),
        _ => e,
    }
}
