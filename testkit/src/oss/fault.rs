//! Faults on demand and counters: what tests tell the server to do wrong, and what it saw.
//!
//! Both are reached from the test process directly ([`super::OssServer`]) and over unsigned HTTP: `POST /-/fault` adds one rule (JSON, see
//! [`Fault`]), `DELETE /-/fault` removes all, `GET /-/stats` shows the counters, `POST /-/reset` zeroes them.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// One rule. It meets requests that fit all its filters, lets `skip` of them pass, then acts on `count` of them (default: all) until
/// `for_ms` after it was set (default: for good).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fault {
    /// Operation as the counters name it: `get`, `head`, `list`, `put` ...; empty or `*`: all.
    #[serde(default)]
    pub op: String,
    /// Keys must start with it.
    #[serde(default)]
    pub key_prefix: String,
    /// So many requests pass unharmed first.
    #[serde(default)]
    pub skip: u64,
    /// So many requests are harmed.
    #[serde(default)]
    pub count: Option<u64>,
    /// The rule ends after this time, milliseconds.
    #[serde(default)]
    pub for_ms: Option<u64>,
    /// What happens.
    #[serde(flatten)]
    pub action: Action,
}

/// What a rule does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "snake_case")]
pub enum Action {
    /// Answers with an error instead of the real answer.
    Status {
        /// HTTP status.
        status: u16,
        /// The store's code; default by status.
        #[serde(default)]
        code: String,
    },
    /// Waits before it works on the request, milliseconds.
    Latency {
        /// How long.
        ms: u64,
    },
    /// Resets the connection (TCP RST) without an answer.
    Drop,
    /// Sends so many bytes of the body at most, then resets the connection (TCP RST).
    Reset {
        /// Bytes sent before.
        after_bytes: u64,
    },
    /// Sends so many bytes of the body, then closes in good order although content-length promised more.
    Truncate {
        /// Bytes sent before.
        after_bytes: u64,
    },
    /// Sends so many bytes of the body, then nothing for a while, then the rest.
    Pause {
        /// Bytes sent before.
        after_bytes: u64,
        /// How long, milliseconds.
        ms: u64,
    },
    /// Flips all bits of one byte of the body.
    Corrupt {
        /// Its offset in the body.
        at_byte: u64,
    },
    /// Before the request is worked on, the object gets other bytes of the same length (all bits flipped), a new ETag and time.
    Mutate,
}

impl Fault {
    /// A rule that acts on every request of an operation (`*`: all).
    pub fn on(op: &str, action: Action) -> Fault {
        Fault { op: op.into(), key_prefix: String::new(), skip: 0, count: None, for_ms: None, action }
    }

    /// Only on keys that start with this.
    pub fn keys(mut self, prefix: &str) -> Fault {
        self.key_prefix = prefix.into();
        self
    }

    /// Only so many times.
    pub fn times(mut self, count: u64) -> Fault {
        self.count = Some(count);
        self
    }

    /// Only after so many requests.
    pub fn after(mut self, skip: u64) -> Fault {
        self.skip = skip;
        self
    }

    /// Only for this long.
    pub fn lasting(mut self, time: Duration) -> Fault {
        self.for_ms = Some(time.as_millis() as u64);
        self
    }
}

/// The rules that are set, with what they have seen.
#[derive(Debug, Default)]
pub(super) struct Faults {
    rules: Vec<(Fault, Instant, u64)>,
}

impl Faults {
    /// Adds a rule.
    pub(super) fn add(&mut self, fault: Fault) {
        self.rules.push((fault, Instant::now(), 0));
    }

    /// Removes all rules.
    pub(super) fn clear(&mut self) {
        self.rules.clear();
    }

    /// The rules as they were set.
    pub(super) fn list(&self) -> Vec<Fault> {
        self.rules.iter().map(|(f, _, _)| f.clone()).collect()
    }

    /// What to do to this request, in the order the rules were set. Spent rules are removed.
    pub(super) fn strike(&mut self, op: &str, key: &[u8]) -> Vec<Action> {
        let mut actions = Vec::new();
        self.rules.retain_mut(|(fault, since, seen)| {
            if fault.for_ms.is_some_and(|ms| since.elapsed() > Duration::from_millis(ms)) {
                return false;
            }
            let fits = (fault.op.is_empty() || fault.op == "*" || fault.op == op)
                && key.starts_with(fault.key_prefix.as_bytes());
            if !fits {
                return true;
            }
            *seen += 1;
            if *seen > fault.skip {
                actions.push(fault.action.clone());
            }
            fault.count.is_none_or(|count| *seen < fault.skip.saturating_add(count))
        });
        actions
    }
}

/// What the server saw since its start or the last reset.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Requests by operation.
    pub requests: BTreeMap<String, u64>,
    /// Requests by kind of signature.
    pub signatures: BTreeMap<String, u64>,
    /// Error answers by code.
    pub errors: BTreeMap<String, u64>,
    /// GETs of an object that named a range.
    pub range_gets: u64,
    /// Body bytes handed to the network.
    pub bytes_out: u64,
    /// Body bytes received.
    pub bytes_in: u64,
    /// Requests that a fault was done to.
    pub faults: u64,
    /// Most requests that were open at one time.
    pub in_flight_max: u64,
}

impl Stats {
    /// Requests of one operation.
    pub fn of(&self, op: &str) -> u64 {
        self.requests.get(op).copied().unwrap_or(0)
    }

    /// Requests in all.
    pub fn total(&self) -> u64 {
        self.requests.values().sum()
    }
}

/// Adds one to a counter by name.
pub(super) fn bump(map: &mut BTreeMap<String, u64>, name: &str) {
    match map.get_mut(name) {
        Some(n) => *n += 1,
        None => {
            map.insert(name.to_string(), 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_skip_and_count() {
        let mut faults = Faults::default();
        faults.add(Fault::on("get", Action::Drop).keys("a/").after(1).times(2));
        assert!(faults.strike("put", b"a/x").is_empty());
        assert!(faults.strike("get", b"b/x").is_empty());
        let struck: Vec<usize> = (0..5).map(|_| faults.strike("get", b"a/x").len()).collect();
        assert_eq!(struck, [0, 1, 1, 0, 0]);
        assert!(faults.list().is_empty());
    }

    #[test]
    fn json() {
        let f: Fault = serde_json::from_str(r#"{"op":"get","count":3,"action":"status","status":503}"#).unwrap();
        assert_eq!(f, Fault::on("get", Action::Status { status: 503, code: String::new() }).times(3));
        let f: Fault = serde_json::from_str(r#"{"action":"mutate"}"#).unwrap();
        assert_eq!(f, Fault { op: String::new(), ..Fault::on("*", Action::Mutate) });
        assert!(serde_json::from_str::<Fault>(r#"{"action":"explode"}"#).is_err());
    }
}
