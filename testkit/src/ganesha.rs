//! A private NFS server: Debian's nfs-ganesha over a directory, on ports of its own.
//!
//! Serves NFSv3 (plus MOUNT) and v4.0-4.2 on loopback. NFSv3 makes ganesha register with rpcbind and exit when there is none, so
//! one is started if none answers; it is left running, as the system service that it is, because other servers register there too.
//! What clients of tests use are the port numbers, never the portmapper: with several instances it knows only the last.

use crate::port::Port;
use crate::process::{Guarded, START_DEADLINE, connects, scratch, scratch_root};
use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How a server is set up. The default is what most tests want.
#[derive(Debug, Clone, Default)]
pub struct GaneshaOptions {
    /// Seconds ganesha trusts its own attribute cache; 0 shows changes made below it at once.
    pub attr_expiry_s: u32,
    /// Refuse changes.
    pub read_only: bool,
    /// Speak NFSv4 only (needs no rpcbind).
    pub v4_only: bool,
    /// Map root to nobody.
    pub root_squash: bool,
}

/// A running nfs-ganesha; stopped on drop.
#[derive(Debug)]
pub struct Ganesha {
    child: Guarded,
    export: PathBuf,
    nfs: Port,
    mount: Port,
    _others: [Port; 2],
    state: TempDir,
}

impl Ganesha {
    /// Exports `export_dir` read-write, root not squashed. Up in about one second.
    ///
    /// # Errors
    /// When ganesha is not installed or does not come up; the message carries its log.
    pub fn start(export_dir: &Path) -> Result<Ganesha> {
        Ganesha::start_with(export_dir, &GaneshaOptions::default())
    }

    /// Exports `export_dir` with options.
    ///
    /// # Errors
    /// As [`Ganesha::start`].
    pub fn start_with(export_dir: &Path, options: &GaneshaOptions) -> Result<Ganesha> {
        let export = export_dir.canonicalize().with_context(|| format!("export {}", export_dir.display()))?;
        let state = scratch("ganesha")?;
        fs::create_dir(state.path().join("recov"))?;
        let [nfs, mount, nlm, quota] = Port::lease_many()?;
        let conf = config(&export, state.path(), [&nfs, &mount, &nlm, &quota], options);
        fs::write(state.path().join("ganesha.conf"), conf)?;
        let _turn = turn()?;
        if !options.v4_only {
            ensure_rpcbind()?;
        }
        let child = launch(state.path())?;
        let mut server = Ganesha { child, export, nfs, mount, _others: [nlm, quota], state };
        server.wait_ready()?;
        Ok(server)
    }

    /// Port of NFS.
    pub fn port(&self) -> u16 {
        self.nfs.number()
    }

    /// Port of the MOUNT service (v3). In the v4-only mode nobody listens there.
    pub fn mount_port(&self) -> u16 {
        self.mount.number()
    }

    /// The exported directory: its path is the v3 export path. The v4 pseudo path is `/export`.
    pub fn export(&self) -> &Path {
        &self.export
    }

    /// The source as EFC writes it: `nfs://127.0.0.1:PORT/EXPORT`. Add the option `mount_port` from [`Ganesha::mount_port`].
    pub fn url(&self) -> String {
        format!("nfs://127.0.0.1:{}{}", self.port(), self.export.display())
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// The server's log.
    pub fn log_path(&self) -> PathBuf {
        self.state.path().join("ganesha.log")
    }

    /// SIGKILL, as a crash. The ports stay reserved for [`Ganesha::restart`].
    pub fn kill(&mut self) {
        self.child.kill_hard();
    }

    /// Starts again on the same ports and state, killing the old process first if it still runs.
    ///
    /// # Errors
    /// As [`Ganesha::start`].
    pub fn restart(&mut self) -> Result<()> {
        self.child.kill_hard();
        let _turn = turn()?;
        self.child = launch(self.state.path())?;
        self.wait_ready()
    }

    /// SIGSTOP: connections stay open and nothing answers. Back when all its threads have stopped.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn freeze(&self) -> Result<()> {
        self.child.signal(nix::sys::signal::Signal::SIGSTOP)?;
        let pid = nix::unistd::Pid::from_raw(self.child.pid() as i32);
        waitid(Id::Pid(pid), WaitPidFlag::WSTOPPED).context("wait until ganesha stands still")?;
        Ok(())
    }

    /// SIGCONT after [`Ganesha::freeze`].
    ///
    /// # Errors
    /// When the process is gone.
    pub fn thaw(&self) -> Result<()> {
        self.child.signal(nix::sys::signal::Signal::SIGCONT)
    }

