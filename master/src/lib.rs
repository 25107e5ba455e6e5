//! x
mod raft;
mod state;
