//! moto as an S3 server: an exact model of S3's API in memory, slow, lists in key order, accepts any key.

use crate::port::Port;
use crate::process::{Guarded, scratch};
use crate::{S3Target, venv};
use anyhow::Result;
use std::process::Command;
use tempfile::TempDir;

/// A running moto server; stopped on drop.
#[derive(Debug)]
pub struct Moto {
    child: Guarded,
    port: Port,
    _dir: TempDir,
}

impl Moto {
    /// Starts a server without buckets. Up in about two seconds.
    ///
    /// # Errors
    /// When it is not installed or does not come up; the message carries its log.
    pub fn start() -> Result<Moto> {
        let dir = scratch("moto")?;
        let port = Port::lease()?;
        // Through the interpreter: the script's first line breaks when the environment's path is long.
        let mut command = Command::new(venv::program("python")?);
        command.arg(venv::program("moto_server")?).args(["-H", "127.0.0.1", "-p", &port.number().to_string()]);
        let mut child = Guarded::spawn("moto", command, dir.path())?;
        child.wait_port(port.number())?;
        Ok(Moto { child, port, _dir: dir })
    }

    /// Endpoint, keys and region to reach it.
    pub fn target(&self) -> S3Target {
        S3Target { endpoint: format!("http://127.0.0.1:{}", self.port.number()), ..S3Target::default() }
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.pid()
    }
}
