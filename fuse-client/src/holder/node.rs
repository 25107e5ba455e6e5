//! `efc-fuse holder --listen SOCKET`: one service for the mounts of a node, so that they do not end with whoever mounts them (a CSI plugin's container, a login).
//!
//! It starts a holder for each mount and is its service manager ([`super::manager`]): what the holder keeps is here as well, so a holder that is killed together with its mount process is
//! started again, and goes on. A holder that is killed alone takes its mount process with it: two holders of one mount there may never be. The service itself may end: the mounts
//! stay, and holder and mount process look after each other.
//!
//! `efc-fuse mount --holder SOCKET` asks by one line of JSON ([`Ask`]), and is answered by one ([`Report`]). Whoever is not root or the service's own user is refused.

use super::line::{Item, is_readable, receive_packet};
use super::manager::{FDSTORE, FIRST_FD, LISTEN_FDNAMES, LISTEN_FDS, NOTIFY_SOCKET, OF_MANAGER, SERVER, item_of};
use super::spawn::{Spawned, show, spawn};
use super::{DEATHS_MAX, LIFE_MIN, OWN_PROGRAM, PAUSE, PAUSE_MAX, TICK_MS, reap_later, watch};
use crate::cli::MountArgs;
use crate::cli::mount::{Report, child_args};
use crate::control::run_dir;
use efc_common::{Error, Kind, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{getsockopt, sockopt};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use rustix::process::{PidfdFlags, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tracing::{error, info, warn};

/// Longest request, bytes: arguments and environment.
const ASK_BYTES_MAX: u64 = 4 << 20;
/// For a client to say what it wants.
const ASK_DEADLINE: Duration = Duration::from_secs(5);
/// Longest message of a holder, bytes.
const MESSAGE_BYTES_MAX: usize = 64 << 10;
/// Descriptors that are stored for a mount at most.
const STORED_MAX: usize = 100_000;
/// How often it is looked whether a process that was killed has ended.
const TICK: Duration = Duration::from_millis(5);

/// What a client wants: `efc-fuse mount` with these arguments, in this environment.
#[derive(Debug, Serialize, Deserialize)]
pub struct Ask {
    args: Vec<String>,
    env: Vec<(String, String)>,
}

/// Has the service at `socket` hold the mount. Returns when the mount answers.
///
/// # Errors
/// [`Kind::Unavailable`] without a service; what the service said.
pub fn mount(socket: &Path, args: &MountArgs) -> Result<Report> {
    let text =
        |s: OsString| s.into_string().map_err(|s| Error::new(Kind::Invalid, format!("{} is not UTF-8", s.display())));
    let args = child_args(args).into_iter().map(text).collect::<Result<_>>()?;
    let env =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let ask = Ask { args, env: env.collect() };
    let none = |e: std::io::Error| {
        let text = format!("no `efc-fuse holder --listen {0}` answers at {0}", socket.display());
        Error::new(Kind::Unavailable, text).caused_by(e)
    };
    let mut stream = UnixStream::connect(socket).map_err(none)?;
    let line = serde_json::to_string(&ask).map_err(|e| Error::new(Kind::Invalid, "not sent").caused_by(e))?;
    stream.write_all(format!("{line}\n").as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream).take(ASK_BYTES_MAX).read_line(&mut answer)?;
    serde_json::from_str(&answer).map_err(|e| {
        let text = format!("the service at {} ended before the mount answered", socket.display());
        Error::new(Kind::Unavailable, text).caused_by(e)
    })
}

/// Serves until SIGTERM or SIGINT; the mounts stay.
///
/// # Errors
/// [`Kind::Busy`] when another service listens there; what the system said.
pub fn listen(socket: &Path) -> Result<()> {
    let socket = std::path::absolute(socket)?;
    let with = |e: std::io::Error| Error::from(e).with("listen", socket.display());
    if let Some(dir) = socket.parent() {
        std::fs::create_dir_all(dir).map_err(with)?;
    }
    if UnixStream::connect(&socket).is_ok() {
        return Err(Error::new(Kind::Busy, format!("another service listens at {}", socket.display())));
    }
    match std::fs::remove_file(&socket) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(with(e)),
        _ => {}
    }
    // What a container's first process gets is to be cleared away by it; and holders are to end where their mounts are.
    nix::sys::prctl::set_child_subreaper(true).map_err(std::io::Error::from)?;
    std::env::set_current_dir("/")?;
    std::fs::create_dir_all(run_dir())?;
    // A dozen descriptors for each mount, and one for each long file that is being written.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).map_err(std::io::Error::from)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).map_err(std::io::Error::from)?;
    remove_left()?;
    let listener = UnixListener::bind(&socket).map_err(with)?;
    let mut end = SigSet::empty();
    [Signal::SIGTERM, Signal::SIGINT].into_iter().for_each(|s| end.add(s));
    // In all threads. A container's first process would not even get them otherwise.
    end.thread_block().map_err(std::io::Error::from)?;
    let ours = socket.clone();
    std::thread::Builder::new().name("efc-signals".into()).spawn(move || {
        let signal = end.wait();
        info!(?signal, "ends; the mounts go on by themselves");
        let _ = std::fs::remove_file(ours);
        std::process::exit(0);
    })?;
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600)).map_err(with)?;
    println!("listening");
    info!(socket = %socket.display(), "holds the mounts of this node");
    for stream in listener.incoming() {
        let stream = stream?;
        let started = std::thread::Builder::new().name("efc-mount".into()).spawn(move || {
            if let Err(e) = answer(&stream) {
                report(&stream, &Report::failed(&e));
            }
        });
        if let Err(e) = started {
            error!(error = %e, "no thread for another mount");
        }
    }
    Ok(())
}

