//! `efc-master`: parses the flags, starts [`efc_master::Master`], says when it is ready, and stops it on a signal.

use anyhow::Context;
use clap::Parser;
use efc_common::parent::Parent;
use efc_common::{Error, Kind, log, metrics, units};
use efc_master::{Config, Master};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// Without a leader for this long after the start, somebody should look.
const PATIENCE: Duration = Duration::from_secs(15);

const ABOUT: &str = "Master of an EFC cluster: owns datasets, workers and client sessions. It is not on the read path.";
const EXAMPLES: &str = "\
One master (tests, one machine):
  efc-master --node-id 1 --data-dir /var/lib/efc/master

Three masters, the same --peers on each; the one with the lowest id forms the group once all three answer:
  efc-master --node-id 1 --listen 0.0.0.0:7480 --data-dir /var/lib/efc/master \\
             --peers 1=m1:7480,2=m2:7480,3=m3:7480

Another master for a running cluster, or one that lost its disk (with an empty data directory it is added anew):
  efc-master --node-id 4 --listen 0.0.0.0:7480 --advertise m4:7480 --data-dir /var/lib/efc/master --join m1:7480,m2:7480

When it serves and knows a leader it prints one line of JSON: {\"grpc\":\"host:port\",\"http\":\"host:port\"}.
SIGTERM and SIGINT stop it in good order; it may also be killed at any time.";

/// Flags of the process.
#[derive(Debug, Parser)]
#[command(name = "efc-master", version, about = ABOUT, after_help = EXAMPLES)]
struct Flags {
    /// Number of this master in its group, from 1; it belongs to the data directory for good
    #[arg(long, env = "EFC_NODE_ID")]
    node_id: u64,
    /// Where gRPC listens; port 0 takes a free one
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7480")]
    listen: String,
    /// Where masters, workers and clients reach it [default: its entry in --peers, else the listening address]
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Directory of this master's state; needs little space but honest fsync
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Where HTTP listens: /metrics, /healthz, /status; port 0 takes a free one
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:0")]
    http: String,
    /// Take notes of changes from OSS, S3, SNS or EventBridge at POST /events from senders that know this word (`Authorization: Bearer WORD` or `?token=WORD`)
    #[arg(long, value_name = "WORD", env = "EFC_EVENTS_TOKEN", hide_env_values = true)]
    events_token: Option<String>,
    /// All masters of a new group, the same list on each: 1=host:port,2=host:port,3=host:port
    #[arg(long, value_name = "ID=HOST:PORT", value_delimiter = ',', value_parser = parse_peer, conflicts_with = "join")]
    peers: Vec<(u64, String)>,
    /// Masters of a running group to join, any of them
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',')]
    join: Vec<String>,
    /// A worker silent for this long leaves the ring
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    worker_expire: Duration,
    /// A client session silent for this long ends, if it holds no leases (a read-only mount)
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    session_expire: Duration,
    /// A client session that holds leases ends when it was silent for this long; the same on all masters
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    lease: Duration,
    /// Milliseconds between heartbeats of the leading master; above the time of an fsync
    #[arg(long, value_name = "MS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(10..=60_000))]
    heartbeat_ms: u64,
    /// Milliseconds without a leader before another stands for election (this to twice this)
    #[arg(long, value_name = "MS", default_value_t = 1500, value_parser = clap::value_parser!(u64).range(30..=600_000))]
    election_ms: u64,
    /// Log entries between two snapshots (the log before a snapshot is dropped)
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..))]
    snapshot_logs: u64,
    /// Shape of log lines: text or json
    #[arg(long, default_value = "text", value_parser = parse_format)]
    log_format: log::Format,
    /// Filter of log lines: error, warn, info, debug, or per module (openraft is silent unless named)
    #[arg(long, default_value = "info", env = "EFC_LOG")]
    log_level: String,
    /// Appends log lines to a file instead of stderr
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// Writes the line `1` to this inherited file descriptor when it is ready (1: stdout, where the ready line is anyway)
    #[arg(long, value_name = "N")]
    ready_fd: Option<RawFd>,
    /// Stops when the process that started it ends
    #[arg(long)]
    parent_death: bool,
    /// Stops when its standard input ends: a pipe whose other end is with whoever needs it
    #[arg(long)]
    lifeline: bool,
}

fn parse_peer(text: &str) -> Result<(u64, String), String> {
    let bad = || format!("`{text}` is not ID=HOST:PORT, for example 1=m1:7480");
    let (id, addr) = text.split_once('=').ok_or_else(bad)?;
    let id = id.trim().parse().ok().filter(|i| *i > 0).ok_or_else(bad)?;
    let port = addr.rsplit_once(':').and_then(|(h, p)| p.parse::<u16>().ok().filter(|p| *p > 0 && !h.is_empty()));
    port.map(|_| (id, addr.trim().to_string())).ok_or_else(bad)
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    match units::parse_duration(text) {
        Ok(d) if d >= Duration::from_millis(100) => Ok(d),
        Ok(_) => Err("must be at least 100ms".into()),
        Err(e) => Err(e.to_string()),
    }
}

