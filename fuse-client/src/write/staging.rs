//! Where bytes wait that the store does not have yet: small files in memory, larger ones in an unlinked sparse file of the staging directory.
//!
//! Both are bounded for the whole mount. Memory that is spent sends a file to disk; disk that is spent is ENOSPC, and then the file goes to the store before its time. What is
//! staged outlives the process where somebody holds it (`kept`), and never the node: a file is at the store when `close(2)` or `fsync(2)` has said so.
//!
//! The memory is one sparse file in memory (memfd) of slots of 1 MiB, a file of the mount in each. It is read and written by system calls: a copy is made in any case.
//!
//! What was written last, in order, is also kept as it came, as long as memory is not scarce: who uploads behind the writer sends these very bytes.

use super::kept::Kept;
use bytes::Bytes;
use efc_common::{Error, Kind, Result};
use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};
use std::collections::{HashSet, VecDeque};
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

/// Files up to this length may stay in memory, bytes.
const MEMORY_FILE_MAX: u64 = 1 << 20;
/// Of a file on disk at most so many bytes are kept as they came: two parts of an upload.
const RECENT_BYTES_MAX: u64 = 16 << 20;

/// Room for all staged bytes of a mount.
#[derive(Debug)]
pub struct Space {
    dir: PathBuf,
    memory: Quota,
    disk: Quota,
    slots: Slots,
    /// Who is told of what is staged.
    kept: OnceLock<Arc<Kept>>,
}

/// The memory.
#[derive(Debug)]
struct Slots {
    file: File,
    free: Mutex<FreeSlots>,
}

#[derive(Debug, Default)]
struct FreeSlots {
    /// From here on none was ever used.
    next: u32,
    free: Vec<u32>,
}

impl Slots {
    fn new() -> Result<Slots> {
        let file = memfd_create("efc-drafts", MemfdFlags::CLOEXEC).map_err(std::io::Error::from)?;
        Ok(Slots { file: file.into(), free: Mutex::default() })
    }

    /// Those of a predecessor, of which some are in use.
    fn inherited(file: File, used: &HashSet<u32>) -> Result<Slots> {
        let next = used.iter().max().map_or(0, |last| last + 1);
        file.set_len(at(next))?;
        let slots = Slots { file, free: Mutex::new(FreeSlots { next, free: Vec::new() }) };
        (0..next).filter(|n| !used.contains(n)).for_each(|n| slots.give(n));
        Ok(slots)
    }

    fn take(&self) -> u32 {
        let mut free = self.free.lock();
        free.free.pop().unwrap_or_else(|| {
            free.next += 1;
            free.next - 1
        })
    }

    fn give(&self, slot: u32) {
        // What is left there costs memory, and is never read.
        if let Err(e) =
            fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at(slot), MEMORY_FILE_MAX)
        {
            tracing::debug!(error = %e, "memory of a draft is not given back");
        }
        self.free.lock().free.push(slot);
    }
}

/// Where a slot lies.
fn at(slot: u32) -> u64 {
    u64::from(slot) * MEMORY_FILE_MAX
}

#[derive(Debug)]
struct Quota {
    used: AtomicU64,
    total: AtomicU64,
}

impl Quota {
    fn take(&self, bytes: u64) -> bool {
        let fits = |used: u64| used.checked_add(bytes).filter(|n| *n <= self.total.load(Relaxed));
        self.used.fetch_update(Relaxed, Relaxed, fits).is_ok()
    }

    fn give(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Relaxed);
    }
}

impl Space {
    /// At most `memory` bytes in memory and `disk` bytes in `dir`, which is made when it is needed.
    ///
    /// # Errors
    /// Want of memory or descriptors.
    pub fn new(dir: PathBuf, memory: u64, disk: u64) -> Result<Arc<Space>> {
        Ok(Arc::new(Space::with(dir, memory, disk, Slots::new()?)))
    }

    /// The same, with the memory of a predecessor, of which the slots `used` hold something.
    ///
    /// # Errors
    /// When it is none.
    pub fn inherited(dir: PathBuf, memory: u64, disk: u64, file: File, used: &HashSet<u32>) -> Result<Arc<Space>> {
        Ok(Arc::new(Space::with(dir, memory, disk, Slots::inherited(file, used)?)))
    }

