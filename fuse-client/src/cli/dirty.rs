//! `efc-fuse dirty`.

use super::DirtyArgs;
use crate::control::{self, Request};
use crate::fs::refresh::Dirty;
use efc_common::units::show_bytes;
use efc_common::{Error, Kind, Result};

/// Shows which files of a mount wait for the store, or gives one up.
pub fn dirty(args: &DirtyArgs) -> Result<()> {
    let mountpoint = std::path::absolute(&args.mountpoint)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut answer = None;
    let request = Request::Dirty { discard: args.discard.clone() };
    runtime.block_on(control::ask(&mountpoint, &request, |v| answer = Some(v)))?;
    let answer = answer.ok_or_else(|| Error::new(Kind::Corrupt, "the mount process gave no answer"))?;
    if args.output == "json" {
        println!("{answer}");
        return Ok(());
    }
    let files: Vec<Dirty> = serde_json::from_value(answer["files"].clone()).map_err(|e| {
        Error::new(Kind::Corrupt, "the mount process gave an answer that is not understood").caused_by(e)
    })?;
    for f in &files {
        println!(
            "{:>10}  {}{}",
            show_bytes(f.bytes),
            f.path,
            f.error.as_ref().map_or(String::new(), |e| format!(": {e}"))
        );
    }
    println!("{} files have changes that the store has not", files.len());
    Ok(())
}
