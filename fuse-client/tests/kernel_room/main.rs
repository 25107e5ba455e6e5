//! The kernel room against the kernel: real mounts, real tools, real take-overs, with a file system in memory.

mod mount;
mod notify;
mod support;
mod takeover;
