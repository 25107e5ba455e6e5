//! `efc-bench writes`: what writing to a bucket costs. Small files closed one after the other with and without write-back, an archive unpacked beside a peer, one
//! long file beside the store's own client. The server is the testkit's, which keeps everything in memory; its latency is that of a far store.

use crate::ballast::Ballast;
use crate::tool::{Mounted, Place, Tool, mount};
use anyhow::{Context, Result, ensure};
use efc_testkit::oss::{Action, Fault, OssOptions, OssServer};
use efc_testkit::process::run_to_end;
use serde::Serialize;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const SMALL_BYTES: usize = 4096;
const BUCKET: &str = "data";
/// Ballast of a turn, in sizes of the long file: what the server keeps, what is staged, buffers.
const BALLAST: u64 = 4;
/// One phase may take this long.
const DEADLINE: Duration = Duration::from_secs(1800);
const FILES_IN_DIR: usize = 100;
/// Small files whose close waits for the store: each takes as long as it is away.
const SYNC_CREATES: usize = 200;
/// What is short and what has a rival is measured so many times.
const ROUNDS: usize = 3;

/// What is measured.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Working directory.
    pub dir: PathBuf,
    /// The tool.
    pub efc: Tool,
    /// Whose unpacking is measured beside, over `peer_files` of the files.
    pub peers: Vec<Tool>,
    /// Wait before each of the server's answers, for small files and archives.
    pub latency: Duration,
    /// Small files that are created.
    pub creates: usize,
    /// Files in the archive.
    pub tar_files: usize,
    /// Files in the archive that peers unpack.
    pub peer_files: usize,
    /// Length of the long file, bytes.
    pub long_bytes: usize,
}

/// Create, write 4 KiB, close.
#[derive(Debug, Clone, Serialize)]
pub struct Create {
    /// Median of one file, microseconds.
    pub median_us: f64,
    /// 99th percentile, microseconds.
    pub p99_us: f64,
    /// Files a second.
    pub files_per_s: f64,
}

/// An archive unpacked.
#[derive(Debug, Clone, Serialize)]
pub struct Unpack {
    /// Who.
    pub tool: String,
    /// Files in it.
    pub files: usize,
    /// Until `tar` ended.
    pub tar_s: f64,
    /// Until the mount's process had ended, with everything at the store.
    pub all_s: f64,
    /// Files a second until then.
    pub files_per_s: f64,
    /// Requests at the store for each file.
    pub requests_per_file: f64,
}

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub struct Writes {
    /// Close waits for the store, in each round.
    pub create_sync: Vec<Create>,
    /// It does not.
    pub create_writeback: Vec<Create>,
    /// Rate of write-back over the other, of the middle rounds.
    pub create_ratio: f64,
    /// Archives.
    pub unpack: Vec<Unpack>,
    /// Rate of EFC over each peer's.
    pub unpack_ratio: Vec<(String, f64)>,
    /// The long file through the mount until `fsync` and `close` have returned, seconds of each round.
    pub long_efc_s: Vec<f64>,
    /// The same file uploaded in parts by boto3, seconds of each round.
    pub long_client_s: Vec<f64>,
    /// EFC's best round over the client's best.
    pub long_ratio: f64,
}

fn server(latency: Duration) -> Result<OssServer> {
    let server = OssServer::start_with(OssOptions::s3())?;
    server.create_bucket(BUCKET);
    if !latency.is_zero() {
        let action = Action::Latency { ms: u64::try_from(latency.as_millis())? };
        server.fault(Fault {
            op: String::new(),
            key_prefix: String::new(),
            skip: 0,
            count: None,
            for_ms: None,
            action,
        });
    }
    Ok(server)
}

fn mounted(plan: &Plan, tool: &Tool, server: &OssServer, options: &[&str]) -> Result<(Mounted, PathBuf)> {
    let dir = plan.dir.join("node");
    if dir.exists() {
        fs::remove_dir_all(&dir)?;
    }
    fs::create_dir_all(&dir)?;
    let place = Place {
        dir: dir.clone(),
        endpoint: server.endpoint(),
        origin: plan.dir.join("origin"),
        juicefs_meta: plan.dir.join("juicefs.db"),
    };
    Ok((mount(&tool.with(options), &place)?, dir))
}

