//! One fetch per segment at a time, with any number of waiters.
//!
//! A [`Flight`] is one range request at the origin for a run of neighbouring segments of one content. The service joins it; the
//! fetcher ([`crate::fetch`]) moves it on. What must stay true:
//! - Whoever misses a segment finds the flight that brings it, or finds it stored, or starts the flight: the three are decided under
//!   one lock, and a flight leaves the table only after its segments were offered to the store.
//! - A waiter that goes away does not end the flight. A flight that fails gives all its waiters the error, and the next ask
//!   starts anew.

use crate::source::Source;
use crate::store::{InsertOptions, Segment, Store};
use bytes::Bytes;
use efc_common::block::{segment_len, segment_range};
use efc_common::id::{ContentId, SegmentKey};
use efc_common::limit::Hold;
use efc_common::metrics::{Counter, counter};
use efc_common::{Error, Kind, Result};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::watch;

/// One version of one file at its source.
pub(crate) struct FileVersion {
    pub(crate) source: Arc<Source>,
    pub(crate) locator: Bytes,
    pub(crate) version: Bytes,
    pub(crate) size: u64,
    /// Under which it is cached. The size is part of it: a client that lies about the size finds and fills only its own lie.
    pub(crate) content: ContentId,
    /// How it is stored.
    pub(crate) keep: InsertOptions,
}

impl FileVersion {
    pub(crate) fn new(source: Arc<Source>, locator: Bytes, version: Bytes, size: u64) -> Self {
        let content = ContentId::of(&[&source.id.0, &locator, &version, &size.to_le_bytes()]);
        FileVersion { source, locator, version, size, content, keep: InsertOptions::default() }
    }

    pub(crate) fn key(&self, index: u32) -> SegmentKey {
        SegmentKey { content: self.content, index }
    }
}

/// A segment that a flight brought.
#[derive(Clone)]
pub(crate) enum Filled {
    /// As it came from the origin; counted in the process's budget as long as somebody has it.
    Fresh { pieces: Arc<[Bytes]>, sums: Arc<[u32]>, hold: Arc<Hold> },
    /// Stored meanwhile.
    Stored(Segment),
}

/// How far a flight is.
#[derive(Debug, Clone, Copy, Default)]
struct Progress {
    ready: u32,
    ended: bool,
}

#[derive(Default)]
struct State {
    filled: Vec<Option<Filled>>,
    error: Option<Error>,
}

/// One fetch under way.
pub(crate) struct Flight {
    pub(crate) file: Arc<FileVersion>,
    /// Indexes of its segments.
    pub(crate) segments: Range<u32>,
    state: Mutex<State>,
    progress: watch::Sender<Progress>,
}

impl Flight {
    fn new(file: Arc<FileVersion>, segments: Range<u32>) -> Arc<Self> {
        let state = State { filled: vec![None; segments.len()], error: None };
        Arc::new(Flight { file, segments, state: Mutex::new(state), progress: watch::Sender::default() })
    }

    /// The bytes of the file it fetches.
    pub(crate) fn range(&self) -> Range<u64> {
        let first = segment_range(self.file.size, self.segments.start);
        first.start..segment_range(self.file.size, self.segments.end - 1).end
    }

    /// Waits for segment `index`.
    pub(crate) async fn ready(&self, index: u32) -> Result<()> {
        let at = index - self.segments.start;
        // The sender lives as long as `self`, so this cannot fail.
        let _ = self.progress.subscribe().wait_for(|p| p.ready > at || p.ended).await;
        self.get(index).map(|_| ())
    }

    /// Waits until all is stored that can be.
    pub(crate) async fn ended(&self) -> Result<()> {
        let _ = self.progress.subscribe().wait_for(|p| p.ended).await;
        self.state.lock().error.as_ref().map_or(Ok(()), |e| Err(e.share()))
    }

    pub(crate) fn is_ready(&self, index: u32) -> bool {
        self.progress.borrow().ready > index - self.segments.start
    }

