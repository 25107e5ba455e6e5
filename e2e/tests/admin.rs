//! `efc`, the admin command, against real masters and workers over a `file://` dataset.

use anyhow::{Context, Result};
use efc_e2e::{Cluster, Mount, WorkerSpec, program, within};
use efc_testkit::process::scratch;
use efc_testkit::{OssOptions, OssServer};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What a run of `efc` gave.
struct Ran {
    code: i32,
    out: String,
    err: String,
}

/// Runs `efc ARGS` without a terminal; no master comes from the environment.
fn efc(args: &[&str]) -> Result<Ran> {
    efc_with(args, &[])
}

fn efc_with(args: &[&str], env: &[(&str, &str)]) -> Result<Ran> {
    let mut command = Command::new(program("efc")?);
    command.args(args).env_remove("EFC_MASTER").envs(env.iter().copied()).stdin(Stdio::null());
    let out = command.output()?;
    let text = |b: Vec<u8>| String::from_utf8_lossy(&b).into_owned();
    Ok(Ran { code: out.status.code().unwrap_or(-1), out: text(out.stdout), err: text(out.stderr) })
}

/// Runs `efc --master ... ARGS` whatever comes of it.
fn ask(c: &Cluster, args: &[&str]) -> Result<Ran> {
    efc(&[&["--master", &c.master_addrs()][..], args].concat())
}

/// Asserts that `efc ARGS` fails with `code` and one sentence that has `word`.
#[track_caller]
fn refused(ran: Result<Ran>, code: i32, word: &str) {
    let ran = ran.expect("run efc");
    assert_eq!(ran.code, code, "{}{}", ran.out, ran.err);
    assert!(ran.err.contains(word), "{}", ran.err);
}

fn worker(memory: &str) -> WorkerSpec {
    WorkerSpec { memory: memory.into(), ..WorkerSpec::default() }
}

fn number(v: &Value, path: &str) -> u64 {
    v.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("{path} in {v}"))
}

/// Sizes of the files of [`make_tree`]: a file of three blocks, small ones, an empty one.
const BIG: u64 = 9 << 20;
const SMALL: u64 = 1000;
const SMALL_FILES: u64 = 20;

/// Makes `big`, `empty` and `dir/sub/fN` below `at`; gives (files, bytes).
fn make_tree(at: &Path) -> Result<(u64, u64)> {
    let sub = at.join("dir/sub");
    std::fs::create_dir_all(&sub)?;
    std::fs::write(at.join("big"), vec![7u8; BIG as usize])?;
    std::fs::write(at.join("empty"), b"")?;
    for i in 0..SMALL_FILES {
        std::fs::write(sub.join(format!("f{i}")), vec![i as u8; SMALL as usize])?;
    }
    std::os::unix::fs::symlink("..", at.join("dir/up"))?;
    Ok((SMALL_FILES + 2, BIG + SMALL_FILES * SMALL))
}

