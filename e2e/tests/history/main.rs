//! Two mounts in network namespaces of their own do random things to a few files and directories; everything is recorded, and checked to be linearizable
//! (`check`), while masters are killed and mounts are cut off from them. `EFC_E2E_LONG=1`: a million operations, a leader killed every 20 s;
//! `EFC_E2E_OPERATIONS=N`: so many; `EFC_SEED=N`: what each thread does.

mod check;
mod work;

use efc_e2e::net::Lan;
use efc_e2e::{Cluster, Mount, WorkerSpec};
use efc_testkit::ganesha::Ganesha;
use efc_testkit::oss::{OssOptions, OssServer};
use efc_testkit::process::scratch;
use std::time::{Duration, Instant};
use work::Workload;

/// Longer than a lease lives.
const CUT: Duration = Duration::from_secs(14);
/// What was cut off comes back, opens a session and waits for what others hold; nothing may take longer.
const SLOWEST: Duration = Duration::from_secs(60);

fn long() -> bool {
    std::env::var_os("EFC_E2E_LONG").is_some()
}

/// How a run is bounded.
fn operations(short: u64) -> u64 {
    let asked = std::env::var("EFC_E2E_OPERATIONS").ok().and_then(|n| n.parse().ok());
    asked.unwrap_or(if long() { 1_000_000 } else { short })
}

/// Where the mounts run and what may happen to them.
struct Scene {
    cluster: Cluster,
    /// Network namespaces of their own; none: all in this one.
    lan: Option<Lan>,
}

impl Scene {
    fn new(apart: bool) -> Scene {
        let lan = apart.then(|| Lan::new(2).expect("network namespaces"));
        let host = lan.as_ref().map_or("127.0.0.1", Lan::host);
        let worker = WorkerSpec { memory: "64MiB".into(), ..WorkerSpec::default() };
        Scene { cluster: Cluster::start_at(host, 3, &[worker]).expect("cluster"), lan }
    }

    fn mount(&self, node: usize, source: &str, options: &[&str], env: &[(&str, &str)]) -> Mount {
        let masters = self.cluster.option();
        let mut all = vec!["rw", "consistency=strict", "umask=000", &masters];
        all.extend(options);
        match &self.lan {
            Some(lan) => Mount::start_in(&lan.nodes[node], source, &all, env).expect("mount"),
            None => Mount::start(source, &all, env).expect("mount"),
        }
    }

    fn kill_leader(&mut self) -> bool {
        let Ok(leader) = self.cluster.leader() else { return false };
        self.cluster.masters[leader].kill();
        std::thread::sleep(Duration::from_secs(1));
        self.cluster.start_masters().expect("the master comes back");
        true
    }

    /// Cuts one mount off the masters for longer than its leases live.
    fn cut_off(&self, node: usize) {
        if let Some(lan) = &self.lan {
            lan.nodes[node].cut(true).expect("cut");
            std::thread::sleep(CUT);
            lan.nodes[node].cut(false).expect("join");
        }
    }
}

fn run(mut scene: Scene, source: &str, options: &[&str], env: &[(&str, &str)], short: u64) {
    let (a, b) = (scene.mount(0, source, options, env), scene.mount(1, source, options, env));
    let work = Workload::start([a.path.clone(), b.path.clone()], operations(short), SLOWEST);
    let every = Duration::from_secs(if long() { 20 } else { 6 });
    let (mut last, mut kills, mut cuts) = (Instant::now(), 0, 0);
    while !work.is_done() {
        std::thread::sleep(Duration::from_millis(200));
        if last.elapsed() < every {
            continue;
        }
        // The second fault, and then every tenth.
        if scene.lan.is_some() && kills % 10 == 1 && cuts * 10 < kills {
            scene.cut_off(cuts % 2);
            cuts += 1;
        } else {
            kills += usize::from(scene.kill_leader());
        }
        if kills > 0 && (cuts > 0 || scene.lan.is_none()) {
            work.may_end();
        }
        last = Instant::now();
    }
    let done = work.finish();
    println!(
        "{source}: {} operations, {} violations, {kills} leaders killed, {cuts} mounts cut off, slowest {:?}, seed {}",
        done.operations,
        done.violations.len(),
        done.slowest,
        done.seed
    );
    println!("{}", done.by_kind());
    assert!(done.violations.is_empty(), "not linearizable (seed {}):\n{}", done.seed, done.violations.join("\n"));
    assert!(done.operations >= operations(short) && kills > 0, "{} operations, {kills} kills", done.operations);
    a.unmount().expect("unmount");
    b.unmount().expect("unmount");
}

#[test]
fn two_mounts_of_a_directory_are_linearizable_while_leaders_die() {
    let dir = scratch("origin").expect("scratch");
    run(Scene::new(true), &format!("file://{}", dir.path().display()), &[], &[], 30_000);
}

#[test]
fn two_mounts_of_an_nfs_export_are_linearizable() {
    let dir = scratch("origin").expect("scratch");
    let server = Ganesha::start(dir.path()).expect("ganesha");
    let port = format!("mount_port={}", server.mount_port());
    run(Scene::new(false), &server.url(), &[&port], &[], 10_000);
}

#[test]
fn two_mounts_of_a_bucket_are_linearizable() {
    let server = OssServer::start_with(OssOptions::s3()).expect("server");
    server.create_bucket("b");
    let endpoint = format!("endpoint={}", server.endpoint());
    let keys = server.target();
    run(Scene::new(false), "s3://b", &[&endpoint, "region=us-east-1"], &keys.env(), 5_000);
}
