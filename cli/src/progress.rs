//! Counters of a long run, and how they are shown while it lasts: a bar on a terminal, else a line now and then. All on stderr.

use efc_common::block::BLOCK_BYTES;
use efc_common::units::show_bytes;
use efc_common::{Error, Kind, Result};
use indicatif::{ProgressBar, ProgressStyle};
use parking_lot::Mutex;
use serde::Serialize;
use std::future::Future;
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// How often a bar is drawn.
const DRAW: Duration = Duration::from_millis(200);
/// How often a line is written where there is no terminal.
const LINE: Duration = Duration::from_secs(5);
/// Failures that are listed; more are only counted.
const FAILURES_LISTED: usize = 10_000;

/// One path that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Failure {
    /// The path.
    pub(crate) path: String,
    /// Why.
    pub(crate) error: String,
}

#[derive(Default)]
struct Failures {
    count: u64,
    listed: Vec<Failure>,
    /// Kind of the last one.
    kind: Option<Kind>,
}

/// See the module.
pub(crate) struct Progress {
    /// Of it done.
    pub(crate) files: AtomicU64,
    /// Found so far.
    pub(crate) files_total: AtomicU64,
    /// Of it done.
    pub(crate) bytes: AtomicU64,
    /// Found so far.
    pub(crate) bytes_total: AtomicU64,
    /// Blocks found so far: range requests that a cold origin is asked at most.
    pub(crate) blocks_total: AtomicU64,
    /// Bytes that the origin was asked for.
    pub(crate) origin_bytes: AtomicU64,
    complete: AtomicBool,
    failures: Mutex<Failures>,
    began: Instant,
}

impl Progress {
    pub(crate) fn new() -> Self {
        Progress {
            files: AtomicU64::new(0),
            files_total: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            bytes_total: AtomicU64::new(0),
            blocks_total: AtomicU64::new(0),
            origin_bytes: AtomicU64::new(0),
            complete: AtomicBool::new(false),
            failures: Mutex::default(),
            began: Instant::now(),
        }
    }

    /// Counts a file to be done.
    pub(crate) fn found(&self, size: u64) {
        self.files_total.fetch_add(1, Relaxed);
        self.bytes_total.fetch_add(size, Relaxed);
        self.blocks_total.fetch_add(size.div_ceil(BLOCK_BYTES as u64), Relaxed);
    }

    /// No more files will be found, so the totals are final.
    pub(crate) fn all_found(&self) {
        self.complete.store(true, Relaxed);
    }

    /// Counts a failure.
    pub(crate) fn fail(&self, path: &str, error: &Error) {
        self.failures.lock().kind = Some(error.kind());
        self.fail_text(Failure { path: path.into(), error: error.to_string() });
    }

    /// Counts a failure that another process told of. Told again, it is not counted again.
    pub(crate) fn fail_text(&self, failure: Failure) {
        let mut f = self.failures.lock();
        if f.listed.len() < FAILURES_LISTED {
            if f.listed.last() == Some(&failure) {
                return;
            }
            f.listed.push(failure);
        }
        f.count += 1;
    }

    /// Counts failures that nobody described.
    pub(crate) fn fail_untold(&self, more: u64) {
        self.failures.lock().count += more;
    }

    /// How many paths failed, and the first of them.
    pub(crate) fn failures(&self) -> (u64, Vec<Failure>) {
        let f = self.failures.lock();
        (f.count, f.listed.clone())
    }

    /// Time since the start.
    pub(crate) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// The error of a run that left failures, or was cancelled. `work` is what was to be done to the files: "warmed".
    ///
    /// # Errors
    /// That one. When nothing but one path failed, its own kind is kept, and with it the exit code.
    pub(crate) fn verdict(&self, cancelled: bool, work: &str) -> Result<()> {
        let f = self.failures.lock();
        let total = self.files_total.load(Relaxed);
        if cancelled {
            let done = self.files.load(Relaxed);
            let what = format!("cancelled after {done} of {total} files; the same command goes on where it stopped");
            return Err(Error::new(Kind::Cancelled, what));
        }
        match (f.count, f.listed.first(), f.kind) {
            (0, ..) => Ok(()),
            (1, Some(one), Some(kind)) if total == 0 => Err(Error::new(kind, format!("{}: {}", one.path, one.error))),
            (n, ..) => {
                for one in &f.listed {
                    eprintln!("efc: failed: {}: {}", crate::table::show(&one.path), one.error);
                }
                Err(Error::new(Kind::Io, format!("{n} paths could not be {work}; the same command tries them again")))
            }
        }
    }

