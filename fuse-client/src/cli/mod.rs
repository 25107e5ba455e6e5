//! The `efc-fuse` command line: parse, call one function, turn its error into a sentence and an exit code.

pub mod dirty;
pub mod doctor;
pub mod mount;
pub mod refresh;
pub mod set;
pub mod stats;
pub mod upgrade;

use crate::holder::node;
use crate::options;
use clap::{Args, Parser, Subcommand};
use efc_common::source;
use efc_common::{Error, Kind, Result, log};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

/// Mounts NAS exports and buckets through a distributed cache.
#[derive(Debug, Parser)]
#[command(name = "efc-fuse", version, max_term_width = 110, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failure, 2 wrong option or argument, 3 source or path not found, 4 access refused, \
5 unreachable or too slow, 6 busy, 7 FUSE is not available here.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Mount a source; returns when the mount answers.
    Mount(MountArgs),
    /// Hold the mounts of a node in one service, for `efc-fuse mount --holder`: they do not end with who mounts them.
    #[command(
        after_help = "The service starts a holder for each mount, and starts it again when it was killed together with its mount process: applications see a pause. Mounts outlive the service where nothing ends their processes with it \
(a container does).\n\nExamples:\n  efc-fuse holder --listen /run/efc/holder.sock\n  efc-fuse mount s3://bucket /mnt --holder /run/efc/holder.sock"
    )]
    Holder(HolderArgs),
    /// Unmount and stop the process behind a mountpoint.
    Umount(UmountArgs),
    /// Show what a mount does: requests, hits by tier, origin requests.
    Stats(StatsArgs),
    /// Have another program (a new version) serve a mount, without unmounting: applications see a short pause.
    #[command(
        after_help = "The new program is tried first: it must reach origin and masters and agree with what the kernel was told. Then the old one answers what is under way and leaves. If the new one does not serve within 4 s, \
the old one goes on, and this command fails.\n\nExamples:\n  efc-fuse upgrade /mnt                              the program the mount was started with, after its file was replaced\n  efc-fuse upgrade /mnt --binary /opt/efc-1.2/efc-fuse\n  efc-fuse upgrade /mnt --option threads=8           the same program with another option"
    )]
    Upgrade(UpgradeArgs),
    /// Change options of a mount while it serves: nobody notices, and successors of its process begin with them.
    #[command(after_help = set_help())]
    Set(SetArgs),
    /// Show what happened to the processes of a mount: replaced after a crash or a hang, upgraded.
    History(HistoryArgs),
    /// Forget what is remembered of a path in a mount and below: the next look asks the origin, before the ttl is over.
    Refresh(RefreshArgs),
    /// Show which files of a mount have changes that the store has not, and why.
    #[command(
        after_help = "Files wait while they are written, and after their close on mounts with `writeback` or when the store refused them. What was refused is tried again; \
`--discard` gives the changes of a file up: it is again what the store has, or gone.\n\nExamples:\n  efc-fuse dirty /mnt\n  efc-fuse dirty /mnt --discard results/broken.bin"
    )]
    Dirty(DirtyArgs),
    /// Check this machine: FUSE features and the guarantees that follow; with a SOURCE also the origin's speed.
    Doctor(DoctorArgs),
}

/// Arguments of `efc-fuse mount`.
#[derive(Debug, Clone, Args)]
#[command(long_about = "Mount SOURCE at MOUNTPOINT, read-only or with -o rw read-write.\n\nSOURCE is oss://bucket/prefix, s3://bucket/prefix, \
nfs://host[:port]/export/path, file:///dir or, with -o master=, dataset://name.\n\nWithout -o master= a master and a worker of its \
own start with the mount. The command returns 0 only when the mount answers.", after_long_help = mount_options_help())]
pub struct MountArgs {
    /// What to mount.
    pub source: String,
    /// Where: an existing directory.
    pub mountpoint: PathBuf,
    /// Options, comma separated; may be repeated (`efc-fuse mount --help` lists them).
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Stay in the foreground; ends at SIGTERM or SIGINT after unmounting.
    #[arg(short, long)]
    pub foreground: bool,
    /// Have the service that listens there hold the mount (`efc-fuse holder`), instead of a daemon of this command.
    #[arg(long, value_name = "SOCKET", conflicts_with = "foreground")]
    pub holder: Option<PathBuf>,
    /// Log file of the daemon (default: efc-fuse.log in the data directory; the service's stderr with --holder).
    #[arg(long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// Log filter, for example info or info,efc_fuse=debug.
    #[arg(long, default_value = "info", env = "EFC_LOG")]
    pub log_level: String,
    /// Log lines as text or json.
    #[arg(long, default_value = "text")]
    pub log_format: String,
    /// Serve Prometheus metrics on this address, for example 127.0.0.1:9568.
    #[arg(long, value_name = "ADDR")]
    pub http: Option<String>,
    /// Ignored, for mount(8).
    #[arg(short = 'n', hide = true)]
    pub no_mtab: bool,
    /// Ignored, for mount(8).
    #[arg(short = 'v', hide = true)]
    pub verbose: bool,
    /// Ignored, for mount(8).
    #[arg(short = 's', hide = true)]
    pub sloppy: bool,
    /// File-system type, for mount(8).
    #[arg(short = 't', hide = true)]
    pub fstype: Option<String>,
    /// Report readiness to the parent on stdout.
    #[arg(long, hide = true)]
    pub daemon_child: bool,
}

