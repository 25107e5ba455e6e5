//! Builds the backend of a source and stacks its decorators: the one place that says who wraps whom.
//!
//! ```text
//! Retry    again after passing faults, resumes broken streams      outermost: everything below may fail and be asked again
//! Limit    requests and bytes a second, patience                   each attempt pays; its waits are not the origin's latency
//! Count    requests, errors, latency, bytes                        sees each attempt, and injected faults like real ones
//! Fault    only with the option `fault`
//! File | Nfs | object store                                        plain protocol clients that never retry
//! ```
//! What changes an object store ([`Objects`](crate::objects::Objects)) goes through decorators of the same names, which share budgets, counters and
//! faults with those above; its `Retry` also finds out whether a change whose answer was lost has happened.

use crate::DynBackend;
use crate::count::{Count, Counters};
use crate::fault::{Fault, Knobs};
use crate::file::File;
use crate::limit::{Budget, Limit};
use crate::nfs::Nfs;
use crate::object;
use crate::objects::{self, DynObjects};
use crate::retry::{Policy, Retry};
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
    /// The stack for changes, where the origin is an object store.
    pub objects: Option<DynObjects>,
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
    let settings = Settings {
        timeout: duration(spec, "timeout", Duration::from_secs(15))?,
        deadline: duration(spec, "deadline", Duration::from_secs(60))?,
        request_rate: bytes(spec, "request_rate")?,
        bandwidth: bytes(spec, "bandwidth")?,
    };
    let mut raw = plain(spec, keys, settings.timeout)?;
    if let Some(text) = spec.option("fault") {
        raw = raw.behind(|inner| Ok(Fault::new(inner, Knobs::parse(text)?)))?;
    }
    Ok(stack(raw, spec.url(), &settings))
}

/// A protocol client, by the traits it has.
pub(crate) struct Plain {
    pub(crate) backend: DynBackend,
    pub(crate) objects: Option<DynObjects>,
}

impl Plain {
    /// Puts the faults that `make` gives around all of them.
    pub(crate) fn behind(self, make: impl FnOnce(DynBackend) -> Result<Fault>) -> Result<Plain> {
        let fault = make(self.backend)?;
        let objects = self.objects.map(|o| Arc::new(objects::fault::Fault::new(o, fault.injector())) as DynObjects);
        Ok(Plain { backend: Arc::new(fault), objects })
    }
}

/// What the decorators take from the source's options.
pub(crate) struct Settings {
    pub(crate) timeout: Duration,
    pub(crate) deadline: Duration,
    pub(crate) request_rate: u64,
    pub(crate) bandwidth: u64,
}

/// Puts the decorators on; see the module.
pub(crate) fn stack(raw: Plain, source: String, s: &Settings) -> Connected {
    let counters = Arc::new(Counters::new(raw.backend.capabilities()));
    let budget = Arc::new(Budget::new(s.request_rate, s.bandwidth, s.timeout));
    let policy = Arc::new(Policy::new(source, s.deadline, counters.clone()));
    let objects = raw.objects.map(|raw| {
        let counted = Arc::new(objects::count::Count::new(raw, counters.clone()));
        let limited = Arc::new(objects::limit::Limit::new(counted, budget.clone()));
        Arc::new(objects::retry::Retry::new(limited, policy.clone())) as DynObjects
    });
    let counted = Arc::new(Count::new(raw.backend, counters.clone()));
    let limited = Arc::new(Limit::new(counted, budget));
    let backend = Arc::new(Retry::new(limited, policy, s.timeout));
    Connected { backend, objects, counters }
}

