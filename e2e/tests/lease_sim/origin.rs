//! The origin: a number for each directory's names and each file's content, which every change increases.

use efc_common::id::SourceId;
use efc_common::lease::{DirKey, FileKey, Scope, Want};
use std::collections::BTreeMap;

/// What has a version: a directory's names, or a file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Unit {
    pub(crate) dir: DirKey,
    pub(crate) file: Option<FileKey>,
}

impl Unit {
    pub(crate) fn read(&self) -> Want {
        match &self.file {
            Some(f) => Want::read_file(self.dir.clone(), f.clone()),
            None => Want::read(self.dir.clone()),
        }
    }

    pub(crate) fn change(&self) -> Want {
        match &self.file {
            Some(f) => Want::change_file(self.dir.clone(), f.clone()),
            None => Want::change(self.dir.clone()),
        }
    }

    pub(crate) fn is_in(&self, scope: &Scope) -> bool {
        match scope {
            Scope::Dir(d) => self.dir == *d,
            Scope::File(d, f) => self.dir == *d && self.file.as_ref() == Some(f),
            Scope::Subtree(p) => self.dir.is_in(p),
        }
    }
}

pub(crate) fn dir(path: &str) -> DirKey {
    DirKey::new(SourceId([1; 16]), path.as_bytes()).expect("a short path")
}

pub(crate) const DIRS: [&str; 4] = ["a/", "a/b/", "a/c/", "d/"];
pub(crate) const FILES: [&str; 3] = ["x", "y", "z"];

pub(crate) fn units() -> Vec<Unit> {
    let file = |f: &str| FileKey::new(f.to_string().into()).expect("a short name");
    let names = |d: &str| Unit { dir: dir(d), file: None };
    let of =
        |d: &str| FILES.iter().map(|f| Unit { dir: dir(d), file: Some(file(f)) }).chain([names(d)]).collect::<Vec<_>>();
    DIRS.iter().flat_map(|d| of(d)).collect()
}

#[derive(Default)]
pub(crate) struct Origin {
    versions: BTreeMap<Unit, u64>,
}

impl Origin {
    pub(crate) fn version(&self, unit: &Unit) -> u64 {
        self.versions.get(unit).copied().unwrap_or(0)
    }

    pub(crate) fn change(&mut self, unit: &Unit) {
        *self.versions.entry(unit.clone()).or_default() += 1;
    }
}
