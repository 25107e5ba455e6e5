//! The data-plane frame: a 32-byte header, a small protobuf message (`meta`), raw bytes (`bulk`).
//!
//! ```text
//!  0  u32  magic "EFC1"              16  u32  deadline, ms the asker still waits (answers: 0)
//!  4  u8   format, 1                 20  u32  meta length, at most META_BYTES_MAX
//!  5  u8   kind, see Message         24  u32  bulk length, at most BULK_BYTES_MAX
//!  6  u16  0                         28  u32  CRC-32C of bytes 0..28 and of meta
//!  8  u64  request number            32  meta, then bulk
//! ```
//! Numbers are little-endian. The bulk of `Data` is covered by its granule checksums, the bulk of `Listing` by `bulk_sum`, so
//! that a bulk can leave by `sendfile` untouched. Every length is checked before anything is allocated for it, and the header's own
//! checksum before a message is believed. `docs/FORMATS.md` has the same page.

use crate::data;
use bytes::{Bytes, BytesMut};
use efc_common::checksum::crc32c;
use efc_common::{Error, Kind, Result};
use prost::Message as _;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Raised when an older peer would misread us; both sides of a connection must have the same.
pub const PROTOCOL_VERSION: u32 = 1;
/// Bytes of a header.
pub const HEADER_BYTES: usize = 32;
/// Longest meta part, bytes: a `ReadMany` of [`ITEMS_MAX`] items with the longest locators fits.
pub const META_BYTES_MAX: u32 = 1 << 20;
/// Longest bulk part, bytes: one block.
pub const BULK_BYTES_MAX: u32 = efc_common::block::BLOCK_BYTES;
/// Most items of a `ReadMany`.
pub const ITEMS_MAX: usize = 128;

const MAGIC: [u8; 4] = *b"EFC1";
const FORMAT: u8 = 1;

macro_rules! messages {
    ($($code:literal $name:ident: $doc:literal;)*) => {
        /// What a frame says. The discriminants are the wire's `kind`.
        #[derive(Debug, Clone, PartialEq)]
        #[allow(clippy::large_enum_variant, reason = "messages are moved once")]
        pub enum Message { $(#[doc = $doc] $name(data::$name)),* }

        impl Message {
            fn kind(&self) -> u8 { match self { $(Message::$name(_) => $code),* } }
            /// Name of the message, for logs and metrics.
            pub fn name(&self) -> &'static str { match self { $(Message::$name(_) => stringify!($name)),* } }
            fn encoded_len(&self) -> usize { match self { $(Message::$name(m) => m.encoded_len()),* } }
            fn encode(&self, out: &mut BytesMut) -> std::result::Result<(), prost::EncodeError> {
                match self { $(Message::$name(m) => m.encode(out)),* }
            }
            fn decode(kind: u8, meta: Bytes) -> Result<Self> {
                let message = match kind {
                    $($code => data::$name::decode(meta).map(Message::$name),)*
                    _ => return Err(refused("unknown message kind").with("kind", kind)),
                };
                message.map_err(|e| refused("malformed message").with("kind", kind).caused_by(e))
            }
        }
        $(impl From<data::$name> for Message { fn from(m: data::$name) -> Self { Message::$name(m) } })*
    };
}

messages! {
    1 Hello: "First frame both ways; sent again later it asks whether the worker is alive.";
    2 Attach: "Client names a source.";
    3 Attached: "Worker accepts it.";
    4 Read: "Client asks for bytes.";
    5 ReadMany: "Client asks for bytes of many files.";
    6 Data: "Worker sends bytes (bulk).";
    7 List: "Client asks for a directory.";
    8 Listing: "Worker sends entries (bulk).";
    9 Manage: "Evict, pin, unpin or look at one file's segments.";
    10 Managed: "Answer to it.";
    11 CacheStat: "Asks for the worker's counters.";
    12 CacheStats: "Answer to it.";
    13 EvictAll: "Drops all that is not pinned.";
    14 Fail: "The request, or one item of it, failed.";
    15 Touched: "What the client read in shared memory; not answered.";
    16 Resize: "Gives the tiers other sizes.";
}

/// A frame in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Frame {
    /// Chosen by the asker; its answers repeat it.
    pub request: u64,
    /// How long the asker still waits, milliseconds; 0 in answers.
    pub deadline_ms: u32,
    /// The message.
    pub message: Message,
    /// Raw bytes that follow it.
    pub bulk: Bytes,
}

/// A checked header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    kind: u8,
    request: u64,
    deadline_ms: u32,
    meta_len: u32,
    bulk_len: u32,
    sum: u32,
}

