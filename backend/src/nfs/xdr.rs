//! Reads XDR (RFC 4506) out of a reply frame. `nfs3_types` encodes our calls and decodes parts of fixed size; everything with a length in
//! it goes through [`Reader`], because the crate allocates what the peer's length says before it looks whether the bytes are there.
//! Here a length is checked against a bound and against the frame, and opaque data is a slice of the frame, not a copy.

use bytes::{Buf, Bytes};
use efc_common::{Error, Kind, Result};
use nfs3_types::xdr_codec::Unpack;

/// A cursor over one reply.
#[derive(Debug, Clone)]
pub(super) struct Reader(pub(super) Bytes);

/// The error for bytes that are not what the protocol says.
pub(super) fn garbled(what: &str) -> Error {
    Error::new(Kind::Corrupt, format!("the NFS server sent a malformed reply: {what}"))
}

impl Reader {
    /// Skips `n` bytes.
    fn skip(&mut self, n: usize) -> Result<()> {
        if self.0.len() < n {
            return Err(garbled("it is cut short"));
        }
        self.0.advance(n);
        Ok(())
    }

    /// An unsigned 32-bit number.
    pub(super) fn u32(&mut self) -> Result<u32> {
        self.0.try_get_u32().map_err(|_| garbled("it is cut short"))
    }

    /// An unsigned 64-bit number.
    pub(super) fn u64(&mut self) -> Result<u64> {
        self.0.try_get_u64().map_err(|_| garbled("it is cut short"))
    }

    /// A boolean, also the discriminant of an optional value.
    pub(super) fn bool(&mut self) -> Result<bool> {
        match self.u32()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(garbled(&format!("{other} is no boolean"))),
        }
    }

    /// Variable-length opaque data of at most `max` bytes: a slice of the frame.
    pub(super) fn opaque(&mut self, max: usize) -> Result<Bytes> {
        let len = self.u32()? as usize;
        if len > max {
            return Err(garbled(&format!("{len} bytes where at most {max} are allowed")));
        }
        if self.0.len() < len.next_multiple_of(4) {
            return Err(garbled("opaque data is longer than the reply"));
        }
        let data = self.0.split_to(len);
        self.skip(len.next_multiple_of(4) - len)?;
        Ok(data)
    }

    /// A structure of `nfs3_types` that has no variable length in it.
    pub(super) fn fixed<T: Unpack>(&mut self) -> Result<T> {
        let mut bytes: &[u8] = &self.0;
        let (value, n) = T::unpack(&mut bytes).map_err(|e| garbled(&e.to_string()))?;
        self.skip(n)?;
        Ok(value)
    }

    /// An optional structure without variable length.
    pub(super) fn optional<T: Unpack>(&mut self) -> Result<Option<T>> {
        if self.bool()? { self.fixed().map(Some) } else { Ok(None) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_length_beyond_the_frame_or_the_bound_is_refused() {
        let huge = [0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4];
        assert!(Reader(Bytes::copy_from_slice(&huge)).opaque(64).is_err_and(|e| e.is(Kind::Corrupt)));
        assert!(Reader(Bytes::copy_from_slice(&huge)).opaque(usize::MAX).is_err_and(|e| e.is(Kind::Corrupt)));
        let short = [0, 0, 0, 3, b'a', b'b', b'c'];
        assert!(Reader(Bytes::copy_from_slice(&short)).opaque(64).is_err(), "padding is missing");
    }

    #[test]
    fn opaque_data_is_a_slice_and_padding_is_skipped() {
        let frame = Bytes::copy_from_slice(&[0, 0, 0, 3, b'a', b'b', b'c', 0, 0, 0, 0, 7]);
        let mut r = Reader(frame.clone());
        let data = r.opaque(64).expect("opaque");
        assert_eq!((&data[..], r.u32().expect("u32")), (&b"abc"[..], 7));
        assert_eq!(data.as_ptr(), frame[4..].as_ptr());
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_a_value_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut r = Reader(Bytes::from(bytes));
            let before = r.0.len();
            let _ = r.optional::<nfs3_types::nfs3::fattr3>();
            let _ = r.opaque(100);
            prop_assert!(r.0.len() <= before);
        }
    }
}
