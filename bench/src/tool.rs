//! The tools that are compared: how each is mounted and unmounted.
//!
//! Every mount is registered while it lives, so that Ctrl-C ([`clean_up`]) finds it. A mount that hangs is aborted, never waited for.

use crate::proc::{descendants, is_mounted, wait_gone};
use anyhow::{Context, Result, anyhow, bail, ensure};
use efc_testkit::process::run_to_end;
use efc_testkit::{FuseGuard, Guarded, S3Target};
use nix::mount::{MntFlags, umount2};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long a mount may take to appear, and an unmount with the end of its processes.
const MOUNT_DEADLINE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);

static MOUNTS: Mutex<Vec<Arc<FuseGuard>>> = Mutex::new(Vec::new());

/// What is mounted how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// EFC with an embedded cluster; more mount options.
    Efc(Vec<String>),
    /// Debian's s3fs with a local cache.
    S3fs,
    /// JuiceFS with SQLite metadata, its data imported before.
    Juicefs,
    /// A command of the user with `{endpoint} {bucket} {mountpoint} {cachedir} {datadir}`.
    Command(String),
}

/// One competitor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tool {
    /// Its name in tables.
    pub name: String,
    /// How it is mounted.
    pub kind: Kind,
}

impl Tool {
    /// Reads `--peer`: `s3fs`, `juicefs` or `name=mount command`.
    ///
    /// # Errors
    /// When it is none of them.
    pub fn peer(text: &str) -> Result<Tool> {
        let (name, kind) = match text.split_once('=') {
            None if text == "s3fs" => (text, Kind::S3fs),
            None if text == "juicefs" => (text, Kind::Juicefs),
            Some((name, command)) if !name.is_empty() && !command.trim().is_empty() => {
                (name, Kind::Command(command.into()))
            }
            _ => bail!("peer `{text}` is unknown; use s3fs, juicefs or 'name=mount command'"),
        };
        Ok(Tool { name: name.into(), kind })
    }

    /// The same with more mount options, where those are EFC's.
    pub fn with(&self, options: &[&str]) -> Tool {
        let mut tool = self.clone();
        if let Kind::Efc(all) = &mut tool.kind {
            all.extend(options.iter().map(ToString::to_string));
        }
        tool
    }

    /// Does it run a cluster that a second mount can join?
    pub fn is_efc(&self) -> bool {
        matches!(self.kind, Kind::Efc(_))
    }

    /// What its program says about its version.
    pub fn version(&self) -> String {
        let program = match &self.kind {
            Kind::Efc(_) => beside("efc-fuse"),
            Kind::S3fs => Ok("s3fs".into()),
            Kind::Juicefs => crate::juicefs::program(),
            Kind::Command(_) => return String::new(),
        };
        let output = program.and_then(|p| Ok(Command::new(p).arg("--version").output()?));
        let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
        text.lines().next().unwrap_or_default().into()
    }
}

/// Where a mount finds and puts things.
#[derive(Debug, Clone)]
pub struct Place {
    /// Directory of this mount's mountpoint, cache, state and logs; empty at first.
    pub dir: PathBuf,
    /// `http://host:port` of the S3 server.
    pub endpoint: String,
    /// Where the buckets lie.
    pub origin: PathBuf,
    /// SQLite file of JuiceFS.
    pub juicefs_meta: PathBuf,
}

impl Place {
    fn sub(&self, name: &str) -> Result<PathBuf> {
        let dir = self.dir.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        Ok(dir)
    }
}

/// A program that was built with this one.
///
/// # Errors
/// When it was not.
pub fn beside(name: &str) -> Result<PathBuf> {
    let exe = std::env::current_exe()?;
    // Test programs are one directory deeper.
    let path = exe.ancestors().skip(1).take(2).map(|d| d.join(name)).find(|p| p.exists());
    path.with_context(|| format!("{name} is not beside {}: build it with the same profile", exe.display()))
}