impl MountArgs {
    /// Begins to log as they say.
    ///
    /// # Errors
    /// For a format or filter that is none, and a file that cannot be opened.
    pub fn begin_log(&self) -> Result<()> {
        log::install(&self.log_level, self.log_format.parse()?, self.log_file.as_deref())
    }
}

#[derive(Debug, Args)]
struct HolderArgs {
    /// Where to listen: a unix socket, for root and the user of the service.
    #[arg(long, value_name = "SOCKET")]
    listen: PathBuf,
    /// Log filter, for example info or info,efc_fuse=debug.
    #[arg(long, default_value = "info", env = "EFC_LOG")]
    log_level: String,
    /// Log lines as text or json.
    #[arg(long, default_value = "text")]
    log_format: String,
}

fn hold_node(args: &HolderArgs) -> Result<()> {
    log::install(&args.log_level, args.log_format.parse()?, None)?;
    node::listen(&args.listen)
}

#[derive(Debug, Args)]
struct UmountArgs {
    /// The mountpoint.
    mountpoint: PathBuf,
    /// Detach now even if files are open; the process ends when the last is closed.
    #[arg(short, long)]
    lazy: bool,
    /// Abort the connection of a mount that does not answer: applications get errors.
    #[arg(short, long)]
    force: bool,
}

/// Arguments of `efc-fuse stats`.
#[derive(Debug, Args)]
pub struct StatsArgs {
    /// The mountpoint.
    pub mountpoint: PathBuf,
    /// Output: table or json.
    #[arg(short, long, default_value = "table")]
    pub output: String,
    /// Refresh every so many seconds until Ctrl-C.
    #[arg(short, long, value_name = "SECONDS")]
    pub watch: Option<u64>,
}

/// Arguments of `efc-fuse upgrade`.
#[derive(Debug, Args)]
pub struct UpgradeArgs {
    /// The mountpoint.
    pub mountpoint: PathBuf,
    /// The program that is to serve it (default: the one that does).
    #[arg(long, value_name = "PATH")]
    pub binary: Option<PathBuf>,
    /// A mount option that takes the place of the mount's own; may be repeated.
    #[arg(long = "option", value_name = "NAME=VALUE")]
    pub options: Vec<String>,
    /// Output: text or json.
    #[arg(short, long, default_value = "text")]
    pub output: String,
}

/// Arguments of `efc-fuse set`.
#[derive(Debug, Args)]
pub struct SetArgs {
    /// The mountpoint.
    pub mountpoint: PathBuf,
    /// What is to change.
    #[arg(value_name = "NAME=VALUE", required = true)]
    pub options: Vec<String>,
    /// Output: text or json.
    #[arg(short, long, default_value = "text")]
    pub output: String,
}

/// Arguments of `efc-fuse history`.
#[derive(Debug, Args)]
pub struct HistoryArgs {
    /// The mountpoint.
    pub mountpoint: PathBuf,
    /// Output: text or json.
    #[arg(short, long, default_value = "text")]
    pub output: String,
}

/// Arguments of `efc-fuse refresh`.
#[derive(Debug, Args)]
pub struct RefreshArgs {
    /// A mountpoint, or a file or directory in a mount.
    pub path: PathBuf,
    /// Output: text or json.
    #[arg(short, long, default_value = "text")]
    pub output: String,
}

/// Arguments of `efc-fuse dirty`.
#[derive(Debug, Args)]
pub struct DirtyArgs {
    /// The mountpoint.
    pub mountpoint: PathBuf,
    /// Give the changes of this file up; its path below the mountpoint.
    #[arg(long, value_name = "PATH")]
    pub discard: Option<String>,
    /// Output: text or json.
    #[arg(short, long, default_value = "text")]
    pub output: String,
}

