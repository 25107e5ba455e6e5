//! Deterministic data sets, and manifests that say what a copy of one must hold.
//!
//! A file's bytes follow from its path below the root and the offset alone, eight at a time, so a misplaced block shows as well as a damaged one.
//! A [`Manifest`] lists size and SHA-256 per file; [`Manifest::verify`] compares a tree with it: every name and every byte.

use crate::sign::{encode, hex};
use anyhow::{Context, Result, bail};
use percent_encoding::percent_decode_str;
use ring::digest;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

/// Bytes written or read at a time.
const CHUNK_BYTES: usize = 1 << 20;
/// Differences that [`Manifest::verify`] names before it only counts.
const SHOWN_DIFFERENCES: usize = 20;
/// Sizes at and around every boundary of the data path: page, granule, segment, block.
const EDGE_SIZES: [u64; 19] = [
    0,
    1,
    7,
    8,
    4095,
    4096,
    4097,
    16_383,
    16_384,
    16_385,
    262_143,
    262_144,
    262_145,
    1 << 20,
    (4 << 20) - 1,
    4 << 20,
    (4 << 20) + 1,
    (8 << 20) + 4097,
    20_000_000,
];

/// A kind of data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// About 400 files and 50 MB: edge sizes, odd names, a deep tree. Made in a fraction of a second.
    Small,
    /// More than 10,000 files, 0 B to 1 GiB, about 2 GB in all.
    E2e,
}

impl std::str::FromStr for Profile {
    type Err = anyhow::Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "small" => Ok(Profile::Small),
            "e2e" => Ok(Profile::E2e),
            _ => bail!("profile `{s}` is unknown; use small or e2e"),
        }
    }
}

/// Names that break careless code; all of them valid UTF-8, so that they can be object keys.
pub fn odd_names() -> Vec<String> {
    let mut names: Vec<String> = [
        " leading and trailing ",
        "new\nline",
        "tab\there",
        "quote\"'`",
        "back\\slash",
        "percent%20%2F%00",
        "plus+and&amp;<xml>",
        "question?hash#",
        "...",
        ".hidden",
        "-rf",
        "~tilde",
        "star*[a-z]{x}",
        "umlaut-äöü-ß",
        "umlaut-a\u{308}",
        "日本語のファイル",
        "emoji-🦀",
        "\u{1}\u{7f}control",
        "con",
        "a",
        "a-b",
        "a0",
    ]
    .map(String::from)
    .to_vec();
    names.push("n".repeat(255));
    names.push("ü".repeat(127));
    names
}

/// The bytes of a file at `offset`: word i is a hash (SplitMix64) of the path's seed and i.
pub fn fill(seed: u64, offset: u64, out: &mut [u8]) {
    let word = |i: u64| split_mix(seed.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15))).to_le_bytes();
    let from = (offset % 8) as usize;
    let head = out.len().min((8 - from) % 8);
    let (first, rest) = out.split_at_mut(head);
    first.copy_from_slice(&word(offset / 8)[from..][..head]);
    let start = offset.div_ceil(8);
    let mut words = rest.chunks_exact_mut(8);
    let whole = words.len() as u64;
    for (bytes, i) in words.by_ref().zip(start..) {
        bytes.copy_from_slice(&word(i));
    }
    let last = words.into_remainder();
    last.copy_from_slice(&word(start + whole)[..last.len()]);
}

/// The seed of a path.
pub fn seed_of(relative: &Path) -> u64 {
    let bytes = relative.as_os_str().as_bytes();
    bytes.iter().fold(0x6566_6321, |h, b| split_mix(h ^ u64::from(*b)))
}