#[test]
fn datasets_are_created_listed_shown_and_deleted() -> Result<()> {
    let c = Cluster::start(1, &[])?;
    let made =
        c.efc(&["dataset", "create", "one", "file:///data/x", "-O", "bandwidth=1GiB", "--consistency", "immutable"])?;
    assert_eq!(made["mounts"][0]["source"], "file:///data/x");
    assert_eq!(made["mounts"][0]["options"], json!({ "bandwidth": "1GiB" }));
    // The same words again are the same dataset; other words are refused.
    let again =
        c.efc(&["dataset", "create", "one", "file:///data/x", "-O", "bandwidth=1GiB", "--consistency", "immutable"])?;
    assert_eq!(again, made);
    refused(ask(&c, &["dataset", "create", "one", "file:///data/y"]), 6, "one");

    let file = c.dir().join("two.json");
    let two = json!({ "name": "two", "consistency": "ttl=5", "cache": { "ttl_seconds": 60, "pin": true }, "mounts": [
        { "source": "file:///data/x" },
        { "path": "/nas", "source": "nfs://nas/export", "secret": "anonymous" } ] });
    std::fs::write(&file, two.to_string())?;
    c.efc(&["dataset", "create", "--from-file", &file.display().to_string()])?;
    let shown = c.efc(&["dataset", "show", "two"])?;
    assert_eq!((&shown["mounts"][1]["path"], &shown["cache"]["pin"]), (&json!("/nas"), &json!(true)));
    // What `show` prints makes the same dataset under another name.
    std::fs::write(&file, shown.to_string())?;
    let three = c.efc(&["dataset", "create", "three", "--from-file", &file.display().to_string()])?;
    assert_eq!(three["mounts"], shown["mounts"]);

    let listed = c.efc(&["dataset", "list"])?;
    let names: Vec<&str> =
        listed["datasets"].as_array().context("list")?.iter().filter_map(|d| d["name"].as_str()).collect();
    assert_eq!(names, ["one", "three", "two"]);
    let table = ask(&c, &["dataset", "list"])?;
    assert!(table.out.starts_with("NAME") && table.out.contains("file:///data/x and 1 more"), "{}", table.out);

    refused(ask(&c, &["dataset", "delete", "one"]), 2, "--yes");
    assert_eq!(c.efc(&["dataset", "delete", "one", "--yes"])?["name"], "one");
    refused(ask(&c, &["dataset", "delete", "one", "--yes"]), 3, "efc dataset list");
    refused(ask(&c, &["dataset", "show", "one"]), 3, "one");
    refused(ask(&c, &["dataset", "create", "Bad_Name", "file:///x"]), 2, "name");
    refused(ask(&c, &["dataset", "create", "x", "file:///x", "-O", "no_such=1"]), 2, "no_such");
    refused(ask(&c, &["dataset", "create", "x", "ftp://x"]), 2, "ftp");
    Ok(())
}

#[test]
fn a_cluster_that_cannot_be_asked_is_named() -> Result<()> {
    let gone = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    refused(efc(&["--master", &gone, "status"]), 5, &gone);
    refused(efc(&["status"]), 2, "EFC_MASTER");
    refused(efc(&["--master", "nonsense", "status"]), 2, "host:port");
    let c = Cluster::start(1, &[])?;
    let dir = scratch("admin")?;
    let source = format!("file://{}", dir.path().display());
    c.efc(&["dataset", "create", "x", &source])?;
    // Counting needs no worker, warming does.
    assert_eq!(number(&c.efc(&["warmup", "dataset://x", "--dry-run"])?, "/files_total"), 0);
    refused(ask(&c, &["warmup", "dataset://x"]), 5, "efc-worker");
    refused(ask(&c, &["cache", "stat", "dataset://x"]), 5, "worker");
    refused(ask(&c, &["warmup", "/proc"]), 2, "EFC mount");
    assert_eq!(c.efc(&["ring", "show"])?["members"], json!([]));
    assert_eq!(c.efc(&["sessions"])?["sessions"], json!([]));
    Ok(())
}

#[test]
fn masters_are_shown_removed_and_added() -> Result<()> {
    let mut c = Cluster::start(3, &[])?;
    let status = c.efc(&["status"])?;
    let leader = number(&status, "/leader");
    assert_eq!(status["masters"].as_array().map(Vec::len), Some(3));
    assert_eq!(status["warnings"], json!([]));
    let other = c.masters.iter().position(|m| m.node != leader).context("a follower")?;
    let (node, addr) = (c.masters[other].node.to_string(), c.masters[other].addr.clone());

    let left = c.efc(&["master", "remove", &node])?;
    assert_eq!(left["masters"].as_array().map(Vec::len), Some(2), "{left}");
    refused(ask(&c, &["master", "remove", "9"]), 3, "efc status");
    let back = c.efc(&["master", "add", &node, &addr])?;
    assert_eq!(back["masters"].as_array().map(Vec::len), Some(3), "{back}");
    refused(ask(&c, &["master", "add", "7", &addr]), 2, &addr);

    c.masters[other].kill();
    let hurt = ask(&c, &["status"])?;
    assert_eq!(hurt.code, 0, "{}", hurt.err);
    assert!(hurt.err.contains(&format!("warning: master {node} at {addr} does not answer")), "{}", hurt.err);
    assert!(hurt.out.contains("leader"), "{}", hurt.out);
    let nodes = c.efc(&["nodes", "--masters"])?;
    let row = nodes["masters"].as_array().context("masters")?.iter().find(|m| m["addr"] == addr.as_str());
    assert!(row.is_some_and(|m| m["error"].is_string() && m["applied"].is_null()), "{nodes}");
    Ok(())
}

