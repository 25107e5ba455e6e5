//! One read: a range of one block, from its first owner or, from wherever that one stopped, from its second.

use super::pool::Remote;
use super::{
    Chunk, FileRef, Inner, ReadFlags, Tier, answer_bytes, count_error, next_owner_may_help, no_worker, wire_read,
};
use crate::wire::{Answers, Connection, unexpected};
use efc_common::block::widen;
use efc_common::checksum;
use efc_common::{Error, Kind, Result};
use efc_proto::data;
use efc_proto::frame::{Frame, Message};
use efc_proto::status::from_fail;
use std::ops::Range;
use std::sync::Arc;
use std::vec;
use tokio::time::Instant;

/// Bytes of one read, in order, as they arrive.
pub struct ReadStream {
    peers: Arc<Inner>,
    file: FileRef,
    /// What is still to be handed out.
    left: Range<u64>,
    flags: ReadFlags,
    /// Places in shared memory will do, until one of them did not.
    by_place: bool,
    deadline: Instant,
    owners: Option<vec::IntoIter<Arc<Remote>>>,
    current: Option<Current>,
    last_error: Option<Error>,
}

struct Current {
    remote: Arc<Remote>,
    conn: Arc<Connection>,
    answers: Answers,
    /// A connection of its own was tried already.
    fresh: bool,
    /// What the worker has still to send.
    wide: Range<u64>,
}

impl ReadStream {
    pub(super) fn new(peers: Arc<Inner>, file: FileRef, range: Range<u64>, flags: ReadFlags) -> Self {
        let deadline = Instant::now() + peers.options.deadline;
        let (owners, current, last_error) = (None, None, None);
        ReadStream { peers, file, left: range, flags, by_place: true, deadline, owners, current, last_error }
    }

    /// The next run of bytes; `None` after the last.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] when no worker can answer (the caller may ask the origin for what is left), [`Kind::Timeout`] at the
    /// deadline, else what the origin says of the file.
    pub async fn next(&mut self) -> Result<Option<Chunk>> {
        while !self.left.is_empty() {
            let mut at = match self.current.take() {
                Some(c) => c,
                None => self.ask_next_owner().await?,
            };
            let frame = self.peers.next_frame(&at.conn, &mut at.answers).await;
            let chunk = match frame {
                Ok(Frame { message: Message::Data(d), .. }) if d.placed > 0 => self.read_shared(&d, &mut at),
                other => other.and_then(|f| verify(f, &mut at.wide)).map(Some),
            };
            match chunk {
                Ok(None) => {
                    // Evicted between the answer and our read: have the rest sent.
                    self.by_place = false;
                    match self.ask(at.remote, false).await {
                        Ok(c) => self.current = Some(c),
                        Err(e) => self.note(e)?,
                    }
                }
                Ok(Some(chunk)) => {
                    let cut = self.cut(chunk, at.remote.local());
                    self.current = Some(at);
                    if cut.is_some() {
                        return Ok(cut);
                    }
                }
                Err(e) => self.give_up_on(at, e).await?,
            }
        }
        Ok(None)
    }

    /// What of the range is still to come; after an error this is what the caller must get elsewhere.
    pub fn remaining(&self) -> Range<u64> {
        self.left.clone()
    }

    /// All that is left, in one piece of memory per frame.
    ///
    /// # Errors
    /// As [`ReadStream::next`].
    pub async fn collect(mut self) -> Result<Vec<Chunk>> {
        let mut out = Vec::new();
        while let Some(c) = self.next().await? {
            out.push(c);
        }
        Ok(out)
    }

    async fn ask_next_owner(&mut self) -> Result<Current> {
        loop {
            let owners = self.owners.get_or_insert_with(|| {
                let key = self.peers.block_key(&self.file, self.left.start);
                self.peers.owners(key).into_iter()
            });
            let Some(remote) = owners.next() else { return Err(no_worker(self.last_error.take())) };
            match self.ask(remote, false).await {
                Ok(c) => return Ok(c),
                Err(e) => self.note(e)?,
            }
        }
    }