    fn with(dir: PathBuf, memory: u64, disk: u64, slots: Slots) -> Space {
        let quota = |total| Quota { used: AtomicU64::new(0), total: AtomicU64::new(total) };
        Space { dir, memory: quota(memory), disk: quota(disk), slots, kept: OnceLock::new() }
    }

    /// From now on at most `memory` bytes in memory and `disk` bytes on disk. What is there already stays as long as it must.
    pub fn resize(&self, memory: u64, disk: u64) {
        self.memory.total.store(memory, Relaxed);
        self.disk.total.store(disk, Relaxed);
    }

    /// The memory, for a successor.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.slots.file.as_fd()
    }

    /// From now on `kept` is told of what is staged.
    pub(super) fn tell(&self, kept: Arc<Kept>) {
        // Once, when the mount begins.
        let _ = self.kept.set(kept);
    }

    /// Who is told of what is staged.
    pub(super) fn kept(&self) -> Option<&Arc<Kept>> {
        self.kept.get()
    }

    /// Is half of the memory taken?
    pub(super) fn is_scarce(&self) -> bool {
        self.memory.used.load(Relaxed) > self.memory.total.load(Relaxed) / 2
    }

    fn file(&self) -> Result<File> {
        let make = || {
            std::fs::create_dir_all(&self.dir)?;
            let path = self.dir.join(format!("draft-{:016x}", rand::random::<u64>()));
            let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
            std::fs::remove_file(&path)?;
            Ok::<_, std::io::Error>(file)
        };
        make().map_err(|e| Error::from(e).with("staging", self.dir.display()))
    }
}

enum Store {
    /// Nothing is staged.
    None,
    /// In this slot, up to there.
    Memory(u32, u64),
    File(Arc<File>),
}

/// What was written last, without a gap: a copy of what is in the file.
#[derive(Default)]
struct Recent {
    start: u64,
    end: u64,
    pieces: VecDeque<Bytes>,
}

impl Recent {
    fn forget(&mut self, space: &Space) {
        space.memory.give(self.end - self.start);
        *self = Recent::default();
    }

    /// Keeps `data`, which was written at `offset`.
    fn add(&mut self, space: &Space, offset: u64, data: Bytes) {
        let len = data.len() as u64;
        if offset != self.end {
            self.forget(space);
            (self.start, self.end) = (offset, offset);
        }
        while !self.pieces.is_empty() && self.end - self.start + len > RECENT_BYTES_MAX {
            self.forget_first(space);
        }
        if len > RECENT_BYTES_MAX || space.is_scarce() || !space.memory.take(len) {
            return self.forget(space);
        }
        self.end += len;
        self.pieces.push_back(data);
    }

    fn forget_first(&mut self, space: &Space) {
        let len = self.pieces.pop_front().map_or(0, |p| p.len() as u64);
        self.start += len;
        space.memory.give(len);
    }

    /// The bytes of `range`, if all of them are here.
    fn get(&self, range: &Range<u64>) -> Option<Vec<Bytes>> {
        if range.start < self.start || range.end > self.end {
            return None;
        }
        let mut at = self.start;
        let mut out = Vec::new();
        for piece in &self.pieces {
            let (from, to) = (range.start.max(at), range.end.min(at + piece.len() as u64));
            if from < to {
                out.push(piece.slice((from - at) as usize..(to - at) as usize));
            }
            at += piece.len() as u64;
        }
        Some(out)
    }
}

/// The staged bytes of one file, each at its place.
pub(super) struct Staging {
    space: Arc<Space>,
    /// The file's number.
    number: u64,
    store: Store,
    held: u64,
    recent: Recent,
}

impl Staging {
    /// Nothing is staged.
    pub(super) fn new(space: Arc<Space>, number: u64) -> Staging {
        Staging { space, number, store: Store::None, held: 0, recent: Recent::default() }
    }