/// Removes the sockets on which services that are gone heard their holders.
fn remove_left() -> Result<()> {
    for entry in std::fs::read_dir(run_dir())? {
        let name = entry?.file_name();
        let pid = name.to_str().and_then(|n| n.strip_prefix("holder-")?.strip_suffix(".sock")?.split_once('-'));
        if let Some((pid, _)) = pid
            && !Path::new("/proc").join(pid).exists()
        {
            std::fs::remove_file(run_dir().join(&name))?;
        }
    }
    Ok(())
}

fn report(mut stream: &UnixStream, report: &Report) {
    if let Ok(line) = serde_json::to_string(report)
        && let Err(e) = stream.write_all(format!("{line}\n").as_bytes())
    {
        warn!(error = %e, "who asked for a mount has not waited for it");
    }
}

/// One client, and its mount as long as that lives.
fn answer(stream: &UnixStream) -> Result<()> {
    let who = getsockopt(&stream, sockopt::PeerCredentials).map_err(std::io::Error::from)?.uid();
    if who != 0 && who != rustix::process::getuid().as_raw() {
        let text = format!("user {who} may not have mounts held by this service");
        return Err(Error::new(Kind::PermissionDenied, text));
    }
    stream.set_read_timeout(Some(ASK_DEADLINE))?;
    let mut line = String::new();
    BufReader::new(stream).take(ASK_BYTES_MAX).read_line(&mut line)?;
    let ask: Ask = serde_json::from_str(&line)
        .map_err(|e| Error::new(Kind::Invalid, "the request is not understood").caused_by(e))?;
    let mut held = HeldMount::new(ask)?;
    held.keep(stream)
}

/// A mount of the node.
struct HeldMount {
    ask: Ask,
    place: PathBuf,
    notify: UnixDatagram,
    /// What its holder stored, in that order.
    stored: Vec<(String, OwnedFd)>,
    /// What serves it.
    server: Option<(u32, OwnedFd)>,
    is_ready: bool,
    /// What the holder said last of how it is.
    status: String,
}

impl Drop for HeldMount {
    fn drop(&mut self) {
        // Nobody else's name; if it stays, nobody hears there.
        let _ = std::fs::remove_file(&self.place);
    }
}

