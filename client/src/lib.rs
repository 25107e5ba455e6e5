//! efc-client
