//! What a successor of this process has to know of files that the store does not have yet: each is written down as it changes ([`crate::journal`]), and where its bytes wait is in
//! the hands of the holder.
//!
//! The bytes are there before what says so. The other way round they go only when it is written that nobody needs them.

use super::draft::Draft;
use super::file::{Base, Inner};
use super::staging::{Place, Staging};
use super::{Core, meta};
use crate::journal::{self, Journal};
use efc_backend::objects::{Condition, Metadata};
use efc_common::node::Time;
use efc_common::{Error, Kind, Result};
use efc_proto::state::{self, draft::condition};
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// Gives the file of this number in which a draft is staged to whoever holds such, or takes it back.
pub(crate) type KeepFile = Box<dyn Fn(u64, Option<BorrowedFd<'_>>) -> Result<()> + Send + Sync>;

/// As written last: without its extents, and these.
struct Written {
    draft: state::Draft,
    map: Draft,
}

#[derive(Default)]
struct All {
    drafts: HashMap<u64, Written>,
    /// Those of which somebody holds a file.
    files: HashSet<u64>,
}

/// All files that are written down.
pub struct Kept {
    journal: Arc<Journal>,
    keep_file: KeepFile,
    all: Mutex<All>,
}

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kept").finish_non_exhaustive()
    }
}

impl Kept {
    /// Writes into `journal`. What a predecessor wrote is there already.
    pub fn new(journal: Arc<Journal>, keep_file: KeepFile) -> Kept {
        Kept { journal, keep_file, all: Mutex::default() }
    }

    /// Everything that is written down.
    pub fn checkpoint(&self) -> Vec<state::Draft> {
        self.all.lock().drafts.values().map(Written::whole).collect()
    }

    /// A file is this now.
    pub(super) fn note(&self, inner: &Inner) {
        let written = Written { draft: head(inner), map: inner.draft.clone() };
        let _changing = self.journal.changing();
        let mut all = self.all.lock();
        self.journal.draft(&written.whole());
        all.drafts.insert(inner.number, written);
    }

    /// A file is what a predecessor wrote down.
    pub(super) fn inherit(&self, inner: &Inner) {
        let mut all = self.all.lock();
        all.drafts.insert(inner.number, Written { draft: head(inner), map: inner.draft.clone() });
        if inner.staging.has_file() {
            all.files.insert(inner.number);
        }
    }

    /// Bytes of it were written. False if more than that has to be noted.
    pub(super) fn wrote(&self, inner: &Inner, range: &Range<u64>) -> bool {
        let Some(time) = inner.changed else { return false };
        let _changing = self.journal.changing();
        let mut all = self.all.lock();
        let slot = inner.staging.slot();
        let Some(written) = all.drafts.get_mut(&inner.number).filter(|w| w.draft.slot == slot) else { return false };
        self.journal.wrote(inner.number, range, time);
        journal::written(&mut written.draft, range, time);
        written.draft.extents.clear();
        written.map.write(range.clone());
        true
    }

    /// Its bytes are in a file now: when this returns nobody looks for them in memory.
    ///
    /// # Errors
    /// When nobody takes it.
    pub(super) fn moved(&self, number: u64, file: BorrowedFd<'_>) -> Result<()> {
        (self.keep_file)(number, Some(file))?;
        {
            let _changing = self.journal.changing();
            let mut all = self.all.lock();
            all.files.insert(number);
            if let Some(written) = all.drafts.get_mut(&number) {
                written.draft.slot = None;
                self.journal.draft(&written.whole());
            }
        }
        self.commit();
        Ok(())
    }

    /// The store has all of it, or nobody needs it: when this returns its bytes may go.
    pub(super) fn settled(&self, number: u64) {
        let (was_noted, has_file) = {
            let _changing = self.journal.changing();
            let mut all = self.all.lock();
            let was_noted = all.drafts.remove(&number).is_some();
            if was_noted {
                self.journal.settled(number);
            }
            (was_noted, all.files.remove(&number))
        };
        if was_noted {
            self.commit();
        }
        if has_file && let Err(e) = (self.keep_file)(number, None) {
            tracing::warn!(number, error = %e, "a staged file stays open in the holder");
        }
    }

    /// What a predecessor wrote down of it cannot be had.
    pub(super) fn lost(&self, number: u64) {
        self.journal.settled(number);
        if let Err(e) = (self.keep_file)(number, None) {
            tracing::warn!(number, error = %e, "a staged file stays open in the holder");
        }
    }

    /// What was noted is there for a successor.
    pub(super) fn commit(&self) {
        if let Err(e) = self.journal.commit() {
            tracing::error!(error = %e, "the journal cannot be written; after a crash of this process the mount would not go on");
        }
    }
}

impl Written {
    fn whole(&self) -> state::Draft {
        let extents = self.map.extents().flat_map(|(start, end)| [start, end]).collect();
        state::Draft { extents, size: self.map.size(), base_len: self.map.base_len(), ..self.draft.clone() }
    }
}

