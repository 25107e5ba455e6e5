//! Where segments are in the memory of workers on this host: a read of a segment that was read before needs no message at all.
//!
//! Bounded by entries; an entry is right or its seal is broken, so nothing here has to be kept fresh. Readers tell the worker what they
//! read, once a second, so that its eviction policy and its counters know.

use crate::wire::Connection;
use bytes::Bytes;
use efc_common::block::{SEGMENT_BYTES, segments};
use efc_common::id::ContentId;
use efc_proto::data;
use moka::sync::Cache;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// How often workers are told what was read.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// Segments read since then that are told of; more are not counted as hits.
const TOUCHED_MAX: usize = 4096;

/// A segment in the memory that `conn` shares.
struct Known {
    conn: Weak<Connection>,
    place: data::Place,
    /// Bytes read that the worker was not told of.
    untold: AtomicU64,
}

/// See the module's text.
pub(super) struct Places {
    known: Cache<(ContentId, u32), Arc<Known>>,
    touched: Mutex<Vec<Arc<Known>>>,
}

impl Places {
    /// At most `entries` segments are known.
    pub(super) fn new(entries: u64) -> Self {
        Places { known: Cache::new(entries), touched: Mutex::default() }
    }

    /// Remembers the segments of `content` that begin with the one around `offset`.
    pub(super) fn remember(&self, content: ContentId, offset: u64, places: &[data::Place], conn: &Arc<Connection>) {
        let first = (offset / SEGMENT_BYTES as u64) as u32;
        for (index, place) in (first..).zip(places) {
            let known = Known { conn: Arc::downgrade(conn), place: place.clone(), untold: AtomicU64::new(0) };
            self.known.insert((content, index), Arc::new(known));
        }
    }

    /// The bytes of `range`, if all of its segments are known and still there.
    pub(super) fn read(&self, content: ContentId, range: &Range<u64>) -> Option<Vec<Bytes>> {
        let mut pieces = Vec::with_capacity(1);
        for index in segments(range.clone()) {
            let known = self.known.get(&(content, index))?;
            let start = index as u64 * SEGMENT_BYTES as u64;
            let part = range.start.max(start) - start..range.end.min(start + SEGMENT_BYTES as u64) - start;
            let Some(bytes) = known.read(part.start as u32..part.end as u32) else {
                self.known.invalidate(&(content, index));
                return None;
            };
            pieces.push(bytes);
            if known.untold.fetch_add(part.end - part.start, Relaxed) == 0 {
                let mut touched = self.touched.lock();
                if touched.len() < TOUCHED_MAX {
                    touched.push(known);
                } else {
                    // Not told of this time, but it must be after its next read.
                    known.untold.store(0, Relaxed);
                }
            }
        }
        Some(pieces)
    }

    /// Tells the workers what was read, again and again.
    pub(super) async fn tell(self: Arc<Self>) {
        loop {
            tokio::time::sleep(TELL_EVERY).await;
            let mut of: HashMap<*const Connection, (Arc<Connection>, Vec<data::Touch>)> = HashMap::new();
            for known in std::mem::take(&mut *self.touched.lock()) {
                let touch =
                    data::Touch { at: known.place.at, seal: known.place.seal, bytes: known.untold.swap(0, Relaxed) };
                if let Some(conn) = known.conn.upgrade() {
                    of.entry(Arc::as_ptr(&conn)).or_insert_with(|| (conn, Vec::new())).1.push(touch);
                }
            }
            for (conn, touches) in of.into_values() {
                // A connection that breaks now is a worker that needs no counts of ours.
                let _ = conn.tell(data::Touched { touches });
            }
        }
    }
}

impl Known {
    fn read(&self, part: Range<u32>) -> Option<Bytes> {
        let conn = self.conn.upgrade()?;
        let mut out = Vec::new();
        let len = part.len();
        // A checksum that does not match is the worker's to find out, when it is asked the usual way.
        let at = conn.shared()?.read(&self.place, part, &mut out).ok()??;
        Some(Bytes::from(out).slice(at..at + len))
    }
}
