//! Sizes and durations as people write them (`4GiB`, `250ms`), both directions.

use crate::{Error, Kind, Result};
use std::time::Duration;

/// Parses a byte count: a number with an optional unit `B K KB KiB M MB MiB G GB GiB T TB TiB` (any case; `K`, `M`, `G`, `T`
/// and the `iB` forms are powers of 1024, the `B` forms powers of 1000). Fractions are allowed: `1.5GiB`.
///
/// # Errors
/// [`Kind::Invalid`] naming the text.
pub fn parse_bytes(text: &str) -> Result<u64> {
    let bad = || Error::new(Kind::Invalid, format!("`{text}` is not a size; write for example 512MiB or 4GiB"));
    let t = text.trim();
    let split = t.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(t.len());
    let (number, unit) = t.split_at(split);
    let value: f64 = number.parse().map_err(|_| bad())?;
    let scale: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(bad()),
    };
    let bytes = value * scale as f64;
    if !(0.0..=u64::MAX as f64 / 2.0).contains(&bytes) {
        return Err(bad());
    }
    Ok(bytes as u64)
}

/// Writes a byte count with a binary unit and at most one decimal: `1.5 GiB`.
pub fn show_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value.fract() < 0.05 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// Parses a duration: a number with an optional unit `ms s m h d` (seconds when there is none).
///
/// # Errors
/// [`Kind::Invalid`] naming the text.
pub fn parse_duration(text: &str) -> Result<Duration> {
    let bad = || Error::new(Kind::Invalid, format!("`{text}` is not a duration; write for example 500ms, 10s or 5m"));
    let t = text.trim();
    let split = t.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(t.len());
    let (number, unit) = t.split_at(split);
    let value: f64 = number.parse().map_err(|_| bad())?;
    let scale = match unit.trim() {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        "d" => 86400.0,
        _ => return Err(bad()),
    };
    let seconds = value * scale;
    if !(0.0..1e10).contains(&seconds) {
        return Err(bad());
    }
    Ok(Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, want) in
            [("0", 0), ("4096", 4096), ("4k", 4096), ("1.5GiB", 3 << 29), ("2 MB", 2_000_000), ("16TiB", 16 << 40)]
        {
            assert_eq!(parse_bytes(text).expect(text), want, "{text}");
        }
        for text in ["", "GiB", "-1", "4 parsecs", "1e99", "99999999999TiB"] {
            assert!(parse_bytes(text).is_err_and(|e| e.is(Kind::Invalid)), "{text}");
        }
        assert_eq!((show_bytes(1023), show_bytes(3 << 29)), ("1023 B".into(), "1.5 GiB".into()));
    }

    #[test]
    fn durations() {
        for (text, ms) in [("250ms", 250), ("10", 10_000), ("10s", 10_000), ("1.5m", 90_000), ("1d", 86_400_000)] {
            assert_eq!(parse_duration(text).expect(text), Duration::from_millis(ms), "{text}");
        }
        for text in ["", "s", "-1s", "5 weeks", "1e99"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
