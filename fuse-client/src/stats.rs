//! What a mount tells about itself: built from the process's own metrics and the workers' counters, shown by `efc-fuse stats`.

use crate::holder::line::Event;
use efc_common::units::show_bytes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Counters of one FUSE operation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct OpStats {
    /// Requests answered.
    pub requests: u64,
    /// Of them with an error.
    pub errors: u64,
    /// Mean time to the answer, microseconds.
    pub mean_us: f64,
}

/// Reads answered by one tier.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TierStats {
    /// Reads (chunks) it answered.
    pub reads: u64,
    /// Bytes it gave.
    pub bytes: u64,
}

/// One worker as it reports itself.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkerStats {
    /// Its id.
    pub id: String,
    /// Bytes stored in all tiers.
    pub used_bytes: u64,
    /// Quota of all tiers, bytes.
    pub capacity_bytes: u64,
    /// Segment look-ups that found the segment.
    pub hits: u64,
    /// Look-ups that did not.
    pub misses: u64,
    /// Requests it sent to the origin.
    pub origin_requests: u64,
    /// Bytes it fetched from the origin and served.
    pub origin_bytes: u64,
    /// Set when it could not be asked.
    pub error: Option<String>,
}

/// Statistics of a mount.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Where it is mounted.
    pub mountpoint: String,
    /// What is mounted.
    pub source: String,
    /// Process id.
    pub pid: u32,
    /// Seconds since the process started.
    pub uptime_s: u64,
    /// By FUSE operation.
    pub ops: BTreeMap<String, OpStats>,
    /// By tier: client (read ahead), local_worker, remote_worker, origin.
    pub tiers: BTreeMap<String, TierStats>,
    /// Bytes the kernel asked for with READ. What applications read beyond that came from the kernel's page cache.
    pub fuse_read_bytes: u64,
    /// Nodes the kernel may know.
    pub inodes: u64,
    /// Process budget: bytes used, bytes in all, callers that had to wait.
    pub budget: (u64, u64, u64),
    /// Leases held and operations that wait for one, on mounts with `consistency=strict`.
    pub leases: Option<(u64, u64)>,
    /// Ring epoch in use.
    pub ring_epoch: u64,
    /// Requests this process itself sent to the origin, by kind.
    pub origin_requests: BTreeMap<String, u64>,
    /// How often its process was replaced.
    pub takeovers: u64,
    /// How that went the last time.
    pub last_takeover: Option<Event>,
    /// The workers.
    pub workers: Vec<WorkerStats>,
}

/// One sample of a Prometheus text exposition.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Series name.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Value.
    pub value: f64,
}

/// Reads a Prometheus text exposition; lines it does not understand are skipped.
pub fn parse_exposition(text: &str) -> Vec<Sample> {
    let sample = |line: &str| {
        let (series, value) = line.rsplit_once(' ')?;
        let value = value.parse().ok()?;
        let (name, labels) = match series.split_once('{') {
            Some((name, rest)) => (name, rest.strip_suffix('}')?),
            None => (series, ""),
        };
        let pair = |p: &str| p.split_once('=').map(|(k, v)| (k.to_string(), v.trim_matches('"').to_string()));
        let labels = labels.split(',').filter(|p| !p.is_empty()).filter_map(pair).collect();
        Some(Sample { name: name.into(), labels, value })
    };
    text.lines().filter(|l| !l.starts_with('#') && !l.is_empty()).filter_map(sample).collect()
}

impl Stats {
    /// Takes over what the process's own exposition says.
    pub fn absorb(&mut self, exposition: &str) {
        for s in parse_exposition(exposition) {
            let label = |k: &str| s.labels.get(k).cloned().unwrap_or_default();
            let n = s.value as u64;
            match s.name.as_str() {
                "efc_fuse_requests_total" => self.ops.entry(label("op")).or_default().requests += n,
                "efc_fuse_errors_total" => self.ops.entry(label("op")).or_default().errors += n,
                "efc_fuse_request_seconds_sum" => self.ops.entry(label("op")).or_default().mean_us += s.value * 1e6,
                "efc_read_hits_total" => self.tiers.entry(label("tier")).or_default().reads += n,
                "efc_read_bytes_total" => self.tiers.entry(label("tier")).or_default().bytes += n,
                "efc_fuse_read_bytes_total" => self.fuse_read_bytes = n,
                "efc_origin_requests_total" => *self.origin_requests.entry(label("kind")).or_default() += n,
                "efc_ring_epoch" => self.ring_epoch = n,
                _ => {}
            }
        }
        for op in self.ops.values_mut().filter(|o| o.requests > 0) {
            op.mean_us /= op.requests as f64;
        }
    }