fn refused(what: &'static str) -> Error {
    Error::new(Kind::Corrupt, what)
}

/// Header and meta of a frame whose bulk of `bulk_len` bytes is sent separately (vectored or by `sendfile`).
///
/// # Errors
/// [`Kind::Exhausted`] (never retried) when meta or bulk is longer than the format permits.
pub fn encode_head(request: u64, deadline_ms: u32, message: &Message, bulk_len: usize) -> Result<BytesMut> {
    let meta_len = message.encoded_len();
    if meta_len > META_BYTES_MAX as usize || bulk_len > BULK_BYTES_MAX as usize {
        return Err(Error::new(Kind::Exhausted, "message is too long for a frame")
            .with_retry(efc_common::Retry::Never)
            .with("message", message.name())
            .with("meta", meta_len)
            .with("bulk", bulk_len));
    }
    let mut out = BytesMut::with_capacity(HEADER_BYTES + meta_len);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&[FORMAT, message.kind(), 0, 0]);
    out.extend_from_slice(&request.to_le_bytes());
    out.extend_from_slice(&deadline_ms.to_le_bytes());
    out.extend_from_slice(&(meta_len as u32).to_le_bytes());
    out.extend_from_slice(&(bulk_len as u32).to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    message.encode(&mut out).map_err(|e| refused("encode message").caused_by(e))?;
    let sum = head_sum(&out[..28], &out[HEADER_BYTES..]);
    out[28..32].copy_from_slice(&sum.to_le_bytes());
    Ok(out)
}

/// The checksums of header and meta, folded into one; the rotation keeps equal parts from cancelling out.
fn head_sum(header: &[u8], meta: &[u8]) -> u32 {
    crc32c(meta) ^ crc32c(header).rotate_left(1)
}

impl Header {
    /// Checks a header without allocating.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] for a wrong magic or format and for lengths over the bounds.
    pub fn decode(raw: &[u8; HEADER_BYTES]) -> Result<Self> {
        let u32_at = |i: usize| u32::from_le_bytes([raw[i], raw[i + 1], raw[i + 2], raw[i + 3]]);
        if raw[..4] != MAGIC {
            return Err(refused("not an EFC frame"));
        }
        if raw[4] != FORMAT || raw[6] != 0 || raw[7] != 0 {
            return Err(refused("frame format is not supported").with("format", raw[4]));
        }
        let h = Header {
            kind: raw[5],
            request: u64::from(u32_at(8)) | u64::from(u32_at(12)) << 32,
            deadline_ms: u32_at(16),
            meta_len: u32_at(20),
            bulk_len: u32_at(24),
            sum: u32_at(28),
        };
        if h.meta_len > META_BYTES_MAX || h.bulk_len > BULK_BYTES_MAX {
            return Err(refused("frame is too long").with("meta", h.meta_len).with("bulk", h.bulk_len));
        }
        Ok(h)
    }

    /// Bytes of meta that follow the header.
    pub fn meta_len(&self) -> usize {
        self.meta_len as usize
    }

    /// Bytes of bulk that follow meta.
    pub fn bulk_len(&self) -> usize {
        self.bulk_len as usize
    }

    /// Checks and decodes the message.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] when the checksum or the message is wrong.
    pub fn message(&self, raw: &[u8; HEADER_BYTES], meta: Bytes) -> Result<Message> {
        if head_sum(&raw[..28], &meta) != self.sum {
            return Err(refused("frame checksum does not match"));
        }
        Message::decode(self.kind, meta)
    }
}

