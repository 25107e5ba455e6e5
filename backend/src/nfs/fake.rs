//! A server for tests that answers what it is told to: for what a real one never does.

use super::xdr::Reader;
use super::{Nfs, node};
use crate::Backend;
use crate::connect::{Raw, Settings, stack};
use crate::tree::{Change, New, NewNode, Tree};
use bytes::{Bytes, BytesMut};
use efc_common::node::Node;
use efc_common::source::{SecretRef, SourceSpec};
use efc_common::{Error, Kind, Retry};
use futures::TryStreamExt;
use nfs3_types::nfs3::{fattr3, ftype3, nfstime3, specdata3};
use nfs3_types::xdr_codec::Pack;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// A call as the server sees it.
struct Call {
    xid: u32,
    procedure: u32,
    arguments: Reader,
}

/// Of one call: short, because one test waits it out, and long enough for an answer on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(2);

/// What the server does with a call.
enum Answer {
    /// A good reply with these results.
    Results(Vec<u8>),
    /// The same, its record cut into fragments of so many bytes.
    Fragments(Vec<u8>, usize),
    /// These bytes, as they are.
    Raw(Vec<u8>),
    /// Nothing.
    Silence,
    /// Closes the connection after these bytes.
    Close(Vec<u8>),
}

/// The server; its tasks end with it.
struct Fake {
    address: String,
    connections: Arc<AtomicU32>,
    _tasks: JoinSet<()>,
}

impl Fake {
    /// Answers each call with what `answer` says.
    async fn start(answer: impl Fn(Call) -> Answer + Send + Sync + 'static) -> Fake {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen");
        let address = listener.local_addr().expect("address").to_string();
        let (answer, connections) = (Arc::new(answer), Arc::new(AtomicU32::new(0)));
        let mut tasks = JoinSet::new();
        tasks.spawn({
            let connections = connections.clone();
            async move {
                let mut served = JoinSet::new();
                while let Ok((stream, _)) = listener.accept().await {
                    connections.fetch_add(1, SeqCst);
                    served.spawn(serve(stream, answer.clone()));
                }
            }
        });
        Fake { address, connections, _tasks: tasks }
    }

    fn client(&self, options: &[(&str, &str)]) -> Nfs {
        let options = options.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let url = format!("nfs://{}/x", self.address);
        let spec = SourceSpec::parse(&url, options, SecretRef::Anonymous).expect("a source");
        Nfs::new(&spec, TIMEOUT).expect("a client")
    }
}

async fn serve(mut stream: TcpStream, answer: Arc<impl Fn(Call) -> Answer>) {
    while let Ok(mark) = stream.read_u32().await {
        let mut call = BytesMut::zeroed((mark & 0x7fff_ffff) as usize);
        stream.read_exact(&mut call).await.expect("a whole call");
        let mut r = Reader(call.freeze());
        let xid = r.u32().expect("xid");
        let header: Vec<u32> = (0..5).map(|_| r.u32().expect("header")).collect();
        assert_eq!(header[..4], [0, 2, 100_003, 3], "CALL, RPC 2, NFS, version 3");
        for _ in 0..2 {
            r.u32().expect("flavor");
            r.opaque(400).expect("auth");
        }
        let (bytes, close) = match answer(Call { xid, procedure: header[4], arguments: r }) {
            Answer::Results(results) => (record(xid, &results, usize::MAX), false),
            Answer::Fragments(results, size) => (record(xid, &results, size), false),
            Answer::Raw(bytes) => (bytes, false),
            Answer::Silence => continue,
            Answer::Close(bytes) => (bytes, true),
        };
        // The client may have gone away by now.
        if stream.write_all(&bytes).await.is_err() || close {
            return;
        }
    }
}

/// An accepted reply with `results`, in fragments of at most `size` bytes.
fn record(xid: u32, results: &[u8], size: usize) -> Vec<u8> {
    let mut body: Vec<u8> = [xid, 1, 0, 0, 0, 0].iter().flat_map(|w| w.to_be_bytes()).collect();
    body.extend_from_slice(results);
    let mut out = Vec::new();
    let mut rest = &body[..];
    while !rest.is_empty() {
        let (part, next) = rest.split_at(rest.len().min(size));
        let last = if next.is_empty() { 1 << 31 } else { 0 };
        out.extend_from_slice(&(part.len() as u32 | last).to_be_bytes());
        out.extend_from_slice(part);
        rest = next;
    }
    out
}