impl Inner {
    /// As a predecessor wrote it down; `place`: where it has staged it.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] for what none wrote, or where the bytes are gone.
    pub(super) fn inherited(core: &Core, draft: &state::Draft, place: Option<Place>) -> Result<Inner> {
        let map = map(draft)?;
        let staged: u64 = map.extents().map(|(start, end)| end - start).sum();
        let end = map.extents().last().map_or(0, |(_, end)| end);
        let number = draft.number;
        let staging = match place {
            Some(place) => Staging::inherited(core.space.clone(), number, place, staged, end),
            None if end == 0 => Staging::new(core.space.clone(), number),
            None => return Err(Error::new(Kind::Corrupt, "what was staged is gone")),
        };
        let inner = Inner {
            number,
            locator: draft.locator.clone(),
            dir: draft.dir.clone(),
            name: draft.name.clone(),
            loaded: true,
            base: base(draft),
            condition: condition(draft),
            metadata: metadata(draft),
            changed: time(draft.changed),
            draft: map,
            staging,
            data_dirty: draft.data_dirty,
            meta_dirty: draft.meta_dirty,
            stream: None,
            attempts: draft.attempts.clone(),
            removed: draft.removed,
            edition: meta::edition(),
        };
        if let Some(kept) = core.space.kept() {
            kept.inherit(&inner);
        }
        Ok(inner)
    }
}

/// Everything of a file but which bytes are staged.
fn head(inner: &Inner) -> state::Draft {
    let base = inner.base.as_ref().map(|b| state::draft::Base {
        locator: b.locator.clone(),
        version: b.version.clone(),
        mtime: Some(wire_time(b.mtime)),
    });
    let what = match &inner.condition {
        Condition::Any => None,
        Condition::Absent => Some(condition::What::Absent(true)),
        Condition::Version(version) => Some(condition::What::Version(version.clone())),
    };
    state::Draft {
        number: inner.number,
        locator: inner.locator.clone(),
        dir: inner.dir.clone(),
        name: inner.name.clone(),
        base,
        condition: Some(state::draft::Condition { what }),
        metadata: Some(wire_metadata(&inner.metadata)),
        changed: inner.changed.map(wire_time),
        data_dirty: inner.data_dirty,
        meta_dirty: inner.meta_dirty,
        removed: inner.removed,
        attempts: inner.attempts.clone(),
        slot: inner.staging.slot(),
        ..state::Draft::default()
    }
}

/// The object a draft was made of.
fn base(draft: &state::Draft) -> Option<Base> {
    let b = draft.base.as_ref()?;
    Some(Base { locator: b.locator.clone(), version: b.version.clone(), mtime: time(b.mtime).unwrap_or_default() })
}

/// What its first object must find.
fn condition(draft: &state::Draft) -> Condition {
    match draft.condition.as_ref().and_then(|c| c.what.clone()) {
        None => Condition::Any,
        Some(condition::What::Absent(_)) => Condition::Absent,
        Some(condition::What::Version(version)) => Condition::Version(version),
    }
}

/// Which of its bytes are staged.
///
/// # Errors
/// [`Kind::Corrupt`] for what no process wrote.
fn map(draft: &state::Draft) -> Result<Draft> {
    let mut map = Draft::new(draft.base_len);
    map.truncate(draft.size);
    for pair in draft.extents.chunks(2) {
        let &[start, end] = pair else { return Err(Error::new(Kind::Corrupt, "half an extent")) };
        if start >= end || end > draft.size {
            return Err(Error::new(Kind::Corrupt, "an impossible extent"));
        }
        map.write(start..end);
    }
    Ok(map)
}

/// Its metadata.
fn metadata(draft: &state::Draft) -> Metadata {
    let m = draft.metadata.clone().unwrap_or_default();
    Metadata {
        mode: m.mode,
        uid: m.uid,
        gid: m.gid,
        mtime: time(m.mtime),
        atime: time(m.atime),
        ctime: time(m.ctime),
        content_type: m.content_type,
        other: m.other.into_iter().collect(),
        headers: m.headers.into_iter().collect(),
    }
}

fn wire_metadata(m: &Metadata) -> state::Metadata {
    state::Metadata {
        mode: m.mode,
        uid: m.uid,
        gid: m.gid,
        mtime: m.mtime.map(wire_time),
        atime: m.atime.map(wire_time),
        ctime: m.ctime.map(wire_time),
        content_type: m.content_type.clone(),
        other: m.other.clone().into_iter().collect(),
        headers: m.headers.clone().into_iter().collect(),
    }
}

fn wire_time(t: Time) -> state::Time {
    state::Time { secs: t.secs, nanos: t.nanos }
}

/// A time as it was written down.
fn time(t: Option<state::Time>) -> Option<Time> {
    t.map(|t| Time { secs: t.secs, nanos: t.nanos })
}
