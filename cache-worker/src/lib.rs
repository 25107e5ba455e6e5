//! efc-worker
