//! The holder of a mount: a small process that keeps what a mount process needs to be replaced, and replaces it when it dies or hangs (decision 0011).
//!
//! It has one thread that waits (for messages, for the end of the mount process, for signals) and one that asks the mount something every second. It never opens a file on the mount,
//! speaks to no network and starts no runtime: what can go wrong in it is little.

pub mod line;
mod watch;

use crate::cli::MountArgs;
use crate::kernel::Mount;
use efc_common::{Error, Kind, Result};
use line::{Item, Line, Message};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tracing::{error, info, warn};
use watch::Watch;

/// Tells a mount process the number of its end of the line.
const LINE_FD: &str = "EFC_HOLDER_FD";
/// How often the mount is looked at, milliseconds.
const TICK_MS: u16 = 200;
/// A mount that owes an answer for so long hangs.
const HANG_AFTER: Duration = Duration::from_secs(7);
/// A mount process may take so long to take the mount over; then it is replaced in its turn.
const TAKEOVER_DEADLINE: Duration = Duration::from_secs(30);
/// A mount process that ends sooner has not lived: perhaps what it died of is waiting for the next one.
const LIFE_MIN: Duration = Duration::from_secs(2);
/// So many in a row that have not lived, and the mount is given up: an error is better than a mount that waits for ever.
const DEATHS_MAX: u32 = 10;
/// Pause after the second of them; doubles, up to the maximum.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// What a mount process has of its holder.
#[derive(Debug)]
pub struct Held {
    line: Arc<Line>,
    items: BTreeMap<Item, (String, Option<OwnedFd>)>,
    /// How often a mount process was replaced, by reason.
    pub failovers: BTreeMap<String, u64>,
}

/// What a predecessor left.
#[derive(Debug)]
pub struct Left {
    /// The connection.
    pub connection: OwnedFd,
    /// Its INIT record.
    pub init: String,
    /// The journal of nodes.
    pub nodes: std::fs::File,
}

impl Held {
    /// The holder that started this process, if one did.
    ///
    /// # Errors
    /// When it says something that is not understood.
    pub fn inherited() -> Result<Option<Held>> {
        let Some(fd) = std::env::var(LINE_FD).ok().and_then(|n| n.parse::<RawFd>().ok()) else { return Ok(None) };
        // SAFETY: the holder left this fd open for us alone and told its number; it is taken once, before there are threads.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        nix::fcntl::fcntl(&socket, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))
            .map_err(std::io::Error::from)?;
        let line = Line::new(socket);
        let gone = || Error::new(Kind::Unavailable, "the holder of this mount process is gone");
        let Some((Message::Kept { items: count, failovers }, _)) = line.receive()? else { return Err(gone()) };
        let mut items = BTreeMap::new();
        for _ in 0..count {
            match line.receive()? {
                Some((Message::Keep { item, text }, fd)) => items.insert(item, (text, fd)),
                _ => return Err(gone()),
            };
        }
        Ok(Some(Held { line: Arc::new(line), items, failovers }))
    }

    /// Without its holder a mount in the foreground ends, as whoever started it expects; another goes on and has nobody who would replace it.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn guard(&self, foreground: bool) -> Result<()> {
        let line = self.line.clone();
        let wait = move || {
            while let Ok(Some(_)) = line.receive() {}
            if foreground {
                warn!("the holder of this mount is gone; unmounting");
                // Cannot fail for the process itself.
                let _ = nix::sys::signal::raise(Signal::SIGTERM);
            } else {
                error!("the holder of this mount is gone; if this process dies, nobody takes over");
            }
        };
        std::thread::Builder::new().name("efc-held".into()).spawn(wait)?;
        Ok(())
    }

    /// What a predecessor left, if it left all that is needed. To be asked once.
    pub fn take(&mut self) -> Option<Left> {
        let (_, connection) = self.items.remove(&Item::Connection)?;
        let (init, _) = self.items.remove(&Item::Init)?;
        let (_, nodes) = self.items.remove(&Item::Nodes)?;
        Some(Left { connection: connection?, init, nodes: nodes?.into() })
    }

    /// Has the holder keep something for the next process.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] when it is gone.
    pub fn keep(&self, item: Item, text: &str, fd: Option<std::os::fd::BorrowedFd<'_>>) -> Result<()> {
        self.line.send(&Message::Keep { item, text: text.into() }, fd)
    }

    /// The mount answers.
    pub fn ready(&self) {
        if let Err(e) = self.line.send(&Message::Ready, None) {
            warn!(error = %e, "nobody was told that the mount answers");
        }
    }

    /// This process ends by itself.
    pub fn bye(&self, code: u8, text: Option<String>) {
        // Without a holder there is nobody who would start another.
        let _ = self.line.send(&Message::Bye { code, text }, None);
    }
}

