//! What the kernel may name, and what a successor of a process that was killed has to go on with, written down outside this process as it comes and goes: nodes, open files, locks, and files that
//! their object store does not have yet.
//!
//! A journal is a file in memory (memfd) that somebody else holds as well. What an answer tells the kernel is written before the answer is sent ([`Journal::commit`]); what the kernel
//! forgets, when it has been told. A file that has grown to several times what it says is replaced by a fresh one that begins with a snapshot.
//!
//! ```text
//! file     "EFCN", format u32, frames
//! frame    length u32, records, !length u32   a frame without its end was being written when the process died: nobody was told of it
//! record   kind u8, length u32, content       a kind of 128 or more that is not known is left out, any other is an error
//!
//! kind   1 efc.state.Checkpoint                   everything so far
//!        2 efc.state.Inode                        a new node, looked up once
//!        3 id u64                                 looked up once more
//!        4 id u64, count u64                      the kernel forgot so many look-ups
//!        5 id u64                                 the origin no longer has this version
//!        6 efc.state.Inode                        a node is this now; its look-ups stay
//!        7 efc.state.Handle                       a file was opened
//!        8 fh u64                                 and closed
//!        9 efc.state.Parked                       an open file is put aside, to be removed when it is closed
//!       10 id u64                                 a node has no open handle any more
//!       11 efc.state.Locks                        what one owner has locked of one file now
//!       12 efc.state.Draft                        a file on an object store is this now
//!       13 number, start, end, secs, nanos u64    these bytes of it were written then
//!       14 number u64                             it is nothing any more that the store does not have
//!       15                                        what comes after it is in another file, which this one may not be taken for
//! ```
//! Integers are little-endian. Content may be longer than it is known to be: what follows is for later versions. In format 3 records of numbers have no length.
//!
//! Programs of neighbouring versions take mounts over from each other: each reads the format of the one before, and one that leaves to a program that does not read its format
//! makes the journal anew in one that it does ([`Journal::renew_in`], [`crate::upgrade`]).

use efc_common::node::Time;
use efc_common::{Error, Kind, Result};
use efc_proto::state;
use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::{Range, RangeInclusive};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;

const MAGIC: &[u8; 4] = b"EFCN";
/// Formats of the journal, and of what is in it, that this program reads and can begin one in: its own, which is the last, and that of the version before.
pub const FORMATS: RangeInclusive<u32> = 3..=4;
/// The first in which every record has a length.
const SIZED: u32 = 4;
const HEAD_BYTES: u64 = 8;
const SNAPSHOT: u8 = 1;
const NODE: u8 = 2;
const SEEN: u8 = 3;
const FORGOTTEN: u8 = 4;
const STALE: u8 = 5;
const MOVED: u8 = 6;
const OPENED: u8 = 7;
const CLOSED: u8 = 8;
const PARKED: u8 = 9;
const UNUSED: u8 = 10;
const LOCKED: u8 = 11;
const DRAFT: u8 = 12;
const WROTE: u8 = 13;
const SETTLED: u8 = 14;
const ENDED: u8 = 15;
/// Kinds from here on may be left out by who does not know them.
const OPTIONAL: u8 = 128;
/// A journal is made anew when it is longer than this and three times its snapshot, bytes.
const LENGTH_MIN: u64 = 4 << 20;
/// What the kernel forgot is written when so many bytes of it wait: a death loses less.
const WAITING_MAX: usize = 256;

/// Gives a new journal file to whoever holds it, in place of the one before.
pub type Keep = Box<dyn Fn(BorrowedFd<'_>) -> Result<()> + Send + Sync>;

/// Where changes are written down.
pub struct Journal {
    keep: Keep,
    log: Mutex<Log>,
    /// Held shared by whoever changes something that is written down, alone for a new file.
    gate: RwLock<()>,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal").field("end", &self.log.lock().end).finish_non_exhaustive()
    }
}

struct Log {
    file: File,
    format: u32,
    end: u64,
    /// Length with its snapshot only.
    begun: u64,
    /// Records that are not in the file yet.
    waiting: Vec<u8>,
}

