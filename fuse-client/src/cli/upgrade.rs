//! `efc-fuse upgrade` and `efc-fuse history`.

use super::mount::absolute;
use super::{HistoryArgs, UpgradeArgs};
use crate::control::{self, Request};
use crate::holder::line::Event;
use efc_common::{Error, Kind, Result};
use std::path::Path;
use std::time::{Duration, Instant};

/// For the outcome to be in the history: the new program may take some seconds, and then the old one starts again.
const DEADLINE: Duration = Duration::from_secs(40);
const PAUSE: Duration = Duration::from_millis(20);

/// Has another program serve the mount, and tells how that ended.
pub fn upgrade(args: &UpgradeArgs) -> Result<()> {
    let mountpoint = absolute(&args.mountpoint)?;
    let program = args.binary.as_ref().map(std::path::absolute).transpose()?;
    let id: u64 = rand::random_range(1..=u64::from(u32::MAX));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let request = Request::Upgrade { id, program, options: args.options.clone() };
    runtime.block_on(control::ask(&mountpoint, &request, |_| {}))?;
    let begun = Instant::now();
    let event = loop {
        let found = events(&runtime, &mountpoint).ok().and_then(|all| all.into_iter().find(|e| e.upgrade == id));
        match found {
            Some(event) => break event,
            None if begun.elapsed() > DEADLINE => {
                let text = "it is not known how the upgrade ended: see `efc-fuse history` and the mount's log";
                return Err(Error::new(Kind::Timeout, text));
            }
            None => std::thread::sleep(PAUSE),
        }
    };
    if event.what != "upgrade" {
        let text = format!("the new program did not serve, the old one goes on: {}", event.text);
        return Err(Error::new(Kind::Unsupported, text));
    }
    if args.output == "json" {
        println!("{}", json(&event)?);
    } else {
        println!(
            "{}: served by {} (process {}) after a pause of {} ms",
            mountpoint.display(),
            event.text,
            event.pid,
            event.pause_ms
        );
    }
    Ok(())
}

/// What happened to the processes of the mount.
pub fn history(args: &HistoryArgs) -> Result<()> {
    let mountpoint = absolute(&args.mountpoint)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let all = events(&runtime, &mountpoint)?;
    if args.output == "json" {
        println!("{}", serde_json::json!({ "mountpoint": mountpoint, "events": all }));
        return Ok(());
    }
    if all.is_empty() {
        println!("{}: its first process serves", mountpoint.display());
    }
    for e in all {
        let pid = if e.pid == 0 { String::new() } else { format!(", process {} since", e.pid) };
        println!("{}  {:<14} pause {} ms{pid}  {}", e.at, e.what, e.pause_ms, e.text);
    }
    Ok(())
}

fn events(runtime: &tokio::runtime::Runtime, mountpoint: &Path) -> Result<Vec<Event>> {
    let mut answer = None;
    runtime.block_on(control::ask(mountpoint, &Request::History, |v| answer = Some(v)))?;
    let events = answer.and_then(|v| serde_json::from_value(v["events"].clone()).ok());
    events.ok_or_else(|| Error::new(Kind::Corrupt, "the mount process gave no history"))
}

fn json(event: &Event) -> Result<String> {
    serde_json::to_string(event).map_err(|e| Error::new(Kind::Io, "not shown").caused_by(e))
}
