//! What a dataset or a mount says about freshness and about keeping its data cached.

use crate::units::parse_duration;
use crate::{Error, Kind, Result};
use std::str::FromStr;
use std::time::Duration;

/// How long names and attributes may be believed. Text form: `ttl=DURATION` or `immutable`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consistency {
    /// Names and attributes are believed for this long.
    Ttl(Duration),
    /// Nothing ever changes.
    Immutable,
}

impl Default for Consistency {
    fn default() -> Self {
        Consistency::Ttl(Duration::from_secs(60))
    }
}

impl FromStr for Consistency {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        if s == "immutable" {
            return Ok(Consistency::Immutable);
        }
        let ttl = s.strip_prefix("ttl=").and_then(|t| parse_duration(t).ok());
        ttl.map(Consistency::Ttl).ok_or_else(|| {
            Error::new(Kind::Invalid, format!("consistency `{s}` is unknown; use ttl=SECONDS or immutable"))
        })
    }
}

impl Consistency {
    /// How long an answer may be believed.
    pub fn ttl(self) -> Duration {
        match self {
            Consistency::Ttl(t) => t,
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
        let good = [("immutable", Consistency::Immutable), ("ttl=0", Consistency::Ttl(Duration::ZERO))];
        for (text, want) in good {
            assert_eq!(text.parse::<Consistency>().expect(text), want);
        }
        assert_eq!("ttl=90s".parse::<Consistency>().expect("unit").ttl(), Duration::from_secs(90));
        for bad in ["", "strict", "ttl", "ttl=", "ttl=-1", "immutable=1", "TTL=1"] {
            assert!(bad.parse::<Consistency>().is_err_and(|e| e.is(Kind::Invalid)), "{bad}");
        }
    }
}