#[test]
fn files_are_warmed_counted_pinned_and_evicted() -> Result<()> {
    let c = Cluster::start(1, &[worker("64MiB"), worker("64MiB")])?;
    let dir = scratch("admin")?;
    let (files, bytes) = make_tree(dir.path())?;
    c.efc(&["dataset", "create", "data", &format!("file://{}", dir.path().display())])?;

    let dry = c.efc(&["warmup", "dataset://data", "--dry-run"])?;
    assert_eq!((number(&dry, "/files_total"), number(&dry, "/bytes_total")), (files, bytes));
    assert_eq!((number(&dry, "/gets_max"), number(&dry, "/origin_bytes")), (3 + SMALL_FILES, 0));
    assert_eq!(number(&c.efc(&["cache", "stat", "dataset://data"])?, "/cached_bytes"), 0);

    let first = c.efc(&["warmup", "dataset://data", "--concurrency", "4"])?;
    assert_eq!((number(&first, "/files"), number(&first, "/origin_bytes")), (files, bytes), "{first}");
    let second = c.efc(&["warmup", "dataset://data/"])?;
    assert_eq!((number(&second, "/files"), number(&second, "/origin_bytes")), (files, 0), "{second}");
    assert_eq!(number(&second, "/cached_bytes"), bytes);

    let stat = c.efc(&["cache", "stat", "dataset://data"])?;
    assert_eq!((number(&stat, "/cached_bytes"), number(&stat, "/files_whole")), (bytes, files));
    let workers = c.efc(&["cache", "stat"])?;
    assert_eq!(workers["workers"].as_array().map(Vec::len), Some(2));
    assert!(number(&workers, "/used_bytes") >= bytes, "{workers}");

    // Pinned files outlive everything but their own eviction.
    let pinned = c.efc(&["cache", "pin", "dataset://data/dir"])?;
    assert_eq!(number(&pinned, "/pinned_bytes"), SMALL_FILES * SMALL);
    c.efc(&["cache", "evict", "--all"])?;
    let kept = c.efc(&["cache", "stat", "dataset://data"])?;
    assert_eq!(number(&kept, "/cached_bytes"), SMALL_FILES * SMALL, "{kept}");
    assert_eq!(number(&kept, "/pinned_bytes"), SMALL_FILES * SMALL);
    c.efc(&["cache", "unpin", "dataset://data/dir"])?;
    c.efc(&["cache", "evict", "--all"])?;
    assert_eq!(number(&c.efc(&["cache", "stat", "dataset://data"])?, "/segments"), 0);

    // A list of paths: what fails is told, the rest is done.
    let list = c.dir().join("list");
    std::fs::write(&list, "# mine\ndataset://data/dir/sub/f1\ndataset://data/none\ndataset://other/x\n")?;
    let ran = ask(&c, &["warmup", "--list-from", &list.display().to_string(), "-o", "json"])?;
    let report: Value = serde_json::from_str(&ran.out)?;
    assert_eq!((ran.code, number(&report, "/files"), number(&report, "/failed")), (1, 1, 2), "{}", ran.err);
    assert_eq!(report["errors"][0]["path"], "dataset://data/none");
    refused(ask(&c, &["warmup", "dataset://data/none"]), 3, "/none");
    assert_eq!(number(&c.efc(&["cache", "evict", "dataset://data/dir/sub/f1"])?, "/cached_bytes"), SMALL);
    Ok(())
}

