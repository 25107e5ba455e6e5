//! What every command of one run shares: the masters, the way to print, and who we are to workers.

use crate::output::Output;
use efc_client::master::MasterClient;
use efc_client::ring::{RingWatch, ring_of};
use efc_client::wire::Identity;
use efc_common::id::RingEpoch;
use efc_common::ring::Ring;
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use std::sync::Arc;
use std::time::Duration;

/// See the module.
#[derive(Debug)]
pub(crate) struct Context {
    masters: Vec<String>,
    /// Table or JSON.
    pub(crate) output: Output,
}

/// The cluster behind the masters.
pub(crate) struct Cluster {
    /// Its masters.
    pub(crate) master: MasterClient,
    /// The worker ring when it was asked.
    pub(crate) ring: Ring,
    /// Who we are to its workers.
    pub(crate) me: Identity,
}

impl Context {
    pub(crate) fn new(masters: Vec<String>, output: Output) -> Self {
        Context { masters: masters.into_iter().filter(|m| !m.trim().is_empty()).collect(), output }
    }

    /// The masters' client.
    ///
    /// # Errors
    /// [`Kind::Invalid`] when none were given or an address is wrong.
    pub(crate) fn master(&self) -> Result<MasterClient> {
        if self.masters.is_empty() {
            return Err(Error::new(
                Kind::Invalid,
                "no master is given; write `--master host:port[,host:port]` or set EFC_MASTER",
            ));
        }
        MasterClient::new(self.masters.clone())
    }

    /// The cluster with its ring.
    ///
    /// # Errors
    /// When no master answers.
    pub(crate) async fn cluster(&self) -> Result<Cluster> {
        let master = self.master()?;
        let reply = master.get_ring(RingEpoch(0), "", Duration::ZERO).await?;
        let ring = ring_of(&reply);
        let peer = format!("efc:{}", std::process::id());
        let me = Identity { cluster: reply.cluster, peer, epoch: reply.epoch };
        Ok(Cluster { master, ring, me })
    }
}

impl Cluster {
    /// Follows the ring as long as `tasks` lives.
    pub(crate) fn watch(&self, tasks: &TaskGroup) -> Arc<RingWatch> {
        RingWatch::start(self.master.clone(), tasks, Some(self.ring.clone()))
    }
}
