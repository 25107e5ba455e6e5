//! Real programs go on while the processes of their mount are killed, the holder too, and replaced by upgrades: none of them sees an error, and no byte is wrong. A prober tells how
//! long the mount stood still each time. `EFC_E2E_LONG=1`: 200 kills and 50 upgrades for each origin; `EFC_E2E_PREVIOUS=PROGRAM`: with which version in turn (`./run previous`); `EFC_SEED=N`:
//! when.

use crate::load::{Load, Step};
use crate::upgrade::{upgrade, versions};
use crate::write::{Rig, locked, rig};
use efc_e2e::{tool, wait_for};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The longest of these programs, with all pauses in it.
const PATIENCE: Duration = Duration::from_secs(180);
/// For another mount process to serve.
const REPLACED: Duration = Duration::from_secs(30);
/// A call of the prober that took longer was held up.
const HELD_UP: Duration = Duration::from_millis(3);

fn run(dir: &Path, program: &Path, args: &[&str]) {
    let out = Command::new(program).args(args).current_dir(dir).env("HOME", dir).output();
    // A directory that is not found is said so here, too.
    let out = out.unwrap_or_else(|e| panic!("{} {args:?} in {}: {e}", program.display(), dir.display()));
    let text = [out.stdout, out.stderr].concat();
    assert!(out.status.success(), "{} {args:?}: {}", program.display(), String::from_utf8_lossy(&text));
}

/// Random reads and writes, truncations and mappings of one file, compared with a copy.
fn fsx(path: PathBuf, seed: u32) -> Step {
    let mut seed = seed;
    Box::new(move || {
        seed += 1;
        run(&path, &tool("fsx"), &["-N", "1500", "-S", &seed.to_string(), "fsx"]);
    })
}

/// Writes blocks with checksums and verifies them.
fn fio(path: PathBuf) -> Step {
    Box::new(move || {
        let args = "--name=v --rw=randrw --bs=4k-64k --size=2m --numjobs=2 --verify=crc32c --verify_fatal=1 --end_fsync=1 --do_verify=1 --group_reporting";
        run(&path, Path::new("fio"), &args.split(' ').collect::<Vec<_>>());
    })
}

/// A repository that is made, changed, checked and removed.
fn git(path: PathBuf) -> Step {
    let mut n = 0;
    Box::new(move || {
        n += 1;
        let repo = path.join(format!("repo{n}"));
        fs::create_dir(&repo).expect("mkdir");
        let git = |args: &[&str]| {
            let who = ["-c", "user.name=efc", "-c", "user.email=efc@localhost", "-c", "init.defaultBranch=main"];
            run(&repo, Path::new("git"), &[&who[..], args].concat());
        };
        git(&["init", "-q"]);
        for i in 0..30 {
            fs::write(repo.join(format!("f{i}")), format!("content of {i}\n").repeat(i + 1)).expect("write");
        }
        git(&["add", "-A"]);
        git(&["commit", "-qm", "one"]);
        fs::write(repo.join("f1"), "changed").expect("write");
        git(&["commit", "-qam", "two"]);
        git(&["checkout", "-q", "HEAD~1"]);
        git(&["fsck", "--strict"]);
        assert_eq!(fs::read(repo.join("f1")).expect("read"), b"content of 1\ncontent of 1\n");
        fs::remove_dir_all(&repo).expect("rm -r");
    })
}

/// An archive that is unpacked, compared and removed.
fn tar(path: PathBuf, beside: PathBuf) -> Step {
    fs::create_dir(beside.join("t")).expect("mkdir");
    for i in 0..150 {
        fs::write(beside.join(format!("t/f{i}")), vec![i as u8; i * 40]).expect("write");
    }
    run(&beside, Path::new("tar"), &["cf", "t.tar", "t"]);
    Box::new(move || {
        run(&path, Path::new("tar"), &["xf", beside.join("t.tar").to_str().expect("utf8")]);
        run(&beside, Path::new("diff"), &["-r", "t", path.join("t").to_str().expect("utf8")]);
        fs::remove_dir_all(path.join("t")).expect("rm -r");
    })
}