/// A frame up to its bulk, which follows on the stream: the reader decides what to do with it before it is read.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    /// Chosen by the asker; its answers repeat it.
    pub request: u64,
    /// How long the asker still waits, milliseconds; 0 in answers.
    pub deadline_ms: u32,
    /// The message.
    pub message: Message,
    /// Bytes of bulk that follow.
    pub bulk_len: usize,
}

/// Reads a frame up to its bulk; `None` at a clean end between frames. A peer that may not send a bulk is held to
/// `bulk_max` 0.
///
/// # Errors
/// [`Kind::Corrupt`] for bytes that are not a frame or a bulk over `bulk_max` bytes (nothing is allocated for it),
/// [`Kind::Unavailable`] when the peer went away inside a frame.
pub async fn read_head<R: AsyncRead + Unpin>(from: &mut R, bulk_max: u32) -> Result<Option<Head>> {
    let mut raw = [0u8; HEADER_BYTES];
    let mut have = 0;
    while have < HEADER_BYTES {
        match from.read(&mut raw[have..]).await? {
            0 if have == 0 => return Ok(None),
            0 => return Err(Error::new(Kind::Unavailable, "connection closed inside a frame")),
            n => have += n,
        }
    }
    let header = Header::decode(&raw)?;
    if header.bulk_len > bulk_max {
        return Err(refused("frame has a bulk longer than allowed here").with("bulk", header.bulk_len));
    }
    let meta = read_bulk(from, header.meta_len()).await?;
    let message = header.message(&raw, meta)?;
    Ok(Some(Head { request: header.request, deadline_ms: header.deadline_ms, message, bulk_len: header.bulk_len() }))
}

/// Reads the `len` bytes of a bulk into one fresh buffer: the only copy from the socket to its user.
///
/// # Errors
/// [`Kind::Unavailable`] when the peer went away inside it, or the socket's error.
pub async fn read_bulk<R: AsyncRead + Unpin>(from: &mut R, len: usize) -> Result<Bytes> {
    // `limit` + `read_buf` fills fresh memory without zeroing it first.
    let mut buf = BytesMut::with_capacity(len);
    let mut limited = from.take(len as u64);
    while buf.len() < len {
        if limited.read_buf(&mut buf).await? == 0 {
            return Err(Error::new(Kind::Unavailable, "connection closed inside a frame"));
        }
    }
    Ok(buf.freeze())
}

/// Reads the `len` bytes of a bulk that nobody wants any more, without keeping them.
///
/// # Errors
/// As [`read_bulk`].
pub async fn skip_bulk<R: AsyncRead + Unpin>(from: &mut R, len: usize) -> Result<()> {
    let mut scratch = [0u8; 4096];
    let mut left = len;
    while left > 0 {
        let want = left.min(scratch.len());
        match from.read(&mut scratch[..want]).await? {
            0 => return Err(Error::new(Kind::Unavailable, "connection closed inside a frame")),
            n => left -= n,
        }
    }
    Ok(())
}

