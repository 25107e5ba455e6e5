//! From the origin into segments: one range request per flight, cut, summed and stored as it streams.
//!
//! The bytes are kept as the backend's own buffers: waiters are served from them, the store gathers them with one vectored write,
//! and no copy is made in between. A fetch holds its bytes from the process's budget before it asks the origin, so memory is bounded
//! however many clients miss at once.

use crate::flight::{FileVersion, Filled, Flight, Flights, Landing, Piece};
use crate::store::{Inserted, Store};
use bytes::Bytes;
use efc_common::block::segment_len;
use efc_common::checksum::Summer;
use efc_common::limit::{ByteBudget, Hold};
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use futures::StreamExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::timeout;

/// Segments of one fetch that are being stored while the next ones stream in.
const INSERTS_MAX: usize = 4;
/// Segments being written to disk by fetches, because memory did not take them.
const DISK_WRITES_MAX: usize = 16;
/// A fetch waits so long for its turn at the disks. Then they hang: its segment is not cached, and nobody waits again until a write to
/// them has ended.
const DISK_PATIENCE: Duration = Duration::from_secs(5);

/// Fetches segments.
pub(crate) struct Fetcher {
    flights: Arc<Flights>,
    store: Arc<Store>,
    budget: ByteBudget,
    gate: Semaphore,
    /// One write to memory at a time: the file system lets no second one in, and whoever waits here leaves its thread to others.
    memory_write: Semaphore,
    disk_writes: Arc<Semaphore>,
    disks_hang: Arc<AtomicBool>,
    deadline: Duration,
    tasks: TaskGroup,
    /// Range requests made.
    pub(crate) requests: AtomicU64,
    /// Bytes received.
    pub(crate) bytes: AtomicU64,
}

impl Fetcher {
    /// At most `concurrency` range requests at once; each ends within `deadline` of its start.
    pub(crate) fn new(
        store: Arc<Store>,
        budget: ByteBudget,
        concurrency: usize,
        deadline: Duration,
        tasks: TaskGroup,
    ) -> Arc<Self> {
        Arc::new(Fetcher {
            flights: Arc::new(Flights::new(store.clone())),
            store,
            budget,
            gate: Semaphore::new(concurrency.max(1)),
            memory_write: Semaphore::new(1),
            disk_writes: Arc::new(Semaphore::new(DISK_WRITES_MAX)),
            disks_hang: Arc::default(),
            deadline,
            tasks,
            requests: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        })
    }

    pub(crate) fn flights(&self) -> &Arc<Flights> {
        &self.flights
    }

    /// Completes `pieces`, the segments of `file` from `first` on: each is then stored or flying.
    pub(crate) fn complete(self: &Arc<Self>, file: &Arc<FileVersion>, first: u32, pieces: &mut [Option<Piece>]) {
        for (flight, landing) in self.flights.join(file, first, pieces) {
            let me = self.clone();
            self.tasks.spawn(async move { me.run(flight, landing).await });
        }
    }

    async fn run(&self, flight: Arc<Flight>, landing: Landing) {
        let range = flight.range();
        let Ok(_turn) = self.gate.acquire().await else { return };
        let hold = Arc::new(self.budget.hold(range.end - range.start).await);
        let outcome = match timeout(self.deadline, self.stream(&flight, hold)).await {
            Ok(r) => r,
            Err(_) => Err(Error::new(Kind::Timeout, "the origin did not deliver in time")),
        };
        if let Err(e) = &outcome {
            tracing::debug!(error = %e, source = %flight.file.source.id, "fetch failed");
        }
        landing.end(outcome.err());
    }