impl HeldMount {
    fn new(ask: Ask) -> Result<HeldMount> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        if ask.args.first().is_none_or(|a| a != "mount") {
            return Err(Error::new(Kind::Invalid, "only mounts can be asked for"));
        }
        let place = run_dir().join(format!("holder-{}-{}.sock", std::process::id(), COUNT.fetch_add(1, Relaxed)));
        let notify = UnixDatagram::bind(&place).map_err(|e| Error::from(e).with("socket", place.display()))?;
        let (stored, server) = (Vec::new(), None);
        Ok(HeldMount { ask, place, notify, stored, server, is_ready: false, status: String::new() })
    }

    /// From the first start of a holder to the end of the mount.
    fn keep(&mut self, stream: &UnixStream) -> Result<()> {
        let mut deaths = 0;
        loop {
            let begun = Instant::now();
            let process = self.start()?;
            let status = self.hear(stream, process)?;
            let what = self.ask.args.join(" ");
            match status {
                WaitStatus::Exited(_, 0) => return Ok(()),
                WaitStatus::Exited(_, code) if !self.is_ready => {
                    let message = match std::mem::take(&mut self.status) {
                        said if said.is_empty() => "the holder did not start; the service's log says why".into(),
                        said => said,
                    };
                    report(stream, &Report::Failed { code: code as u8, message });
                    return Ok(());
                }
                WaitStatus::Exited(_, code) => {
                    error!(code, status = self.status, mount = what, "a mount has ended");
                    return Ok(());
                }
                _ if !self.can_go_on() => {
                    let text = format!("the holder was killed, and left nothing to go on with ({})", show(&status));
                    error!(mount = what, text);
                    return Err(Error::new(Kind::Io, text));
                }
                _ => error!(status = show(&status), mount = what, "a holder was killed; another goes on"),
            }
            deaths = if begun.elapsed() > LIFE_MIN { 0 } else { deaths + 1 };
            if deaths >= DEATHS_MAX {
                let text = format!("{DEATHS_MAX} holders in a row ended at once");
                error!(mount = what, text);
                return Err(Error::new(Kind::Io, text));
            }
            if deaths > 1 {
                std::thread::sleep(PAUSE_MAX.min(PAUSE * (1 << (deaths - 2))));
            }
            self.end_server();
        }
    }

    fn can_go_on(&self) -> bool {
        let has = |item| self.stored.iter().any(|(name, _)| item_of(name).is_some_and(|(_, i)| i == item));
        Item::NEEDED.into_iter().all(has)
    }

    /// No process of the mount may live when another holder starts.
    fn end_server(&mut self) {
        let Some((pid, process)) = self.server.take() else { return };
        // It may be gone already.
        let _ = pidfd_send_signal(&process, rustix::process::Signal::KILL);
        let mut ended = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        while poll(&mut ended, PollTimeout::ZERO).is_ok_and(|n| n == 0) && !watch::is_dying(pid) {
            std::thread::sleep(TICK);
        }
        // As an orphan it is our child now, if it is over and was not somebody else's.
        let _ = waitid(Id::PIDFd(process.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG);
    }

    /// Hears a holder until it is over.
    fn hear(&mut self, stream: &UnixStream, process: Spawned) -> Result<WaitStatus> {
        loop {
            let mut fds = [
                PollFd::new(self.notify.as_fd(), PollFlags::POLLIN),
                PollFd::new(process.ended.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::from(TICK_MS)) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(std::io::Error::from(e).into()),
            }
            let [said, over] = fds.map(|f| f.any().unwrap_or(false));
            if said {
                let was_ready = self.is_ready;
                self.take_message()?;
                if self.is_ready && !was_ready {
                    report(stream, &Report::Ready { pid: process.pid });
                    // Nobody waits any more.
                    let _ = stream.shutdown(std::net::Shutdown::Both);
                }
            } else if over || watch::is_dying(process.pid) {
                // What it said just before its end may have come after the look.
                if is_readable(self.notify.as_fd())? {
                    continue;
                }
                if over {
                    return process.wait();
                }
                // A thread of it is in the kernel until a successor answers what it has asked the mount.
                let killed = nix::unistd::Pid::from_raw(process.pid as i32);
                reap_later(process)?;
                return Ok(WaitStatus::Signaled(killed, Signal::SIGKILL, false));
            }
        }
    }

    fn take_message(&mut self) -> Result<()> {
        let packet = receive_packet(self.notify.as_fd(), MESSAGE_BYTES_MAX);
        let (bytes, mut fds) = packet.map_err(std::io::Error::from)?;
        let text = String::from_utf8_lossy(&bytes);
        let said = |name: &str| text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix('='));
        let name = said("FDNAME").unwrap_or_default();
        if said("FDSTORE") == Some("1") {
            match fds.pop() {
                Some(fd) if self.stored.len() < STORED_MAX => self.stored.push((name.into(), fd)),
                _ => warn!(name, "not stored"),
            }
        }
        if said("FDSTOREREMOVE") == Some("1") {
            self.stored.retain(|(n, _)| n != name);
        }
        if let Some(pid) = said(SERVER).and_then(|p| p.parse::<i32>().ok()).and_then(rustix::process::Pid::from_raw) {
            // One that is gone by now need not be waited for.
            let process = pidfd_open(pid, PidfdFlags::empty()).ok();
            self.server = process.map(|p| (pid.as_raw_nonzero().get() as u32, p));
        }
        if let Some(status) = said("STATUS") {
            self.status = status.into();
        }
        self.is_ready |= said("READY") == Some("1");
        Ok(())
    }

    /// Starts a holder, and gives it what is stored.
    fn start(&self) -> Result<Spawned> {
        let names: Vec<&str> = self.stored.iter().map(|(name, _)| name.as_str()).collect();
        let ours = [
            (NOTIFY_SOCKET, self.place.display().to_string()),
            (FDSTORE, STORED_MAX.to_string()),
            (LISTEN_FDS, self.stored.len().to_string()),
            (LISTEN_FDNAMES, names.join(":")),
        ];
        let is_ours = |name: &str| OF_MANAGER.contains(&name);
        let theirs = self.ask.env.iter().filter(|(name, _)| !is_ours(name)).cloned();
        let env = theirs.chain(ours.map(|(name, value)| (name.to_string(), value)));
        let args = ["efc-fuse"].into_iter().chain(self.ask.args.iter().map(String::as_str)).chain(["--foreground"]);
        let files: Vec<&OwnedFd> = self.stored.iter().map(|(_, fd)| fd).collect();
        // What ends the service from a terminal is not for its mounts: they are a group of their own.
        let env = env.map(|(name, value)| (name.into(), value.into()));
        spawn(Path::new(OWN_PROGRAM), args.map(Into::into), env, &files, FIRST_FD, true)
    }
}
