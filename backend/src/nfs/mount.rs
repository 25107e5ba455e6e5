//! Finds an export's root handle: the portmapper (RFC 1833, version 2) for the port of the MOUNT service unless the source names it, then
//! MOUNT version 3 (RFC 1813 appendix I). Runs once per backend, when the root is first asked for; reading by handle needs none of it.

use super::rpc::{Client, Program};
use super::xdr::{Reader, garbled};
use bytes::Bytes;
use efc_common::error::Context;
use efc_common::{Error, Kind, Result, Retry};
use nfs3_types::mount::{MNTPATHLEN, dirpath};
use nfs3_types::portmap::{IPPROTO_TCP, mapping};
use nfs3_types::xdr_codec::{Opaque, Void};
use std::time::Duration;

const PORTMAP: Program = Program { number: 100_000, version: 2, name: "the portmapper" };
const MOUNT: Program = Program { number: 100_005, version: 3, name: "the MOUNT service" };
const PMAPPROC_GETPORT: u32 = 3;
const MOUNTPROC3_MNT: u32 = 1;
const MOUNTPROC3_EXPORT: u32 = 5;
const PORTMAP_PORT: u16 = 111;
/// Longest file handle, bytes (RFC 1813 section 2.4).
pub(super) const HANDLE_BYTES_MAX: usize = 64;
/// Exports named in an error message.
const EXPORTS_SHOWN: usize = 8;

/// Where the root was found.
pub(super) struct Export {
    /// Handle of the exported directory.
    pub(super) handle: Bytes,
    /// What of the path lies below it, to be looked up: empty unless only a parent directory is exported.
    pub(super) below: String,
}

/// Asks `host` for the handle of `path`.
///
/// # Errors
/// Names what was asked of whom, and the exports where the path was refused.
pub(super) async fn mount(host: &str, port: Option<u16>, path: &str, timeout: Duration) -> Result<Export> {
    let port = match port {
        Some(port) => port,
        None => ask_portmapper(host, timeout).await?,
    };
    let service = Client::new(MOUNT, &format!("{host}:{port}"), 1, timeout);
    match mnt(&service, path).await? {
        Ok(handle) => return Ok(Export { handle, below: String::new() }),
        Err(status) => {
            // The server may not list its exports to us: then the message does without.
            let exports = exports(&service).await.unwrap_or_default();
            for e in &exports {
                let below = path.strip_prefix(e.trim_end_matches('/')).and_then(|rest| rest.strip_prefix('/'));
                if let Some(below) = below.filter(|b| !b.is_empty())
                    && let Ok(handle) = mnt(&service, e).await?
                {
                    return Ok(Export { handle, below: below.into() });
                }
            }
            Err(refusal(status, host, path, &exports))
        }
    }
}

async fn ask_portmapper(host: &str, timeout: Duration) -> Result<u16> {
    let portmapper = Client::new(PORTMAP, &format!("{host}:{PORTMAP_PORT}"), 1, timeout);
    let what = mapping { prog: MOUNT.number, vers: MOUNT.version, prot: IPPROTO_TCP, port: 0 };
    let asked = portmapper.call(PMAPPROC_GETPORT, &what).await;
    let port = asked.context("cannot find the port of the MOUNT service; name it with `-o mount_port=PORT`")?.u32()?;
    match u16::try_from(port) {
        Ok(0) => Err(Error::new(
            Kind::Unavailable,
            format!("{host} offers no MOUNT version 3 over TCP; is NFSv3 switched on there? Else `-o mount_port=PORT`"),
        )),
        Ok(port) => Ok(port),
        Err(_) => Err(garbled(&format!("port {port}"))),
    }
}

/// The handle, or the MOUNT status.
async fn mnt(service: &Client, path: &str) -> Result<std::result::Result<Bytes, u32>> {
    let argument = dirpath(Opaque::borrowed(path.as_bytes()));
    let mut r = service.call(MOUNTPROC3_MNT, &argument).await?;
    match r.u32()? {
        0 => {
            let handle = r.opaque(HANDLE_BYTES_MAX)?;
            // Flavors the export accepts; 1 is AUTH_SYS, the one we speak. An empty list says nothing.
            let flavors = (0..r.u32()?.min(64)).map(|_| r.u32()).collect::<Result<Vec<u32>>>()?;
            if !flavors.is_empty() && !flavors.contains(&1) && !flavors.contains(&0) {
                return Err(Error::new(
                    Kind::PermissionDenied,
                    format!("the export {path} accepts security flavors {flavors:?} only; allow sec=sys for it"),
                ));
            }
            Ok(Ok(Bytes::copy_from_slice(&handle)))
        }
        status => Ok(Err(status)),
    }
}

/// Exported directories.
async fn exports(service: &Client) -> Result<Vec<String>> {
    let mut r = service.call(MOUNTPROC3_EXPORT, &Void).await?;
    decode_exports(&mut r)
}

fn decode_exports(r: &mut Reader) -> Result<Vec<String>> {
    let mut found = Vec::new();
    while r.bool()? {
        found.push(String::from_utf8_lossy(&r.opaque(MNTPATHLEN)?).into_owned());
        while r.bool()? {
            r.opaque(255)?;
        }
    }
    // The longest first: it is the nearest parent.
    found.sort_by_key(|e| std::cmp::Reverse(e.len()));
    Ok(found)
}

fn refusal(status: u32, host: &str, path: &str, exports: &[String]) -> Error {
    let (kind, what) = match status {
        1 | 13 => {
            (Kind::PermissionDenied, "refuses to export it to this machine; add its address to the export's clients")
        }
        2 => (Kind::NotFound, "has no such export"),
        20 => (Kind::NotADirectory, "says that it is no directory"),
        63 => (Kind::NameTooLong, "finds the path too long"),
        10004 => (Kind::Unsupported, "does not support MOUNT"),
        10006 => (Kind::Unavailable, "has a passing fault"),
        _ => (Kind::Io, "answers with an error"),
    };
    let mut text = format!("cannot mount {path}: {host} {what}");
    if !exports.is_empty() {
        let shown: Vec<&str> = exports.iter().take(EXPORTS_SHOWN).map(String::as_str).collect();
        text +=
            &format!("; it exports {}{}", shown.join(", "), if exports.len() > EXPORTS_SHOWN { ", ..." } else { "" });
    }
    let retry = if kind == Kind::Unavailable { Retry::Later } else { Retry::Never };
    Error::new(kind, text).with_retry(retry).with("mountstat", status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_path_the_cure_and_the_exports() {
        let e = refusal(13, "nas", "/x", &["/data".into()]);
        assert_eq!((e.kind(), e.retry()), (Kind::PermissionDenied, Retry::Never));
        assert!(e.message().contains("/x") && e.message().contains("exports /data"), "{e}");
    }

    #[test]
    fn export_lists_are_bounded_by_the_frame() {
        let endless = Bytes::from_static(&[0, 0, 0, 1, 0, 0, 0, 1, b'/', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert!(decode_exports(&mut Reader(endless)).is_err_and(|e| e.is(Kind::Corrupt)));
    }
}