    async fn ask(&self, remote: Arc<Remote>, mut fresh: bool) -> Result<Current> {
        let read = wire_read(&self.file, &self.left, self.flags);
        let message = data::Read { by_place: self.by_place, ..read }.into();
        let bulk_max = answer_bytes(&self.file, &self.left);
        let (conn, answers) = self.peers.send(&remote, &message, self.deadline, bulk_max, &mut fresh).await?;
        Ok(Current { remote, conn, answers, fresh, wide: widen(self.left.clone(), self.file.size) })
    }

    /// After a failure: the same worker on a new connection if the pooled one was stale, else the next owner; or the error itself
    /// if no worker would say anything else.
    async fn give_up_on(&mut self, at: Current, e: Error) -> Result<()> {
        if at.conn.broken().is_some() {
            if !at.fresh {
                match self.ask(at.remote, true).await {
                    Ok(c) => {
                        self.current = Some(c);
                        return Ok(());
                    }
                    Err(e) => return self.note(e),
                }
            }
            at.remote.trip(&e);
        }
        self.note(e)
    }

    fn note(&mut self, e: Error) -> Result<()> {
        count_error(&e);
        if !next_owner_may_help(&e) {
            return Err(e);
        }
        if e.is(Kind::Corrupt) {
            tracing::warn!(error = %e, "bytes of a cache worker failed their checksum; asking the next owner");
        }
        self.last_error = Some(e);
        Ok(())
    }

    /// Reads the places that a worker on this host named, and remembers them. `None` if other bytes have taken one.
    fn read_shared(&self, d: &data::Data, at: &mut Current) -> Result<Option<Chunk>> {
        let end = d.offset.saturating_add(d.placed as u64);
        check_run(d, end, &at.wide)?;
        if !self.by_place {
            return Err(Error::new(Kind::Corrupt, "worker named places where it was asked for bytes"));
        }
        let Some(shared) = at.conn.shared() else { return Ok(None) };
        let Some(bytes) = shared.read_run(&d.places, d.offset, d.placed as usize)? else { return Ok(None) };
        self.peers.remember(&self.file, d.offset, &d.places, &at.conn);
        at.wide.start = end;
        Ok(Some(Chunk { offset: d.offset, bytes, tier: tier(d), local: false }))
    }

    /// Cuts a chunk to what is still wanted.
    fn cut(&mut self, mut chunk: Chunk, local: bool) -> Option<Chunk> {
        let end = (chunk.offset + chunk.bytes.len() as u64).min(self.left.end);
        if end <= self.left.start {
            return None;
        }
        let from = (self.left.start - chunk.offset) as usize;
        chunk.bytes = chunk.bytes.slice(from..(end - chunk.offset) as usize);
        chunk.offset = self.left.start;
        chunk.local = local;
        self.left.start = end;
        Some(chunk)
    }
}

/// Checks one answer against what was asked for and against its checksums, and takes it off `wide`.
pub(super) fn verify(frame: Frame, wide: &mut Range<u64>) -> Result<Chunk> {
    let d = match frame.message {
        Message::Data(d) => d,
        Message::Fail(f) => return Err(from_fail(&f)),
        m => return Err(unexpected(&Some(m))),
    };
    let end = d.offset.saturating_add(frame.bulk.len() as u64);
    check_run(&d, end, wide)?;
    checksum::verify(&frame.bulk, &d.sums).map_err(|e| e.with("offset", d.offset))?;
    wide.start = end;
    Ok(Chunk { offset: d.offset, bytes: frame.bulk, tier: tier(&d), local: false })
}

/// Is the run `d.offset..end` what must come next of `wide`?
fn check_run(d: &data::Data, end: u64, wide: &Range<u64>) -> Result<()> {
    if d.offset != wide.start || end == d.offset || end > wide.end || (d.last && end != wide.end) {
        return Err(Error::new(Kind::Corrupt, "worker sent another range than it was asked for")
            .with("offset", d.offset)
            .with("end", end)
            .with("wanted", format!("{}..{}", wide.start, wide.end)));
    }
    Ok(())
}

fn tier(d: &data::Data) -> Tier {
    match d.tier() {
        data::Tier::Disk => Tier::Disk,
        data::Tier::Origin => Tier::Origin,
        data::Tier::Memory | data::Tier::Unknown => Tier::Memory,
    }
}
