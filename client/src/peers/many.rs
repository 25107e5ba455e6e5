//! Many small reads at once: grouped by first owner, one frame out per group. An item whose group fails is read by itself, which
//! brings it to its second owner.

use super::pool::Remote;
use super::read::verify;
use super::{Chunk, FileRef, Inner, ReadFlags, ReadStream, answer_bytes, check_range, next_owner_may_help, wire_read};
use crate::wire::{Answers, Connection, unexpected};
use efc_common::block::widen;
use efc_common::{Error, Kind, Result};
use efc_proto::data;
use efc_proto::frame::{Frame, ITEMS_MAX, META_BYTES_MAX, Message};
use efc_proto::status::from_fail;
use futures::StreamExt;
use futures::stream::{BoxStream, SelectAll, select_all, unfold};
use prost::Message as _;
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use tokio::time::Instant;

/// One item of [`super::Peers::read_many`].
#[derive(Debug, Clone)]
pub struct ReadItem {
    /// The file.
    pub file: FileRef,
    /// What of it: within one block.
    pub range: Range<u64>,
}

/// Results of many reads: (position in the list asked for, its bytes), in any order, each exactly once.
pub struct ManyStream {
    groups: SelectAll<BoxStream<'static, (usize, Result<Vec<Chunk>>)>>,
}

impl ManyStream {
    pub(super) fn new(peers: Arc<Inner>, items: Vec<ReadItem>, flags: ReadFlags) -> Self {
        let mut groups: HashMap<usize, (Arc<Remote>, Vec<Group>)> = HashMap::new();
        let mut alone = Vec::new();
        for (at, item) in items.into_iter().enumerate() {
            let owner = match check_range(&item.file, &item.range) {
                // `alone` answers it with the same error.
                Err(_) => None,
                Ok(()) => peers.owners(peers.block_key(&item.file, item.range.start)).into_iter().next(),
            };
            match owner {
                None => alone.push((at, item)),
                Some(remote) => {
                    let of = &mut groups.entry(Arc::as_ptr(&remote) as usize).or_insert((remote, Vec::new())).1;
                    let read = wire_read(&item.file, &item.range, flags);
                    let meta = read.encoded_len() + 8;
                    match of.last_mut() {
                        Some(g) if g.items.len() < ITEMS_MAX && g.meta + meta <= META_BYTES_MAX as usize => {
                            g.push(at, item, read, meta);
                        }
                        _ => {
                            let mut g = Group::default();
                            g.push(at, item, read, meta);
                            of.push(g);
                        }
                    }
                }
            }
        }
        let batches = groups.into_values().flat_map(|(remote, of)| of.into_iter().map(move |g| (remote.clone(), g)));
        let mut streams: Vec<_> =
            batches.map(|(remote, g)| Batch::new(peers.clone(), remote, g, flags).stream()).collect();
        if !alone.is_empty() {
            streams.push(Batch::alone(peers, alone, flags).stream());
        }
        ManyStream { groups: select_all(streams) }
    }

    /// The next result; `None` after the last.
    pub async fn next(&mut self) -> Option<(usize, Result<Vec<Chunk>>)> {
        self.groups.next().await
    }
}

#[derive(Default)]
struct Group {
    items: Vec<(usize, ReadItem)>,
    reads: Vec<data::Read>,
    meta: usize,
}

impl Group {
    fn push(&mut self, at: usize, item: ReadItem, read: data::Read, meta: usize) {
        self.items.push((at, item));
        self.reads.push(read);
        self.meta += meta;
    }
}

/// An item under way.
struct Pending {
    at: usize,
    item: ReadItem,
    wide: Range<u64>,
    chunks: Vec<Chunk>,
}

/// One group and what became of it.
struct Batch {
    peers: Arc<Inner>,
    flags: ReadFlags,
    remote: Option<Arc<Remote>>,
    reads: Vec<data::Read>,
    sent: Option<(Arc<Connection>, Answers)>,
    /// By wire item number.
    pending: Vec<Option<Pending>>,
    waiting: usize,
    /// To be read one by one.
    alone: VecDeque<(usize, ReadItem)>,
}

