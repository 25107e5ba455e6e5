//! The only door to openraft and RocksDB. Outside, a [`Node`] takes commands, shows the applied state and changes the group's
//! membership; nothing else of either crate is visible.
//!
//! What must stay true: a vote and every log entry are on disk (fsync) before anybody hears of them; the state machine is rebuilt at start
//! from the last snapshot and the log behind it; a message reaches only the data directory it is meant for (`to_store`).

mod db;
mod door;
mod group;
mod log_store;
mod machine;
mod network;
mod node;
mod types;

pub(crate) use door::RaftDoor;
pub(crate) use node::{Node, Tuning};