impl Log {
    /// A new file that begins with `snapshot`.
    fn begin(format: u32, snapshot: &state::Checkpoint, keep: &Keep) -> Result<Log> {
        use std::os::fd::AsFd;
        let fd =
            rustix::fs::memfd_create("efc-nodes", rustix::fs::MemfdFlags::CLOEXEC).map_err(std::io::Error::from)?;
        let file = File::from(fd);
        file.write_all_at(&[&MAGIC[..], &format.to_le_bytes()].concat(), 0)?;
        let mut log = Log { file, format, end: HEAD_BYTES, begun: 0, waiting: Vec::new() };
        log.message(SNAPSHOT, snapshot);
        log.write()?;
        log.begun = log.end;
        keep(log.file.as_fd())?;
        Ok(log)
    }

    fn message(&mut self, kind: u8, message: &impl prost::Message) {
        self.waiting.push(kind);
        self.waiting.extend((message.encoded_len() as u32).to_le_bytes());
        // Fails only for want of room, which a Vec has.
        let _ = message.encode(&mut self.waiting);
    }

    fn numbers(&mut self, kind: u8, numbers: &[u64]) {
        self.waiting.push(kind);
        if self.format >= SIZED {
            self.waiting.extend((size_of_val(numbers) as u32).to_le_bytes());
        }
        numbers.iter().for_each(|n| self.waiting.extend(n.to_le_bytes()));
    }

    fn write(&mut self) -> Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let length = self.waiting.len() as u32;
        let mut frame = Vec::with_capacity(self.waiting.len() + 8);
        frame.extend(length.to_le_bytes());
        frame.append(&mut self.waiting);
        frame.extend((!length).to_le_bytes());
        self.file.write_all_at(&frame, self.end)?;
        self.end += frame.len() as u64;
        Ok(())
    }
}

impl Journal {
    /// Begins with `snapshot`.
    ///
    /// # Errors
    /// When there is no memory for it, or nobody takes it.
    pub fn new(snapshot: &state::Checkpoint, keep: Keep) -> Result<Journal> {
        let log = Log::begin(*FORMATS.end(), snapshot, &keep)?;
        Ok(Journal { keep, log: Mutex::new(log), gate: RwLock::default() })
    }

    /// To be held while something is changed and written down.
    pub fn changing(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read()
    }

    /// A node was given to the kernel for the first time.
    pub fn node(&self, node: &state::Inode) {
        self.log.lock().message(NODE, node);
    }

    /// A node is this now.
    pub fn moved(&self, node: &state::Inode) {
        self.log.lock().message(MOVED, node);
    }

    /// Given once more.
    pub fn seen(&self, id: u64) {
        self.log.lock().numbers(SEEN, &[id]);
    }

    /// A file was opened.
    pub fn opened(&self, handle: &state::Handle) {
        self.log.lock().message(OPENED, handle);
    }

    /// A handle was closed.
    pub fn closed(&self, fh: u64) {
        self.log.lock().numbers(CLOSED, &[fh]);
    }

    /// An open file is going to be put aside.
    pub fn parked(&self, parked: &state::Parked) {
        self.log.lock().message(PARKED, parked);
    }

    /// No handle of a node is open, and nothing of it lies aside.
    pub fn unused(&self, node: u64) {
        self.log.lock().numbers(UNUSED, &[node]);
    }

    /// An owner has these locks of a file now.
    pub fn locks(&self, locks: &state::Locks) {
        self.log.lock().message(LOCKED, locks);
    }

    /// A file on an object store is this now.
    pub fn draft(&self, draft: &state::Draft) {
        self.log.lock().message(DRAFT, draft);
    }

    /// Bytes of it were written.
    pub fn wrote(&self, number: u64, range: &Range<u64>, time: Time) {
        let numbers = [number, range.start, range.end, time.secs.cast_unsigned(), time.nanos.into()];
        self.log.lock().numbers(WROTE, &numbers);
    }

    /// The store has all of it, or nobody needs it.
    pub fn settled(&self, number: u64) {
        self.log.lock().numbers(SETTLED, &[number]);
    }

    /// The kernel forgot look-ups.
    pub fn forgotten(&self, id: u64, count: u64) {
        let mut log = self.log.lock();
        log.numbers(FORGOTTEN, &[id, count]);
        if log.waiting.len() > WAITING_MAX
            && let Err(e) = log.write()
        {
            tracing::error!(error = %e, "a successor of this process would not know what the kernel has forgotten");
        }
    }

    /// The origin has another version now.
    pub fn stale(&self, id: u64) {
        self.log.lock().numbers(STALE, &[id]);
    }

