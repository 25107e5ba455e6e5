//! Somebody is killed at every step of what a mount does to a bucket: before each request that it sends for a small file, a long one, an append and the rename of a directory.
//!
//! The mount process itself: what an application was told to be durable is there afterwards, the tree is the one before or the one after, and nothing temporary is left after the sweep.
//! The store (the request not done, or done and its answer lost), a worker, the leading master, the mount process with a holder: the application is told of success, and the tree is the one after.

use efc_e2e::{Cluster, Mount, WorkerSpec, wait_for, within};
use efc_testkit::oss::{OssOptions, OssServer};
use efc_testkit::{Action, Fault};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
/// A mount that was silent for so long is taken for dead (`fuse-client/src/write/rename.rs`).
const DEAD_AFTER: Duration = Duration::from_secs(60);
/// More steps than these no operation has.
const STEPS_MAX: u64 = 40;

#[derive(Debug, Clone, Copy, PartialEq)]
enum What {
    Small,
    Long,
    Append,
    Rename,
}

const ALL: [What; 4] = [What::Small, What::Long, What::Append, What::Rename];

const LONG: usize = 40 << 20;
const OLD: usize = 18 << 20;

impl What {
    /// What is at the store before.
    fn prepare(self, s: &OssServer, at: &str) {
        match self {
            What::Small | What::Long => s.put("b", format!("{at}/f"), "old"),
            What::Append => s.put("b", format!("{at}/f"), vec![1; OLD]),
            What::Rename => (0..5).for_each(|i| s.put("b", format!("{at}/d/{i}"), format!("{i}"))),
        }
    }

    /// The same, through a mount.
    fn prepare_in(self, dir: &Path) -> std::io::Result<()> {
        let write = |name: &str, bytes: &[u8]| {
            let mut f = File::create(dir.join(name))?;
            f.write_all(bytes)?;
            f.sync_all()
        };
        fs::create_dir(dir)?;
        match self {
            What::Small | What::Long => write("f", b"old"),
            What::Append => write("f", &[1; OLD]),
            What::Rename => {
                fs::create_dir(dir.join("d"))?;
                (0..5).try_for_each(|i| write(&format!("d/{i}"), i.to_string().as_bytes()))
            }
        }
    }

    fn run(self, dir: &Path) -> std::io::Result<()> {
        let write = |mut f: File, bytes: &[u8]| {
            bytes.chunks(1 << 20).try_for_each(|c| f.write_all(c))?;
            f.sync_all()
        };
        match self {
            What::Small => write(OpenOptions::new().write(true).truncate(true).open(dir.join("f"))?, b"new"),
            What::Long => write(OpenOptions::new().write(true).truncate(true).open(dir.join("f"))?, &vec![2; LONG]),
            What::Append => write(OpenOptions::new().append(true).open(dir.join("f"))?, &vec![3; 3 << 20]),
            What::Rename => fs::rename(dir.join("d"), dir.join("e")),
        }
    }

    /// Is the store in the state before (false), or in the one after (true)?
    fn state(self, s: &OssServer, at: &str) -> Result<bool, String> {
        let file = || s.get("b", format!("{at}/f")).ok_or("the file is gone");
        let is = |new: bool, old: bool, len: usize| match (old, new) {
            (true, _) => Ok(false),
            (_, true) => Ok(true),
            _ => Err(format!("neither the old bytes nor the new: {len}")),
        };
        match self {
            What::Small => file().map_err(String::from).and_then(|f| is(f[..] == *b"new", f[..] == *b"old", f.len())),
            What::Long => {
                let f = file()?;
                is(f.len() == LONG && f.iter().all(|b| *b == 2), f[..] == *b"old", f.len())
            }
            What::Append => {
                let f = file()?;
                let (head, tail) = f.split_at(OLD.min(f.len()));
                let whole = head.len() == OLD && head.iter().all(|b| *b == 1);
                let all = tail.len() == 3 << 20 && tail.iter().all(|b| *b == 3);
                is(whole && all, whole && tail.is_empty(), f.len())
            }
            What::Rename => {
                let below = |d: &str| (0..5).filter(|i| s.get("b", format!("{at}/{d}/{i}")).is_some()).count();
                match (below("d"), below("e")) {
                    (5, 0) => Ok(false),
                    (0, 5) => Ok(true),
                    (d, e) => Err(format!("{d} names in the old directory, {e} in the new one")),
                }
            }
        }
    }
}

