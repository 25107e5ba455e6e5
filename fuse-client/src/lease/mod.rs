//! Leases as a mount sees them: the [`Keeper`], a pure engine that knows what may be believed. It does no I/O and reads no clock; its caller
//! carries its effects out and tells it what came of them.
//!
//! Rooms: `event` (what is said to it and by it), `keeper` (the door: operations and their guards), `room` (what is known of one directory), `told` (grants and recalls), `pass` (readers that go past a recall), `session` (the
//! session's life, new leaders, what time does). Not pure: `driver` ([`Leases`]) is that caller, between operations, the link to the masters and
//! the one who holds the copies.
//!
//! How it is meant to be driven: one owner task holds the keeper's mutex only for the length of a call. An operation calls
//! [`Keeper::try_admit`] and, when it has ended, [`Keeper::done`]; both are a few table look-ups. Only what is not covered goes the long way of
//! [`Event::Want`]. [`Event::Tick`] comes ten times a second.
//!
//! What must stay true:
//! - Nothing is believed past [`Keeper::believed_until`], and no answer of a master that came too late revives what was dropped.
//! - A scope is released only after its guards are gone, its changes are at the origin and its copies are dropped, here and in the kernel.
//! - One leader is listened to: that of the highest term by which a renewal was answered. What it has not confirmed ends when it would
//!   have ended without it.

mod driver;
mod event;
mod keeper;
mod pass;
mod room;
mod session;
mod told;

pub use driver::{Holder, LeaseGuard, Leases, Succession, Under};
pub use event::{Effect, Event, How, OpId, RecallId, What, Why};
pub use keeper::{Config, Counts, Guard, Keeper};

#[cfg(test)]
mod tests;
