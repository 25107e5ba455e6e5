//! Read-ahead memory: 1 MiB parts of files being streamed, loaded once and shared by every read that needs them.
//!
//! A part holds its bytes from the process budget. When the last byte of a part was served it is dropped at once: the kernel has it in
//! its page cache by then. Parts that nobody came for are dropped oldest first when the budget is needed.

use bytes::Bytes;
use efc_common::id::ContentId;
use efc_common::limit::{ByteBudget, Hold};
use efc_common::{Error, Kind, Result};
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use tokio::sync::{Notify, watch};

/// Bytes of a full part.
pub const PART_BYTES: u64 = 1 << 20;

/// Which part of which content.
pub type PartKey = (ContentId, u32);

/// State of a part's bytes.
#[derive(Debug, Clone)]
enum State {
    Loading,
    Ready(Arc<Vec<Bytes>>),
    Failed(Kind, String),
}

/// One part, loading or loaded.
#[derive(Debug)]
pub struct Part {
    key: PartKey,
    len: u64,
    state: watch::Sender<State>,
    served: AtomicU64,
    _hold: Hold,
}

impl Part {
    /// The part's bytes `range` (relative to its start), once they are there.
    ///
    /// # Errors
    /// The error its load ended with.
    pub async fn read(&self, range: Range<u64>) -> Result<Vec<Bytes>> {
        let mut rx = self.state.subscribe();
        let state = rx.wait_for(|s| !matches!(s, State::Loading)).await;
        match state.map(|s| s.clone()) {
            Ok(State::Ready(pieces)) => Ok(self.slice(&pieces, range)),
            Ok(State::Failed(kind, message)) => Err(Error::new(kind, message)),
            _ => Err(Error::new(Kind::Cancelled, "read-ahead was abandoned")),
        }
    }

    /// The bytes if they are there already.
    pub fn try_read(&self, range: Range<u64>) -> Option<Vec<Bytes>> {
        match &*self.state.borrow() {
            State::Ready(pieces) => Some(self.slice(pieces, range)),
            _ => None,
        }
    }

    fn slice(&self, pieces: &[Bytes], range: Range<u64>) -> Vec<Bytes> {
        self.served.fetch_add(range.end - range.start, Relaxed);
        let mut out = Vec::with_capacity(1);
        let mut at = 0u64;
        for p in pieces {
            let end = at + p.len() as u64;
            let (a, b) = (range.start.max(at), range.end.min(end));
            if a < b {
                out.push(p.slice((a - at) as usize..(b - at) as usize));
            }
            at = end;
        }
        out
    }

    /// The load is done: bytes in order, exactly the part's length.
    pub fn complete(&self, pieces: Vec<Bytes>) {
        debug_assert_eq!(pieces.iter().map(|p| p.len() as u64).sum::<u64>(), self.len);
        self.state.send_replace(State::Ready(Arc::new(pieces)));
    }

    /// The load failed; readers get the error, the next read starts anew.
    pub fn fail(&self, e: &Error) {
        self.state.send_replace(State::Failed(e.kind(), e.to_string()));
    }

    /// Was every byte handed out?
    fn used_up(&self) -> bool {
        self.served.load(Relaxed) >= self.len
    }

