//! Local paths inside an EFC mount: which mount they are in, and the control socket of the process that serves it.
//!
//! The protocol is the mount process's (`fuse-client/src/control.rs`): one JSON line asks, JSON lines answer, the last one with `done`
//! or `error`. A path is looked up as text first, so that a mount that hangs is not touched.

use efc_common::error::Context as _;
use efc_common::id::{ContentId, hex};
use efc_common::{Error, Kind, Result};
use serde::Deserialize;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// File-system type of our mounts.
const FS_TYPE: &[u8] = b"fuse.efc";
/// Longest line of an answer, bytes.
const LINE_BYTES_MAX: u64 = 4 << 20;
/// A mount process that reports progress is not silent for longer.
const SILENCE: Duration = Duration::from_secs(120);
/// Of connecting and asking.
const ASK_DEADLINE: Duration = Duration::from_secs(5);

/// A path inside an EFC mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Located {
    /// Where the file system as a whole is mounted.
    pub(crate) mountpoint: PathBuf,
    /// The path in it, relative to its root; empty for the root.
    pub(crate) path: String,
}

/// A line of `/proc/self/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mount {
    device: Vec<u8>,
    root: PathBuf,
    point: PathBuf,
    ours: bool,
}

/// The EFC mount that `path` is in.
///
/// # Errors
/// [`Kind::Invalid`] for a path that is in none, or whose name is not UTF-8.
pub(crate) fn locate(path: &Path) -> Result<Located> {
    let table = std::fs::read("/proc/self/mountinfo").map_err(Error::from).context("/proc/self/mountinfo")?;
    let mounts = parse_mountinfo(&table);
    let plain = std::path::absolute(path)?;
    if let Some(found) = find(&mounts, &plain) {
        return found;
    }
    // It may lead into a mount by a symbolic link.
    let real = plain.canonicalize().map_err(Error::from).context(format!("{} cannot be found", path.display()))?;
    find(&mounts, &real).unwrap_or_else(|| {
        let what = format!("{} is not inside an EFC mount; give a path in one, or dataset://name/path", path.display());
        Err(Error::new(Kind::Invalid, what))
    })
}

/// The mount on top at `path`, if it is ours; bind mounts are followed to the mount they show a part of.
fn find(mounts: &[Mount], path: &Path) -> Option<Result<Located>> {
    // A later line of the same depth lies on top.
    let top = mounts.iter().filter(|m| path.starts_with(&m.point)).max_by_key(|m| m.point.components().count())?;
    if !top.ours || path.components().any(|c| c == std::path::Component::ParentDir) {
        return None;
    }
    let whole = |m: &&Mount| m.ours && m.device == top.device && m.root == Path::new("/");
    let mountpoint = mounts.iter().rev().find(whole).map_or_else(|| top.point.clone(), |m| m.point.clone());
    let below = path.strip_prefix(&top.point).unwrap_or(Path::new(""));
    let inside = top.root.strip_prefix("/").unwrap_or(&top.root).join(below);
    let inside = inside.as_os_str().as_bytes();
    let inside = inside.strip_suffix(b"/").unwrap_or(inside);
    Some(match std::str::from_utf8(inside) {
        Ok(p) => Ok(Located { mountpoint, path: p.into() }),
        Err(_) => {
            let what = format!("{} is not UTF-8; warm up the directory it is in", path.display());
            Err(Error::new(Kind::Invalid, what))
        }
    })
}

fn parse_mountinfo(table: &[u8]) -> Vec<Mount> {
    let mount = |line: &[u8]| {
        let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
        let dash = fields.iter().position(|f| *f == b"-")?;
        let path = |i: usize| fields.get(i).map(|f| PathBuf::from(unescape(f)));
        Some(Mount {
            device: fields.get(2)?.to_vec(),
            root: path(3)?,
            point: path(4)?,
            ours: *fields.get(dash + 1)? == FS_TYPE,
        })
    };
    table.split(|b| *b == b'\n').filter_map(mount).collect()
}

/// Undoes the kernel's `\ooo` for space, tab, newline and backslash.
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = |d: &[u8]| std::str::from_utf8(d).ok().and_then(|t| u8::from_str_radix(t, 8).ok());
        match tail.get(..3).and_then(octal).filter(|_| *first == b'\\') {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(out)
}

/// A progress line of a warm-up by a mount process: totals so far.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct WarmLine {
    /// Files done.
    pub(crate) files: u64,
    /// Files found.
    pub(crate) files_total: u64,
    /// Bytes done.
    pub(crate) bytes: u64,
    /// Bytes found.
    pub(crate) bytes_total: u64,
    /// Bytes that came from the origin.
    pub(crate) origin_bytes: u64,
    /// Paths that failed so far.
    pub(crate) failed: u64,
    /// Some of them: texts, or objects with `path` and `error`.
    pub(crate) errors: Vec<serde_json::Value>,
    /// The last line.
    pub(crate) done: bool,
    /// The whole request failed.
    pub(crate) error: Option<String>,
}

/// The control socket of a mountpoint, under `run_dir`.
fn socket_path(run_dir: &Path, mountpoint: &Path) -> PathBuf {
    let hash = ContentId::of(&[b"mountpoint", mountpoint.as_os_str().as_bytes()]);
    run_dir.join(format!("{}.sock", hex(&hash.0[..8])))
}

fn run_dir() -> PathBuf {
    PathBuf::from(std::env::var_os("EFC_RUN_DIR").as_deref().unwrap_or(OsStr::new("/run/efc")))
}

