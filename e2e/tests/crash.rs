//! A mount process killed at every step of what it does to a bucket: before each request that it sends for a small file, a long one, an append and the rename of a directory. What an
//! application was told to be durable is there afterwards, the tree is the one before or the one after, and nothing temporary is left after the sweep.

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
    for what in [What::Small, What::Long, What::Append, What::Rename] {
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