/// The mount command of a tool.
///
/// # Errors
/// When its program is missing or its files cannot be written.
fn command(tool: &Tool, place: &Place, mountpoint: &Path) -> Result<Command> {
    let keys = S3Target { endpoint: place.endpoint.clone(), ..S3Target::default() };
    let cache = place.sub("cache")?;
    let mut command = match &tool.kind {
        Kind::Efc(options) => {
            let mut c = Command::new(beside("efc-fuse")?);
            c.arg("mount").arg("s3://data").arg(mountpoint).arg("-f").arg("--log-file").arg(place.dir.join("efc.log"));
            c.arg("-o").arg(format!("endpoint={},data_dir={}", place.endpoint, place.sub("state")?.display()));
            if !options.iter().any(|o| o.contains("cache_dir=") || o.contains("master=")) {
                c.arg("-o").arg(format!("cache_dir={}", cache.display()));
            }
            for option in options {
                c.arg("-o").arg(option);
            }
            c
        }
        Kind::S3fs => {
            let secret = place.dir.join("passwd");
            fs::write(&secret, format!("{}:{}", keys.key_id, keys.secret))?;
            fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
            let mut c = Command::new("s3fs");
            c.arg("data").arg(mountpoint).arg("-f").arg("-o");
            c.arg(format!(
                "url={},use_path_request_style,passwd_file={},use_cache={}",
                place.endpoint,
                secret.display(),
                cache.display()
            ));
            c
        }
        Kind::Juicefs => crate::juicefs::mount(&place.juicefs_meta, &place.endpoint, &cache, mountpoint)?,
        Kind::Command(text) => {
            let mut text = text.clone();
            for (name, value) in [
                ("{endpoint}", place.endpoint.clone()),
                ("{bucket}", crate::data::BUCKET.into()),
                ("{mountpoint}", mountpoint.display().to_string()),
                ("{cachedir}", cache.display().to_string()),
                ("{datadir}", place.origin.join(crate::data::BUCKET).display().to_string()),
            ] {
                text = text.replace(name, &value);
            }
            let mut c = Command::new("sh");
            c.arg("-c").arg(text);
            c
        }
    };
    command.envs(keys.env());
    Ok(command)
}

/// A live mount; unmounted on drop.
#[derive(Debug)]
pub struct Mounted {
    guard: Arc<FuseGuard>,
    child: Guarded,
    /// The processes behind it.
    pub pids: BTreeSet<i32>,
    place: Place,
}

/// Mounts a tool in an empty place and waits until the mount answers.
///
/// # Errors
/// When it does not come up; the message carries the log.
pub fn mount(tool: &Tool, place: &Place) -> Result<Mounted> {
    let before = descendants();
    let guard = Arc::new(FuseGuard::new(&place.sub("mnt")?)?);
    start(&tool.name, command(tool, place, guard.path())?, guard, place, before)
}

/// Starts a mount command, whichever way it was made.
///
/// # Errors
/// As [`mount`].
pub fn start(
    name: &str,
    command: Command,
    guard: Arc<FuseGuard>,
    place: &Place,
    before: BTreeSet<i32>,
) -> Result<Mounted> {
    MOUNTS.lock().unwrap_or_else(|e| e.into_inner()).push(guard.clone());
    let child = Guarded::spawn(name, command, &place.dir).with_context(|| format!("start the mount of {name}"))?;
    let mut mounted = Mounted { guard, child, pids: BTreeSet::new(), place: place.clone() };
    let deadline = Instant::now() + MOUNT_DEADLINE;
    while !is_mounted(mounted.guard.path()) {
        // A command that puts itself into the background ends well.
        if let Some(status) = mounted.child.wait_exit(Duration::ZERO).filter(|s| !s.success()) {
            bail!("the mount of {name} failed ({status}):\n{}", mounted.child.log_tail());
        }
        ensure!(
            Instant::now() < deadline,
            "{name} did not mount within {MOUNT_DEADLINE:?}:\n{}",
            mounted.child.log_tail()
        );
        std::thread::sleep(POLL);
    }
    let path = mounted.path().to_path_buf();
    let answered = mounted.on_it(MOUNT_DEADLINE, move || Ok(fs::metadata(path)?.is_dir()))?;
    ensure!(answered, "the root of {name} is no directory");
    mounted.pids = descendants().difference(&before).copied().collect();
    Ok(mounted)
}

impl Mounted {
    /// The mountpoint.
    pub fn path(&self) -> &Path {
        self.guard.path()
    }