fn attributes(size: u64, ctime: u32) -> fattr3 {
    let time = nfstime3 { seconds: ctime, nseconds: 7 };
    fattr3 {
        type_: ftype3::NF3REG,
        mode: 0o644,
        nlink: 1,
        uid: 0,
        gid: 0,
        size,
        used: size,
        rdev: specdata3::default(),
        fsid: 1,
        fileid: 42,
        atime: time,
        mtime: time,
        ctime: time,
    }
}

fn file(size: u64) -> Node {
    node(Bytes::from_static(b"handle"), &attributes(size, 1))
}

fn dir() -> Bytes {
    Bytes::from_static(b"dir")
}

/// Results of a procedure, put together piece by piece.
#[derive(Default)]
struct Results(Vec<u8>);

impl Results {
    fn with(mut self, value: impl Pack) -> Results {
        value.pack(&mut self.0).expect("pack");
        self
    }

    fn words(mut self, words: &[u32]) -> Results {
        self.0.extend(words.iter().flat_map(|w| w.to_be_bytes()));
        self
    }

    fn opaque(mut self, data: &[u8]) -> Results {
        self = self.words(&[data.len() as u32]);
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }
}

/// FSINFO with this rtmax and wtmax.
fn fsinfo(most: u32) -> Answer {
    Answer::Results(Results::default().words(&[0, 0, most, most, 1, most, most, 1, 0, 0, 0, 0, 0, 0]).0)
}

fn read_ok(attributes: Option<fattr3>, data: &[u8], eof: bool) -> Vec<u8> {
    let mut r = Results::default().words(&[0]);
    r = match attributes {
        Some(a) => r.words(&[1]).with(a),
        None => r.words(&[0]),
    };
    r.words(&[data.len() as u32, eof.into()]).opaque(data).0
}

/// Offset and count of a READ.
fn read_arguments(mut r: Reader) -> (u64, u32) {
    r.opaque(64).expect("handle");
    (r.u64().expect("offset"), r.u32().expect("count"))
}

fn pattern(at: u64, len: usize) -> Vec<u8> {
    (at..at + len as u64).map(|i| (i * 7 % 251) as u8).collect()
}

async fn read_all(nfs: &Nfs, node: &Node) -> Result<Vec<u8>, Error> {
    let stream = nfs.read(&node.locator, &node.version, 0..node.attr.size).await?;
    Ok(stream.try_collect::<Vec<_>>().await?.concat())
}

#[tokio::test]
async fn short_replies_in_fragments_without_attributes_are_put_together() {
    let server = Fake::start(|call| match call.procedure {
        19 => fsinfo(65536),
        6 => {
            let (at, count) = read_arguments(call.arguments);
            Answer::Fragments(read_ok(None, &pattern(at, count.min(30_001) as usize), false), 10_007)
        }
        1 => Answer::Results(Results::default().words(&[0]).with(attributes(500_000, 1)).0),
        other => panic!("procedure {other}"),
    });
    let server = server.await;
    let nfs = server.client(&[]);
    assert!(read_all(&nfs, &file(500_000)).await.expect("read") == pattern(0, 500_000));
}

#[tokio::test]
async fn a_reply_of_another_version_or_an_early_end_ends_the_stream() {
    for (ctime, data, eof, want) in [(2, 100, false, Kind::Stale), (1, 0, true, Kind::Io), (1, 0, false, Kind::Io)] {
        let server = Fake::start(move |call| match call.procedure {
            19 => fsinfo(65536),
            _ => Answer::Results(read_ok(Some(attributes(100, ctime)), &pattern(0, data), eof)),
        });
        let got = read_all(&server.await.client(&[]), &file(100)).await;
        assert!(got.as_ref().is_err_and(|e| e.is(want) && e.retry() == Retry::Never), "{got:?}");
    }
}

#[tokio::test]
async fn replies_may_come_in_any_order() {
    // READs are held back in pairs and answered the later one first.
    let held = parking_lot::Mutex::new(None);
    let server = Fake::start(move |call| match call.procedure {
        19 => fsinfo(4096),
        _ => {
            let (at, count) = read_arguments(call.arguments);
            let results = read_ok(Some(attributes(8 * 4096, 1)), &pattern(at, count as usize), false);
            let reply = record(call.xid, &results, usize::MAX);
            let mut held = held.lock();
            match held.take() {
                None => {
                    *held = Some(reply);
                    Answer::Silence
                }
                Some(earlier) => Answer::Raw([reply, earlier].concat()),
            }
        }
    });
    let server = server.await;
    let nfs = server.client(&[("connections", "1")]);
    assert!(read_all(&nfs, &file(8 * 4096)).await.expect("read") == pattern(0, 8 * 4096));
}

