//! SeaweedFS as a real S3 server: one process with master, volume server, filer and S3 gateway.
//!
//! It checks signatures (a wrong key is refused), and lists `d/x` before `d-x`, unlike S3 itself: tests that need key order use
//! [`crate::moto::Moto`] or our own server.

use crate::port::Port;
use crate::process::{Guarded, START_DEADLINE, connects, scratch};
use crate::{S3Target, http, venv};
use anyhow::Result;
use serde_json::json;
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;

/// A running SeaweedFS; stopped on drop.
#[derive(Debug)]
pub struct Weed {
    child: Guarded,
    s3: Port,
    _others: [Port; 7],
    _data: TempDir,
}

impl Weed {
    /// Starts a server with one identity (key `efckey`, secret `efcsecret`) that may do everything. Up in about three seconds.
    ///
    /// # Errors
    /// When it is not installed or does not come up; the message carries its log.
    pub fn start() -> Result<Weed> {
        let data = scratch("weed")?;
        let target = S3Target::default();
        let identity = json!({"name": "test", "actions": ["Admin", "Read", "Write", "List", "Tagging"],
            "credentials": [{"accessKey": target.key_id, "secretKey": target.secret}]});
        let config = data.path().join("s3.json");
        std::fs::write(&config, json!({"identities": [identity]}).to_string())?;
        let s3 = Port::lease()?;
        let others: [Port; 7] = Port::lease_many()?;
        let [master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3_grpc] =
            others.each_ref().map(Port::number);
        let mut command = Command::new(venv::program("weed")?);
        command.args(["-logtostderr=true", "-v=0", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]);
        command.arg(format!("-dir={}", data.path().display()));
        command.args([format!("-master.port={master}"), format!("-master.port.grpc={master_grpc}")]);
        command.args(["-master.telemetry=false", "-master.volumeSizeLimitMB=1024"]);
        command.args([format!("-volume.port={volume}"), format!("-volume.port.grpc={volume_grpc}")]);
        command.args(["-volume.max=100", "-volume.index=memory"]);
        command.args(["-filer".into(), format!("-filer.port={filer}"), format!("-filer.port.grpc={filer_grpc}")]);
        command.args(["-s3".into(), format!("-s3.port={}", s3.number()), format!("-s3.port.grpc={s3_grpc}")]);
        command.arg(format!("-s3.config={}", config.display()));
        let child = Guarded::spawn("weed", command, data.path())?;
        let mut server = Weed { child, s3, _others: others, _data: data };
        server.wait_ready(volume)?;
        Ok(server)
    }

    /// Endpoint, keys and region to reach it.
    pub fn target(&self) -> S3Target {
        S3Target { endpoint: format!("http://127.0.0.1:{}", self.s3.number()), ..S3Target::default() }
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// SIGKILL, as a crash.
    pub fn kill(&mut self) {
        self.child.kill_hard();
    }

    /// The S3 gateway opens its port last but answers errors until the filer and a volume server have found the master: a bucket
    /// with an object that can be written is the only honest sign.
    fn wait_ready(&mut self, volume: u16) -> Result<()> {
        let s3 = self.s3.number();
        let target = self.target();
        self.child.wait_until("S3 answered", START_DEADLINE, || connects(volume) && connects(s3))?;
        self.child.wait_until("an object could be written", START_DEADLINE, || {
            let done = |answer: Result<http::Answer>| answer.is_ok_and(|a| a.status < 300);
            let put =
                done(target.request("PUT", "/efc-ready", b"")) && done(target.request("PUT", "/efc-ready/x", b"x"));
            if !put {
                std::thread::sleep(Duration::from_millis(50));
            }
            put && done(target.request("DELETE", "/efc-ready/x", b""))
                && done(target.request("DELETE", "/efc-ready", b""))
        })
    }
}
