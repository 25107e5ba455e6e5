//! Another program in the place of a mount process (hot upgrade, decision 0011): what is looked at before the old one leaves.
//!
//! Neighbouring versions go back and forth: where a new one writes its journal in another format than the old one reads, it writes it for the old one once more before it leaves.
//!
//! The new program is run with the arguments of the mount and [`PREFLIGHT`] set. Then it mounts nothing: it reads its options, reaches origin and masters, says in one line what it would agree on, and ends. What it cannot
//! do, or would do otherwise than the kernel was told, is refused while the old process serves on.

use crate::journal;
use crate::kernel::INIT_RECORD_FORMAT;
use efc_common::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

/// Tells a program that it is only to look.
pub const PREFLIGHT: &str = "EFC_PREFLIGHT";
/// For that.
const DEADLINE: Duration = Duration::from_secs(10);

/// What a mount's processes have to agree on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreed {
    /// Oldest format of the journal that it reads: the one of the version before, which knows no other and compares just this.
    pub journal: u32,
    /// Newest one; 0: as the oldest.
    #[serde(default)]
    pub journal_newest: u32,
    /// Format of the INIT record.
    pub init: u32,
    /// Can it be written to?
    pub read_write: bool,
    /// Does it have leases?
    pub strict: bool,
}

impl Agreed {
    /// As this program does it.
    pub fn new(read_write: bool, strict: bool) -> Agreed {
        let (journal, journal_newest) = journal::FORMATS.into_inner();
        Agreed { journal, journal_newest, init: INIT_RECORD_FORMAT, read_write, strict }
    }

    /// In which format a journal is to be left for `next`, if it can go on at all.
    fn journal_for(&self, next: &Agreed) -> Option<u32> {
        let newest = |a: &Agreed| a.journal_newest.max(a.journal);
        let format = newest(self).min(newest(next));
        let same = (self.init, self.read_write, self.strict) == (next.init, next.read_write, next.strict);
        (same && format >= self.journal.max(next.journal)).then_some(format)
    }
}

/// What a program says of itself.
#[derive(Debug, Serialize, Deserialize)]
pub struct Preflight {
    /// Its version.
    pub version: String,
    /// What it would agree on.
    pub agreed: Agreed,
}

/// Runs `program` as it would run for this mount, with further `options`, and looks whether it agrees with `ours`: the format in which
/// the journal is to be left for it.
///
/// # Errors
/// [`Kind::Unsupported`] when it does not, [`Kind::Timeout`] when it does not say; what it said when it cannot run.
pub async fn preflight(program: &Path, options: &[String], ours: &Agreed) -> Result<u32> {
    let name = program.display();
    let mut command = tokio::process::Command::new(program);
    command.args(std::env::args_os().skip(1)).env(PREFLIGHT, "1").stdin(Stdio::null());
    options.iter().for_each(|o| {
        command.arg("-o").arg(o);
    });
    let run = command.kill_on_drop(true).output();
    let late = |_| Error::new(Kind::Timeout, format!("{name} did not say within {} s what it is", DEADLINE.as_secs()));
    let out = tokio::time::timeout(DEADLINE, run).await.map_err(late)?;
    let out = out.map_err(|e| Error::from(e).with("program", name.to_string()))?;
    let text = String::from_utf8_lossy(&out.stdout);
    let said = text.lines().last().and_then(|line| serde_json::from_str::<Preflight>(line).ok());
    let Some(said) = said.filter(|_| out.status.success()) else {
        let why = String::from_utf8_lossy(&out.stderr);
        let text = format!(
            "{name} cannot serve this mount ({}): {}",
            out.status,
            why.lines().last().unwrap_or("it says nothing")
        );
        return Err(Error::new(Kind::Unsupported, text));
    };
    ours.journal_for(&said.agreed).ok_or_else(|| {
        let text = format!(
            "{name} (version {}) cannot go on with this mount: it would agree on {:?}, the kernel was told {ours:?}; unmount and mount instead",
            said.version, said.agreed
        );
        Error::new(Kind::Unsupported, text)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_agree_on_the_newest_format_of_both() {
        let ours = Agreed { journal: 3, journal_newest: 4, init: 1, read_write: true, strict: true };
        let other = |journal, journal_newest| Agreed { journal, journal_newest, ..ours.clone() };
        assert_eq!(ours.journal_for(&ours), Some(4));
        for (journal, newest, format) in [(3, 0, Some(3)), (4, 5, Some(4)), (2, 3, Some(3)), (5, 6, None), (2, 0, None)]
        {
            assert_eq!(ours.journal_for(&other(journal, newest)), format, "{journal}..{newest}");
        }
        assert_eq!(ours.journal_for(&Agreed { strict: false, ..ours.clone() }), None);
        // What the version before says of itself, and what it needs to hear of this one.
        let before: Agreed =
            serde_json::from_str(r#"{"journal":3,"init":1,"read_write":true,"strict":true}"#).expect("json");
        assert_eq!(Agreed::new(true, true).journal_for(&before), Some(3));
        assert_eq!(Agreed::new(true, true).journal, before.journal);
    }
}