    /// The statistics as a table for people.
    pub fn table(&self) -> String {
        let mut t = String::new();
        // Writing to a String cannot fail.
        let mut line = |text: String| {
            let _ = writeln!(t, "{text}");
        };
        line(format!("{} on {} (pid {}, up {} s)", self.source, self.mountpoint, self.pid, self.uptime_s));
        if let Some(e) = &self.last_takeover {
            let (what, pause_ms, n) = (&e.what, e.pause_ms, self.takeovers);
            line(format!(
                "process replaced {n} times, the last time after a pause of {pause_ms} ms: {what} {}",
                e.text
            ));
        }
        line(format!("{:<16}{:>12}{:>14}{:>8}", "tier", "reads", "bytes", "share"));
        let total: u64 = self.tiers.values().map(|t| t.bytes).sum();
        for tier in ["client", "local_worker", "remote_worker", "origin"] {
            let s = self.tiers.get(tier).cloned().unwrap_or_default();
            let share = if total == 0 { 0.0 } else { 100.0 * s.bytes as f64 / total as f64 };
            line(format!("{tier:<16}{:>12}{:>14}{share:>7.1}%", s.reads, show_bytes(s.bytes)));
        }
        line(format!(
            "kernel asked for {}; what applications read beyond that came from its page cache",
            show_bytes(self.fuse_read_bytes)
        ));
        line(format!("{:<16}{:>12}{:>10}{:>12}", "operation", "requests", "errors", "mean us"));
        for (op, s) in self.ops.iter().filter(|(_, s)| s.requests > 0) {
            line(format!("{op:<16}{:>12}{:>10}{:>12.0}", s.requests, s.errors, s.mean_us));
        }
        for w in &self.workers {
            match &w.error {
                Some(e) => line(format!("worker {}: {e}", w.id)),
                None => line(format!(
                    "worker {}: {} of {} used, {} hits, {} misses, {} origin requests, {} from the origin",
                    w.id,
                    show_bytes(w.used_bytes),
                    show_bytes(w.capacity_bytes),
                    w.hits,
                    w.misses,
                    w.origin_requests,
                    show_bytes(w.origin_bytes)
                )),
            }
        }
        let origin: Vec<String> =
            self.origin_requests.iter().filter(|(_, n)| **n > 0).map(|(k, n)| format!("{k} {n}")).collect();
        if let Some((held, waiting)) = self.leases {
            line(format!("leases {held}, operations that wait for one {waiting}"));
        }
        line(format!(
            "inodes {}, ring epoch {}, memory {} of {}, waits {}, own origin requests: {}",
            self.inodes,
            self.ring_epoch,
            show_bytes(self.budget.0),
            show_bytes(self.budget.1),
            self.budget.2,
            if origin.is_empty() { "none".into() } else { origin.join(", ") }
        ));
        t
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_come_from_the_exposition() {
        let text = "# HELP x y\nefc_fuse_requests_total{op=\"read\"} 4\nefc_fuse_request_seconds_sum{op=\"read\"} 0.002\n\
                    efc_read_bytes_total{tier=\"origin\"} 300\nefc_read_bytes_total{tier=\"client\"} 100\nbroken line\n\
                    efc_ring_epoch 7\nefc_origin_requests_total{kind=\"list\"} 2\n";
        let mut s = Stats::default();
        s.absorb(text);
        assert_eq!(s.ops["read"], OpStats { requests: 4, errors: 0, mean_us: 500.0 });
        assert_eq!((s.ring_epoch, s.origin_requests["list"]), (7, 2));
        let table = s.table();
        assert!(table.contains("75.0%") && table.contains("list 2"), "{table}");
    }
}
