//! `efc-oss-server`: the test store as a program. Prints its endpoint on the first line and serves until it is killed.

use anyhow::Result;
use clap::{Parser, ValueEnum};
use efc_testkit::{Identity, OssOptions, OssServer};

/// A test server for Alibaba Cloud OSS (or S3) in memory, with verified signatures, faults and counters.
///
/// POST /-/fault sets a fault, DELETE /-/fault removes all, GET /-/stats shows counters, POST /-/reset zeroes them.
#[derive(Parser)]
struct Args {
    /// Port on 127.0.0.1 (0: any)
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// API to speak
    #[arg(long, value_enum, default_value_t = DialectArg::Oss)]
    dialect: DialectArg,
    /// Region that V4 signatures must name (default cn-hangzhou, or us-east-1 for s3)
    #[arg(long)]
    region: Option<String>,
    /// Accepted keys, KEY:SECRET or KEY:SECRET:TOKEN; may be repeated
    #[arg(long = "identity", value_name = "KEY:SECRET[:TOKEN]", default_value = "efckey:efcsecret")]
    identities: Vec<String>,
    /// Buckets to make at the start; may be repeated
    #[arg(long = "bucket")]
    buckets: Vec<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum DialectArg {
    Oss,
    S3,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let base = match args.dialect {
        DialectArg::Oss => OssOptions::default(),
        DialectArg::S3 => OssOptions::s3(),
    };
    let identities = args.identities.iter().map(|text| {
        let mut parts = text.splitn(3, ':');
        let mut identity = Identity::new(parts.next().unwrap_or(""), parts.next().unwrap_or(""));
        identity.token = parts.next().map(str::to_string);
        identity
    });
    let options = OssOptions {
        port: args.port,
        region: args.region.unwrap_or(base.region),
        identities: identities.collect(),
        ..base
    };
    let server = OssServer::start_with(options)?;
    for bucket in &args.buckets {
        server.create_bucket(bucket);
    }
    println!("{}", server.endpoint());
    server.join();
    Ok(())
}
