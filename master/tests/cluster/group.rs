//! The master group from outside: real processes that are killed, wiped, added and removed.

use crate::harness::{Group, PATIENCE, Proc, client, dataset, eventually, worker};
use efc_common::Kind;
use efc_common::id::Incarnation;
use efc_common::task::TaskGroup;
use efc_proto::control::raft_client::RaftClient;
use efc_proto::control::{HelloRequest, RaftMessage, RegisterWorkerRequest, WorkerLoad};
use efc_proto::status::from_status;
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::sync::watch;

async fn names(c: &efc_client::master::MasterClient) -> BTreeSet<String> {
    c.list_datasets().await.expect("list").into_iter().map(|d| d.name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_knows_one_follower_does_all() {
    let g = Group::start(3, &[]).await;
    let follower = &g.nodes[g.follower().await];
    let c = follower.client();
    let made = c.create_dataset(dataset("a")).await.expect("create");
    assert_eq!((made.id, made.name.as_str()), (1, "a"));
    assert!(made.created_ms > 0);
    // Again the same is the same; something else is refused.
    assert_eq!(c.create_dataset(dataset("a")).await.expect("again"), made);
    let mut other = dataset("a");
    other.consistency = "ttl=5".into();
    assert!(c.create_dataset(other).await.is_err_and(|e| e.is(Kind::AlreadyExists)));
    assert!(c.create_dataset(dataset("A")).await.is_err_and(|e| e.is(Kind::Invalid) && e.message().contains("name")));
    assert!(c.get_dataset("b").await.is_err_and(|e| e.is(Kind::NotFound)));
    assert_eq!(c.addrs().len(), 3, "all masters were learnt from one: {:?}", c.addrs());
    // Each node leads to what is acknowledged.
    for n in &g.nodes {
        assert_eq!(n.client().get_dataset("a").await.expect("get"), made);
    }
    let s = c.status().await.expect("status");
    assert!(s.leader && s.masters.iter().all(|m| m.voter) && s.masters.len() == 3 && s.datasets == 1, "{s:?}");
    assert_eq!(s.cluster.len(), 16);

    assert_eq!(follower.http_get("/healthz").await, "200 ok\n");
    assert!(follower.http_get("/status").await.contains(&s.cluster));
    let metrics = g.nodes[g.leader().await].http_get("/metrics").await;
    assert!(metrics.contains("efc_master_is_leader 1") && metrics.contains("efc_master_workers"), "{metrics}");
    assert_eq!(c.delete_dataset("a").await.expect("delete"), made);
    assert!(c.delete_dataset("a").await.is_err_and(|e| e.is(Kind::NotFound)));
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_for_somebody_else_and_garbage_are_refused() {
    let root = tempfile::tempdir().expect("dir");
    let mut p = Proc::new(root.path(), 1, &["--listen".into(), "127.0.0.1:0".into()]);
    p.start().await;
    let mut raft = RaftClient::connect(format!("http://{}", p.grpc)).await.expect("connect");
    let who = raft.hello(HelloRequest {}).await.expect("hello").into_inner();
    assert!(who.node == 1 && who.store != 0 && who.initialised && !who.cluster.is_empty());
    for (to_node, to_store, want) in
        [(1, who.store + 1, Kind::Stale), (2, who.store, Kind::Stale), (1, who.store, Kind::Invalid)]
    {
        for payload in [&b""[..], b"\x01{", b"\x02{}", b"garbage"] {
            let m = RaftMessage { payload: payload.into(), to_node, to_store, data: Default::default() };
            let all = [raft.append(m.clone()).await, raft.vote(m.clone()).await, raft.snapshot(m).await];
            for answer in all {
                assert_eq!(from_status(&answer.expect_err("refused")).kind(), want);
            }
        }
    }
    p.client().create_dataset(dataset("still-alive")).await.expect("serves on");
    assert!(p.terminate().await, "SIGTERM ends it in good order");
    p.start().await;
    assert_eq!(names(&p.client()).await.len(), 1);
}

/// Writes datasets until told to stop; counts and keeps what was acknowledged.
struct Writer {
    acked: watch::Receiver<Vec<String>>,
    tasks: TaskGroup,
}

impl Writer {
    fn start(c: efc_client::master::MasterClient) -> Writer {
        let (tx, acked) = watch::channel(Vec::new());
        let tasks = TaskGroup::new();
        tasks.spawn(async move {
            for n in 0u64.. {
                let name = format!("d{n}");
                c.create_dataset(dataset(&name)).await.expect("write");
                tx.send_modify(|v| v.push(name));
            }
        });
        Writer { acked, tasks }
    }

    /// Waits for `n` more acknowledgements.
    async fn more(&mut self, n: usize) {
        let goal = self.acked.borrow().len() + n;
        let wait = self.acked.wait_for(|v| v.len() >= goal);
        tokio::time::timeout(PATIENCE, wait).await.expect("writes go on").expect("writer lives");
    }

    async fn stop(self) -> BTreeSet<String> {
        self.tasks.shutdown(PATIENCE).await;
        self.acked.borrow().iter().cloned().collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_whoever_is_killed() {
    let mut g = Group::start(3, &["--worker-expire", "3s", "--snapshot-logs", "200"]).await;
    let mut writer = Writer::start(g.client());
    let c = g.client();
    let request = RegisterWorkerRequest { worker: Some(worker("w")), cluster: String::new() };
    let life = c.register_worker(request).await.expect("register");
    let beats = TaskGroup::new();
    let (beat_failed, failures) = watch::channel(None);
    beats.spawn(async move {
        loop {
            if let Err(e) = c.heartbeat("w", Incarnation(life.incarnation), WorkerLoad::default()).await {
                beat_failed.send_replace(Some(e.to_string()));
            }
            tokio::time::sleep(Duration::from_millis(life.heartbeat_ms / 4)).await;
        }
    });
    for _ in 0..5 {
        writer.more(10).await;
        let leader = g.leader().await;
        g.nodes[leader].kill().await;
        writer.more(10).await;
        g.start_all().await;
    }
    writer.more(10).await;
    // A worker that beats through five changes of the leader is never expired.
    assert_eq!(*failures.borrow(), None);
    assert!(beats.shutdown(PATIENCE).await);
    let acked = writer.stop().await;
    let cluster = g.client().status().await.expect("status").cluster;
    for n in &mut g.nodes {
        n.kill().await;
    }
    // One of three cannot lead, but it shows what it has.
    let out = g.nodes[0].spawn();
    let alone = g.nodes[0].client();
    let shown = names(&alone).await;
    assert!(shown.len() + 60 >= acked.len(), "{} of {}", shown.len(), acked.len());
    assert!(alone.with_deadline(Duration::from_millis(300)).create_dataset(dataset("x")).await.is_err());
    g.nodes[0].kill().await;
    drop(out);
    g.start_all().await;
    let found = names(&g.client()).await;
    assert!(found.is_superset(&acked), "lost: {:?}", acked.difference(&found).collect::<Vec<_>>());
    assert!(acked.len() >= 110);
    assert_eq!(g.client().status().await.expect("status").cluster, cluster);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wiped_voter_comes_back_and_votes() {
    let mut g = Group::start(3, &[]).await;
    let cluster = g.client().status().await.expect("status").cluster;
    g.client().create_dataset(dataset("before")).await.expect("create");
    // Node 1 is the one that forms groups: wiped, it must not form a second one.
    g.nodes[0].kill().await;
    std::fs::remove_dir_all(&g.nodes[0].dir).expect("wipe");
    g.client().create_dataset(dataset("meanwhile")).await.expect("create");
    g.start_all().await;
    let c = g.client();
    let voters = eventually(
        "node 1 votes again",
        || c.status(),
        |s| s.as_ref().is_ok_and(|s| s.masters.iter().filter(|m| m.voter).count() == 3),
    )
    .await
    .expect("status");
    assert_eq!(voters.cluster, cluster);
    // Its vote counts: with another follower dead it makes the majority.
    let leader = g.leader().await;
    let dead = (1..3).find(|i| *i != leader).expect("another");
    g.nodes[dead].kill().await;
    g.client().create_dataset(dataset("after")).await.expect("a majority with the wiped one");
    let want: BTreeSet<String> = ["before", "meanwhile", "after"].map(String::from).into();
    assert_eq!(names(&g.client()).await, want);
    assert_eq!(g.nodes[0].status().await.cluster, cluster);
}

#[tokio::test(flavor = "multi_thread")]
async fn masters_are_added_and_removed() {
    let root = tempfile::tempdir().expect("dir");
    let any = || ["--listen".to_string(), "127.0.0.1:0".into()];
    let mut one = Proc::new(root.path(), 1, &any());
    one.start().await;
    let c = one.client();
    c.create_dataset(dataset("a")).await.expect("create");
    assert!(c.remove_master(1).await.is_err_and(|e| e.is(Kind::Invalid)), "the last one stays");
    let join = |id: u64| {
        let mut args = any().to_vec();
        args.extend(["--join".into(), one.grpc.clone()]);
        Proc::new(root.path(), id, &args)
    };
    let (mut two, mut three) = (join(2), join(3));
    two.start().await;
    three.start().await;
    let voters = |s: &efc_proto::control::StatusReply| s.masters.iter().filter(|m| m.voter).count();
    eventually("three voters", || c.status(), |s| s.as_ref().is_ok_and(|s| voters(s) == 3)).await.expect("status");
    // A second node with an id in use is refused, and says so.
    let again = tempfile::tempdir().expect("dir");
    let mut args = any().to_vec();
    args.extend(["--join".into(), one.grpc.clone()]);
    let mut twin = Proc::new(again.path(), 2, &args);
    let out = twin.spawn();
    let mut rest = String::new();
    tokio::io::AsyncReadExt::read_to_string(&mut { out }, &mut rest).await.expect("ends");
    assert!(rest.is_empty() && twin.log().contains("in use"), "{rest} {}", twin.log());
    // With one of three dead, removing a living one would leave no majority.
    three.kill().await;
    assert!(c.remove_master(2).await.is_err_and(|e| e.is(Kind::Busy)));
    c.remove_master(3).await.expect("remove the dead");
    assert!(c.remove_master(3).await.is_err_and(|e| e.is(Kind::NotFound)));
    // The leader itself can be removed; the other goes on.
    let leader = c.status().await.expect("status").leader_node;
    let left = if leader == 1 { &two } else { &one };
    c.remove_master(leader).await.expect("remove the leader");
    let c = left.client();
    c.create_dataset(dataset("b")).await.expect("goes on");
    let s = c.status().await.expect("status");
    assert_eq!((voters(&s), s.leader_addr.as_str()), (1, left.grpc.as_str()));
    assert_eq!(names(&c).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_lags_behind_the_log_gets_a_snapshot() {
    let mut g = Group::start(3, &["--snapshot-logs", "20"]).await;
    let lagging = g.follower().await;
    g.nodes[lagging].kill().await;
    let c = g.client();
    for n in 0..90 {
        c.create_dataset(dataset(&format!("d{n}"))).await.expect("create");
    }
    g.start_all().await;
    let want = c.status().await.expect("status").last_log;
    let node = &g.nodes[lagging];
    eventually("it catches up", || node.status(), |s| s.applied >= want && s.datasets == 90).await;
    assert!(node.log().contains("took over a snapshot"), "{}", node.log());
    // And again from its own disk alone.
    g.nodes[lagging].kill().await;
    g.start_all().await;
    let node = &g.nodes[lagging];
    eventually("it has all", || node.status(), |s| s.datasets == 90).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_changed_is_announced() {
    let root = tempfile::tempdir().expect("dir");
    let mut p = Proc::new(root.path(), 1, &["--listen".into(), "127.0.0.1:0".into()]);
    p.start().await;
    let before = p.grpc.clone();
    p.kill().await;
    let held = std::net::TcpListener::bind(&before).expect("hold the old port");
    p.start().await;
    assert_ne!(p.grpc, before);
    let c = client(&[&p.grpc]);
    let s = eventually(
        "the new address",
        || c.status(),
        |s| s.as_ref().is_ok_and(|s| s.masters.iter().all(|m| m.addr == p.grpc)),
    );
    assert!(s.await.expect("status").leader);
    drop(held);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_embedded_master_reports_on_its_descriptor_and_dies_with_its_parent() {
    let root = tempfile::tempdir().expect("dir");
    let line = format!(
        "{} --node-id 1 --listen 127.0.0.1:0 --data-dir {} --parent-death --ready-fd 3 3>&1 & wait",
        env!("CARGO_BIN_EXE_efc-master"),
        root.path().join("m").display()
    );
    let mut shell = tokio::process::Command::new("sh")
        .args(["-c", &line])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("sh");
    let mut out = tokio::io::BufReader::new(shell.stdout.take().expect("stdout"));
    let mut text = String::new();
    for _ in 0..2 {
        let read = tokio::io::AsyncBufReadExt::read_line(&mut out, &mut text);
        tokio::time::timeout(PATIENCE, read).await.expect("ready").expect("read");
    }
    assert!(text.starts_with("{\"grpc\":\"127.0.0.1:") && text.ends_with("}\n1\n"), "{text}");
    shell.kill().await.expect("kill");
    // Its end closes the pipe.
    let end = tokio::io::AsyncReadExt::read_to_string(&mut out, &mut text);
    tokio::time::timeout(PATIENCE, end).await.expect("ends with its parent").expect("read");
}

#[tokio::test]
async fn bad_flags_are_refused_in_one_sentence() {
    let root = tempfile::tempdir().expect("dir");
    let dir = root.path().join("m").display().to_string();
    for (more, want) in [
        (vec!["--peers", "2=h:1,3=h:2"], "--peers does not list this node"),
        (vec!["--peers", "1=h:1,1=h:2"], "twice"),
        (vec!["--peers", "1=h"], "is not ID=HOST:PORT"),
        (vec!["--listen", "0.0.0.0:0"], "--advertise"),
        (vec!["--listen", "nonsense"], "--listen"),
        (vec!["--election-ms", "100", "--heartbeat-ms", "100"], "--election-ms must be above"),
        (vec!["--worker-expire", "soon"], "is not a duration"),
        (vec!["--peers", "1=h:1", "--join", "h:2"], "cannot be used with"),
        (vec!["--ready-fd", "77"], "--ready-fd 77 is not open"),
    ] {
        let mut args = vec!["--node-id", "1", "--data-dir", &dir];
        if !more.contains(&"--listen") {
            args.extend(["--listen", "127.0.0.1:0"]);
        }
        args.extend(&more);
        let run = tokio::process::Command::new(env!("CARGO_BIN_EXE_efc-master")).args(&args).output();
        let out = tokio::time::timeout(PATIENCE, run).await.expect("ends").expect("runs");
        let text = String::from_utf8_lossy(&out.stderr).to_string();
        assert!(!out.status.success() && text.contains(want), "{more:?}: {text}");
    }
}