impl Batch {
    fn new(peers: Arc<Inner>, remote: Arc<Remote>, group: Group, flags: ReadFlags) -> Self {
        let pending: Vec<_> = group
            .items
            .into_iter()
            .map(|(at, item)| {
                let wide = widen(item.range.clone(), item.file.size);
                Some(Pending { at, item, wide, chunks: Vec::new() })
            })
            .collect();
        let waiting = pending.len();
        let alone = VecDeque::new();
        Batch { peers, flags, remote: Some(remote), reads: group.reads, sent: None, pending, waiting, alone }
    }

    fn alone(peers: Arc<Inner>, items: Vec<(usize, ReadItem)>, flags: ReadFlags) -> Self {
        let alone = items.into();
        Batch { peers, flags, remote: None, reads: Vec::new(), sent: None, pending: Vec::new(), waiting: 0, alone }
    }

    fn stream(self) -> BoxStream<'static, (usize, Result<Vec<Chunk>>)> {
        unfold(self, |mut batch| async move { Some((batch.next().await?, batch)) }).boxed()
    }

    async fn next(&mut self) -> Option<(usize, Result<Vec<Chunk>>)> {
        while self.waiting > 0 {
            match self.next_of_group().await {
                Ok(Some(done)) => return Some(done),
                Ok(None) => {}
                Err(e) => {
                    tracing::debug!(error = %e, items = self.waiting, "batch read failed; reading its items one by one");
                    self.waiting = 0;
                    self.sent = None;
                    let left = self.pending.iter_mut().filter_map(Option::take).map(|p| (p.at, p.item));
                    self.alone.extend(left);
                }
            }
        }
        let (at, item) = self.alone.pop_front()?;
        Some((at, self.read_alone(item).await))
    }

    async fn read_alone(&self, item: ReadItem) -> Result<Vec<Chunk>> {
        check_range(&item.file, &item.range)?;
        ReadStream::new(self.peers.clone(), item.file, item.range, self.flags).collect().await
    }

    /// One more frame of the group's answer: the result of an item if that ended it. An error means the rest of the group.
    async fn next_of_group(&mut self) -> Result<Option<(usize, Result<Vec<Chunk>>)>> {
        let (conn, answers) = match &mut self.sent {
            Some(s) => s,
            None => {
                let Some(remote) = &self.remote else {
                    return Err(Error::new(Kind::Unavailable, "no owner"));
                };
                let bulk_max = self.pending.iter().flatten().map(|p| answer_bytes(&p.item.file, &p.item.range)).sum();
                let message = data::ReadMany { items: std::mem::take(&mut self.reads) }.into();
                let deadline = Instant::now() + self.peers.options.deadline;
                let sent = self.peers.send(remote, &message, deadline, bulk_max, &mut false).await?;
                self.sent.insert(sent)
            }
        };
        let frame = self.peers.next_frame(conn, answers).await?;
        self.take(frame)
    }

    fn take(&mut self, frame: Frame) -> Result<Option<(usize, Result<Vec<Chunk>>)>> {
        let (number, failed) = match &frame.message {
            Message::Data(d) => (d.item as usize, None),
            Message::Fail(f) => (f.item as usize, Some(from_fail(f))),
            _ => return Err(unexpected(&Some(frame.message))),
        };
        let Some(entry) = self.pending.get_mut(number).filter(|p| p.is_some()) else {
            return Err(Error::new(Kind::Corrupt, "worker answered an item that was not asked for"));
        };
        let Some(p) = entry else { return Ok(None) };
        let outcome = match failed {
            Some(e) => Err(e),
            None => verify(frame, &mut p.wide),
        };
        match outcome {
            Ok(chunk) => {
                let ended = p.wide.is_empty();
                let from = p.item.range.start.max(chunk.offset);
                let to = p.item.range.end.min(chunk.offset + chunk.bytes.len() as u64);
                if from < to {
                    let bytes = chunk.bytes.slice((from - chunk.offset) as usize..(to - chunk.offset) as usize);
                    let local = self.remote.as_ref().is_some_and(|r| r.local());
                    p.chunks.push(Chunk { offset: from, bytes, local, ..chunk });
                }
                if !ended {
                    return Ok(None);
                }
                let done = entry.take().map(|p| (p.at, Ok(p.chunks)));
                self.waiting -= 1;
                Ok(done)
            }
            Err(e) => {
                let p = entry.take();
                self.waiting -= 1;
                super::count_error(&e);
                if next_owner_may_help(&e) {
                    self.alone.extend(p.map(|p| (p.at, p.item)));
                    return Ok(None);
                }
                Ok(p.map(|p| (p.at, Err(e))))
            }
        }
    }
}
