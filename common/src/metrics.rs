//! The table of metric names, and the one place that installs a Prometheus recorder.
//!
//! Every name the processes export stands here with its unit, labels and meaning; `docs/OPERATIONS.md` prints the same table and
//! a test compares the two.

pub use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
pub use metrics_exporter_prometheus::PrometheusHandle;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};

use crate::{Error, Kind, Result};

/// Kind of a series.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Series {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Distribution, in seconds.
    Histogram,
}

/// One exported metric.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// Name as exported.
    pub name: &'static str,
    /// Kind of series.
    pub series: Series,
    /// Labels, comma separated.
    pub labels: &'static str,
    /// What it counts, with its unit.
    pub help: &'static str,
}

const fn m(name: &'static str, series: Series, labels: &'static str, help: &'static str) -> Metric {
    Metric { name, series, labels, help }
}

/// All metrics of all processes.
pub const TABLE: &[Metric] = &[
    m("efc_fuse_requests_total", Series::Counter, "op", "FUSE requests answered"),
    m(
        "efc_failover_total",
        Series::Counter,
        "reason",
        "mount processes that were replaced: crash, hang, failed (could not take over), upgrade, upgrade_failed; counted by their holder",
    ),
    m(
        "efc_failover_seconds",
        Series::Histogram,
        "",
        "how long nobody served the mount, each time that its process was replaced, seconds",
    ),
    m(
        "efc_failover_resent_total",
        Series::Counter,
        "how",
        "requests that the kernel sent again when this process took over: taken (all), answered (as the former one would have), in_doubt (begun by it, done again with a look at the origin)",
    ),
    m(
        "efc_fuse_errors_total",
        Series::Counter,
        "op,errno",
        "FUSE requests answered with an error (ENOENT of a lookup not counted)",
    ),
    m("efc_fuse_request_seconds", Series::Histogram, "op", "time from decode to reply, seconds"),
    m("efc_fuse_read_bytes_total", Series::Counter, "", "bytes handed to the kernel by READ"),
    m("efc_fuse_inodes", Series::Gauge, "", "inodes the kernel may know"),
    m("efc_fuse_hidden_names_total", Series::Counter, "reason", "origin names that cannot be shown, with the reason"),
    m(
        "efc_read_hits_total",
        Series::Counter,
        "tier",
        "segment reads answered, by tier: client, local_worker, remote_worker, origin",
    ),
    m(
        "efc_read_bytes_total",
        Series::Counter,
        "tier",
        "bytes read by the client, by tier: client, local_worker, remote_worker, origin",
    ),
    m("efc_peer_errors_total", Series::Counter, "kind", "data-plane calls that failed, by error kind"),
    m("efc_budget_used_bytes", Series::Gauge, "budget", "bytes held now, by budget"),
    m("efc_budget_total_bytes", Series::Gauge, "budget", "budget size, bytes"),
    m("efc_budget_waits_total", Series::Counter, "budget", "callers that had to wait for a budget"),
    m("efc_leases", Series::Gauge, "", "leases that the mount holds (consistency=strict)"),
    m("efc_leases_waiting", Series::Gauge, "", "operations of the mount that wait for a lease"),
    m("efc_ring_epoch", Series::Gauge, "", "epoch of the ring in use"),
    m(
        "efc_cache_requests_total",
        Series::Counter,
        "tier,outcome",
        "worker segment look-ups, tier memory or disk, outcome hit or miss",
    ),
    m(
        "efc_cache_served_bytes_total",
        Series::Counter,
        "tier",
        "bytes a worker sent, by where they came from: memory, disk, origin",
    ),
    m("efc_cache_used_bytes", Series::Gauge, "tier", "bytes stored in a tier"),
    m("efc_cache_capacity_bytes", Series::Gauge, "tier", "quota of a tier, bytes"),
    m(
        "efc_cache_evictions_total",
        Series::Counter,
        "tier,reason",
        "segments removed: capacity, ttl, corrupt, asked, io_error",
    ),
    m("efc_cache_corrupt_total", Series::Counter, "tier", "segments whose checksum did not match; dropped"),
    m("efc_cache_bypass_total", Series::Counter, "reason", "fetched segments that were served but not stored"),
    m("efc_flight_waiters_total", Series::Counter, "", "reads that joined a fetch already under way"),
    m(
        "efc_origin_requests_total",
        Series::Counter,
        "kind",
        "requests sent to an origin: get, head, list, lookup, getattr, readdir, read, create, link, remove, rename, setattr, write, sync, put, part, complete, append, copy, delete, other",
    ),
    m("efc_origin_errors_total", Series::Counter, "kind,error", "origin requests that failed, by error kind"),
    m("efc_origin_retries_total", Series::Counter, "kind", "origin requests sent again"),
    m("efc_origin_bytes_total", Series::Counter, "", "content bytes received from an origin"),
    m(
        "efc_origin_sent_bytes_total",
        Series::Counter,
        "",
        "content bytes sent to an origin, in requests that succeeded",
    ),
    m(
        "efc_nfs_resent_total",
        Series::Counter,
        "",
        "pieces of uncommitted data sent again after an NFS server restarted",
    ),
    m(
        "efc_origin_request_seconds",
        Series::Histogram,
        "kind",
        "time of an origin request up to its first byte, seconds",
    ),
    m(
        "efc_listing_requests_total",
        Series::Counter,
        "outcome",
        "directory listings asked of a worker, outcome hit or miss",
    ),
    m("efc_data_connections", Series::Gauge, "", "open data-plane connections of a worker"),
    m("efc_data_refused_total", Series::Counter, "reason", "data-plane frames or handshakes refused"),
    m("efc_master_is_leader", Series::Gauge, "", "1 on the leader"),
    m("efc_master_term", Series::Gauge, "", "Raft term"),
    m("efc_master_applied_index", Series::Gauge, "", "last applied Raft log index"),
    m("efc_master_workers", Series::Gauge, "state", "workers by state: live, draining, gone"),
    m("efc_master_sessions", Series::Gauge, "", "client sessions alive"),
    m("efc_master_leases", Series::Gauge, "", "leases held, on the leader"),
    m("efc_master_event_keys_total", Series::Counter, "", "keys that stores said were changed, at /events"),
    m("efc_master_lease_waits", Series::Gauge, "", "wants that wait for a lease, on the leader"),
    m("efc_master_lock_waits", Series::Gauge, "", "advisory locks that are waited for, on the leader"),
    m("efc_master_locks", Series::Gauge, "", "advisory locks that are held, on the leader"),
    m("efc_master_lease_grants_total", Series::Counter, "", "leases granted (also again)"),
    m("efc_master_lease_recalls_total", Series::Counter, "", "recalls of leases sent (also again)"),
    m("efc_master_fences_total", Series::Counter, "", "sessions ended because they were silent or answered no recall"),
];