    /// Which part it is.
    pub fn key(&self) -> PartKey {
        self.key
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never: a part holds at least one byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[derive(Debug, Default)]
struct Table {
    map: HashMap<PartKey, Arc<Part>>,
    order: VecDeque<PartKey>,
}

/// The parts of the process.
#[derive(Debug)]
pub struct Parts {
    table: Mutex<Table>,
    budget: ByteBudget,
    /// Told when a part was loaded: from then on it can give way.
    loaded: Notify,
}

impl Parts {
    /// An empty table that draws on `budget`.
    pub fn new(budget: ByteBudget) -> Self {
        Parts { table: Mutex::default(), budget, loaded: Notify::new() }
    }

    /// A part that is loading or loaded.
    pub fn get(&self, key: &PartKey) -> Option<Arc<Part>> {
        self.table.lock().map.get(key).cloned()
    }

    /// Enters a new part that the caller now has to load (and `complete` or `fail`). `None`: somebody else entered it, or there is no
    /// budget for it even after old parts were dropped.
    pub fn enter(&self, key: PartKey, len: u64) -> Option<Arc<Part>> {
        let mut table = self.table.lock();
        if table.map.contains_key(&key) {
            return None;
        }
        let hold = loop {
            match self.budget.try_hold(len) {
                Some(hold) => break hold,
                None => {
                    if !table.drop_oldest() {
                        return None;
                    }
                }
            }
        };
        let state = watch::Sender::new(State::Loading);
        let part = Arc::new(Part { key, len, state, served: AtomicU64::new(0), _hold: hold });
        table.map.insert(key, part.clone());
        table.order.push_back(key);
        Some(part)
    }

    /// Budget for bytes that belong to no part. Loaded parts give way, oldest first: a reader waits only while all that is held is in
    /// use or on its way.
    pub async fn hold(&self, len: u64) -> Hold {
        loop {
            // Registered before the look, so that no part that is loaded in between is missed.
            let mut loaded = std::pin::pin!(self.loaded.notified());
            loaded.as_mut().enable();
            loop {
                if let Some(hold) = self.budget.try_hold(len) {
                    return hold;
                }
                if !self.table.lock().drop_oldest() {
                    break;
                }
            }
            tokio::select! {
                hold = self.budget.hold(len) => return hold,
                () = loaded => {}
            }
        }
    }

    /// To be called after a part was completed.
    pub fn loaded(&self) {
        self.loaded.notify_waiters();
    }

    /// To be called after bytes of a part were handed out: drops it when all were, or when its load failed.
    pub fn settle(&self, part: &Arc<Part>) {
        let failed = matches!(*part.state.borrow(), State::Failed(..));
        if failed || part.used_up() {
            self.forget(part);
        }
    }

    /// Drops a part.
    pub fn forget(&self, part: &Arc<Part>) {
        let mut table = self.table.lock();
        if table.map.get(&part.key).is_some_and(|p| Arc::ptr_eq(p, part)) {
            table.map.remove(&part.key);
        }
        // Keys of dropped parts are swept when they come to the front, or here when they pile up.
        if table.order.len() > 64 + 2 * table.map.len() {
            let Table { map, order } = &mut *table;
            order.retain(|k| map.contains_key(k));
        }
    }

    /// Number of parts.
    pub fn len(&self) -> usize {
        self.table.lock().map.len()
    }

    /// No parts?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Table {
    /// Drops the oldest loaded part; false if there is none. Parts being loaded stay: somebody waits for them.
    fn drop_oldest(&mut self) -> bool {
        for _ in 0..self.order.len() {
            let Some(key) = self.order.pop_front() else { return false };
            match self.map.get(&key) {
                Some(p) if matches!(*p.state.borrow(), State::Loading) => self.order.push_back(key),
                Some(_) => {
                    self.map.remove(&key);
                    return true;
                }
                None => {}
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(i: u32) -> PartKey {
        (ContentId::of(&[b"x"]), i)
    }

    #[tokio::test]
    async fn waiters_get_the_bytes_and_a_served_part_goes() {
        let parts = Arc::new(Parts::new(ByteBudget::new(4 << 20)));
        let part = parts.enter(key(0), PART_BYTES).expect("room");
        assert!(parts.enter(key(0), PART_BYTES).is_none(), "loaded once");
        let waiter = tokio::spawn({
            let part = part.clone();
            async move { part.read(100..200).await }
        });
        part.complete(vec![Bytes::from(vec![1u8; 150]), Bytes::from(vec![2u8; PART_BYTES as usize - 150])]);
        let got = waiter.await.expect("task").expect("bytes");
        assert_eq!(got.iter().map(|b| b.len()).collect::<Vec<_>>(), [50, 50]);
        parts.settle(&part);
        assert_eq!(parts.len(), 1);
        part.try_read(0..PART_BYTES).expect("ready");
        parts.settle(&part);
        assert_eq!(parts.len(), 0);
    }

    #[tokio::test]
    async fn a_failed_load_reaches_the_reader_and_is_not_kept() {
        let parts = Parts::new(ByteBudget::new(4 << 20));
        let part = parts.enter(key(0), 10).expect("room");
        part.fail(&Error::new(Kind::Stale, "gone"));
        assert!(part.read(0..1).await.is_err_and(|e| e.is(Kind::Stale)));
        parts.settle(&part);
        assert!(parts.enter(key(0), 10).is_some());
    }

    #[test]
    fn budget_drops_the_oldest_loaded_part_but_none_that_is_loading() {
        let parts = Parts::new(ByteBudget::new(2 << 20));
        let a = parts.enter(key(0), PART_BYTES).expect("first");
        let _b = parts.enter(key(1), PART_BYTES).expect("second");
        drop(a.clone());
        assert!(parts.enter(key(2), PART_BYTES).is_none(), "both are loading");
        a.complete(vec![Bytes::from(vec![0u8; PART_BYTES as usize])]);
        drop(a);
        assert!(parts.enter(key(2), PART_BYTES).is_some());
        assert!(parts.get(&key(0)).is_none() && parts.get(&key(1)).is_some());
    }

    #[tokio::test]
    async fn a_read_without_a_part_gets_room_from_parts_that_nobody_came_for() {
        let parts = Arc::new(Parts::new(ByteBudget::new(2 << 20)));
        let first = parts.enter(key(0), PART_BYTES).expect("first");
        let second = parts.enter(key(1), PART_BYTES).expect("second");
        first.complete(vec![Bytes::from(vec![0u8; PART_BYTES as usize])]);
        drop(first);
        let patience = std::time::Duration::from_secs(10);
        let hold = tokio::time::timeout(patience, parts.hold(PART_BYTES)).await.expect("the loaded part gives way");
        assert!(parts.get(&key(0)).is_none() && parts.get(&key(1)).is_some());

        // Nothing can give way now, until the other part is loaded.
        let waiter = tokio::spawn({
            let parts = parts.clone();
            async move { parts.hold(4096).await.bytes() }
        });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        second.complete(vec![Bytes::from(vec![0u8; PART_BYTES as usize])]);
        drop(second);
        parts.loaded();
        assert_eq!(tokio::time::timeout(patience, waiter).await.expect("room").expect("task"), 4096);
        drop(hold);
    }
}