    /// Brings everything into the file, for an answer that is about to be sent. True: it has become long, and is to be made anew.
    ///
    /// # Errors
    /// Those of the file: want of memory.
    pub fn commit(&self) -> Result<bool> {
        let mut log = self.log.lock();
        log.write()?;
        Ok(log.end > LENGTH_MIN.max(3 * log.begun))
    }

    /// Goes on in a new file that begins with a snapshot.
    ///
    /// # Errors
    /// As for [`Journal::new`]; the old one is used on.
    pub fn renew(&self, snapshot: impl FnOnce() -> state::Checkpoint) -> Result<()> {
        let format = self.log.lock().format;
        self.renew_in(format, snapshot)
    }

    /// As [`Journal::renew`], and from now on in `format`, one of [`FORMATS`], for a program that reads that.
    ///
    /// # Errors
    /// As for [`Journal::new`]; the old one is used on.
    pub fn renew_in(&self, format: u32, snapshot: impl FnOnce() -> state::Checkpoint) -> Result<()> {
        let _alone = self.gate.write();
        let mut log = self.log.lock();
        let next = Log::begin(format, &snapshot(), &self.keep)?;
        let mut before = std::mem::replace(&mut *log, next);
        if before.format >= SIZED {
            before.numbers(ENDED, &[]);
            before.write()?;
        }
        Ok(())
    }
}

/// Enters that bytes of a file were written.
pub fn written(draft: &mut state::Draft, range: &Range<u64>, time: Time) {
    let time = Some(state::Time { secs: time.secs, nanos: time.nanos });
    let metadata = draft.metadata.get_or_insert_default();
    (metadata.mtime, metadata.ctime, draft.changed) = (time, None, time);
    draft.data_dirty = true;
    draft.size = draft.size.max(range.end);
    draft.extents.extend([range.start, range.end]);
}

fn bad(what: &'static str) -> Error {
    Error::new(Kind::Corrupt, format!("journal of the predecessor: {what}"))
}

/// What a journal says.
///
/// # Errors
/// [`Kind::Corrupt`] for a file that is no journal of this format, or that contradicts itself.
pub fn read(file: &File) -> Result<state::Checkpoint> {
    let length = file.metadata()?.len();
    let mut bytes = vec![0; usize::try_from(length).map_err(|_| bad("too long"))?];
    file.read_exact_at(&mut bytes, 0)?;
    parse(&bytes)
}

fn parse(bytes: &[u8]) -> Result<state::Checkpoint> {
    let mut rest = bytes.strip_prefix(MAGIC).ok_or_else(|| bad("is none"))?;
    let format = take_u32(&mut rest)?;
    if !FORMATS.contains(&format) {
        return Err(bad("unknown format").with("format", format));
    }
    let mut said = Said::default();
    while let Some(mut records) = take_frame(&mut rest)? {
        while let Some((kind, after)) = records.split_first() {
            records = after;
            let unsized_length = if format < SIZED { length_of_numbers(*kind) } else { None };
            let length = unsized_length.map_or_else(|| take_u32(&mut records), Ok)? as usize;
            let (content, after) = records.split_at_checked(length).ok_or_else(|| bad("record is cut off"))?;
            records = after;
            said.take(*kind, content)?;
        }
    }
    said.checkpoint()
}

/// Length of a record of numbers, which it does not say itself before format 4.
fn length_of_numbers(kind: u8) -> Option<u32> {
    match kind {
        SEEN | STALE | CLOSED | UNUSED | SETTLED => Some(8),
        FORGOTTEN => Some(16),
        WROTE => Some(40),
        _ => None,
    }
}

/// What the records said so far.
#[derive(Default)]
struct Said {
    format: Option<u32>,
    next_id: u64,
    /// Look-ups are counted apart: one that was counted before another was forgotten may be written after it.
    nodes: BTreeMap<u64, (state::Inode, i128)>,
    handles: BTreeMap<u64, state::Handle>,
    parked: BTreeMap<u64, Vec<state::Parked>>,
    locks: BTreeMap<(Vec<u8>, u64), state::Locks>,
    drafts: BTreeMap<u64, state::Draft>,
    owner: u64,
}

