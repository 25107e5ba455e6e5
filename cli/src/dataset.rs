//! Paths in a dataset: what `dataset://name/path` names, and the walk over all files below it.
//!
//! Directories of object stores are listed through the workers (one LIST for the whole cluster), NAS directories at the origin. What
//! must stay true: a walk holds at most [`LISTINGS`] listings and the queue it feeds; a path that fails is reported and the rest goes
//! on; symbolic links are not followed, so a walk ends; a mount hides what another source has at its path.

mod origin;
mod walk;

pub(crate) use origin::{Origin, get, source_of};
pub(crate) use walk::{Found, Tree, each_file};

use efc_common::{Error, Kind, Result};
use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;

/// Directories listed at once.
const LISTINGS: usize = 8;

/// What `dataset://name/path` names. Bytes, because names at an origin need not be UTF-8.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DatasetPath {
    /// The dataset.
    pub(crate) name: String,
    /// Components of the path in it; none for its root.
    pub(crate) parts: Vec<Vec<u8>>,
}

impl DatasetPath {
    /// Parses `dataset://name[/path]`; `None` for anything that is no dataset path.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a missing name and for `.` or `..` in the path.
    pub(crate) fn parse(text: &OsStr) -> Result<Option<DatasetPath>> {
        let Some(rest) = text.as_bytes().strip_prefix(b"dataset://") else { return Ok(None) };
        let mut parts = rest.split(|b| *b == b'/').map(<[u8]>::to_vec);
        let invalid = |what: &str| Err(Error::new(Kind::Invalid, format!("`{}` {what}", text.to_string_lossy())));
        let name = String::from_utf8(parts.next().unwrap_or_default()).unwrap_or_default();
        if name.is_empty() {
            return invalid("names no dataset; write dataset://name/path");
        }
        let parts: Vec<Vec<u8>> = parts.filter(|p| !p.is_empty()).collect();
        if parts.iter().any(|p| p.as_slice() == b"." || p.as_slice() == b"..") {
            return invalid("has `.` or `..` in its path; write the plain path");
        }
        Ok(Some(DatasetPath { name, parts }))
    }

    /// As [`DatasetPath::parse`], for commands that take nothing else.
    ///
    /// # Errors
    /// [`Kind::Invalid`].
    pub(crate) fn required(text: &OsStr) -> Result<DatasetPath> {
        DatasetPath::parse(text)?.ok_or_else(|| {
            let what = format!("`{}` is not a dataset path; write dataset://name/path", text.to_string_lossy());
            Error::new(Kind::Invalid, what)
        })
    }
}

impl fmt::Display for DatasetPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dataset://{}{}", self.name, show(&self.parts))
    }
}

/// `/a/b`, `/` for no parts.
pub(crate) fn show(parts: &[Vec<u8>]) -> String {
    if parts.is_empty() {
        return "/".into();
    }
    parts.iter().map(|p| format!("/{}", String::from_utf8_lossy(p))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dataset_paths_are_parsed() {
        let parse = |t: &str| DatasetPath::parse(OsStr::new(t));
        let p = parse("dataset://x//a/b/").expect("good").expect("dataset");
        assert_eq!((p.name.as_str(), p.to_string().as_str()), ("x", "dataset://x/a/b"));
        assert_eq!(parse("dataset://x").expect("good").expect("dataset").parts, Vec::<Vec<u8>>::new());
        assert_eq!(parse("/mnt/x").expect("good"), None);
        for bad in ["dataset://", "dataset:///a", "dataset://x/../y"] {
            assert!(parse(bad).is_err_and(|e| e.is(Kind::Invalid)), "{bad}");
        }
        assert!(DatasetPath::required(OsStr::new("/mnt")).is_err_and(|e| e.to_string().contains("dataset://")));
        let odd = DatasetPath::required(OsStr::from_bytes(b"dataset://x/\xff")).expect("bytes");
        assert_eq!(odd.parts, [b"\xff".to_vec()]);
    }
}
