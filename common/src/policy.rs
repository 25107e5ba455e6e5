//! What a dataset or a mount says about freshness and about keeping its data cached.

use crate::units::parse_duration;
use crate::{Error, Kind, Result};
use std::str::FromStr;
use std::time::Duration;

/// How long names and attributes may be believed. Text form: `strict`, `strict=DURATION`, `ttl=DURATION` or `immutable`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consistency {
    /// Until somebody in the cluster changes them: leases see to that. Changes made past EFC are seen after this long.
    Strict(Duration),
    /// Names and attributes are believed for this long.
    Ttl(Duration),
    /// Nothing ever changes.
    Immutable,
}

/// How long is believed what nobody says how long to believe.
const TTL: Duration = Duration::from_secs(60);

impl Default for Consistency {
    fn default() -> Self {
        Consistency::Ttl(TTL)
    }
}

impl FromStr for Consistency {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let known = match s.split_once('=') {
            None if s == "immutable" => Some(Consistency::Immutable),
            None if s == "strict" => Some(Consistency::strict()),
            Some(("strict", time)) => parse_duration(time).ok().map(Consistency::Strict),
            Some(("ttl", time)) => parse_duration(time).ok().map(Consistency::Ttl),
            _ => None,
        };
        known.ok_or_else(|| {
            let text = format!("consistency `{s}` is unknown; use strict, strict=SECONDS, ttl=SECONDS or immutable");
            Error::new(Kind::Invalid, text)
        })
    }
}

impl Consistency {
    /// Strict, with the usual time for changes made past EFC.
    pub fn strict() -> Consistency {
        Consistency::Strict(TTL)
    }

    /// Do leases decide what may be believed?
    pub fn is_strict(self) -> bool {
        matches!(self, Consistency::Strict(_))
    }

    /// How long an answer may be believed.
    pub fn ttl(self) -> Duration {
        match self {
            Consistency::Strict(t) | Consistency::Ttl(t) => t,
            Consistency::Immutable => Duration::from_secs(30 * 86400),
        }
    }
}

/// How workers keep what a dataset brings into the cache. A segment is kept as its first reader's dataset says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CachePolicy {
    /// It vanishes this long after it was stored; `None`: as long as there is room.
    pub ttl: Option<Duration>,
    /// It is exempt from eviction and from `ttl`.
    pub pin: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts() {
        let good = [
            ("immutable", Consistency::Immutable),
            ("ttl=0", Consistency::Ttl(Duration::ZERO)),
            ("strict", Consistency::strict()),
            ("strict=5", Consistency::Strict(Duration::from_secs(5))),
        ];
        for (text, want) in good {
            assert_eq!(text.parse::<Consistency>().expect(text), want);
        }
        assert_eq!("ttl=90s".parse::<Consistency>().expect("unit").ttl(), Duration::from_secs(90));
        for bad in ["", "strictly", "strict=", "ttl", "ttl=", "ttl=-1", "immutable=1", "TTL=1"] {
            assert!(bad.parse::<Consistency>().is_err_and(|e| e.is(Kind::Invalid)), "{bad}");
        }
    }
}
