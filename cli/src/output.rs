//! What goes to stdout: one table for people or one JSON document for programs.

use crate::table::Table;
use efc_common::{Error, Kind, Result};
use serde::Serialize;
use std::io::Write;

/// How the answer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Output {
    /// Aligned columns for people.
    Table,
    /// One JSON document; its fields are stable.
    Json,
}

impl Output {
    /// Prints `value` as JSON, or the text that `people` makes of it.
    ///
    /// # Errors
    /// When stdout cannot be written (a reader that went away is no error).
    pub(crate) fn print<T: Serialize>(self, value: &T, people: impl FnOnce(&T) -> String) -> Result<()> {
        let mut text = match self {
            Output::Table => people(value),
            Output::Json => serde_json::to_string_pretty(value)
                .map_err(|e| Error::new(Kind::Io, "the answer cannot be written as JSON").caused_by(e))?,
        };
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        let mut out = std::io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::from(e).with("output", "stdout")),
            _ => Ok(()),
        }
    }
}

/// Says something beside the answer.
pub(crate) fn warn(text: &str) {
    eprintln!("efc: warning: {text}");
}

/// Lines of `name value`, the values aligned.
pub(crate) fn fields(rows: &[(&str, String)]) -> String {
    let mut t = Table::new(&[]);
    rows.iter().for_each(|(k, v)| t.row([(*k).to_string(), v.clone()]));
    t.to_string()
}

/// How long ago a Unix time was, in one unit.
pub(crate) fn ago(then_ms: u64) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    format!("{} ago", span(now_ms.saturating_sub(then_ms)))
}

/// A span of time in one unit.
pub(crate) fn span(ms: u64) -> String {
    match ms / 1000 {
        0 => format!("{ms} ms"),
        s @ 1..=119 => format!("{s} s"),
        s @ 120..=7199 => format!("{} min", s / 60),
        s @ 7200..=172_799 => format!("{} h", s / 3600),
        s => format!("{} d", s / 86400),
    }
}

/// `part` of `whole` in percent.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "-".into();
    }
    format!("{:.1}%", 100.0 * part as f64 / whole as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_and_shares_are_short() {
        assert_eq!([12, 90_000, 300_000, 7_200_000, 864_000_000].map(span), ["12 ms", "90 s", "5 min", "2 h", "10 d"]);
        assert_eq!([percent(1, 8), percent(0, 0)], ["12.5%", "-"]);
        assert_eq!(fields(&[("a", "1".into()), ("long", "2".into())]), "a     1\nlong  2\n");
    }
}
