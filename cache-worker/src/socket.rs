//! The sending half of a data-plane socket, TCP or unix: vectored writes, and `sendfile` from a tier's file, so that a hit in memory
//! never passes through user space. Every write must make progress within a limit, or the connection ends: a reader that stops
//! reading may not hold our memory.

use bytes::{Bytes, BytesMut};
use efc_common::limit::Hold;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream, tcp, unix};
use tokio::time::timeout;

use crate::store::Segment;

/// Slices of one system call (`UIO_MAXIOV`).
const SLICES_MAX: usize = 1024;

/// A run of bytes to send.
pub(crate) enum Part {
    /// From memory of this process.
    Bytes(Bytes),
    /// From the file of a tier: `len` bytes from byte `from` of the segment. The guard keeps them in place.
    Stored { segment: Segment, from: u32, len: u32 },
}

/// A frame on its way out, and the budgets its bytes are held from.
pub(crate) struct Outgoing {
    pub(crate) head: BytesMut,
    pub(crate) parts: Vec<Part>,
    pub(crate) _holds: Vec<Arc<Hold>>,
}

/// The sending half.
pub(crate) enum WriteHalf {
    Tcp(tcp::OwnedWriteHalf),
    Unix(unix::OwnedWriteHalf),
}

impl WriteHalf {
    /// Sends frames in order, with as few system calls as their parts allow.
    pub(crate) async fn send(&self, frames: &[Outgoing], stall: Duration) -> io::Result<()> {
        let mut slices: Vec<IoSlice<'_>> = Vec::with_capacity(frames.len() * 2);
        for frame in frames {
            slices.push(IoSlice::new(&frame.head));
            for part in &frame.parts {
                match part {
                    Part::Bytes(b) => slices.push(IoSlice::new(b)),
                    Part::Stored { segment, from, len } => {
                        self.write_all(&mut slices, true, stall).await?;
                        let (fd, start) = segment.file();
                        self.send_file(fd, start + *from as u64, *len as usize, stall).await?;
                    }
                }
            }
        }
        self.write_all(&mut slices, false, stall).await
    }

    /// Sends a small frame whose first byte carries `files` (`SCM_RIGHTS`); only a unix socket can.
    pub(crate) async fn send_files(&self, head: &[u8], files: &[BorrowedFd<'_>], stall: Duration) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let send = |fd: BorrowedFd<'_>| {
            let mut control = SendAncillaryBuffer::new(&mut space);
            control.push(SendAncillaryMessage::ScmRights(files));
            let n = rustix::net::sendmsg(fd, &[IoSlice::new(head)], &mut control, SendFlags::NOSIGNAL);
            n.map_err(io::Error::from)
        };
        let n = within(stall, self.when_writable(send)).await?;
        self.write_all(&mut vec![IoSlice::new(&head[n..])], false, stall).await
    }

    /// Writes `slices` and empties the list. `more`: something follows at once, so a packet need not leave half full.
    async fn write_all(&self, slices: &mut Vec<IoSlice<'_>>, more: bool, stall: Duration) -> io::Result<()> {
        let flags = if more { SendFlags::NOSIGNAL | SendFlags::MORE } else { SendFlags::NOSIGNAL };
        let mut rest = &mut slices[..];
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            let batch = &rest[..rest.len().min(SLICES_MAX)];
            let send = |fd: BorrowedFd<'_>| {
                rustix::net::sendmsg(fd, batch, &mut SendAncillaryBuffer::default(), flags).map_err(io::Error::from)
            };
            let n = within(stall, self.when_writable(send)).await?;
            IoSlice::advance_slices(&mut rest, n);
        }
        slices.clear();
        Ok(())
    }

    async fn send_file(&self, file: BorrowedFd<'_>, mut at: u64, mut left: usize, stall: Duration) -> io::Result<()> {
        while left > 0 {
            let send = |fd: BorrowedFd<'_>| {
                let mut from = at;
                rustix::fs::sendfile(fd, file, Some(&mut from), left).map_err(io::Error::from)
            };
            let n = within(stall, self.when_writable(send)).await?;
            if n == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "cache file ends inside a segment"));
            }
            at += n as u64;
            left -= n;
        }
        Ok(())
    }

    async fn when_writable(&self, mut send: impl FnMut(BorrowedFd<'_>) -> io::Result<usize>) -> io::Result<usize> {
        match self {
            WriteHalf::Tcp(half) => {
                let s: &TcpStream = half.as_ref();
                s.async_io(Interest::WRITABLE, || send(s.as_fd())).await
            }
            WriteHalf::Unix(half) => {
                let s: &UnixStream = half.as_ref();
                s.async_io(Interest::WRITABLE, || send(s.as_fd())).await
            }
        }
    }
}

async fn within(stall: Duration, write: impl Future<Output = io::Result<usize>>) -> io::Result<usize> {
    match timeout(stall, write).await {
        Ok(n) => n,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "peer does not read what it asked for")),
    }
}
