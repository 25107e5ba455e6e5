//! The mount process: FUSE requests in, bytes from the pool of cache workers (or the origin) out.
//!
//! Rooms: [`kernel`] speaks to /dev/fuse, [`fs`] has one function per operation, [`namespace`] the nodes and directories, [`read`] the
//! bytes, [`embedded`] a cluster of one for a mount without masters, [`control`] the local socket, [`options`] the option table.

pub mod control;
pub mod embedded;
pub mod fs;
pub mod kernel;
pub mod namespace;
pub mod options;
pub mod read;
