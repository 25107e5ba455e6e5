// What must hold for any bytes a peer may send. Included by the fuzz target beside it and by proto/tests/frame_bytes.rs.

use efc_proto::frame::{self, BULK_BYTES_MAX, HEADER_BYTES, META_BYTES_MAX};
use std::pin::pin;
use std::task::{Context, Poll, Waker};

/// Runs a future that never waits: its input is a slice.
fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(t) => t,
        Poll::Pending => panic!("reading a slice never waits"),
    }
}

/// Reads frames until the bytes end or are refused.
pub(crate) fn any_bytes(bytes: &[u8]) {
    let mut rest = bytes;
    loop {
        let before = rest;
        match now(frame::read_frame(&mut rest)) {
            Ok(None) => {
                assert!(before.is_empty(), "a clean end is the end of the bytes");
                return;
            }
            Err(_) => break,
            Ok(Some(f)) => {
                let read = before.len() - rest.len();
                assert!(read >= HEADER_BYTES && f.bulk.len() <= BULK_BYTES_MAX as usize);
                assert!(read - HEADER_BYTES - f.bulk.len() <= META_BYTES_MAX as usize);
                // What was understood can be said again, and is then understood as the same.
                let head =
                    frame::encode_head(f.request, f.deadline_ms, &f.message, f.bulk.len()).expect("it came in a frame");
                let again = [&head[..], &f.bulk[..]].concat();
                assert_eq!(now(frame::read_frame(&mut again.as_slice())).expect("ours").expect("whole"), f);
            }
        }
    }
    // A reader that allows no bulk believes no more than the other one, and allocates nothing for it.
    let mut rest = bytes;
    while let Ok(Some(head)) = now(frame::read_head(&mut rest, 0)) {
        assert_eq!(head.bulk_len, 0);
    }
}
