//! What an NFSv3 status (RFC 1813 section 2.6) means in our terms: the only table of it.

use super::xdr::Reader;
use crate::tree::settle::unsent;
use efc_common::{Error, Kind, Result, Retry};

/// Name, kind and retry verdict of a status other than NFS3_OK.
fn meaning(status: u32) -> (&'static str, Kind, Retry) {
    use Retry::{Later, Never};
    match status {
        1 => ("NFS3ERR_PERM", Kind::NotPermitted, Never),
        2 => ("NFS3ERR_NOENT", Kind::NotFound, Never),
        5 => ("NFS3ERR_IO", Kind::Io, Never),
        6 => ("NFS3ERR_NXIO", Kind::Io, Never),
        13 => ("NFS3ERR_ACCES", Kind::PermissionDenied, Never),
        17 => ("NFS3ERR_EXIST", Kind::AlreadyExists, Never),
        18 => ("NFS3ERR_XDEV", Kind::CrossDevice, Never),
        19 => ("NFS3ERR_NODEV", Kind::Io, Never),
        20 => ("NFS3ERR_NOTDIR", Kind::NotADirectory, Never),
        21 => ("NFS3ERR_ISDIR", Kind::IsADirectory, Never),
        22 => ("NFS3ERR_INVAL", Kind::Invalid, Never),
        27 => ("NFS3ERR_FBIG", Kind::TooLarge, Never),
        28 => ("NFS3ERR_NOSPC", Kind::NoSpace, Never),
        30 => ("NFS3ERR_ROFS", Kind::PermissionDenied, Never),
        31 => ("NFS3ERR_MLINK", Kind::TooManyLinks, Never),
        63 => ("NFS3ERR_NAMETOOLONG", Kind::NameTooLong, Never),
        66 => ("NFS3ERR_NOTEMPTY", Kind::NotEmpty, Never),
        69 => ("NFS3ERR_DQUOT", Kind::NoQuota, Never),
        // The object behind the handle is gone: whoever asks must look its name up again.
        70 => ("NFS3ERR_STALE", Kind::Stale, Never),
        71 => ("NFS3ERR_REMOTE", Kind::Unsupported, Never),
        10001 => ("NFS3ERR_BADHANDLE", Kind::Stale, Never),
        10002 => ("NFS3ERR_NOT_SYNC", Kind::Stale, Never),
        // The directory changed so much that the place in it is lost: whoever lists must start again.
        10003 => ("NFS3ERR_BAD_COOKIE", Kind::Stale, Never),
        10004 => ("NFS3ERR_NOTSUPP", Kind::Unsupported, Never),
        10005 => ("NFS3ERR_TOOSMALL", Kind::Io, Never),
        10006 => ("NFS3ERR_SERVERFAULT", Kind::Io, Never),
        10007 => ("NFS3ERR_BADTYPE", Kind::Invalid, Never),
        // "Try again": the server is fetching the data from slow storage.
        10008 => ("NFS3ERR_JUKEBOX", Kind::Unavailable, Later),
        _ => ("an unknown NFS status", Kind::Io, Never),
    }
}

/// Reads the status of a reply of `operation`.
///
/// # Errors
/// The status, if it is not NFS3_OK, as the table says.
pub(super) fn check(r: &mut Reader, operation: &str) -> Result<()> {
    match r.u32()? {
        0 => Ok(()),
        status => {
            let (name, kind, retry) = meaning(status);
            let e = Error::new(kind, format!("{operation}: {name}")).with_retry(retry).with("status", status);
            // The server answered that it did nothing yet.
            Err(if retry == Retry::Later { unsent(e) } else { e })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    #[test]
    fn statuses_keep_their_meaning_and_unknown_ones_their_number() {
        let of = |n: u32| {
            check(&mut Reader(Bytes::copy_from_slice(&n.to_be_bytes())), "READ").map_err(|e| (e.kind(), e.retry()))
        };
        assert_eq!(of(0), Ok(()));
        assert_eq!(of(10008), Err((Kind::Unavailable, Retry::Later)));
        assert_eq!(of(70), Err((Kind::Stale, Retry::Never)));
        // EPERM and EACCES stay apart.
        assert_eq!([of(1), of(13)].map(|e| e.map_err(|e| e.0)), [Err(Kind::NotPermitted), Err(Kind::PermissionDenied)]);
        let e = check(&mut Reader(Bytes::from_static(&[0, 0, 9, 9])), "READ").expect_err("unknown");
        assert_eq!((e.kind(), e.context("status")), (Kind::Io, Some("2313")));
    }
}
