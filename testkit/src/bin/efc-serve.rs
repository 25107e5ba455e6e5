//! `efc-serve`: a real test server in the foreground, for scripts. Prints what a client needs as `name=value` lines, then `ready=1`, and
//! stops the server on SIGTERM, SIGINT or when the script that started it dies.

use anyhow::Result;
use clap::{Parser, Subcommand};
use efc_testkit::{Ganesha, Moto, S3Target, Weed};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal};
use std::io::Write;
use std::path::PathBuf;

/// Starts a real server for tests on free ports of loopback and keeps it until it is told to stop.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    server: Server,
}

#[derive(Subcommand)]
enum Server {
    /// SeaweedFS, S3
    Weed,
    /// moto, S3
    Moto,
    /// nfs-ganesha over a directory
    Ganesha {
        /// Directory to export
        dir: PathBuf,
    },
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut stops = SigSet::empty();
    stops.add(Signal::SIGTERM);
    stops.add(Signal::SIGINT);
    // Before any thread starts, so that all of them leave these signals to `wait`.
    stops.thread_block()?;
    set_pdeathsig(Signal::SIGTERM)?;
    match args.server {
        Server::Weed => {
            let server = Weed::start()?;
            serve(&s3_lines(&server.target()), &stops)
        }
        Server::Moto => {
            let server = Moto::start()?;
            serve(&s3_lines(&server.target()), &stops)
        }
        Server::Ganesha { dir } => {
            let server = Ganesha::start(&dir)?;
            serve(&[("url", server.url()), ("mount_port", server.mount_port().to_string())], &stops)
        }
    }
}

fn s3_lines(target: &S3Target) -> [(&'static str, String); 4] {
    [
        ("endpoint", target.endpoint.clone()),
        ("region", target.region.clone()),
        ("key_id", target.key_id.clone()),
        ("secret", target.secret.clone()),
    ]
}

fn serve(lines: &[(&str, String)], stops: &SigSet) -> Result<()> {
    let mut out = std::io::stdout().lock();
    for (name, value) in lines {
        writeln!(out, "{name}={value}")?;
    }
    writeln!(out, "ready=1")?;
    out.flush()?;
    stops.wait()?;
    Ok(())
}