/// Has the process behind `mountpoint` warm `paths`, and hands each progress line to `each`. Dropping the future ends the work there.
///
/// # Errors
/// [`Kind::NotFound`] when no process answers for the mountpoint; [`Kind::Io`] with what it says; [`Kind::Timeout`] for silence.
pub(crate) async fn warm(mountpoint: &Path, paths: &[String], each: impl FnMut(WarmLine)) -> Result<()> {
    warm_at(&socket_path(&run_dir(), mountpoint), mountpoint, paths, each).await
}

async fn warm_at(socket: &Path, mountpoint: &Path, paths: &[String], mut each: impl FnMut(WarmLine)) -> Result<()> {
    let process = format!("the process of mount {}", mountpoint.display());
    let silent = |_| Error::new(Kind::Timeout, format!("{process} does not answer"));
    let mut stream = timeout(ASK_DEADLINE, UnixStream::connect(socket)).await.map_err(silent)?.map_err(|e| {
        let kind =
            if e.kind() == std::io::ErrorKind::PermissionDenied { Kind::PermissionDenied } else { Kind::NotFound };
        let what = format!(
            "{process} cannot be asked at {}; run as the user who mounted it, with its EFC_RUN_DIR",
            socket.display()
        );
        Error::new(kind, what).caused_by(e)
    })?;
    let ask = format!("{}\n", serde_json::json!({ "cmd": "warm", "paths": paths }));
    timeout(ASK_DEADLINE, stream.write_all(ask.as_bytes())).await.map_err(silent)??;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        let mut bounded = (&mut reader).take(LINE_BYTES_MAX);
        let n = timeout(SILENCE, bounded.read_until(b'\n', &mut line)).await.map_err(silent)??;
        if n == 0 {
            return Err(Error::new(Kind::Io, format!("{process} ended before the warm-up was done")));
        }
        let line: WarmLine = serde_json::from_slice(&line).map_err(|e| {
            Error::new(Kind::Corrupt, format!("{process} answers in words this `efc` does not know")).caused_by(e)
        })?;
        if let Some(text) = line.error {
            return Err(Error::new(Kind::Io, format!("{process} says: {text}")));
        }
        let done = line.done;
        each(line);
        if done {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    const TABLE: &[u8] = b"20 1 8:1 / / rw - ext4 /dev/a rw\n\
        36 20 0:52 / /mnt/a\\040b rw,nosuid shared:7 - fuse.efc oss://b ro\n\
        37 20 0:52 /sub /bind rw - fuse.efc oss://b ro\n\
        38 36 0:60 / /mnt/a\\040b/x rw - tmpfs tmpfs rw\n\
        garbage\n";

    #[test]
    fn paths_find_their_mount() {
        let mounts = parse_mountinfo(TABLE);
        assert_eq!(mounts.len(), 4);
        let at = |p: &str| find(&mounts, Path::new(p)).map(|l| l.map(|l| (l.mountpoint, l.path)).expect("UTF-8"));
        let point = PathBuf::from("/mnt/a b");
        assert_eq!(at("/mnt/a b"), Some((point.clone(), String::new())));
        assert_eq!(at("/mnt/a b/c/d"), Some((point.clone(), "c/d".into())));
        assert_eq!(at("/bind/y"), Some((point.clone(), "sub/y".into())));
        assert_eq!(at("/bind"), Some((point, "sub".into())));
        assert_eq!([at("/mnt/a b/x/y"), at("/mnt"), at("/mnt/a bc"), at("/mnt/a b/../c")], [None, None, None, None]);
        let odd = PathBuf::from(OsString::from_vec(b"/mnt/a b/\xff".to_vec()));
        assert!(find(&mounts, &odd).is_some_and(|l| l.is_err_and(|e| e.is(Kind::Invalid))));
        assert!(locate(Path::new("/proc")).is_err_and(|e| e.is(Kind::Invalid)));
    }

    #[tokio::test]
    async fn the_mount_process_is_asked_and_heard() {
        let dir = tempfile::tempdir().expect("dir");
        let socket = socket_path(dir.path(), Path::new("/mnt/x"));
        let ask = async |each: &mut Vec<WarmLine>| {
            warm_at(&socket, Path::new("/mnt/x"), &["a".into()], |l| each.push(l)).await
        };
        let mut got = Vec::new();
        assert!(ask(&mut got).await.is_err_and(|e| e.is(Kind::NotFound)));
        let listener = UnixListener::bind(&socket).expect("bind");
        for (answer, good) in [
            (
                "{\"files\":1,\"files_total\":2}\n{\"files\":2,\"files_total\":2,\"errors\":[\"x\"],\"done\":true}\n",
                true,
            ),
            ("{\"error\":\"no\"}\n", false),
            ("{\"files\":1}\n", false),
            ("nonsense\n", false),
        ] {
            got.clear();
            let serve = async {
                let (stream, _) = listener.accept().await.expect("accept");
                let mut stream = BufReader::new(stream);
                let mut line = String::new();
                stream.read_line(&mut line).await.expect("request");
                assert_eq!(line, "{\"cmd\":\"warm\",\"paths\":[\"a\"]}\n");
                stream.write_all(answer.as_bytes()).await.expect("answer");
            };
            let (asked, ()) = tokio::join!(ask(&mut got), serve);
            assert_eq!(asked.is_ok(), good, "{answer}: {asked:?}");
        }
    }
}