/// Writes to one file again and again, and says which calls were held up.
fn prober(path: PathBuf, held_up: Arc<Mutex<Vec<(Instant, Duration)>>>) -> Step {
    let file = File::create(path.join("probe")).expect("create");
    Box::new(move || {
        let begun = Instant::now();
        file.write_all_at(b"alive", 0).expect("write");
        let took = begun.elapsed();
        if took > HELD_UP {
            held_up.lock().expect("lock").push((begun, took));
        }
        std::thread::sleep(Duration::from_millis(1));
    })
}

fn programs(r: &Rig, beside: &Path, held_up: &Arc<Mutex<Vec<(Instant, Duration)>>>) -> Load {
    let (path, others, beside, held_up) =
        (r.mount.path.clone(), r.other.path.clone(), beside.to_path_buf(), held_up.clone());
    let of = move |name: &str| {
        let dir = path.join(name);
        fs::create_dir(&dir).expect("mkdir");
        dir
    };
    let top = r.mount.path.clone();
    Load::start(6, move |t| match t {
        0 => fsx(of("fsx"), 17),
        1 => fio(of("fio")),
        2 => git(of("git")),
        3 => tar(of("tar"), beside.clone()),
        4 => locked(top.clone(), others.clone()),
        _ => prober(top.clone(), held_up.clone()),
    })
}

fn chaos(origin: &str) {
    let long = std::env::var_os("EFC_E2E_LONG").is_some();
    let seed = std::env::var("EFC_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(rand::random);
    println!("{origin}: seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let (kills, upgrades) = if long { (200, 50) } else { (6, 2) };
    let r = rig(origin, &[]);
    let beside = tempfile::tempdir().expect("dir");
    let held_up = Arc::default();
    let load = programs(&r, beside.path(), &held_up);
    load.more(100);
    let mut at = Vec::new();
    let versions = versions();
    for n in 0..kills {
        let every = kills / upgrades;
        if n % every == every - 1 {
            upgrade(&r.mount, &versions[n / every % 2]);
            load.more(20);
        }
        std::thread::sleep(Duration::from_millis(rng.random_range(200..2500)));
        load.more(5);
        let pid = r.mount.pid();
        if n % 10 == 5 {
            r.mount.kill_holder().expect("another holder");
            // That must have been told everything before the process may die: both at once is the end.
            load.more(20);
        }
        if n % 5 == 4 {
            // Ten that die at once would be one too many.
            std::thread::sleep(Duration::from_millis(2500));
        }
        at.push(Instant::now());
        r.mount.kill_server();
        wait_for("another mount process", REPLACED, || Ok(r.mount.pid() != pid)).expect("replaced");
        load.more(20);
    }
    load.finish_within(PATIENCE);
    let all = held_up.lock().expect("lock").clone();
    // The call that was under way at the kill, or came right after.
    let stall = |t: &Instant| {
        let first = all.iter().find(|(begun, took)| *begun + *took > *t && *begun < *t + REPLACED);
        first.map_or(Duration::ZERO, |(_, took)| *took)
    };
    let mut stalls: Vec<Duration> = at.iter().map(stall).collect();
    stalls.sort();
    let (half, last) = (stalls[stalls.len() / 2], stalls[stalls.len() - 1]);
    println!(
        "{origin}: {kills} kills, {upgrades} upgrades, stood still {half:?} (half of the times), {last:?} at most"
    );
    let mut said = vec!["the mount process is gone", "the holder of this mount was gone"];
    if versions[0] != versions[1] {
        // A version before d950d06 says so of one that went with its directory. What stays at the origin is looked for below, whoever says what.
        said.push("a removed file stays");
    }
    r.end(&said);
}

#[test]
fn programs_over_file_see_no_error() {
    chaos("file");
}

#[test]
fn programs_over_nfs_see_no_error() {
    chaos("nfs");
}

#[test]
fn programs_over_s3_see_no_error() {
    chaos("s3");
}
