//! The master from outside: real processes that are killed, wiped, added, removed and asked.

mod group;
mod harness;
mod leases;
mod members;