/// How the life of a mount process ended.
enum End {
    /// It said why.
    Bye(u8, Option<String>),
    Died(ExitStatus),
}

/// Holds a mount: starts its process, and another when it dies. `ready` is called once, when the mount answers.
///
/// # Errors
/// What the mount process said when it could not come up; or that it cannot be kept alive.
pub fn run(args: &MountArgs, ready: impl FnOnce()) -> Result<()> {
    let mut holder = Holder::new(args)?;
    let mut ready = Some(ready);
    loop {
        let begun = Instant::now();
        let mut served = false;
        let end = holder.live(&mut || {
            served = true;
            if let Some(tell) = ready.take() {
                tell();
            }
        })?;
        let reason = match end {
            End::Bye(0, _) => return Ok(()),
            // It was told to end, and had not learnt to yet.
            _ if holder.stopping => {
                Mount::existing(&holder.mountpoint)?.unmount(true)?;
                return Ok(());
            }
            // A successor may find the rest of its predecessor in its way.
            End::Bye(code, text) if served || !holder.can_go_on() => return Err(said(code, text)),
            End::Bye(_, text) => {
                let text = text.unwrap_or_default();
                warn!(error = text, "a mount process could not take over");
                "failed"
            }
            End::Died(status) if !holder.can_go_on() => {
                return Err(Error::new(
                    Kind::Io,
                    format!("the mount process ended before the mount answered ({status})"),
                ));
            }
            End::Died(status) => {
                let reason = if std::mem::take(&mut holder.hung) { "hang" } else { "crash" };
                error!(%status, reason, lived_s = begun.elapsed().as_secs(), "the mount process is gone; another takes over");
                reason
            }
        };
        holder.count(reason, begun.elapsed() > LIFE_MIN)?;
    }
}

fn said(code: u8, text: Option<String>) -> Error {
    let kind = match code {
        2 => Kind::Invalid,
        3 => Kind::NotFound,
        4 => Kind::PermissionDenied,
        5 => Kind::Unavailable,
        6 => Kind::Busy,
        7 => Kind::Unsupported,
        _ => Kind::Io,
    };
    Error::new(kind, text.unwrap_or_else(|| "the mount process ended with an error".into()))
}

struct Holder {
    mountpoint: std::path::PathBuf,
    kept: BTreeMap<Item, (String, Option<OwnedFd>)>,
    signals: SignalFd,
    failovers: BTreeMap<String, u64>,
    /// Mount processes in a row that have not lived.
    deaths: u32,
    watch: Option<Watch>,
    /// It was killed because it hung.
    hung: bool,
    /// A signal said that the mount is to end.
    stopping: bool,
}

