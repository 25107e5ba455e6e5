//! Every key an object store can hold, through a mount: shown under the name that `docs/names-part.md` gives and read byte by byte, over S3
//! and over native OSS, with the same result whether the names were listed before or are looked up blindly.

use anyhow::{Context, Result, ensure};
use efc_e2e::{Mount, within};
use efc_testkit::{OssOptions, OssServer};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

/// Keys and the paths they are shown as.
fn keys() -> Vec<(Vec<u8>, Vec<u8>)> {
    let same = |k: &[u8]| (k.to_vec(), k.to_vec());
    let long = [b"long/".to_vec(), vec![b'l'; 1024 - 5]].concat();
    let deep: Vec<u8> = b"d/".repeat(510).into_iter().chain(*b"leaf").collect();
    let pair = |k: &[u8], n: &[u8]| (k.to_vec(), n.to_vec());
    vec![
        same(b"plain"),
        pair(b"a", b"a%efc-file"),
        same(b"a/b"),
        pair(b"nest/x", b"nest/x%efc-file"),
        same(b"nest/x/y"),
        pair(b"empty//x", b"empty/%efc-empty/x"),
        pair(b"three///x", b"three/%efc-empty/%efc-empty/x"),
        pair(b"/leading", b"%efc-empty/leading"),
        pair(b"slash/", b"slash/%efc-empty"),
        pair(b"dot/.", b"dot/%efc-dot%efc-file"),
        pair(b"dot/..", b"dot/%efc-dotdot"),
        pair(b"dot/./in", b"dot/%efc-dot/in"),
        pair(b"up/../in", b"up/%efc-dotdot/in"),
        same(b"new\nline/with\nline"),
        same(b"tab\t and \x01 control"),
        same(b"latin-\xe4\xf6"),
        same(b"broken-\xff\xfe/\x80x"),
        pair(b"%efc-file", b"%efc-lit-file"),
        pair(b"x%efc-dot", b"x%efc-lit-dot"),
        same(b"percent%20%2F%"),
        same("日本語/🦀".as_bytes()),
        same(b"-rf"),
        same(b"back\\slash"),
        same(b"..."),
        same(&long),
        same(&deep),
    ]
}

fn body(key: &[u8]) -> Vec<u8> {
    [b"the object of ".as_slice(), key].concat()
}

/// All regular files below `dir` with their bytes, and the number of directories.
fn walk(dir: &Path, at: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) -> Result<usize> {
    let mut dirs = 0;
    for entry in std::fs::read_dir(dir.join(at)).with_context(|| format!("list {at:?}"))? {
        let entry = entry?;
        let path = at.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            dirs += 1 + walk(dir, &path, files)?;
        } else {
            let bytes = std::fs::read(dir.join(&path)).with_context(|| format!("read {path:?}"))?;
            ensure!(entry.metadata()?.len() == bytes.len() as u64, "{path:?}: size");
            files.insert(path, bytes);
        }
    }
    Ok(dirs)
}

fn check(mut mount: impl FnMut() -> Result<Mount>, server: &OssServer) -> Result<()> {
    let keys = keys();
    for (key, _) in &keys {
        server.put("data", key, body(key));
    }
    // Markers: one with content below it, one of a directory that has nothing else.
    server.put("data", "a/", "");
    server.put("data", "marked/", "");
    let want: BTreeMap<PathBuf, Vec<u8>> =
        keys.iter().map(|(key, name)| (OsStr::from_bytes(name).into(), body(key))).collect();

    // Listed first.
    let m = mount()?;
    let root = m.path.clone();
    let found = within(PATIENCE, move || -> Result<_> {
        let mut files = BTreeMap::new();
        walk(&root, Path::new(""), &mut files)?;
        ensure!(root.join("marked").is_dir() && std::fs::read_dir(root.join("marked"))?.next().is_none(), "marker");
        Ok(files)
    })?;
    let missing: Vec<_> = want.keys().filter(|k| !found.contains_key(*k)).collect();
    let extra: Vec<_> = found.keys().filter(|k| !want.contains_key(*k)).collect();
    assert!(missing.is_empty() && extra.is_empty(), "missing {missing:?}, extra {extra:?}");
    assert!(found == want, "other bytes");
    m.finish(&[])?;

    // Looked up blindly, in a mount that has listed nothing.
    let m = mount()?;
    let root = m.path.clone();
    within(PATIENCE, move || -> Result<()> {
        for (path, bytes) in &want {
            ensure!(&open_below(&root, path)? == bytes, "{path:?}: other bytes");
        }
        for none in ["a%efc-file%efc-file", "plain%efc-file", "%efc-dot", "%efc-nul", "x%efc-dot", "none"] {
            let e = std::fs::symlink_metadata(root.join(none)).expect_err(none);
            ensure!(e.kind() == std::io::ErrorKind::NotFound, "{none}: {e}");
        }
        Ok(())
    })?;
    m.finish(&[])
}

/// Reads a file whose path may be longer than one system call takes, going down directory by directory.
fn open_below(root: &Path, path: &Path) -> Result<Vec<u8>> {
    use std::io::Read;
    let mut at = std::fs::File::open(root)?;
    for part in path {
        let flags = nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_CLOEXEC;
        let fd = nix::fcntl::openat(&at, part, flags, nix::sys::stat::Mode::empty());
        at = fd.with_context(|| format!("open {part:?} of {path:?}"))?.into();
    }
    let mut bytes = Vec::new();
    at.read_to_end(&mut bytes).with_context(|| format!("read {path:?}"))?;
    Ok(bytes)
}

#[test]
fn over_s3() -> Result<()> {
    let server = OssServer::start_with(OssOptions::s3())?;
    let (endpoint, target) = (format!("endpoint={}", server.endpoint()), server.target());
    check(|| Mount::start("s3://data", &[&endpoint, "cache_memory=64MiB"], &target.env()), &server)
}

#[test]
fn over_native_oss() -> Result<()> {
    let server = OssServer::start()?;
    let endpoint = format!("endpoint={},path_style=true,region=cn-hangzhou,cache_memory=64MiB", server.endpoint());
    let keys = [("OSS_ACCESS_KEY_ID", "efckey"), ("OSS_ACCESS_KEY_SECRET", "efcsecret")];
    check(|| Mount::start("oss://data", &[&endpoint], &keys), &server)
}
