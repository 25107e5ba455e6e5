//! Counts all descendants of the test process, so it has a process of its own.
#![allow(clippy::unwrap_used)]

use efc_bench::proc::{become_subreaper, cpu_seconds, descendants, wait_gone};
use std::time::{Duration, Instant};

/// How often is looked.
const POLL: Duration = Duration::from_millis(20);

#[test]
fn a_daemon_that_detaches_is_counted_and_ended() {
    become_subreaper().unwrap();
    // The grandchild outlives its parent, as a daemon does.
    let script = "setsid sh -c 'i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; exec sleep 1000' & exit 0";
    std::process::Command::new("sh").args(["-c", script]).status().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut mine = descendants();
    while (mine.is_empty() || cpu_seconds(&mine) == 0.0) && Instant::now() < deadline {
        std::thread::sleep(POLL);
        mine = descendants();
    }
    assert_eq!(mine.len(), 1);
    assert!(cpu_seconds(&mine) > 0.0);
    wait_gone(&mine, Duration::ZERO).unwrap();
    assert!(descendants().is_disjoint(&mine));
}
