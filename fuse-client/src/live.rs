//! Options that a mount takes over while it serves ([`crate::options::all_live`]), and who has to hear of them.

use crate::cli::MountArgs;
use crate::embedded::Sizes;
use crate::fs::EfcFs;
use crate::options::{self, MountOptions};
use crate::process::resolve;
use crate::write::ObjectTree;
use efc_backend::connect::connect_counted;
use efc_backend::limit::{Limits, Rates};
use efc_backend::object::Signer;
use efc_client::peers::Peers;
use efc_common::error::Context as _;
use efc_common::limit::ByteBudget;
use efc_common::source::{SourceSpec, StaticKeys};
use efc_common::{Error, Kind, Result, log};
use std::sync::Arc;
use tokio::sync::Mutex;

/// Part of a process's budget (`memory`) for listings of directories.
const LISTING_SHARE: u64 = 4;
/// Part of it for files of an object store that are being written.
const STAGING_SHARE: u64 = 4;

/// How the budget of a mount process is divided, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shares {
    /// Listings of directories.
    pub(crate) listings: u64,
    /// Files that are being written.
    pub(crate) staged: u64,
    /// What is read, and on its way to the kernel.
    pub(crate) read: u64,
}

impl Shares {
    /// Divides `memory` bytes. `stages`: files are staged here before a store has them.
    pub(crate) fn of(memory: u64, stages: bool) -> Shares {
        let (listings, staged) = (memory / LISTING_SHARE, if stages { memory / STAGING_SHARE } else { 0 });
        Shares { listings, staged, read: memory - listings - staged }
    }
}

/// What live options reach.
pub(crate) struct Reach {
    /// The tree that stages files, if there is one.
    pub(crate) drafts: Option<ObjectTree>,
    /// Of what is read.
    pub(crate) budget: ByteBudget,
    /// The workers.
    pub(crate) peers: Peers,
    /// Of this process's own requests, at object stores.
    pub(crate) signer: Option<Signer>,
    /// Of this process's own requests.
    pub(crate) limits: Arc<Limits>,
    /// Of the embedded worker, if the mount has one.
    pub(crate) sizes: Option<Arc<Sizes>>,
}

/// A mount's options, which can change.
pub struct Live {
    args: MountArgs,
    /// One change at a time.
    current: Mutex<Current>,
    reach: Reach,
}

/// How things are now.
struct Current {
    options: Vec<String>,
    source: SourceSpec,
    keys: Option<StaticKeys>,
}

impl Live {
    /// Those of a mount of `source` that was started with `args`.
    pub(crate) fn new(args: &MountArgs, source: SourceSpec, keys: Option<StaticKeys>, reach: Reach) -> Live {
        let current = Mutex::new(Current { options: args.options.clone(), source, keys });
        Live { args: args.clone(), current, reach }
    }

    /// Takes options over, all or none. Credentials are tried at the origin first.
    ///
    /// # Errors
    /// As [`options::check_live`]; [`Kind::Invalid`] for an option that says nothing to this mount; what origin or worker said against it.
    pub async fn set(&self, texts: &[String], fs: &EfcFs) -> Result<()> {
        options::check_live(texts)?;
        let is_set = |name| texts.iter().any(|t| t.starts_with(&format!("{name}=")));
        let reach = &self.reach;
        let mut current = self.current.lock().await;
        let mut all = current.options.clone();
        options::replace(&mut all, texts);
        // Once: a passwd file may be another the next time.
        let now = MountOptions::parse(&all, (0, 0))?;
        let (mut source, mut keys) = (current.source.clone(), current.keys.clone());
        let credentials = is_set("secret") || is_set("passwd_file");
        if credentials {
            (source, keys) = self.credentials(&now).await?;
        }
        source.take_rates(&now.source);
        let rates = Rates::of(&source)?;
        if is_set("staging_size") && reach.drafts.is_none() {
            return Err(without("staging_size", "is for read-write mounts of object stores"));
        }
        let (memory, disk) = (is_set("cache_memory"), is_set("cache_size"));
        if memory || disk {
            let Some(sizes) = &reach.sizes else {
                return Err(without(
                    "cache_memory` and `cache_size",
                    "are of the embedded worker: a cluster's workers have their own sizes (efc-worker --memory, --disk)",
                ));
            };
            if disk && !sizes.has_disk() {
                return Err(without("cache_size", "is the size of cache_dir, and this mount has none"));
            }
            let given = |is_set: bool, bytes: u64| if is_set { bytes } else { 0 };
            let (memory, disk) = (given(memory, now.cache_memory_bytes), given(disk, now.cache_size_bytes));
            reach.peers.resize(memory, disk).await.context("the embedded worker keeps its sizes")?;
            sizes.set(memory, disk);
        }
        // From here on nothing fails: what was given has been looked at.
        if let (true, Some(signer)) = (credentials, &reach.signer) {
            signer.replace(&source, keys.as_ref())?;
        }
        if credentials || source != current.source {
            reach.limits.set(rates);
            reach.peers.replace_source(source.clone(), keys.clone());
        }
        if is_set("log_level")
            && let Some(level) = &now.log_level
        {
            log::set_level(level)?;
        }
        if is_set("memory") || is_set("staging_size") {
            let shares = Shares::of(now.memory_bytes, reach.drafts.is_some());
            if is_set("memory") {
                reach.budget.resize(shares.read);
                fs.directories().resize(shares.listings);
            }
            if let Some(tree) = &reach.drafts {
                tree.space().resize(shares.staged, now.staging_bytes);
            }
        }
        fs.reader().configure(|c| {
            c.readahead_bytes = now.readahead_bytes;
            c.deadline = now.read_deadline;
        });
        *current = Current { options: all, source, keys };
        Ok(())
    }

    /// The source with the credentials that `options` name, which the origin takes.
    async fn credentials(&self, options: &MountOptions) -> Result<(SourceSpec, Option<StaticKeys>)> {
        if self.reach.signer.is_none() {
            return Err(without("secret` and `passwd_file", "are for object stores"));
        }
        if self.args.source.starts_with("dataset://") {
            return Err(without(
                "secret` and `passwd_file",
                "are those of the dataset here: change them with efc dataset, and have efc-fuse upgrade mount it anew",
            ));
        }
        let mounted = resolve(&self.args, options).await?.mounted;
        let origin = connect_counted(&mounted.spec, mounted.keys.as_ref()).await?;
        origin.backend.root().await.context("the mount goes on with the credentials of before")?;
        Ok((mounted.spec, mounted.keys))
    }
}

fn without(name: &str, why: &str) -> Error {
    Error::new(Kind::Invalid, format!("option `{name}` {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_all_of_it() {
        for (memory, stages) in [(32 << 20, true), ((1 << 30) + 7, false), (1 << 40, true)] {
            let s = Shares::of(memory, stages);
            assert_eq!(s.listings + s.staged + s.read, memory);
            assert_eq!(s.staged > 0, stages);
        }
    }
}