/// SplitMix64 (Steele, Lea, Flood 2014), the finaliser.
fn split_mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Which files a profile has, with their sizes.
pub fn plan(profile: Profile) -> BTreeMap<PathBuf, u64> {
    let mut files = BTreeMap::new();
    for size in EDGE_SIZES {
        files.insert(format!("edge/{size}.bin").into(), size);
    }
    for (i, name) in odd_names().into_iter().enumerate() {
        files.insert(Path::new("odd").join(&name), 1000 + i as u64);
        if name.len() < 200 {
            files.insert(Path::new("odd dirs").join(&name).join(&name), 2000 + i as u64);
        }
    }
    let mut deep = PathBuf::from("deep");
    for level in 0..60 {
        deep.push(format!("level-{level:02}"));
        files.insert(deep.join("file"), 3000 + level);
    }
    // `a-b` and `a0` sort around `a/`: listings with and without delimiter disagree on the order.
    for name in ["a/1", "a-b", "a0", "a/b/2", "a.x"] {
        files.insert(Path::new("order").join(name), 10);
    }
    let (many, per_dir) = match profile {
        Profile::Small => (200, 50),
        Profile::E2e => (10_000, 1000),
    };
    for i in 0..many {
        // Between 0 and 64 KiB, most of them small.
        let draw = split_mix(i) % 256;
        files.insert(format!("many/{:02}/{i:05}.dat", i / per_dir).into(), draw * draw);
    }
    if profile == Profile::E2e {
        for i in 0..8u64 {
            files.insert(format!("large/{i}.bin").into(), (10 << 20) * (i + 1) + i * 4099);
        }
        files.insert("large/1g.bin".into(), 1 << 30);
    }
    files
}

/// Writes a profile's files below `dir`.
///
/// # Errors
/// When a file cannot be written.
pub fn make_tree(dir: &Path, profile: Profile) -> Result<Manifest> {
    write_plan(dir, plan(profile))
}

/// Writes `count` files of `size` bytes, `00000.dat` and so on, into one directory: what training jobs read.
///
/// # Errors
/// When a file cannot be written.
pub fn make_flat(dir: &Path, count: u64, size: u64) -> Result<Manifest> {
    write_plan(dir, (0..count).map(|i| (format!("{i:05}.dat").into(), size)).collect())
}

fn write_plan(dir: &Path, plan: BTreeMap<PathBuf, u64>) -> Result<Manifest> {
    let files: Vec<(PathBuf, u64)> = plan.into_iter().collect();
    let entries = in_parallel(&files, threads(), |(relative, size)| {
        let at = dir.join(relative);
        if let Some(parent) = at.parent() {
            fs::create_dir_all(parent)?;
        }
        let sum = write_file(&at, seed_of(relative), *size).with_context(|| format!("write {}", at.display()))?;
        Ok((relative.clone(), FileSum { size: *size, sha256: sum }))
    })?;
    Ok(Manifest { files: entries.into_iter().collect() })
}

/// Adds what a NAS has and an object store has not: names that are no UTF-8, symbolic and hard links, an empty directory, odd
/// modes. Give the manifest anew afterwards ([`Manifest::of_tree`]).
///
/// # Errors
/// When something cannot be made.
pub fn add_nas_oddities(dir: &Path) -> Result<()> {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let at = dir.join("nas");
    fs::create_dir_all(at.join("empty"))?;
    let latin: OsString = OsStr::from_bytes(b"latin-1-\xe4\xf6\xfc").to_owned();
    let broken = OsString::from_vec(vec![0xff, 0xfe, b'x', 0x80]);
    for name in [latin, broken] {
        write_file(&at.join(&name), seed_of(Path::new(&name)), 777)?;
    }
    write_file(&at.join("linked"), 1, 5000)?;
    for (target, name) in
        [("linked", "symlink"), ("nowhere", "broken-symlink"), ("..", "up"), ("/etc/hostname", "absolute")]
    {
        symlink(target, at.join(name))?;
    }
    fs::hard_link(at.join("linked"), at.join("hard-link"))?;
    for mode in [0o400, 0o755, 0o4711] {
        let file = at.join(format!("mode-{mode:o}"));
        write_file(&file, mode.into(), 10)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

fn write_file(at: &Path, seed: u64, size: u64) -> Result<String> {
    let mut file = File::create(at)?;
    let mut sum = digest::Context::new(&digest::SHA256);
    let mut buffer = vec![0; CHUNK_BYTES.min(size as usize)];
    let mut offset = 0;
    while offset < size {
        let piece = (size - offset).min(buffer.len() as u64) as usize;
        fill(seed, offset, &mut buffer[..piece]);
        file.write_all(&buffer[..piece])?;
        sum.update(&buffer[..piece]);
        offset += piece as u64;
    }
    Ok(hex(sum.finish().as_ref()))
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(2, |n| n.get())
}

/// Size and SHA-256 of a file's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSum {
    /// Bytes.
    pub size: u64,
    /// Lower-case hexadecimal.
    pub sha256: String,
}

/// What a tree holds: all regular files by relative path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    /// The files.
    pub files: BTreeMap<PathBuf, FileSum>,
}

/// What a verification read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verified {
    /// Files that were compared.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
}

