//! Renaming a directory: each key below is copied, then each is deleted. A journal beside the tree says how far that is, so that a crash leaves the old tree or the
//! new one and not a mixture.
//!
//! The journal is an object `.efc/rename-ID` at the root of the mount: source, target, phase. In phase `copying` the source is whole: who finds it removes the
//! copies. In phase `copied` the target is whole: who finds it removes what is left of the source. It is rewritten every few seconds, each time on condition of its version: who
//! recovers a journal that has not been rewritten for a while takes it over in the same way, and so the former owner, should it still live, ends with
//! an error before it deletes anything. Where the store decides no conditions (OSS) that is looked at right before.
//!
//! Keys that others make below the source meanwhile stay where they are.

use super::journal::Found;
use super::paths::exists;
use super::{Core, ObjectTree, absent_is_none, directory, meta};
use bytes::Bytes;
use efc_backend::objects::Condition;
use efc_common::node::Node;
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Names of journals begin so.
const KIND: &str = "rename-";
/// Copies under way at once.
const COPIES_AT_ONCE: usize = 32;
/// A journal is rewritten after this time.
const BEAT: Duration = Duration::from_secs(10);
/// One that was not for so long has no owner any more.
pub(super) const DEAD_AFTER: Duration = Duration::from_secs(60);
/// Keys deleted at once.
const BATCH: usize = 1000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Phase {
    Copying,
    Copied,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    source: Vec<u8>,
    target: Vec<u8>,
    phase: Phase,
    /// Differs from each time to the next, so that the version does.
    beat: u64,
}

/// A journal that is ours.
struct Journal {
    locator: Bytes,
    version: Bytes,
    record: Record,
    written: Instant,
}

impl Journal {
    async fn begin(core: &Core, source: &Bytes, target: &Bytes) -> Result<Journal> {
        let locator = core.new_journal(KIND);
        let record = Record { source: source.to_vec(), target: target.to_vec(), phase: Phase::Copying, beat: 0 };
        let mut journal = Journal { locator, version: Bytes::new(), record, written: Instant::now() };
        journal.write(core, &Condition::Absent).await?;
        Ok(journal)
    }

    async fn write(&mut self, core: &Core, condition: &Condition) -> Result<()> {
        self.record.beat = rand::random();
        self.version = core.put_journal(&self.locator, &self.record, condition).await?;
        self.written = Instant::now();
        Ok(())
    }

    /// Says that the owner lives; [`Kind::Conflict`] when somebody has taken the journal over.
    async fn beat(&mut self, core: &Core) -> Result<()> {
        if self.written.elapsed() < BEAT {
            return Ok(());
        }
        let ours = Condition::Version(self.version.clone());
        self.write(core, &ours).await
    }

    async fn advance(&mut self, core: &Core, phase: Phase) -> Result<()> {
        self.record.phase = phase;
        let ours = Condition::Version(self.version.clone());
        self.write(core, &ours).await
    }

    async fn end(self, core: &Core) -> Result<()> {
        Core::deleted(core.objects.delete(&[self.locator]).await?)
    }
}

/// `key` below `from` as it is called below `to`.
fn moved_key(key: &Bytes, from: &[u8], to: &[u8]) -> Bytes {
    [to, key.strip_prefix(from).unwrap_or(key)].concat().into()
}

impl Core {
    pub(super) async fn rename_directory(
        self: &Arc<Self>,
        from: (&Bytes, &[u8]),
        to: (&Bytes, &[u8]),
        no_replace: bool,
    ) -> Result<Node> {
        let (source, target) = (self.objects.child(from.0, from.1, true)?, self.objects.child(to.0, to.1, true)?);
        if source == target {
            return Ok(directory(&source));
        }
        if target.starts_with(&source) {
            return Err(Error::new(Kind::Invalid, "a directory cannot be moved below itself"));
        }
        self.backend.getattr(&source).await?;
        if no_replace && absent_is_none(self.backend.getattr(&target).await)?.is_some() {
            return Err(exists());
        }
        if !self.is_empty(&target).await? {
            return Err(Error::new(Kind::NotEmpty, "the target is a directory that is not empty"));
        }
        self.commit_below(&source).await?;
        self.keep_dir(from.0).await?;
        self.move_keys(&source, &target).await?;
        self.follow(&source, &target).await?;
        for dir in [&source, &target] {
            self.known.forget_dir(dir);
            self.names.replaced(dir);
        }
        self.known.touch_dir(from.0);
        self.known.touch_dir(to.0);
        let marker = self.marker(&target).await?.unwrap_or_default();
        let node = meta::apply(directory(&target), &marker);
        self.names.gone(from.0, &Bytes::copy_from_slice(from.1));
        self.names.there(to.0, &Bytes::copy_from_slice(to.1), node.clone());
        Ok(node)
    }

