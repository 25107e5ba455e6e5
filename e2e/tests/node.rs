//! Mounts below a service manager, `efc-fuse holder` or systemd: they survive the death of a holder together with its mount process; and that of `efc-fuse holder` itself.

use efc_e2e::{Cluster, WorkerSpec, program, wait_for, within};
use efc_testkit::process::Guarded;
use efc_testkit::scratch;
use serde_json::Value;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

/// A node with its service.
struct Node {
    run: tempfile::TempDir,
    service: Guarded,
    socket: PathBuf,
}

impl Drop for Node {
    fn drop(&mut self) {
        // After a panic nothing may stay mounted, and nobody may wait for it.
        let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for place in
            text.lines().filter_map(|l| l.split(' ').nth(4)).filter(|p| Path::new(p).starts_with(self.run.path()))
        {
            let _ = Command::new("timeout").args(["10", "umount", "-l", place]).output();
        }
        for pid in processes(self.run.path()) {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).output();
        }
    }
}

/// Processes that hold or serve mounts of a node.
fn processes(run: &Path) -> Vec<u32> {
    let all = fs::read_dir("/proc").expect("proc").filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
    let below = run.display().to_string();
    let is_ours = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        line.contains("--foreground") && line.contains(&below)
    };
    all.filter(is_ours).collect()
}

fn parent(pid: u32) -> u32 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok()).expect("parent")
}

impl Node {
    fn start() -> Node {
        let run = scratch("node").expect("dir");
        let socket = run.path().join("holder.sock");
        let mut command = Command::new(program("efc-fuse").expect("program"));
        command.args(["holder", "--listen"]).arg(&socket).env("EFC_RUN_DIR", run.path());
        let mut service = Guarded::spawn("efc-holder", command, run.path()).expect("service");
        let log = service.log_path().to_path_buf();
        let listens = || fs::read_to_string(&log).is_ok_and(|t| t.lines().any(|l| l == "listening"));
        service.wait_until("listening", PATIENCE, listens).expect("listening");
        Node { run, service, socket }
    }

    fn efc_fuse(&self, args: &[&str]) -> Output {
        let mut run = Command::new("timeout");
        run.arg("60").arg(program("efc-fuse").expect("program")).args(args).env("EFC_RUN_DIR", self.run.path());
        run.output().expect("run")
    }

    fn dir(&self, name: &str) -> PathBuf {
        let dir = self.run.path().join(name);
        fs::create_dir(&dir).expect("mkdir");
        dir
    }

    fn mount(&self, source: &str, at: &Path, options: &str) -> Output {
        let socket = self.socket.to_str().expect("utf8");
        self.efc_fuse(&["mount", source, at.to_str().expect("utf8"), "-o", options, "--holder", socket])
    }

    fn json(&self, command: &str, at: &Path) -> Value {
        let out = self.efc_fuse(&[command, at.to_str().expect("utf8"), "-o", "json"]);
        assert!(out.status.success(), "{out:?}");
        serde_json::from_slice(&out.stdout).expect("json")
    }

    /// The process that serves, if one answers.
    fn server(&self, at: &Path) -> Option<u32> {
        let out = self.efc_fuse(&["stats", at.to_str().expect("utf8"), "-o", "json"]);
        let stats: Value = serde_json::from_slice(&out.stdout).ok()?;
        stats["pid"].as_u64().map(|p| p as u32)
    }

    /// What happened to the mount's processes.
    fn events(&self, at: &Path) -> Vec<String> {
        let said = self.json("history", at);
        let events = said["events"].as_array().expect("events");
        events.iter().map(|e| e["what"].as_str().expect("what").to_string()).collect()
    }

    fn umount(&self, at: &Path) {
        let out = self.efc_fuse(&["umount", at.to_str().expect("utf8")]);
        assert!(out.status.success(), "{out:?}");
    }
}

fn refused(out: &Output, code: i32, why: &str) {
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.code() == Some(code) && said.contains(why), "{code} {why}: {:?} {said}", out.status);
}

fn kill_all(pids: &[u32]) {
    for pid in pids {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid as i32), nix::sys::signal::Signal::SIGKILL)
            .expect("kill");
    }
}

/// Appends numbered records to a file that stays open, removes and makes others, and reads everything back at the end.
struct Writer {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<()>,
}