    /// What a predecessor has staged: `bytes`, up to `end`.
    pub(super) fn inherited(space: Arc<Space>, number: u64, place: Place, bytes: u64, end: u64) -> Staging {
        let (quota, store, held) = match place {
            Place::Slot(slot) => (&space.memory, Store::Memory(slot, end), end),
            Place::File(file) => (&space.disk, Store::File(Arc::new(file.into())), bytes),
        };
        // It is there, whatever was granted.
        quota.used.fetch_add(held, Relaxed);
        Staging { space, number, store, held, recent: Recent::default() }
    }

    /// Where in memory it is.
    pub(super) fn slot(&self) -> Option<u32> {
        if let Store::Memory(slot, _) = self.store { Some(slot) } else { None }
    }

    /// Is it in a file?
    pub(super) fn has_file(&self) -> bool {
        matches!(self.store, Store::File(_))
    }

    /// Stages `data` at `offset`; `grown` bytes of it were not staged before.
    pub(super) async fn write(&mut self, offset: u64, data: Bytes, grown: u64) -> Result<()> {
        self.room(offset + data.len() as u64, grown).await?;
        match &self.store {
            Store::None => Ok(()),
            Store::Memory(slot, _) => Ok(self.space.slots.file.write_all_at(&data, at(*slot) + offset)?),
            Store::File(file) => {
                if offset != self.recent.end {
                    self.recent.forget(&self.space);
                }
                let (file, copy) = (file.clone(), data.clone());
                blocking(move || file.write_all_at(&copy, offset)).await?;
                self.recent.add(&self.space, offset, data);
                Ok(())
            }
        }
    }

    /// Stages zeros.
    pub(super) async fn zero(&mut self, range: Range<u64>, grown: u64) -> Result<()> {
        self.room(range.end, grown).await?;
        self.recent.forget(&self.space);
        match &self.store {
            Store::None => Ok(()),
            Store::Memory(slot, _) => {
                Ok(zero_file(&self.space.slots.file, at(*slot) + range.start..at(*slot) + range.end)?)
            }
            Store::File(file) => {
                let file = file.clone();
                blocking(move || zero_file(&file, range)).await
            }
        }
    }

    /// Staged bytes, in as many pieces as they are at hand in.
    pub(super) async fn pieces(&self, range: Range<u64>) -> Result<Vec<Bytes>> {
        match self.recent.get(&range) {
            Some(pieces) => Ok(pieces),
            None => Ok(vec![self.read(range).await?]),
        }
    }

    async fn read(&self, range: Range<u64>) -> Result<Bytes> {
        match &self.store {
            Store::Memory(slot, end) if range.end <= *end => {
                Ok(read_whole(&self.space.slots.file, at(*slot) + range.start..at(*slot) + range.end)?)
            }
            Store::None | Store::Memory(..) => Err(Error::new(Kind::Corrupt, "not staged")),
            Store::File(file) => {
                let file = file.clone();
                blocking(move || read_whole(&file, range)).await
            }
        }
    }

