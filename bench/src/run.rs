//! Takes each tool through each test: a fresh mount with an empty cache, then the phases, with counters read before and after.
//!
//! Tools take turns within a test, and their order rotates from round to round, so that a machine that gets slower or busier hits all alike.

use crate::ballast::Ballast;
use crate::data::Data;
use crate::proc::{cpu_seconds, descendants, drop_caches};
use crate::tool::{Kind, Mounted, Place, Tool, beside, mount, start};
use crate::work::{self, Tally};
use anyhow::{Context, Result};
use efc_testkit::{FuseGuard, S3Ro, S3RoStats, S3Target};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

/// Size of the random reads, bytes, and their jobs.
const RANDOM_JOBS: usize = 4;
/// One phase may take this long.
const PHASE_DEADLINE: Duration = Duration::from_secs(900);

/// A test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Test {
    /// The large file from start to end by one reader.
    Seq,
    /// All small files by several readers.
    Small,
    /// Random 4 KiB reads by 4 jobs.
    Rand4k,
    /// Random 256 KiB reads by 4 jobs.
    Rand256k,
    /// `find` with sizes over the directory of small files.
    Find,
    /// `find` with sizes over the tree.
    Findtree,
}

impl Test {
    /// All, in the order they run.
    pub const ALL: [Test; 6] = [Test::Seq, Test::Small, Test::Rand4k, Test::Rand256k, Test::Find, Test::Findtree];

    /// Reads at random offsets?
    pub fn is_random(self) -> bool {
        matches!(self, Test::Rand4k | Test::Rand256k)
    }
}

/// What a cache knows when a phase starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Nothing.
    Cold,
    /// A second mount of the same cluster; the first has read everything.
    Second,
    /// The tool's own cache knows it, the kernel's was dropped.
    Warm,
    /// The kernel's caches know it too.
    Hot,
}

/// One measured phase.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    /// Tool.
    pub tool: String,
    /// Test.
    pub test: Test,
    /// Phase.
    pub phase: Phase,
    /// Round, from 0.
    pub round: usize,
    /// Files (small, find) or reads (random).
    pub ops: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// 99th percentile of an operation, microseconds.
    pub p99_us: u64,
    /// CPU seconds of all the tool's processes, user and system.
    pub daemon_cpu_s: f64,
    /// What the S3 server served meanwhile.
    pub origin: S3RoStats,
    /// FUSE requests by operation; only EFC tells.
    pub fuse_requests: Option<BTreeMap<String, u64>>,
    /// Load average over a minute when the phase began: the noise.
    pub load: f64,
}

/// How to run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Directory of everything.
    pub dir: PathBuf,
    /// Tools, EFC first.
    pub tools: Vec<Tool>,
    /// Tests.
    pub tests: Vec<Test>,
    /// How often.
    pub rounds: usize,
    /// Length of a random phase.
    pub random: Duration,
    /// Readers of small files.
    pub readers: usize,
    /// Read small files in a shuffled order?
    pub shuffled: bool,
    /// Measure the second node too?
    pub second: bool,
}

/// Ballast of a phase, in sizes of the large file: caches of two tiers, page cache and buffers.
const BALLAST: u64 = 6;

/// The machine's load average over the last minute.
pub fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|l| l.parse().ok()).unwrap_or(0.0)
}

/// Runs everything; `done` gets each result as it comes.
///
/// # Errors
/// On the first failure of any tool, a wrong byte above all.
pub fn run(
    settings: &Settings,
    server: &S3Ro,
    data: &Arc<Data>,
    mut done: impl FnMut(&Measured),
) -> Result<Vec<Measured>> {
    let mut all = Vec::new();
    for round in 0..settings.rounds {
        for test in &settings.tests {
            for i in 0..settings.tools.len() {
                let tool = &settings.tools[(i + round) % settings.tools.len()];
                let mut session = Session { settings, server, data, tool, test: *test, round };
                let measured = session.run().with_context(|| format!("{} in test {test:?}", tool.name))?;
                measured.iter().for_each(&mut done);
                all.extend(measured);
            }
        }
    }
    Ok(all)
}

struct Session<'a> {
    settings: &'a Settings,
    server: &'a S3Ro,
    data: &'a Arc<Data>,
    tool: &'a Tool,
    test: Test,
    round: usize,
}

