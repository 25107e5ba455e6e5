//! The vocabulary every process shares: identities, byte arithmetic, the consistent-hash ring, errors with a
//! retry verdict, budgets, configuration, logging, metrics and owned tasks.
//!
//! Nothing in here opens a socket or knows a storage protocol; the only spawns are in [`task`].

pub mod alloc;
pub mod block;
pub mod checksum;
pub mod error;
pub mod hint;
pub mod id;
pub mod lease;
pub mod limit;
pub mod lock;
pub mod log;
pub mod metrics;
pub mod node;
pub mod parent;
pub mod policy;
pub mod ring;
pub mod source;
pub mod task;
pub mod units;

pub use error::{Error, Kind, Result, Retry};