impl Manifest {
    /// Reads a whole tree.
    ///
    /// # Errors
    /// When something in it cannot be read.
    pub fn of_tree(dir: &Path) -> Result<Manifest> {
        let entries = in_parallel(&regular_files(dir)?, threads(), |relative| {
            let sum = sum_of(&dir.join(relative)).with_context(|| format!("read {}", relative.display()))?;
            Ok((relative.clone(), sum))
        })?;
        Ok(Manifest { files: entries.into_iter().collect() })
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.values().map(|f| f.size).sum()
    }

    /// The files below one directory of the tree, relative to it.
    pub fn below(&self, prefix: &Path) -> Manifest {
        let inside = |(p, s): (&PathBuf, &FileSum)| Some((p.strip_prefix(prefix).ok()?.to_path_buf(), s.clone()));
        Manifest { files: self.files.iter().filter_map(inside).collect() }
    }

    /// Writes one line per file: sum, size, percent-encoded path.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, to: &Path) -> Result<()> {
        let mut out = BufWriter::new(File::create(to).with_context(|| to.display().to_string())?);
        for (path, sum) in &self.files {
            writeln!(out, "{} {} {}", sum.sha256, sum.size, encode(path.as_os_str().as_bytes(), true))?;
        }
        Ok(out.flush()?)
    }

    /// Reads what [`Manifest::save`] wrote.
    ///
    /// # Errors
    /// When it cannot be read or a line is malformed; the message names the line.
    pub fn load(from: &Path) -> Result<Manifest> {
        let mut files = BTreeMap::new();
        for (number, line) in
            BufReader::new(File::open(from).with_context(|| from.display().to_string())?).lines().enumerate()
        {
            let line = line?;
            let parts: Vec<&str> = line.split(' ').collect();
            let [sha256, size, path] = parts[..] else {
                bail!("{}:{}: not a manifest line", from.display(), number + 1)
            };
            let size = size.parse().with_context(|| format!("{}:{}", from.display(), number + 1))?;
            let path = OsString::from_vec(percent_decode_str(path).collect());
            files.insert(path.into(), FileSum { size, sha256: sha256.to_string() });
        }
        Ok(Manifest { files })
    }

    /// Compares every name and every byte below `dir` with the manifest, by `readers` threads.
    ///
    /// # Errors
    /// When anything is missing, too much or different: the message names the first twenty and counts the rest.
    pub fn verify(&self, dir: &Path, readers: usize) -> Result<Verified> {
        let differences = Mutex::new(Vec::new());
        let report = |text: String| differences.lock().expect("no reader panics").push(text);
        match regular_files(dir) {
            Err(e) => report(format!("{e:#}")),
            Ok(found) => {
                for extra in found.iter().filter(|p| !self.files.contains_key(*p)) {
                    report(format!("{:?} should not be there", extra));
                }
                let found: std::collections::BTreeSet<PathBuf> = found.into_iter().collect();
                for missing in self.files.keys().filter(|p| !found.contains(*p)) {
                    report(format!("{:?} is not listed", missing));
                }
            }
        }
        let bytes = AtomicU64::new(0);
        let wanted: Vec<(&PathBuf, &FileSum)> = self.files.iter().collect();
        in_parallel(&wanted, readers, |(relative, want)| {
            match sum_of(&dir.join(relative)) {
                Ok(got) if got == **want => {
                    bytes.fetch_add(got.size, Relaxed);
                }
                Ok(got) if got.size != want.size => {
                    report(format!("{relative:?} has {} bytes, not {}", got.size, want.size))
                }
                Ok(_) => report(format!("{relative:?} has other bytes")),
                Err(e) => report(format!("{relative:?} cannot be read: {e:#}")),
            }
            Ok(())
        })?;
        let differences = differences.into_inner().expect("no reader panics");
        if differences.is_empty() {
            return Ok(Verified { files: wanted.len(), bytes: bytes.into_inner() });
        }
        let shown = differences[..differences.len().min(SHOWN_DIFFERENCES)].join("\n  ");
        bail!("{} differs from its manifest in {} places:\n  {shown}", dir.display(), differences.len())
    }
}

fn sum_of(path: &Path) -> Result<FileSum> {
    let mut file = File::open(path)?;
    let mut sum = digest::Context::new(&digest::SHA256);
    let mut size = 0;
    let mut buffer = vec![0; 128 << 10];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok(FileSum { size, sha256: hex(sum.finish().as_ref()) });
        }
        sum.update(&buffer[..n]);
        size += n as u64;
    }
}