fn create(dir: &Path, files: usize) -> Result<Create> {
    let data = vec![7; SMALL_BYTES];
    let mut times = Vec::with_capacity(files);
    let begun = Instant::now();
    for i in 0..files {
        let one = Instant::now();
        let mut file = File::create(dir.join(format!("f{i}")))?;
        file.write_all(&data)?;
        // Its error is `close`'s.
        nix::unistd::close(file)?;
        times.push(one.elapsed().as_secs_f64() * 1e6);
    }
    let files_per_s = files as f64 / begun.elapsed().as_secs_f64();
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times.get((times.len() as f64 * share) as usize).copied().unwrap_or(0.0);
    Ok(Create { median_us: at(0.5), p99_us: at(0.99), files_per_s })
}

fn creates(plan: &Plan, options: &[&str], files: usize) -> Result<Create> {
    let server = server(plan.latency)?;
    let (m, dir) = mounted(plan, &plan.efc, &server, options)?;
    let path = m.path().join("d");
    let found = m.on_it(DEADLINE, move || {
        fs::create_dir(&path)?;
        create(&path, files)
    })?;
    m.unmount()?;
    let there = server.keys(BUCKET).iter().filter(|k| k.starts_with(b"d/f")).count();
    ensure!(there == files, "{there} of {files} files are at the store");
    fs::remove_dir_all(dir)?;
    Ok(found)
}

/// The round with the middle median.
pub(crate) fn middle(rounds: &[Create]) -> &Create {
    let mut all: Vec<&Create> = rounds.iter().collect();
    all.sort_by(|a, b| f64::total_cmp(&a.median_us, &b.median_us));
    all[all.len() / 2]
}

/// An archive of small files in directories of a hundred.
fn archive(plan: &Plan, files: usize) -> Result<PathBuf> {
    let tree = plan.dir.join("origin").join("tree");
    for i in 0..files {
        let dir = tree.join(format!("d{:04}", i / FILES_IN_DIR));
        fs::create_dir_all(&dir)?;
        fs::write(dir.join(format!("f{i:06}")), vec![(i % 251) as u8; 512 + i * 37 % 7000])?;
    }
    let tar = plan.dir.join("origin").join(format!("{files}.tar"));
    let mut command = Command::new("tar");
    command.arg("-C").arg(&tree).arg("-cf").arg(&tar).arg(".");
    run_to_end("tar", command, DEADLINE)?;
    fs::remove_dir_all(tree)?;
    Ok(tar)
}

fn unpack(plan: &Plan, tool: &Tool, options: &[&str], files: usize) -> Result<Unpack> {
    let tar = archive(plan, files)?;
    let server = server(plan.latency)?;
    let (m, dir) = mounted(plan, tool, &server, options)?;
    let before: u64 = server.stats().total();
    // Not at the top: an archive has the owner and times of its `.`, and nobody can give those to the root of a bucket.
    let (path, archive) = (m.path().join("unpacked"), tar.clone());
    let begun = Instant::now();
    let tar_s = m.on_it(DEADLINE, move || {
        fs::create_dir(&path)?;
        let mut command = Command::new("tar");
        command.arg("-C").arg(path).arg("-xf").arg(archive);
        run_to_end("tar", command, DEADLINE)?;
        Ok(begun.elapsed().as_secs_f64())
    })?;
    m.unmount()?;
    let all_s = begun.elapsed().as_secs_f64();
    let there = server.keys(BUCKET).iter().filter(|k| k.windows(2).any(|w| w == b"/f")).count();
    ensure!(there == files, "{}: {there} of {files} files are at the store", tool.name);
    fs::remove_file(tar)?;
    fs::remove_dir_all(dir)?;
    Ok(Unpack {
        tool: tool.name.clone(),
        files,
        tar_s,
        all_s,
        files_per_s: files as f64 / all_s,
        requests_per_file: (server.stats().total() - before) as f64 / files as f64,
    })
}

