//! The `efc-bench` command line: makes the data, starts the server, runs, prints, and cleans up however it ends.

use crate::data::{Data, Plan};
use crate::run::{Measured, Settings, Test, load, place, run};
use crate::tool::{Kind, Tool, clean_up};
use crate::{juicefs, proc, report, tmpfs, writes};
use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand};
use efc_testkit::S3Ro;
use nix::sys::signal::{SigSet, Signal};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Measures EFC, and other file systems beside it, over the same data and S3 server in one run.
///
/// Every byte read is checked. bench/README.md explains each number.
#[derive(Debug, Parser)]
#[command(name = "efc-bench", version, max_term_width = 110, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Mode>,
    #[command(flatten)]
    compare: Compare,
}

#[derive(Debug, Subcommand)]
enum Mode {
    /// Warm open+read+close of the small files on a mount beside the same files in tmpfs.
    WarmVsTmpfs(WarmVsTmpfs),
    /// Writing to a bucket: small files with and without write-back, an archive unpacked, one long file beside the store's own client.
    Writes(Writes),
}

#[derive(Debug, clap::Args)]
struct Writes {
    /// Directory of data, caches and mountpoints; on tmpfs, so that no disk is measured. Needs about 5 GiB.
    #[arg(long, default_value = "/dev/shm/efc-bench")]
    dir: PathBuf,
    /// Milliseconds that the S3 server waits before each answer, for small files and archives.
    #[arg(long, default_value_t = 20)]
    latency_ms: u64,
    /// Who unpacks the archive too: s3fs, or 'name=mount command'. May be repeated.
    #[arg(long = "peer", value_name = "PEER")]
    peers: Vec<String>,
    /// Small files that are created.
    #[arg(long, default_value_t = 20_000)]
    creates: usize,
    /// Files in the archive.
    #[arg(long, default_value_t = 20_000)]
    files: usize,
    /// Files in the archive that peers unpack (their rate does not depend on it).
    #[arg(long, default_value_t = 500)]
    peer_files: usize,
    /// Length of the long file, MiB.
    #[arg(long, default_value_t = 1024)]
    long_mib: usize,
    /// Mount option for EFC; may be repeated.
    #[arg(long = "efc-option", value_name = "NAME=VALUE")]
    efc_options: Vec<String>,
    /// Write the result as JSON to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct Common {
    /// Share of the data: 1 is a file of 1 GiB, 10,000 files of about 112 KiB, a tree of 100,000 files.
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Directory of data, caches and mountpoints; on tmpfs, so that no disk is measured. Needs about 6 GiB at scale 1 with JuiceFS.
    #[arg(long, default_value = "/dev/shm/efc-bench")]
    dir: PathBuf,
    /// Leave the data in DIR for the next run.
    #[arg(long)]
    keep: bool,
    /// Milliseconds that the S3 server waits before each answer.
    #[arg(long, default_value_t = 0.0)]
    latency_ms: f64,
    /// Mount option for EFC; may be repeated.
    #[arg(long = "efc-option", value_name = "NAME=VALUE")]
    efc_options: Vec<String>,
    /// Write the result as JSON to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct Compare {
    #[command(flatten)]
    common: Common,
    /// Compare with: s3fs, juicefs, or 'name=mount command' with {endpoint} {bucket} {mountpoint} {cachedir} {datadir}. May be repeated.
    #[arg(long = "peer", value_name = "PEER")]
    peers: Vec<String>,
    /// A tenth of the data, random phases of 3 s.
    #[arg(long)]
    quick: bool,
    /// Tests to run (default: all).
    #[arg(long, value_enum, value_delimiter = ',')]
    tests: Vec<Test>,
    /// How often everything runs; the median counts.
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Seconds of a random phase (default 10).
    #[arg(long)]
    seconds: Option<f64>,
    /// Readers of small files.
    #[arg(long, default_value_t = 4)]
    readers: usize,
    /// Read the small files in a shuffled order instead of by name.
    #[arg(long)]
    shuffled: bool,
    /// Leave out the second node.
    #[arg(long)]
    no_second: bool,
}