#[tokio::test]
async fn broken_and_lying_connections_fail_the_call_and_the_next_one_connects_again() {
    let good = || Results::default().words(&[0]).with(attributes(1, 1)).0;
    let turn = AtomicU32::new(0);
    let server = Fake::start(move |call| {
        let reply = record(call.xid, &good(), usize::MAX);
        match turn.fetch_add(1, SeqCst) {
            0 => Answer::Close(reply[..20].to_vec()),
            1 => Answer::Raw(0x7fff_ffff_u32.to_be_bytes().to_vec()),
            2 => Answer::Raw(0xffff_ffff_u32.to_be_bytes().to_vec()),
            3 => Answer::Raw([0, 0, 0, 0].to_vec()),
            4 => Answer::Raw([0x80, 0, 0, 8, 1, 2, 3, 4, 0, 0, 0, 0].to_vec()),
            5 => Answer::Close(Vec::new()),
            _ => Answer::Raw(reply),
        }
    });
    let server = server.await;
    let nfs = server.client(&[("connections", "1")]);
    for i in 0..6 {
        let e = nfs.getattr(&dir()).await.expect_err("broken");
        assert_eq!((e.kind(), e.retry()), (Kind::Unavailable, Retry::Later), "{i}: {e}");
    }
    assert_eq!(nfs.getattr(&dir()).await.expect("good").attr.size, 1);
    assert_eq!(server.connections.load(SeqCst), 7);
}

#[tokio::test]
async fn silence_ends_in_a_timeout_and_a_new_connection() {
    let turn = AtomicU32::new(0);
    let server = Fake::start(move |_| match turn.fetch_add(1, SeqCst) {
        0 => Answer::Silence,
        _ => Answer::Results(Results::default().words(&[0]).with(attributes(1, 1)).0),
    });
    let server = server.await;
    let nfs = server.client(&[("connections", "1")]);
    let e = nfs.getattr(&dir()).await.expect_err("silence");
    assert_eq!((e.kind(), e.retry()), (Kind::Timeout, Retry::Later));
    assert!(e.message().contains(&server.address), "{e}");
    assert_eq!(nfs.getattr(&dir()).await.expect("good").attr.size, 1);
    assert_eq!(server.connections.load(SeqCst), 2);
}

/// One READDIRPLUS entry; what is `None` is absent.
fn entry(r: Results, name: &[u8], cookie: u32, attributes: Option<fattr3>, handle: Option<&[u8]>) -> Results {
    let r = r.words(&[1, 0, 9]).opaque(name).words(&[0, cookie]);
    let r = match attributes {
        Some(a) => r.words(&[1]).with(a),
        None => r.words(&[0]),
    };
    match handle {
        Some(h) => r.words(&[1]).opaque(h),
        None => r.words(&[0]),
    }
}

#[tokio::test]
async fn listings_hide_impossible_names_and_look_up_what_is_missing() {
    let server = Fake::start(|mut call| match call.procedure {
        17 => {
            let (a, h) = (Some(attributes(5, 1)), Some(&b"h"[..]));
            let mut r = Results::default().words(&[0, 0, 0xabcd, 0xef]);
            for (i, name) in [&b"."[..], b"..", b"a/b", b"nul\0", b"", &[b'x'; 256], b"good"].into_iter().enumerate() {
                r = entry(r, name, i as u32 + 1, a.clone(), h);
            }
            r = entry(r, b"no attributes", 20, None, h);
            r = entry(r, b"no handle", 21, a, None);
            r = entry(r, b"removed", 22, None, None);
            Answer::Results(r.words(&[0, 0]).0)
        }
        3 => {
            call.arguments.opaque(64).expect("dir");
            match &call.arguments.opaque(255).expect("name")[..] {
                b"removed" => Answer::Results(Results::default().words(&[2, 0]).0),
                name => {
                    let r = Results::default().words(&[0]).opaque(name).words(&[1]).with(attributes(6, 1));
                    Answer::Results(r.words(&[0]).0)
                }
            }
        }
        other => panic!("procedure {other}"),
    });
    let page = server.await.client(&[]).list(&dir(), None).await.expect("list");
    let got: Vec<_> = page.entries.iter().map(|e| (&e.name[..], &e.node.locator[..], e.node.attr.size)).collect();
    let want: [(&[u8], &[u8], u64); 3] =
        [(b"good", b"h", 5), (b"no attributes", b"no attributes", 6), (b"no handle", b"no handle", 6)];
    assert_eq!(got, want);
    let hidden: Vec<usize> = page.hidden.iter().map(|(name, _)| name.len()).collect();
    assert_eq!(hidden, [3, 4, 0, 256]);
    assert_eq!(page.next.expect("not the last")[..], [0, 0, 0, 0, 0, 0, 0, 22, 0, 0, 0xab, 0xcd, 0, 0, 0, 0xef]);
}

