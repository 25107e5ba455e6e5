//! The nodes the kernel may name, written down outside this process as they come and go, so that a successor of a process that was killed knows them.
//!
//! A journal is a file in memory (memfd) that somebody else holds as well. What an answer tells the kernel is written before the answer is sent ([`Journal::commit`]); what the kernel
//! forgets, when it has been told. A file that has grown to several times what it says is replaced by a fresh one that begins with a snapshot.
//!
//! ```text
//! file     "EFCN", format u32, frames
//! frame    length u32, records, !length u32       a frame without its end was being written when the process died: nobody was told of it
//! record   1, length u32, efc.state.Checkpoint     everything so far
//!          2, length u32, efc.state.Inode          a new node, looked up once
//!          3, id u64                               looked up once more
//!          4, id u64, count u64                    the kernel forgot so many look-ups
//!          5, id u64                               the origin no longer has this version
//! ```
//! Integers are little-endian.

use super::Inode;
use efc_common::{Error, Kind, Result};
use efc_proto::{convert, state};
use parking_lot::Mutex;
use prost::Message as _;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;

const MAGIC: &[u8; 4] = b"EFCN";
const FORMAT: u32 = 1;
const HEAD_BYTES: u64 = 8;
const SNAPSHOT: u8 = 1;
const NODE: u8 = 2;
const SEEN: u8 = 3;
const FORGOTTEN: u8 = 4;
const STALE: u8 = 5;
/// A journal is made anew when it is longer than this and three times its snapshot, bytes.
const LENGTH_MIN: u64 = 4 << 20;
/// What the kernel forgot is written when so many bytes of it wait: a death loses less.
const WAITING_MAX: usize = 256;

/// Gives a new journal file to whoever holds it, in place of the one before.
pub type Keep = Box<dyn Fn(BorrowedFd<'_>) -> Result<()> + Send + Sync>;

/// Where changes of a namespace are written down.
pub struct Journal {
    keep: Keep,
    log: Mutex<Log>,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal").field("end", &self.log.lock().end).finish_non_exhaustive()
    }
}

struct Log {
    file: File,
    end: u64,
    /// Length with its snapshot only.
    begun: u64,
    /// Records that are not in the file yet.
    waiting: Vec<u8>,
}