/// One operation whose mount was killed.
struct Killed {
    what: What,
    at: String,
    told: JoinHandle<bool>,
}

#[test]
fn a_mount_that_is_killed_at_any_step_leaves_the_old_or_the_new() {
    let s = OssServer::start_with(OssOptions::s3()).expect("server");
    s.create_bucket("b");
    let worker = WorkerSpec { memory: "64MiB".into(), ..WorkerSpec::default() };
    let cluster = Cluster::start(1, &[worker]).expect("cluster");
    let (masters, endpoint) = (cluster.option(), format!("endpoint={}", s.endpoint()));
    // Leases of the killed would only make each next mount wait for their end.
    let options = ["rw", "consistency=ttl=1", &masters, &endpoint, "region=us-east-1"];
    let mount = || Mount::start("s3://b", &options, &s.target().env()).expect("mount");
    let mut killed = Vec::new();
    for what in ALL {
        for step in 0.. {
            assert!(step < STEPS_MAX, "{what:?} does not end");
            let at = format!("{what:?}-{step}");
            what.prepare(&s, &at);
            let mut m = mount();
            let dir = m.path.join(&at);
            // Looked at before, so that the steps are those of the change. Listings may be a second old.
            let there = || {
                let seen = dir.clone();
                Ok(within(PATIENCE, move || fs::read_dir(seen).is_ok()))
            };
            wait_for("the directory to be seen", PATIENCE, there).expect("seen");
            if what != What::Small {
                // What a mount finds out about its store is known from here on: it is not a step of each.
                let file = dir.join("warm");
                within(PATIENCE, move || fs::write(file, "x").expect("write"));
            }
            s.clear_faults();
            s.reset_stats();
            s.fault(Fault::on("*", Action::Latency { ms: 600_000 }).after(step));
            let told = std::thread::spawn(move || what.run(&dir).is_ok());
            wait_for("the step or the end", PATIENCE, || Ok(told.is_finished() || s.stats().faults > 0)).expect("step");
            let done = s.stats().faults == 0;
            m.kill();
            s.clear_faults();
            drop(m);
            killed.push(Killed { what, at, told });
            if done {
                break;
            }
        }
    }
    let last = Instant::now();
    let steps = killed.len();
    std::thread::sleep((DEAD_AFTER + Duration::from_secs(2)).saturating_sub(last.elapsed()));
    let m = mount();
    let left = || s.keys("b").into_iter().filter(|k| k.starts_with(b".efc/")).count();
    wait_for("journals, ledgers and probes to go", PATIENCE, || Ok(left() == 0)).unwrap_or_else(|e| {
        panic!("{e}: {:?}", s.keys("b").iter().filter(|k| k.starts_with(b".efc/")).collect::<Vec<_>>())
    });
    assert_eq!(s.open_uploads("b"), 0, "uploads are left");
    let mut after = 0;
    for k in killed {
        let state = k.what.state(&s, &k.at).unwrap_or_else(|e| panic!("{}: {e}", k.at));
        let told = k.told.join().expect("thread");
        assert!(state || !told, "{}: was told to be durable and is not there", k.at);
        after += usize::from(state);
    }
    println!("{steps} kills, {after} left the new state");
    assert!(after >= 4 && steps > 12, "the last kill of each comes after its end");
    m.finish(&[]).expect("log");
}

/// Who dies while the mount lives, and how.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Victim {
    /// The store, before it did what it was asked for.
    Store,
    /// The store, when it had done it and not said so.
    StoreAfter,
    Worker,
    Leader,
    /// The process of the mount, whose holder lives.
    Process,
}

/// Time for the kill while a request is held at the store, and for which the victim stays away at least.
const HELD: Duration = Duration::from_millis(700);