fn parse_format(text: &str) -> Result<log::Format, String> {
    text.parse().map_err(|e: Error| e.to_string())
}

impl Flags {
    fn config(&self) -> Result<Config, Error> {
        let mut peers = BTreeMap::new();
        for (id, addr) in &self.peers {
            if peers.insert(*id, addr.clone()).is_some() {
                return Err(Error::new(Kind::Invalid, format!("--peers names node {id} twice")));
            }
        }
        Ok(Config {
            node_id: self.node_id,
            listen: self.listen.clone(),
            advertise: self.advertise.clone(),
            http: self.http.clone(),
            events_token: self.events_token.clone(),
            data_dir: self.data_dir.clone(),
            peers,
            join: self.join.clone(),
            heartbeat: Duration::from_millis(self.heartbeat_ms),
            election: Duration::from_millis(self.election_ms),
            snapshot_logs: self.snapshot_logs,
            worker_expire: self.worker_expire,
            session_expire: self.session_expire,
            lease: self.lease,
        })
    }
}

/// Takes over the descriptor the parent opened for us. Stdout needs no second line: the JSON line is there.
fn take_fd(fd: RawFd) -> anyhow::Result<Option<File>> {
    if fd == 1 {
        return Ok(None);
    }
    anyhow::ensure!(fd > 2, "--ready-fd {fd} is not a descriptor to report on; pass 1 or one above 2");
    // SAFETY: borrowed only to ask the kernel whether it is open; a closed number gives EBADF and nothing else.
    let asked = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_setfd(asked, rustix::io::FdFlags::CLOEXEC)
        .with_context(|| format!("--ready-fd {fd} is not open"))?;
    // SAFETY: it is open (just checked), was inherited for this very use, and nothing else in the process knows its number.
    Ok(Some(File::from(unsafe { OwnedFd::from_raw_fd(fd) })))
}

/// Tells whoever waits that the master serves.
fn say_ready(master: &Master, ready_fd: Option<File>) -> std::io::Result<()> {
    let line = serde_json::json!({"grpc": master.grpc_addr(), "http": master.http_addr()});
    let mut out = std::io::stdout();
    writeln!(out, "{line}")?;
    out.flush()?;
    match ready_fd {
        Some(mut f) => f.write_all(b"1\n"),
        None => Ok(()),
    }
}

async fn run(flags: Flags) -> anyhow::Result<()> {
    let config = flags.config()?;
    let ready_fd = flags.ready_fd.map(take_fd).transpose()?.flatten();
    let mut parent = Parent::watch(flags.parent_death, flags.lifeline)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let exposition = metrics::install()?;
    let master = Master::start(config, Arc::new(move || exposition.render())).await?;
    tracing::info!(node = flags.node_id, grpc = master.grpc_addr(), http = master.http_addr(), "listening");

    let work = async {
        tokio::select! {
            r = master.ready() => r?,
            () = tokio::time::sleep(PATIENCE) => {
                tracing::warn!("no leader yet: does a majority of the masters run, and is this one still a member?");
                master.ready().await?;
            }
        }
        if let Err(e) = say_ready(&master, ready_fd) {
            // Nobody reads: a parent that is gone, or a shell that does not care.
            anyhow::ensure!(!flags.parent_death && !flags.lifeline, "the parent does not listen any more: {e}");
        }
        tracing::info!("ready");
        std::future::pending::<anyhow::Result<&'static str>>().await
    };
    let result = tokio::select! {
        r = work => r,
        e = master.failed() => Err(e.into()),
        _ = terminate.recv() => Ok("SIGTERM"),
        _ = interrupt.recv() => Ok("SIGINT"),
        () = parent.ended() => Ok("who started it has ended"),
    };
    if let Ok(why) = &result {
        tracing::info!(why, "stopping");
    }
    master.stop().await;
    result.map(|_| ())
}

/// The error with its causes. The house's own error prints the causes below it itself.
fn sentence(e: &anyhow::Error) -> String {
    let mut out = String::new();
    for cause in e.chain() {
        out.push_str(if out.is_empty() { "" } else { ": " });
        out.push_str(&cause.to_string());
        if cause.is::<Error>() {
            break;
        }
    }
    out
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    let logs_to_file = flags.log_file.is_some();
    // openraft tells the same story in many lines of its own; what matters of it we log ourselves.
    let filter = match flags.log_level.contains("openraft") {
        true => flags.log_level.clone(),
        false => format!("{},openraft=off", flags.log_level),
    };
    let result = log::install(&filter, flags.log_format, flags.log_file.as_deref())
        .map_err(anyhow::Error::from)
        .and_then(|()| Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?))
        .and_then(|runtime| runtime.block_on(run(flags)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let sentence = sentence(&e);
            if logs_to_file {
                tracing::error!("{sentence}");
            }
            eprintln!("efc-master: {sentence}");
            ExitCode::FAILURE
        }
    }
}