/// The plain protocol client.
fn plain(spec: &SourceSpec, keys: Option<&StaticKeys>, timeout: Duration) -> Result<Plain> {
    Ok(match spec.kind {
        SourceKind::File => Plain { backend: Arc::new(File::new(spec)), objects: None },
        SourceKind::Nfs => Plain { backend: Arc::new(Nfs::new(spec, timeout)?), objects: None },
        SourceKind::Oss | SourceKind::S3 => {
            let store = Arc::new(object::connect(spec, keys)?);
            Plain { backend: store.clone(), objects: Some(store) }
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::{Cut, Script};
    use crate::suite::content;
    use efc_common::Retry as Verdict;
    use efc_common::node::Node;
    use efc_common::source::SecretRef;
    use futures::TryStreamExt;
    use tempfile::TempDir;
    use tokio::time::Instant;

    const LEN: usize = 5 << 20;

    /// A local directory with one file of [`LEN`] bytes, under the whole stack with faults to order.
    struct Rig {
        _dir: TempDir,
        script: Script,
        origin: Connected,
        data: Vec<u8>,
    }

    fn rig_with(settings: Settings) -> Rig {
        let dir = tempfile::tempdir().expect("a directory");
        let data = content(1, LEN);
        std::fs::write(dir.path().join("f"), &data).expect("a file");
        let url = format!("file://{}", dir.path().display());
        let spec = SourceSpec::parse(&url, Default::default(), SecretRef::Anonymous).expect("a source");
        let plain = plain(&spec, None, settings.timeout).expect("plain");
        let (fault, script) = Fault::scripted(plain.backend);
        let raw = Plain { backend: Arc::new(fault), objects: None };
        Rig { _dir: dir, script, origin: stack(raw, spec.url(), &settings), data }
    }

    fn seconds(timeout: u64, deadline: u64) -> Settings {
        let s = Duration::from_secs;
        Settings { timeout: s(timeout), deadline: s(deadline), request_rate: 0, bandwidth: 0 }
    }

    impl Rig {
        async fn file(&self) -> Node {
            let root = self.origin.backend.root().await.expect("root");
            self.origin.backend.lookup(&root.locator, b"f").await.expect("lookup")
        }

        async fn read(&self, node: &Node) -> Result<Vec<u8>> {
            let all = self.origin.backend.read(&node.locator, &node.version, 0..LEN as u64).await?;
            Ok(all.try_collect::<Vec<_>>().await?.concat())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn passing_faults_are_asked_again_and_others_are_not() {
        let rig = rig_with(seconds(15, 60));
        let node = rig.file().await;
        rig.script.fail_next(3, Kind::Unavailable);
        assert_eq!(rig.origin.backend.getattr(&node.locator).await.expect("getattr"), node);
        let before = rig.script.calls();
        for kind in [Kind::PermissionDenied, Kind::Stale, Kind::Io] {
            rig.script.fail_next(1, kind);
            let e = rig.origin.backend.getattr(&node.locator).await.expect_err("refused");
            assert_eq!(e.kind(), kind);
        }
        assert_eq!(rig.script.calls() - before, 3);
        let stats = rig.origin.counters.stats();
        assert_eq!((stats.retries, stats.errors, stats.requests["getattr"]), (3, 6, 7));
    }

    #[tokio::test(start_paused = true)]
    async fn the_deadline_ends_it_and_the_error_tells_the_story() {
        let rig = rig_with(seconds(15, 60));
        let node = rig.file().await;
        rig.script.fail_next(10_000, Kind::Unavailable);
        let began = Instant::now();
        let e = rig.origin.backend.getattr(&node.locator).await.expect_err("down");
        assert_eq!((e.kind(), e.retry()), (Kind::Timeout, Verdict::Never));
        assert_eq!(began.elapsed().as_secs(), 60);
        let attempts: u32 = e.context("attempts").expect("attempts").parse().expect("a number");
        assert!((40..200).contains(&attempts), "{attempts}");
        assert!(e.to_string().contains("injected failure") && e.context("elapsed").is_some(), "{e}");
        let began = Instant::now();
        let e = rig.origin.backend.root().await.expect_err("down");
        assert_eq!(
            (e.kind(), began.elapsed().as_secs()),
            (Kind::Timeout, 15),
            "a mount waits no longer than one timeout"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_hangs_is_given_up_and_asked_again() {
        let rig = rig_with(seconds(4, 60));
        let node = rig.file().await;
        rig.script.stall_next();
        let began = Instant::now();
        assert_eq!(rig.origin.backend.getattr(&node.locator).await.expect("getattr"), node);
        assert!(began.elapsed() >= Duration::from_secs(5) && began.elapsed() < Duration::from_secs(6));
    }

    #[tokio::test(start_paused = true)]
    async fn a_broken_stream_goes_on_where_it_stopped() {
        for how in [Cut::Break, Cut::End, Cut::Stall] {
            let rig = rig_with(seconds(15, 60));
            let node = rig.file().await;
            rig.script.cut_read(3_000_001, how);
            rig.script.cut_read(7, how);
            assert!(rig.read(&node).await.expect("read") == rig.data);
            let len = LEN as u64;
            assert_eq!(rig.script.ranges(), [0..len, 3_000_001..len, 3_000_008..len], "{how:?}");
            assert_eq!(rig.origin.counters.stats().bytes, len, "nothing was fetched twice");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_gets_the_deadline_anew_after_each_byte_and_ends_when_none_comes() {
        let rig = rig_with(seconds(15, 20));
        let node = rig.file().await;
        for _ in 0..5 {
            rig.script.cut_read(100_000, Cut::Stall);
        }
        let began = Instant::now();
        assert!(rig.read(&node).await.expect("read") == rig.data);
        assert!(began.elapsed() > Duration::from_secs(90), "longer than the deadline, because it got on");
        for _ in 0..5 {
            rig.script.cut_read(0, Cut::Stall);
        }
        let began = Instant::now();
        let e = rig.read(&node).await.expect_err("no byte at all");
        assert_eq!(e.kind(), Kind::Timeout);
        assert!(began.elapsed() < Duration::from_secs(40), "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_file_is_never_asked_again() {
        let rig = rig_with(seconds(15, 60));
        let node = rig.file().await;
        rig.script.cut_read(1_000_000, Cut::Stale);
        assert!(rig.read(&node).await.is_err_and(|e| e.is(Kind::Stale)));
        assert_eq!(rig.script.ranges().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn bandwidth_and_request_rate_hold() {
        let rig = rig_with(Settings { bandwidth: 1 << 20, ..seconds(15, 60) });
        let node = rig.file().await;
        let began = Instant::now();
        assert!(rig.read(&node).await.expect("read") == rig.data);
        // 5 MiB at 1 MiB/s, of which one second's worth comes at once.
        assert!((3.9..4.5).contains(&began.elapsed().as_secs_f64()), "{:?}", began.elapsed());
        let rig = rig_with(Settings { request_rate: 10, ..seconds(15, 60) });
        let node = rig.file().await;
        let began = Instant::now();
        for _ in 0..38 {
            rig.origin.backend.getattr(&node.locator).await.expect("getattr");
        }
        assert!((2.9..3.5).contains(&began.elapsed().as_secs_f64()), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn options_that_make_no_sense_are_refused_by_name() {
        for (name, value) in [
            ("timeout", "0"),
            ("deadline", "soon"),
            ("bandwidth", "fast"),
            ("connections", "0"),
            ("mount_port", "70000"),
            ("fault", "error=2"),
            ("fault", "earthquake"),
        ] {
            let options = [(name.to_string(), value.to_string())].into();
            let spec = SourceSpec::parse("nfs://127.0.0.1/x", options, SecretRef::Anonymous).expect("a source");
            let e = connect(&spec, None).await.err().expect("refused");
            assert!(e.is(Kind::Invalid) && e.to_string().contains(name), "{name}={value}: {e}");
        }
    }
}
