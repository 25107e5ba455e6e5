//! `efc-fuse refresh`.

use super::RefreshArgs;
use crate::control::{self, Request};
use efc_common::{Error, Kind, Result};
use std::path::{Path, PathBuf};

/// Has the mount that `path` lies in forget what it remembers there.
pub fn refresh(args: &RefreshArgs) -> Result<()> {
    let path = std::path::absolute(&args.path)?;
    let (mountpoint, below) = mount_of(&path)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut answer = None;
    let request = Request::Refresh { path: below };
    runtime.block_on(control::ask(&mountpoint, &request, |v| answer = Some(v)))?;
    let answer = answer.ok_or_else(|| Error::new(Kind::Corrupt, "the mount process gave no answer"))?;
    if args.output == "json" {
        println!("{answer}");
    } else {
        println!("{}: {} files and directories will be looked up anew", path.display(), answer["forgotten"]);
    }
    Ok(())
}

/// The EFC mount that `path` lies in, and the path below it. Only texts are compared: a mount that does not answer is not touched.
fn mount_of(path: &Path) -> Result<(PathBuf, String)> {
    let found = path.ancestors().find(|p| control::is_mount(p));
    let mountpoint = found
        .ok_or_else(|| Error::new(Kind::NotFound, format!("{} is in no EFC mount of this machine", path.display())))?;
    let below = path.strip_prefix(mountpoint).unwrap_or(Path::new(""));
    let below =
        below.to_str().ok_or_else(|| Error::new(Kind::Invalid, "the path is not UTF-8; refresh its directory"))?;
    Ok((mountpoint.to_path_buf(), below.to_string()))
}
