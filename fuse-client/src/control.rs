//! The local control socket of a mount: how `efc-fuse stats`, `umount`, `upgrade` and `efc warmup` find and talk to the process behind a
//! mountpoint.
//!
//! `/run/efc/HASH.sock` (mode 0600), HASH from the mountpoint's path. A request is one JSON line, the answer one JSON line, or several for
//! a command that reports progress, the last one with `done` or `error`. Lines are bounded.

use crate::kernel::Mount;
use crate::shared::Place;
use efc_common::id::{ContentId, hex};
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tracing::warn;

/// Longest request or answer line, bytes.
const LINE_BYTES_MAX: u64 = 4 << 20;
/// How long a client may take to say what it wants.
const REQUEST_DEADLINE: Duration = Duration::from_secs(5);

/// What can be asked of a mount process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "snake_case")]
pub enum Request {
    /// Who serves this mount.
    Status,
    /// Counters.
    Stats,
    /// Prometheus text.
    Metrics,
    /// Forget what is remembered of a path (relative to the mount's root) and below.
    Refresh {
        /// The path; empty: everything.
        path: String,
    },
    /// Files with changes that the origin has not.
    Dirty {
        /// Give the changes of this one up (path relative to the mount's root).
        discard: Option<String>,
    },
    /// What happened to the processes of this mount.
    History,
    /// How it ends, which it is about to do: `missing` is null when all that was written is at the origin, else why it is not and will not be.
    End,
    /// Take these options over while serving ([`crate::options::all_live`]), and have successors do so.
    Set {
        /// `-o` texts, an option each.
        options: Vec<String>,
    },
    /// Have another program serve the mount. Answered when it was tried; how it ended is in the history.
    Upgrade {
        /// Its number in the history, chosen by the asker.
        id: u64,
        /// Path of the program; none: that of the mount's own process.
        program: Option<PathBuf>,
        /// Mount options (`name=value`) that come after those of the mount.
        options: Vec<String>,
    },
    /// Fill the workers' cache with these paths (relative to the mount's root); progress lines come back, the last one has `done`.
    Warm {
        /// Files or directories (taken with all below them).
        paths: Vec<String>,
    },
}

impl Request {
    /// The same, of paths below `root`.
    fn below(&self, root: &Path) -> Request {
        let root = root.to_string_lossy();
        let join = |path: &String| format!("{}/{path}", root.trim_matches('/')).trim_matches('/').to_string();
        match self.clone() {
            Request::Refresh { path } => Request::Refresh { path: join(&path) },
            Request::Dirty { discard } => Request::Dirty { discard: discard.as_ref().map(join) },
            Request::Warm { paths } => Request::Warm { paths: paths.iter().map(join).collect() },
            other => other,
        }
    }
}

/// Answers a request: sends one or more JSON values.
pub trait Handler: Send + Sync + 'static {
    /// Answers `request` through `out`; the connection closes when it returns or when the asker went away (`out` is closed).
    fn handle(&self, request: Request, out: mpsc::Sender<serde_json::Value>) -> futures::future::BoxFuture<'_, ()>;
}

/// Directory of control sockets; `EFC_RUN_DIR` moves it (tests).
pub fn run_dir() -> PathBuf {
    std::env::var_os("EFC_RUN_DIR").map_or_else(|| PathBuf::from("/run/efc"), PathBuf::from)
}

/// The control socket of a mountpoint (an absolute path without symbolic links).
pub fn socket_path(mountpoint: &Path) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    let hash = ContentId::of(&[b"mountpoint", mountpoint.as_os_str().as_bytes()]);
    run_dir().join(format!("{}.sock", hex(&hash.0[..8])))
}

/// A listening control socket; removed on drop.
pub struct ControlSocket {
    path: PathBuf,
    inode: u64,
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // That of another mount, which took the place of one that was detached, stays.
        if std::fs::metadata(&self.path).is_ok_and(|m| m.ino() == self.inode) {
            // Gone already: nothing to do about it.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Listens for control requests of `mountpoint`.
///
/// # Errors
/// When the socket cannot be made.
pub fn listen(mountpoint: &Path, handler: Arc<dyn Handler>, tasks: &TaskGroup) -> Result<ControlSocket> {
    let path = socket_path(mountpoint);
    let dir = run_dir();
    std::fs::create_dir_all(&dir).map_err(|e| Error::from(e).with("dir", dir.display()))?;
    // Bound under a name of our own first, so that a predecessor's socket is replaced in one step.
    let fresh = dir.join(format!("{}.new", std::process::id()));
    let _ = std::fs::remove_file(&fresh);
    let listener = UnixListener::bind(&fresh).map_err(|e| Error::from(e).with("socket", fresh.display()))?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600))?;
    let inode = std::fs::metadata(&fresh)?.ino();
    std::fs::rename(&fresh, &path)?;
    let group = tasks.clone();
    tasks.spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let (handler, tasks) = (handler.clone(), group.clone());
                    group.spawn_graceful(async move {
                        tokio::select! {
                            // First: an answer that is there when the mount ends is still given.
                            biased;
                            served = serve(stream, handler) => {
                                if let Err(e) = served {
                                    warn!(error = %e, "control request failed");
                                }
                            }
                            () = tasks.stopped() => {}
                        }
                    });
                }
                Err(e) => {
                    warn!(error = %e, "control socket cannot accept");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        }
    });
    Ok(ControlSocket { path, inode })
}