impl Writer {
    fn start(dir: &Path) -> Writer {
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (dir, ends, counts) = (dir.to_path_buf(), stop.clone(), count.clone());
        let work = move || {
            let mut all =
                File::options().create_new(true).read(true).append(true).open(dir.join("all")).expect("create");
            let mut n = 0;
            while !ends.load(Relaxed) {
                all.write_all(format!("record {n}\n").as_bytes()).expect("append");
                let one = dir.join(format!("one{n}"));
                fs::write(&one, n.to_string()).expect("write");
                assert_eq!(fs::read_to_string(&one).expect("read"), n.to_string());
                if n % 2 == 0 {
                    fs::remove_file(&one).expect("remove");
                }
                n += 1;
                counts.store(n, Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
            let mut text = String::new();
            all.seek(SeekFrom::Start(0)).expect("seek");
            all.read_to_string(&mut text).expect("read");
            let expected: String = (0..n).map(|i| format!("record {i}\n")).collect();
            assert!(text == expected, "records are lost or there twice");
            let left = fs::read_dir(&dir).expect("list").count() as u64;
            assert_eq!(left, n / 2 + 1);
        };
        Writer { stop, count, thread: std::thread::spawn(work) }
    }

    fn more(&self) {
        let from = self.count.load(Relaxed);
        wait_for("the writer goes on", PATIENCE, || {
            anyhow::ensure!(!self.thread.is_finished(), "the writer has ended");
            Ok(self.count.load(Relaxed) > from + 20)
        })
        .expect("goes on");
    }

    fn end(self) {
        self.stop.store(true, Relaxed);
        self.thread.join().expect("the writer");
    }
}

/// A mount of a directory, with a cluster beside it.
fn rig() -> (Node, Cluster, tempfile::TempDir, PathBuf) {
    let node = Node::start();
    let cluster =
        Cluster::start(1, &[WorkerSpec { memory: "64MiB".into(), ..WorkerSpec::default() }]).expect("cluster");
    let origin = scratch("origin").expect("dir");
    let at = node.dir("mnt");
    let out = node.mount(&format!("file://{}", origin.path().display()), &at, &format!("rw,{}", cluster.option()));
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    (node, cluster, origin, at)
}

#[test]
fn holder_and_mount_process_may_both_be_killed() {
    let (node, _cluster, _origin, at) = rig();
    let writer = Writer::start(&at);
    let mut expected = Vec::new();
    for round in 0..6 {
        writer.more();
        let server = node.server(&at).expect("serves");
        let holder = parent(server);
        match round % 3 {
            // Both at once; the holder alone; the mount process alone.
            0 => kill_all(&[holder, server]),
            1 => kill_all(&[holder]),
            _ => kill_all(&[server]),
        }
        expected.push(if round % 3 == 2 { "crash" } else { "restart" });
        wait_for("another process", PATIENCE, || Ok(node.server(&at).is_some_and(|p| p != server))).expect("served");
        writer.more();
        assert_eq!(node.events(&at), expected);
        assert_eq!(processes(node.run.path()).len(), 2, "one holder and one mount process");
    }
    // What was set stays set, and another program the one that serves, whatever dies.
    let out = node.efc_fuse(&["set", at.to_str().expect("utf8"), "readahead=1MiB"]);
    assert!(out.status.success(), "{out:?}");
    let copy = node.run.path().join("efc-fuse-copy");
    fs::copy(program("efc-fuse").expect("program"), &copy).expect("copy");
    let out = node.efc_fuse(&["upgrade", at.to_str().expect("utf8"), "--binary", copy.to_str().expect("utf8")]);
    assert!(out.status.success(), "{out:?}");
    let server = node.server(&at).expect("serves");
    kill_all(&[parent(server), server]);
    wait_for("another process", PATIENCE, || Ok(node.server(&at).is_some_and(|p| p != server))).expect("served");
    let server = node.server(&at).expect("serves");
    assert_eq!(fs::read_link(format!("/proc/{server}/exe")).expect("exe"), copy);
    let line = fs::read(format!("/proc/{server}/cmdline")).expect("cmdline");
    assert!(String::from_utf8_lossy(&line).contains("readahead=1MiB"));
    writer.more();
    writer.end();
    node.umount(&at);
    wait_for("nothing is left", PATIENCE, || Ok(processes(node.run.path()).is_empty())).expect("ended");
    let left = fs::read_dir(node.run.path()).expect("list").filter_map(|e| e.ok()?.file_name().into_string().ok());
    let sockets: Vec<String> = left.filter(|n| n.ends_with(".sock")).collect();
    assert_eq!(sockets, ["holder.sock"]);
}

/// A real systemd, as the manager of a user, where it believes that it has booted the machine.
struct Systemd {
    process: Guarded,
    dir: tempfile::TempDir,
}

impl Drop for Systemd {
    fn drop(&mut self) {
        // Its mounts go with the last process of their name space.
        kill_all(&processes(self.dir.path()));
    }
}

impl Systemd {
    /// Starts it with one service, in which `@` is a directory of its own, with a `source` and a `mnt`.
    fn start(unit: &str) -> Systemd {
        let dir = scratch("systemd").expect("dir");
        let units = dir.path().join("systemd/user");
        [&units, &dir.path().join("source"), &dir.path().join("mnt")]
            .into_iter()
            .for_each(|d| fs::create_dir_all(d).expect("mkdir"));
        fs::write(units.join("efc.service"), unit.replace('@', &dir.path().display().to_string())).expect("write");
        let mut command = Command::new("unshare");
        let text = "mount -t tmpfs none /run && mkdir -p /run/systemd/system && exec /lib/systemd/systemd --user --log-target=console --unit=efc.service";
        command.args(["--mount", "sh", "-c", text]);
        command.env("XDG_RUNTIME_DIR", dir.path()).env("XDG_CONFIG_HOME", dir.path());
        let process = Guarded::spawn("systemd", command, dir.path()).expect("systemd");
        Systemd { process, dir }
    }

    /// Runs `efc-fuse` where its mounts are.
    fn efc_fuse(&self, args: &[&str]) -> Output {
        let mut run = Command::new("timeout");
        run.args(["60", "nsenter", "--mount", "--target", &self.process.pid().to_string()]);
        run.arg(program("efc-fuse").expect("program")).args(args).env("EFC_RUN_DIR", self.dir.path());
        run.output().expect("run")
    }

    fn server(&self, at: &str) -> Option<u32> {
        let stats: Value = serde_json::from_slice(&self.efc_fuse(&["stats", at, "-o", "json"]).stdout).ok()?;
        stats["pid"].as_u64().map(|p| p as u32)
    }
}

#[test]
fn systemd_keeps_a_mount_whose_processes_are_killed() {
    let cluster =
        Cluster::start(1, &[WorkerSpec { memory: "64MiB".into(), ..WorkerSpec::default() }]).expect("cluster");
    // As OPERATIONS.md has it.
    let unit = format!(
        "[Service]\nType=notify\nRestart=on-failure\nKillMode=mixed\nFileDescriptorStoreMax=4096\nEnvironment=FDSTORE=4096\nEnvironment=EFC_RUN_DIR=%t\nExecStart={} mount --foreground file://@/source @/mnt -o rw,{} --log-file=@/log\n",
        program("efc-fuse").expect("program").display(),
        cluster.option(),
    );
    let mut systemd = Systemd::start(&unit);
    let at = systemd.dir.path().join("mnt");
    let mountpoint = at.to_str().expect("utf8");
    let serves = |other: u32| systemd.server(mountpoint).is_some_and(|p| p != other);
    wait_for("the mount", PATIENCE, || Ok(serves(0))).expect("mounted");
    let seen = PathBuf::from(format!("/proc/{}/root{mountpoint}", systemd.process.pid()));
    let writer = Writer::start(&seen);
    for round in 0..4 {
        writer.more();
        let server = systemd.server(mountpoint).expect("serves");
        let holder = parent(server);
        if round % 2 == 0 {
            kill_all(&[holder, server])
        } else {
            kill_all(&[holder])
        }
        wait_for("another process", PATIENCE, || Ok(serves(server))).expect("served");
        writer.more();
        let said = systemd.efc_fuse(&["history", mountpoint, "-o", "json"]);
        let said: Value = serde_json::from_slice(&said.stdout).expect("json");
        let restarts = said["events"].as_array().expect("events").iter().filter(|e| e["what"] == "restart").count();
        assert_eq!(restarts, round + 1, "{said}");
    }
    writer.end();
    // It ends its services in order, and they unmount.
    systemd.process.signal(nix::sys::signal::Signal::SIGTERM).expect("signal");
    assert!(systemd.process.wait_exit(PATIENCE).is_some());
    assert!(processes(systemd.dir.path()).is_empty());
    let log = fs::read_to_string(systemd.dir.path().join("log")).expect("log");
    assert!(log.lines().last().is_some_and(|l| l.contains("unmounted")), "{log}");
}

#[test]
fn mounts_outlive_their_service() {
    let (mut node, _cluster, _origin, at) = rig();
    let writer = Writer::start(&at);
    writer.more();
    node.service.kill_hard();
    for _ in 0..2 {
        // Now each of the two starts the other.
        let server = node.server(&at).expect("serves");
        let before = processes(node.run.path());
        kill_all(&[parent(server)]);
        writer.more();
        wait_for("another holder", PATIENCE, || Ok(processes(node.run.path()).iter().any(|p| !before.contains(p))))
            .expect("held");
        assert_eq!(node.server(&at), Some(server));
        kill_all(&[server]);
        wait_for("another process", PATIENCE, || Ok(node.server(&at).is_some_and(|p| p != server))).expect("served");
        writer.more();
    }
    writer.end();
    node.umount(&at);
    wait_for("nothing is left", PATIENCE, || Ok(processes(node.run.path()).is_empty())).expect("ended");
}

/// Kills a mount's holder and mount process while the holder waits for an answer that the mount process owes. That is the first one after a takeover: it knows nothing of the origin's space
/// yet, and the holder has asked meanwhile.
fn kill_while_asked(node: &Node, at: &Path) -> u32 {
    for _ in 0..10 {
        let before = node.server(at).expect("serves");
        kill_all(&[before]);
        wait_for("another process", PATIENCE, || Ok(node.server(at).is_some_and(|p| p != before))).expect("served");
        let server = node.server(at).expect("serves");
        let holder = parent(server);
        let tasks = fs::read_dir(format!("/proc/{holder}/task")).expect("tasks").flatten();
        let mut stacks = tasks.map(|t| fs::read_to_string(t.path().join("stack")).unwrap_or_default());
        if stacks.any(|s| s.contains("fuse_statfs")) {
            kill_all(&[holder, server]);
            return server;
        }
    }
    panic!("the holder never waits");
}

#[test]
fn a_question_that_nobody_answers_is_no_hang() {
    let node = Node::start();
    let cluster =
        Cluster::start(1, &[WorkerSpec { memory: "64MiB".into(), ..WorkerSpec::default() }]).expect("cluster");
    let origin = scratch("origin").expect("dir");
    let source = format!("file://{}", origin.path().display());
    // Answers of the origin take their time.
    let options = format!("rw,{},fault=latency=900ms", cluster.option());
    let at = node.dir("held");
    let out = node.mount(&source, &at, &options);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    for _ in 0..2 {
        let server = kill_while_asked(&node, &at);
        wait_for("another process", PATIENCE, || Ok(node.server(&at).is_some_and(|p| p != server))).expect("served");
        let file = at.join("f");
        within(PATIENCE, move || fs::write(&file, "written").expect("serves"));
    }
    node.umount(&at);
    // Nobody is left to answer where no service holds the mount: whoever asks is told that at once.
    let alone = node.dir("alone");
    let out = node.efc_fuse(&["mount", &source, alone.to_str().expect("utf8"), "-o", &options]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    kill_while_asked(&node, &alone);
    let asked = alone.join("f");
    let ends = move || {
        // A call that is under way when the connection ends is told that it was given up.
        let said = fs::write(&asked, "lost").expect_err("nobody serves").raw_os_error();
        assert!([Some(nix::libc::ENOTCONN), Some(nix::libc::ECONNABORTED)].contains(&said), "{said:?}");
        Ok(said == Some(nix::libc::ENOTCONN))
    };
    within(PATIENCE, move || wait_for("the end of the connection", PATIENCE, ends).expect("ended"));
    node.umount(&alone);
}

#[test]
fn what_cannot_be_held_is_refused() {
    let (node, cluster, origin, at) = rig();
    let url = format!("file://{}", origin.path().display());
    let other = node.dir("other");
    let master = cluster.option();
    refused(&node.mount(&url, &at, &master), 6, "already a mount point");
    refused(&node.mount(&format!("{url}/none"), &other, &master), 3, "none");
    refused(&node.mount(&url, &other, &format!("{master},no_failover")), 2, "no_failover");
    refused(&node.mount(&url, &other, "nonsense"), 2, "nonsense");
    let nobody = node.run.path().join("nobody.sock");
    let (nobody, there) = (nobody.to_str().expect("utf8"), other.to_str().expect("utf8"));
    refused(&node.efc_fuse(&["mount", &url, there, "-o", &master, "--holder", nobody]), 5, "no `efc-fuse holder");
    let socket = node.socket.to_str().expect("utf8");
    refused(&node.efc_fuse(&["holder", "--listen", socket]), 6, "another service");
    // Whatever else is said to it, it serves on.
    for text in ["\n", "{\"args\":[\"stats\"],\"env\":[]}\n", "{\"args\":[\"mount\",\"a\\u0000b\"],\"env\":[]}\n"] {
        let mut stream = std::os::unix::net::UnixStream::connect(&node.socket).expect("connect");
        stream.write_all(text.as_bytes()).expect("write");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answer");
        assert!(answer.contains("failed"), "{text}: {answer}");
    }
    within(PATIENCE, move || fs::write(at.join("f"), "still").expect("serves"));
    drop(node);
}
