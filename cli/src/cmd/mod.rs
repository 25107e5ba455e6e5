//! One file per command: its arguments, what it asks, the JSON it prints (a `Serialize` type, stable) and its table.

pub(crate) mod cache;
pub(crate) mod dataset;
pub(crate) mod master;
pub(crate) mod nodes;
pub(crate) mod ring;
pub(crate) mod sessions;
pub(crate) mod status;
pub(crate) mod warmup;
