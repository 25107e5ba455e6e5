//! A draft becomes an object.
//!
//! Up to 16 MiB by one PUT; beyond by an upload whose unchanged parts the store copies from the base version (where it makes sure of that version). Only
//! metadata changed: a copy of the object onto itself. Each is conditional on the version the draft was made of. Who lost the race is put beside,
//! as `NAME.efc-conflict-HOST-SECONDS`, and told [`Kind::Conflict`]; its descriptors go on with that file. Any other failure leaves everything
//! as it was, for the next attempt.

use super::file::{Base, Inner, Open};
use super::stream::{PUT_BYTES_MAX, Stream, parts};
use super::{Core, absent_is_none, meta};
use bytes::Bytes;
use efc_backend::objects::{Condition, Metadata, Part};
use efc_common::node::Node;
use efc_common::{Error, Kind, Result};
use futures::{StreamExt, TryStreamExt, stream};
use std::ops::Range;

/// Parts under way at once.
const PARTS_AT_ONCE: usize = 8;

impl Open {
    /// Brings everything to the store. Nothing to do is success.
    pub(super) async fn commit(&self, inner: &mut Inner) -> Result<()> {
        if !inner.is_dirty() {
            return Ok(());
        }
        self.core.known.touch_dir(&inner.dir);
        let earlier = inner.attempts.clone();
        let mut stored = self.core.store(inner).await;
        if stored.as_ref().is_err_and(|e| e.is(Kind::Conflict)) && self.core.was_made(inner, &earlier).await? {
            stored = self.core.store(inner).await;
        }
        *self.state.failed.lock() = stored.as_ref().err().map(ToString::to_string);
        match stored {
            Ok(node) => {
                self.committed(inner, &node);
                self.state.show(&self.core, inner);
                Ok(())
            }
            Err(e) if e.is(Kind::Conflict) => Err(self.put_beside(inner, e).await),
            Err(e) => Err(e),
        }
    }

    /// The store has it, as `node`.
    pub(super) fn committed(&self, inner: &mut Inner, node: &Node) {
        let metadata = inner.metadata.clone();
        self.core.known.learn(node, &metadata, true);
        inner.settle(node, metadata);
    }

    /// Somebody else was first: the content goes to a file beside. The error to tell.
    async fn put_beside(&self, inner: &mut Inner, e: Error) -> Error {
        let name = conflict_name(&inner.name);
        let before = (inner.locator.clone(), inner.name.clone(), inner.base.clone());
        let stored = async {
            inner.locator = self.core.objects.child(&inner.dir, &name, false)?;
            let theirs = absent_is_none(self.core.head(&before.0).await)?;
            if inner.draft.needs_base() {
                // Its own base may be gone: what is not changed is taken from what is there now.
                let now = theirs.as_ref().map(|(node, _)| node.clone());
                inner.draft.rebase(now.as_ref().map_or(0, |n| n.attr.size));
                inner.base = now.map(|n| Base { locator: n.locator, version: n.version, mtime: n.attr.mtime });
            } else {
                inner.draft.rebase(0);
                inner.base = None;
            }
            inner.data_dirty = true;
            Ok((self.core.store_at(inner, &Condition::Absent).await?, theirs))
        };
        match stored.await {
            Ok((node, theirs)) => {
                inner.name = name.clone();
                self.committed(inner, &node);
                self.core.moved(&before.0, &self.state, inner);
                match theirs {
                    Some((node, m)) => self.core.names.there(&inner.dir, &before.1, meta::apply(node, &m)),
                    None => self.core.names.gone(&inner.dir, &before.1),
                }
                let text = format!(
                    "somebody else changed the file meanwhile: what was written here is in {}",
                    name.escape_ascii()
                );
                tracing::warn!(key = %before.0.escape_ascii(), "{text}");
                Error::new(Kind::Conflict, text).caused_by(e)
            }
            Err(other) => {
                (inner.locator, inner.name, inner.base) = before;
                tracing::warn!(error = %other, "a file that lost a race could not be put beside");
                other
            }
        }
    }
}

fn conflict_name(name: &Bytes) -> Bytes {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = host.trim();
    let end = format!(".efc-conflict-{host}-{}", meta::now().secs);
    let keep = name.len().min(efc_backend::names::NAME_BYTES_MAX.saturating_sub(end.len()));
    [&name[..keep], end.as_bytes()].concat().into()
}

impl Core {
    /// Looks what became of attempts to bring a file to the store that nobody knows the end of: the object of one is what the draft was made of.
    pub(super) async fn look_for_attempts(&self, inner: &mut Inner) -> Result<()> {
        let attempts = inner.attempts.clone();
        self.was_made(inner, &attempts).await.map(drop)
    }

    async fn was_made(&self, inner: &mut Inner, attempts: &[String]) -> Result<bool> {
        if attempts.is_empty() {
            return Ok(false);
        }
        let Some((node, _)) = self.objects.made_by(&inner.locator, attempts).await? else { return Ok(false) };
        tracing::info!(key = %inner.locator.escape_ascii(), "an earlier attempt had brought a file to the store");
        inner.base = Some(Base { locator: node.locator, version: node.version, mtime: node.attr.mtime });
        Ok(true)
    }

