//! `efc`: see [`efc_cli`].

fn main() -> std::process::ExitCode {
    efc_cli::main(std::env::args_os())
}