#[derive(Debug, clap::Args)]
struct WarmVsTmpfs {
    #[command(flatten)]
    common: Common,
    /// Passes over the files on each side.
    #[arg(long, default_value_t = 9)]
    passes: usize,
}

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => e.exit(),
    };
    let done = match &cli.command {
        Some(Mode::WarmVsTmpfs(args)) => on_data(&args.common, 1.0, |bench| warm_vs_tmpfs(args, bench)),
        Some(Mode::Writes(args)) => measure_writes(args),
        None => on_data(&cli.compare.common, if cli.compare.quick { 0.1 } else { 1.0 }, |b| compare(&cli.compare, b)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("efc-bench: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// The data, not yet served.
struct Bench {
    dir: PathBuf,
    data: Arc<Data>,
    efc: Tool,
    latency: Duration,
}

impl Bench {
    fn serve(&self) -> Result<S3Ro> {
        S3Ro::start(&self.dir.join("origin"), self.latency)
    }
}

/// Makes the data, does `work`, and removes what was made.
fn on_data(common: &Common, factor: f64, work: impl FnOnce(&Bench) -> Result<()>) -> Result<()> {
    ensure!(common.scale > 0.0 && common.scale <= 100.0, "scale must be above 0 and at most 100");
    ensure!(nix::unistd::geteuid().is_root(), "mounting and dropping the kernel's caches need root");
    let dir = Removed(Owned::new(&common.dir, common.keep)?);
    end_well_on_signals(&dir)?;
    proc::become_subreaper()?;
    let plan = Plan::scaled(common.scale * factor);
    eprintln!(
        "data: {} MiB, {} small files, a tree of {} files in {}",
        plan.big_bytes >> 20,
        plan.small_files,
        plan.tree_files,
        dir.path.display()
    );
    let data = Arc::new(Data::make(&dir.path.join("origin"), plan)?);
    let efc = Tool { name: "efc".into(), kind: Kind::Efc(common.efc_options.clone()) };
    work(&Bench { dir: dir.path.clone(), data, efc, latency: Duration::try_from_secs_f64(common.latency_ms / 1000.0)? })
}

/// The working directory; removed on drop unless it is to be kept.
#[derive(Clone)]
struct Owned {
    path: PathBuf,
    keep: bool,
}

impl Owned {
    fn new(path: &Path, keep: bool) -> Result<Owned> {
        fs::create_dir_all(path).with_context(|| format!("make {}", path.display()))?;
        let path = path.canonicalize()?;
        // Only what this program made is ever removed.
        let known = ["origin", "origin.plan.json", "juicefs.db", "juicefs.plan.json", "node", "node2", "import"];
        for entry in fs::read_dir(&path)? {
            let name = entry?.file_name();
            let name = name.to_string_lossy();
            ensure!(
                known.iter().any(|k| name == *k || name.starts_with("juicefs.db")),
                "{} holds `{name}`, which is not of this program; give an empty --dir",
                path.display()
            );
        }
        ensure!(tmpfs::is_tmpfs(&path)?, "{} is not on tmpfs, so disks would be measured; give --dir", path.display());
        Ok(Owned { path, keep })
    }

    fn remove(&self) {
        // Never into something that is still mounted.
        let mounted = ["node", "node2", "import"].iter().any(|n| proc::is_mounted(&self.path.join(n).join("mnt")));
        if mounted {
            return;
        }
        let left = |name: &str| drop(fs::remove_dir_all(self.path.join(name)));
        ["node", "node2", "import"].into_iter().for_each(left);
        if !self.keep {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Drops a directory when the work on it ended, well or not.
struct Removed(Owned);

impl Drop for Removed {
    fn drop(&mut self) {
        self.0.remove();
    }
}

impl std::ops::Deref for Removed {
    type Target = Owned;
    fn deref(&self) -> &Owned {
        &self.0
    }
}

/// SIGINT and SIGTERM end mounts and processes and remove the files before we exit. Called before any thread starts.
fn end_well_on_signals(dir: &Owned) -> Result<()> {
    let mut signals = SigSet::empty();
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().for_each(|s| signals.add(s));
    signals.thread_block()?;
    let dir = dir.clone();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        if let Ok(signal) = signals.wait() {
            eprintln!("efc-bench: {signal}: cleaning up");
            clean_up();
            dir.remove();
            std::process::exit(128 + signal as i32);
        }
    })?;
    Ok(())
}

fn compare(args: &Compare, bench: &Bench) -> Result<()> {
    ensure!(args.rounds > 0 && args.readers > 0, "rounds and readers must be at least 1");
    let mut tools = vec![bench.efc.clone()];
    for peer in &args.peers {
        let tool = Tool::peer(peer)?;
        if tools.iter().any(|t| t.name == tool.name) {
            bail!("two tools are called `{}`", tool.name);
        }
        tools.push(tool);
    }
    let seconds = args.seconds.unwrap_or(if args.quick { 3.0 } else { 10.0 });
    let settings = Settings {
        dir: bench.dir.clone(),
        tools,
        tests: if args.tests.is_empty() { Test::ALL.to_vec() } else { args.tests.clone() },
        rounds: args.rounds,
        random: Duration::try_from_secs_f64(seconds)?,
        readers: args.readers,
        shuffled: args.shuffled,
        second: !args.no_second,
    };
    if settings.tools.iter().any(|t| t.kind == Kind::Juicefs) {
        eprintln!("juicefs: import");
        let server = bench.serve()?;
        let dir = settings.dir.join("import");
        fs::create_dir_all(&dir)?;
        juicefs::import(&place(&settings, &server, dir), &bench.data)?;
    }
    // The server lists what is there when it starts.
    let server = bench.serve()?;
    let start_load = load();
    let all = run(&settings, &server, &bench.data, |m| {
        let (test, phase) = (format!("{:?}", m.test).to_lowercase(), format!("{:?}", m.phase).to_lowercase());
        eprintln!(
            "{test:<9}{phase:<8}{:<12}{:>8.2} s, CPU {:.2} s, load {:.1}",
            m.tool, m.seconds, m.daemon_cpu_s, m.load
        );
    })?;
    let rows = report::rows(&all);
    let ratios = report::ratios(&rows);
    let floors = report::floors(&rows, &ratios);
    println!("{}", report::table(&rows, &ratios, &floors));
    let result = json!({
        "machine": machine(start_load),
        "data": bench.data.plan,
        "settings": { "rounds": settings.rounds, "random_s": seconds, "readers": settings.readers,
                      "shuffled": settings.shuffled, "latency_ms": args.common.latency_ms, "peers": args.peers,
                      "efc_options": args.common.efc_options },
        "versions": settings.tools.iter().map(|t| (t.name.clone(), t.version())).collect::<std::collections::BTreeMap<_, _>>(),
        "rows": rows,
        "ratios": ratios,
        "floors": floors,
        "measured": all.iter().collect::<Vec<&Measured>>(),
    });
    save(&args.common.json, &result)
}

fn warm_vs_tmpfs(args: &WarmVsTmpfs, bench: &Bench) -> Result<()> {
    ensure!(args.passes > 0, "passes must be at least 1");
    let settings = Settings {
        dir: bench.dir.clone(),
        tools: Vec::new(),
        tests: Vec::new(),
        rounds: 1,
        random: Duration::ZERO,
        readers: 1,
        shuffled: false,
        second: false,
    };
    let server = bench.serve()?;
    let start_load = load();
    let warm = tmpfs::run(&settings, &bench.efc, &server, &bench.data, args.passes)?;
    println!("warm open+read+close of {} files, median of {} passes", bench.data.small.len(), warm.passes);
    println!("  tmpfs {:>10.0} files/s", warm.tmpfs_files_per_s);
    println!("  efc   {:>10.0} files/s, {:.3} of tmpfs (floor 0.9)", warm.mount_files_per_s, warm.ratio);
    println!("  FUSE requests per file after the first pass: {:.4} {:?}", warm.fuse_per_file, warm.fuse_requests);
    let result = json!({ "machine": machine(start_load), "data": bench.data.plan, "warm_vs_tmpfs": warm,
                         "efc_options": args.common.efc_options });
    save(&args.common.json, &result)
}

fn measure_writes(args: &Writes) -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "mounting needs root");
    ensure!(args.creates > 0 && args.files > 0 && args.peer_files > 0 && args.long_mib > 0, "nothing to write");
    let dir = Removed(Owned::new(&args.dir, false)?);
    end_well_on_signals(&dir)?;
    proc::become_subreaper()?;
    let start_load = load();
    let plan = writes::Plan {
        dir: dir.path.clone(),
        efc: Tool { name: "efc".into(), kind: Kind::Efc(args.efc_options.clone()) },
        peers: args.peers.iter().map(|p| Tool::peer(p)).collect::<Result<_>>()?,
        latency: Duration::from_millis(args.latency_ms),
        creates: args.creates,
        tar_files: args.files,
        peer_files: args.peer_files,
        long_bytes: args.long_mib << 20,
    };
    let w = writes::run(&plan)?;
    let line = |name: &str, rounds: &[writes::Create]| {
        let (c, all) = (writes::middle(rounds), rounds.iter().map(|c| c.median_us).collect::<Vec<_>>());
        println!(
            "  {name:<12} median {:>8.0} us (rounds: {all:.0?}), p99 {:>8.0} us, {:>7.0} files/s",
            c.median_us, c.p99_us, c.files_per_s
        );
    };
    println!("create + write 4 KiB + close, store {} ms away", args.latency_ms);
    line("close waits", &w.create_sync);
    line("writeback", &w.create_writeback);
    println!("  {:.1} times the rate (floor 10, median at most 200 us)", w.create_ratio);
    println!("tar x");
    for u in &w.unpack {
        println!(
            "  {:<12} {:>6} files, tar {:>7.2} s, all at the store {:>7.2} s, {:>6.0} files/s, {:.2} requests per file",
            u.tool, u.files, u.tar_s, u.all_s, u.files_per_s, u.requests_per_file
        );
    }
    for (peer, ratio) in &w.unpack_ratio {
        println!("  {ratio:.1} times the rate of {peer} (floor 20 beside s3fs)");
    }
    println!("{} MiB written in order and synced", args.long_mib);
    println!("  efc   {:>6.2?} s", w.long_efc_s);
    println!("  boto3 {:>6.2?} s; its best over ours {:.2} (floor 0.8)", w.long_client_s, w.long_ratio);
    let settings = json!({ "latency_ms": args.latency_ms, "efc_options": args.efc_options });
    save(&args.json, &json!({ "machine": machine(start_load), "settings": settings, "writes": w }))
}

fn save(file: &Option<PathBuf>, result: &Value) -> Result<()> {
    let Some(path) = file else { return Ok(()) };
    fs::write(path, serde_json::to_string_pretty(result)? + "\n").with_context(|| format!("write {}", path.display()))
}

fn machine(start_load: f64) -> Value {
    let read = |p: &str| fs::read_to_string(p).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|l| l.starts_with(name)).unwrap_or_default().to_string();
        line.split_once(':').map(|(_, v)| v.trim().to_string()).unwrap_or_default()
    };
    json!({
        "time_unix_s": SystemTime::now().duration_since(UNIX_EPOCH).map(|d| d.as_secs()).unwrap_or(0),
        "cores": std::thread::available_parallelism().map_or(0, |n| n.get()),
        "cpu": field(&read("/proc/cpuinfo"), "model name"),
        "memory": field(&read("/proc/meminfo"), "MemTotal"),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "load_at_start": start_load,
        "load_at_end": load(),
    })
}
