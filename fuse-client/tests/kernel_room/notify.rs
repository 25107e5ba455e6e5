//! Notifications: filling and dropping the kernel's caches.

use std::fs;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use crate::support::*;
use efc_common::Kind;
use efc_fuse::kernel::{Notification, Told};
use parking_lot::Mutex;

const SOON: Duration = Duration::from_secs(10);

fn tell(m: &Mounted, n: Notification) -> efc_common::Result<Told> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("runtime");
    runtime.block_on(m.session().notifier().tell(n, SOON))
}

#[test]
fn stored_bytes_make_a_cold_read_cost_nothing() {
    let m = Mounted::new(MemFs::new());
    let size = 114_688;
    let (name, node) = ("files/114688", m.fs.node("files/114688"));
    let store = |data| Notification::Store { node, offset: 0, data };
    assert_eq!(tell(&m, store(content(node, size))).expect("tells"), Told::Unknown, "nobody has looked it up yet");
    let path = m.path(name);
    let stat = path.clone();
    assert_eq!(m.guarded(move || fs::metadata(stat).expect("stat").len()), size as u64);
    assert_eq!(tell(&m, store(content(node, size))).expect("tells"), Told::Done);
    let read = m.guarded(move || fs::read(path).expect("reads"));
    assert_eq!(read, content(node, size));
    assert_eq!(m.fs.count("read"), 0, "the bytes were there already");
}

#[test]
fn invalidated_pages_are_read_again() {
    let m = Mounted::new(MemFs::new());
    let node = m.fs.node("files/4096");
    let path = m.path("files/4096");
    let read = {
        let path = path.clone();
        move || fs::read(&path).expect("reads").len()
    };
    m.guarded(read.clone());
    m.guarded(read.clone());
    assert_eq!(m.fs.count("read"), 1);
    assert_eq!(tell(&m, Notification::InvalidateInode { node, offset: 0, length: 0 }).expect("tells"), Told::Done);
    m.guarded(read);
    assert_eq!(m.fs.count("read"), 2);
    let nobody = Notification::InvalidateInode { node: 999_999, offset: 0, length: 0 };
    assert_eq!(tell(&m, nobody).expect("tells"), Told::Unknown);
}

#[test]
fn the_kernel_says_which_nodes_it_holds() {
    let m = Mounted::new(MemFs::new());
    let holds = |name: &str| m.session().notifier().holds(m.fs.node(name)).expect("says");
    assert!(!holds("files") && !holds("files/4096"), "nobody has looked them up yet");
    let path = m.path("files/4096");
    m.guarded(move || fs::metadata(path).expect("stat"));
    assert!(holds("files") && holds("files/4096"));
    assert!(!holds("files/1"));
}

#[test]
fn a_notification_that_waits_for_a_page_holds_up_no_other() {
    let (asked_tx, asked) = std::sync::mpsc::channel();
    let asked_tx = Mutex::new(asked_tx);
    let mut fs = MemFs::new();
    fs.on_read = Some(Box::new(move |_, node, at, reply| asked_tx.lock().send((node, at, reply)).expect("kept")));
    let m = Mounted::new(fs);
    let read = |direct: i32| {
        let path = m.path("files/4096");
        std::thread::spawn(move || {
            let file = fs::OpenOptions::new().read(true).custom_flags(direct).open(path).expect("opens");
            file.read_exact_at(&mut [0; 512], 0).expect("reads");
        })
    };
    let past_pages = read(libc::O_DIRECT);
    let (node, at, reply) = asked.recv_timeout(LIMIT).expect("a read");
    assert!(!at.for_cache, "the kernel has no page of it");
    answer_read(&m.fs, node, at, reply);
    m.guarded(move || past_pages.join().expect("reads"));
    let readers = [read(0), read(0)];
    let (node, at, reply) = asked.recv_timeout(LIMIT).expect("a read");
    assert!(at.for_cache, "pages are locked until it is answered");
    let all = |node| Notification::InvalidateInode { node, offset: 0, length: 0 };
    std::thread::scope(|s| {
        let held_up = s.spawn(|| tell(&m, all(node)));
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(tell(&m, all(999_999)).expect("tells"), Told::Unknown);
        assert!(!held_up.is_finished(), "it waits for the page");
        answer_read(&m.fs, node, at, reply);
        // The second reader may have to read anew what was dropped.
        while !readers.iter().all(|r| r.is_finished()) {
            if let Ok((node, at, reply)) = asked.recv_timeout(Duration::from_millis(10)) {
                answer_read(&m.fs, node, at, reply);
            }
        }
        assert_eq!(held_up.join().expect("joins").expect("tells"), Told::Done);
    });
}

