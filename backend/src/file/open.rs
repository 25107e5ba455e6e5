//! An open file of a `file` source: one descriptor, which serves it whatever becomes of its name.
//!
//! A caller may give a call up while its thread still sits in the kernel (a hung mount below us), and send it again. Such a late call must
//! not undo a younger one nor swallow an error: calls that change the file take turns, which the kernel makes them do anyway, and so do calls
//! of sync; each holds its turn to its end, waited for or not. The kernel tells a lost write once; what a sync nobody waits for was told is
//! kept for the next one.

use super::change::apply;
use super::{blocking, error, node, read_full};
use crate::tree::{Allocate, Change, OpenFile};
use async_trait::async_trait;
use bytes::Bytes;
use efc_common::node::Node;
use efc_common::{Error, Kind, Result};
use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::{Errno, retry_on_intr};
use std::any::Any;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use tokio::sync::{Mutex as Turn, Semaphore};

/// Most bytes one copy moves: the caller asks again for the rest, and no call outlasts its deadline.
const COPY_BYTES: u64 = 64 * 1024 * 1024;

/// An open file.
pub(super) struct Opened {
    fd: Arc<OwnedFd>,
    locator: Bytes,
    permits: Arc<Semaphore>,
    /// Held by what changes the file.
    changing: Arc<Turn<()>>,
    /// Held by what syncs it.
    syncing: Arc<Turn<()>>,
    /// An error of sync that nobody has been told.
    lost: Arc<Mutex<Option<Error>>>,
}

impl Opened {
    pub(super) fn new(fd: OwnedFd, locator: Bytes, permits: Arc<Semaphore>) -> Opened {
        Opened {
            fd: Arc::new(fd),
            locator,
            permits,
            changing: Arc::default(),
            syncing: Arc::default(),
            lost: Arc::default(),
        }
    }

    /// Runs blocking work.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&OwnedFd, &Bytes) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (fd, locator) = (self.fd.clone(), self.locator.clone());
        blocking(&self.permits, move || work(&fd, &locator)).await
    }

    /// Runs blocking work when its turn comes, and then looks at the file.
    async fn take_turn<T: Send + 'static>(
        &self,
        turns: &Arc<Turn<()>>,
        work: impl FnOnce(&OwnedFd, &Bytes) -> Result<T> + Send + 'static,
    ) -> Result<(T, Node)> {
        let turn = turns.clone().lock_owned().await;
        self.run(move |fd, locator| {
            let _turn = turn;
            let done = work(fd, locator)?;
            Ok((done, look(fd, locator)?))
        })
        .await
    }
}

#[async_trait]
impl OpenFile for Opened {
    async fn read(&self, range: Range<u64>) -> Result<Bytes> {
        self.run(move |fd, locator| {
            let size = rustix::fs::fstat(fd).map_err(|e| error(e, locator))?.st_size as u64;
            let end = range.end.min(size);
            if range.start >= end {
                return Ok(Bytes::new());
            }
            read_full(fd, locator, range.start..end).map(Bytes::from)
        })
        .await
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<Node> {
        let write = move |fd: &OwnedFd, locator: &Bytes| {
            let mut done = 0;
            while done < data.len() {
                match rustix::io::pwrite(fd, &data[done..], offset + done as u64) {
                    Ok(0) => return Err(Error::new(Kind::Io, "the file takes no more bytes")),
                    Ok(n) => done += n,
                    Err(Errno::INTR) => {}
                    Err(e) => return Err(error(e, locator)),
                }
            }
            Ok(())
        };
        Ok(self.take_turn(&self.changing, write).await?.1)
    }

    async fn sync(&self, data_only: bool) -> Result<Node> {
        let lost = self.lost.clone();
        let sync = move |fd: &OwnedFd, locator: &Bytes| {
            let done = if data_only { rustix::fs::fdatasync(fd) } else { rustix::fs::fsync(fd) };
            if let Err(e) = done {
                *lost.lock() = Some(error(e, locator));
            }
            Ok(())
        };
        let (_, node) = self.take_turn(&self.syncing, sync).await?;
        match self.lost.lock().take() {
            Some(e) => Err(e),
            None => Ok(node),
        }
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.fd.as_fd())
    }

    async fn attr(&self) -> Result<Node> {
        self.run(look).await
    }

    async fn set_attr(&self, change: &Change) -> Result<Node> {
        let change = *change;
        let set = move |fd: &OwnedFd, locator: &Bytes| apply(fd.as_fd(), &change, locator).map(drop);
        Ok(self.take_turn(&self.changing, set).await?.1)
    }

    async fn allocate(&self, range: Range<u64>, how: Allocate) -> Result<Node> {
        let keep = |keep| if keep { FallocateFlags::KEEP_SIZE } else { FallocateFlags::empty() };
        let flags = match how {
            Allocate::Reserve { keep_size } => keep(keep_size),
            Allocate::PunchHole => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            Allocate::Zero { keep_size } => FallocateFlags::ZERO_RANGE | keep(keep_size),
        };
        let Some(len) = range.end.checked_sub(range.start) else {
            return Err(Error::new(Kind::Invalid, "a range that ends before it begins"));
        };
        let allocate = move |fd: &OwnedFd, locator: &Bytes| {
            retry_on_intr(|| rustix::fs::fallocate(fd, flags, range.start, len)).map_err(|e| error(e, locator))
        };
        Ok(self.take_turn(&self.changing, allocate).await?.1)
    }

    async fn copy(&self, source: &dyn OpenFile, from: Range<u64>, offset: u64) -> Result<(u64, Node)> {
        let Some(source) = source.as_any().downcast_ref::<Opened>() else {
            return Err(Error::new(Kind::Unsupported, "the files are of different origins"));
        };
        let source = source.fd.clone();
        let copy = move |fd: &OwnedFd, locator: &Bytes| {
            let (mut at, mut to) = (from.start, offset);
            let end = from.end.min(from.start.saturating_add(COPY_BYTES));
            while at < end {
                let len = (end - at) as usize;
                // It moves `at` and `to` along.
                match rustix::fs::copy_file_range(&source, Some(&mut at), fd, Some(&mut to), len) {
                    Ok(0) => break,
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(Errno::XDEV) => {
                        return Err(Error::new(Kind::Unsupported, "the files are in different file systems"));
                    }
                    Err(_) if at > from.start => break,
                    Err(e) => return Err(error(e, locator)),
                }
            }
            Ok(at - from.start)
        };
        self.take_turn(&self.changing, copy).await
    }

    async fn seek(&self, offset: u64, hole: bool) -> Result<u64> {
        self.run(move |fd, locator| {
            let to = if hole { SeekFrom::Hole(offset) } else { SeekFrom::Data(offset) };
            rustix::fs::seek(fd, to).map_err(|e| match e {
                Errno::NXIO => Error::new(Kind::NotFound, "there is none beyond"),
                e => error(e, locator),
            })
        })
        .await
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn look(fd: &OwnedFd, locator: &Bytes) -> Result<Node> {
    let stat = rustix::fs::fstat(fd).map_err(|e| error(e, locator))?;
    Ok(node(locator.clone(), &stat))
}
