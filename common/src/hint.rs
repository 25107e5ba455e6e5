//! Hints: what a store says was changed in a bucket by others. They only make us look again earlier; one that is wrong or lost costs nothing but time.

use bytes::Bytes;

/// Keys of one hint.
pub const HINT_KEYS_MAX: usize = 1000;

/// Keys of one bucket that were changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hint {
    /// The bucket.
    pub bucket: String,
    /// The keys, at most [`HINT_KEYS_MAX`].
    pub keys: Vec<Bytes>,
}
