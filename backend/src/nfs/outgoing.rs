//! Calls on their way to a socket: frames gather in one buffer, payloads stay the slices they are, and everything leaves by vectored writes.

use bytes::{Buf, Bytes, BytesMut};
use std::collections::VecDeque;
use std::io::IoSlice;

/// Bytes to send, in order. None of `parts` is empty.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    parts: VecDeque<Bytes>,
    /// What comes after the parts.
    tail: BytesMut,
    len: usize,
}

impl Outgoing {
    /// Adds a frame, and the payload behind it with its padding.
    pub(super) fn put(&mut self, frame: &[u8], payload: Bytes) {
        self.tail.extend_from_slice(frame);
        self.len += frame.len();
        if payload.is_empty() {
            return;
        }
        if !self.tail.is_empty() {
            self.parts.push_back(self.tail.split().freeze());
        }
        let padded = payload.len().next_multiple_of(4);
        self.tail.extend_from_slice(&[0; 3][..padded - payload.len()]);
        self.parts.push_back(payload);
        self.len += padded;
    }
}

impl Buf for Outgoing {
    fn remaining(&self) -> usize {
        self.len
    }

    fn chunk(&self) -> &[u8] {
        self.parts.front().map_or(&self.tail[..], |part| &part[..])
    }

    fn advance(&mut self, mut n: usize) {
        self.len -= n;
        while n > 0 {
            let Some(part) = self.parts.front_mut() else { return self.tail.advance(n) };
            let step = n.min(part.len());
            part.advance(step);
            n -= step;
            if part.is_empty() {
                self.parts.pop_front();
            }
        }
    }

    fn chunks_vectored<'a>(&'a self, into: &mut [IoSlice<'a>]) -> usize {
        let all = self.parts.iter().map(|part| &part[..]).chain([&self.tail[..]]).filter(|chunk| !chunk.is_empty());
        let mut n = 0;
        for (slot, chunk) in into.iter_mut().zip(all) {
            *slot = IoSlice::new(chunk);
            n += 1;
        }
        n
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_and_payloads_keep_their_order_and_payloads_their_place() {
        let payload = Bytes::from_static(b"payload");
        let mut out = Outgoing::default();
        out.put(b"one.", Bytes::new());
        out.put(b"two.", payload.clone());
        out.put(b"more", Bytes::new());
        let want = b"one.two.payload\0more";
        assert_eq!(out.remaining(), want.len());
        let mut slices = [IoSlice::new(&[]); 8];
        assert_eq!(out.chunks_vectored(&mut slices), 3);
        assert_eq!(slices[1].as_ptr(), payload.as_ptr());
        let mut sent = Vec::new();
        // Steps across every border.
        while out.has_remaining() {
            let n = out.remaining().min(5);
            let whole: Vec<u8> = {
                let mut slices = [IoSlice::new(&[]); 8];
                let n = out.chunks_vectored(&mut slices);
                slices[..n].iter().flat_map(|s| s.to_vec()).collect()
            };
            sent.extend_from_slice(&whole[..n]);
            out.advance(n);
        }
        assert_eq!(sent, want);
    }
}
