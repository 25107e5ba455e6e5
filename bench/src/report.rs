//! From measurements to what people read: a table per test, EFC's ratio to each peer, and the floors EFC has to reach.
//!
//! Several rounds are summed up by the median of each number. A ratio above 1 always means that EFC is better.

use crate::run::{Measured, Phase, Test};
use efc_testkit::S3RoStats;
use serde::Serialize;
use std::fmt::Write as _;

/// One tool in one phase of one test, over all rounds.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Tool.
    pub tool: String,
    /// Test.
    pub test: Test,
    /// Phase.
    pub phase: Phase,
    /// Rounds.
    pub rounds: usize,
    /// The test's own figure: MiB/s (seq), files/s (small, find), reads/s (random).
    pub rate: f64,
    /// MiB read per second.
    pub mib_per_s: f64,
    /// 99th percentile of an operation, microseconds.
    pub p99_us: f64,
    /// Daemon CPU seconds per GiB read; for `find`, per 10,000 files.
    pub cpu_s: f64,
    /// GETs per file.
    pub get_per_file: f64,
    /// HEADs per file.
    pub head_per_file: f64,
    /// LISTs in all.
    pub lists: f64,
    /// Bytes fetched from the origin per byte read.
    pub fetched_per_byte: f64,
    /// FUSE requests per file; only EFC tells.
    pub fuse_per_file: Option<f64>,
}

/// EFC against one peer.
#[derive(Debug, Clone, Serialize)]
pub struct Ratio {
    /// Peer.
    pub peer: String,
    /// Test.
    pub test: Test,
    /// Phase.
    pub phase: Phase,
    /// EFC's rate over the peer's: above 1 EFC is faster.
    pub rate: f64,
    /// The peer's CPU seconds over EFC's: above 1 EFC costs less. None when EFC's are fewer than the clock's ticks show.
    pub cpu: Option<f64>,
}

