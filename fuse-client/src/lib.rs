//! The mount process: FUSE requests in, bytes from the pool of cache workers (or the origin) out.
//!
//! Rooms: [`kernel`] speaks to /dev/fuse, [`fs`] has one function per operation, [`namespace`] the nodes and directories, [`read`] the
//! bytes, [`lease`] what may be believed and changed; [`process`] puts them together, [`cluster`] links it to masters and workers, [`embedded`] starts a cluster of one for a mount
//! without masters, [`holder`] replaces a mount process that dies, [`control`] and [`tell`] answer questions, `live` takes options over, [`cli`] is the command line.

pub mod cli;
pub mod cluster;
pub mod control;
pub mod embedded;
pub mod fs;
pub mod holder;
pub mod journal;
pub mod kernel;
pub mod lease;
mod live;
mod lock;
pub mod namespace;
pub mod options;
pub mod process;
pub mod read;
pub mod shared;
pub mod stats;
pub mod tell;
pub mod upgrade;
pub mod warm;
pub mod write;

#[global_allocator]
static ALLOCATOR: kernel::buffers::Buffers = kernel::buffers::Buffers;
