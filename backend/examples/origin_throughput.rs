//! Reads one file of a source from beginning to end and prints MB/s and the CPU it cost:
//! `throughput URL PATH [OPTION=VALUE ...]`, with PATH relative to the source and `range=BYTES` for the size of one read (default 4 MiB).

use efc_common::source::{SecretRef, SourceSpec};
use futures::TryStreamExt;
use std::collections::BTreeMap;
use std::time::Instant;

fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    // utime and stime in ticks of 1/100 s, fields 14 and 15 of proc(5).
    fields.iter().skip(11).take(2).filter_map(|f| f.parse::<f64>().ok()).sum::<f64>() / 100.0
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> efc_common::Result<()> {
    let mut words = std::env::args().skip(1);
    let (Some(url), Some(path)) = (words.next(), words.next()) else {
        eprintln!("usage: throughput URL PATH [OPTION=VALUE ...]");
        std::process::exit(2);
    };
    let mut options: BTreeMap<String, String> =
        words.filter_map(|w| w.split_once('=').map(|(k, v)| (k.to_string(), v.to_string()))).collect();
    let unit = efc_common::units::parse_bytes(&options.remove("range").unwrap_or_else(|| "4MiB".into()))?;
    let spec = SourceSpec::parse(&url, options, SecretRef::Anonymous)?;
    let backend = efc_backend::connect(&spec, None).await?;
    let mut node = backend.root().await?;
    for name in path.split('/') {
        node = backend.lookup(&node.locator, name.as_bytes()).await?;
    }
    for _ in 0..3 {
        let (began, cpu) = (Instant::now(), cpu_seconds());
        let mut at = 0;
        while at < node.attr.size {
            let end = (at + unit).min(node.attr.size);
            let mut stream = backend.read(&node.locator, &node.version, at..end).await?;
            while let Some(piece) = stream.try_next().await? {
                at += piece.len() as u64;
            }
        }
        let (seconds, cpu) = (began.elapsed().as_secs_f64(), cpu_seconds() - cpu);
        let gib = at as f64 / (1u64 << 30) as f64;
        println!("{:.0} MB/s, {:.2} CPU s per GiB", at as f64 / 1e6 / seconds, cpu / gib);
    }
    Ok(())
}
