//! `efc-fuse mount` and `umount`: the part that runs in the caller's terminal.
//!
//! A daemon is this program started again in the background with a pipe as its stdout; it writes one JSON line when the mount answers or
//! when it failed, so the command returns 0 only for a mount that works.

use super::MountArgs;
use crate::control::{self, Request};
use crate::embedded::default_data_dir;
use crate::holder::{self, Held, node};
use crate::kernel::{self, Mount};
use crate::options::{MountOptions, all_but};
use crate::process;
use crate::shared::Place;
use crate::upgrade;
use efc_common::error::Context as _;
use efc_common::{Error, Kind, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// A mount that is in use for longer is in use by others than its holder.
const OWN_USE: Duration = Duration::from_millis(1500);
/// How long the process of a mount may take to say who it is.
const STATUS_PATIENCE: Duration = Duration::from_secs(1);
/// The end of a mount process that takes longer is told of.
const SILENCE: Duration = Duration::from_secs(2);
/// How long it may take to bring what was written to a store that refuses it, and to end.
const END_PATIENCE: Duration = Duration::from_secs(150);

/// What a daemon says to the command that started it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// The mount answers.
    Ready {
        /// Its holder.
        pid: u32,
    },
    /// It does not, and is not there.
    Failed {
        /// As of [`super::exit_code`].
        code: u8,
        /// Why.
        message: String,
    },
}

impl Report {
    /// Of an error.
    pub fn failed(e: &Error) -> Report {
        Report::Failed { code: super::exit_code(e), message: e.to_string() }
    }
}

/// The absolute path of a directory, symbolic links resolved in its parent only: a dead mount itself is never touched.
pub fn absolute(path: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(path)?;
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => {
            let parent = parent
                .canonicalize()
                .map_err(|e| Error::from(e).with("path", parent.display()))
                .context(format!("mountpoint {} cannot be found", path.display()))?;
            Ok(parent.join(name))
        }
        _ => Ok(path),
    }
}

/// `efc-fuse mount`.
pub fn mount(mut args: MountArgs) -> Result<()> {
    args.mountpoint = absolute(&args.mountpoint)?;
    // What can be refused at once is refused before anything is started.
    let who = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let options = MountOptions::parse(&args.options, who)?;
    process::parse_source(&args.source, &options)?;
    if std::env::var_os(upgrade::PREFLIGHT).is_some() {
        return process::preflight(&args, &options);
    }
    if let Some(done) = holder::run_again(&args) {
        return done;
    }
    let held = Held::inherited()?;
    if held.is_none() && !holder::gave_a_mount() {
        kernel::check(&args.mountpoint)?;
    }
    if let Some(held) = held {
        return serve_held(&args, options, held);
    }
    if let Some(sub) = &options.subpath {
        return bind(&args, &options, sub);
    }
    if args.foreground || args.daemon_child {
        return foreground(&args, options);
    }
    start(&args, &options)
}

/// Has a mount stay when this process ends, by the node's service if there is to be one.
fn start(args: &MountArgs, options: &MountOptions) -> Result<()> {
    let Some(socket) = &args.holder else { return daemon(args, options) };
    if !options.failover {
        return Err(Error::new(Kind::Invalid, "no_failover is a mount without a holder: leave it out, or --holder"));
    }
    match node::mount(socket, args)? {
        Report::Ready { .. } => Ok(()),
        Report::Failed { code, message } => {
            eprintln!("efc-fuse: {message}");
            std::process::exit(i32::from(code));
        }
    }
}

/// The arguments of another process for the same mount.
pub fn child_args(args: &MountArgs) -> Vec<OsString> {
    let mut all: Vec<OsString> = vec!["mount".into(), args.source.clone().into(), args.mountpoint.clone().into()];
    let mut with = |name: &str, value: OsString| all.extend([name.into(), value]);
    with("--log-level", args.log_level.clone().into());
    with("--log-format", args.log_format.clone().into());
    args.log_file.iter().for_each(|file| with("--log-file", file.into()));
    args.http.iter().for_each(|address| with("--http", address.into()));
    args.options.iter().for_each(|o| with("-o", o.into()));
    all
}

/// A directory of a mount that others share, which is started if it is not there.
fn bind(args: &MountArgs, options: &MountOptions, sub: &str) -> Result<()> {
    if args.foreground {
        let text =
            "a mount with subpath= has no process of its own that could stay in the foreground: leave one of them out";
        return Err(Error::new(Kind::Invalid, text));
    }
    let of_source = MountArgs { options: all_but(&args.options, "subpath"), ..args.clone() };
    Place::of(&args.source, &of_source.options).bind(sub, &args.mountpoint, |mountpoint| {
        start(&MountArgs { mountpoint: mountpoint.into(), ..of_source }, options)
    })
}

fn foreground(args: &MountArgs, options: MountOptions) -> Result<()> {
    let child = args.daemon_child;
    let ready = move || {
        if child {
            say(&Report::Ready { pid: std::process::id() });
        } else {
            println!("mounted");
        }
    };
    let done = if options.failover {
        args.begin_log()?;
        holder::run(args, ready)
    } else {
        process::run(args, options, None, ready)
    };
    if let (true, Err(e)) = (child, &done) {
        say(&Report::failed(e));
    }
    done
}

/// The mount process of a holder, which tells others how it went.
fn serve_held(args: &MountArgs, options: MountOptions, held: Held) -> Result<()> {
    let held = Arc::new(held);
    held.guard()?;
    let ready = || held.ready();
    let done = process::run(args, options, Some(held.clone()), ready);
    let (code, text) = match &done {
        Ok(()) => (0, None),
        Err(e) => (super::exit_code(e), Some(e.to_string())),
    };
    held.bye(code, text);
    std::process::exit(i32::from(code));
}

