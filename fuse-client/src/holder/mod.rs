//! The holder of a mount: a small process that keeps what a mount process needs to be replaced, and replaces it when it dies or hangs (decision 0011).
//!
//! It has one thread that waits (for messages, for the end of the mount process, for signals) and one that asks the mount something every second. It never opens a file on the mount,
//! speaks to no network and starts no runtime: what can go wrong in it is little. Above it there may be a service manager ([`manager`]), for the case that both are gone.

mod held;
pub mod line;
mod manager;
pub mod node;
mod spawn;
mod watch;

pub use held::{Held, Left, Wish};
pub use manager::{OF_MANAGER, gave_a_mount};

use crate::cli::MountArgs;
use crate::control;
use crate::kernel::Mount;
use crate::options;
use crate::shared::Users;
use efc_common::{Error, Kind, Result};
use line::{EVENT_TEXT_MAX, Event, Item, Line, Message, Past, Upgrade};
use manager::{Manager, Memory};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use spawn::{Spawned, spawn};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tracing::{debug, error, info, warn};
use watch::Watch;

/// This program, whatever became of its file.
const OWN_PROGRAM: &str = "/proc/self/exe";
/// A mount process that is to leave may take so long; then it is killed, which is as good.
const LEAVE_DEADLINE: Duration = Duration::from_secs(4);
/// Another program may take so long to serve; then the one of before goes on. Less than the time of a lease: advisory locks are kept no longer.
const TRIAL_DEADLINE: Duration = Duration::from_secs(4);
/// Tells a holder which mount process it is to hold, that has lost its holder.
const HELD_PID: &str = "EFC_HELD_PID";
/// Tells a process the number of its end of the line.
const LINE_FD: &str = "EFC_HOLDER_FD";
/// It is always this one.
const LINE_NUMBER: RawFd = 3;
/// How often the mount is looked at, milliseconds.
const TICK_MS: u16 = 200;
/// A mount that owes an answer for so long hangs. Its session ends 10 s after a renewal, and one comes every few seconds: another process is to go on with it before.
const HANG_AFTER: Duration = Duration::from_secs(4);
/// A mount process may take so long to take the mount over; then it is replaced in its turn.
const TAKEOVER_DEADLINE: Duration = Duration::from_secs(30);
/// A mount process that ends sooner has not lived: perhaps what it died of is waiting for the next one.
const LIFE_MIN: Duration = Duration::from_secs(2);
/// So many in a row that have not lived, and the mount is given up: an error is better than a mount that waits for ever.
const DEATHS_MAX: u32 = 10;
/// Pause after the second of them; doubles, up to the maximum.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// How the life of a mount process ended.
enum End {
    /// It said why.
    Bye(u8, Option<String>),
    /// It left the mount to another program.
    Left,
    Died(String),
}

/// Holds a mount: starts its process, and another when it dies. `ready` is called once, when the mount answers.
///
/// # Errors
/// What the mount process said when it could not come up; or that it cannot be kept alive.
pub fn run(args: &MountArgs, ready: impl FnOnce()) -> Result<()> {
    Holder::new(args, None)?.hold(ready)
}

