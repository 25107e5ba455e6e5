//! Journals: objects of EFC's own under `.efc/` at the root of a mount, which say what it is about, so that who comes after a crash can end it.
//!
//! An owner rewrites its journal every few seconds on condition of its version. One that was not rewritten for a while has no owner any more; who ends it takes it over by
//! rewriting it in the same way first.

use super::{Core, OWN_PREFIX, absent_is_none, meta};
use bytes::Bytes;
use efc_backend::objects::{Condition, Metadata};
use efc_common::node::Node;
use efc_common::{Error, Kind, Result};
use futures::TryStreamExt;
use serde::Serialize;
use std::time::Duration;

/// What is found of a journal.
pub(super) enum Found {
    /// It is done with.
    Gone,
    /// Its owner seems to live.
    Alive,
    /// It has no owner any more.
    Dead {
        /// To be taken over.
        version: Bytes,
        /// When it was written last, seconds since the epoch.
        written: i64,
        /// What it says.
        text: Vec<u8>,
    },
}

/// Seconds since the epoch before which who was heard of last is dead.
pub(super) fn dead_before(dead_after: Duration) -> i64 {
    meta::now().secs.saturating_sub(i64::try_from(dead_after.as_secs()).unwrap_or(i64::MAX))
}

impl Core {
    /// Where journals lie whose names begin so.
    pub(super) fn journals(&self, kind: &str) -> Bytes {
        [&self.root[..], OWN_PREFIX, b"/", kind.as_bytes()].concat().into()
    }

    /// A name that no journal has. It begins with this mount's [`Core::own_journals`].
    pub(super) fn new_journal(&self, kind: &str) -> Bytes {
        let own = self.own_journals(kind);
        [&own[..], format!("{:016x}", rand::random::<u64>()).as_bytes()].concat().into()
    }

    /// Where journals of this mount lie, through all its processes.
    pub(super) fn own_journals(&self, kind: &str) -> Bytes {
        self.journals(&format!("{kind}{:016x}-", self.owner))
    }

    /// Writes a journal. Its new version; [`Kind::Conflict`] when somebody has taken it over.
    pub(super) async fn put_journal(
        &self,
        locator: &Bytes,
        record: &impl Serialize,
        condition: &Condition,
    ) -> Result<Bytes> {
        let text = serde_json::to_vec(record)
            .map_err(|e| Error::new(Kind::Corrupt, "a journal cannot be written").caused_by(e))?;
        Ok(self.objects.put(locator, vec![text.into()], &Metadata::default(), condition).await?.version)
    }

    /// Looks at a journal. Its owner is dead if it has not been heard of for so long.
    pub(super) async fn find_journal(&self, locator: &Bytes, dead_after: Duration) -> Result<Found> {
        let Some((node, _)) = absent_is_none(self.objects.head(locator).await)? else { return Ok(Found::Gone) };
        if node.attr.mtime.secs > dead_before(dead_after) {
            return Ok(Found::Alive);
        }
        let read = self.backend.read(locator, &node.version, 0..node.attr.size).await?;
        let text = read.try_collect::<Vec<_>>().await?.concat();
        Ok(Found::Dead { version: node.version, written: node.attr.mtime.secs, text })
    }

    /// Everything below a directory, at any depth.
    pub(super) async fn nodes_below(&self, dir: &Bytes) -> Result<Vec<Node>> {
        let (mut all, mut from) = (Vec::new(), None);
        loop {
            let page = self.objects.keys_below(dir, from).await?;
            all.extend(page.entries.into_iter().map(|e| e.node));
            from = page.next;
            if from.is_none() {
                return Ok(all);
            }
        }
    }
}
