//! `efc-fuse stats`.

use super::StatsArgs;
use crate::control::{self, Request};
use crate::stats::Stats;
use efc_common::{Error, Kind, Result};
use std::path::Path;
use std::time::Duration;

/// Shows the statistics of a mount once, or again and again with `--watch`.
pub fn stats(args: &StatsArgs) -> Result<()> {
    let json = match args.output.as_str() {
        "json" => true,
        "table" => false,
        other => return Err(Error::new(Kind::Invalid, format!("output `{other}` is unknown; use table or json"))),
    };
    let mountpoint = super::mount::absolute(&args.mountpoint)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    loop {
        let stats = runtime.block_on(fetch(&mountpoint))?;
        let text = if json {
            serde_json::to_string_pretty(&stats).map_err(|e| Error::new(Kind::Io, "write json").caused_by(e))?
        } else {
            stats.table()
        };
        match args.watch {
            None => {
                println!("{}", text.trim_end());
                return Ok(());
            }
            Some(seconds) => {
                // Clears the screen and goes home.
                print!("\x1b[2J\x1b[H{text}");
                std::thread::sleep(Duration::from_secs(seconds.max(1)));
            }
        }
    }
}

async fn fetch(mountpoint: &Path) -> Result<Stats> {
    let mut found = None;
    control::ask(mountpoint, &Request::Stats, |v| found = serde_json::from_value(v).ok()).await?;
    found.ok_or_else(|| Error::new(Kind::Corrupt, "the mount process gave no statistics"))
}