    /// `freed` bytes are no longer staged.
    pub(super) fn free(&mut self, freed: u64) {
        self.recent.forget(&self.space);
        if let Store::File(_) = self.store {
            let freed = freed.min(self.held);
            self.space.disk.give(freed);
            self.held -= freed;
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.recent.forget(&self.space);
        if let Some(kept) = self.space.kept() {
            kept.settled(self.number);
        }
        match std::mem::replace(&mut self.store, Store::None) {
            Store::None => {}
            Store::Memory(slot, _) => self.give(slot),
            Store::File(_) => self.space.disk.give(self.held),
        }
        self.held = 0;
    }

    /// Gives its memory back.
    fn give(&self, slot: u32) {
        self.space.memory.give(self.held);
        self.space.slots.give(slot);
    }

    async fn room(&mut self, end: u64, grown: u64) -> Result<()> {
        if !self.has_file() {
            let have = if let Store::Memory(_, end) = self.store { end } else { 0 };
            let more = end.saturating_sub(have);
            if end <= MEMORY_FILE_MAX && self.space.memory.take(more) {
                let slot = self.slot().unwrap_or_else(|| self.space.slots.take());
                self.store = Store::Memory(slot, have + more);
                self.held += more;
                return Ok(());
            }
            self.move_to_disk().await?;
        }
        if !self.space.disk.take(grown) {
            let text = "the staging directory holds as much as staging_size allows: close files, or raise it";
            return Err(Error::new(Kind::NoSpace, text));
        }
        self.held += grown;
        Ok(())
    }

    async fn move_to_disk(&mut self) -> Result<()> {
        let (slot, bytes) = match self.store {
            Store::Memory(slot, end) => (Some(slot), end),
            Store::None => (None, 0),
            Store::File(_) => return Ok(()),
        };
        if !self.space.disk.take(bytes) {
            return Err(Error::new(Kind::NoSpace, "the staging directory holds as much as staging_size allows"));
        }
        let (space, number) = (self.space.clone(), self.number);
        let moved = blocking(move || {
            let file = space.file().map_err(std::io::Error::other)?;
            if let Some(slot) = slot {
                file.write_all_at(&read_whole(&space.slots.file, at(slot)..at(slot) + bytes)?, 0)?;
            }
            if let Some(kept) = space.kept() {
                kept.moved(number, file.as_fd()).map_err(std::io::Error::other)?;
            }
            Ok(file)
        });
        match moved.await {
            Ok(file) => {
                if let Some(slot) = slot {
                    self.give(slot);
                }
                self.held = bytes;
                self.store = Store::File(Arc::new(file));
                Ok(())
            }
            Err(e) => {
                self.space.disk.give(bytes);
                Err(Error::new(Kind::Io, "a file cannot be staged on disk").caused_by(e))
            }
        }
    }
}

/// Where a predecessor has staged a file.
pub(super) enum Place {
    /// In memory.
    Slot(u32),
    /// On disk.
    File(OwnedFd),
}

/// All of a range; what is behind the end of a sparse file are zeros.
fn read_whole(file: &File, range: Range<u64>) -> std::io::Result<Bytes> {
    let mut data = vec![0; (range.end - range.start) as usize];
    let mut at = 0;
    while at < data.len() {
        match file.read_at(&mut data[at..], range.start + at as u64)? {
            0 => break,
            n => at += n,
        }
    }
    Ok(data.into())
}

impl Drop for Staging {
    fn drop(&mut self) {
        self.clear();
    }
}

fn zero_file(file: &File, range: Range<u64>) -> std::io::Result<()> {
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    if fallocate(file, punch, range.start, range.end - range.start).is_ok() {
        return Ok(());
    }
    let zeros = vec![0; 1 << 20];
    let mut at = range.start;
    while at < range.end {
        let n = (range.end - at).min(zeros.len() as u64);
        file.write_all_at(&zeros[..n as usize], at)?;
        at += n;
    }
    Ok(())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Ok(done?),
        Err(e) => Err(Error::new(Kind::Cancelled, "staging was interrupted").caused_by(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn memory_moves_move_to_disk_and_disk_ends() {
        let dir = tempfile::tempdir().expect("dir");
        let space = Space::new(dir.path().join("s"), 1000, 4 << 20).expect("space");
        let mut a = Staging::new(space.clone(), 1);
        a.write(100, Bytes::from_static(b"hello"), 5).await.expect("memory");
        assert!(!dir.path().join("s").exists());
        a.write(900, Bytes::from(vec![7; 200]), 200).await.expect("disk");
        assert_eq!(&a.read(100..105).await.expect("read")[..], b"hello");
        assert!(a.read(900..1100).await.expect("read").iter().all(|b| *b == 7));
        a.zero(950..1000, 0).await.expect("zero");
        assert_eq!(a.read(949..951).await.expect("read")[..], [7, 0]);
        assert_eq!(space.memory.used.load(Relaxed), 0);
        let e = a.write(8 << 20, Bytes::from(vec![1; 5 << 20]), 5 << 20).await.expect_err("full");
        assert!(e.is(Kind::NoSpace), "{e}");
        assert_eq!(std::fs::read_dir(dir.path().join("s")).expect("dir").count(), 0);
        drop(a);
        assert_eq!(space.disk.used.load(Relaxed), 0);
    }
}
