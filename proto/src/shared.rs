//! Memory that a worker shares with clients on its host: the data file of its memory tier, and the *seals* of its slots.
//!
//! A client that was told where a segment is reads it there by itself, with no message to the worker and for as long as the seal of
//! its slot is unbroken. The scheme is a sequence lock (H.-J. Boehm, "Can seqlocks get along with programming language memory
//! models?", MSPC 2012): the worker breaks the seal *before* it changes the slot; the client reads the seal, copies the bytes, reads the
//! seal again, and believes the copy only if both are the seal it was told of. Neither waits for the other; a client that dies or
//! sleeps holds nothing up.
//!
//! Both files are memfds, passed as read-only descriptors over the worker's unix socket with its Hello. The seals' file is an array of
//! u64 in the machine's order, one per slot of [`SEGMENT_BYTES`](efc_common::block::SEGMENT_BYTES), and cannot shrink
//! (`F_SEAL_SHRINK`, checked), so that mapping it is safe. The data file is read by `pread`, never mapped.

use efc_common::error::Context;
use efc_common::{Error, Kind, Result};
use rustix::fs::{
    MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create, open,
};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// Does a slot lie in the file of whole segments, where there is one? Every other slot does.
pub fn in_whole_file(slot: u64) -> bool {
    slot % 2 == 1
}

/// The seals of a memory tier, mapped.
#[derive(Debug)]
pub struct Seals {
    at: NonNull<AtomicU64>,
    slots: usize,
}

// SAFETY: the mapping belongs to the value and is only accessed through atomics.
unsafe impl Send for Seals {}
// SAFETY: as above.
unsafe impl Sync for Seals {}

impl Seals {
    /// Seals for `slots` slots, all unbroken, and the file to hand to clients (read-only).
    ///
    /// # Errors
    /// When the system gives no memory file.
    pub fn create(slots: u32) -> Result<(Seals, OwnedFd)> {
        let make = || -> io::Result<OwnedFd> {
            let file = memfd_create("efc-seals", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
            ftruncate(&file, slots.max(1) as u64 * 8)?;
            fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
            Ok(file)
        };
        let file = make().context("make the seals' file")?;
        let seals = Self::map(&file, slots.max(1) as usize, ProtFlags::READ | ProtFlags::WRITE)?;
        Ok((seals, read_only(&file)?))
    }

    /// The seals of a worker, from the file it handed over.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] for a file that is not what [`Seals::create`] makes.
    pub fn open(file: &OwnedFd) -> Result<Seals> {
        let sealed = fcntl_get_seals(file).is_ok_and(|s| s.contains(SealFlags::SHRINK));
        let bytes = rustix::fs::fstat(file).map_err(io::Error::from).context("look at the seals' file")?.st_size;
        if !sealed || bytes < 8 {
            return Err(Error::new(Kind::Corrupt, "worker shared a file that is no seals' file"));
        }
        Self::map(file, bytes as usize / 8, ProtFlags::READ)
    }

    fn map(file: &OwnedFd, slots: usize, access: ProtFlags) -> Result<Seals> {
        // SAFETY: a new mapping of a file that cannot shrink below `slots` seals; nothing else knows its address.
        let at = unsafe { mmap(std::ptr::null_mut(), slots * 8, access, MapFlags::SHARED, file, 0) };
        let at = at.map_err(io::Error::from).context("map the seals")?;
        let at = NonNull::new(at.cast()).ok_or_else(|| Error::new(Kind::Io, "seals mapped at address zero"))?;
        Ok(Seals { at, slots })
    }

    fn seal(&self, slot: u64) -> Option<&AtomicU64> {
        let slot = usize::try_from(slot).ok().filter(|s| *s < self.slots)?;
        // SAFETY: inside the mapping, which lives as long as `self`; page-aligned plus a multiple of 8.
        Some(unsafe { self.at.add(slot).as_ref() })
    }

    /// The seal of a slot; `None` past the last one.
    pub fn get(&self, slot: u64) -> Option<u64> {
        // Orders what the caller reads before it (the bytes) against this load, and this load against what it reads after it.
        fence(Ordering::Acquire);
        Some(self.seal(slot)?.load(Ordering::Acquire))
    }

    /// Breaks the seal of a slot. Only the worker may, and before it changes a byte of it.
    pub fn break_seal(&self, slot: u64) {
        if let Some(seal) = self.seal(slot) {
            seal.fetch_add(1, Ordering::SeqCst);
            fence(Ordering::SeqCst);
        }
    }
}

impl Drop for Seals {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and nobody can have a reference into it any more.
        let unmapped = unsafe { munmap(self.at.as_ptr().cast(), self.slots * 8) };
        debug_assert!(unmapped.is_ok());
    }
}

/// The same file, opened again for reading only.
///
/// # Errors
/// When /proc is not there.
pub fn read_only(file: impl AsFd) -> Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    let opened = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    opened.map_err(io::Error::from).context("open a shared file for reading")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_see_one_seal_and_only_the_worker_can_break_it() {
        let (worker, file) = Seals::create(10).expect("create");
        let client = Seals::open(&file).expect("open");
        assert_eq!(
            (client.get(3), client.get(9), client.get(10), client.get(u64::MAX)),
            (Some(0), Some(0), None, None)
        );
        worker.break_seal(3);
        worker.break_seal(10);
        assert_eq!((client.get(3), client.get(2)), (Some(1), Some(0)));
        assert!(rustix::io::pwrite(&file, &[1], 0).is_err(), "the client's descriptor is for reading");
        assert!(Seals::map(&file, 10, ProtFlags::READ | ProtFlags::WRITE).is_err());
    }

    #[test]
    fn a_file_that_could_shrink_is_not_mapped() {
        let file = memfd_create("plain", MemfdFlags::CLOEXEC).expect("memfd");
        ftruncate(&file, 4096).expect("size");
        assert!(Seals::open(&file).is_err_and(|e| e.is(Kind::Corrupt)));
        let (zero, _) = Seals::create(0).expect("no slots");
        assert_eq!(zero.get(0), Some(0));
    }
}
