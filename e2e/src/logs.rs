//! Logs of end-to-end runs are read: a WARN or ERROR that the test did not announce fails it.

use anyhow::{Result, ensure};
use std::path::Path;

/// Lines that an error shows.
const SHOWN: usize = 10;

/// Fails if [`unexpected`] finds any.
///
/// # Errors
/// The first of the lines, and how many there are.
pub fn check(dir: &Path, expected: &[&str]) -> Result<()> {
    let found = unexpected(dir, expected);
    ensure!(
        found.is_empty(),
        "{} unexpected lines in logs:\n{}",
        found.len(),
        found[..found.len().min(SHOWN)].join("\n")
    );
    Ok(())
}

/// Lines of level WARN or ERROR in the `.log` files under `dir` that contain none of `expected`.
pub fn unexpected(dir: &Path, expected: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    let Ok(entries) = std::fs::read_dir(dir) else { return found };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(unexpected(&path, expected));
        } else if path.extension().is_some_and(|e| e == "log") {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            let bad =
                |l: &&str| (l.contains(" WARN ") || l.contains(" ERROR ")) && !expected.iter().any(|e| l.contains(e));
            found.extend(text.lines().filter(bad).map(|l| format!("{}: {l}", path.display())));
        }
    }
    found
}
