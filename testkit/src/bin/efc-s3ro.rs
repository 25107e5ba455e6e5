//! `efc-s3ro`: the read-only S3 server for benchmarks as a program.

use anyhow::Result;
use clap::Parser;
use efc_testkit::S3Ro;
use std::path::PathBuf;
use std::time::Duration;

/// Serves the directories below DIR as read-only S3 buckets, using as little CPU as possible.
///
/// Counters: GET /-/stats; zero them: GET /-/reset. Prints its endpoint on the first line.
#[derive(Parser)]
struct Args {
    /// Directory whose sub-directories are the buckets
    dir: PathBuf,
    /// Port on 127.0.0.1 (0: any)
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Milliseconds to wait before each answer
    #[arg(long, default_value_t = 0.0)]
    latency_ms: f64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let latency = Duration::try_from_secs_f64(args.latency_ms / 1000.0)?;
    let server = S3Ro::start_on(&args.dir, latency, args.port)?;
    println!("{}", server.endpoint());
    server.join();
    Ok(())
}
