//! efc-cli