impl Log {
    /// A new file that begins with `snapshot`.
    fn begin(snapshot: &state::Checkpoint, keep: &Keep) -> Result<Log> {
        use std::os::fd::AsFd;
        let fd =
            rustix::fs::memfd_create("efc-nodes", rustix::fs::MemfdFlags::CLOEXEC).map_err(std::io::Error::from)?;
        let file = File::from(fd);
        file.write_all_at(&[&MAGIC[..], &FORMAT.to_le_bytes()].concat(), 0)?;
        let mut log = Log { file, end: HEAD_BYTES, begun: 0, waiting: Vec::new() };
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
    pub(super) fn new(snapshot: &state::Checkpoint, keep: Keep) -> Result<Journal> {
        let log = Log::begin(snapshot, &keep)?;
        Ok(Journal { keep, log: Mutex::new(log) })
    }

    /// A node was given to the kernel for the first time.
    pub(super) fn node(&self, inode: &Inode) {
        self.log.lock().message(NODE, &wire(inode));
    }

    /// Given once more.
    pub(super) fn seen(&self, id: u64) {
        let mut log = self.log.lock();
        log.waiting.push(SEEN);
        log.waiting.extend(id.to_le_bytes());
    }

    /// The kernel forgot look-ups.
    pub(super) fn forgotten(&self, id: u64, count: u64) {
        let mut log = self.log.lock();
        log.waiting.push(FORGOTTEN);
        log.waiting.extend(id.to_le_bytes());
        log.waiting.extend(count.to_le_bytes());
        if log.waiting.len() > WAITING_MAX
            && let Err(e) = log.write()
        {
            tracing::error!(error = %e, "a successor of this process would not know what the kernel has forgotten");
        }
    }

    /// The origin has another version now.
    pub(super) fn stale(&self, id: u64) {
        let mut log = self.log.lock();
        log.waiting.push(STALE);
        log.waiting.extend(id.to_le_bytes());
    }

    /// Brings everything into the file, for an answer that is about to be sent. True: it has become long, and is to be made anew.
    ///
    /// # Errors
    /// Those of the file: want of memory.
    pub(super) fn commit(&self) -> Result<bool> {
        let mut log = self.log.lock();
        log.write()?;
        Ok(log.end > LENGTH_MIN.max(3 * log.begun))
    }

    /// Goes on in a new file that begins with `snapshot`. Nothing may change the namespace meanwhile.
    ///
    /// # Errors
    /// As for [`Journal::new`]; the old one is used on.
    pub(super) fn renew(&self, snapshot: &state::Checkpoint) -> Result<()> {
        let mut log = self.log.lock();
        *log = Log::begin(snapshot, &self.keep)?;
        Ok(())
    }
}

/// A node as it is written down.
pub(super) fn wire(inode: &Inode) -> state::Inode {
    use std::sync::atomic::Ordering;
    let (dentry, now) = (inode.dentry(), inode.now());
    state::Inode {
        id: inode.id,
        parent: dentry.as_ref().map_or(0, |d| d.parent.id),
        name: dentry.map_or(bytes::Bytes::new(), |d| d.name),
        node: Some(convert::node_to_wire(&efc_common::node::Node {
            locator: now.locator.clone(),
            version: now.version.clone(),
            attr: now.attr.clone(),
        })),
        lookups: inode.lookups.load(Ordering::Acquire),
        stale: inode.stale.load(Ordering::Acquire),
    }
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
    if take_u32(&mut rest)? != FORMAT {
        return Err(bad("unknown format"));
    }
    // Look-ups are counted apart: one that was counted before another was forgotten may be written after it.
    let mut nodes: BTreeMap<u64, (state::Inode, i128)> = BTreeMap::new();
    let mut next_id = 0;
    let mut begun = None;
    while let Some(mut records) = take_frame(&mut rest)? {
        while let Some((kind, after)) = records.split_first() {
            records = after;
            match *kind {
                SNAPSHOT if begun.is_none() => {
                    let c = state::Checkpoint::decode(take_message(&mut records)?)
                        .map_err(|e| bad("snapshot").caused_by(e))?;
                    next_id = c.next_id;
                    begun = Some(c.format);
                    nodes.extend(c.inodes.into_iter().map(|i| (i.id, (i.clone(), i.lookups.into()))));
                }
                NODE => {
                    let node =
                        state::Inode::decode(take_message(&mut records)?).map_err(|e| bad("node").caused_by(e))?;
                    next_id = next_id.max(node.id.checked_add(1).ok_or_else(|| bad("impossible node"))?);
                    nodes.insert(node.id, (node, 1));
                }
                SEEN => {
                    let id = take_u64(&mut records)?;
                    nodes.get_mut(&id).ok_or_else(|| bad("unknown node was seen"))?.1 += 1;
                }
                FORGOTTEN => {
                    let (id, count) = (take_u64(&mut records)?, take_u64(&mut records)?);
                    nodes.get_mut(&id).ok_or_else(|| bad("unknown node was forgotten"))?.1 -= i128::from(count);
                }
                STALE => {
                    let id = take_u64(&mut records)?;
                    nodes.get_mut(&id).ok_or_else(|| bad("unknown node is stale"))?.0.stale = true;
                }
                _ => return Err(bad("unknown record")),
            }
        }
    }
    let format = begun.ok_or_else(|| bad("has no snapshot"))?;
    let held = nodes.into_values().filter(|(_, lookups)| *lookups > 0);
    let inodes = held.map(|(i, lookups)| state::Inode { lookups: u64::try_from(lookups).unwrap_or(u64::MAX), ..i });
    Ok(state::Checkpoint { format, next_id, inodes: inodes.collect() })
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

fn take_message<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8]> {
    let length = take_u32(rest)? as usize;
    let (message, after) = rest.split_at_checked(length).ok_or_else(|| bad("record is cut off"))?;
    *rest = after;
    Ok(message)
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
    use super::super::tests::{dir, file, seen};
    use super::super::{Namespace, Nodes};
    use super::*;
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
            let mut ns = Namespace::new(dir(""), Nodes::Versions);
            let (keep, kept) = holder();
            ns.write_down(keep).expect("journal");
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
                    ns.renew_journal().expect("renew");
                }
            }
            ns.commit().expect("commit");
            let whole = of(&kept);
            let back = Namespace::restore(&parse(&whole).expect("parse"), Nodes::Versions).expect("restore");
            prop_assert_eq!(back.len(), ns.len());
            for (a, b) in ns.all().iter().zip(back.all()) {
                let (a, b) = (wire(a), wire(&b));
                prop_assert_eq!((a.id, a.lookups, a.stale, a.node), (b.id, b.lookups, b.stale, b.node));
            }
            // Cut anywhere in its end: still readable, if the snapshot is whole.
            ns.intern(&ns.root(), &Bytes::from_static(b"late"), &file("late", "1"), seen());
            ns.commit().expect("commit");
            let longer = of(&kept);
            let cut = longer.len() - cut.min(longer.len() - whole.len() - 1) - 1;
            if longer.starts_with(&whole) {
                prop_assert_eq!(parse(&longer[..cut]).expect("cut off").inodes.len(), ns.all().len() - 1);
            }
        }

        #[test]
        fn garbage_is_refused_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes);
            let _ = parse(&[&MAGIC[..], &FORMAT.to_le_bytes(), &bytes].concat());
        }
    }

    #[test]
    fn children_of_what_was_forgotten_stay() {
        let mut ns = Namespace::new(dir(""), Nodes::Versions);
        let (keep, kept) = holder();
        ns.write_down(keep).expect("journal");
        let d = ns.intern(&ns.root(), &Bytes::from_static(b"d"), &dir("d/"), seen()).0;
        let f = ns.intern(&d, &Bytes::from_static(b"f"), &file("d/f", "1"), seen()).0;
        ns.forget(d.id, 1);
        ns.commit().expect("commit");
        let back = Namespace::restore(&parse(&of(&kept)).expect("parse"), Nodes::Versions).expect("restore");
        assert_eq!(back.get(f.id).expect("known").locator(), f.locator());
        // And what it hands on can be taken up again.
        assert!(Namespace::restore(&back.checkpoint(), Nodes::Versions).expect("restore").get(f.id).is_some());
    }
}
