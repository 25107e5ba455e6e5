//! What twenty takeovers leave behind in the holder, in the mount process, and of nodes that the kernel holds.

use crate::load::Load;
use crate::write::{Rig, changes, names, rig, trees};
use efc_e2e::{Mount, within};
use std::time::Duration;

/// Memory that a process may have at one moment and not at another, bytes.
const PROCESS_SLACK: u64 = 16 << 20;
const HOLDER_SLACK: u64 = 1 << 20;
/// Threads that wait for work end after 10 s, and free memory is given back then.
const IDLE: Duration = Duration::from_secs(12);

#[derive(Debug)]
struct Used {
    /// Of its own: pages of its program come and go as the system likes.
    memory: u64,
    fds: u64,
    threads: u64,
}

fn used(pid: u32) -> Used {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let number = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name)).expect("line");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("number")
    };
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("fds").count() as u64;
    Used { memory: (number("RssAnon:") + number("RssShmem:")) << 10, fds, threads: number("Threads:") }
}

#[derive(Debug)]
struct Sample {
    holder: Used,
    process: Used,
    inodes: u64,
}

fn sample(m: &Mount) -> Sample {
    // The kernel forgets what nobody uses, and tells the mount a moment later.
    within(Duration::from_secs(30), || std::fs::write("/proc/sys/vm/drop_caches", "2").expect("drop caches"));
    std::thread::sleep(IDLE);
    let inodes = m.stats().expect("stats")["inodes"].as_u64().expect("inodes");
    Sample { holder: used(m.holder()), process: used(m.pid()), inodes }
}

fn work(r: &Rig) -> Load {
    let (path, has_links) = (r.mount.path.clone(), r.has_links());
    Load::start(3, move |t| match t {
        0 => names(path.clone(), has_links),
        1 => changes(path.clone()),
        _ => trees(path.clone()),
    })
}

/// The same work each time: what was read ahead stays in memory as long as there is room.
fn used_by_work(r: &Rig) -> Sample {
    let load = work(r);
    load.more(600);
    load.finish();
    sample(&r.mount)
}

fn takeovers(origin: &str) {
    let r = rig(origin, &[]);
    let before = used_by_work(&r);
    let load = work(&r);
    for n in 0..20 {
        if n % 5 == 4 {
            // Ten that die at once would be one too many.
            std::thread::sleep(Duration::from_millis(2500));
        }
        load.more(60);
        load.kill(&r.mount);
    }
    load.finish();
    let after = used_by_work(&r);
    println!("{origin}: before {before:?}\n{origin}: after {after:?}");
    let both = [(&before.holder, &after.holder, HOLDER_SLACK), (&before.process, &after.process, PROCESS_SLACK)];
    for (was, is, slack) in both {
        assert!(is.memory <= was.memory + slack, "memory: {was:?}, {is:?}");
        assert!(is.fds <= was.fds + 4, "descriptors: {was:?}, {is:?}");
        assert!(is.threads <= was.threads + 4, "threads: {was:?}, {is:?}");
    }
    // A look-up that was written down and not answered when the process died is counted again when it comes again, and its node stays until the next takeover: one for each thread.
    assert!(after.inodes <= before.inodes + 3, "{} inodes, {} after", before.inodes, after.inodes);
    r.end(&["the mount process is gone"]);
}

#[test]
fn twenty_takeovers_of_a_directory_do_not_grow() {
    takeovers("file");
}

#[test]
fn twenty_takeovers_of_a_bucket_do_not_grow() {
    takeovers("s3");
}