#[tokio::test]
async fn refusals_of_the_rpc_layer_say_what_to_look_at() {
    // After xid and REPLY: denied by authentication; accepted, but the program, version or procedure is not there; a passing error.
    let cases: [(&[u32], Kind); 5] = [
        (&[1, 1, 5], Kind::PermissionDenied),
        (&[0, 0, 0, 1], Kind::Unsupported),
        (&[0, 0, 0, 2, 2, 2], Kind::Unsupported),
        (&[0, 0, 0, 5], Kind::Unavailable),
        (&[7], Kind::Corrupt),
    ];
    for (words, want) in cases {
        let server = Fake::start(move |call| {
            let body: Vec<u8> = [&[call.xid, 1], words].concat().iter().flat_map(|w| w.to_be_bytes()).collect();
            Answer::Raw([&(body.len() as u32 | 1 << 31).to_be_bytes()[..], &body].concat())
        });
        let e = server.await.client(&[]).getattr(&dir()).await.expect_err("refused");
        assert_eq!(e.kind(), want, "{e}");
    }
}

#[tokio::test]
async fn jukebox_means_later() {
    let server = Fake::start(|_| Answer::Results(Results::default().words(&[10008, 0]).0));
    let e = server.await.client(&[]).lookup(&dir(), b"x").await.expect_err("jukebox");
    assert_eq!((e.kind(), e.retry()), (Kind::Unavailable, Retry::Later));
}

/// A server that takes writes into its memory, and forgets them when it restarts.
#[derive(Default)]
struct Disk {
    stable: Vec<u8>,
    memory: Vec<u8>,
    /// Its restarts so far: the verifier.
    boots: u32,
    /// After how many more calls it restarts, again and again.
    restart_every: Option<usize>,
    calls: usize,
    /// COMMITs that it asks to send again later.
    busy: u32,
    /// Procedures called, and of WRITE whether it was to be stable.
    log: Vec<(u32, bool)>,
}

impl Disk {
    fn restart(&mut self) {
        self.memory = self.stable.clone();
        self.boots += 1;
    }

    fn answer(&mut self, call: Call) -> Answer {
        let mut r = call.arguments;
        let mut results = Results::default().words(&[0]);
        let mut stable = false;
        match call.procedure {
            1 => results = results.with(attributes(self.memory.len() as u64, 1)),
            2 => {
                // Sets the size to 10, whatever was asked.
                self.memory.resize(10, 0);
                self.stable = self.memory.clone();
                results = results.words(&[0, 0]);
            }
            7 => {
                r.opaque(64).expect("handle");
                let (at, count) = (r.u64().expect("offset") as usize, r.u32().expect("count"));
                stable = r.u32().expect("stable") == 2;
                let data = r.opaque(1 << 20).expect("data");
                assert_eq!((data.len() as u32, r.0.len()), (count, 0));
                // It takes at most 1000 bytes of a small piece.
                let data = if data.len() < 4096 { data.slice(..data.len().min(1000)) } else { data };
                self.memory.resize(self.memory.len().max(at + data.len()), 0);
                self.memory[at..at + data.len()].copy_from_slice(&data);
                if stable {
                    self.stable = self.memory.clone();
                }
                results = results.words(&[0, 0, data.len() as u32, if stable { 2 } else { 0 }, 0, self.boots]);
            }
            19 => return fsinfo(1 << 20),
            21 if self.busy > 0 => {
                self.busy -= 1;
                results = Results::default().words(&[10008, 0, 0]);
            }
            21 => {
                self.stable = self.memory.clone();
                results = results.words(&[0, 0, 0, self.boots]);
            }
            other => panic!("procedure {other}"),
        }
        self.log.push((call.procedure, stable));
        self.calls += 1;
        if self.restart_every.is_some_and(|n| self.calls.is_multiple_of(n)) {
            self.restart();
        }
        Answer::Results(results.0)
    }
}

