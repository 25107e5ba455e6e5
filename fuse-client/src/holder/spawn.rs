//! Starting another process without a copy of this one.
//!
//! fork(2) shares all pages of a process with its child until they are written again, also those into which requests are read; what comes of that for one that is killed in that moment is said
//! in [`crate::kernel::buffers`]. posix_spawn(3) shares nothing.

use efc_common::{Error, Kind, Result};
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use nix::sys::signal::SigSet;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::ffi::{CString, OsString};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

/// A process that was started by this one.
pub(super) struct Spawned {
    pub(super) pid: u32,
    /// Readable when it has ended (pidfd).
    pub(super) ended: OwnedFd,
}

fn system(e: nix::errno::Errno) -> Error {
    std::io::Error::from(e).into()
}

fn text(text: OsString) -> Result<CString> {
    CString::new(text.into_vec()).map_err(|e| Error::new(Kind::Invalid, "an argument has a zero byte").caused_by(e))
}

/// Starts `program` with `args`, of which the first is its name, and exactly `env`; with nothing to read, no signal blocked, and `files` from number `first` on.
pub(super) fn spawn(
    program: &Path,
    args: impl IntoIterator<Item = OsString>,
    env: impl IntoIterator<Item = (OsString, OsString)>,
    files: &[&OwnedFd],
    first: RawFd,
    own_group: bool,
) -> Result<Spawned> {
    // Out of the way of where they are to be.
    let above = first + files.len() as RawFd;
    let move_up = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, above).map_err(|e| std::io::Error::from(e).into());
    let moved = files.iter().map(|fd| move_up(fd)).collect::<Result<Vec<OwnedFd>>>()?;
    let nothing = move_up(&File::open("/dev/null")?.into())?;
    let mut actions = PosixSpawnFileActions::init().map_err(system)?;
    actions.add_dup2(nothing.as_raw_fd(), 0).map_err(system)?;
    for (to, from) in (first..).zip(&moved) {
        actions.add_dup2(from.as_raw_fd(), to).map_err(system)?;
    }
    let mut attributes = PosixSpawnAttr::init().map_err(system)?;
    attributes.set_sigmask(&SigSet::empty()).map_err(system)?;
    let mut flags = PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK;
    if own_group {
        attributes.set_pgroup(nix::unistd::Pid::from_raw(0)).map_err(system)?;
        flags |= PosixSpawnFlags::POSIX_SPAWN_SETPGROUP;
    }
    attributes.set_flags(flags).map_err(system)?;
    let args = args.into_iter().map(text).collect::<Result<Vec<_>>>()?;
    let env = env.into_iter().map(|(mut name, value)| {
        name.push("=");
        name.push(value);
        text(name)
    });
    let env = env.collect::<Result<Vec<_>>>()?;
    let pid = posix_spawn(program, &actions, &attributes, &args, &env)
        .map_err(|e| system(e).with("program", program.display()))?;
    let process = Pid::from_raw(pid.as_raw()).ok_or_else(|| Error::new(Kind::Invalid, "impossible process"))?;
    let ended = pidfd_open(process, PidfdFlags::empty()).map_err(std::io::Error::from)?;
    Ok(Spawned { pid: pid.as_raw() as u32, ended })
}

impl Spawned {
    /// Waits for its end.
    pub(super) fn wait(&self) -> Result<WaitStatus> {
        waitid(Id::PIDFd(self.ended.as_fd()), WaitPidFlag::WEXITED).map_err(system)
    }
}

/// How a process ended, for people.
pub(super) fn show(status: &WaitStatus) -> String {
    match status {
        WaitStatus::Exited(_, code) => format!("exit status: {code}"),
        WaitStatus::Signaled(_, signal, _) => format!("signal: {} ({signal})", *signal as i32),
        other => format!("{other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn files_are_where_they_are_to_be() {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("pipe");
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("f");
        File::create(&path).expect("create").write_all(b"kept").expect("write");
        let file: OwnedFd = File::open(&path).expect("open").into();
        let script = "cat <&8 >&7; read nothing || echo \" $A\" >&7; exit 3";
        let args = ["sh", "-c", script].map(OsString::from);
        let child =
            spawn(Path::new("/bin/sh"), args, [("A".into(), "b".into())], &[&write, &file], 7, true).expect("spawn");
        drop(write);
        let mut said = String::new();
        File::from(read).read_to_string(&mut said).expect("read");
        assert_eq!(said, "kept b\n");
        assert_eq!(show(&child.wait().expect("wait")), "exit status: 3");
        assert!(spawn(Path::new("/no/such"), args_of("x"), [], &[], 3, false).is_err());
        assert!(spawn(Path::new("/bin/sh"), args_of("a\0b"), [], &[], 3, false).is_err_and(|e| e.is(Kind::Invalid)));
    }

    fn args_of(arg: &str) -> [OsString; 1] {
        [OsString::from_vec(arg.as_bytes().to_vec())]
    }
}