/// Goes on holding the mount of a process whose holder is gone, if this process was started for that.
///
/// # Errors
/// As [`run`].
pub fn run_again(args: &MountArgs) -> Option<Result<()>> {
    let pid = std::env::var(HELD_PID).ok()?.parse().ok()?;
    let again = || {
        args.begin_log()?;
        let line = inherited_line()?
            .ok_or_else(|| Error::new(Kind::Invalid, "a holder without a line to its mount process"))?;
        Holder::new(args, Some((pid, line)))?.hold(|| {})
    };
    Some(again())
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

/// What is kept: its text, and its fd if it has one.
type Kept = BTreeMap<Item, (String, Option<OwnedFd>)>;

struct Holder {
    mountpoint: PathBuf,
    /// A mount process that is there already.
    found: Option<(u32, Line)>,
    /// What serves the mount.
    program: PathBuf,
    /// Options that came after the mount's own.
    options: Vec<String>,
    /// What is to be tried next, or is being tried.
    trial: Option<Upgrade>,
    past: Past,
    /// Since when nobody serves.
    idle_since: Option<Instant>,
    /// The process that lives now has said that it serves.
    is_ready: bool,
    kept: Kept,
    /// Who keeps that as well.
    manager: Option<Manager>,
    signals: SignalFd,
    /// Mount processes in a row that have not lived.
    deaths: u32,
    /// How and why one was lost, and the number of the upgrade if it was for that, until another serves.
    lost: Option<(String, String, u64)>,
    watch: Option<Watch>,
    /// It was killed because it did not answer.
    hung: Option<String>,
    /// A signal said that the mount is to end.
    stopping: bool,
    /// Who uses it, where that decides how long it lives.
    users: Option<Users>,
}

impl Holder {
    fn new(args: &MountArgs, found: Option<(u32, Line)>) -> Result<Holder> {
        let mut set = SigSet::empty();
        [Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR2].into_iter().for_each(|s| set.add(s));
        set.thread_block().map_err(std::io::Error::from)?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK);
        // When another version has taken the program's place, this one is still there by the second path.
        let program = std::env::current_exe().ok().filter(|p| p.exists()).unwrap_or_else(|| OWN_PROGRAM.into());
        let (manager, kept) = Manager::of_this_process()?.unzip();
        let mut holder = Holder {
            mountpoint: args.mountpoint.clone(),
            found,
            program,
            options: Vec::new(),
            trial: None,
            past: Past::default(),
            idle_since: None,
            is_ready: false,
            kept: kept.unwrap_or_default(),
            manager,
            signals: signals.map_err(std::io::Error::from)?,
            deaths: 0,
            lost: None,
            watch: None,
            hung: None,
            stopping: false,
            users: Users::of(&args.mountpoint)?,
        };
        holder.recollect()?;
        Ok(holder)
    }

    /// Goes on from what a service manager kept of a holder that is gone with its mount process.
    fn recollect(&mut self) -> Result<()> {
        if let Some((text, _)) = self.kept.remove(&Item::Memory) {
            let memory: Memory = serde_json::from_str(&text)
                .map_err(|e| Error::new(Kind::Corrupt, "what the holder of before remembered").caused_by(e))?;
            self.program = memory.program.map_or_else(|| self.program.clone(), PathBuf::from);
            (self.options, self.past) = (memory.options, memory.past);
        }
        if self.can_go_on() {
            warn!("the holder of before and its mount process are gone; the service manager has kept what they left");
            self.idle_since = Some(Instant::now());
            self.past.count("restart");
            self.lost = Some(("restart".into(), "holder and mount process were gone".into(), 0));
        }
        Ok(())
    }

    /// Tells the service manager what this holder has to remember.
    fn memorize(&mut self) {
        let Some(manager) = &mut self.manager else { return };
        let program = self.program.to_str().map(String::from).filter(|p| p != OWN_PROGRAM);
        let memory = Memory { program, options: self.options.clone(), past: self.past.clone() };
        match serde_json::to_string(&memory) {
            Ok(text) => manager.keep(Item::Memory, &text, None),
            Err(e) => warn!(error = %e, "the service manager does not know what happened to the mount"),
        }
    }

    fn hold(mut self, ready: impl FnOnce()) -> Result<()> {
        let done = self.run(ready);
        if let (Some(manager), Err(e)) = (&self.manager, &done) {
            manager.failed(e);
        }
        done
    }

    fn run(&mut self, ready: impl FnOnce()) -> Result<()> {
        let mut ready = Some(ready);
        loop {
            let begun = Instant::now();
            let end = self.live(&mut || {
                if let Some(tell) = ready.take() {
                    tell();
                }
            })?;
            let (reason, text) = match end {
                End::Bye(0, _) => return Ok(()),
                // It was told to end, and had nothing yet that another would have to bring to an end.
                _ if self.stopping && !self.can_go_on() => {
                    if let Ok(mount) = Mount::existing(&self.mountpoint) {
                        mount.unmount(true)?;
                    }
                    return Ok(());
                }
                End::Left => ("upgrade", String::new()),
                // It has not served; the one before had left everything.
                End::Bye(_, text) if self.trial.is_some() => ("upgrade_failed", text.unwrap_or_default()),
                End::Died(_) if self.trial.is_some() && self.hung.take().is_some() => {
                    ("upgrade_failed", format!("it did not serve within {} s", TRIAL_DEADLINE.as_secs()))
                }
                End::Died(status) if self.trial.is_some() => ("upgrade_failed", status),
                // A successor may find the rest of its predecessor in its way.
                End::Bye(code, text) if self.is_ready || !self.can_go_on() => return Err(said(code, text)),
                End::Bye(_, text) => ("failed", text.unwrap_or_default()),
                End::Died(status) if !self.can_go_on() => {
                    let text =
                        format!("the mount process is gone, and left nothing that another could go on with ({status})");
                    return Err(Error::new(Kind::Io, text));
                }
                End::Died(status) => match self.hung.take() {
                    Some(saved) => ("hang", format!("{status}; {saved}")),
                    None => ("crash", status),
                },
            };
            self.over(reason, &text, begun.elapsed())?;
        }
    }

    /// Has it what a successor needs?
    fn can_go_on(&self) -> bool {
        can_go_on(&self.kept)
    }

    /// A mount process is over, and another is to go on.
    fn over(&mut self, reason: &str, text: &str, lived: Duration) -> Result<()> {
        self.idle_since.get_or_insert_with(Instant::now);
        let lived_s = lived.as_secs();
        match reason {
            "upgrade" => info!(lived_s, "the mount process has left the mount to another program"),
            "upgrade_failed" => {
                error!(text, "another program could not take the mount over; the one of before goes on");
            }
            "failed" => warn!(text, "a mount process could not take over"),
            _ => error!(status = text, reason, lived_s, "the mount process is gone; another takes over"),
        }
        if reason == "upgrade" {
            return Ok(());
        }
        self.past.count(reason);
        let id = self.trial.take().map_or(0, |t| t.id);
        // What comes before another serves comes of that.
        self.lost.get_or_insert_with(|| (reason.into(), text.into(), id));
        self.deaths = if lived > LIFE_MIN { 0 } else { self.deaths + 1 };
        if self.deaths >= DEATHS_MAX {
            error!(mountpoint = %self.mountpoint.display(), "no mount process lives; the mount is given up");
            // One that is out of the tree ends with this process.
            if let Ok(mount) = Mount::existing(&self.mountpoint) {
                mount.abort()?;
            }
            let text = format!("{DEATHS_MAX} mount processes in a row ended at once; the log says why");
            return Err(Error::new(Kind::Io, text));
        }
        if self.deaths > 1 {
            std::thread::sleep(PAUSE_MAX.min(PAUSE * (1 << (self.deaths - 2))));
        }
        Ok(())
    }

    /// Process `pid` serves. What is to be remembered of that.
    fn serves(&mut self, pid: u32) -> Option<Event> {
        let pause = self.idle_since.take().map_or(Duration::ZERO, |t| t.elapsed());
        let (what, text, upgrade) = match (self.trial.take(), self.lost.take()) {
            (Some(trial), _) => {
                info!(program = trial.program, pid, "another program serves the mount");
                self.program = PathBuf::from(&trial.program);
                options::replace(&mut self.options, &trial.options);
                self.past.count("upgrade");
                ("upgrade".into(), trial.program, trial.id)
            }
            (None, Some(lost)) => lost,
            (None, None) => return None,
        };
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let text = text.chars().take(EVENT_TEXT_MAX).collect();
        let event = Event { at, what, pid, pause_ms: pause.as_millis() as u64, text, upgrade };
        self.past.remember(event.clone());
        Some(event)
    }

    /// One mount process, from its start to its end.
    fn live(&mut self, ready: &mut dyn FnMut()) -> Result<End> {
        self.is_ready = false;
        let (pid, mut child, line) = match self.found.take() {
            Some((pid, line)) => (pid, None, line),
            None => match self.start() {
                Ok((child, line)) => (child.pid, Some(child), line),
                Err(e) if self.can_go_on() => return Ok(End::Bye(1, Some(e.to_string()))),
                Err(e) => return Err(e),
            },
        };
        if let Some(manager) = &self.manager {
            manager.served_by(pid);
        }
        let begun = Instant::now();
        let mut bye = None;
        let mut left = false;
        let mut killed = false;
        let mut heard_all = false;
        let process = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
        let process = process.ok_or_else(|| Error::new(Kind::Invalid, "impossible process"))?;
        let ended = rustix::process::pidfd_open(process, rustix::process::PidfdFlags::empty());
        let ended = ended.map_err(std::io::Error::from)?;
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
            if let Some(users) = self.users.as_mut().filter(|_| self.is_ready) {
                users.look();
            }
            // What it said last is still to be heard when it is over.
            if said {
                let message = line.receive();
                heard_all = matches!(message, Ok(None));
                match message {
                    Ok(Some((Message::Keep { item, text }, fd))) => {
                        if let Some(manager) = &mut self.manager {
                            manager.keep(item, &text, fd.as_ref().map(AsFd::as_fd));
                        }
                        self.kept.insert(item, (text, fd));
                    }
                    Ok(Some((Message::Drop { item }, _))) => {
                        if let Some(manager) = &mut self.manager {
                            manager.drop_item(item);
                        }
                        self.kept.remove(&item);
                    }
                    Ok(Some((Message::Ready, _))) => {
                        self.is_ready = true;
                        self.watch.get_or_insert_with(|| Watch::start(&self.mountpoint));
                        if let Some(event) = self.serves(pid) {
                            tell(&line, &Message::Event(event));
                        }
                        self.memorize();
                        if let Some(manager) = &self.manager {
                            manager.ready();
                        }
                        ready();
                        // Its predecessor was told to, and died before it had.
                        if self.stopping {
                            end_in_order(process);
                        }
                    }
                    Ok(Some((Message::Upgrade(upgrade), _))) => {
                        info!(program = upgrade.program, "another program is asked for");
                        self.idle_since = Some(Instant::now());
                        self.trial = Some(upgrade);
                        tell(&line, &Message::Leave);
                    }
                    Ok(Some((Message::Options(options), _))) => {
                        options::replace(&mut self.options, &options);
                        self.memorize();
                    }
                    Ok(Some((Message::Left, _))) => left = true,
                    Ok(Some((Message::Bye { code, text }, _))) => bye = Some((code, text)),
                    // From a process whose holder is gone: what that knew.
                    Ok(Some((Message::Kept { past, .. }, _))) => self.past = past,
                    Ok(Some((Message::Event(_) | Message::Leave, _)) | None) => {}
                    Err(e) => warn!(error = %e, "a message of the mount process was not understood"),
                }
                if !heard_all {
                    continue;
                }
            }
            if over || watch::is_dying(pid) {
                // What it said just before its end may have come after the look at the line.
                if !heard_all && line.has_more()? {
                    continue;
                }
                let status = match child.take() {
                    Some(child) if over => spawn::show(&child.wait()?),
                    Some(child) => {
                        reap_later(child)?;
                        "killed, not yet gone".into()
                    }
                    None => "it was not started by this holder".into(),
                };
                return Ok(match bye {
                    Some((code, text)) => End::Bye(code, text),
                    // One that dies on its way out is as good.
                    None if left || self.is_ready && self.trial.is_some() => End::Left,
                    None => End::Died(status),
                });
            }
            if signalled {
                while let Ok(Some(signal)) = self.signals.read_signal() {
                    if signal.ssi_signo == Signal::SIGUSR2 as u32 {
                        let program = self.program.display().to_string();
                        tell(&line, &Message::Upgrade(Upgrade { id: 0, program, options: Vec::new() }));
                        continue;
                    }
                    info!(signal = signal.ssi_signo, "passed on to the mount process");
                    self.stopping = true;
                    end_in_order(process);
                }
            }
            let leaves = self.is_ready && self.trial.is_some();
            let late = match &self.watch {
                _ if leaves => self.idle_since.is_some_and(|t| t.elapsed() > LEAVE_DEADLINE),
                Some(watch) if self.is_ready => watch.waits() > HANG_AFTER,
                _ if self.trial.is_some() => begun.elapsed() > TRIAL_DEADLINE,
                _ => !self.is_ready && begun.elapsed() > TAKEOVER_DEADLINE,
            };
            if late && !killed && self.can_go_on() && bye.is_none() {
                killed = true;
                let saved = watch::save_stacks(pid, &control::socket_path(&self.mountpoint).with_extension("hang"));
                error!(pid, saved, "the mount does not answer; its process is killed");
                self.hung = (!leaves).then_some(saved);
                if let Some(watch) = &self.watch {
                    watch.begin_anew();
                }
                // It may have ended this moment.
                let _ = rustix::process::kill_process(process, rustix::process::Signal::KILL);
                self.is_ready &= leaves;
            }
        }
    }

    /// Starts a mount process and gives it everything that is kept.
    fn start(&self) -> Result<(Spawned, Line)> {
        let trial = self.trial.as_ref();
        let program = trial.map_or(&*self.program, |t| Path::new(&t.program));
        let options = self.options.iter().chain(trial.iter().flat_map(|t| &t.options));
        let (child, line) = start(program, options, None)?;
        if let Err(e) = tell_all(&line, &self.kept, &self.past) {
            warn!(error = %e, "the mount process was not told what is kept for it");
        }
        Ok((child, line))
    }
}

