//! A second process takes a running mount over: readers see a pause and no error, open directories and files go on.

use efc_e2e::{Cluster, Mount, WorkerSpec, program, within};
use efc_testkit::process::Guarded;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

fn content(i: usize) -> Vec<u8> {
    (0..300_000usize).map(|k| ((k * 31) ^ (i * 7)) as u8).collect()
}

#[test]
fn a_second_process_serves_the_same_mount_without_an_error() {
    let worker = WorkerSpec { memory: "256MiB".into(), ..WorkerSpec::default() };
    let cluster = Cluster::start(1, &[worker]).expect("cluster");
    let src = cluster.dir().join("src");
    std::fs::create_dir(&src).expect("src");
    for i in 0..50 {
        std::fs::write(src.join(format!("f{i:03}")), content(i)).expect("file");
    }
    let source = format!("file://{}", src.display());
    let option = cluster.option();
    let mount = Mount::start(&source, &[&option], &[]).expect("mount");
    let path = mount.path.clone();

    let stop = Arc::new(AtomicBool::new(false));
    let reads = Arc::new(AtomicU64::new(0));
    let readers: Vec<_> = (0..4)
        .map(|r| {
            let (path, stop, reads) = (path.clone(), stop.clone(), reads.clone());
            std::thread::spawn(move || {
                let mut i = r * 13;
                while !stop.load(Relaxed) {
                    i = (i + 1) % 50;
                    let file = std::fs::File::open(path.join(format!("f{i:03}"))).expect("open");
                    // Out of the page cache, so that the daemon is really asked.
                    let _ = nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED);
                    let mut got = vec![0; 300_000];
                    file.read_exact_at(&mut got, 0).expect("read");
                    assert_eq!(got, content(i), "file {i}");
                    reads.fetch_add(1, Relaxed);
                }
            })
        })
        .collect();
    // A file that is open and a directory that is half read while the mount changes hands.
    let (held, mut listing) = within(Duration::from_secs(20), {
        let path = path.clone();
        move || {
            let held = std::fs::File::open(path.join("f001")).expect("open");
            let mut listing = std::fs::read_dir(&path).expect("list");
            listing.next().expect("an entry").expect("entry");
            (held, listing)
        }
    });

    let mut successors = Vec::new();
    for life in 0..3 {
        let before = reads.load(Relaxed);
        let mut command = Command::new(program("efc-fuse").expect("built"));
        command.args(["mount", "--foreground", "--takeover", &source]).arg(&path).arg("-o").arg(&option);
        let mut next = Guarded::spawn(&format!("takeover{life}"), command, cluster.dir()).expect("start");
        let log = next.log_path().to_path_buf();
        next.wait_until("mounted", Duration::from_secs(30), || {
            std::fs::read_to_string(&log).is_ok_and(|t| t.lines().any(|l| l == "mounted"))
        })
        .expect("takes the mount over");
        successors.push(next);
        // The one before ends by itself, and the new one is really asked.
        if life > 0 {
            let ended = successors[life - 1].wait_exit(Duration::from_secs(20));
            assert!(ended.is_some_and(|s| s.success()), "{ended:?}");
        }
        let log = successors[life].log_path().to_path_buf();
        successors[life]
            .wait_until("reads after the take-over", Duration::from_secs(20), || reads.load(Relaxed) > before + 20)
            .unwrap_or_else(|e| panic!("{e}: {}", std::fs::read_to_string(log).unwrap_or_default()));
    }
    stop.store(true, Relaxed);
    within(Duration::from_secs(30), move || readers.into_iter().for_each(|r| r.join().expect("a reader saw an error")));
    within(Duration::from_secs(20), move || {
        let mut got = Vec::new();
        (&held).read_to_end(&mut got).expect("the open file goes on");
        assert_eq!(got, content(1));
        let rest: Vec<_> = listing.by_ref().map(|e| e.expect("the open directory goes on").file_name()).collect();
        assert_eq!(rest.len(), 49);
    });
    let out = Command::new(program("efc-fuse").expect("built")).arg("stats").arg(&path).output().expect("stats");
    assert!(out.status.success(), "the successor answers: {}", String::from_utf8_lossy(&out.stderr));
    mount.unmount().expect("unmount");
    let last = successors.last_mut().expect("a successor").wait_exit(Duration::from_secs(20));
    assert!(last.is_some_and(|s| s.success()), "{last:?}");
}
