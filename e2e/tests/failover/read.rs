//! Read-only mounts.

use crate::load::{Load, PATIENCE};
use efc_e2e::{Cluster, Mount, WorkerSpec, wait_for, within};
use efc_testkit::oss::{OssOptions, OssServer};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

const FILES: usize = 40;
const LEN: usize = 300_000;

fn content(i: usize) -> Vec<u8> {
    (0..LEN).map(|k| ((k * 31) ^ (i * 7)) as u8).collect()
}

/// Threads that read, list and look up; any error is a panic.
fn load(path: &Path) -> Load {
    let path = path.to_path_buf();
    Load::start(4, move |t| {
        let path = path.clone();
        let mut i = t * 11;
        Box::new(move || {
            i = (i + 1) % FILES;
            step(t, i, &path);
        })
    })
}

fn step(thread: usize, i: usize, path: &Path) {
    if thread == 3 {
        let names = fs::read_dir(path.join("d")).expect("list").map(|e| e.expect("entry").file_name());
        assert_eq!(names.count(), FILES);
        let missing = fs::metadata(path.join(format!("d/none{i}")));
        assert_eq!(missing.err().map(|e| e.kind()), Some(std::io::ErrorKind::NotFound));
        return;
    }
    let file = File::open(path.join(format!("d/f{i:03}"))).expect("open");
    // Out of the page cache, so that the mount process is really asked.
    let _ = nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    let mut got = vec![0; LEN];
    file.read_exact_at(&mut got, 0).expect("read");
    assert_eq!(got, content(i), "file {i}");
}

struct Rig {
    mount: Mount,
    _cluster: Cluster,
    _store: OssServer,
}

fn rig() -> Rig {
    let s = OssServer::start_with(OssOptions::s3()).expect("server");
    s.create_bucket("b");
    (0..FILES).for_each(|i| s.put("b", format!("d/f{i:03}"), content(i)));
    let worker = WorkerSpec { memory: "128MiB".into(), ..WorkerSpec::default() };
    let cluster = Cluster::start(1, &[worker]).expect("cluster");
    let options = [&cluster.option(), &format!("endpoint={}", s.endpoint())[..], "region=us-east-1"];
    let mount = Mount::start("s3://b", &options, &s.target().env()).expect("mount");
    Rig { mount, _cluster: cluster, _store: s }
}

fn numbers(path: PathBuf) -> Vec<u64> {
    within(PATIENCE, move || {
        (0..FILES).map(|i| fs::metadata(path.join(format!("d/f{i:03}"))).expect("stat").ino()).collect()
    })
}

#[test]
fn a_killed_mount_process_is_replaced_and_nobody_sees_an_error() {
    const KILLS: u64 = 12;
    let r = rig();
    let path = r.mount.path.clone();
    let before = numbers(path.clone());
    let (held, mut listing) = within(PATIENCE, {
        let path = path.clone();
        move || {
            let held = File::open(path.join("d/f001")).expect("open");
            let mut listing = fs::read_dir(path.join("d")).expect("list");
            listing.next().expect("an entry").expect("entry");
            (held, listing)
        }
    });
    let load = load(&path);
    for n in 0..KILLS {
        load.more(10 + n * 3);
        let pid = r.mount.pid();
        r.mount.kill_server();
        wait_for("another mount process", PATIENCE, || Ok(r.mount.pid() != pid)).expect("replaced");
        load.more(20);
        if n % 4 == 3 {
            // Ten that die at once would be one too many.
            std::thread::sleep(Duration::from_millis(2500));
        }
    }
    println!("{KILLS} kills, longest step {:?}", load.finish());
    assert_eq!(numbers(path.clone()), before, "inode numbers are the same");
    within(PATIENCE, move || {
        let mut got = Vec::new();
        (&held).read_to_end(&mut got).expect("the open file goes on");
        assert_eq!(got, content(1));
        let rest: Vec<_> = listing.by_ref().map(|e| e.expect("the open directory goes on").file_name()).collect();
        assert_eq!(rest.len(), FILES - 1);
    });
    r.mount.finish(&["the mount process is gone", "no holder"]).expect("log");
}

