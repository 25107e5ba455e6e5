//! Chance and messages. One generator makes all choices, so that a seed is a run.

use efc_common::id::Incarnation;
use efc_common::lease::{Ask, Moment, Tell};
use std::time::Duration;

/// SplitMix64.
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        Chance(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x5851_F42D_4C95_7F2D)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub(crate) fn percent(&mut self, p: u64) -> bool {
        self.below(100) < p
    }

    pub(crate) fn ms(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_micros(from * 1000 + self.below((to - from) * 1000 + 1))
    }
}

/// A clock that is off by up to one per cent, and began at its own time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    rate_ppm: u64,
    start: Duration,
}

impl Clock {
    pub(crate) fn new(chance: &mut Chance) -> Self {
        Clock { rate_ppm: 990_000 + chance.below(20_001), start: chance.ms(0, 1_000_000) }
    }

    pub(crate) fn at(&self, real: Duration) -> Moment {
        self.start + Duration::from_nanos((real.as_nanos() as u64 / 1000) * self.rate_ppm / 1000)
    }
}

/// From a client to a master.
#[derive(Debug, Clone)]
pub(crate) enum Up {
    /// Opens a session after the life `after`; a compare-and-set, so that a late copy does not begin yet another life.
    Open {
        after: Incarnation,
        sent: Moment,
    },
    Renew {
        incarnation: Incarnation,
        sent: Moment,
    },
    Ask {
        incarnation: Incarnation,
        ask: Ask,
    },
}

/// From a master to a client.
#[derive(Debug, Clone)]
pub(crate) enum Down {
    Opened {
        incarnation: Incarnation,
        term: u64,
        sent: Moment,
    },
    /// Somebody else's life is this one's last.
    NotOpened {
        last: Incarnation,
    },
    Renewed {
        incarnation: Incarnation,
        term: u64,
        sent: Moment,
    },
    Refused {
        incarnation: Incarnation,
    },
    Tell {
        incarnation: Incarnation,
        tell: Tell,
    },
}