#[test]
fn the_ring_says_who_owns_what_and_workers_leave_and_return() -> Result<()> {
    let mut c = Cluster::start(1, &[worker("64MiB"), worker("128MiB")])?;
    let dir = scratch("admin")?;
    make_tree(dir.path())?;
    c.efc(&["dataset", "create", "data", &format!("file://{}", dir.path().display())])?;
    let ring = c.efc(&["ring", "show"])?;
    let share = |i: usize| ring["members"][i]["share"].as_f64().unwrap_or_default();
    assert!((share(0) * 3.0 - 1.0).abs() < 0.1 && (share(0) + share(1) - 1.0).abs() < 1e-9, "{ring}");

    let key = c.efc(&["ring", "show", "dataset://data/big"])?;
    let blocks = key["blocks"].as_array().context("blocks")?;
    assert_eq!((blocks.len(), blocks[2]["length"].as_u64()), (3, Some(1 << 20)));
    assert!(blocks.iter().all(|b| b["owners"].as_array().is_some_and(|o| o.len() == 2)), "{key}");
    let one = c.efc(&["ring", "show", "dataset://data/big@5000000"])?;
    assert_eq!(one["blocks"], json!([blocks[1]]));
    refused(ask(&c, &["ring", "show", "dataset://data/big@99999999"]), 2, "beyond");
    assert_eq!(c.efc(&["ring", "show", "dataset://data/dir"])?["kind"], "directory");

    let nodes = c.efc(&["nodes"])?;
    assert_eq!((&nodes["workers"][0]["id"], &nodes["workers"][0]["state"]), (&json!("w1"), &json!("live")));
    assert_eq!(c.efc(&["nodes", "drain", "w2"])?["members"], json!(["w1"]));
    assert_eq!(c.efc(&["nodes"])?["workers"][1]["state"], "draining");
    assert_eq!(c.efc(&["nodes", "undrain", "w2"])?["members"], json!(["w1", "w2"]));
    refused(ask(&c, &["nodes", "forget", "w2"]), 6, "w2");
    refused(ask(&c, &["nodes", "drain", "w9"]), 3, "efc nodes");
    // A worker that said goodbye is gone, and can be forgotten.
    c.workers[1].drain()?;
    assert_eq!(c.efc(&["nodes"])?["workers"][1]["state"], "gone");
    c.efc(&["nodes", "forget", "w2"])?;
    assert_eq!(c.efc(&["nodes"])?["workers"].as_array().map(Vec::len), Some(1));
    Ok(())
}

