//! Deterministic data sets.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// Relative paths of all regular files below `dir`, sorted.
///
/// # Errors
/// When a directory cannot be read.
pub fn regular_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut stack = vec![PathBuf::new()];
    while let Some(relative) = stack.pop() {
        let at = dir.join(&relative);
        for entry in std::fs::read_dir(&at).with_context(|| at.display().to_string())? {
            let entry = entry?;
            let kind = entry.file_type()?;
            let name = relative.join(entry.file_name());
            if kind.is_dir() {
                stack.push(name);
            } else if kind.is_file() {
                found.push(name);
            }
        }
    }
    found.sort();
    Ok(found)
}
