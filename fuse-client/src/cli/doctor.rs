//! `efc-fuse doctor`: what this machine can do, which guarantees follow, and whether caching a source will help.

use super::DoctorArgs;
use crate::kernel::KernelFeatures;
use crate::options::MountOptions;
use crate::process::{SourceArg, parse_source};
use bytes::Bytes;
use efc_backend::DynBackend;
use efc_backend::object::keys_to_send;
use efc_common::node::{FileKind, Node};
use efc_common::units::show_bytes;
use efc_common::{Error, Kind, Result};
use futures::StreamExt;
use serde::Serialize;
use std::time::{Duration, Instant};

/// Most bytes read for the bandwidth.
const SAMPLE_BYTES: u64 = 64 << 20;
/// Longest a measurement may take.
const SAMPLE_TIME: Duration = Duration::from_secs(5);
/// Look-ups timed for the latency.
const LATENCY_SAMPLES: usize = 10;
/// What a worker on the same network gives, for comparison: latency in milliseconds and bytes a second.
const WORKER: (f64, f64) = (0.5, 1e9);

/// What was found.
#[derive(Debug, Serialize)]
struct Report {
    kernel: Option<KernelFeatures>,
    kernel_error: Option<String>,
    findings: Vec<Finding>,
    origin: Option<Origin>,
}

#[derive(Debug, Serialize)]
struct Finding {
    ok: bool,
    text: String,
}

#[derive(Debug, Serialize)]
struct Origin {
    source: String,
    /// Median time of a listing of the root, milliseconds.
    latency_ms: f64,
    /// One stream, bytes a second; 0 when no file was found to read.
    bandwidth: f64,
    sampled_bytes: u64,
    caching_helps: bool,
    advice: String,
}

/// Probes and prints.
pub fn doctor(args: &DoctorArgs) -> Result<()> {
    let json = match args.output.as_str() {
        "json" => true,
        "table" => false,
        other => return Err(Error::new(Kind::Invalid, format!("output `{other}` is unknown; use table or json"))),
    };
    let probe = KernelFeatures::probe();
    let mut report = Report { findings: findings(&probe), kernel: None, kernel_error: None, origin: None };
    match probe {
        Ok(k) => report.kernel = Some(k),
        Err(e) => report.kernel_error = Some(e.to_string()),
    }
    if let Some(source) = &args.source {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        report.origin = Some(runtime.block_on(measure(source, &args.options))?);
    }
    if json {
        let text =
            serde_json::to_string_pretty(&report).map_err(|e| Error::new(Kind::Io, "write json").caused_by(e))?;
        println!("{text}");
    } else {
        print(&report);
    }
    match report.kernel_error {
        Some(e) => Err(Error::new(Kind::Unsupported, format!("FUSE cannot be used here: {e}"))),
        None => Ok(()),
    }
}

fn findings(probe: &Result<KernelFeatures>) -> Vec<Finding> {
    let Ok(k) = probe else { return Vec::new() };
    let say = |ok: bool, yes: &str, no: &str| Finding { ok, text: if ok { yes } else { no }.to_string() };
    vec![
        say(
            k.resend,
            "a mount process that dies or is upgraded loses no request (RESEND)",
            "no RESEND (Linux 6.9): requests under way at a crash of the mount process end with EINTR, or EIO if they may have been done",
        ),
        say(
            k.no_open,
            "warm open+read+close of a read-only file costs no request (NO_OPEN)",
            "no NO_OPEN: each open and close of a file costs a request",
        ),
        say(
            k.readdirplus,
            "attributes come with directory pages (readdirplus)",
            "no readdirplus: each stat after a listing costs a request",
        ),
        say(
            k.epoch,
            "all names can be dropped without a directory lock (epoch)",
            "no epoch (Linux 6.16): names are dropped one by one",
        ),
        say(k.passthrough, "passthrough to local files is there", "no passthrough (Linux 6.9)"),
        say(k.io_uring, "FUSE over io_uring is there", "no FUSE over io_uring (Linux 6.14 and fuse.enable_uring=Y)"),
    ]
}

async fn measure(source: &str, texts: &[String]) -> Result<Origin> {
    let options = MountOptions::parse(texts, (0, 0))?;
    let SourceArg::Store(spec) = parse_source(source, &options)? else {
        return Err(Error::new(Kind::Unsupported, "doctor measures a store: give its own URL instead of dataset://"));
    };
    let keys = keys_to_send(&spec, options.keys.as_ref())?;
    let backend = efc_backend::connect(&spec, keys.as_ref()).await?;
    let root = backend.root().await?;
    let mut times = Vec::new();
    for _ in 0..LATENCY_SAMPLES {
        let t = Instant::now();
        backend.list(&root.locator, None).await?;
        times.push(t.elapsed().as_secs_f64() * 1000.0);
    }
    times.sort_by(f64::total_cmp);
    let latency_ms = times[times.len() / 2];
    let (sampled_bytes, bandwidth) = match largest_file(&backend, &root.locator).await? {
        Some(file) => read_sample(&backend, &file).await?,
        None => (0, 0.0),
    };
    let caching_helps = latency_ms > 2.0 * WORKER.0 || (bandwidth > 0.0 && bandwidth < 0.8 * WORKER.1);
    let advice = if caching_helps {
        "the origin is slower than a worker would be: files that are read more than once, or by more than one node, gain from the cache"
    } else {
        "the origin answers as fast as a worker would: the cache will save it requests, and readers little time"
    };
    Ok(Origin { source: spec.url(), latency_ms, bandwidth, sampled_bytes, caching_helps, advice: advice.into() })
}

/// The largest file of the first page of the root or of its first directories.
async fn largest_file(backend: &DynBackend, root: &Bytes) -> Result<Option<Node>> {
    let mut best: Option<Node> = None;
    let mut dirs = vec![root.clone()];
    for _ in 0..8 {
        let Some(dir) = dirs.pop() else { break };
        for e in backend.list(&dir, None).await?.entries {
            match e.node.attr.kind {
                FileKind::Directory => dirs.push(e.node.locator),
                FileKind::File if best.as_ref().is_none_or(|b| b.attr.size < e.node.attr.size) => best = Some(e.node),
                _ => {}
            }
        }
    }
    Ok(best.filter(|b| b.attr.size > 0))
}

async fn read_sample(backend: &DynBackend, file: &Node) -> Result<(u64, f64)> {
    let t = Instant::now();
    let end = file.attr.size.min(SAMPLE_BYTES);
    let mut stream = backend.read(&file.locator, &file.version, 0..end).await?;
    let mut bytes = 0u64;
    while let Some(piece) = stream.next().await {
        bytes += piece?.len() as u64;
        if t.elapsed() > SAMPLE_TIME {
            break;
        }
    }
    Ok((bytes, bytes as f64 / t.elapsed().as_secs_f64()))
}

fn print(r: &Report) {
    match &r.kernel {
        Some(k) => println!(
            "FUSE protocol {}.{}, largest request {} pages",
            k.abi.0,
            k.abi.1,
            k.max_pages_limit.unwrap_or(256)
        ),
        None => println!("FUSE: not available"),
    }
    for f in &r.findings {
        println!("  {} {}", if f.ok { "yes" } else { "no " }, f.text);
    }
    if let Some(o) = &r.origin {
        println!("origin {}", o.source);
        println!(
            "  listing {:.1} ms, one stream {}/s ({} read)",
            o.latency_ms,
            show_bytes(o.bandwidth as u64),
            show_bytes(o.sampled_bytes)
        );
        println!("  {}", o.advice);
    }
}