/// Runs `work` over all items on some threads; results in any order, the first error ends it.
fn in_parallel<I: Sync, O: Send>(items: &[I], threads: usize, work: impl Fn(&I) -> Result<O> + Sync) -> Result<Vec<O>> {
    let next = AtomicUsize::new(0);
    let run = || -> Result<Vec<O>> {
        let mut out = Vec::new();
        while let Some(item) = items.get(next.fetch_add(1, Relaxed)) {
            match work(item) {
                Ok(o) => out.push(o),
                Err(e) => {
                    next.store(items.len(), Relaxed);
                    return Err(e);
                }
            }
        }
        Ok(out)
    };
    std::thread::scope(|s| {
        let workers: Vec<_> = (0..threads.max(1)).map(|_| s.spawn(run)).collect();
        let mut all = Vec::with_capacity(items.len());
        for worker in workers {
            all.extend(worker.join().expect("a data thread panicked")?);
        }
        Ok(all)
    })
}

/// Relative paths of all regular files below `dir`, sorted.
///
/// # Errors
/// When a directory cannot be read.
pub fn regular_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut stack = vec![PathBuf::new()];
    while let Some(relative) = stack.pop() {
        let at = dir.join(&relative);
        for entry in fs::read_dir(&at).with_context(|| at.display().to_string())? {
            let entry = entry?;
            let kind = entry.file_type()?;
            let name = relative.join(entry.file_name());
            if kind.is_dir() {
                stack.push(name);
            } else if kind.is_file() {
                found.push(name);
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn bytes_depend_on_path_and_offset_only() {
        let mut whole = vec![0; 100];
        fill(7, 0, &mut whole);
        for (start, end) in [(0, 1), (3, 21), (3, 5), (8, 16), (8, 13), (99, 100), (50, 50)] {
            let mut part = vec![0; end - start];
            fill(7, start as u64, &mut part);
            assert_eq!(part, whole[start..end]);
        }
        assert_ne!(seed_of(Path::new("ab")), seed_of(Path::new("ba")));
    }

    #[test]
    fn the_e2e_plan_is_what_was_promised() {
        let files = plan(Profile::E2e);
        assert!(files.len() > 10_000);
        assert_eq!((files.values().min(), files.values().max()), (Some(&0), Some(&(1 << 30))));
        assert!(files.values().sum::<u64>() < 3 << 30);
        for path in files.keys() {
            let bytes = path.as_os_str().as_bytes();
            assert!(bytes.len() <= 1024 && std::str::from_utf8(bytes).is_ok(), "{path:?} could be no object key");
            assert!(path.iter().all(|part| part.len() <= 255));
        }
    }

    #[test]
    fn a_manifest_finds_every_difference() {
        let dir = crate::scratch("data").unwrap();
        let root = dir.path().join("tree");
        fs::create_dir(&root).unwrap();
        let made = make_tree(&root, Profile::Small).unwrap();
        add_nas_oddities(&root).unwrap();
        let manifest = Manifest::of_tree(&root).unwrap();
        assert!(made.files.iter().all(|(p, s)| manifest.files.get(p) == Some(s)));
        let file = dir.path().join("manifest");
        manifest.save(&file).unwrap();
        assert_eq!(Manifest::load(&file).unwrap(), manifest);
        let want = Verified { files: manifest.files.len(), bytes: manifest.bytes() };
        assert_eq!(manifest.verify(&root, 4).unwrap(), want);
        assert_eq!(manifest.below(Path::new("edge")).files.len(), EDGE_SIZES.len());

        let damaged = File::options().write(true).open(root.join("edge/262145.bin")).unwrap();
        damaged.write_all_at(b"!", 200_000).unwrap();
        File::options().write(true).open(root.join("edge/4097.bin")).unwrap().set_len(4096).unwrap();
        fs::remove_file(root.join("order/a0")).unwrap();
        fs::write(root.join("extra"), b"").unwrap();
        let e = manifest.verify(&root, 4).unwrap_err().to_string();
        for part in [
            "\"edge/262145.bin\" has other bytes",
            "\"edge/4097.bin\" has 4096 bytes, not 4097",
            "\"order/a0\" is not listed",
            "\"order/a0\" cannot be read",
            "\"extra\" should not be there",
            "in 5 places",
        ] {
            assert!(e.contains(part), "{part}: {e}");
        }
    }
}
