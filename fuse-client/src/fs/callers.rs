//! What `/proc` tells of the threads that requests come from. One in another pid namespace cannot be seen: its number is 0.
//!
//! fuser does not deliver INTERRUPT, so who waits is looked at from outside: a thread that has a signal to take does not wait any longer.

use std::time::Duration;

/// How often a waiting thread is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// Returns when a thread has had a signal to take for two looks, or has gone. Never for one that cannot be seen (another pid namespace).
pub(super) async fn interrupted(thread: u32) {
    if thread == 0 || std::fs::metadata(format!("/proc/{thread}")).is_err() {
        return std::future::pending().await;
    }
    let mut seen = false;
    loop {
        tokio::time::sleep(LOOK).await;
        let now = has_signal(thread);
        if seen && now {
            return;
        }
        seen = now;
    }
}

fn has_signal(thread: u32) -> bool {
    let Some(status) = status_of(thread) else { return true };
    let mask = |name| field(&status, name).and_then(|mask| u64::from_str_radix(mask, 16).ok()).unwrap_or(0);
    (mask("SigPnd:") | mask("ShdPnd:")) & !mask("SigBlk:") != 0
}

/// Do both threads live, and belong to different processes?
pub(super) fn are_strangers(one: u32, other: u32) -> bool {
    one != other && matches!((process_of(one), process_of(other)), (Some(a), Some(b)) if a != b)
}

fn process_of(thread: u32) -> Option<u32> {
    field(&status_of(thread)?, "Tgid:")?.parse().ok()
}

fn status_of(thread: u32) -> Option<String> {
    std::fs::read_to_string(format!("/proc/{thread}/status")).ok()
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|l| l.strip_prefix(name)).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_signal_ends_waiting() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().expect("sleep");
        let pid = child.id();
        let quiet = tokio::time::timeout(Duration::from_millis(300), interrupted(pid)).await;
        assert!(quiet.is_err(), "nothing to take");
        child.kill().expect("kill");
        tokio::time::timeout(Duration::from_secs(5), interrupted(pid)).await.expect("killed");
        child.wait().expect("wait");
    }

    #[test]
    fn threads_of_a_process_are_no_strangers() {
        let me = std::process::id();
        let thread = std::thread::spawn(|| nix::unistd::gettid().as_raw() as u32);
        assert!(!are_strangers(me, 0) && !are_strangers(me, me));
        let (tell, told) = std::sync::mpsc::channel::<()>();
        let (tx, rx) = std::sync::mpsc::channel();
        let living = std::thread::spawn(move || {
            tx.send(nix::unistd::gettid().as_raw() as u32).expect("tell");
            let _ = told.recv();
        });
        let tid = rx.recv().expect("tid");
        assert!(tid != me && !are_strangers(me, tid));
        drop(tell);
        living.join().expect("thread");
        let gone = thread.join().expect("thread");
        assert!(!are_strangers(me, gone), "nothing is known of who is gone");
        let mut child = std::process::Command::new("sleep").arg("100").spawn().expect("sleep");
        assert!(are_strangers(me, child.id()));
        child.kill().expect("kill");
        child.wait().expect("wait");
    }
}
