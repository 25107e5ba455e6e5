//! The cache worker from outside: in-process workers over sockets, and real processes. One binary, so that the support is compiled once.

mod data_plane;
mod process;
mod shared;
mod support;