async fn disk() -> (Fake, Nfs, Arc<parking_lot::Mutex<Disk>>) {
    let disk = Arc::new(parking_lot::Mutex::new(Disk::default()));
    let server = Fake::start({
        let disk = disk.clone();
        move |call| disk.lock().answer(call)
    });
    let server = server.await;
    let nfs = server.client(&[]);
    (server, nfs, disk)
}

fn put(image: &mut Vec<u8>, at: usize, data: &[u8]) {
    image.resize(image.len().max(at + data.len()), 0);
    image[at..at + data.len()].copy_from_slice(data);
}

#[tokio::test]
async fn what_a_restarted_server_forgot_is_sent_again() {
    for restarts in [vec![], vec![0], vec![1], vec![2], vec![3], vec![1, 3], vec![0, 1, 2, 3]] {
        let (_server, nfs, disk) = disk().await;
        let (one, two) = (nfs.open(&dir(), true).await.expect("open"), nfs.open(&dir(), true).await.expect("open"));
        let mut want = Vec::new();
        // The second overwrites a part of the first, through another open file.
        for (i, (at, len)) in
            [(0, 2_500_000), (50, 3001), (3_000_000, 10_000), (2_999_000, 2000)].into_iter().enumerate()
        {
            let data = pattern(i as u64 * 31, len);
            put(&mut want, at, &data);
            let open = if i == 1 { &two } else { &one };
            open.write(at as u64, Bytes::from(data)).await.expect("write");
            if restarts.contains(&i) {
                disk.lock().restart();
            }
        }
        two.sync(false).await.expect("sync");
        assert!(disk.lock().stable == want, "{restarts:?}");
        let before = disk.lock().log.len();
        one.sync(false).await.expect("sync");
        assert_eq!(disk.lock().log[before..], [(1, false)], "nothing is left to commit");
    }
}

#[tokio::test]
async fn what_another_process_wrote_is_committed_once() {
    let (server, nfs, disk) = disk().await;
    // Another process, which died.
    let before = nfs.open(&dir(), true).await.expect("open");
    before.write(0, Bytes::from(pattern(0, 5000))).await.expect("write");
    let limits = Settings { timeout: TIMEOUT, deadline: 5 * TIMEOUT, rates: Default::default() };
    let nfs = Arc::new(server.client(&[]));
    let raw = Raw { backend: nfs.clone(), tree: Some(nfs), objects: None, signer: None };
    let tree = stack(raw, "nfs".into(), &limits).tree.expect("a tree");
    // What it is asked from now on.
    let asked = || std::mem::take(&mut disk.lock().log).iter().map(|call| call.0).collect::<Vec<_>>();
    let open = tree.open(&dir(), true).await.expect("open");
    assert!(open.descriptor().is_none());
    asked();
    assert!(open.close().await.expect("close").is_none());
    assert!(asked().is_empty(), "nobody has told");
    open.resumed();
    disk.lock().busy = 1;
    open.close().await.expect("close").expect("attributes");
    assert_eq!(asked(), [21, 21, 1], "once more after a failure");
    assert!(disk.lock().stable == pattern(0, 5000));
    assert!(open.close().await.expect("close").is_none());
    open.sync(false).await.expect("sync");
    assert_eq!(asked(), [1], "nothing is left to commit");
    open.resumed();
    open.write(5000, Bytes::from(pattern(5000, 5000))).await.expect("write");
    open.sync(false).await.expect("sync");
    assert_eq!(asked(), [7, 1, 21, 1], "one COMMIT for both");
    assert!(disk.lock().stable == pattern(0, 10_000));
}

