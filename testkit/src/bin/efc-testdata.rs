//! `efc-testdata`: makes, uploads and verifies deterministic data sets.

use anyhow::Result;
use clap::{Parser, Subcommand};
use efc_testkit::S3Target;
use efc_testkit::data::{Manifest, Profile, make_tree};
use std::path::PathBuf;
use std::time::Instant;

/// Deterministic test data: made, uploaded, verified to the last byte.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Makes a data set below DIR
    Make {
        /// Directory to fill
        dir: PathBuf,
        /// small or e2e
        #[arg(long, default_value = "small")]
        profile: Profile,
        /// Writes sums and sizes of all files there
        #[arg(long)]
        manifest: Option<PathBuf>,
    },
    /// Makes COUNT files of the same SIZE in one directory
    Flat {
        /// Directory to fill
        dir: PathBuf,
        /// Number of files
        #[arg(long, default_value_t = 1000)]
        count: u64,
        /// Bytes of each
        #[arg(long, default_value_t = 100_000)]
        size: u64,
        /// Writes sums and sizes of all files there
        #[arg(long)]
        manifest: Option<PathBuf>,
    },
    /// Compares every name and byte below DIR with a manifest
    Verify {
        /// Directory to read
        dir: PathBuf,
        /// What `make` wrote
        #[arg(long)]
        manifest: PathBuf,
        /// Threads that read
        #[arg(long, default_value_t = 4)]
        readers: usize,
    },
    /// Uploads every file below DIR to an S3 bucket, which is made if needed
    Upload {
        /// Directory to upload
        dir: PathBuf,
        /// http://host:port
        #[arg(long)]
        endpoint: String,
        /// Bucket
        #[arg(long)]
        bucket: String,
        /// Put before every key
        #[arg(long, default_value = "")]
        prefix: String,
        /// Access key id
        #[arg(long, default_value = "efckey")]
        key_id: String,
        /// Access key secret
        #[arg(long, default_value = "efcsecret")]
        secret: String,
        /// Connections
        #[arg(long, default_value_t = 32)]
        threads: usize,
    },
}

fn main() -> Result<()> {
    let start = Instant::now();
    let what = match Args::parse().command {
        Command::Make { dir, profile, manifest } => describe(make_tree(&dir, profile)?, manifest)?,
        Command::Flat { dir, count, size, manifest } => {
            describe(efc_testkit::data::make_flat(&dir, count, size)?, manifest)?
        }
        Command::Verify { dir, manifest, readers } => {
            let read = Manifest::load(&manifest)?.verify(&dir, readers)?;
            format!("{} files, {} bytes verified", read.files, read.bytes)
        }
        Command::Upload { dir, endpoint, bucket, prefix, key_id, secret, threads } => {
            let target = S3Target { endpoint, key_id, secret, ..S3Target::default() };
            if target.request("HEAD", &format!("/{bucket}"), b"")?.status == 404 {
                target.create_bucket(&bucket)?;
            }
            format!("{} files uploaded", target.upload_tree(&dir, &bucket, &prefix, threads)?)
        }
    };
    println!("{what} in {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}

fn describe(made: Manifest, save: Option<PathBuf>) -> Result<String> {
    if let Some(path) = save {
        made.save(&path)?;
    }
    Ok(format!("{} files, {} bytes made", made.files.len(), made.bytes()))
}
