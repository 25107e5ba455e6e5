//! The cache worker: holds immutable segments of origin content and serves them to clients.

pub mod store;