/// Writes the report to stdout, which is the pipe; later writes go nowhere once the parent has left.
fn say(report: &Report) {
    if let Ok(line) = serde_json::to_string(report) {
        let mut out = std::io::stdout();
        // The parent may be gone; the mount stays.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}

fn daemon(args: &MountArgs, options: &MountOptions) -> Result<()> {
    let log = match &args.log_file {
        Some(path) => path.clone(),
        None => options.data_dir.clone().unwrap_or_else(|| default_data_dir(&args.mountpoint)).join("efc-fuse.log"),
    };
    if let Some(dir) = log.parent() {
        std::fs::create_dir_all(dir).map_err(|e| Error::from(e).with("log directory", dir.display()))?;
    }
    let errors = std::fs::File::options().create(true).append(true).open(&log);
    let errors = errors.map_err(|e| Error::from(e).with("log-file", log.display()))?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(child_args(&MountArgs { log_file: Some(log.clone()), ..args.clone() })).arg("--daemon-child");
    // What may be said to a service manager of the command is not said of the daemon.
    for name in holder::OF_MANAGER {
        command.env_remove(name);
    }
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors);
    // SAFETY: setsid is async-signal-safe and touches no memory; it fails only for a group leader, which a fresh child is not.
    unsafe {
        command.pre_exec(|| rustix::process::setsid().map(|_| ()).map_err(Into::into));
    }
    let mut child = command.spawn()?;
    let stdout = child.stdout.take().ok_or_else(|| Error::new(Kind::Io, "daemon without stdout"))?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    match serde_json::from_str(&line) {
        Ok(Report::Ready { .. }) => Ok(()),
        Ok(Report::Failed { code, message }) => {
            let _ = child.wait();
            eprintln!("efc-fuse: {message}");
            std::process::exit(i32::from(code));
        }
        Err(_) => {
            let status = child.wait().map(|s| s.to_string()).unwrap_or_default();
            Err(Error::new(
                Kind::Io,
                format!("the mount process ended before the mount answered ({status}), see {}", log.display()),
            ))
        }
    }
}

/// A process that serves a mount.
struct Server {
    pid: u64,
    /// Can be read when it has ended.
    process: OwnedFd,
    runtime: Runtime,
}

impl Server {
    /// That of a mount, if it answers.
    fn of(mountpoint: &Path) -> Option<Server> {
        let mut pid = None;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().ok()?;
        let asked = async { control::ask(mountpoint, &Request::Status, |said| pid = said["pid"].as_u64()).await };
        runtime.block_on(async { tokio::time::timeout(STATUS_PATIENCE, asked).await }).ok()?.ok()?;
        let process = rustix::process::Pid::from_raw(i32::try_from(pid?).ok()?)?;
        let process = rustix::process::pidfd_open(process, rustix::process::PidfdFlags::empty()).ok()?;
        Some(Server { pid: pid?, process, runtime })
    }

    /// Waits for its end after an unmount.
    ///
    /// # Errors
    /// When what was written is not at the source; [`Kind::Timeout`] when it does not end.
    fn wait(self, mountpoint: &Path) -> Result<()> {
        let (begun, shown, pid) = (Instant::now(), mountpoint.display(), self.pid);
        let at = mountpoint.to_path_buf();
        let said = self.runtime.spawn(async move {
            let mut missing = None;
            // One that had nothing to bring there may be faster than the question, and one of an earlier version does not know it.
            let _ = control::ask(&at, &Request::End, |said| missing = said["missing"].as_str().map(String::from)).await;
            missing
        });
        let mut told = false;
        while !has_ended(&self.process)? {
            if !told && begun.elapsed() > SILENCE {
                told = true;
                eprintln!(
                    "efc-fuse: unmounted; waiting for its process ({pid}) to bring what was written to the source (efc-fuse dirty {shown} shows what that is)"
                );
            }
            if begun.elapsed() > END_PATIENCE {
                let text = format!("{shown} is unmounted, but its process ({pid}) has not ended: its log says why");
                return Err(Error::new(Kind::Timeout, text));
            }
        }
        // At once, unless it was asked of another mount that has taken the place.
        match self.runtime.block_on(async { tokio::time::timeout(STATUS_PATIENCE, said).await }) {
            Ok(Ok(Some(why))) => {
                let text = format!("{shown} is unmounted, and not all that was written is at the source: {why}");
                Err(Error::new(Kind::Io, text))
            }
            _ => Ok(()),
        }
    }
}

/// Waits for up to 100 ms.
fn has_ended(process: &OwnedFd) -> Result<bool> {
    let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    match poll(&mut fds, PollTimeout::from(100u8)) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(e) => Err(std::io::Error::from(e).into()),
    }
}

/// `efc-fuse umount`.
pub fn umount(mountpoint: &Path, lazy: bool, force: bool) -> Result<()> {
    let mountpoint = absolute(mountpoint)?;
    let mount = Mount::existing(&mountpoint)?;
    if force {
        mount.abort()?;
    }
    // Others that are bound to a shared mount go on with its process.
    let server = (!lazy && control::socket_path(&mountpoint).exists()).then(|| Server::of(&mountpoint)).flatten();
    let begun = Instant::now();
    // Its holder looks at it once a second, and has it in use for that moment; the first time for up to a second, if the origin is slow to tell of its space.
    while let Err(e) = mount.unmount(lazy || force) {
        if !e.is(Kind::Busy) || begun.elapsed() > OWN_USE {
            return Err(e);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    server.map_or(Ok(()), |s| s.wait(&mountpoint))
}
