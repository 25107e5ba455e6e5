//! When a process is to end because whoever started it has ended.

use crate::{Error, Kind, Result};
use std::os::fd::{AsFd, OwnedFd};
use tokio::io::AsyncReadExt;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe::Receiver;

/// Whose end is waited for.
#[derive(Debug, Default)]
pub struct Parent {
    /// The process that started this one (not only the thread): readable when it has ended.
    process: Option<AsyncFd<OwnedFd>>,
    /// Standard input: a pipe whose other end several processes may hold.
    lifeline: Option<Receiver>,
}

impl Parent {
    /// Begins to watch what is asked for.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a standard input that is no pipe; [`Kind::NotFound`] when the parent has ended already.
    pub fn watch(process: bool, lifeline: bool) -> Result<Parent> {
        Ok(Parent {
            process: if process { Some(parent_process()?) } else { None },
            lifeline: if lifeline { Some(standard_input()?) } else { None },
        })
    }

    /// Waits for the end of one of them; for ever if none is watched.
    pub async fn ended(&mut self) {
        let (process, lifeline) = (&self.process, &mut self.lifeline);
        let process = async {
            match process {
                Some(process) => drop(process.readable().await),
                None => std::future::pending().await,
            }
        };
        let lifeline = async {
            let Some(line) = lifeline else { return std::future::pending().await };
            // Nothing is said there; what is all the same means nothing.
            while line.read(&mut [0; 64]).await.is_ok_and(|n| n > 0) {}
        };
        tokio::select! {
            () = process => {}
            () = lifeline => {}
        }
    }
}

fn parent_process() -> Result<AsyncFd<OwnedFd>> {
    let gone = || Error::new(Kind::NotFound, "--parent-death: the process that started this one is not to be seen");
    let parent = rustix::process::getppid().ok_or_else(gone)?;
    let fd = rustix::process::pidfd_open(parent, rustix::process::PidfdFlags::empty());
    let fd = fd.map_err(|e| gone().caused_by(e))?;
    if rustix::process::getppid() != Some(parent) {
        return Err(gone());
    }
    // SAFETY: the OwnedFd is the one descriptor, stays the same and open for as long as the AsyncFd holds it.
    unsafe { AsyncFd::register(fd) }.map_err(|e| Error::new(Kind::Io, "--parent-death").caused_by(e))
}

fn standard_input() -> Result<Receiver> {
    let no_pipe = |e| Error::new(Kind::Invalid, "--lifeline: standard input is not a pipe").caused_by(e);
    let fd = std::io::stdin().as_fd().try_clone_to_owned()?;
    Receiver::from_owned_fd(fd).map_err(no_pipe)
}