#[tokio::test]
async fn a_server_that_never_stays_up_is_an_error_and_not_silence() {
    let (_server, nfs, disk) = disk().await;
    let open = nfs.open(&dir(), true).await.expect("open");
    for i in 0..4 {
        open.write(i * 5000, Bytes::from(pattern(i, 5000))).await.expect("write");
    }
    {
        let mut disk = disk.lock();
        disk.restart();
        (disk.restart_every, disk.calls) = (Some(3), 0);
    }
    let e = open.sync(false).await.expect_err("it forgets every time");
    assert_eq!((e.kind(), e.retry()), (Kind::Unavailable, Retry::Later), "{e}");
    disk.lock().restart_every = None;
    open.sync(false).await.expect("sync");
    assert!(disk.lock().stable == (0..4).flat_map(|i| pattern(i, 5000)).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_new_size_comes_after_what_was_written_before() {
    let (_server, nfs, disk) = disk().await;
    let open = nfs.open(&dir(), true).await.expect("open");
    open.write(0, Bytes::from(pattern(0, 5000))).await.expect("write");
    let change = Change { size: Some(10), ..Change::default() };
    // By the locator, not through the open file.
    nfs.set_attr(&dir(), &change).await.expect("truncate");
    disk.lock().restart();
    open.sync(false).await.expect("sync");
    let disk = disk.lock();
    let changes: Vec<u32> = disk.log.iter().map(|(p, _)| *p).filter(|p| *p != 1).collect();
    assert_eq!((changes, disk.stable.len()), (vec![7, 21, 2], 10));
}

#[tokio::test]
async fn no_more_is_kept_than_there_is_room_for() {
    let (_server, nfs, disk) = disk().await;
    let piece = Bytes::from(pattern(0, 1 << 20));
    let count = |of: (u32, bool)| disk.lock().log.iter().filter(|l| **l == of).count();
    let first = nfs.open(&dir(), true).await.expect("open");
    for i in 0..65 {
        first.write(i << 20, piece.clone()).await.expect("write");
        assert_eq!(count((21, false)), (i / 64) as usize, "full after 64 MiB: {i}");
    }
    for i in 65..128 {
        first.write(i << 20, piece.clone()).await.expect("write");
    }
    // The first file has taken all the room, and the second has nothing to commit.
    let second = nfs.open(&Bytes::from_static(b"other"), true).await.expect("open");
    second.write(0, piece.clone()).await.expect("write");
    assert_eq!((count((21, false)), count((7, true))), (1, 1));
    drop(first);
    second.write(0, piece.clone()).await.expect("write");
    assert_eq!((count((7, true)), count((7, false))), (1, 129), "a closed file gives its room back");
}

#[tokio::test]
async fn a_create_sent_again_has_the_same_verifier_and_times_are_set_last() {
    let seen = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let log = seen.clone();
    let server = Fake::start(move |call| {
        let mut r = call.arguments;
        let mut seen = log.lock();
        match call.procedure {
            8 => {
                r.opaque(64).expect("dir");
                r.opaque(255).expect("name");
                assert_eq!(r.u32().expect("how"), 2, "EXCLUSIVE");
                seen.push(format!("create {:x}", r.u64().expect("verifier")));
                if seen.len() == 1 {
                    return Answer::Close(Vec::new());
                }
                let r = Results::default().words(&[0, 1]).opaque(b"made").words(&[1]).with(attributes(0, 1));
                let above = fattr3 { type_: ftype3::NF3DIR, mode: 0o2755, gid: 9, ..attributes(0, 1) };
                Answer::Results(r.words(&[0, 1]).with(above).0)
            }
            2 => {
                r.opaque(64).expect("handle");
                // mode, uid, gid: the ones given; size; atime and mtime: 1 is "the server's time".
                let mut given = Vec::new();
                for name in ["mode", "uid", "gid"] {
                    if r.bool().expect("given") {
                        given.push(format!("{name} {:o}", r.u32().expect("value")));
                    }
                }
                assert!(!r.bool().expect("size"));
                given.push(format!("times {} {}", r.u32().expect("atime"), r.u32().expect("mtime")));
                seen.push(given.join(", "));
                Answer::Results(Results::default().words(&[0, 0, 1]).with(attributes(0, 2)).0)
            }
            other => panic!("procedure {other}"),
        }
    });
    let server = server.await;
    let nfs = server.client(&[]);
    let new = NewNode { what: New::File, mode: 0o4711, uid: 5, gid: 6 };
    let e = nfs.create(&dir(), b"x", &new).await.expect_err("the connection broke");
    assert_eq!((e.retry(), e.context("executed")), (Retry::Later, None), "it may have been executed");
    nfs.create(&dir(), b"x", &new).await.expect("create");
    let other = NewNode { uid: 7, ..new };
    nfs.create(&dir(), b"x", &other).await.expect("create");
    let seen = seen.lock();
    assert_eq!(seen[0], seen[1], "the same file");
    assert_ne!(seen[0], seen[4], "another one");
    assert_eq!(seen[2..4], ["uid 5, gid 11, times 0 0", "mode 4711, times 1 1"]);
}
