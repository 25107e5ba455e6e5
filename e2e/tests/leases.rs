//! Leases as users meet them: what they cost who only reads (nothing once it is warm, and the masters one word for each directory), what another mount sees, and
//! what happens to a change whose lease ends.

use efc_e2e::{Cluster, EVENTS_TOKEN, Mount, WorkerSpec, metric, wait_for, within};
use efc_testkit::oss::{OssOptions, OssServer};
use efc_testkit::{Ganesha, scratch};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(120);
const DIRS: usize = 10;
const FILES: usize = 50;

fn read_all(root: &Path) {
    for d in 0..DIRS {
        for f in 0..FILES {
            let bytes = fs::read(root.join(format!("d{d}/f{f}"))).expect("read");
            assert_eq!(bytes, content(d, f));
        }
    }
}

fn content(d: usize, f: usize) -> Vec<u8> {
    vec![(d * FILES + f) as u8; 3000 + f]
}

/// Requests of a warm pass, by operation, but for those of pages that the machine took back meanwhile (a READ, and on a mount that may change it the access time):
/// these may be a few.
fn warm(m: &Mount) -> BTreeMap<String, u64> {
    let path = m.path.clone();
    within(PATIENCE, move || read_all(&path));
    let (before, _) = m.fuse_requests().expect("stats");
    let path = m.path.clone();
    within(PATIENCE, move || read_all(&path));
    let (after, _) = m.fuse_requests().expect("stats");
    let more = |(op, n): (&String, &u64)| (op.clone(), n - before.get(op).copied().unwrap_or(0));
    let mut more: BTreeMap<String, u64> = after.iter().map(more).filter(|(_, n)| *n > 0).collect();
    let few = |n: &u64| *n <= (DIRS * FILES / 10) as u64;
    if more.get("read").is_none_or(few) {
        more.remove("read");
        more.retain(|op, n| op != "getattr" || !few(n));
    }
    more
}

#[test]
fn warm_readers_ask_nobody() {
    let s = OssServer::start_with(OssOptions::s3()).expect("server");
    s.create_bucket("b");
    for d in 0..DIRS {
        (0..FILES).for_each(|f| s.put("b", format!("d{d}/f{f}"), content(d, f)));
    }
    let cluster =
        Cluster::start(1, &[WorkerSpec { memory: "64MiB".into(), ..WorkerSpec::default() }]).expect("cluster");
    let (masters, endpoint) = (cluster.option(), format!("endpoint={}", s.endpoint()));
    let mount = |how: &str| {
        let options = [how, "consistency=strict", &masters, &endpoint, "region=us-east-1"];
        Mount::start("s3://b", &options, &s.target().env()).expect("mount")
    };
    let readers = [mount("ro"), mount("ro")];
    let writer = mount("rw");
    for m in &readers {
        assert_eq!(warm(m), BTreeMap::new(), "a warm pass on a read-only mount is the kernel's alone");
    }
    let files = (DIRS * FILES) as u64;
    // After it has read from us the kernel asks for the access time, once, if the mount may change it.
    warm(&writer);
    let opens = BTreeMap::from([("open".to_string(), files), ("release".to_string(), files)]);
    assert_eq!(warm(&writer), opens, "a read-write mount is told of opens and closes only");
    // Root and directories, once for each mount, within one period of leases.
    let grants = metric(&cluster.masters[0].http, "efc_master_lease_grants_total", "").expect("metric");
    assert!(grants <= (3 * (DIRS + 1)) as f64, "{grants} grants");
    for m in readers.into_iter().chain([writer]) {
        m.finish(&[]).expect("log");
    }
}

/// What one mount changes the other sees at its next look, also through what the kernel had cached, and on a read-only mount in a file that stays open.
#[test]
fn a_reader_sees_what_a_writer_changes() {
    let dir = scratch("leases").expect("scratch");
    let cluster =
        Cluster::start(1, &[WorkerSpec { memory: "64MiB".into(), ..WorkerSpec::default() }]).expect("cluster");
    let (masters, source) = (cluster.option(), format!("file://{}", dir.path().display()));
    let writer = Mount::start(&source, &["rw", &masters], &[]).expect("mount");
    let reader = Mount::start(&source, &["ro", "consistency=strict", &masters], &[]).expect("mount");
    let (w, r) = (writer.path.clone(), reader.path.clone());
    within(PATIENCE, move || {
        use std::os::unix::fs::{FileExt, MetadataExt};
        fs::write(w.join("f"), b"0000").expect("write");
        let open = fs::File::open(r.join("f")).expect("open");
        let inode = open.metadata().expect("stat").ino();
        for n in 1..50u32 {
            let text = format!("{n:04}");
            fs::write(w.join("f"), &text).expect("write");
            assert_eq!(fs::read_to_string(r.join("f")).expect("read"), text);
            let mut seen = [0; 4];
            open.read_exact_at(&mut seen, 0).expect("pread");
            assert_eq!(seen, text.as_bytes());
            let longer = fs::OpenOptions::new().append(true).open(w.join("f")).expect("open");
            longer.write_all_at(b"+", 0).expect("append");
            assert_eq!(open.metadata().expect("fstat").len(), 5);
            fs::create_dir(w.join(format!("d{n}"))).expect("mkdir");
            assert!(r.join(format!("d{n}")).is_dir() && !r.join(format!("d{}", n + 1)).exists());
            assert_eq!(fs::read_dir(&r).expect("list").count() as u32, n + 1);
        }
        assert_eq!(fs::metadata(r.join("f")).expect("stat").ino(), inode, "it is the same file all the time");
    });
    reader.finish(&[]).expect("log");
    writer.finish(&[]).expect("log");
}

