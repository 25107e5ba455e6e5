//! efc-fuse