    /// Files below that have no object yet, or another, become objects.
    async fn commit_below(self: &Arc<Self>, source: &Bytes) -> Result<()> {
        for file in self.names.drafts_below(source) {
            let open = self.enter(&file.node().locator);
            open.commit(&mut *open.state.inner.lock().await).await?;
        }
        Ok(())
    }

    async fn move_keys(&self, source: &Bytes, target: &Bytes) -> Result<()> {
        let mut journal = Journal::begin(self, source, target).await?;
        let copied = match self.copy_below(&mut journal, source, target).await {
            Ok(copied) => copied,
            Err(e) => {
                // Back to where it was, as recovery would.
                let undone = self.remove_doubles(target, source).await;
                if undone.is_ok() && !e.is(Kind::Conflict) {
                    journal.end(self).await?;
                }
                return Err(e);
            }
        };
        journal.advance(self, Phase::Copied).await?;
        for batch in copied.chunks(BATCH) {
            Core::deleted(self.objects.delete(batch).await?)?;
            journal.beat(self).await?;
        }
        journal.end(self).await
    }

    /// The keys that were copied.
    async fn copy_below(&self, journal: &mut Journal, source: &Bytes, target: &Bytes) -> Result<Vec<Bytes>> {
        let mut copied = Vec::new();
        let mut from = None;
        loop {
            let page = self.objects.keys_below(source, from).await?;
            if let Some((key, why)) = page.hidden.first() {
                let text = format!("a key below cannot be moved: {}: {why}", key.escape_ascii());
                return Err(Error::new(Kind::Unsupported, text));
            }
            let copies = page.entries.into_iter().map(|e| async move {
                let to = moved_key(&e.node.locator, source, target);
                self.objects
                    .copy((&e.node.locator, &e.node.version), &to, None, &Condition::Any)
                    .await
                    .map(|_| e.node.locator)
            });
            let mut copies = stream::iter(copies).buffer_unordered(COPIES_AT_ONCE);
            while let Some(key) = copies.try_next().await? {
                copied.push(key);
                journal.beat(self).await?;
            }
            from = page.next;
            if from.is_none() {
                return Ok(copied);
            }
        }
    }

    async fn all_below(&self, dir: &Bytes) -> Result<Vec<Bytes>> {
        Ok(self.nodes_below(dir).await?.into_iter().map(|n| n.locator).collect())
    }

    /// Deletes the keys below `of` that are below `keep` as well.
    async fn remove_doubles(&self, of: &Bytes, keep: &Bytes) -> Result<()> {
        let kept: HashSet<Bytes> = self.all_below(keep).await?.iter().map(|k| moved_key(k, keep, of)).collect();
        let doubles: Vec<Bytes> = self.all_below(of).await?.into_iter().filter(|k| kept.contains(k)).collect();
        for batch in doubles.chunks(BATCH) {
            Core::deleted(self.objects.delete(batch).await?)?;
        }
        Ok(())
    }

    /// Open files below the source go on at the target.
    async fn follow(self: &Arc<Self>, source: &Bytes, target: &Bytes) -> Result<()> {
        let open: Vec<Bytes> = self.files.lock().keys().filter(|k| k.starts_with(source)).cloned().collect();
        for locator in open {
            let file = self.enter(&locator);
            let mut inner = file.state.inner.lock().await;
            if inner.removed || inner.is_dirty() {
                continue;
            }
            inner.locator = moved_key(&locator, source, target);
            inner.dir = moved_key(&inner.dir, source, target);
            if inner.loaded {
                file.load(&mut inner).await?;
            }
            self.moved(&locator, &file.state, &mut inner);
        }
        Ok(())
    }