/// A floor of the acceptance list.
#[derive(Debug, Clone, Serialize)]
pub struct Floor {
    /// What is asked.
    pub what: String,
    /// What was measured.
    pub measured: f64,
    /// The bound.
    pub bound: f64,
    /// Reached?
    pub reached: bool,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

/// The rows, in order of test, phase and first appearance of the tool.
pub fn rows(all: &[Measured]) -> Vec<Row> {
    let mut keys: Vec<(Test, Phase, &str)> = Vec::new();
    for m in all.iter().filter(|m| m.round == 0) {
        keys.push((m.test, m.phase, &m.tool));
    }
    keys.sort_by_key(|(test, phase, _)| (*test, *phase));
    let row = |(test, phase, tool): (Test, Phase, &str)| {
        let of: Vec<&Measured> =
            all.iter().filter(|m| (m.test, m.phase, m.tool.as_str()) == (test, phase, tool)).collect();
        let mid = |f: &dyn Fn(&Measured) -> f64| median(of.iter().map(|m| f(m)).collect());
        let files = |m: &Measured| if test.is_random() { 1.0 } else { m.ops.max(1) as f64 };
        let served = |f: fn(&S3RoStats) -> u64| mid(&|m| f(&m.origin) as f64 / files(m));
        let mib = |m: &Measured| m.bytes as f64 / (1 << 20) as f64;
        Row {
            tool: tool.into(),
            test,
            phase,
            rounds: of.len(),
            rate: mid(&|m| if test == Test::Seq { mib(m) / m.seconds } else { m.ops as f64 / m.seconds }),
            mib_per_s: mid(&|m| mib(m) / m.seconds),
            p99_us: mid(&|m| m.p99_us as f64),
            cpu_s: mid(&|m| match m.bytes {
                0 => m.daemon_cpu_s * 10_000.0 / m.ops.max(1) as f64,
                _ => m.daemon_cpu_s * 1024.0 / mib(m),
            }),
            get_per_file: served(|s| s.get),
            head_per_file: served(|s| s.head),
            lists: mid(&|m| m.origin.list as f64),
            fetched_per_byte: mid(&|m| if m.bytes == 0 { 0.0 } else { m.origin.bytes as f64 / m.bytes as f64 }),
            fuse_per_file: of.first().and_then(|m| m.fuse_requests.as_ref()).map(|_| {
                mid(&|m| m.fuse_requests.iter().flat_map(|f| f.values()).sum::<u64>() as f64 / m.ops.max(1) as f64)
            }),
        }
    };
    keys.into_iter().map(row).collect()
}

/// EFC (the first tool of each phase named `efc`) against every other tool.
pub fn ratios(rows: &[Row]) -> Vec<Ratio> {
    let mut out = Vec::new();
    for efc in rows.iter().filter(|r| r.tool == "efc") {
        for peer in rows.iter().filter(|r| r.tool != "efc" && (r.test, r.phase) == (efc.test, efc.phase)) {
            out.push(Ratio {
                peer: peer.tool.clone(),
                test: efc.test,
                phase: efc.phase,
                rate: efc.rate / peer.rate.max(1e-9),
                cpu: (efc.cpu_s > 0.0).then(|| peer.cpu_s / efc.cpu_s),
            });
        }
    }
    out
}

/// The floors of acceptance 11 that this run can tell about: those against JuiceFS, and the read amplification.
pub fn floors(rows: &[Row], ratios: &[Ratio]) -> Vec<Floor> {
    let against = |test, phase, what: &str, bound: f64| {
        let found = ratios.iter().find(|r| r.peer == "juicefs" && (r.test, r.phase) == (test, phase))?;
        Some(Floor {
            what: format!("{what}, against JuiceFS"),
            measured: found.rate,
            bound,
            reached: found.rate >= bound,
        })
    };
    let random = rows.iter().find(|r| r.tool == "efc" && (r.test, r.phase) == (Test::Rand4k, Phase::Cold));
    let amplification = random.map(|r| Floor {
        what: "random 4 KiB cold: bytes fetched per byte read, at most".into(),
        measured: r.fetched_per_byte,
        bound: 70.0,
        reached: r.fetched_per_byte <= 70.0,
    });
    [
        against(Test::Small, Phase::Cold, "small files cold", 2.0),
        against(Test::Small, Phase::Warm, "small files from our cache", 2.0),
        against(Test::Seq, Phase::Cold, "1 GiB cold", 1.0),
        against(Test::Seq, Phase::Warm, "1 GiB from our cache", 1.2),
        amplification,
        against(Test::Rand4k, Phase::Cold, "random 4 KiB cold: reads/s", 1.0),
        against(Test::Find, Phase::Cold, "find with sizes cold", 5.0),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn title(test: Test) -> (&'static str, &'static str, &'static str) {
    match test {
        Test::Seq => ("sequential read of the large file", "MiB/s", "CPU s/GiB"),
        Test::Small => ("small files: open, read, close", "files/s", "CPU s/GiB"),
        Test::Rand4k => ("random 4 KiB", "reads/s", "CPU s/GiB"),
        Test::Rand256k => ("random 256 KiB", "reads/s", "CPU s/GiB"),
        Test::Find => ("find with sizes, one directory", "files/s", "CPU s/10k"),
        Test::Findtree => ("find with sizes, tree", "files/s", "CPU s/10k"),
    }
}

fn number(n: f64) -> String {
    match n {
        0.0 => "0".into(),
        n if n < 10.0 => format!("{n:.2}"),
        n if n < 100.0 => format!("{n:.1}"),
        n => format!("{n:.0}"),
    }
}

/// The tables for people.
pub fn table(rows: &[Row], ratios: &[Ratio], floors: &[Floor]) -> String {
    let mut t = String::new();
    // Writing to a String cannot fail.
    let mut line = |text: String| {
        let _ = writeln!(t, "{}", text.trim_end());
    };
    let mut last = None;
    for r in rows {
        let (name, unit, cpu) = title(r.test);
        if last != Some(r.test) {
            line(format!(
                "\n{name:<35}{unit:>10}{:>9}{cpu:>11}{:>10}{:>10}{:>7}{:>10}{:>10}  EFC/peer: rate, CPU saved",
                "p99 us", "GET/file", "HEAD/file", "LISTs", "B/B read", "FUSE/file"
            ));
            last = Some(r.test);
        }
        let fuse = r.fuse_per_file.map_or("-".into(), number);
        let phase = format!("{:?}", r.phase).to_lowercase();
        let ratio = ratios.iter().find(|x| x.peer == r.tool && (x.test, x.phase) == (r.test, r.phase));
        let ratio = ratio.map_or(String::new(), |x| {
            format!("{}x, {}", number(x.rate), x.cpu.map_or("-".into(), |c| number(c) + "x"))
        });
        // A random test has no files: its requests are shown per read.
        let per = |n: f64| number(if r.test.is_random() { 0.0 } else { n });
        line(format!(
            "  {phase:<8}{:<25}{:>10}{:>9}{:>11}{:>10}{:>10}{:>7}{:>10}{:>10}  {ratio}",
            r.tool,
            number(r.rate),
            number(r.p99_us),
            number(r.cpu_s),
            per(r.get_per_file),
            per(r.head_per_file),
            number(r.lists),
            number(r.fetched_per_byte),
            fuse
        ));
    }
    if !floors.is_empty() {
        line("\nfloors (issue 2, acceptance 11)".into());
    }
    for f in floors {
        let verdict = if f.reached { "reached" } else { "MISSED" };
        line(format!("  {:<62}{:>8} of {:<6}{verdict}", f.what, number(f.measured), number(f.bound)));
    }
    t
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(tool: &str, round: usize, seconds: f64, cpu: f64) -> Measured {
        Measured {
            tool: tool.into(),
            test: Test::Small,
            phase: Phase::Cold,
            round,
            ops: 1000,
            bytes: 1 << 30,
            seconds,
            p99_us: 5,
            daemon_cpu_s: cpu,
            origin: S3RoStats { get: 1000, head: 2000, list: 2, other: 0, bytes: 1 << 31 },
            fuse_requests: (tool == "efc").then(|| [("read".to_string(), 3000)].into()),
            load: 0.0,
        }
    }

    #[test]
    fn medians_ratios_and_floors() {
        let all = [
            measured("efc", 0, 1.0, 0.5),
            measured("juicefs", 0, 3.0, 2.0),
            measured("efc", 1, 9.0, 0.5),
            measured("juicefs", 1, 3.0, 2.0),
            measured("efc", 2, 1.0, 0.5),
        ];
        let rows = rows(&all);
        assert_eq!(rows.len(), 2);
        let efc = &rows[0];
        assert_eq!((efc.rate, efc.rounds, efc.cpu_s), (1000.0, 3, 0.5));
        assert_eq!((efc.get_per_file, efc.head_per_file, efc.lists), (1.0, 2.0, 2.0));
        assert_eq!((efc.fetched_per_byte, efc.fuse_per_file, rows[1].fuse_per_file), (2.0, Some(3.0), None));
        let ratios = ratios(&rows);
        assert_eq!(ratios.len(), 1);
        assert!((ratios[0].rate - 3.0).abs() < 1e-9 && ratios[0].cpu == Some(4.0));
        let floors = floors(&rows, &ratios);
        assert!(floors.len() == 1 && floors[0].reached);
        let text = table(&rows, &ratios, &floors);
        assert!(text.contains("3.00x, 4.00x") && text.contains("reached"), "{text}");
    }

    #[test]
    fn a_missed_floor_is_told() {
        let rows = rows(&[measured("efc", 0, 2.0, 0.0), measured("juicefs", 0, 3.0, 2.0)]);
        let ratios = ratios(&rows);
        let floors = floors(&rows, &ratios);
        assert!(!floors[0].reached && table(&rows, &ratios, &floors).contains("MISSED"));
    }
}
