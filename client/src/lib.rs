//! What every process needs of a cluster: the masters and the worker ring.

pub mod master;
pub mod ring;
