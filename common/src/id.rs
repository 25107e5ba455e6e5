//! Identities. Each is a newtype, so that a ring epoch cannot be passed where an incarnation is meant.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { self.0.fmt(f) }
        }
    };
}

number_id!(
    /// Counts changes of the worker ring; only the master group hands out new ones. 0 means "no ring seen yet".
    RingEpoch
);
number_id!(
    /// Counts the lives of one worker or client session; the master refuses messages of an older life.
    Incarnation
);
number_id!(
    /// A client session (one mount), numbered by the master.
    SessionId
);

/// A worker's stable name, unique in a cluster and kept across restarts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WorkerId(pub String);

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Writes lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut s, b| {
        // Writing to a String cannot fail.
        let _ = write!(s, "{b:02x}");
        s
    })
}

/// Reads hexadecimal of either case; `None` if the text is not pairs of hex digits.
pub fn unhex(text: &str) -> Option<Vec<u8>> {
    let t = text.as_bytes();
    if !t.len().is_multiple_of(2) {
        return None;
    }
    t.chunks(2).map(|p| Some((char::from(p[0]).to_digit(16)? * 16 + char::from(p[1]).to_digit(16)?) as u8)).collect()
}

macro_rules! hash_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub [u8; 16]);
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.write_str(&hex(&self.0)) }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { write!(f, "{}({self})", stringify!($name)) }
        }
        impl $name {
            /// Hashes length-prefixed parts with SHA-256 and keeps the first 16 bytes. A cryptographic hash,
            /// because whoever may name objects must not be able to make two names collide.
            pub fn of(parts: &[&[u8]]) -> Self {
                let mut ctx = ring::digest::Context::new(&ring::digest::SHA256);
                ctx.update(stringify!($name).as_bytes());
                for p in parts {
                    ctx.update(&(p.len() as u64).to_le_bytes());
                    ctx.update(p);
                }
                let mut out = [0u8; 16];
                out.copy_from_slice(&ctx.finish().as_ref()[..16]);
                $name(out)
            }
        }
    };
}

hash_id!(
    /// Which origin: hash of what makes two sources the same store (kind, endpoint, bucket ...), never of secrets
    /// or of the path below it, so that an object mounted under several prefixes is cached once.
    SourceId
);
hash_id!(
    /// Which bytes: hash of source, locator and version. A changed file has a new version, hence a new id.
    ContentId
);

impl ContentId {
    /// The identity of version `version` of the object at `locator` in `source`.
    pub fn new(source: SourceId, locator: &[u8], version: &[u8]) -> Self {
        ContentId::of(&[&source.0, locator, version])
    }
}

/// Names one cached segment: 256 KiB (the last one of a file may be shorter) of one content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentKey {
    /// The content it belongs to.
    pub content: ContentId,
    /// File offset divided by [`crate::block::SEGMENT_BYTES`].
    pub index: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_length_prefixed() {
        assert_ne!(ContentId::of(&[b"ab", b"c"]), ContentId::of(&[b"a", b"bc"]));
        assert_ne!(ContentId::of(&[b"ab"]).0, SourceId::of(&[b"ab"]).0);
    }

    #[test]
    fn hex_round_trip() {
        let id = SourceId::of(&[b"x"]);
        assert_eq!(unhex(&id.to_string()), Some(id.0.to_vec()));
        assert_eq!(unhex("0"), None);
        assert_eq!(unhex("zz"), None);
    }
}