/// After `forget_name` the kernel must see that `files/1` is now called `files/one`.
fn renamed_behind_the_kernel(forget_names: impl Fn(&Mounted) -> Vec<Notification>) {
    let m = Mounted::new(MemFs::new());
    let (old, new) = (m.path("files/1"), m.path("files/one"));
    let exist = move || (old.exists(), new.exists());
    assert_eq!(m.guarded(exist.clone()), (true, false));
    m.fs.rename("files", "1", "one");
    assert_eq!(m.guarded(exist.clone()), (true, false), "names are believed for a day");
    for n in forget_names(&m) {
        tell(&m, n).expect("tells");
    }
    assert_eq!(m.guarded(exist), (false, true));
}

#[test]
fn invalidated_names_are_looked_up_again() {
    renamed_behind_the_kernel(|m| {
        let parent = m.fs.node("files");
        let name = |n: &'static str| Notification::InvalidateEntry { parent, name: n.into() };
        vec![name("1"), name("one")]
    });
}

#[test]
fn look_ups_are_given_back() {
    let m = Mounted::new(MemFs::new());
    let (path, parent) = (m.path("many"), m.fs.node("many"));
    let all = m.guarded(move || names(&path));
    assert!(m.fs.lookups.load(SeqCst) >= MANY as u64);
    for name in all {
        tell(&m, Notification::InvalidateEntry { parent, name: name.into() }).expect("tells");
    }
    // FORGETs come when the kernel finds the time.
    let deadline = Instant::now() + LIMIT;
    while m.fs.lookups.load(SeqCst) > 10 {
        assert!(Instant::now() < deadline, "{} look-ups left", m.fs.lookups.load(SeqCst));
        std::thread::yield_now();
    }
}

#[test]
fn deleted_names_are_looked_up_again() {
    renamed_behind_the_kernel(|m| {
        let (parent, child) = (m.fs.node("files"), m.fs.node("files/one"));
        let negative = Notification::InvalidateEntry { parent, name: "one".into() };
        vec![Notification::Delete { parent, child, name: "1".into() }, negative]
    });
}

#[test]
fn expired_names_are_looked_up_again_where_the_kernel_can() {
    let m = Mounted::new(MemFs::new());
    let parent = m.fs.node("files");
    let expire = |n: &'static str| Notification::ExpireEntry { parent, name: n.into() };
    if m.session().notifier().has_expire_only() {
        renamed_behind_the_kernel(|_| vec![expire("1"), expire("one")]);
    } else {
        assert_eq!(tell(&m, expire("1")).expect_err("unknown").kind(), Kind::Unsupported);
    }
}

#[test]
fn an_epoch_ends_all_names_where_the_kernel_can() {
    let m = Mounted::new(MemFs::new());
    if m.session().notifier().has_epoch() {
        renamed_behind_the_kernel(|_| vec![Notification::IncrementEpoch]);
    } else {
        assert_eq!(tell(&m, Notification::IncrementEpoch).expect_err("unknown").kind(), Kind::Unsupported);
    }
}

#[test]
fn a_full_queue_refuses_and_a_gone_mount_is_said() {
    let m = Mounted::new(MemFs::new());
    let node = m.fs.node("files/1");
    let one = || Notification::InvalidateInode { node, offset: 0, length: 0 };
    // Far more than the thread can send meanwhile; none may block.
    let refused = (0..200_000).filter(|_| m.session().notifier().try_tell(one()).is_err()).count();
    assert!(refused > 0, "the queue has no bound");
    m.mount.abort().expect("aborts");
    let mut ended = m.session().ended();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("runtime");
    runtime.block_on(async {
        tokio::time::timeout(SOON, ended.wait_for(Option::is_some)).await.expect("ends").expect("told").clone()
    });
    assert_eq!(tell(&m, one()).expect_err("gone").kind(), Kind::Unavailable);
}
