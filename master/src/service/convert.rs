//! Wire messages ↔ replicated state, and the checks of what a client gives. The only place that knows both.

use crate::state::{Dataset, Mount, Registration, Worker};
use efc_common::id::WorkerId;
use efc_common::{Error, Kind, Result};
use efc_proto::control;

/// Worker ids become file and host names.
const ID_BYTES_MAX: usize = 253;
const TEXT_BYTES_MAX: usize = 4096;

fn invalid(message: String) -> Error {
    Error::new(Kind::Invalid, message)
}

/// Refuses texts that are too long for the replicated state, or hold control characters that would garble a terminal.
pub(super) fn check_text(what: &str, text: &str) -> Result<()> {
    match text.len() <= TEXT_BYTES_MAX && !text.chars().any(char::is_control) {
        true => Ok(()),
        false => Err(invalid(format!("{what} must be at most {TEXT_BYTES_MAX} bytes, without control characters"))),
    }
}

/// Refuses what is not `host:port`.
pub(super) fn check_addr(what: &str, addr: &str) -> Result<()> {
    check_text(what, addr)?;
    let port = addr.rsplit_once(':').and_then(|(host, port)| port.parse::<u16>().ok().filter(|_| !host.is_empty()));
    match port {
        Some(1..) => Ok(()),
        _ => Err(invalid(format!("{what} `{addr}` must be host:port"))),
    }
}

/// A worker's id.
pub(super) fn worker_id(id: String) -> Result<WorkerId> {
    let good = (1..=ID_BYTES_MAX).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
    match good {
        true => Ok(WorkerId(id)),
        false => Err(invalid(format!(
            "worker id `{id}` must be 1 to {ID_BYTES_MAX} printable characters without / or space"
        ))),
    }
}

/// What a worker says of itself, checked.
pub(super) fn registration(w: control::WorkerInfo) -> Result<Registration> {
    check_addr("the worker's address", &w.addr)?;
    for (what, text) in [("unix", &w.unix), ("host", &w.host), ("zone", &w.zone)] {
        check_text(what, text)?;
    }
    if !w.metrics_addr.is_empty() {
        check_addr("the worker's metrics address", &w.metrics_addr)?;
    }
    Ok(Registration {
        id: worker_id(w.id)?,
        addr: w.addr,
        unix: w.unix,
        host: w.host,
        zone: w.zone,
        capacity_bytes: w.capacity_bytes,
        metrics_addr: w.metrics_addr,
    })
}

/// A worker for the wire, without what only the leader knows.
pub(super) fn worker_info(w: &Worker) -> control::WorkerInfo {
    let state = match (w.gone, w.draining) {
        (true, _) => control::WorkerState::WorkerGone,
        (false, true) => control::WorkerState::WorkerDraining,
        (false, false) => control::WorkerState::WorkerLive,
    };
    control::WorkerInfo {
        id: w.id.0.clone(),
        incarnation: w.incarnation.0,
        addr: w.addr.clone(),
        unix: w.unix.clone(),
        host: w.host.clone(),
        zone: w.zone.clone(),
        capacity_bytes: w.capacity_bytes,
        metrics_addr: w.metrics_addr.clone(),
        state: state.into(),
        load: None,
        silent_ms: 0,
    }
}

/// A dataset to be made, checked.
pub(super) fn dataset(d: control::Dataset, created_ms: u64) -> Result<Dataset> {
    let cache = d.cache.unwrap_or_default();
    let mount = |m: control::Mount| Mount { path: m.path, source_json: m.source_json, read_only: m.read_only };
    let d = Dataset {
        name: d.name,
        id: 0,
        mounts: d.mounts.into_iter().map(mount).collect(),
        consistency: d.consistency,
        cache_ttl_seconds: cache.ttl_seconds,
        cache_pin: cache.pin,
        created_ms,
    };
    crate::state::dataset::check(&d)?;
    Ok(d)
}

/// A dataset for the wire.
pub(super) fn dataset_wire(d: &Dataset) -> control::Dataset {
    let mount =
        |m: &Mount| control::Mount { path: m.path.clone(), source_json: m.source_json.clone(), read_only: m.read_only };
    control::Dataset {
        name: d.name.clone(),
        mounts: d.mounts.iter().map(mount).collect(),
        consistency: d.consistency.clone(),
        cache: Some(control::CachePolicy { ttl_seconds: d.cache_ttl_seconds, pin: d.cache_pin }),
        created_ms: d.created_ms,
        id: d.id,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker() -> control::WorkerInfo {
        control::WorkerInfo { id: "w-1.zone".into(), addr: "h:1".into(), ..Default::default() }
    }

    #[test]
    fn impossible_workers_are_refused() {
        assert!(registration(worker()).is_ok());
        for id in ["", "a b", "a/b", "a\n", &"x".repeat(254)] {
            assert!(registration(control::WorkerInfo { id: id.into(), ..worker() }).is_err(), "{id:?}");
        }
        for addr in ["", "h", "h:0", ":1", "h:x", "h:99999"] {
            assert!(registration(control::WorkerInfo { addr: addr.into(), ..worker() }).is_err(), "{addr:?}");
        }
        assert!(registration(control::WorkerInfo { zone: "x".repeat(5000), ..worker() }).is_err());
        assert!(registration(control::WorkerInfo { metrics_addr: "x".into(), ..worker() }).is_err());
    }
}