    fn wait_ready(&mut self) -> Result<()> {
        let log = self.log_path();
        let port = self.port();
        // The port opens before the exports are ready. Log lines carry the pid, so those of a process before a restart do not count.
        let us = format!("ganesha-{}[", self.child.pid());
        self.child.wait_until("NFS answered", START_DEADLINE, || {
            let ready = |line: &str| line.contains(&us) && line.contains("NFS SERVER INITIALIZED");
            connects(port) && fs::read_to_string(&log).is_ok_and(|text| text.lines().any(ready))
        })
    }
}

impl Drop for Ganesha {
    fn drop(&mut self) {
        // With open v4 leases a polite stop takes over 10 s, and there is nothing to save.
        self.child.kill_hard();
    }
}

fn launch(state: &Path) -> Result<Guarded> {
    let mut command = Command::new("ganesha.nfsd");
    command.arg("-F").arg("-p").arg(state.join("pid")).arg("-f").arg(state.join("ganesha.conf"));
    command.args(["-L", "STDOUT"]);
    Guarded::spawn("ganesha", command, state)
}

fn config(export: &Path, state: &Path, ports: [&Port; 4], options: &GaneshaOptions) -> String {
    let [nfs, mount, nlm, quota] = ports.map(Port::number);
    let protocols = if options.v4_only { "4" } else { "3, 4" };
    let access = if options.read_only { "RO" } else { "RW" };
    let squash = if options.root_squash { "Root_Squash" } else { "No_Root_Squash" };
    let (export, state, expiry) = (export.display(), state.display(), options.attr_expiry_s);
    format!(
        r#"NFS_CORE_PARAM {{
  Protocols = {protocols};
  NFS_Port = {nfs}; MNT_Port = {mount}; NLM_Port = {nlm}; Rquota_Port = {quota};
  Bind_addr = 127.0.0.1;
  Enable_NLM = false; Enable_RQUOTA = false;
  mount_path_pseudo = false;
}}
NFSv4 {{
  RecoveryBackend = fs; RecoveryRoot = "{state}/recov";
  Minor_Versions = 0, 1, 2;
  Grace_Period = 5; Lease_Lifetime = 20; Graceless = true;
  Only_Numeric_Owners = true; Allow_Numeric_Owners = true;
}}
MDCACHE {{ Entries_HWMark = 200000; }}
EXPORT {{
  Export_Id = 1; Path = "{export}"; Pseudo = /export;
  Access_Type = {access}; Squash = {squash}; SecType = sys; Protocols = {protocols}; Transports = TCP;
  Attr_Expiration_Time = {expiry};
  FSAL {{ Name = VFS; }}
}}
LOG {{ Default_Log_Level = EVENT; }}
"#
    )
}

/// One start at a time on this machine: ganesha clears its program numbers at the portmapper and then sets them, and exits when another
/// one set them in between. Held until the server answers.
fn turn() -> Result<Flock<File>> {
    let lock = File::create(scratch_root()?.join("ganesha.lock"))?;
    Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| e).context("wait for the start of other servers")
}

/// Makes sure that a portmapper answers on loopback; see the module. The caller holds the [`turn`].
fn ensure_rpcbind() -> Result<()> {
    if connects(111) {
        return Ok(());
    }
    // SAFETY: geteuid has no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        bail!("no rpcbind answers on port 111 and only root can start one: `sudo rpcbind -w`");
    }
    fs::create_dir_all("/run/rpcbind")?;
    let log = File::create(scratch_root()?.join("rpcbind.log"))?;
    // Without -f it goes to the background and belongs to init. `-h 127.0.0.1` crashes in Debian 12.
    let status = Command::new("rpcbind")
        .arg("-w")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .status()
        .context("start rpcbind (`./run setup` installs it)")?;
    let deadline = Instant::now() + START_DEADLINE;
    while !connects(111) {
        if Instant::now() > deadline {
            bail!("rpcbind ({status}) does not answer on port 111; see {}/rpcbind.log", scratch_root()?.display());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_servers_at_once_and_a_crash() {
        let dirs = [scratch("export").unwrap(), scratch("export").unwrap()];
        let mut a = Ganesha::start(dirs[0].path()).unwrap();
        let b = Ganesha::start(dirs[1].path()).unwrap();
        assert_ne!(a.port(), b.port());
        assert!(connects(a.mount_port()) && connects(b.mount_port()));
        let (port, pid) = (a.port(), a.pid());
        a.kill();
        assert!(!connects(port) && connects(b.port()));
        a.restart().unwrap();
        assert!(connects(port) && a.pid() != pid && a.port() == port);
    }
}