impl Said {
    fn take(&mut self, kind: u8, mut content: &[u8]) -> Result<()> {
        match kind {
            SNAPSHOT if self.format.is_none() => {
                let c: state::Checkpoint = decode(content)?;
                (self.next_id, self.format) = (c.next_id, Some(c.format));
                self.nodes.extend(c.inodes.into_iter().map(|i| (i.id, (i.clone(), i.lookups.into()))));
                self.handles.extend(c.handles.into_iter().map(|h| (h.fh, h)));
                c.parked.into_iter().for_each(|p| self.parked.entry(p.node).or_default().push(p));
                c.locks.into_iter().for_each(|l| self.lock(l));
                self.drafts.extend(c.drafts.into_iter().map(|d| (d.number, d)));
                self.owner = c.owner;
            }
            NODE => {
                let node: state::Inode = decode(content)?;
                self.next_id = self.next_id.max(node.id.checked_add(1).ok_or_else(|| bad("impossible node"))?);
                self.nodes.insert(node.id, (node, 1));
            }
            SEEN => self.known(take_u64(&mut content)?)?.1 += 1,
            FORGOTTEN => {
                let (id, count) = (take_u64(&mut content)?, take_u64(&mut content)?);
                self.known(id)?.1 -= i128::from(count);
            }
            STALE => self.known(take_u64(&mut content)?)?.0.stale = true,
            MOVED => {
                let node: state::Inode = decode(content)?;
                // One that the kernel has forgotten since may still be in somebody's hands.
                if let Some((known, _)) = self.nodes.get_mut(&node.id) {
                    *known = node;
                }
            }
            OPENED => {
                let handle: state::Handle = decode(content)?;
                self.handles.insert(handle.fh, handle);
            }
            CLOSED => drop(self.handles.remove(&take_u64(&mut content)?)),
            PARKED => {
                let parked: state::Parked = decode(content)?;
                self.parked.entry(parked.node).or_default().push(parked);
            }
            UNUSED => drop(self.parked.remove(&take_u64(&mut content)?)),
            LOCKED => {
                let locks = decode(content)?;
                self.lock(locks);
            }
            DRAFT => {
                let draft: state::Draft = decode(content)?;
                self.drafts.insert(draft.number, draft);
            }
            WROTE => {
                let draft = self.drafts.get_mut(&take_u64(&mut content)?).ok_or_else(|| bad("unknown draft"))?;
                let (start, end) = (take_u64(&mut content)?, take_u64(&mut content)?);
                let (secs, nanos) = (take_u64(&mut content)?.cast_signed(), take_u64(&mut content)? as u32);
                written(draft, &(start..end), Time { secs, nanos });
            }
            SETTLED => drop(self.drafts.remove(&take_u64(&mut content)?)),
            ENDED => return Err(bad("goes on in another file, which is lost")),
            OPTIONAL.. => {}
            _ => return Err(bad("unknown record")),
        }
        Ok(())
    }

    fn known(&mut self, id: u64) -> Result<&mut (state::Inode, i128)> {
        self.nodes.get_mut(&id).ok_or_else(|| bad("unknown node"))
    }

    fn lock(&mut self, locks: state::Locks) {
        let Some(state) = &locks.state else { return };
        let key = (state.file.to_vec(), state.owner);
        if state.held.is_empty() {
            self.locks.remove(&key);
        } else {
            self.locks.insert(key, locks);
        }
    }

    fn checkpoint(self) -> Result<state::Checkpoint> {
        let format = self.format.ok_or_else(|| bad("has no snapshot"))?;
        let held = self.nodes.into_values().filter(|(_, lookups)| *lookups > 0);
        let inodes = held.map(|(i, lookups)| state::Inode { lookups: u64::try_from(lookups).unwrap_or(u64::MAX), ..i });
        Ok(state::Checkpoint {
            format,
            next_id: self.next_id,
            inodes: inodes.collect(),
            handles: self.handles.into_values().collect(),
            parked: self.parked.into_values().flatten().collect(),
            locks: self.locks.into_values().collect(),
            drafts: self.drafts.into_values().collect(),
            owner: self.owner,
        })
    }
}

/// The records of the next whole frame.
fn take_frame<'a>(rest: &mut &'a [u8]) -> Result<Option<&'a [u8]>> {
    let mut at = *rest;
    let Ok(length) = take_u32(&mut at) else { return Ok(None) };
    let Some((records, mut end)) = at.split_at_checked(length as usize) else { return Ok(None) };
    let Ok(check) = take_u32(&mut end) else { return Ok(None) };
    if check != !length {
        return Err(bad("broken frame"));
    }
    *rest = end;
    Ok(Some(records))
}

fn decode<T: prost::Message + Default>(content: &[u8]) -> Result<T> {
    T::decode(content).map_err(|e| bad("record does not decode").caused_by(e))
}