    /// Runs what touches the mount, with a deadline.
    ///
    /// # Errors
    /// That of `f`, or that time ran out (the mount is aborted then).
    pub fn on_it<T: Send + 'static>(
        &self,
        limit: Duration,
        f: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.guard.with_timeout(limit, f)?
    }

    /// Statistics of an EFC mount.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn efc_stats(&self) -> Result<Value> {
        let mut command = Command::new(beside("efc-fuse")?);
        command.arg("stats").arg(self.path()).args(["-o", "json"]);
        let text = run_to_end("efc-stats", command, Duration::from_secs(20))?;
        serde_json::from_str(&text).with_context(|| format!("read the statistics `{text}`"))
    }

    /// FUSE requests of an EFC mount so far, by operation.
    ///
    /// # Errors
    /// As [`Mounted::efc_stats`].
    pub fn fuse_requests(&self) -> Result<BTreeMap<String, u64>> {
        let stats = self.efc_stats()?;
        let ops = stats.get("ops").and_then(Value::as_object).context("statistics without `ops`")?;
        Ok(ops.iter().filter_map(|(op, s)| Some((op.clone(), s.get("requests")?.as_u64()?))).collect())
    }

    /// Address of the embedded master, as the mount's log tells it.
    ///
    /// # Errors
    /// When the log does not.
    pub fn efc_master(&self) -> Result<String> {
        let log = fs::read_to_string(self.place.dir.join("efc.log"))?;
        let line =
            log.lines().find(|l| l.contains("embedded cluster is up")).context("no embedded cluster in the log")?;
        let address = line.split("master=").nth(1).and_then(|r| r.split_whitespace().next());
        Ok(address.context("no master address in the log")?.trim_matches('"').to_string())
    }

    /// Unmounts and waits for the end of the processes.
    ///
    /// # Errors
    /// When that fails; everything is gone nevertheless.
    pub fn unmount(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let path = self.path().to_path_buf();
        let mut done = Ok(());
        if is_mounted(&path) {
            let mut command = Command::new("umount");
            command.arg(&path);
            done = run_to_end("umount", command, Duration::from_secs(30)).map(drop);
        }
        if is_mounted(&path) {
            let _ = self.guard.abort();
            let _ = umount2(&path, MntFlags::MNT_DETACH);
        }
        let gone = wait_gone(&self.pids, Duration::from_secs(15));
        self.child.stop();
        MOUNTS.lock().unwrap_or_else(|e| e.into_inner()).retain(|g| !Arc::ptr_eq(g, &self.guard));
        done.and(gone).map_err(|e| anyhow!("unmount {}: {e:#}", path.display()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if is_mounted(self.path()) || self.child.is_running() {
            // The cause is on its way up already, or it is a mount command that failed half-way.
            let _ = self.end();
        }
        MOUNTS.lock().unwrap_or_else(|e| e.into_inner()).retain(|g| !Arc::ptr_eq(g, &self.guard));
    }
}

/// Aborts and detaches every live mount and ends all our descendants: for a signal handler's thread.
pub fn clean_up() {
    let mounts = MOUNTS.lock().unwrap_or_else(|e| e.into_inner()).clone();
    for guard in mounts {
        // Whatever fails here is tried no further: the process ends now.
        let _ = guard.abort();
        let _ = umount2(guard.path(), MntFlags::MNT_DETACH);
    }
    let _ = wait_gone(&descendants(), Duration::from_secs(2));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_parsed() {
        assert_eq!(Tool::peer("s3fs").unwrap().kind, Kind::S3fs);
        let own = Tool::peer("x=mnt {bucket} -o a=b").unwrap();
        assert_eq!((own.name.as_str(), own.kind), ("x", Kind::Command("mnt {bucket} -o a=b".into())));
        for bad in ["goofys", "=mount", "x=", ""] {
            assert!(Tool::peer(bad).unwrap_err().to_string().contains("juicefs"), "{bad}");
        }
    }

    #[test]
    fn a_mount_command_that_fails_is_reported_with_its_words() {
        let dir = efc_testkit::scratch("bench-tool").unwrap();
        let place = Place {
            dir: dir.path().into(),
            endpoint: "http://127.0.0.1:1".into(),
            origin: dir.path().into(),
            juicefs_meta: dir.path().join("x.db"),
        };
        let tool = Tool::peer("bad=echo no such {bucket} >&2; exit 3").unwrap();
        let e = mount(&tool, &place).unwrap_err().to_string();
        assert!(e.contains("no such data") && e.contains('3'), "{e}");
    }
}