    /// A segment that is ready.
    pub(crate) fn get(&self, index: u32) -> Result<Filled> {
        let s = self.state.lock();
        match (&s.filled[(index - self.segments.start) as usize], &s.error) {
            (Some(f), _) => Ok(f.clone()),
            (None, Some(e)) => Err(e.share()),
            (None, None) => Err(Error::new(Kind::Cancelled, "fetch was given up")),
        }
    }

    /// The next segment is there. In order.
    pub(crate) fn put(&self, index: u32, filled: Filled) {
        self.replace(index, filled);
        self.progress.send_modify(|p| p.ready = index - self.segments.start + 1);
    }

    /// The segment is stored: its bytes need not stay here.
    pub(crate) fn replace(&self, index: u32, filled: Filled) {
        self.state.lock().filled[(index - self.segments.start) as usize] = Some(filled);
    }
}

/// A segment that a request needs.
#[derive(Clone)]
pub(crate) enum Piece {
    /// In a tier.
    Stored(Segment),
    /// On its way. `started`: by this request.
    Flying { flight: Arc<Flight>, started: bool },
}

/// All flights of the process.
pub(crate) struct Flights {
    store: Arc<Store>,
    flying: Mutex<HashMap<SegmentKey, Arc<Flight>>>,
    joined: Counter,
}

impl Flights {
    pub(crate) fn new(store: Arc<Store>) -> Self {
        Flights { store, flying: Mutex::default(), joined: counter!("efc_flight_waiters_total") }
    }

    /// Finds `index` of the file in the store. An entry whose length does not fit is not believed.
    pub(crate) fn stored(&self, file: &FileVersion, index: u32) -> Option<Segment> {
        let found = self.store.get(&file.key(index))?;
        (found.len() == segment_len(file.size, index)).then_some(found)
    }

    /// Completes `pieces`, the segments from `first` on: what is missing is joined or started. Returns the flights that the caller
    /// must set off, each with its [`Landing`].
    pub(crate) fn join(
        self: &Arc<Self>,
        file: &Arc<FileVersion>,
        first: u32,
        pieces: &mut [Option<Piece>],
    ) -> Vec<(Arc<Flight>, Landing)> {
        let mut new = Vec::new();
        let mut flying = self.flying.lock();
        let mut run: Option<Range<u32>> = None;
        for (index, piece) in (first..).zip(pieces.iter_mut()) {
            if piece.is_none() {
                let key = file.key(index);
                if let Some(flight) = flying.get(&key) {
                    self.joined.increment(1);
                    *piece = Some(Piece::Flying { flight: flight.clone(), started: false });
                } else if self.store.contains(&key) {
                    // Stored between the caller's look and ours.
                    *piece = self.stored(file, index).map(Piece::Stored);
                }
            }
            match (&mut run, piece.is_none()) {
                (Some(r), true) => r.end = index + 1,
                (None, true) => run = Some(index..index + 1),
                (Some(_), false) => new.extend(run.take().map(|r| Flight::new(file.clone(), r))),
                (None, false) => {}
            }
        }
        new.extend(run.map(|r| Flight::new(file.clone(), r)));
        for flight in &new {
            for index in flight.segments.clone() {
                flying.insert(file.key(index), flight.clone());
                pieces[(index - first) as usize] = Some(Piece::Flying { flight: flight.clone(), started: true });
            }
        }
        drop(flying);
        new.into_iter().map(|f| (f.clone(), Landing { flights: self.clone(), flight: f })).collect()
    }
}

/// The duty to end a flight: whatever becomes of the fetch, its waiters hear of it and the next ask can start anew.
pub(crate) struct Landing {
    flights: Arc<Flights>,
    flight: Arc<Flight>,
}

impl Landing {
    /// Ends it, with the error if it failed.
    pub(crate) fn end(self, error: Option<Error>) {
        self.flight.state.lock().error = error;
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        let mut flying = self.flights.flying.lock();
        for index in self.flight.segments.clone() {
            flying.remove(&self.flight.file.key(index));
        }
        drop(flying);
        self.flight.progress.send_modify(|p| p.ended = true);
    }
}
