//! The Python environment that `./run setup` makes: SeaweedFS, moto and the official SDKs come from PyPI.

use anyhow::{Result, bail};
use std::path::PathBuf;

/// The environment's directory: `$EFC_VENV`, else `${XDG_CACHE_HOME:-~/.cache}/efc/venv`.
pub fn dir() -> PathBuf {
    if let Some(v) = std::env::var_os("EFC_VENV").filter(|v| !v.is_empty()) {
        return v.into();
    }
    let cache = std::env::var_os("XDG_CACHE_HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
    let cache =
        cache.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap_or("/root".into())).join(".cache"));
    cache.join("efc/venv")
}

/// The path of a program of the environment (`python`, `weed`, `moto_server`).
///
/// # Errors
/// When it is not there: the message says to run `./run setup`.
pub fn program(name: &str) -> Result<PathBuf> {
    let path = dir().join("bin").join(name);
    if !path.exists() {
        bail!("{} is missing: run `./run setup` (or set EFC_VENV to the Python environment it made)", path.display());
    }
    Ok(path)
}