fn take_u32(rest: &mut &[u8]) -> Result<u32> {
    let (number, after) = rest.split_first_chunk().ok_or_else(|| bad("record is cut off"))?;
    *rest = after;
    Ok(u32::from_le_bytes(*number))
}

fn take_u64(rest: &mut &[u8]) -> Result<u64> {
    let (number, after) = rest.split_first_chunk().ok_or_else(|| bad("record is cut off"))?;
    *rest = after;
    Ok(u64::from_le_bytes(*number))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::namespace::tests::{dir, file, seen};
    use crate::namespace::{Namespace, Nodes};
    use bytes::Bytes;
    use proptest::prelude::*;
    use std::sync::Arc;

    /// A holder that keeps the last file it was given.
    fn holder() -> (Keep, Arc<Mutex<Option<File>>>) {
        let kept: Arc<Mutex<Option<File>>> = Arc::default();
        let keep = {
            let kept = kept.clone();
            Box::new(move |fd: BorrowedFd<'_>| {
                *kept.lock() = Some(File::from(fd.try_clone_to_owned()?));
                Ok(())
            })
        };
        (keep, kept)
    }

    /// An empty namespace and its journal.
    fn written_down(nodes: Nodes) -> (Namespace, Arc<Journal>, Arc<Mutex<Option<File>>>) {
        let mut ns = Namespace::new(dir(""), nodes);
        let (keep, kept) = holder();
        let journal = Arc::new(Journal::new(&ns.checkpoint(), keep).expect("journal"));
        ns.write_down(journal.clone());
        (ns, journal, kept)
    }

    fn of(kept: &Mutex<Option<File>>) -> Vec<u8> {
        let file = kept.lock();
        let file = file.as_ref().expect("kept");
        let mut bytes = vec![0; file.metadata().expect("length").len() as usize];
        file.read_exact_at(&mut bytes, 0).expect("read");
        bytes
    }

    proptest! {
        /// Whatever was looked up and forgotten: the journal says what the namespace holds, also when its last frame was cut off in the middle.
        #[test]
        fn a_journal_says_what_the_namespace_holds(
            ops in proptest::collection::vec((0u8..6, 0u8..3, 0u8..4, any::<bool>()), 0..120),
            cut in 0usize..40,
        ) {
            let (ns, journal, kept) = written_down(Nodes::Versions);
            let d = ns.intern(&ns.root(), &Bytes::from_static(b"d"), &dir("d/"), seen()).0;
            let mut held = std::collections::BTreeMap::from([(d.id, 1u64)]);
            for (n, version, what, renew) in ops {
                match what {
                    0 => {
                        if let Some((&id, &count)) = held.iter().next_back() {
                            ns.forget(id, count);
                            held.remove(&id);
                        }
                    }
                    1 => {
                        if let Some(i) = held.keys().next_back().and_then(|id| ns.get(*id)) {
                            ns.mark_stale(&i);
                        }
                    }
                    _ => {
                        let parent = if what == 2 { ns.root() } else { d.clone() };
                        let name = Bytes::from(vec![b'a' + n]);
                        let i = ns.intern(&parent, &name, &file(&format!("{n}"), &format!("{version}")), seen()).0;
                        *held.entry(i.id).or_default() += 1;
                    }
                }
                if renew {
                    journal.renew(|| ns.checkpoint()).expect("renew");
                }
            }
            journal.commit().expect("commit");
            let whole = of(&kept);
            let back = Namespace::restore(&parse(&whole).expect("parse"), Nodes::Versions).expect("restore");
            prop_assert_eq!(back.len(), ns.len());
            for (a, b) in ns.checkpoint().inodes.into_iter().zip(back.checkpoint().inodes) {
                prop_assert_eq!((a.id, a.lookups, a.stale, a.node), (b.id, b.lookups, b.stale, b.node));
            }
            // Cut anywhere in its end: still readable, if the snapshot is whole.
            ns.intern(&ns.root(), &Bytes::from_static(b"late"), &file("late", "1"), seen());
            journal.commit().expect("commit");
            let longer = of(&kept);
            let cut = longer.len() - cut.min(longer.len() - whole.len() - 1) - 1;
            if longer.starts_with(&whole) {
                prop_assert_eq!(parse(&longer[..cut]).expect("cut off").inodes.len(), ns.all().len() - 1);
            }
        }

        #[test]
        fn garbage_is_refused_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes);
            for format in FORMATS {
                let frame = [&(bytes.len() as u32).to_le_bytes(), &bytes[..], &(!(bytes.len() as u32)).to_le_bytes()].concat();
                let _ = parse(&[&MAGIC[..], &format.to_le_bytes(), &bytes].concat());
                let _ = parse(&[&MAGIC[..], &format.to_le_bytes(), &frame].concat());
            }
        }
    }

    /// A journal with these records after a snapshot.
    fn with_records(format: u32, records: &[u8]) -> Result<state::Checkpoint> {
        let (ns, journal, kept) = written_down(Nodes::Versions);
        journal.renew_in(format, || ns.checkpoint()).expect("renew");
        let length = records.len() as u32;
        parse(&[&of(&kept), &length.to_le_bytes()[..], records, &(!length).to_le_bytes()].concat())
    }

    #[test]
    fn what_later_versions_add_is_left_out_if_it_may_be() {
        let record = |kind: u8, content: &[u8]| [&[kind][..], &(content.len() as u32).to_le_bytes(), content].concat();
        let plain = with_records(4, &[]).expect("parse");
        assert_eq!(with_records(4, &record(200, b"what is this")).expect("left out"), plain);
        assert_eq!(with_records(4, &record(SETTLED, &[7; 24])).expect("longer"), plain);
        assert!(with_records(4, &record(50, b"what is this")).is_err_and(|e| e.is(Kind::Corrupt)));
        assert!(with_records(4, &record(SETTLED, &[7; 4])).is_err_and(|e| e.is(Kind::Corrupt)));
        assert!(with_records(4, &record(200, b"what is this")[..9]).is_err_and(|e| e.is(Kind::Corrupt)));
    }

    #[test]
    fn a_journal_in_the_format_of_before_says_the_same() {
        let (ns, journal, kept) = written_down(Nodes::Versions);
        let d = ns.intern(&ns.root(), &Bytes::from_static(b"d"), &dir("d/"), seen()).0;
        let now = || parse(&of(&kept)).expect("parse");
        journal.commit().expect("commit");
        let before = now();
        let old = kept.lock().take();
        journal.renew_in(3, || ns.checkpoint()).expect("renew");
        assert!(read(&old.expect("kept")).is_err_and(|e| e.to_string().contains("another file")));
        assert_eq!((now(), of(&kept)[4]), (before, 3));
        // What comes after it is in that format too.
        let f = ns.intern(&d, &Bytes::from_static(b"f"), &file("d/f", "1"), seen()).0;
        ns.intern(&d, &Bytes::from_static(b"f"), &file("d/f", "1"), seen());
        ns.forget(f.id, 1);
        ns.mark_stale(&d);
        journal.commit().expect("commit");
        assert_eq!(now().inodes, ns.checkpoint().inodes);
        journal.renew(|| ns.checkpoint()).expect("renew");
        assert_eq!((now().inodes, of(&kept)[4]), (ns.checkpoint().inodes, 3));
    }

    /// Written by a mount process that knew format 3 only, over a bucket, while files were open, locked, removed, renamed and written.
    #[test]
    fn a_journal_of_the_version_before_is_read() {
        let c = parse(include_bytes!("testdata/journal-3.bin")).expect("parse");
        let ns = Namespace::restore(&c, Nodes::Follow { paths: true }).expect("restore");
        let path = |name: &[u8]| c.inodes.iter().find(|i| i.name == name).and_then(|i| ns.get(i.id)).map(|i| i.path());
        assert_eq!((path(b"after"), path(b"gone")), (Some("/dir/after".into()), None));
        assert_eq!((c.handles.len(), c.locks.len(), c.inodes.len()), (3, 2, 6));
        let drafts: Vec<_> = c.drafts.iter().map(|d| (d.removed, d.size, d.extents.clone(), d.slot)).collect();
        assert_eq!(drafts, [(true, 4, vec![0, 4], Some(1)), (false, 100_000, vec![0, 100_000, 50, 60], Some(0))]);
    }

    #[test]
    fn children_of_what_was_forgotten_stay() {
        let (ns, journal, kept) = written_down(Nodes::Versions);
        let d = ns.intern(&ns.root(), &Bytes::from_static(b"d"), &dir("d/"), seen()).0;
        let f = ns.intern(&d, &Bytes::from_static(b"f"), &file("d/f", "1"), seen()).0;
        ns.forget(d.id, 1);
        journal.commit().expect("commit");
        let back = Namespace::restore(&parse(&of(&kept)).expect("parse"), Nodes::Versions).expect("restore");
        assert_eq!(back.get(f.id).expect("known").locator(), f.locator());
        // And what it hands on can be taken up again.
        assert!(Namespace::restore(&back.checkpoint(), Nodes::Versions).expect("restore").get(f.id).is_some());
    }

    #[test]
    fn following_nodes_have_their_names_and_places() {
        let (ns, journal, kept) = written_down(Nodes::Follow { paths: true });
        let root = ns.root();
        let name = |n: &'static str| Bytes::from_static(n.as_bytes());
        let numbered = |locator: &str, fileid, nlink| {
            let mut node = file(locator, "1");
            (node.attr.fileid, node.attr.nlink) = (fileid, nlink);
            node
        };
        let f = ns.intern(&root, &name("f"), &numbered("/f", 7, 1), seen()).0;
        let old = ns.intern(&root, &name("g"), &numbered("/g", 8, 1), seen()).0;
        // In a directory that is younger than itself, over another file, and with a second name.
        let d = ns.intern(&root, &name("d"), &dir("/d"), seen()).0;
        let e = ns.intern(&d, &name("e"), &numbered("/d/e", 9, 1), seen()).0;
        ns.renamed((&root, b"f"), (&d, &name("f")), name("/d/f"));
        ns.renamed((&root, b"g"), (&d, &name("e")), name("/d/e"));
        ns.intern(&root, &name("link"), &numbered("/link", 8, 2), seen());
        ns.refresh(&old, &numbered("/d/e", 8, 2), seen());
        ns.intern(&root, &name("link"), &numbered("/link", 8, 2), seen());
        ns.renamed((&root, b"d"), (&root, &name("h")), name("/h"));
        journal.commit().expect("commit");
        let back =
            Namespace::restore(&parse(&of(&kept)).expect("parse"), Nodes::Follow { paths: true }).expect("restore");
        assert_eq!(back.checkpoint(), ns.checkpoint());
        let again = |id| back.get(id).expect("known");
        assert_eq!((again(f.id).path(), again(f.id).locator()), ("/h/f".into(), name("/h/f")));
        assert_eq!((again(old.id).path(), again(old.id).locator()), ("/h/e".into(), name("/h/e")));
        assert!(again(e.id).is_nameless() && !again(e.id).is_lost());
        assert_eq!(back.child(&again(d.id), b"f").map(|i| i.id), Some(f.id));
        // One whose directory was forgotten is not to be believed where it was.
        ns.forget(d.id, 1);
        journal.commit().expect("commit");
        let back =
            Namespace::restore(&parse(&of(&kept)).expect("parse"), Nodes::Follow { paths: true }).expect("restore");
        assert!(back.get(f.id).expect("known").is_lost());
    }

    #[test]
    fn open_files_and_locks_are_those_of_the_end() {
        let (ns, journal, kept) = written_down(Nodes::Follow { paths: true });
        let handle = |fh| state::Handle { fh, node: 1, flags: 2, by: 3, direct: true, unique: fh, draft: 0 };
        let locks = |owner, held: usize| {
            let range = efc_proto::control::LockRange { start: 0, end: 9, exclusive: true };
            let state = efc_proto::control::LockState { owner, held: vec![range; held], ..Default::default() };
            state::Locks { state: Some(state), handles: vec![owner] }
        };
        let parked = |node| state::Parked { node, dir: "/".into(), name: format!("p{node}").into() };
        (1..4).for_each(|fh| journal.opened(&handle(fh)));
        journal.closed(2);
        (1..3).for_each(|owner| journal.locks(&locks(owner, 1)));
        journal.locks(&locks(1, 0));
        (5..7).for_each(|node| journal.parked(&parked(node)));
        journal.unused(5);
        journal.commit().expect("commit");
        let c = parse(&of(&kept)).expect("parse");
        assert_eq!(c.handles, [handle(1), handle(3)]);
        assert_eq!((c.parked.clone(), c.locks.clone()), (vec![parked(6)], vec![locks(2, 1)]));
        journal.renew(|| state::Checkpoint { inodes: ns.checkpoint().inodes, ..c.clone() }).expect("renew");
        assert_eq!(parse(&of(&kept)).expect("parse"), c);
    }
}