async fn serve(stream: UnixStream, handler: Arc<dyn Handler>) -> Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    let mut reader = BufReader::new(read.take(LINE_BYTES_MAX));
    let n = tokio::time::timeout(REQUEST_DEADLINE, reader.read_line(&mut line))
        .await
        .map_err(|_| Error::new(Kind::Timeout, "control client said nothing"))??;
    if n == 0 {
        return Ok(());
    }
    let request: Request = match serde_json::from_str(&line) {
        Ok(r) => r,
        Err(e) => {
            let answer = serde_json::json!({ "error": format!("request is not understood: {e}") });
            return send(&mut write, &answer).await;
        }
    };
    let (tx, mut rx) = mpsc::channel(16);
    let work = handler.handle(request, tx);
    let pump = async move {
        while let Some(value) = rx.recv().await {
            if send(&mut write, &value).await.is_err() {
                // The asker went away; closing the channel tells the handler.
                return;
            }
        }
    };
    // In this order: what was found out goes out at once.
    futures::join!(work, pump);
    Ok(())
}

async fn send(write: &mut tokio::net::unix::OwnedWriteHalf, value: &serde_json::Value) -> Result<()> {
    let mut line = value.to_string();
    line.push('\n');
    Ok(write.write_all(line.as_bytes()).await?)
}

/// Is there a mount of EFC's at this path? Only what is written is looked at: one that does not answer is not touched.
pub fn is_mount(path: &Path) -> bool {
    socket_path(path).exists() || shared(path).is_some()
}

/// The shared mount of which a directory is bound at `mountpoint`, and that directory.
fn shared(mountpoint: &Path) -> Option<(PathBuf, PathBuf)> {
    if socket_path(mountpoint).exists() {
        return None;
    }
    let places = Mount::existing(mountpoint).ok()?.places().ok()?;
    let (_, root) = places.iter().rev().find(|(place, _)| place == mountpoint)?;
    let mount = places.iter().map(|(place, _)| place).find(|place| Place::at(place).is_some())?;
    Some((mount.clone(), root.clone()))
}

/// Asks the process behind `mountpoint` and hands each answer to `each`, until it closes.
///
/// # Errors
/// [`Kind::NotFound`] when no EFC process serves the mountpoint; what the process answered as `error`.
pub async fn ask(mountpoint: &Path, request: &Request, mut each: impl FnMut(serde_json::Value)) -> Result<()> {
    let (path, request) = match shared(mountpoint) {
        Some((mount, root)) => (socket_path(&mount), request.below(&root)),
        None => (socket_path(mountpoint), request.clone()),
    };
    let mut stream = UnixStream::connect(&path).await.map_err(|e| {
        Error::new(Kind::NotFound, format!("no EFC process serves {}", mountpoint.display())).caused_by(e)
    })?;
    let mut line = serde_json::to_string(&request).map_err(|e| Error::new(Kind::Invalid, "request").caused_by(e))?;
    line.push('\n');
    stream.write_all(line.as_bytes()).await?;
    let mut lines = BufReader::new(stream).lines();
    loop {
        let line = match lines.next_line().await {
            Ok(Some(line)) => line,
            Ok(None) => break,
            // It ended: what it had to say it has said.
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(e) => return Err(e.into()),
        };
        let value: serde_json::Value = serde_json::from_str(&line)
            .map_err(|e| Error::new(Kind::Corrupt, "answer of the mount process").caused_by(e))?;
        if let Some(text) = value.get("error").and_then(|e| e.as_str()) {
            return Err(Error::new(Kind::Io, text));
        }
        each(value);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;
    impl Handler for Echo {
        fn handle(&self, request: Request, out: mpsc::Sender<serde_json::Value>) -> futures::future::BoxFuture<'_, ()> {
            Box::pin(async move {
                let answer = match request {
                    Request::Stats => serde_json::json!({ "n": 1 }),
                    _ => serde_json::json!({ "error": "no" }),
                };
                // The asker may be gone.
                let _ = out.send(answer).await;
            })
        }
    }

    #[tokio::test]
    async fn asks_and_hears() {
        let run = tempfile::tempdir().expect("dir");
        // SAFETY: no other test of this crate reads the environment variable, and none runs in this process before it is set.
        unsafe { std::env::set_var("EFC_RUN_DIR", run.path()) };
        let tasks = TaskGroup::new();
        let mnt = Path::new("/mnt/x");
        assert!(ask(mnt, &Request::Stats, |_| {}).await.is_err_and(|e| e.is(Kind::NotFound)));
        let socket = listen(mnt, Arc::new(Echo), &tasks).expect("listen");
        let mut got = Vec::new();
        ask(mnt, &Request::Stats, |v| got.push(v)).await.expect("stats");
        assert_eq!(got, [serde_json::json!({ "n": 1 })]);
        assert!(ask(mnt, &Request::Metrics, |_| {}).await.is_err_and(|e| e.message() == "no"));
        let mut raw = UnixStream::connect(socket_path(mnt)).await.expect("connect");
        raw.write_all(b"garbage\n").await.expect("write");
        let mut answer = String::new();
        raw.read_to_string(&mut answer).await.expect("read");
        assert!(answer.contains("not understood"), "{answer}");
        drop(socket);
        assert!(!socket_path(mnt).exists());
        assert!(tasks.shutdown(Duration::from_secs(5)).await);
    }
}
