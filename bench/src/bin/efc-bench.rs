//! `efc-bench`: see `efc-bench --help` and `bench/README.md`.

use std::process::ExitCode;

fn main() -> ExitCode {
    efc_bench::cli::main()
}
