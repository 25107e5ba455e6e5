//! A new version of every worker and every master, one after the other, while mounts read and write: applications see no error, and what was cached is cached.

use anyhow::{Context, Result};
use efc_e2e::reader::{Files, Looping, check_all};
use efc_e2e::{Cluster, Mount, WorkerSpec, wait_for, within};
use efc_testkit::process::scratch;
use efc_testkit::{Profile, S3Ro, data};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(90);
/// What may be logged: each says once that a peer was away for a moment.
const AWAY: &[&str] = &[
    "heartbeat failed; serving on",
    "no master answers; the last ring stays in use",
    "masters do not answer; reads go on",
    "a master does not answer",
    "no leader yet",
    "client::peers::pool: ",
];

fn mount(c: &Cluster, server: &S3Ro) -> Result<Mount> {
    let (endpoint, target) = (format!("endpoint={}", server.endpoint()), server.target());
    Mount::start("s3://data", &[&c.option(), &endpoint, "consistency=immutable"], &target.env())
}

/// Makes, renames, reads through the other mount and removes files, until told to stop. How many.
fn change(ours: &Path, others: &Path, stop: &AtomicBool, done: &AtomicU64) {
    let mut n = 0u64;
    while !stop.load(SeqCst) {
        let (new, named) = (ours.join("new"), format!("f{n}"));
        fs::write(&new, named.repeat(100)).expect("write");
        fs::rename(&new, ours.join(&named)).expect("rename");
        assert_eq!(fs::read_to_string(others.join(&named)).expect("read by the other"), named.repeat(100));
        fs::remove_file(others.join(&named)).expect("remove by the other");
        assert!(!ours.join(&named).exists());
        n = done.fetch_add(1, SeqCst) + 1;
    }
}

#[test]
fn workers_and_masters_are_replaced_and_nobody_sees_it() -> Result<()> {
    let (dir, written) = (scratch("rolling")?, scratch("rolling")?);
    // Of a directory, so that what is in memory is there for the next process.
    let memory = tempfile::tempdir_in("/dev/shm").context("tmpfs")?;
    data::make_tree(&dir.path().join("data"), Profile::Small)?;
    let files: Files = Arc::new(data::plan(Profile::Small).into_iter().collect());
    let bytes: u64 = files.iter().map(|(_, size)| size).sum();
    let server = S3Ro::start(dir.path(), Duration::ZERO)?;
    let spec = |n: u32| WorkerSpec {
        memory: format!("{}:{}", 2 * bytes + (32 << 20), memory.path().join(format!("w{n}")).display()),
        ..WorkerSpec::default()
    };
    let mut c = Cluster::start(3, &[spec(1), spec(2), spec(3)])?;
    let served = |c: &Cluster| -> Result<[f64; 2]> {
        let of = |tier: &str| c.metric("efc_cache_served_bytes_total", &format!("tier=\"{tier}\""));
        Ok([of("memory")?, of("origin")?])
    };
    let pass = |c: &Cluster| -> Result<[f64; 2]> {
        let before = served(c)?;
        let m = mount(c, &server)?;
        let (root, all) = (m.path.clone(), files.clone());
        within(PATIENCE, move || check_all(&root, &all, 2))?;
        let after = served(c)?;
        m.finish(&[])?;
        Ok([after[0] - before[0], after[1] - before[1]])
    };
    pass(&c)?;
    let warm = pass(&c)?;
    assert!(warm[0] >= bytes as f64 && warm[1] == 0.0, "memory and origin: {warm:?} of {bytes}");

    let reads = mount(&c, &server)?;
    let reader = Looping::start(&reads.path, &files, 2);
    let source = format!("file://{}", written.path().display());
    let writes = [(); 2].map(|()| Mount::start(&source, &["rw", &c.option()], &[]));
    let [ours, others] = writes;
    let (ours, others) = (ours?, others?);
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let changer = {
        let (a, b, stop, done) = (ours.path.clone(), others.path.clone(), stop.clone(), done.clone());
        std::thread::spawn(move || change(&a, &b, &stop, &done))
    };
    let goes_on = |what: &str| -> Result<()> {
        let (changes, is_over) = (done.load(SeqCst) + 5, || changer.is_finished());
        wait_for(&format!("changes after {what}"), PATIENCE, || Ok(done.load(SeqCst) >= changes || is_over()))?;
        assert!(!changer.is_finished(), "the writer failed at {what}");
        reader.advance(20, PATIENCE)
    };
    goes_on("the start")?;
    let epoch = |c: &Cluster| -> Result<u64> { c.efc(&["ring", "show"])?["epoch"].as_u64().context("epoch") };
    let began = epoch(&c)?;
    for n in 0..3 {
        c.workers[n].replace()?;
        c.wait_ring(&["w1", "w2", "w3"])?;
        goes_on(&format!("worker {n}"))?;
    }
    for n in 0..3 {
        c.masters[n].kill();
        c.start_masters()?;
        wait_for("a leader", PATIENCE, || Ok(c.leader().is_ok()))?;
        goes_on(&format!("master {n}"))?;
    }
    stop.store(true, SeqCst);
    changer.join().expect("the writer saw an error");
    let looped = reader.stop(PATIENCE)?;
    let changes = done.load(SeqCst);
    println!(
        "{} files read, slowest {:?}; {changes} rounds of changes; ring epochs {}",
        looped.files,
        looped.slowest,
        epoch(&c)? - began
    );
    let after = pass(&c)?;
    assert_eq!(after[1], 0.0, "bytes from the origin, {warm:?} before and {after:?} after");
    assert!(after[0] >= bytes as f64, "{after:?} of {bytes}");
    for m in [reads, ours, others] {
        let stats = m.stats()?;
        let errors = |op: &str| stats["ops"][op]["errors"].as_u64().unwrap_or(0);
        assert_eq!(["read", "write", "create", "rename", "unlink", "open"].map(errors), [0; 6], "{stats}");
        m.finish(AWAY)?;
    }
    c.check_logs(AWAY)
}
