//! What the [`super::Keeper`] is told, and what is to be done for it.

use efc_common::id::Incarnation;
use efc_common::lease::{Ask, Moment, Scope, Tell, Want};

/// An operation, numbered by the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub u64);

/// A recall or drop that the caller works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RecallId(pub u64);

/// What the keeper is told.
#[derive(Debug, Clone)]
pub enum Event {
    /// A session was opened.
    SessionUp {
        /// Its life.
        incarnation: Incarnation,
        /// The term of the leader that answered.
        term: u64,
        /// When the question was sent.
        sent: Moment,
    },
    /// There is a session of a process that is gone: what the kernel was told in it is dropped before its next life is opened. Before anything else.
    Inherited {
        /// Its life.
        incarnation: Incarnation,
    },
    /// A renewal was answered.
    Renewed {
        /// Of this life.
        incarnation: Incarnation,
        /// The term of the leader that answered.
        term: u64,
        /// When the question was sent.
        sent: Moment,
    },
    /// A renewal was refused: this life is over.
    SessionRefused {
        /// Which.
        incarnation: Incarnation,
    },
    /// A master speaks of leases.
    Told {
        /// To this life.
        incarnation: Incarnation,
        /// What.
        tell: Tell,
    },
    /// An operation that [`Keeper::try_admit`] could not admit.
    Want {
        /// Which.
        op: OpId,
        /// Everything it needs, at once.
        needs: Vec<Want>,
    },
    /// An operation that was admitted has ended.
    Done {
        /// Which.
        op: OpId,
    },
    /// An operation that is not admitted no longer waits.
    GiveUp {
        /// Which.
        op: OpId,
    },
    /// [`Effect::Flush`] is done, well or badly.
    Flushed {
        /// Of this recall.
        recall: RecallId,
        /// Its scope.
        scope: Scope,
    },
    /// [`Effect::Drop`] is done.
    Dropped {
        /// Of this recall.
        recall: RecallId,
        /// What was dropped.
        what: What,
    },
    /// The mount ends: nobody waits any more.
    Close,
    /// Time has passed.
    Tick,
}

/// How an operation may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// Under leases, until [`Event::Done`]. Changes are sent to the origin only with a deadline before this.
    Believed {
        /// When belief ends, if no renewal prolongs it.
        until: Moment,
    },
    /// Past everything that is remembered, to the origin; nothing of it may be remembered after [`Event::Done`]. What it passes by is not
    /// released before.
    Uncached,
}

/// What is to be dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// What is remembered under this scope.
    Scope(Scope),
    /// Everything.
    All,
}

/// Why an operation is not admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// Too many wait already.
    TooMany,
    /// The mount ends.
    Closed,
}

/// What is to be done for the keeper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Say this to the leader.
    Send(Ask),
    /// Let the operation run.
    Admit {
        /// Which.
        op: OpId,
        /// How.
        how: How,
    },
    /// Let the operation fail.
    Fail {
        /// Which.
        op: OpId,
        /// Why.
        why: Why,
    },
    /// Bring all changes in this scope to the origin, then tell [`Event::Flushed`].
    Flush {
        /// For the answer.
        recall: RecallId,
        /// What.
        scope: Scope,
    },
    /// Drop names, attributes and pages, the kernel's too, then tell [`Event::Dropped`].
    Drop {
        /// For the answer.
        recall: RecallId,
        /// What.
        what: What,
    },
    /// Nothing is believed any more and no operation of the old life runs: open a session with a new life.
    SessionLost {
        /// The life that is over.
        incarnation: Incarnation,
    },
}