impl Session<'_> {
    fn place(&self, name: &str) -> Result<Place> {
        let dir = self.settings.dir.join(name);
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display()))?;
        }
        fs::create_dir_all(&dir)?;
        Ok(place(self.settings, self.server, dir))
    }

    fn run(&mut self) -> Result<Vec<Measured>> {
        let place = self.place("node")?;
        drop_caches()?;
        let mounted = mount(self.tool, &place)?;
        let mut all = vec![self.measure(&mounted, Phase::Cold)?];
        if self.test.is_random() {
            self.fill(&mounted)?;
        } else if self.tool.is_efc() && self.settings.second {
            all.push(self.second(&mounted)?);
        }
        drop_caches()?;
        all.push(self.measure(&mounted, Phase::Warm)?);
        if self.test.is_random() {
            self.fill(&mounted)?;
        }
        all.push(self.measure(&mounted, Phase::Hot)?);
        mounted.unmount()?;
        fs::remove_dir_all(&place.dir).with_context(|| format!("remove {}", place.dir.display()))?;
        Ok(all)
    }

    /// Reads the whole large file, unmeasured, so that the caches know it.
    fn fill(&self, mounted: &Mounted) -> Result<()> {
        let (path, data) = (mounted.path().to_path_buf(), self.data.clone());
        mounted.on_it(PHASE_DEADLINE, move || work::sequential(&path, &data)).map(drop)
    }

    /// Another mount that joins the first one's cluster.
    fn second(&self, first: &Mounted) -> Result<Measured> {
        let place = self.place("node2")?;
        let mut options = match &self.tool.kind {
            Kind::Efc(options) => options.clone(),
            _ => Vec::new(),
        };
        options.retain(|o| !o.starts_with("cache_") && !o.starts_with("data_dir"));
        options.push(format!("endpoint={},master={}", place.endpoint, first.efc_master()?));
        let guard = Arc::new(FuseGuard::new(&place.dir.join("mnt"))?);
        let mut command = Command::new(beside("efc-fuse")?);
        command.arg("mount").arg("s3://data").arg(guard.path()).arg("-f");
        command.arg("--log-file").arg(place.dir.join("efc.log"));
        for option in &options {
            command.arg("-o").arg(option);
        }
        command.envs(S3Target::default().env());
        let mut second = start("efc-second", command, guard, &place, descendants())?;
        // The worker that serves the second node is the first one's: its cost belongs to the answer.
        second.pids.extend(&first.pids);
        let measured = self.measure(&second, Phase::Second);
        second.pids = second.pids.difference(&first.pids).copied().collect();
        second.unmount()?;
        fs::remove_dir_all(&place.dir).with_context(|| format!("remove {}", place.dir.display()))?;
        measured
    }

    fn work(&self, mounted: &Mounted, phase: Phase) -> Result<Tally> {
        let (test, settings, data) = (self.test, self.settings.clone(), self.data.clone());
        let path = mounted.path().to_path_buf();
        // Phases draw other offsets, rounds and tools the same.
        let seed = 0x6566_6300 + phase as u64;
        let random = move |size| work::random(&path, &data, size, RANDOM_JOBS, settings.random, seed);
        let (path, data) = (mounted.path().to_path_buf(), self.data.clone());
        let (readers, shuffled) = (self.settings.readers, self.settings.shuffled);
        mounted.on_it(PHASE_DEADLINE, move || match test {
            Test::Seq => work::sequential(&path, &data),
            Test::Small => work::small(&path, &data, readers, shuffled),
            Test::Rand4k => random(4 << 10),
            Test::Rand256k => random(256 << 10),
            Test::Find => work::find(&path, &data, false),
            Test::Findtree => work::find(&path, &data, true),
        })
    }

    fn measure(&self, mounted: &Mounted, phase: Phase) -> Result<Measured> {
        let fuse = || if self.tool.is_efc() { mounted.fuse_requests().map(Some) } else { Ok(None) };
        let ballast = (phase != Phase::Hot).then(|| Ballast::new(BALLAST * self.data.plan.big_bytes));
        let before = fuse()?;
        let load = load();
        self.server.reset_stats();
        let cpu = cpu_seconds(&mounted.pids);
        let tally = self.work(mounted, phase).with_context(|| format!("phase {phase:?}"))?;
        let daemon_cpu_s = cpu_seconds(&mounted.pids) - cpu;
        drop(ballast);
        let origin = self.server.stats();
        let fuse_requests = fuse()?.zip(before).map(|(after, before)| {
            let since = |(op, n): (String, u64)| {
                let n = n - before.get(&op).copied().unwrap_or(0).min(n);
                (n > 0).then_some((op, n))
            };
            after.into_iter().filter_map(since).collect()
        });
        Ok(Measured {
            tool: self.tool.name.clone(),
            test: self.test,
            phase,
            round: self.round,
            ops: tally.ops,
            bytes: tally.bytes,
            seconds: tally.seconds,
            p99_us: tally.p99_us,
            daemon_cpu_s,
            origin,
            fuse_requests,
            load,
        })
    }
}

/// The place of a mount in `dir`.
pub fn place(settings: &Settings, server: &S3Ro, dir: PathBuf) -> Place {
    Place {
        dir,
        endpoint: server.endpoint(),
        origin: settings.dir.join("origin"),
        juicefs_meta: settings.dir.join("juicefs.db"),
    }
}
