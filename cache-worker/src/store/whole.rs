//! The file that holds the whole segments of a memory tier, each in one folio of 256 KiB instead of 64 pages: the kernel allocates, charges
//! and maps a folio about as fast as a page, so writes cost a fifth and reads a quarter of what they do in a memfd (decision 0009).
//!
//! The file lies on a tmpfs of our own, which is mounted nowhere, with `huge=within_size`. Left alone the kernel would make folios of up to
//! 2 MiB and [the slab's rule](super::slab) would be broken: a punched slot would be a part of a folio. It makes none over a range that has a
//! page already, and none past the end of the file. So segments take the odd slots only, and in front of each lies a *marker*, one page that
//! was written when it was the end of the file and that stays: every aligned range larger than a slot has one.
//! (Linux `mm/shmem.c`: `shmem_get_orders_within_size`, `shmem_alloc_and_add_folio`.)

use std::fs::File;
use std::io;

use efc_common::block::SEGMENT_BYTES;
use efc_proto::shared::in_whole_file;
use parking_lot::Mutex;
use rustix::fs::{Mode, OFlags, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen};

use super::segment::slot_offset;
use super::slab::punch;

/// Bytes of a marker.
pub(super) const MARKER_BYTES: u64 = 4096;

/// See the module.
pub(super) struct WholeFile {
    file: File,
    /// Markers there are.
    markers: Mutex<u32>,
}

impl WholeFile {
    /// An empty file, once it has shown that its kernel makes folios as it must.
    ///
    /// # Errors
    /// When there may be no tmpfs of our own (it takes `CAP_SYS_ADMIN`), or its folios are larger than a slot.
    pub(super) fn create() -> io::Result<WholeFile> {
        let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&fs, "huge", "within_size")?;
        // No limit: the slab keeps the quota.
        fsconfig_set_string(&fs, "size", "0")?;
        fsconfig_set_string(&fs, "mode", "700")?;
        fsconfig_create(&fs)?;
        let root = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        let file = openat(&root, ".", OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)?;
        let whole = WholeFile { file: file.into(), markers: Mutex::new(0) };
        whole.check()?;
        Ok(whole)
    }

    /// Is a segment given 256 KiB, not more, and are they given back?
    fn check(&self) -> io::Result<()> {
        let taken = || rustix::fs::fstat(&self.file).map(|s| s.st_blocks as u64 * 512);
        self.prepare(1)?;
        rustix::io::pwrite(&self.file, &vec![0; SEGMENT_BYTES as usize], slot_offset(1))?;
        let full = taken()?;
        punch(&self.file, 1..2)?;
        let (empty, want) = (taken()?, MARKER_BYTES + SEGMENT_BYTES as u64);
        if (full, empty) != (want, MARKER_BYTES) {
            return Err(io::Error::other(format!(
                "a segment took {full} bytes of {want}, and {empty} when it had gone"
            )));
        }
        Ok(())
    }

    /// Is `slot` one of its?
    pub(super) fn has(slot: u32) -> bool {
        in_whole_file(slot as u64)
    }

    /// The file; slot `s` lies at the offset it has in every data file.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// To be called before a slot is written: makes its marker, and all before it that are missing, in their order.
    ///
    /// # Errors
    /// When there is no memory.
    pub(super) fn prepare(&self, slot: u32) -> io::Result<()> {
        let mut markers = self.markers.lock();
        while *markers * 2 < slot {
            rustix::io::pwrite(&self.file, &[0; MARKER_BYTES as usize], slot_offset(*markers * 2))?;
            *markers += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file; none where there can be none because the tests are not run by root.
    fn whole() -> Option<WholeFile> {
        let made = WholeFile::create();
        let denied = made.is_err() && !rustix::process::geteuid().is_root();
        (!denied).then(|| made.expect("a kernel with folios that keep to the rule"))
    }

    /// What the file takes, as the kernel counts it.
    fn taken(f: &WholeFile) -> u64 {
        rustix::fs::fstat(f.file()).expect("stat").st_blocks as u64 * 512
    }

    #[test]
    fn slots_come_and_go_one_by_one_in_any_order() {
        let Some(f) = whole() else { return };
        let segment = |n: u8| vec![n; SEGMENT_BYTES as usize];
        let write = |slot: u32, n: u8| {
            f.prepare(slot).expect("markers");
            rustix::io::pwrite(f.file(), &segment(n), slot_offset(slot)).expect("write");
        };
        // A 2 MiB range whose neighbours are all free is what a large folio would take.
        for slot in [33, 1, 17, 3, 15] {
            write(slot, slot as u8);
        }
        let markers = 17 * MARKER_BYTES;
        assert_eq!(taken(&f), markers + 5 * SEGMENT_BYTES as u64);
        for slot in [1, 3, 33, 15] {
            punch(f.file(), slot..slot + 1).expect("punch");
        }
        assert_eq!(taken(&f), markers + SEGMENT_BYTES as u64);
        for slot in [3, 15, 31] {
            write(slot, slot as u8);
        }
        assert_eq!(taken(&f), markers + 4 * SEGMENT_BYTES as u64);
        for slot in [3, 15, 17, 31] {
            let mut got = segment(0);
            rustix::io::pread(f.file(), &mut got, slot_offset(slot)).expect("read");
            assert!(got == segment(slot as u8), "{slot}");
        }
    }

    #[test]
    fn pages_that_a_pipe_refers_to_keep_their_bytes() {
        let Some(f) = whole() else { return };
        f.prepare(1).expect("marker");
        rustix::io::pwrite(f.file(), &vec![1; SEGMENT_BYTES as usize], slot_offset(1)).expect("write");
        let (out, into) = rustix::pipe::pipe().expect("pipe");
        let mut at = slot_offset(1) + 8192;
        let flags = rustix::pipe::SpliceFlags::empty();
        let n = rustix::pipe::splice(f.file(), Some(&mut at), &into, None, 32768, flags).expect("splice");
        assert_eq!(n, 32768);
        punch(f.file(), 1..2).expect("punch");
        rustix::io::pwrite(f.file(), &vec![2; SEGMENT_BYTES as usize], slot_offset(1)).expect("write again");
        let mut got = vec![0; n];
        let mut have = 0;
        while have < n {
            have += rustix::io::read(&out, &mut got[have..]).expect("read");
        }
        assert!(got.iter().all(|b| *b == 1));
    }
}
