//! Many mounts of one source on a node by one process (`-o subpath=`).

use efc_e2e::{Cluster, WorkerSpec, program, wait_for, within};
use efc_testkit::scratch;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

/// A node: its own directory for what runs, and mountpoints.
struct Node {
    run: tempfile::TempDir,
    url: String,
    master: String,
}

impl Drop for Node {
    fn drop(&mut self) {
        // After a panic nothing may stay mounted.
        for place in mounted(self.run.path()) {
            let _ = Command::new("timeout").args(["10", "umount", "-l"]).arg(place).output();
        }
    }
}

impl Node {
    fn efc_fuse(&self, args: &[&str]) -> Output {
        let mut run = Command::new("timeout");
        run.arg("60").arg(program("efc-fuse").expect("program")).args(args).env("EFC_RUN_DIR", self.run.path());
        run.output().expect("run")
    }

    fn mount(&self, sub: &str, at: &Path, options: &str) -> Output {
        let all = format!("{},{options},subpath={sub}", self.master);
        let log = self.run.path().join("efc-fuse.log");
        let args = ["mount", &self.url, at.to_str().expect("utf8"), "-o", &all, "--log-file"];
        self.efc_fuse(&[&args[..], &[log.to_str().expect("utf8")]].concat())
    }

    /// Processes that serve or hold mounts here.
    fn processes(&self) -> Vec<u32> {
        let all = fs::read_dir("/proc").expect("proc").filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
        let run = self.run.path().to_str().expect("utf8").to_string();
        let is_ours = |pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&format!("{run}/shared"))
        };
        all.filter(is_ours).collect()
    }
}

/// Mountpoints below a directory.
fn mounted(dir: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mounts").expect("mounts");
    let places = text.lines().filter_map(|l| l.split(' ').nth(1)).map(PathBuf::from);
    places.filter(|p| p.starts_with(dir)).collect()
}

fn done(out: &Output) {
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

fn refused(out: &Output, why: &str) {
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains(why), "{said}");
}

/// The acceptance's 500 with `EFC_E2E_LONG=1`.
#[test]
fn many_mounts_of_a_source_have_one_process() {
    let mounts = if std::env::var_os("EFC_E2E_LONG").is_some() { 500 } else { 60 };
    let data = scratch("shared").expect("scratch");
    for i in 0..mounts {
        let dir = data.path().join(format!("d/{i}"));
        fs::create_dir_all(&dir).expect("mkdir");
        fs::write(dir.join("f"), format!("{i}")).expect("write");
    }
    let cluster =
        Cluster::start(1, &[WorkerSpec { memory: "64MiB".into(), ..WorkerSpec::default() }]).expect("cluster");
    let run = tempfile::Builder::new().prefix("run").tempdir_in("/tmp").expect("dir");
    let node = Node { run, url: format!("file://{}", data.path().display()), master: cluster.option() };
    let at = |i: usize| node.run.path().join(format!("m{i}"));
    let mut took = Vec::new();
    for i in 0..mounts {
        fs::create_dir(at(i)).expect("mkdir");
        let begun = Instant::now();
        done(&node.mount(&format!("d/{i}"), &at(i), if i % 2 == 0 { "umask=022" } else { "umask=077" }));
        took.push(begun.elapsed());
    }
    let places: Vec<PathBuf> = (0..mounts).map(at).collect();
    let read = places.clone();
    within(PATIENCE, move || {
        for (i, place) in read.iter().enumerate() {
            assert_eq!(fs::read_to_string(place.join("f")).expect("read"), i.to_string());
        }
    });
    // For each set of options a holder and the process that serves.
    assert_eq!(node.processes().len(), 4);
    // The process behind is found from each of them, and paths are those below it.
    let asked = node.efc_fuse(&["stats", at(0).to_str().expect("utf8"), "-o", "json"]);
    done(&asked);
    done(&node.efc_fuse(&["refresh", at(0).join("f").to_str().expect("utf8")]));
    // The first of each set started it.
    took.drain(..2);
    took.sort();
    let p99 = took[took.len() * 99 / 100];
    println!("{mounts} mounts: half within {:?}, 99 of 100 within {p99:?}", took[took.len() / 2]);
    for (i, place) in places.iter().enumerate() {
        // By either way.
        match i % 3 {
            0 => done(&node.efc_fuse(&["umount", place.to_str().expect("utf8")])),
            _ => done(&Command::new("umount").arg(place).output().expect("umount")),
        }
    }
    wait_for("everything to end", PATIENCE, || Ok(node.processes().is_empty() && mounted(node.run.path()).is_empty()))
        .expect("ended");
}

#[test]
fn a_shared_mount_is_of_its_source_only_and_comes_back() {
    let data = scratch("shared").expect("scratch");
    fs::create_dir(data.path().join("d")).expect("mkdir");
    fs::write(data.path().join("d/f"), "x").expect("write");
    std::os::unix::fs::symlink("/etc", data.path().join("out")).expect("symlink");
    std::os::unix::fs::symlink("d", data.path().join("in")).expect("symlink");
    let cluster =
        Cluster::start(1, &[WorkerSpec { memory: "64MiB".into(), ..WorkerSpec::default() }]).expect("cluster");
    let run = tempfile::Builder::new().prefix("run").tempdir_in("/tmp").expect("dir");
    let node = Node { run, url: format!("file://{}", data.path().display()), master: cluster.option() };
    let at = node.run.path().join("m");
    fs::create_dir(&at).expect("mkdir");
    refused(&node.mount("nothing", &at, "ro"), "no such directory");
    refused(&node.mount("d/f", &at, "ro"), "no such directory");
    refused(&node.mount("out", &at, "ro"), "no such directory");
    refused(&node.mount("../..", &at, "ro"), "no such directory");
    assert_eq!(mounted(&at).len(), 0);
    for sub in ["d", "in", "/d/"] {
        done(&node.mount(sub, &at, "ro"));
        refused(&node.mount("d", &at, "ro"), "already a mount point");
        let f = at.join("f");
        assert_eq!(within(PATIENCE, move || fs::read_to_string(f)).expect("read"), "x");
        done(&node.efc_fuse(&["umount", at.to_str().expect("utf8")]));
        // The next one comes before the mount behind has ended, or after.
        if sub == "in" {
            wait_for("the end", PATIENCE, || Ok(node.processes().is_empty())).expect("ended");
        }
    }
    // All of it, and the process dies: as any mount's.
    done(&node.mount("/", &at, "ro"));
    let holds =
        |pid: &u32| fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).is_ok_and(|c| !c.trim().is_empty());
    let served: Vec<u32> = node.processes().into_iter().filter(|pid| !holds(pid)).collect();
    assert_eq!(served.len(), 1);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(served[0] as i32), nix::sys::signal::Signal::SIGKILL)
        .expect("kill");
    let f = at.join("d/f");
    assert_eq!(within(PATIENCE, move || fs::read_to_string(f)).expect("read"), "x");
    done(&node.efc_fuse(&["umount", at.to_str().expect("utf8")]));
    wait_for("the end", PATIENCE, || Ok(node.processes().is_empty() && mounted(node.run.path()).is_empty()))
        .expect("ended");
}
