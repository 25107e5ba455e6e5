//! Workers, their ring, and client sessions, seen from outside.

use crate::harness::{PATIENCE, Proc, dataset, worker};
use efc_client::master::MasterClient;
use efc_client::ring::RingWatch;
use efc_common::Kind;
use efc_common::id::{Incarnation, RingEpoch, SessionId};
use efc_common::task::TaskGroup;
use efc_proto::control::{RegisterWorkerReply, RegisterWorkerRequest, WorkerLoad, WorkerState};
use std::time::Duration;

async fn register(c: &MasterClient, id: &str) -> RegisterWorkerReply {
    let request = RegisterWorkerRequest { worker: Some(worker(id)), cluster: String::new() };
    c.register_worker(request).await.expect("register")
}

async fn single(more: &[&str]) -> (tempfile::TempDir, Proc) {
    let root = tempfile::tempdir().expect("dir");
    let mut args = vec!["--listen".to_string(), "127.0.0.1:0".into()];
    args.extend(more.iter().map(|s| s.to_string()));
    let mut p = Proc::new(root.path(), 1, &args);
    p.start().await;
    (root, p)
}

fn ids(ring: &efc_common::ring::Ring) -> Vec<String> {
    ring.members().iter().map(|m| m.id.0.clone()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_life_of_a_worker() {
    let (_root, p) = single(&["--worker-expire", "1s"]).await;
    let c = p.client();
    let tasks = TaskGroup::new();
    let watch = RingWatch::start(c.clone(), &tasks, None);
    let next = |known: RingEpoch| {
        let w = watch.clone();
        async move { tokio::time::timeout(PATIENCE, w.changed_since(known)).await.expect("a new ring") }
    };
    let a = register(&c, "a").await;
    assert_eq!((a.expire_ms, a.ring.as_ref().map(|r| r.epoch)), (1000, Some(1)));
    let ring = next(RingEpoch(0)).await;
    assert_eq!((ring.epoch(), ids(&ring), ring.members()[0].weight), (RingEpoch(1), vec!["a".to_string()], 64));

    // Silent: out of the ring, with a new epoch; its old life is fenced.
    let ring = next(ring.epoch()).await;
    assert_eq!((ring.epoch(), ring.is_empty()), (RingEpoch(2), true));
    let beat = |i: u64| c.heartbeat("a", Incarnation(i), WorkerLoad { segments: 7, ..Default::default() });
    assert!(beat(a.incarnation).await.is_err_and(|e| e.is(Kind::Stale)));
    let gone = c.list_workers().await.expect("list");
    assert_eq!(gone.workers[0].state(), WorkerState::WorkerGone);

    // Back by registering, in a new life.
    let a2 = register(&c, "a").await;
    assert!(a2.incarnation > a.incarnation);
    let ring = next(ring.epoch()).await;
    assert_eq!((ring.epoch(), ids(&ring)), (RingEpoch(3), vec!["a".to_string()]));
    let alive = beat(a2.incarnation).await.expect("beat");
    assert_eq!((alive.epoch, alive.state()), (3, WorkerState::WorkerLive));
    assert!(beat(a.incarnation).await.is_err_and(|e| e.is(Kind::Stale)));
    assert_eq!(c.list_workers().await.expect("list").workers[0].load.map(|l| l.segments), Some(7));

    // Drain: registered and served, not in the ring.
    let drained = c.drain_worker("a", Incarnation(0)).await.expect("drain");
    assert_eq!((drained.epoch, drained.members.len()), (4, 0));
    let ring = next(ring.epoch()).await;
    assert!(ring.is_empty());
    assert_eq!(beat(a2.incarnation).await.expect("beat").state(), WorkerState::WorkerDraining);
    assert_eq!(c.drain_worker("a", Incarnation(0)).await.expect("again").epoch, 4);
    assert_eq!(c.undrain_worker("a", Incarnation(0)).await.expect("undrain").epoch, 5);
    assert_eq!(ids(&*next(ring.epoch()).await), ["a"]);

    // Leave and be forgotten.
    assert!(c.leave_worker("a", Incarnation(0)).await.is_err_and(|e| e.is(Kind::Busy)));
    assert_eq!(c.leave_worker("a", Incarnation(a2.incarnation)).await.expect("leave").epoch, 6);
    c.leave_worker("a", Incarnation(0)).await.expect("forget");
    assert!(c.list_workers().await.expect("list").workers.is_empty());
    assert!(c.drain_worker("a", Incarnation(0)).await.is_err_and(|e| e.is(Kind::NotFound)));
    assert!(tasks.shutdown(PATIENCE).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_of_another_cluster_or_without_sense_is_refused() {
    let (_root, p) = single(&[]).await;
    let c = p.client();
    let other = RegisterWorkerRequest { worker: Some(worker("a")), cluster: "other".into() };
    assert!(c.register_worker(other).await.is_err_and(|e| e.is(Kind::Invalid) && e.message().contains("cluster")));
    let mut w = worker("a");
    w.addr = "nowhere".into();
    let bad = RegisterWorkerRequest { worker: Some(w), cluster: String::new() };
    assert!(c.register_worker(bad).await.is_err_and(|e| e.is(Kind::Invalid) && e.message().contains("host:port")));
    assert!(c.register_worker(RegisterWorkerRequest::default()).await.is_err_and(|e| e.is(Kind::Invalid)));
    let cluster = c.status().await.expect("status").cluster;
    let good = RegisterWorkerRequest { worker: Some(worker("a")), cluster: cluster.clone() };
    assert_eq!(c.register_worker(good).await.expect("register").cluster, cluster);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_ring_stays_when_the_masters_are_gone() {
    let (_root, mut p) = single(&[]).await;
    // The same port after the restart.
    let at = p.args.iter().position(|a| a == "--listen").expect("flag") + 1;
    p.args[at] = p.grpc.clone();
    let tasks = TaskGroup::new();
    let c = p.client();
    let watch = RingWatch::start(c.clone(), &tasks, None);
    register(&c, "a").await;
    let ring = watch.changed_since(RingEpoch(0)).await;
    p.kill().await;
    assert_eq!(watch.current(), ring);
    p.start().await;
    register(&c, "b").await;
    let after = tokio::time::timeout(PATIENCE, watch.changed_since(ring.epoch())).await.expect("new ring");
    assert_eq!(ids(&after), ["a", "b"]);
    assert!(after.epoch() > ring.epoch());
    assert!(tasks.shutdown(PATIENCE).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_are_kept_resumed_and_expire() {
    let (_root, p) = single(&["--session-expire", "1s"]).await;
    let c = p.client();
    c.create_dataset(dataset("d")).await.expect("create");
    let s = c.open_session("host:1:/mnt", "d", None, false).await.expect("open");
    assert_eq!((s.session, s.expire_ms), (1, 1000));
    assert!(c.delete_dataset("d").await.is_err_and(|e| e.is(Kind::Busy)));
    // A restarted client takes its session over; the old life is fenced.
    let known = |i: u64| Some((SessionId(s.session), Incarnation(i)));
    let again = c.open_session("host:2:/mnt", "d", known(s.incarnation), false).await.expect("resume");
    let late = c.open_session("host:1:/mnt", "d", known(s.incarnation), false).await;
    assert!(late.is_err_and(|e| e.is(Kind::Stale)), "a late copy begins nothing");
    assert!(again.session == s.session && again.incarnation > s.incarnation);
    let keep = |i: u64| c.keep_session(SessionId(s.session), Incarnation(i));
    assert!(keep(s.incarnation).await.is_err_and(|e| e.is(Kind::Stale)));
    keep(again.incarnation).await.expect("keep");
    assert_eq!(c.list_sessions().await.expect("list")[0].client, "host:2:/mnt");
    // Silent, it ends: the dataset can be deleted, and there is nothing to resume.
    crate::harness::eventually("expiry", || c.list_sessions(), |l| l.as_ref().is_ok_and(Vec::is_empty))
        .await
        .expect("list");
    assert!(keep(again.incarnation).await.is_err_and(|e| e.is(Kind::NotFound)));
    let gone = c.open_session("host:2:/mnt", "d", known(again.incarnation), false).await;
    assert!(gone.is_err_and(|e| e.is(Kind::NotFound)));
    let new = c.open_session("host:2:/mnt", "d", None, false).await.expect("open");
    assert_ne!(new.session, s.session);
    c.close_session(SessionId(new.session), Incarnation(new.incarnation)).await.expect("close");
    c.delete_dataset("d").await.expect("delete");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ring_poll_waits_for_a_change() {
    let (_root, p) = single(&[]).await;
    let c = p.client();
    register(&c, "a").await;
    let cluster = c.status().await.expect("status").cluster;
    let began = tokio::time::Instant::now();
    // Nothing new: the whole wait. Ahead of this master: the same, never an older ring at once.
    for known in [1, 99] {
        let r = c.get_ring(RingEpoch(known), &cluster, Duration::from_millis(150)).await.expect("ring");
        assert_eq!(r.epoch, 1);
    }
    assert!(began.elapsed() >= Duration::from_millis(300));
    // Of another cluster: at once, whatever the number.
    let r = c.get_ring(RingEpoch(99), "other", Duration::from_secs(20)).await.expect("ring");
    assert_eq!((r.epoch, r.cluster), (1, cluster.clone()));
    let (r, _) = tokio::join!(c.get_ring(RingEpoch(1), &cluster, Duration::from_secs(20)), register(&c, "b"));
    assert_eq!(r.expect("ring").epoch, 2);
    assert!(began.elapsed() < Duration::from_secs(10));
}