    async fn stream(&self, flight: &Arc<Flight>, hold: Arc<Hold>) -> Result<()> {
        let file = &flight.file;
        self.requests.fetch_add(1, Relaxed);
        let mut bytes = file.source.backend.read(&file.locator, &file.version, flight.range()).await?;
        let mut cutter = Cutter::default();
        let mut index = flight.segments.start;
        let mut inserts = JoinSet::new();
        while let Some(piece) = bytes.next().await {
            let mut piece = piece?;
            self.bytes.fetch_add(piece.len() as u64, Relaxed);
            while !piece.is_empty() {
                if index == flight.segments.end {
                    return Err(Error::new(Kind::Io, "the origin sent more than it was asked for"));
                }
                let Some((pieces, sums)) = cutter.take(&mut piece, segment_len(file.size, index) as usize) else {
                    break;
                };
                let key = file.key(index);
                let inserted = {
                    let _turn = self.memory_write.acquire().await;
                    self.store.insert_memory(key, &pieces, &sums, file.keep)
                };
                match inserted {
                    Some(Inserted::Stored(segment)) => flight.put(index, Filled::Stored(segment)),
                    // Counted by the store; the waiters have the bytes.
                    Some(Inserted::Bypassed(_)) => {
                        flight.put(index, Filled::Fresh { pieces, sums, hold: hold.clone() })
                    }
                    None => {
                        let fresh = Filled::Fresh { pieces: pieces.clone(), sums: sums.clone(), hold: hold.clone() };
                        flight.put(index, fresh);
                        if inserts.len() >= INSERTS_MAX {
                            inserts.join_next().await;
                        }
                        inserts.spawn(self.insert_disk(flight.clone(), index, pieces, sums));
                    }
                }
                index += 1;
            }
        }
        while inserts.join_next().await.is_some() {}
        if index < flight.segments.end {
            return Err(Error::new(Kind::Unavailable, "the origin ended the file early").with("segment", index));
        }
        Ok(())
    }

    /// Writes a segment to disk, once it is its turn.
    fn insert_disk(
        &self,
        flight: Arc<Flight>,
        index: u32,
        pieces: Arc<[Bytes]>,
        sums: Arc<[u32]>,
    ) -> impl Future<Output = ()> + Send + use<> {
        let (store, turns, hang) = (self.store.clone(), self.disk_writes.clone(), self.disks_hang.clone());
        async move {
            let patience = if hang.load(Relaxed) { Duration::ZERO } else { DISK_PATIENCE };
            let Ok(Ok(turn)) = timeout(patience, turns.acquire_owned()).await else {
                if !hang.swap(true, Relaxed) {
                    tracing::warn!("cache disks hang; what is fetched is not cached until they write again");
                }
                return store.disk_is_behind();
            };
            let write = spawn_blocking(move || {
                let _turn = turn;
                match store.insert_disk(flight.file.key(index), &pieces, &sums, flight.file.keep) {
                    Inserted::Stored(segment) => flight.replace(index, Filled::Stored(segment)),
                    // Counted by the store; the waiters have the bytes.
                    Inserted::Bypassed(_) => {}
                }
                hang.store(false, Relaxed);
            });
            if let Err(e) = write.await {
                tracing::error!(error = %e, "storing a segment failed");
            }
        }
    }
}

/// A segment as it came: its pieces and its granules' checksums.
type Whole = (Arc<[Bytes]>, Arc<[u32]>);

/// Cuts a stream of pieces into segments and sums their granules.
#[derive(Default)]
struct Cutter {
    pieces: Vec<Bytes>,
    have: usize,
    sums: Summer,
}

impl Cutter {
    /// Takes from `piece` what the segment of `len` bytes still needs; the segment when it is whole.
    fn take(&mut self, piece: &mut Bytes, len: usize) -> Option<Whole> {
        let part = piece.split_to(piece.len().min(len - self.have));
        self.sums.update(&part);
        self.have += part.len();
        self.pieces.push(part);
        if self.have < len {
            return None;
        }
        self.have = 0;
        Some((std::mem::take(&mut self.pieces).into(), self.sums.finish().into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use efc_common::checksum::granule_sums;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn segments_come_out_whole_whatever_the_pieces(cuts in proptest::collection::vec(1usize..90_000, 1..40)) {
            let total: usize = cuts.iter().sum();
            let data = Bytes::from((0..total).map(|i| ((i * 31) >> 3) as u8).collect::<Vec<_>>());
            let size = total as u64;
            let mut cutter = Cutter::default();
            let (mut at, mut index, mut got) = (0, 0, Vec::new());
            for n in cuts {
                let mut piece = data.slice(at..at + n);
                at += n;
                while !piece.is_empty() {
                    let Some((pieces, sums)) = cutter.take(&mut piece, segment_len(size, index) as usize) else { break };
                    let whole = pieces.concat();
                    prop_assert_eq!(whole.len(), segment_len(size, index) as usize);
                    prop_assert_eq!(sums.to_vec(), granule_sums(&whole));
                    got.extend(whole);
                    index += 1;
                }
            }
            prop_assert_eq!(got, data.to_vec());
        }
    }
}
