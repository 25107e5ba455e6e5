//! One function per FUSE operation: policy only.

pub mod attr;
pub mod errno;