    async fn store(&self, inner: &mut Inner) -> Result<Node> {
        let condition = match &inner.base {
            Some(base) => Condition::Version(base.version.clone()),
            None => inner.condition.clone(),
        };
        self.store_at(inner, &condition).await
    }

    /// One attempt. [`Kind::Conflict`]: the condition did not hold, or the base version is gone.
    async fn store_at(&self, inner: &mut Inner, condition: &Condition) -> Result<Node> {
        let outcome = match inner.base.clone() {
            Some(base) if !inner.data_dirty => {
                let metadata = self.mark(inner);
                self.objects.copy((&base.locator, &base.version), &inner.locator, Some(&metadata), condition).await
            }
            _ if inner.draft.size() <= PUT_BYTES_MAX => {
                self.drop_stream(inner).await;
                let metadata = self.mark(inner);
                self.put(inner, &metadata, condition).await
            }
            _ => self.upload(inner, condition).await,
        };
        let gone = |e: &Error| e.is(Kind::Stale) || e.is(Kind::NotFound);
        outcome.map_err(|e| if gone(&e) { Error::new(Kind::Conflict, "the file was changed").caused_by(e) } else { e })
    }

    /// Metadata for an attempt, of which a successor will know.
    fn mark(&self, inner: &mut Inner) -> Metadata {
        let metadata = inner.marked();
        self.note_now(inner);
        metadata
    }

    async fn put(&self, inner: &Inner, metadata: &Metadata, condition: &Condition) -> Result<Node> {
        let size = inner.draft.size();
        let _room = self.room(size).await?;
        let body = if size > 0 { inner.content(self, 0..size).await? } else { Vec::new() };
        self.objects.put(&inner.locator, body, metadata, condition).await
    }

    async fn upload(&self, inner: &mut Inner, condition: &Condition) -> Result<Node> {
        let mut outcome = self.upload_once(inner, condition).await;
        if outcome.as_ref().is_err_and(|e| e.context("code") == Some("NoSuchUpload")) {
            // Somebody took this mount for dead and swept it.
            outcome = self.upload_once(inner, condition).await;
        }
        let (node, given) = outcome?;
        let wanted = inner.metadata.clone();
        let late = Metadata { mtime: wanted.mtime, ..given.clone() };
        if given.mtime.is_none() && wanted.mtime == inner.changed && late == wanted {
            // Only the time of the last write came after the beginning: the store's own is as good.
            inner.metadata.mtime = None;
        } else if given != wanted {
            let ours = Condition::Version(node.version.clone());
            let metadata = self.mark(inner);
            return self.objects.copy((&node.locator, &node.version), &inner.locator, Some(&metadata), &ours).await;
        }
        Ok(node)
    }

    async fn upload_once(&self, inner: &mut Inner, condition: &Condition) -> Result<(Node, Metadata)> {
        if inner.stream.is_none() {
            let metadata = inner.marked();
            let upload = self.begin(&inner.locator, &metadata).await?;
            inner.stream = Some(Stream::new(upload, inner.metadata.clone()));
        }
        self.note_now(inner);
        let outcome = self.upload_parts(inner, condition).await;
        match &outcome {
            Ok(_) => drop(inner.stream.take().map(|s| self.ended(&s.upload))),
            Err(_) => self.drop_stream(inner).await,
        }
        outcome
    }

    async fn upload_parts(&self, inner: &mut Inner, condition: &Condition) -> Result<(Node, Metadata)> {
        let limits = self.limits().await?;
        let Some(mut upload) = inner.stream.take() else {
            return Err(Error::new(Kind::Io, "no upload was begun"));
        };
        let mut done = Vec::new();
        let mut open = Vec::new();
        let mut failed = None;
        for (number, range) in parts(inner.draft.size()) {
            match upload.part(number).await {
                Ok(Some(part)) => done.push(part),
                Ok(None) => open.push((number, range)),
                Err(e) => failed = Some(e),
            }
        }
        let id = upload.upload.id.clone();
        let given = upload.metadata.clone();
        inner.stream = Some(upload);
        if let Some(e) = failed {
            return Err(e);
        }
        let shared = &*inner;
        let sent = open.into_iter().map(|(number, range)| {
            let compose = limits.compose && (range.end - range.start >= limits.part_bytes_min);
            self.part(shared, &id, number, range, compose)
        });
        let sent: Vec<Part> = stream::iter(sent).buffered(PARTS_AT_ONCE).try_collect().await?;
        done.extend(sent);
        done.sort_by_key(|part| part.number);
        let node = self.objects.complete(&inner.locator, &id, &done, condition).await?;
        Ok((node, given))
    }

    async fn part(
        &self,
        inner: &Inner,
        upload: &efc_backend::objects::UploadId,
        number: u32,
        range: Range<u64>,
        compose: bool,
    ) -> Result<Part> {
        if let Some(base) = inner.base.as_ref().filter(|_| compose && inner.draft.is_base(&range)) {
            let from = (&base.locator, &base.version);
            return self.objects.part_copy(&inner.locator, upload, number, from, range).await;
        }
        let _room = self.room(range.end - range.start).await?;
        let body = inner.content(self, range).await?;
        self.objects.part(&inner.locator, upload, number, body).await
    }
}