impl Holder {
    fn new(args: &MountArgs) -> Result<Holder> {
        let mut set = SigSet::empty();
        [Signal::SIGTERM, Signal::SIGINT].into_iter().for_each(|s| set.add(s));
        set.thread_block().map_err(std::io::Error::from)?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK);
        Ok(Holder {
            mountpoint: args.mountpoint.clone(),
            kept: BTreeMap::new(),
            signals: signals.map_err(std::io::Error::from)?,
            failovers: BTreeMap::new(),
            deaths: 0,
            watch: None,
            hung: false,
            stopping: false,
        })
    }

    /// Has it what a successor needs?
    fn can_go_on(&self) -> bool {
        Item::ALL.iter().all(|i| self.kept.contains_key(i))
    }

    /// One more mount process was lost.
    fn count(&mut self, reason: &str, lived: bool) -> Result<()> {
        *self.failovers.entry(reason.into()).or_default() += 1;
        self.deaths = if lived { 0 } else { self.deaths + 1 };
        if self.deaths >= DEATHS_MAX {
            error!(mountpoint = %self.mountpoint.display(), "no mount process lives; the mount is given up");
            Mount::existing(&self.mountpoint)?.abort()?;
            let text = format!("{DEATHS_MAX} mount processes in a row ended at once; the log says why");
            return Err(Error::new(Kind::Io, text));
        }
        if self.deaths > 1 {
            std::thread::sleep(PAUSE_MAX.min(PAUSE * (1 << (self.deaths - 2))));
        }
        Ok(())
    }

    /// One mount process, from its start to its end.
    fn live(&mut self, ready: &mut dyn FnMut()) -> Result<End> {
        let (mut child, line) = match start() {
            Ok(started) => started,
            Err(e) if self.can_go_on() => return Ok(End::Bye(1, Some(e.to_string()))),
            Err(e) => return Err(e),
        };
        let told = self.tell(&line);
        let begun = Instant::now();
        let mut bye = None;
        let mut is_ready = false;
        let process = rustix::process::Pid::from_child(&child);
        let ended = rustix::process::pidfd_open(process, rustix::process::PidfdFlags::empty());
        let ended = ended.map_err(std::io::Error::from)?;
        if let Err(e) = told {
            warn!(error = %e, "the mount process was not told what is kept for it");
        }
        loop {
            let mut fds = [
                PollFd::new(line.socket().as_fd(), PollFlags::POLLIN),
                PollFd::new(ended.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::from(TICK_MS)) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(std::io::Error::from(e).into()),
            }
            let [said, over, signalled] = fds.map(|f| f.any().unwrap_or(false));
            // What it said last is still to be heard when it is over.
            if said {
                match line.receive() {
                    Ok(Some((Message::Keep { item, text }, fd))) => {
                        self.kept.insert(item, (text, fd));
                    }
                    Ok(Some((Message::Ready, _))) => {
                        is_ready = true;
                        self.watch.get_or_insert_with(|| Watch::start(&self.mountpoint));
                        ready();
                    }
                    Ok(Some((Message::Bye { code, text }, _))) => bye = Some((code, text)),
                    Ok(Some((Message::Kept { .. }, _))) | Ok(None) => {}
                    Err(e) => warn!(error = %e, "a message of the mount process was not understood"),
                }
                if !over {
                    continue;
                }
            }
            if over {
                while let Ok(Some((message, fd))) = line.receive() {
                    match message {
                        Message::Keep { item, text } => drop(self.kept.insert(item, (text, fd))),
                        Message::Bye { code, text } => bye = Some((code, text)),
                        Message::Ready | Message::Kept { .. } => {}
                    }
                }
                let status = child.wait()?;
                return Ok(match bye {
                    Some((code, text)) => End::Bye(code, text),
                    None => End::Died(status),
                });
            }
            if signalled {
                while let Ok(Some(signal)) = self.signals.read_signal() {
                    info!(signal = signal.ssi_signo, "passed on to the mount process");
                    self.stopping = true;
                    // It may have ended this moment.
                    let _ = rustix::process::kill_process(process, rustix::process::Signal::TERM);
                }
            }
            let late = match &self.watch {
                Some(watch) if is_ready => watch.waits() > HANG_AFTER,
                _ => !is_ready && self.can_go_on() && begun.elapsed() > TAKEOVER_DEADLINE,
            };
            if late && bye.is_none() {
                error!(
                    pid = child.id(),
                    stacks = watch::stacks(child.id()),
                    "the mount does not answer; its process is killed"
                );
                self.hung = true;
                if let Some(watch) = &self.watch {
                    watch.begin_anew();
                }
                child.kill()?;
                is_ready = false;
            }
        }
    }

    /// Gives everything that is kept to a new mount process.
    fn tell(&self, line: &Line) -> Result<()> {
        let failovers = self.failovers.clone();
        line.send(&Message::Kept { items: self.kept.len(), failovers }, None)?;
        for (item, (text, fd)) in &self.kept {
            line.send(&Message::Keep { item: *item, text: text.clone() }, fd.as_ref().map(AsFd::as_fd))?;
        }
        Ok(())
    }
}

/// Starts a mount process: this program with the same arguments, and its end of the line.
fn start() -> Result<(Child, Line)> {
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
    let (ours, theirs) = pair.map_err(std::io::Error::from)?;
    // When another version has taken the program's place, this one is still there by that path.
    let program = std::env::current_exe().ok().filter(|p| p.exists()).unwrap_or_else(|| "/proc/self/exe".into());
    let mut command = Command::new(program);
    let mut args = std::env::args_os();
    if let Some(name) = args.next() {
        command.arg0(name);
    }
    command.args(args).env(LINE_FD, theirs.as_raw_fd().to_string());
    let inherited = theirs.as_raw_fd();
    // SAFETY: between fork and exec only async-signal-safe calls are made; the fd stays open until the child has it.
    unsafe {
        command.pre_exec(move || {
            // The holder waits for its signals in another way; whoever is started by it takes them as usual.
            SigSet::empty().thread_set_mask()?;
            match libc::fcntl(inherited, libc::F_SETFD, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    let child = command.spawn()?;
    Ok((child, Line::new(ours)))
}
