//! `efc-fuse`: mounts, and the commands around a mount. Called `mount.efc`, it is mount(8)'s helper.

use std::process::ExitCode;

fn main() -> ExitCode {
    efc_fuse::cli::main(std::env::args_os())
}