/// Waits for the end of a process in a thread of its own: of one that is dying a thread may be in the kernel until a successor answers what it waits for.
fn reap_later(child: Spawned) -> Result<()> {
    std::thread::Builder::new().name("efc-reap".into()).spawn(move || {
        if let Err(e) = child.wait() {
            warn!(error = %e, "a process that ended is not cleared away");
        }
    })?;
    Ok(())
}

/// Tells a mount process, which may have ended this moment, to end.
fn end_in_order(process: rustix::process::Pid) {
    let _ = rustix::process::kill_process(process, rustix::process::Signal::TERM);
}

/// Is this what a successor needs?
fn can_go_on(kept: &Kept) -> bool {
    Item::NEEDED.iter().all(|i| kept.contains_key(i))
}

/// Gives everything that is kept and known to the other end of a new line.
fn tell_all(line: &Line, kept: &Kept, past: &Past) -> Result<()> {
    line.send(&Message::Kept { items: kept.len(), past: past.clone() }, None)?;
    for (item, (text, fd)) in kept {
        line.send(&Message::Keep { item: *item, text: text.clone() }, fd.as_ref().map(AsFd::as_fd))?;
    }
    Ok(())
}

/// Says something to a mount process, which may be gone.
fn tell(line: &Line, message: &Message) {
    if let Err(e) = line.send(message, None) {
        debug!(error = %e, "the mount process does not hear");
    }
}