/// Installs the Prometheus recorder of this process; its handle renders the exposition text.
///
/// # Errors
/// [`Kind::AlreadyExists`] when one is installed already.
pub fn install() -> Result<PrometheusHandle> {
    const BUCKETS: [f64; 12] = [1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 2e-2, 0.1, 0.5, 2.0, 10.0, 60.0];
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &BUCKETS)
        .map_err(|e| Error::new(Kind::Invalid, "histogram buckets").caused_by(e))?;
    let handle = builder
        .install_recorder()
        .map_err(|e| Error::new(Kind::AlreadyExists, "a metrics recorder is installed already").caused_by(e))?;
    for x in TABLE {
        match x.series {
            Series::Counter => metrics::describe_counter!(x.name, x.help),
            Series::Gauge => metrics::describe_gauge!(x.name, x.help),
            Series::Histogram => metrics::describe_histogram!(x.name, x.help),
        }
    }
    Ok(handle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_table_is_this_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/OPERATIONS.md");
        let text = std::fs::read_to_string(path).expect("docs/OPERATIONS.md");
        let documented: Vec<&str> = text.lines().filter(|l| l.starts_with("| `efc_")).collect();
        let row = |x: &Metric| {
            let kind = format!("{:?}", x.series).to_lowercase();
            format!("| `{}` | {kind} | {} | {} |", x.name, x.labels, x.help)
        };
        assert_eq!(documented, TABLE.iter().map(row).collect::<Vec<_>>());
    }

    #[test]
    fn names_are_unique_and_carry_their_unit() {
        let mut seen = std::collections::HashSet::new();
        for x in TABLE {
            assert!(seen.insert(x.name), "{} twice", x.name);
            assert_eq!(x.series == Series::Counter, x.name.ends_with("_total"), "{}", x.name);
            assert_eq!(x.series == Series::Histogram, x.name.ends_with("_seconds"), "{}", x.name);
        }
    }
}
