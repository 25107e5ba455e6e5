//! `efc-fuse set`.

use super::SetArgs;
use super::mount::absolute;
use crate::control::{self, Request};
use crate::options::{self, MountOptions};
use efc_common::Result;

/// Has a mount take options over while it serves.
pub fn set(args: &SetArgs) -> Result<()> {
    let mountpoint = absolute(&args.mountpoint)?;
    // Each argument is one option, commas and all.
    let options: Vec<String> = args.options.iter().map(|o| options::escaped(o)).collect();
    // Told here, where an exit code can say what is wrong.
    MountOptions::parse(&options, (0, 0))?;
    options::check_live(&options)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(control::ask(&mountpoint, &Request::Set { options }, |_| {}))?;
    if args.output == "json" {
        println!("{}", serde_json::json!({ "mountpoint": mountpoint, "set": args.options }));
    } else {
        println!("{}: {}", mountpoint.display(), args.options.join(" "));
    }
    Ok(())
}
