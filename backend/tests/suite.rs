//! The backend suite over every kind of origin, each plain and behind injected faults. One function per server: a new server adds
//! one, which starts it, makes a [`suite::Store`] of its back, and calls [`run`].

use efc_backend::connect::connect_counted;
use efc_backend::suite::{self, DirStore};
use efc_common::source::{SecretRef, SourceSpec};
use efc_testkit::{Ganesha, scratch};
use std::collections::BTreeMap;
use std::path::Path;

type Options<'a> = &'a [(&'a str, &'a str)];

/// Five of a hundred calls fail, and as many streams end short or break.
const FAULTS: &str = "error=0.05,short=0.05,reset=0.05,seed=20";
/// Every fifth change is made and its answer lost.
const LOST: &str = "error=0.05,reset=0.05,lost=0.2,seed=21";

fn source(url: &str, options: Options, more: Options) -> SourceSpec {
    let options: BTreeMap<String, String> =
        options.iter().chain(more).map(|(k, v)| (k.to_string(), v.to_string())).collect();
    SourceSpec::parse(url, options, SecretRef::Anonymous).expect("a source")
}

/// The suite over the source at `url`, plain or behind faults.
async fn run(url: &str, options: Options<'_>, store: &dyn suite::Store, faults: bool) {
    let more: Options = if faults { &[("fault", FAULTS)] } else { &[] };
    let origin = connect_counted(&source(url, options, more), None).await.expect("connect");
    suite::run(origin.backend, store).await;
    let stats = origin.counters.stats();
    assert_eq!(faults, stats.retries > 20, "{stats:?}");
    assert!(stats.bytes > 100 << 20, "{stats:?}");
}

/// The suite of trees over the source at `url`, whose back is `dir`, plain or behind faults.
async fn run_tree(url: &str, options: Options<'_>, dir: &Path, faults: bool) {
    let more: Options = if faults { &[("fault", LOST)] } else { &[] };
    let origin = connect_counted(&source(url, options, more), None).await.expect("connect");
    suite::tree::run(&origin, dir).await;
    let stats = origin.counters.stats();
    assert_eq!(faults, stats.retries > 100, "{stats:?}");
    assert!(stats.bytes_sent > 16 << 20 && stats.requests["create"] > 100, "{stats:?}");
}

async fn file_tree(faults: bool) {
    let dir = scratch("tree-file").expect("scratch");
    run_tree(&format!("file://{}", dir.path().display()), &[], dir.path(), faults).await;
}

async fn nfs_tree(faults: bool) {
    let dir = scratch("tree-nfs").expect("scratch");
    let server = Ganesha::start(dir.path()).expect("ganesha");
    let port = server.mount_port().to_string();
    run_tree(&server.url(), &[("mount_port", &port)], dir.path(), faults).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn file_tree_plain() {
    file_tree(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn file_tree_with_lost_answers() {
    file_tree(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nfs_tree_plain() {
    nfs_tree(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nfs_tree_with_lost_answers() {
    nfs_tree(true).await;
}

async fn file(faults: bool) {
    let dir = scratch("suite-file").expect("scratch");
    run(&format!("file://{}", dir.path().display()), &[], &DirStore(dir.path().into()), faults).await;
}

async fn nfs(dir: &Path, faults: bool) {
    let server = Ganesha::start(dir).expect("ganesha");
    let port = server.mount_port().to_string();
    run(&server.url(), &[("mount_port", &port)], &DirStore(dir.into()), faults).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn file_plain() {
    file(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn file_with_faults() {
    file(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nfs_plain() {
    let dir = scratch("suite-nfs").expect("scratch");
    nfs(dir.path(), false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nfs_with_faults() {
    let dir = scratch("suite-nfs").expect("scratch");
    nfs(dir.path(), true).await;
}