/// Kills `victim` at each `stride`-th step of everything.
fn kill_at_steps(victim: Victim, stride: u64, warnings: &[&str]) {
    let mut s = OssServer::start_with(OssOptions::s3()).expect("server");
    s.create_bucket("b");
    let worker = WorkerSpec { memory: "64MiB".into(), ..WorkerSpec::default() };
    let masters = if victim == Victim::Leader { 3 } else { 1 };
    let mut cluster = Cluster::start(masters, &[worker]).expect("cluster");
    let (option, endpoint) = (cluster.option(), format!("endpoint={}", s.endpoint()));
    let m = Mount::start("s3://b", &["rw", &option, &endpoint, "region=us-east-1"], &s.target().env()).expect("mount");
    let mut kills = 0;
    for (offset, what) in (0..).zip(ALL) {
        for step in (offset % stride..).step_by(stride as usize) {
            assert!(step < STEPS_MAX, "{what:?} does not end");
            let at = format!("{what:?}-{step}");
            let dir = m.path.join(&at);
            let prepared = dir.clone();
            within(PATIENCE, move || what.prepare_in(&prepared)).unwrap_or_else(|e| panic!("{at}: {e}"));
            let leader = (victim == Victim::Leader).then(|| cluster.leader().expect("leader"));
            s.reset_stats();
            let action = match victim {
                Victim::StoreAfter => Action::Drop,
                _ => Action::Latency { ms: HELD.as_millis() as u64 },
            };
            s.fault(Fault::on("*", action).after(step).times(1));
            let told = std::thread::spawn(move || what.run(&dir));
            wait_for("the step or the end", PATIENCE, || Ok(told.is_finished() || s.stats().faults > 0)).expect("step");
            let done = s.stats().faults == 0;
            s.clear_faults();
            if !done {
                kills += 1;
                match victim {
                    Victim::Store | Victim::StoreAfter => s.kill(),
                    Victim::Worker => cluster.workers[0].kill(),
                    Victim::Leader => leader.into_iter().for_each(|l| cluster.masters[l].kill()),
                    Victim::Process => {
                        // Ten that die at once would be one too many.
                        if kills % 4 == 3 {
                            std::thread::sleep(Duration::from_millis(2500));
                        }
                        m.kill_server();
                    }
                }
                std::thread::sleep(HELD);
                if !s.is_up() {
                    s.start_again().expect("store");
                }
            }
            // A worker and a master stay away until the work is done.
            wait_for("the end", PATIENCE, || Ok(told.is_finished())).unwrap_or_else(|e| panic!("{at}: {e}"));
            told.join().expect("thread").unwrap_or_else(|e| panic!("{victim:?} killed at {at}: {e}"));
            assert_eq!(what.state(&s, &at), Ok(true), "{victim:?} killed at {at}: not what the application was told");
            match victim {
                Victim::Worker if !done => cluster.workers[0].start().expect("worker"),
                Victim::Leader if !done => cluster.start_masters().expect("masters"),
                _ => {}
            }
            if done {
                break;
            }
        }
    }
    println!("{victim:?}: {kills} kills");
    assert!(kills >= 28 / stride, "{kills} kills only");
    m.finish(warnings).expect("log");
    if victim == Victim::Process {
        // What the dead had open is thrown away by those who come later, as in the test above.
        return;
    }
    let left: Vec<_> = s.keys("b").into_iter().filter(|k| k.starts_with(b".efc/")).collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(s.open_uploads("b"), 0, "uploads are left");
}

/// Every second step, all with EFC_E2E_LONG=1.
fn stride() -> u64 {
    if std::env::var_os("EFC_E2E_LONG").is_some() { 1 } else { 2 }
}

#[test]
fn a_store_that_dies_before_a_request_costs_time_only() {
    kill_at_steps(Victim::Store, stride(), &["origin in trouble"]);
}

#[test]
fn a_store_that_dies_before_an_answer_costs_time_only() {
    kill_at_steps(Victim::StoreAfter, stride(), &["origin in trouble"]);
}

#[test]
fn a_worker_that_dies_at_any_step_costs_time_only() {
    kill_at_steps(Victim::Worker, stride(), &[]);
}

#[test]
fn a_mount_process_that_dies_at_any_step_costs_time_only() {
    kill_at_steps(Victim::Process, stride(), &["the mount process is gone"]);
}

#[test]
fn a_leader_that_dies_at_any_step_costs_time_only() {
    kill_at_steps(Victim::Leader, stride(), &[]);
}
