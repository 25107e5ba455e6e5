//! Leases as the leading master sees them: a pure engine. [`Engine::on`] takes the time and an event and gives effects; it does no I/O, reads no
//! clock, and nothing of it is replicated: a new leader begins with an empty table and is told by the sessions what they believe.
//!
//! Rooms: `engine` (events, sessions, time), `grant` (who gets what, who is recalled), `subtree`, `claim` (reclaims), `table` (what is held and who
//! waits for it). Not pure: `desk` owns the engine of the present time of office, feeds it and carries out its effects; `clerk` has the tasks
//! that work for the desk.
//!
//! What must stay true, also of a leader that is deposed and has not noticed:
//! - Two sessions never hold incompatible leases.
//! - What follows from *time* is done only with the masters' consent: leases of a silent session pass on after its end was agreed on
//!   ([`Effect::Fence`], [`Event::SessionEnded`]), and the claims of a new leader's sessions are closed only after a proof that it still leads
//!   ([`Effect::Prove`], [`Event::Proved`]). What follows from a session's own *words* needs no consent: it speaks to one leader at a time.
//! - Each waits only for what is held and for who came earlier.

mod claim;
mod clerk;
mod desk;
mod engine;
mod grant;
mod subtree;
mod table;

pub(crate) use clerk::{fence, keep_time, prove};
pub(crate) use desk::{Answer, Desk, Line};
pub use engine::{Bounds, Counts, Effect, Engine, Event};

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