/// Reads one whole frame; `None` at a clean end between frames.
///
/// # Errors
/// As [`read_head`] and [`read_bulk`].
pub async fn read_frame<R: AsyncRead + Unpin>(from: &mut R) -> Result<Option<Frame>> {
    let Some(head) = read_head(from, BULK_BYTES_MAX).await? else { return Ok(None) };
    let bulk = read_bulk(from, head.bulk_len).await?;
    Ok(Some(Frame { request: head.request, deadline_ms: head.deadline_ms, message: head.message, bulk }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encode(f: &Frame) -> Vec<u8> {
        let mut v = encode_head(f.request, f.deadline_ms, &f.message, f.bulk.len()).expect("encode").to_vec();
        v.extend_from_slice(&f.bulk);
        v
    }

    fn decode(mut bytes: &[u8]) -> Result<Option<Frame>> {
        let rt = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
        rt.block_on(read_frame(&mut bytes))
    }

    fn bytes(max: usize) -> impl Strategy<Value = Bytes> {
        proptest::collection::vec(any::<u8>(), 0..max).prop_map(Bytes::from)
    }

    fn message() -> impl Strategy<Value = Message> {
        prop_oneof![
            read().prop_map(Message::from),
            proptest::collection::vec(read(), 0..5).prop_map(|items| data::ReadMany { items }.into()),
            (any::<u32>(), any::<u64>(), proptest::collection::vec(any::<u32>(), 0..16), any::<bool>()).prop_map(
                |(item, offset, sums, last)| {
                    let (places, placed) = (vec![data::Place { at: offset, seal: 3, len: 7, sums: sums.clone() }], 5);
                    data::Data { item, offset, sums, last, tier: 1, filled: 0, places, placed }.into()
                }
            ),
            (any::<u64>(), any::<u64>(), any::<u32>()).prop_map(|(version, age_ms, bulk_sum)| data::Listing {
                version,
                age_ms,
                unchanged: false,
                last: true,
                origin: false,
                bulk_sum
            }
            .into()),
            (any::<u32>(), ".{0,20}")
                .prop_map(|(code, message)| data::Fail { item: 0, code, retry: true, message }.into()),
        ]
    }

    fn read() -> impl Strategy<Value = data::Read> {
        (any::<u32>(), bytes(40), bytes(40), any::<u64>(), any::<u64>(), any::<u32>(), any::<bool>()).prop_map(
            |(slot, locator, version, size, offset, length, fill_only)| data::Read {
                slot,
                locator,
                version,
                size,
                offset,
                length,
                fill_only,
                cached_only: false,
                by_place: fill_only,
            },
        )
    }

    proptest! {
        #[test]
        fn round_trip(request: u64, deadline_ms: u32, message in message(), bulk in bytes(2000)) {
            let f = Frame { request, deadline_ms, message, bulk };
            prop_assert_eq!(decode(&encode(&f)).expect("decode"), Some(f));
        }

        #[test]
        fn a_flipped_bit_before_the_bulk_is_refused(message in message(), at: prop::sample::Index, bit in 0u8..8) {
            let f = Frame { request: 7, deadline_ms: 1, message, bulk: Bytes::new() };
            let mut raw = encode(&f);
            let i = at.index(raw.len());
            raw[i] ^= 1 << bit;
            prop_assert!(decode(&raw).is_err());
        }

        #[test]
        fn truncation_is_refused(message in message(), cut: prop::sample::Index) {
            let f = Frame { request: 7, deadline_ms: 1, message, bulk: Bytes::from_static(b"0123456789") };
            let raw = encode(&f);
            let n = cut.index(raw.len());
            prop_assert_eq!(decode(&raw[..n]).is_ok(), n == 0);
        }

        #[test]
        fn garbage_never_panics(raw in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&raw);
        }
    }

    #[test]
    fn oversized_lengths_are_refused_from_the_header_alone() {
        let f = Frame { request: 1, deadline_ms: 0, message: data::EvictAll {}.into(), bulk: Bytes::new() };
        for at in [20, 24] {
            let mut raw = encode(&f);
            raw[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
            let head: [u8; HEADER_BYTES] = raw[..HEADER_BYTES].try_into().expect("header");
            assert!(Header::decode(&head).is_err_and(|e| e.to_string().contains("too long")));
        }
        assert!(encode_head(1, 0, &f.message, BULK_BYTES_MAX as usize + 1).is_err());
    }

    #[tokio::test]
    async fn a_bulk_where_none_is_allowed_is_refused_and_an_unwanted_one_can_be_skipped() {
        let message = Message::from(data::EvictAll {});
        let f = Frame { request: 1, deadline_ms: 0, message, bulk: Bytes::from(vec![1; 10_000]) };
        let raw = [encode(&f), encode(&f)].concat();
        assert!(read_head(&mut raw.as_slice(), 0).await.is_err_and(|e| e.is(Kind::Corrupt)));
        let mut rest = raw.as_slice();
        let head = read_head(&mut rest, BULK_BYTES_MAX).await.expect("head").expect("frame");
        skip_bulk(&mut rest, head.bulk_len).await.expect("skip");
        assert_eq!(read_frame(&mut rest).await.expect("second"), Some(f));
    }
}
