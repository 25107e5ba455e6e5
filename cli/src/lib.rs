//! `efc`, the admin command of a cluster: parse, call one command, turn its error into a sentence and an exit code.
//!
//! ```text
//! cmd/       one file per command: its arguments, what it asks, what it prints
//! context    masters, output format and identity of this run
//! dataset    a dataset:// path, the mounts of a dataset, and the walk over the files below a path
//! mounts     which EFC mount serves a local path, and its control socket
//! progress   counters of a long run and how they are shown
//! output     table or JSON on stdout;  table  aligned columns
//! ```
//!
//! What must stay true: stdout carries the answer only (one JSON document with `-o json`), everything else goes to stderr. The JSON of
//! a command is the `Serialize` type in its file; fields are added, never renamed.

mod cmd;
mod context;
mod dataset;
mod mounts;
mod output;
mod progress;
mod table;

use clap::{Parser, Subcommand};
use context::Context;
use efc_common::log;
use efc_common::{Error, Kind, Result};
use output::Output;
use std::ffi::OsString;
use std::process::ExitCode;

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failure, 2 wrong option or argument, 3 not found, 4 access refused, 5 unreachable or \
too slow, 6 busy or already there.\n\nExample: efc --master 10.0.0.1:7480,10.0.0.2:7480 status";

/// Administers an EFC cluster: masters, workers, datasets and the cache.
#[derive(Debug, Parser)]
#[command(name = "efc", version, max_term_width = 110, after_help = EXIT_CODES)]
struct Cli {
    /// Masters as host:port, comma separated; any of them will do.
    #[arg(long, env = "EFC_MASTER", value_name = "ADDRS", value_delimiter = ',', global = true)]
    master: Vec<String>,
    /// Output on stdout.
    #[arg(short, long, value_enum, default_value = "table", global = true)]
    output: Output,
    /// Log filter for stderr, for example info.
    #[arg(long, env = "EFC_LOG", default_value = "warn", global = true, hide = true)]
    log_level: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The master group, its log, the ring and what is counted.
    Status(cmd::status::StatusArgs),
    /// The cache workers; drain, undrain or forget one.
    Nodes(cmd::nodes::NodesArgs),
    /// The client sessions: who has what mounted.
    Sessions(cmd::sessions::SessionsArgs),
    /// Create, list, show and delete datasets.
    #[command(subcommand)]
    Dataset(cmd::dataset::DatasetCommand),
    /// Fill the cache with files before they are read.
    Warmup(cmd::warmup::WarmupArgs),
    /// Look at the cache; evict, pin or unpin files.
    #[command(subcommand)]
    Cache(cmd::cache::CacheCommand),
    /// Who owns what on the consistent-hash ring.
    #[command(subcommand)]
    Ring(cmd::ring::RingCommand),
    /// Add a master to the group or remove one.
    #[command(subcommand)]
    Master(cmd::master::MasterCommand),
}

/// Runs the program with its arguments.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version are not failures.
            let code = if e.use_stderr() { 2 } else { 0 };
            // A reader that went away wants no more.
            let _ = e.print();
            return ExitCode::from(code);
        }
    };
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("efc: {e}");
            ExitCode::from(exit_code(&e))
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    log::install(&cli.log_level, log::Format::Text, None)?;
    let context = Context::new(cli.master, cli.output);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let done = runtime.block_on(async {
        match cli.command {
            Command::Status(_) => cmd::status::run(&context).await,
            Command::Nodes(a) => cmd::nodes::run(&context, a).await,
            Command::Sessions(_) => cmd::sessions::run(&context).await,
            Command::Dataset(c) => cmd::dataset::run(&context, c).await,
            Command::Warmup(a) => cmd::warmup::run(&context, a).await,
            Command::Cache(c) => cmd::cache::run(&context, c).await,
            Command::Ring(c) => cmd::ring::run(&context, c).await,
            Command::Master(c) => cmd::master::run(&context, c).await,
        }
    });
    // A blocking call on a dead NAS must not keep the command from ending.
    runtime.shutdown_background();
    done
}

/// The exit code of an error (see `--help`): the same numbers as `efc-fuse`.
pub fn exit_code(e: &Error) -> u8 {
    match e.kind() {
        Kind::Invalid => 2,
        Kind::NotFound | Kind::NotADirectory => 3,
        Kind::PermissionDenied => 4,
        Kind::Timeout | Kind::Unavailable => 5,
        Kind::Busy | Kind::AlreadyExists => 6,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(args: &[&str]) -> std::result::Result<Cli, clap::Error> {
        Cli::try_parse_from([&["efc"], args].concat())
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_help_with_an_example() {
        fn check(c: &mut clap::Command, path: &str) {
            let names: Vec<String> = c.get_subcommands().map(|s| s.get_name().to_string()).collect();
            let text = c.render_long_help().to_string();
            assert!(!names.is_empty() || text.contains("Example"), "{path}: {text}");
            for name in names.iter().filter(|n| *n != "help") {
                let sub = c.find_subcommand_mut(name).expect("listed");
                check(sub, &format!("{path} {name}"));
            }
        }
        let mut c = Cli::command();
        c.build();
        check(&mut c, "efc");
    }

    #[test]
    fn arguments_are_understood() {
        let c = parse(&["--master", "a:1,b:2", "nodes", "drain", "w1", "-o", "json"]).expect("nodes");
        assert_eq!((c.master.as_slice(), c.output), (&["a:1".to_string(), "b:2".into()][..], Output::Json));
        for good in [
            &["status"][..],
            &["nodes", "--masters"],
            &[
                "dataset",
                "create",
                "x",
                "s3://b/p",
                "-O",
                "endpoint=http://h",
                "--secret",
                "env",
                "--ttl",
                "1d",
                "--pin",
            ],
            &["dataset", "create", "--from-file", "-"],
            &["dataset", "create", "name", "--from-file", "f.json"],
            &["dataset", "delete", "x", "--yes"],
            &["warmup", "--list-from", "f", "--concurrency", "4", "--dry-run"],
            &["cache", "stat"],
            &["cache", "evict", "--all"],
            &["cache", "pin", "dataset://x/y"],
            &["ring", "show", "dataset://x/y@8388608"],
            &["master", "add", "2", "h:7480"],
        ] {
            assert!(parse(good).is_ok(), "{good:?}: {}", parse(good).expect_err("is error"));
        }
        for bad in [
            &["nodes", "drain"][..],
            &["dataset", "create", "x"],
            &["dataset", "create", "x", "s3://b", "--from-file", "-"],
            &["dataset", "create", "x", "s3://b", "-O", "endpoint"],
            &["warmup"],
            &["warmup", "a", "--concurrency", "0"],
            &["cache", "evict"],
            &["cache", "evict", "--all", "dataset://x"],
            &["cache", "pin"],
            &["master", "add", "0", "h:1"],
            &["status", "-o", "yaml"],
        ] {
            assert_eq!(parse(bad).err().map(|e| e.exit_code()), Some(2), "{bad:?}");
        }
    }

    #[test]
    fn exit_codes_are_those_of_the_help() {
        let code = |k| exit_code(&Error::new(k, "x"));
        assert_eq!([Kind::Io, Kind::Invalid, Kind::NotFound].map(code), [1, 2, 3]);
        assert_eq!([Kind::PermissionDenied, Kind::Unavailable, Kind::AlreadyExists].map(code), [4, 5, 6]);
    }
}
