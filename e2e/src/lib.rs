//! efc-e2e
