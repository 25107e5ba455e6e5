//! Builds the backend of a source and stacks its decorators: the one place that says who wraps whom.
//!
//! ```text
//! Retry    again after passing faults, resumes broken streams      outermost: everything below may fail and be asked again
//! Limit    requests and bytes a second, patience                   each attempt pays; its waits are not the origin's latency
//! Count    requests, errors, latency, bytes                        sees each attempt, and injected faults like real ones
//! Fault    only with the option `fault`
//! File | Nfs | object store                                        plain protocol clients that never retry
//! ```

use crate::DynBackend;
use crate::count::{Count, Counters};
use crate::fault::{Fault, Knobs};
use crate::file::File;
use crate::limit::Limit;
use crate::nfs::Nfs;
use crate::object;
use crate::retry::Retry;
use efc_common::error::Context;
use efc_common::source::{SourceKind, SourceSpec, StaticKeys};
use efc_common::units::{parse_bytes, parse_duration};
use efc_common::{Error, Kind, Result};
use std::sync::Arc;
use std::time::Duration;

/// A backend with the counters of its origin.
#[derive(Clone)]
pub struct Connected {
    /// The stack.
    pub backend: DynBackend,
    /// What it has asked of the origin.
    pub counters: Arc<Counters>,
}

/// Makes the backend of `spec`. Touches no network beyond what credentials need: an origin that is down is seen by the first call
/// ([`Backend::root`] is the mount's check), and one that comes back needs no new backend.
///
/// # Errors
/// [`Kind::Invalid`] naming the option or credential that makes no sense.
pub async fn connect(spec: &SourceSpec, keys: Option<&StaticKeys>) -> Result<DynBackend> {
    Ok(connect_counted(spec, keys).await?.backend)
}

/// As [`connect`], with the counters of the origin.
///
/// # Errors
/// As [`connect`].
pub async fn connect_counted(spec: &SourceSpec, keys: Option<&StaticKeys>) -> Result<Connected> {
    let timeout = duration(spec, "timeout", Duration::from_secs(15))?;
    let deadline = duration(spec, "deadline", Duration::from_secs(60))?;
    let requests = bytes(spec, "request_rate")?;
    let bandwidth = bytes(spec, "bandwidth")?;
    let raw = plain(spec, keys, timeout)?;
    let raw = match spec.option("fault") {
        Some(text) => Arc::new(Fault::new(raw, Knobs::parse(text)?)),
        None => raw,
    };
    let counters = Arc::new(Counters::new(raw.capabilities()));
    let counted = Arc::new(Count::new(raw, counters.clone()));
    let limited = Arc::new(Limit::new(counted, requests, bandwidth, timeout));
    let backend = Arc::new(Retry::new(limited, spec.url(), deadline, timeout, counters.clone()));
    Ok(Connected { backend, counters })
}

/// The plain protocol client.
fn plain(spec: &SourceSpec, keys: Option<&StaticKeys>, timeout: Duration) -> Result<DynBackend> {
    Ok(match spec.kind {
        SourceKind::File => Arc::new(File::new(spec)),
        SourceKind::Nfs => Arc::new(Nfs::new(spec, timeout)?),
        SourceKind::Oss | SourceKind::S3 => Arc::new(object::connect(spec, keys)?),
    })
}

fn duration(spec: &SourceSpec, name: &str, default: Duration) -> Result<Duration> {
    let Some(text) = spec.option(name) else { return Ok(default) };
    match parse_duration(text).context(format!("option {name}"))? {
        Duration::ZERO => Err(Error::new(Kind::Invalid, format!("option {name}={text} must be longer than nothing"))),
        d => Ok(d),
    }
}

fn bytes(spec: &SourceSpec, name: &str) -> Result<u64> {
    spec.option(name).map_or(Ok(0), |text| parse_bytes(text).context(format!("option {name}")))
}