fn long_by_mount(plan: &Plan, server: &OssServer, source: &Path) -> Result<f64> {
    let (m, dir) = mounted(plan, &plan.efc, server, &["rw"])?;
    let (path, source) = (m.path().join("long"), source.to_path_buf());
    let seconds = m.on_it(DEADLINE, move || {
        let data = fs::read(source)?;
        let begun = Instant::now();
        let mut file = File::create(path)?;
        for piece in data.chunks(1 << 20) {
            file.write_all(piece)?;
        }
        file.sync_all()?;
        nix::unistd::close(file)?;
        Ok(begun.elapsed().as_secs_f64())
    })?;
    m.unmount()?;
    fs::remove_dir_all(dir)?;
    Ok(seconds)
}

/// boto3's own multipart upload, with its defaults (parts of 8 MiB, ten threads).
fn long_by_client(server: &OssServer, source: &Path) -> Result<f64> {
    let keys = server.target();
    let script = "import sys,time,boto3\nfrom botocore.config import Config\n\
        s=boto3.client('s3',endpoint_url=sys.argv[1],region_name='us-east-1',config=Config(s3={'addressing_style':'path'}))\n\
        t=time.time(); s.upload_file(sys.argv[2],'data','client'); print(time.time()-t)";
    let mut command = Command::new(efc_testkit::venv::program("python").context("boto3 (./run setup)")?);
    command.args(["-c", script, &server.endpoint()]).arg(source).envs(keys.env());
    let text = run_to_end("boto3", command, DEADLINE)?;
    text.trim().parse().with_context(|| format!("boto3 said `{text}`"))
}

/// Measures; see the module.
///
/// # Errors
/// When a mount fails, or not everything is at the store in the end.
pub fn run(plan: &Plan) -> Result<Writes> {
    fs::create_dir_all(plan.dir.join("origin"))?;
    // What a build has left to the disks would be written meanwhile.
    nix::unistd::sync();
    let tell = |what: &str| eprintln!("writes: {what}");
    tell("small files");
    let (mut create_sync, mut create_writeback) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        create_sync.push(creates(plan, &["rw"], plan.creates.min(SYNC_CREATES))?);
        create_writeback.push(creates(plan, &["rw", "writeback"], plan.creates)?);
    }
    tell("archives");
    let mut all = vec![unpack(plan, &plan.efc, &["rw", "writeback"], plan.tar_files)?];
    for peer in &plan.peers {
        all.push(unpack(plan, peer, &[], plan.peer_files)?);
    }
    tell("the long file");
    let source = plan.dir.join("origin").join("long");
    let bytes: Vec<u8> =
        (0..plan.long_bytes / 8).flat_map(|i| (i as u64).wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    fs::write(&source, &bytes)?;
    let (mut long_efc_s, mut long_client_s) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        for turn in 0..2 {
            // A server of its own each time: what it keeps in memory is not to slow the next one down.
            let server = server(Duration::ZERO)?;
            let _ballast = Ballast::new(BALLAST * plan.long_bytes as u64);
            if (round + turn) % 2 == 0 {
                long_efc_s.push(long_by_mount(plan, &server, &source)?);
                ensure!(server.get(BUCKET, "long").is_some_and(|b| b[..] == bytes[..]), "the long file is wrong");
            } else {
                long_client_s.push(long_by_client(&server, &source)?);
                ensure!(server.get(BUCKET, "client").is_some_and(|b| b[..] == bytes[..]), "boto3's file is wrong");
            }
        }
    }
    fs::remove_file(source)?;
    let best = |all: &[f64]| all.iter().copied().fold(f64::INFINITY, f64::min);
    let ours = all[0].files_per_s;
    Ok(Writes {
        create_ratio: middle(&create_writeback).files_per_s / middle(&create_sync).files_per_s,
        create_sync,
        create_writeback,
        unpack_ratio: all[1..].iter().map(|u| (u.tool.clone(), ours / u.files_per_s)).collect(),
        unpack: all,
        long_ratio: best(&long_client_s) / best(&long_efc_s),
        long_efc_s,
        long_client_s,
    })
}