    /// True if it is done with, false if its owner seems to live.
    async fn recover(&self, locator: &Bytes, dead_after: Duration) -> Result<bool> {
        let (version, text) = match self.find_journal(locator, dead_after).await? {
            Found::Gone => return Ok(true),
            Found::Alive => return Ok(false),
            Found::Dead { version, text, .. } => (version, text),
        };
        let record: Record = serde_json::from_slice(&text)
            .map_err(|e| Error::new(Kind::Corrupt, "a journal of renaming is not understood").caused_by(e))?;
        let (source, target) = (Bytes::from(record.source.clone()), Bytes::from(record.target.clone()));
        if !source.starts_with(&self.root) || !target.starts_with(&self.root) || source == target {
            return Err(Error::new(Kind::Corrupt, "a journal names places outside the mount"));
        }
        let mut journal = Journal { locator: locator.clone(), version, record, written: Instant::now() };
        let phase = journal.record.phase;
        journal.advance(self, phase).await?;
        let finished = phase == Phase::Copied;
        tracing::info!(source = %source.escape_ascii(), target = %target.escape_ascii(), finished, "a rename that was cut short is ended");
        match phase {
            Phase::Copying => self.remove_doubles(&target, &source).await?,
            Phase::Copied => self.remove_doubles(&source, &target).await?,
        }
        for dir in [&source, &target] {
            self.known.forget_dir(dir);
            self.names.replaced(dir);
        }
        journal.end(self).await?;
        Ok(true)
    }
}

impl ObjectTree {
    /// Ends renames of directories that a predecessor of this process has begun.
    ///
    /// # Errors
    /// What the store said.
    pub async fn recover_own_renames(&self) -> Result<()> {
        let core = &self.core;
        let own = core.own_journals(KIND);
        for locator in core.all_below(&core.journals("")).await?.iter().filter(|k| k.starts_with(&own)) {
            core.recover(locator, Duration::ZERO).await?;
        }
        Ok(())
    }

    /// Ends renames of directories that were cut short and whose mounts have not been heard of for `dead_after`. How many are left because they may be under way.
    ///
    /// # Errors
    /// What the store said.
    pub async fn recover_renames(&self, dead_after: Duration) -> Result<usize> {
        let core = &self.core;
        let prefix = core.journals(KIND);
        let mut left = 0;
        for locator in core.all_below(&core.journals("")).await?.iter().filter(|k| k.starts_with(&prefix)) {
            left += usize::from(!core.recover(locator, dead_after).await?);
        }
        Ok(left)
    }

    /// The same and the sweep of uploads when a mount begins, and again as long as there are some that may be under way.
    pub async fn recover(&self, tasks: &TaskGroup) {
        tasks.spawn(self.clone().keep_ledger());
        if self.recover_and_say().await {
            return;
        }
        let tree = self.clone();
        tasks.spawn(async move {
            loop {
                tokio::time::sleep(DEAD_AFTER).await;
                if tree.recover_and_say().await {
                    return;
                }
            }
        });
    }

    async fn recover_and_say(&self) -> bool {
        let renamed = self.recover_renames(DEAD_AFTER).await;
        let renamed =
            renamed.inspect_err(|e| tracing::warn!(error = %e, "a rename that was cut short could not be ended"));
        let swept = self.sweep_uploads(DEAD_AFTER).await;
        let swept =
            swept.inspect_err(|e| tracing::warn!(error = %e, "uploads of mounts that died could not be thrown away"));
        matches!((renamed, swept), (Ok(0), Ok(0)))
    }
}

/// What a rename leaves that was cut short before it deleted anything.
#[cfg(test)]
pub(super) async fn cut_short(core: &Core, source: &Bytes, target: &Bytes, copied: bool) {
    let mut journal = Journal::begin(core, source, target).await.expect("journal");
    core.copy_below(&mut journal, source, target).await.expect("copies");
    if copied {
        journal.advance(core, Phase::Copied).await.expect("advance");
    }
}