/// Arguments of `efc-fuse doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// A source to measure: latency and bandwidth of the origin.
    pub source: Option<String>,
    /// Options of the source, as for mount.
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Output: table or json.
    #[arg(long = "output", default_value = "table")]
    pub output: String,
}

fn set_help() -> String {
    format!(
        "Options: {} (`efc-fuse mount --help` says what they do). Credentials are tried at the store first. Others need `efc-fuse upgrade MOUNTPOINT --option`, which is a short pause.\n\nExamples:\n  \
efc-fuse set /mnt readahead=128MiB\n  efc-fuse set /mnt log_level=info,efc_fuse=debug\n  efc-fuse set /mnt cache_memory=8GiB memory=2GiB\n  efc-fuse set /mnt passwd_file=/etc/efc/new-keys\n  efc-fuse set /mnt bandwidth=200MiB",
        options::all_live().join(", ")
    )
}

fn mount_options_help() -> String {
    let mut text = String::from("Mount options (-o name=value,name,...):\n");
    let mut line = |name: &str, value: &str, help: &str| {
        let left = if value.is_empty() { name.to_string() } else { format!("{name}={value}") };
        // Writing to a String cannot fail.
        let _ = if left.len() > 24 {
            write!(text, "  {left}\n{:27}{help}\n", "")
        } else {
            writeln!(text, "  {left:24} {help}")
        };
    };
    options::OPTIONS.iter().for_each(|o| line(o.name, o.value, o.help));
    source::OPTIONS.iter().for_each(|o| {
        let kinds: Vec<&str> = o.kinds.iter().map(|k| k.scheme()).collect();
        line(o.name, "VALUE", &format!("{} [{}]", o.help, kinds.join(" ")));
    });
    text
}

/// Runs the program with its arguments; as `mount.efc` it is mount(8)'s helper.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    let mut args: Vec<OsString> = args.collect();
    let helper = args.first().is_some_and(|a| PathBuf::from(a).file_name().is_some_and(|n| n == "mount.efc"));
    if helper {
        args.insert(1, "mount".into());
        without_rw(&mut args);
    }
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version are not failures.
            let code = if e.use_stderr() { 2 } else { 0 };
            let _ = e.print();
            return ExitCode::from(code);
        }
    };
    let done = match cli.command {
        Command::Mount(a) => mount::mount(a),
        Command::Holder(a) => hold_node(&a),
        Command::Umount(a) => mount::umount(&a.mountpoint, a.lazy, a.force),
        Command::Stats(a) => stats::stats(&a),
        Command::Upgrade(a) => upgrade::upgrade(&a),
        Command::Set(a) => set::set(&a),
        Command::History(a) => upgrade::history(&a),
        Command::Refresh(a) => refresh::refresh(&a),
        Command::Dirty(a) => dirty::dirty(&a),
        Command::Doctor(a) => doctor::doctor(&a),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("efc-fuse: {e}");
            ExitCode::from(exit_code(&e))
        }
    }
}

/// mount(8) writes `rw` wherever the user did not write `ro`; it is nobody's wish here (`writable` is).
fn without_rw(args: &mut [OsString]) {
    for i in 1..args.len() {
        if args[i - 1] == "-o"
            && let Some(text) = args[i].to_str()
        {
            args[i] = text.split(',').filter(|o| *o != "rw").collect::<Vec<_>>().join(",").into();
        }
    }
}

/// The exit code of an error (see `--help`).
pub fn exit_code(e: &Error) -> u8 {
    match e.kind() {
        Kind::Invalid => 2,
        Kind::NotFound | Kind::NotADirectory => 3,
        Kind::PermissionDenied => 4,
        Kind::Timeout | Kind::Unavailable => 5,
        Kind::Busy | Kind::AlreadyExists => 6,
        Kind::Unsupported => 7,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_lists_every_option() {
        let help = mount_options_help();
        for o in options::OPTIONS.iter().map(|o| o.name).chain(source::OPTIONS.iter().map(|o| o.name)) {
            assert!(help.contains(o), "{o}");
        }
    }

    #[test]
    fn mount_8_does_not_ask_for_writing() {
        let mut args: Vec<OsString> = ["mount.efc", "src", "/mnt", "-o", "rw,uid=3,rw"].map(Into::into).to_vec();
        without_rw(&mut args);
        assert_eq!(args[4], "uid=3");
    }
}
