//! What every process needs of a cluster: the masters, the ring they publish, and the workers behind it.

pub mod lease;
pub mod master;
pub mod peers;
pub mod ring;
pub mod shared;
pub mod wire;
