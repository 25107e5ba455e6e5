//! The body of a request: pieces that are sent in order without being joined, and a clock that tells whether they get on.
//!
//! What must stay true: a payload byte is copied by the kernel (and by TLS) only. hyper queues the pieces it takes from here and hands them to
//! `writev` as they are, because its sockets write vectored; `tests::hyper_writes_our_own_memory` holds it to that.

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::time::Instant;

/// Longest frame: small enough that progress shows on a slow line, large enough that `writev` gets its worth.
const FRAME_BYTES: usize = 256 << 10;

/// When a request last got on: began, or had a piece of its body taken.
#[derive(Debug, Clone)]
pub(crate) struct Progress(Arc<Mutex<Instant>>);

impl Progress {
    fn now() -> Progress {
        Progress(Arc::new(Mutex::new(Instant::now())))
    }

    fn touch(&self) {
        *self.0.lock() = Instant::now();
    }

    /// The last time.
    pub(crate) fn last(&self) -> Instant {
        *self.0.lock()
    }
}

/// See the module.
pub(crate) struct Pieces {
    pieces: VecDeque<Bytes>,
    left: u64,
    progress: Progress,
}

impl Pieces {
    /// A body of these pieces, whose clock starts now. No piece is copied.
    pub(crate) fn new(pieces: &[Bytes]) -> Pieces {
        let pieces: VecDeque<Bytes> = pieces.iter().filter(|p| !p.is_empty()).cloned().collect();
        Pieces { left: total(pieces.iter()), pieces, progress: Progress::now() }
    }

    /// Its clock.
    pub(crate) fn progress(&self) -> Progress {
        self.progress.clone()
    }
}

/// Bytes of all pieces.
pub(crate) fn total<'a>(pieces: impl IntoIterator<Item = &'a Bytes>) -> u64 {
    pieces.into_iter().map(|p| p.len() as u64).sum()
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<Bytes>, Infallible>>> {
        let Some(mut front) = self.pieces.pop_front() else { return Poll::Ready(None) };
        if front.len() > FRAME_BYTES {
            let rest = front.split_off(FRAME_BYTES);
            self.pieces.push_front(rest);
        }
        self.left -= front.len() as u64;
        self.progress.touch();
        Poll::Ready(Some(Ok(Frame::data(front))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper_util::rt::TokioIo;
    use std::io::{IoSlice, Result};
    use std::ops::Range;
    use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

    /// Where the bytes lay that a socket was given, and how many of them.
    type Written = Arc<Mutex<Vec<Range<usize>>>>;

    /// A socket that answers once a whole request was written to it, and remembers the addresses it was handed.
    struct Recorder {
        written: Written,
        expect: usize,
        answered: bool,
    }

    impl AsyncRead for Recorder {
        fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<Result<()>> {
            if self.answered || self.written.lock().iter().map(Range::len).sum::<usize>() < self.expect {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            self.answered = true;
            buf.put_slice(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Recorder {
        fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<Result<usize>> {
            self.poll_write_vectored(cx, &[IoSlice::new(buf)])
        }

        fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_write_vectored(
            self: Pin<&mut Self>,
            _cx: &mut Context<'_>,
            bufs: &[IoSlice<'_>],
        ) -> Poll<Result<usize>> {
            let mut written = self.written.lock();
            for b in bufs {
                let start = b.as_ptr() as usize;
                written.push(start..start + b.len());
            }
            Poll::Ready(Ok(bufs.iter().map(|b| b.len()).sum()))
        }

        fn is_write_vectored(&self) -> bool {
            true
        }
    }

    #[tokio::test]
    async fn hyper_writes_our_own_memory() {
        let pieces: Vec<Bytes> = [1usize, 4096, 0, 300_000, 5 << 20, 77].iter().map(|n| vec![7u8; *n].into()).collect();
        let size = total(&pieces);
        let written = Written::default();
        let io = Recorder { written: Arc::clone(&written), expect: size as usize, answered: false };
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await.expect("hands");
        let request = http::Request::put("/k").body(Pieces::new(&pieces)).expect("request");
        tokio::select! {
            answer = sender.send_request(request) => assert_eq!(answer.expect("answer").status(), 200),
            _ = connection => panic!("the connection ended"),
        }
        let written = written.lock();
        let head: usize = written.iter().map(Range::len).sum::<usize>() - size as usize;
        assert!(head < 200, "only the request's head is not ours: {head}");
        let ours = |w: &Range<usize>| {
            pieces.iter().any(|p| {
                let start = p.as_ptr() as usize;
                start <= w.start && w.end <= start + p.len()
            })
        };
        let direct: usize = written.iter().filter(|w| ours(w)).map(Range::len).sum();
        assert_eq!(direct as u64, size, "every byte of the payload was written from where the caller put it");
    }
}
