//! Logging: `tracing` to stderr or a file, as text or JSON lines. One line per handled error; ERROR means that a person must
//! look, WARN that something was mended or degraded.

use crate::{Error, Kind, Result};
use std::path::Path;
use std::sync::{Mutex, OnceLock};
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::{EnvFilter, reload};

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

type SetFilter = Box<dyn Fn(EnvFilter) -> Result<()> + Send + Sync>;

/// Replaces the filter of the installed logger.
static SET_FILTER: OnceLock<SetFilter> = OnceLock::new();

fn filter(level: &str) -> Result<EnvFilter> {
    EnvFilter::try_new(level).map_err(|e| {
        Error::new(Kind::Invalid, format!("log level `{level}` is not a filter; use for example info")).caused_by(e)
    })
}

/// Installs the process's logger. `level` is a `tracing` filter such as `info` or `info,efc_worker=debug`; `file` is
/// appended to, stderr is used when it is `None`.
///
/// # Errors
/// [`Kind::Invalid`] for a bad filter, the I/O error of a log file that cannot be opened, [`Kind::AlreadyExists`] when a
/// logger is installed already.
pub fn install(level: &str, format: Format, file: Option<&Path>) -> Result<()> {
    let out = match file {
        Some(path) => {
            let out = std::fs::OpenOptions::new().create(true).append(true).open(path);
            BoxMakeWriter::new(Mutex::new(out.map_err(|e| Error::from(e).with("log-file", path.display()))?))
        }
        None => BoxMakeWriter::new(std::io::stderr),
    };
    let ansi = file.is_none() && std::io::IsTerminal::is_terminal(&std::io::stderr());
    let filter = filter(level)?;
    let builder = tracing_subscriber::fmt().with_ansi(ansi).with_writer(out).with_target(true);
    match format {
        Format::Text => {
            let builder = builder.with_env_filter(filter).with_filter_reloading();
            let handle = builder.reload_handle();
            installed(builder.try_init(), move |filter| handle.reload(filter))
        }
        Format::Json => {
            let builder = builder.json().with_env_filter(filter).with_filter_reloading();
            let handle = builder.reload_handle();
            installed(builder.try_init(), move |filter| handle.reload(filter))
        }
    }
}

fn installed<E>(
    outcome: std::result::Result<(), E>,
    set: impl Fn(EnvFilter) -> std::result::Result<(), reload::Error> + Send + Sync + 'static,
) -> Result<()>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let twice = || Error::new(Kind::AlreadyExists, "a logger is installed already");
    outcome.map_err(|e| twice().caused_by(e))?;
    let set = move |filter| set(filter).map_err(|e| Error::new(Kind::Io, "the log filter stays").caused_by(e));
    SET_FILTER.set(Box::new(set)).map_err(|_| twice())
}

/// Is it a filter?
///
/// # Errors
/// [`Kind::Invalid`] that says what is not.
pub fn check_level(level: &str) -> Result<()> {
    filter(level).map(|_| ())
}

/// Logs by another filter from now on.
///
/// # Errors
/// [`Kind::Invalid`] for a bad one, [`Kind::NotFound`] without a logger.
pub fn set_level(level: &str) -> Result<()> {
    let set = SET_FILTER.get().ok_or_else(|| Error::new(Kind::NotFound, "this process does not log"))?;
    set(filter(level)?)
}
