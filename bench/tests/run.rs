//! A whole run with a peer that needs no FUSE: the data itself, bound to the mountpoint.
#![allow(clippy::unwrap_used)]

use efc_bench::data::{Data, Plan};
use efc_bench::run::{Phase, Settings, Test, run};
use efc_bench::tool::Tool;
use efc_bench::{proc, report};
use efc_testkit::S3Ro;
use std::sync::Arc;
use std::time::Duration;

fn settings(dir: &std::path::Path, peer: &str) -> Settings {
    Settings {
        dir: dir.into(),
        tools: vec![Tool::peer(peer).unwrap()],
        tests: Test::ALL.to_vec(),
        rounds: 2,
        random: Duration::from_millis(50),
        readers: 4,
        shuffled: false,
        second: true,
    }
}

#[test]
fn a_peer_goes_through_every_test_and_leaves_nothing() {
    let dir = efc_testkit::scratch("bench-run").unwrap();
    let plan = Plan { big_bytes: 4 << 20, small_files: 20, tree_files: 30 };
    let data = Arc::new(Data::make(&dir.path().join("origin"), plan).unwrap());
    let server = S3Ro::start(&dir.path().join("origin"), Duration::ZERO).unwrap();
    let settings = settings(dir.path(), "bound=mount --bind {datadir} {mountpoint}");
    let all = run(&settings, &server, &data, |_| {}).unwrap();
    assert_eq!(all.len(), 2 * 6 * 3, "two rounds of six tests in three phases");
    assert!(all.iter().all(|m| m.ops > 0 && m.seconds > 0.0 && m.origin.get == 0));
    let rows = report::rows(&all);
    assert_eq!(rows.len(), 18);
    let sequential = rows.iter().find(|r| r.test == Test::Seq && r.phase == Phase::Hot).unwrap();
    assert!(sequential.rate > 0.0 && sequential.rounds == 2);
    assert!(!dir.path().join("node").exists());
    assert!(!proc::is_mounted(&dir.path().join("node/mnt")));
}

#[test]
fn a_wrong_byte_fails_the_run_and_leaves_no_mount() {
    let dir = efc_testkit::scratch("bench-wrong").unwrap();
    let plan = Plan { big_bytes: 1 << 20, small_files: 3, tree_files: 3 };
    let data = Arc::new(Data::make(&dir.path().join("origin"), plan).unwrap());
    let server = S3Ro::start(&dir.path().join("origin"), Duration::ZERO).unwrap();
    std::fs::write(data.dir.join(&data.small[1].path), vec![0; data.small[1].size as usize]).unwrap();
    let settings = settings(dir.path(), "bound=mount --bind {datadir} {mountpoint}");
    let e = format!("{:#}", run(&settings, &server, &data, |_| {}).unwrap_err());
    assert!(e.contains("wrong bytes in small/00001.dat") && e.contains("bound"), "{e}");
    assert!(!proc::is_mounted(&dir.path().join("node/mnt")));
}