#[test]
fn an_interrupted_warm_up_says_what_was_done() -> Result<()> {
    let c = Cluster::start(1, &[worker("64MiB")])?;
    let dir = scratch("admin")?;
    let files = 400;
    for i in 0..files {
        std::fs::write(dir.path().join(format!("f{i}")), [1u8; 10])?;
    }
    let source = format!("file://{}", dir.path().display());
    c.efc(&["dataset", "create", "slow", &source, "-O", "fault=latency=100ms"])?;
    let mut command = Command::new(program("efc")?);
    command.args(["--master", &c.master_addrs(), "warmup", "dataset://slow", "--concurrency", "1", "-o", "json"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    let deadline = Instant::now() + Duration::from_secs(30);
    while number(&c.efc(&["cache", "stat"])?, "/segments") == 0 {
        assert!(Instant::now() < deadline, "nothing was warmed");
    }
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT)?;
    let out = child.wait_with_output()?;
    let report: Value = serde_json::from_slice(&out.stdout)?;
    assert_eq!((out.status.code(), &report["cancelled"]), (Some(1), &json!(true)), "{report}");
    assert!(number(&report, "/files") < files, "{report}");
    assert!(String::from_utf8_lossy(&out.stderr).contains("cancelled after"), "{:?}", out.stderr);
    // It goes on where it stopped: what was done costs the origin nothing.
    let rest = c.efc(&["warmup", "dataset://slow", "--concurrency", "64"])?;
    assert_eq!((number(&rest, "/files"), number(&rest, "/bytes")), (files, files * 10), "{rest}");
    assert!(number(&rest, "/cached_bytes") > 0, "{rest}");
    Ok(())
}

#[test]
fn warming_a_bucket_costs_one_list_a_directory_and_one_get_a_block() -> Result<()> {
    let store = OssServer::start_with(OssOptions::s3())?;
    store.create_bucket("b");
    for i in 0..50 {
        store.put("b", format!("dir/f{i:02}"), vec![i as u8; 100]);
    }
    store.put("b", "dir/big", vec![1u8; 5 << 20]);
    let c = Cluster::start(1, &[worker("64MiB"), worker("64MiB")])?;
    let endpoint = format!("endpoint={}", store.endpoint());
    c.efc(&["dataset", "create", "bucket", "s3://b", "-O", &endpoint])?;
    let masters = c.master_addrs();
    let run = |args: &[&str], env: &[(&str, &str)]| efc_with(&[&["--master", &masters], args].concat(), env);
    refused(
        run(&["warmup", "dataset://bucket"], &[("AWS_ACCESS_KEY_ID", ""), ("AWS_SECRET_ACCESS_KEY", "")]),
        2,
        "AWS_ACCESS_KEY_ID",
    );
    let target = store.target();
    let keys = [("AWS_ACCESS_KEY_ID", target.key_id.as_str()), ("AWS_SECRET_ACCESS_KEY", target.secret.as_str())];
    let json = |args: &[&str]| -> Result<Value> {
        let ran = run(&[args, &["-o", "json"]].concat(), &keys)?;
        assert_eq!(ran.code, 0, "{}", ran.err);
        Ok(serde_json::from_str(&ran.out)?)
    };
    store.reset_stats();
    let first = json(&["warmup", "dataset://bucket"])?;
    assert_eq!((number(&first, "/files"), number(&first, "/origin_bytes")), (51, 5000 + (5 << 20)), "{first}");
    let cost = store.stats();
    assert_eq!((cost.of("head"), cost.of("get")), (0, 52), "{cost:?}");
    // One for the check of the root, one for each of the two directories.
    assert!(cost.of("list") <= 3, "{cost:?}");
    let list = c.dir().join("list");
    std::fs::write(&list, (0..50).map(|i| format!("dataset://bucket/dir/f{i:02}\n")).collect::<String>())?;
    store.reset_stats();
    let again = json(&["warmup", "--list-from", &list.display().to_string()])?;
    assert_eq!((number(&again, "/files"), number(&again, "/origin_bytes")), (50, 0), "{again}");
    let cost = store.stats();
    assert!(cost.of("get") == 0 && cost.of("head") + cost.of("list") <= 4, "{cost:?}");
    let dir = json(&["ring", "show", "dataset://bucket/dir"])?;
    assert_eq!(dir["listing_owners"].as_array().map(Vec::len), Some(2), "{dir}");
    Ok(())
}

#[test]
fn a_mounted_path_is_warmed_by_its_mount() -> Result<()> {
    let c = Cluster::start(1, &[worker("64MiB")])?;
    let dir = scratch("admin")?;
    let (files, bytes) = make_tree(dir.path())?;
    c.efc(&["dataset", "create", "data", &format!("file://{}", dir.path().display())])?;
    let mount = Mount::start("dataset://data", &[&c.option()], &[])?;
    let run = |path: &str, more: &[&str]| -> Result<Ran> {
        let args: Vec<String> = ["warmup", path, "-o", "json"].iter().chain(more).map(ToString::to_string).collect();
        within(Duration::from_secs(60), move || efc(&args.iter().map(String::as_str).collect::<Vec<_>>()))
    };
    let report = |ran: Ran| serde_json::from_str::<Value>(&ran.out).with_context(|| ran.err);
    let root = mount.path.display().to_string();
    let dry = report(run(&root, &["--dry-run"])?)?;
    assert_eq!((number(&dry, "/files_total"), number(&dry, "/bytes_total")), (files, bytes), "{dry}");
    let sub = report(run(&format!("{root}/dir/sub"), &[])?)?;
    assert_eq!((number(&sub, "/files"), number(&sub, "/origin_bytes")), (SMALL_FILES, SMALL_FILES * SMALL), "{sub}");
    let all = report(run(&root, &[])?)?;
    assert_eq!((number(&all, "/files"), number(&all, "/bytes")), (files, bytes), "{all}");
    assert_eq!(number(&all, "/cached_bytes"), SMALL_FILES * SMALL, "{all}");
    // The mount opens its session beside its work.
    let deadline = Instant::now() + Duration::from_secs(20);
    while c.efc(&["sessions"])?["sessions"].as_array().is_none_or(|s| s.iter().all(|s| s["dataset"] != "data")) {
        assert!(Instant::now() < deadline, "{}", c.efc(&["sessions"])?);
    }
    refused(ask(&c, &["dataset", "delete", "data", "--yes"]), 6, "efc sessions");
    refused(run(&format!("{root}/none"), &[]), 1, "none");
    mount.unmount()
}