/// What others change in a bucket is seen within a minute; where the store says so, at once.
#[test]
fn events_of_the_store_shorten_the_wait() {
    let s = OssServer::start_with(OssOptions::s3()).expect("server");
    s.create_bucket("b");
    s.put("b", "m/d/old", "one");
    let worker = WorkerSpec { memory: "64MiB".into(), ..WorkerSpec::default() };
    let cluster = Cluster::start(3, &[worker]).expect("cluster");
    let (masters, endpoint) = (cluster.option(), format!("endpoint={}", s.endpoint()));
    let mount = |how: &str| {
        let options = [how, "consistency=strict", &masters, &endpoint, "region=us-east-1"];
        Mount::start("s3://b/m", &options, &s.target().env()).expect("mount")
    };
    let mounts = [mount("ro"), mount("rw")];
    let paths: Vec<_> = mounts.iter().map(|m| m.path.join("d")).collect();
    let look = |path: &Path| {
        let path = path.to_path_buf();
        within(PATIENCE, move || {
            let names = fs::read_dir(&path).expect("list").count();
            (names, fs::read_to_string(path.join("old")).expect("read"), path.join("new").exists())
        })
    };
    let before = (1, "one".to_string(), false);
    paths.iter().for_each(|p| assert_eq!(look(p), before));
    s.put("b", "m/d/old", "other");
    s.put("b", "m/d/new", "x");
    paths.iter().for_each(|p| assert_eq!(look(p), before, "nobody has said anything"));
    let post = |master: usize, token: &str, body: &str| {
        let url = format!("http://{}/events?token={token}", cluster.masters[master].http);
        let mut curl = Command::new("curl");
        let answer = curl.args(["-sS", "-w", "%{http_code}", "-d", body, &url]).output().expect("curl");
        let text = String::from_utf8(answer.stdout).expect("text");
        let (text, status) = text.rsplit_once('\n').expect("a line and a status");
        (status.parse::<u16>().expect("status"), text.to_string())
    };
    let record = |key: &str| format!(r#"{{"s3":{{"bucket":{{"name":"b"}},"object":{{"key":"{key}"}}}}}}"#);
    let body = format!(r#"{{"Records":[{},{}]}}"#, record("m/d/old"), record("m/d/new"));
    assert_eq!(post(0, "guess", &body).0, 403);
    assert_eq!(post(0, EVENTS_TOKEN, "nothing").0, 400);
    paths.iter().for_each(|p| assert_eq!(look(p), before));
    // Any master takes it.
    let follower = (cluster.leader().expect("leader") + 1) % 3;
    let (status, text) = post(follower, EVENTS_TOKEN, &body);
    assert_eq!((status, text.trim()), (200, "2 keys, 2 mounts"));
    let after = (2, "other".to_string(), true);
    for p in &paths {
        wait_for("the change to be seen", Duration::from_secs(5), || Ok(look(p) == after)).expect("seen");
    }
    mounts.into_iter().for_each(|m| m.finish(&[]).expect("log"));
}

/// No origin can be told to refuse who has lost a lease. So a change that is still under way when the lease ends is given up in time, and the error says so.
#[test]
fn a_change_does_not_outlive_its_lease() {
    let dir = scratch("leases").expect("scratch");
    let server = Ganesha::start(dir.path()).expect("ganesha");
    let worker = WorkerSpec { memory: "64MiB".into(), ..WorkerSpec::default() };
    let mut cluster = Cluster::start(1, &[worker]).expect("cluster");
    let (masters, port) = (cluster.option(), format!("mount_port={}", server.mount_port()));
    let m = Mount::start(&server.url(), &["rw", &masters, &port, "deadline=120s"], &[]).expect("mount");
    let path = m.path.join("f");
    let file = within(PATIENCE, move || {
        fs::write(&path, b"before").expect("write");
        fs::OpenOptions::new().write(true).open(&path).expect("open")
    });
    server.freeze().expect("freeze");
    cluster.masters[0].kill();
    let (file, took) = within(PATIENCE, move || {
        use std::os::unix::fs::FileExt;
        let begun = std::time::Instant::now();
        file.write_all_at(b"during", 0).expect_err("given up");
        (file, begun.elapsed())
    });
    assert!(took < Duration::from_secs(10), "the lease lives 10 s, the change went on for {took:?}");
    server.thaw().expect("thaw");
    cluster.start_masters().expect("master");
    within(PATIENCE, move || {
        use std::os::unix::fs::FileExt;
        file.write_all_at(b"after.", 0).expect("with a new lease");
    });
    assert_eq!(fs::read(dir.path().join("f")).expect("origin"), b"after.");
    m.unmount().expect("unmount");
}
