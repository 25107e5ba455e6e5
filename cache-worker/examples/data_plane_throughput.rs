//! Warm sequential throughput between a client and a running efc-worker, with the CPU time of both sides:
//!
//! ```text
//! efc-worker --memory 1536MiB --unix /tmp/w.sock --ready-fd 1 &
//! cargo run --release -p efc-worker --example data_plane_throughput -- /tmp/w.sock PID DIR FILE [DEPTH]
//! ```
//! `FILE` in `DIR` is read once to warm the cache, then once measured, `DEPTH` blocks ahead (default 4).

use anyhow::{Context, Result, ensure};
use efc_client::peers::{FileRef, Peers, PeersOptions, ReadFlags, Tier, host_name};
use efc_client::ring::RingWatch;
use efc_client::wire::Identity;
use efc_common::block::split_blocks;
use efc_common::id::{RingEpoch, WorkerId};
use efc_common::ring::{Member, Ring};
use efc_common::source::{SecretRef, SourceSpec};
use futures::StreamExt;
use std::collections::BTreeMap;
use std::time::Instant;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [unix, pid, dir, name, rest @ ..] = args.as_slice() else {
        anyhow::bail!("usage: throughput UNIX_SOCKET WORKER_PID DIR FILE [DEPTH]")
    };
    let depth: usize = rest.first().map_or(Ok(4), |d| d.parse()).context("DEPTH")?;
    let spec = SourceSpec::parse(&format!("file://{dir}"), BTreeMap::new(), SecretRef::Anonymous)?;
    let backend = efc_backend::connect(&spec, None).await?;
    let root = backend.root().await?;
    let node = backend.lookup(&root.locator, name.as_bytes()).await?;
    let file = FileRef { locator: node.locator, version: node.version, size: node.attr.size };
    let member = Member {
        id: WorkerId("w".into()),
        addr: "127.0.0.1:1".into(),
        unix: unix.clone(),
        host: host_name(),
        zone: String::new(),
        weight: 1,
    };
    let ring = RingWatch::fixed(Ring::new(RingEpoch(1), vec![member]));
    let peers = Peers::new(ring, spec, None, Identity::default(), PeersOptions::default());
    read(&peers, &file, depth).await?;
    let (ours, theirs, began) = (cpu_secs("self")?, cpu_secs(pid)?, Instant::now());
    let memory = read(&peers, &file, depth).await?;
    let secs = began.elapsed().as_secs_f64();
    let gib = file.size as f64 / (1u64 << 30) as f64;
    ensure!(memory == file.size, "only {memory} of {} bytes came from the memory tier", file.size);
    println!(
        "{:.0} MB/s, CPU-s/GiB: client {:.3}, worker {:.3} (depth {depth}, {gib:.2} GiB)",
        file.size as f64 / secs / 1e6,
        (cpu_secs("self")? - ours) / gib,
        (cpu_secs(pid)? - theirs) / gib,
    );
    Ok(())
}

/// Reads the file in order, `depth` blocks at once; bytes that came from the worker's memory.
async fn read(peers: &Peers, file: &FileRef, depth: usize) -> Result<u64> {
    let blocks = split_blocks(0..file.size).map(async |range| {
        let mut stream = peers.read(file, range, ReadFlags::default())?;
        let mut memory = 0;
        while let Some(chunk) = stream.next().await? {
            memory += if chunk.tier == Tier::Memory { chunk.bytes.len() as u64 } else { 0 };
        }
        anyhow::Ok(memory)
    });
    let mut blocks = std::pin::pin!(futures::stream::iter(blocks).buffered(depth));
    let mut memory = 0;
    while let Some(n) = blocks.next().await {
        memory += n?;
    }
    Ok(memory)
}

/// User and system time of a process.
fn cpu_secs(pid: &str) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Fields 14 and 15, counted behind the name, which may hold spaces.
    let fields: Vec<&str> = stat.rsplit_once(')').context("stat")?.1.split_whitespace().collect();
    let ticks = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
    Ok(ticks / 100.0)
}