/// This process's end of the line to whoever started it.
fn inherited_line() -> Result<Option<Line>> {
    let Some(fd) = std::env::var(LINE_FD).ok().and_then(|n| n.parse::<RawFd>().ok()) else { return Ok(None) };
    // SAFETY: whoever started us left this fd open for us alone and told its number; it is taken once, before there are threads.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    nix::fcntl::fcntl(&socket, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))
        .map_err(std::io::Error::from)?;
    Ok(Some(Line::new(socket)))
}

/// Starts a program with the arguments of this one, further mount options, and a line to it; `held`: to hold this process.
fn start<'a>(program: &Path, options: impl Iterator<Item = &'a String>, held: Option<u32>) -> Result<(Spawned, Line)> {
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
    let (ours, theirs) = pair.map_err(std::io::Error::from)?;
    let options = options.flat_map(|o| ["-o".into(), o.into()]);
    // The manager hears of what is started here from the holder.
    let own = [HELD_PID, LINE_FD, manager::LISTEN_FDS, manager::LISTEN_FDNAMES];
    let env = std::env::vars_os().filter(|(name, _)| own.iter().all(|o| name != o));
    let line = (LINE_FD.into(), LINE_NUMBER.to_string().into());
    let held = held.map(|pid| (HELD_PID.into(), pid.to_string().into()));
    let program = if program.exists() { program } else { Path::new(OWN_PROGRAM) };
    let args = std::env::args_os().chain(options);
    let child = spawn(program, args, env.chain([line]).chain(held), &[&theirs], LINE_NUMBER, false)?;
    Ok((child, Line::new(ours)))
}
