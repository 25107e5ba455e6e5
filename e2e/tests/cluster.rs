//! The whole system: three masters, three workers, two mounts, a data set of more than 10,000 files from 0 B to 1 GiB, over S3 and
//! over NFS. Mount A reads every byte right; mount B reads them all again, and no origin sends a byte of content.

use anyhow::{Context, Result};
use efc_e2e::{Cluster, Mount, WorkerSpec, within};
use efc_testkit::process::scratch;
use efc_testkit::{Ganesha, GaneshaOptions, Manifest, Profile, S3Ro, make_tree};
use std::time::Duration;

const READERS: usize = 4;
const PATIENCE: Duration = Duration::from_secs(240);

/// Reads the whole tree of a mount and compares names and bytes.
fn read_all(m: &Mount, manifest: &Manifest) -> Result<()> {
    let (path, want) = (m.path.clone(), manifest.clone());
    let done = within(PATIENCE, move || want.verify(&path, READERS))?;
    assert_eq!((done.files, done.bytes), (manifest.files.len(), manifest.bytes()));
    Ok(())
}

/// Bytes a process has read from files, by the kernel's count.
fn bytes_read(pid: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/io"))?;
    let line = text.lines().find_map(|l| l.strip_prefix("rchar: ")).context("rchar")?;
    Ok(line.parse()?)
}

/// Content bytes that workers had from origins; the mount itself asked for none.
fn origin_bytes(c: &Cluster, m: &Mount) -> Result<u64> {
    let stats = m.stats()?;
    for kind in ["get", "read"] {
        assert_eq!(stats["origin_requests"][kind].as_u64().unwrap_or(0), 0, "{stats}");
    }
    Ok(c.metric("efc_origin_bytes_total", "")? as u64)
}

/// Bytes of a mount that came from the origin at last, whoever asked for them.
fn from_origin(m: &Mount) -> Result<u64> {
    Ok(m.stats()?["tiers"]["origin"]["bytes"].as_u64().unwrap_or(0))
}

#[test]
fn the_second_mount_costs_the_origin_nothing() -> Result<()> {
    let dir = scratch("cluster-data")?;
    let tree = dir.path().join("data");
    std::fs::create_dir(&tree)?;
    let manifest = make_tree(&tree, Profile::E2e)?;
    assert!(manifest.files.len() >= 10_000);
    // Memory for a quarter of both sources, the disks have room for all.
    let spec = WorkerSpec { memory: "256MiB".into(), disk: "3GiB".into(), ..WorkerSpec::default() };
    let c = Cluster::start(3, &[spec.clone(), spec.clone(), spec])?;

    let s3 = S3Ro::start(dir.path(), Duration::ZERO)?;
    let (endpoint, keys) = (format!("endpoint={}", s3.endpoint()), s3.target());
    let options = [c.option(), endpoint, "consistency=immutable".into()];
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let a = Mount::start("s3://data", &options, &keys.env())?;
    read_all(&a, &manifest)?;
    // A byte is fetched once for all, and nothing twice.
    assert_eq!((s3.stats().bytes, s3.stats().head), (manifest.bytes(), 0), "{:?}", s3.stats());
    let before = (s3.stats().get, origin_bytes(&c, &a)?);
    assert_eq!(before.1, manifest.bytes());
    // A segment that goes from memory to disk before the mount has taken it from there is counted where it was found then.
    let counted = from_origin(&a)?;
    let moved = manifest.bytes().checked_sub(counted);
    assert!(moved.is_some_and(|n| n < manifest.bytes() / 100), "{counted} of {}: {}", manifest.bytes(), a.stats()?);
    let b = Mount::start("s3://data", &options, &keys.env())?;
    read_all(&b, &manifest)?;
    assert_eq!((s3.stats().get, s3.stats().bytes), (before.0, manifest.bytes()));
    assert_eq!((origin_bytes(&c, &b)?, from_origin(&b)?), (before.1, 0));
    [a, b].into_iter().try_for_each(|m| m.finish(&[]))?;
    drop(s3);

    let nas = Ganesha::start_with(&tree, &GaneshaOptions { read_only: true, ..GaneshaOptions::default() })?;
    let options = [c.option(), format!("mount_port={}", nas.mount_port()), "consistency=immutable".into()];
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let a = Mount::start(&nas.url(), &options, &[])?;
    read_all(&a, &manifest)?;
    let after_a = (bytes_read(nas.pid())?, origin_bytes(&c, &a)?);
    assert_eq!(after_a.1, 2 * manifest.bytes());
    assert!(after_a.0 > manifest.bytes(), "{after_a:?}");
    let b = Mount::start(&nas.url(), &options, &[])?;
    read_all(&b, &manifest)?;
    assert_eq!((origin_bytes(&c, &b)?, from_origin(&b)?), (after_a.1, 0));
    // Attributes are asked of the NAS, which reads some directories for that; content is not.
    let read = bytes_read(nas.pid())? - after_a.0;
    assert!(read < manifest.bytes() / 100, "the NFS server read {read} bytes for the second mount");
    [a, b].into_iter().try_for_each(|m| m.finish(&[]))?;
    c.check_logs(&[])
}
