//! Logging: `tracing` to stderr or a file, as text or JSON lines. One line per handled error; ERROR means that a person must
//! look, WARN that something was mended or degraded.

use crate::{Error, Kind, Result};
use std::path::Path;
use tracing_subscriber::EnvFilter;

/// Shape of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// Human readable.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl std::str::FromStr for Format {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "text" => Ok(Format::Text),
            "json" => Ok(Format::Json),
            _ => Err(Error::new(Kind::Invalid, format!("log format `{s}` is unknown; use text or json"))),
        }
    }
}

/// Installs the process's logger. `level` is a `tracing` filter such as `info` or `info,efc_worker=debug`; `file` is
/// appended to, stderr is used when it is `None`.
///
/// # Errors
/// [`Kind::Invalid`] for a bad filter, the I/O error of a log file that cannot be opened, [`Kind::AlreadyExists`] when a
/// logger is installed already.
pub fn install(level: &str, format: Format, file: Option<&Path>) -> Result<()> {
    let filter = EnvFilter::try_new(level).map_err(|e| {
        Error::new(Kind::Invalid, format!("log level `{level}` is not a filter; use for example info")).caused_by(e)
    })?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_target(true);
    let installed = match file {
        Some(path) => {
            let out = std::fs::OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .map_err(|e| Error::from(e).with("log-file", path.display()))?;
            let builder = builder.with_ansi(false).with_writer(std::sync::Mutex::new(out));
            match format {
                Format::Text => builder.try_init(),
                Format::Json => builder.json().try_init(),
            }
        }
        None => {
            let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
            let builder = builder.with_ansi(ansi).with_writer(std::io::stderr);
            match format {
                Format::Text => builder.try_init(),
                Format::Json => builder.json().try_init(),
            }
        }
    };
    installed.map_err(|e| Error::new(Kind::AlreadyExists, "a logger is installed already").caused_by(e))
}