    /// Runs `work` while the progress is shown; true if Ctrl-C ended it before its time.
    ///
    /// # Errors
    /// Those of `work`.
    pub(crate) async fn drive(&self, work: impl Future<Output = Result<()>>) -> Result<bool> {
        let view = View::new();
        let done = tokio::select! {
            r = work => r.map(|()| false),
            r = tokio::signal::ctrl_c() => r.map(|()| true).map_err(Error::from),
            () = view.keep(self) => Ok(false),
        };
        view.clear();
        done
    }

    fn line(&self) -> String {
        let more = if self.complete.load(Relaxed) { "" } else { "+" };
        let (bytes, total) = (self.bytes.load(Relaxed), self.bytes_total.load(Relaxed));
        let rate = bytes as f64 / self.elapsed().as_secs_f64().max(0.001);
        let left = match self.complete.load(Relaxed) && rate >= 1.0 {
            true => {
                format!(", {} left", crate::output::span((total.saturating_sub(bytes) as f64 / rate * 1000.0) as u64))
            }
            false => String::new(),
        };
        format!(
            "{} of {}{more} files, {} of {}{more}, {}/s{left}",
            self.files.load(Relaxed),
            self.files_total.load(Relaxed),
            show_bytes(bytes),
            show_bytes(total),
            show_bytes(rate as u64),
        )
    }
}

/// How progress is shown.
enum View {
    Bar(ProgressBar),
    Lines,
}

impl View {
    fn new() -> View {
        if !std::io::stderr().is_terminal() {
            return View::Lines;
        }
        let bar = ProgressBar::new(0);
        // The template is a constant: a mistake in it falls back to the plain style.
        let style = ProgressStyle::with_template("{bar:30} {percent:>3}% {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        View::Bar(bar)
    }

    /// Shows until it is dropped.
    async fn keep(&self, p: &Progress) {
        loop {
            match self {
                View::Bar(bar) => {
                    // Empty files count as a byte, so that the bar moves for them too.
                    bar.set_length(p.bytes_total.load(Relaxed) + p.files_total.load(Relaxed));
                    bar.set_position(p.bytes.load(Relaxed) + p.files.load(Relaxed));
                    bar.set_message(p.line());
                    tokio::time::sleep(DRAW).await;
                }
                View::Lines => {
                    tokio::time::sleep(LINE).await;
                    eprintln!("efc: {}", p.line());
                }
            }
        }
    }

    fn clear(&self) {
        if let View::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_failure_keeps_its_kind() {
        let p = Progress::new();
        assert!(p.verdict(false, "warmed").is_ok());
        p.fail("dataset://x/a", &Error::new(Kind::NotFound, "gone"));
        let e = p.verdict(false, "warmed").expect_err("failed");
        assert!(e.is(Kind::NotFound) && e.to_string().contains("dataset://x/a"), "{e}");
        p.found(5);
        assert!(p.verdict(false, "warmed").is_err_and(|e| e.is(Kind::Io)));
        assert!(p.verdict(true, "warmed").is_err_and(|e| e.is(Kind::Cancelled)));
    }

    #[test]
    fn what_is_left_is_told_once_the_totals_are_final() {
        let p = Progress::new();
        p.found(BLOCK_BYTES as u64 + 1);
        p.bytes.store(1 << 20, Relaxed);
        assert!(p.line().starts_with("0 of 1+ files, 1 MiB of 4 MiB+,") && !p.line().contains("left"), "{}", p.line());
        p.all_found();
        assert!(p.line().starts_with("0 of 1 files, 1 MiB of 4 MiB,") && p.line().contains("left"), "{}", p.line());
        assert_eq!(p.blocks_total.load(Relaxed), 2);
    }

    #[tokio::test]
    async fn work_is_driven_to_its_end() {
        let p = Progress::new();
        assert!(!p.drive(async { Ok(()) }).await.expect("done"));
        assert!(p.drive(async { Err(Error::new(Kind::Io, "x")) }).await.is_err());
    }
}
