//! Answers as bytes: the `fuse_*_out` structures of the kernel's `include/uapi/linux/fuse.h`, native byte order.

use std::time::Duration;

use efc_common::node::Time;

use super::types::{AttrOut, CreateOut, EntryOut, LockOut, LseekOut, NodeAttr, OpenOut, PollOut, StatfsOut, WriteOut};

/// Size of `fuse_entry_out`, bytes.
pub(super) const ENTRY_BYTES: usize = 128;
/// Size of `fuse_dirent` without the name, bytes.
pub(super) const DIRENT_BYTES: usize = 24;

/// Where structures are put together: on the stack for answers, a page for directories.
pub(super) trait Sink {
    fn put(&mut self, bytes: &[u8]);

    fn u32(&mut self, v: u32) {
        self.put(&v.to_ne_bytes());
    }

    fn u64(&mut self, v: u64) {
        self.put(&v.to_ne_bytes());
    }
}

impl Sink for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

/// An answer of fixed size; the largest (CREATE) has 144 bytes.
pub(super) struct Fixed {
    bytes: [u8; 144],
    len: usize,
}

impl Fixed {
    pub(super) fn new() -> Fixed {
        Fixed { bytes: [0; 144], len: 0 }
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Sink for Fixed {
    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }
}

/// `fuse_attr`, 88 bytes.
pub(super) fn attr(out: &mut impl Sink, a: &NodeAttr) {
    for v in [a.ino, a.size, a.blocks] {
        out.u64(v);
    }
    let times = [a.atime, a.mtime, a.ctime];
    times.iter().for_each(|t: &Time| out.put(&t.secs.to_ne_bytes()));
    times.iter().for_each(|t| out.u32(t.nanos));
    // The last word is `flags`: no submounts, no DAX.
    for v in [a.mode, a.nlink, a.uid, a.gid, a.rdev, a.blksize, 0] {
        out.u32(v);
    }
}

/// Lifetimes travel as seconds and nanoseconds; the kernel clamps what is too far ahead.
fn ttl(d: Duration) -> (u64, u32) {
    (d.as_secs(), d.subsec_nanos())
}

/// `fuse_entry_out`.
pub(super) fn entry(out: &mut impl Sink, e: &EntryOut) {
    let ((entry_secs, entry_nanos), (attr_secs, attr_nanos)) = (ttl(e.entry_ttl), ttl(e.attr_ttl));
    for v in [e.node, e.generation, entry_secs, attr_secs] {
        out.u64(v);
    }
    out.u32(entry_nanos);
    out.u32(attr_nanos);
    attr(out, &e.attr);
}

/// `fuse_attr_out`.
pub(super) fn attr_out(out: &mut impl Sink, a: &AttrOut) {
    let (secs, nanos) = ttl(a.ttl);
    out.u64(secs);
    out.u32(nanos);
    out.u32(0);
    attr(out, &a.attr);
}

/// `fuse_open_out`.
pub(super) fn open(out: &mut impl Sink, o: &OpenOut) {
    out.u64(o.fh);
    out.u32(o.flags);
    out.u32(0);
}

/// `fuse_create_out`.
pub(super) fn create(out: &mut impl Sink, c: &CreateOut) {
    entry(out, &c.entry);
    open(out, &c.open);
}

/// `fuse_statfs_out`.
pub(super) fn statfs(out: &mut impl Sink, s: &StatfsOut) {
    for v in [s.blocks, s.blocks_free, s.blocks_available, s.files, s.files_free] {
        out.u64(v);
    }
    for v in [s.block_size, s.name_max, s.fragment_size, 0, 0, 0, 0, 0, 0, 0] {
        out.u32(v);
    }
}

/// `fuse_lseek_out`.
pub(super) fn lseek(out: &mut impl Sink, l: LseekOut) {
    out.u64(l.0);
}

/// `fuse_lk_out`.
pub(super) fn lock(out: &mut impl Sink, l: &LockOut) {
    out.u64(l.start);
    out.u64(l.end);
    out.u32(l.kind as u32);
    out.u32(l.pid);
}

/// `fuse_poll_out`.
pub(super) fn poll(out: &mut impl Sink, p: PollOut) {
    out.u32(p.0);
    out.u32(0);
}

/// `fuse_write_out`.
pub(super) fn write(out: &mut impl Sink, w: WriteOut) {
    out.u32(w.0);
    out.u32(0);
}

/// `fuse_getxattr_out`: how much room a value needs.
pub(super) fn xattr_size(out: &mut impl Sink, bytes: u32) {
    out.u32(bytes);
    out.u32(0);
}

/// `fuse_dirent` and the name, padded to 8 bytes.
pub(super) fn dirent(out: &mut Vec<u8>, ino: u64, next_offset: u64, mode: u32, name: &[u8]) {
    out.u64(ino);
    out.u64(next_offset);
    out.u32(name.len() as u32);
    // The `d_type` values are the type bits of the mode, shifted down.
    out.u32((mode & libc::S_IFMT) >> 12);
    out.put(name);
    out.resize(out.len().next_multiple_of(8), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn len(f: impl FnOnce(&mut Fixed)) -> usize {
        let mut out = Fixed::new();
        f(&mut out);
        out.as_slice().len()
    }

    #[test]
    fn sizes_are_those_of_the_kernel_header() {
        assert_eq!(len(|o| attr(o, &NodeAttr::default())), 88);
        assert_eq!(len(|o| entry(o, &EntryOut::default())), ENTRY_BYTES);
        assert_eq!(len(|o| attr_out(o, &AttrOut::default())), 104);
        assert_eq!(len(|o| open(o, &OpenOut::default())), 16);
        assert_eq!(len(|o| create(o, &CreateOut::default())), 144);
        assert_eq!(len(|o| statfs(o, &StatfsOut::default())), 80);
        assert_eq!(len(|o| lock(o, &LockOut::default())), 24);
    }

    #[test]
    fn directory_entries_are_padded_and_typed() {
        let mut out = Vec::new();
        dirent(&mut out, 7, 1, libc::S_IFDIR | 0o755, b"abc");
        assert_eq!(out.len(), DIRENT_BYTES + 8);
        assert_eq!(out[20..24], (libc::DT_DIR as u32).to_ne_bytes());
        assert_eq!(&out[24..], b"abc\0\0\0\0\0");
    }
}