#[test]
fn a_mount_process_that_hangs_is_replaced() {
    let r = rig();
    let load = load(&r.mount.path);
    load.more(20);
    let begun = load.hang(&r.mount, 20);
    println!("replaced after {:?}, longest step {:?}", begun.elapsed(), load.finish());
    assert!(begun.elapsed() < Duration::from_secs(12), "{:?}", begun.elapsed());
    r.mount.finish(&["the mount process is gone", "does not answer"]).expect("log");
}

#[test]
fn a_signal_to_either_process_unmounts() {
    for server in [false, true] {
        let r = rig();
        let (path, started) = (r.mount.path.clone(), r.mount.started());
        let pid = if server { r.mount.pid() } else { started };
        assert_eq!(server, pid != started, "a holder and a mount process");
        kill(Pid::from_raw(pid as i32), Signal::SIGTERM).expect("signal");
        let mounted =
            || fs::read_to_string("/proc/self/mountinfo").expect("mounts").contains(&path.display().to_string());
        wait_for("the mount to go", PATIENCE, || Ok(!mounted())).expect("unmounted");
        r.mount.ended().expect("a good end");
    }
}

/// Processes of the cluster that a mount has to itself, in order.
pub(super) fn embedded(mount: &Mount) -> [Option<u32>; 2] {
    let dir = mount.path.parent().expect("parent").display().to_string();
    let all = fs::read_dir("/proc").expect("proc").filter_map(|e| e.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let lines = all.map(|pid| (pid, fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default()));
    let lines: Vec<_> = lines.map(|(pid, l)| (pid, String::from_utf8_lossy(&l).into_owned())).collect();
    ["efc-master", "efc-worker"].map(|name| {
        let is_it = |l: &str| l.split('\0').next().is_some_and(|p| p.ends_with(name)) && l.contains(&dir);
        lines.iter().find(|(_, l)| is_it(l)).map(|(pid, _)| *pid)
    })
}

/// The cluster of a mount that joins none serves on, with what it has in memory, whatever happens to the mount process.
#[test]
fn an_embedded_cluster_outlives_the_mount_process() {
    let s = OssServer::start_with(OssOptions::s3()).expect("server");
    s.create_bucket("b");
    (0..FILES).for_each(|i| s.put("b", format!("d/f{i:03}"), content(i)));
    let options = [&format!("endpoint={}", s.endpoint())[..], "region=us-east-1", "cache_memory=128MiB"];
    let mut mount = Mount::start("s3://b", &options, &s.target().env()).expect("mount");
    let path = mount.path.clone();
    within(PATIENCE, move || (0..FILES).for_each(|i| step(0, i, &path)));
    let fetched = |mount: &Mount| mount.stats().expect("stats")["workers"][0]["origin_bytes"].as_u64().expect("bytes");
    let (cluster, bytes) = (embedded(&mount), fetched(&mount));
    assert!(cluster.iter().all(Option::is_some) && bytes >= (FILES * LEN) as u64, "{cluster:?} {bytes}");
    let load = load(&mount.path);
    for _ in 0..4 {
        load.more(20);
        load.kill(&mount);
        assert_eq!(embedded(&mount), cluster);
    }
    crate::upgrade::upgrade(&mount, &efc_e2e::program("efc-fuse").expect("program"));
    load.more(20);
    println!("longest step {:?}", load.finish());
    assert_eq!((embedded(&mount), fetched(&mount)), (cluster, bytes), "nothing is fetched again");
    // Who did not start them looks after them all the same.
    for (n, pid) in cluster.into_iter().enumerate() {
        kill(Pid::from_raw(pid.expect("pid") as i32), Signal::SIGKILL).expect("kill");
        wait_for("another one", PATIENCE, || Ok(embedded(&mount)[n].is_some_and(|p| Some(p) != pid))).expect("again");
    }
    let path = mount.path.clone();
    wait_for("the worker", PATIENCE, || Ok(mount.stats()?["workers"][0]["error"].is_null())).expect("serves");
    within(PATIENCE, move || (0..FILES).for_each(|i| step(0, i, &path)));
    // They do not outlive holder and mount process.
    mount.kill();
    wait_for("their end", PATIENCE, || Ok(embedded(&mount) == [None, None])).expect("ended");
}
