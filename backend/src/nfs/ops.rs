//! NFSv3 procedures (RFC 1813 section 3) in terms of handles and attributes: encodes arguments, calls, decodes results.

use super::mount::HANDLE_BYTES_MAX;
use super::rpc::{Client, Program};
use super::status::check;
use super::xdr::{Reader, garbled};
use bytes::Bytes;
use efc_common::{Error, Kind, Result};
use nfs3_types::nfs3::{
    FSINFO3args, FSINFO3resok, FSSTAT3args, FSSTAT3resok, GETATTR3args, LOOKUP3args, READ3args, READDIRPLUS3args,
    READLINK3args, cookieverf3, diropargs3, fattr3, filename3, nfs_fh3,
};
use nfs3_types::xdr_codec::Opaque;

/// The NFS program.
pub(super) const NFS: Program = Program { number: 100_003, version: 3, name: "NFSv3" };

const GETATTR: u32 = 1;
const LOOKUP: u32 = 3;
const READLINK: u32 = 5;
const READ: u32 = 6;
const READDIRPLUS: u32 = 17;
const FSSTAT: u32 = 18;
const FSINFO: u32 = 19;

/// Longest symbolic link target, bytes.
const TARGET_BYTES_MAX: usize = 4096;
/// Directory information asked for in one page, bytes: names and cookies only, and with attributes and handles.
const PAGE_BYTES: (u32, u32) = (64 * 1024, 256 * 1024);

/// An object as LOOKUP gives it; the attributes are optional in the protocol.
pub(super) struct Found {
    pub(super) handle: Bytes,
    pub(super) attributes: Option<fattr3>,
}

/// One entry of a READDIRPLUS reply.
pub(super) struct Listed {
    pub(super) name: Bytes,
    pub(super) handle: Option<Bytes>,
    pub(super) attributes: Option<fattr3>,
}

/// A place in a directory: cookie of the last entry seen, and the server's verifier of cookies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Place {
    pub(super) cookie: u64,
    pub(super) verifier: [u8; 8],
}

/// One READDIRPLUS reply.
pub(super) struct Page {
    pub(super) entries: Vec<Listed>,
    pub(super) next: Option<Place>,
}

/// One READ reply.
pub(super) struct Piece {
    pub(super) attributes: Option<fattr3>,
    /// A slice of the reply frame.
    pub(super) data: Bytes,
    pub(super) eof: bool,
}

/// A file handle as an argument.
pub(super) fn fh(handle: &[u8]) -> Result<nfs_fh3> {
    if handle.is_empty() || handle.len() > HANDLE_BYTES_MAX {
        return Err(Error::new(Kind::Invalid, format!("{} bytes are no NFSv3 file handle", handle.len())));
    }
    Ok(nfs_fh3 { data: Opaque::owned(handle.to_vec()) })
}

/// A file handle in a reply. Copied: a slice would keep the whole reply alive as long as the inode.
pub(super) fn handle(r: &mut Reader) -> Result<Bytes> {
    let handle = r.opaque(HANDLE_BYTES_MAX)?;
    if handle.is_empty() {
        return Err(garbled("an empty file handle"));
    }
    Ok(Bytes::copy_from_slice(&handle))
}

/// GETATTR.
pub(super) async fn getattr(client: &Client, object: &[u8]) -> Result<fattr3> {
    let mut r = client.call(GETATTR, &GETATTR3args { object: fh(object)? }).await?;
    check(&mut r, "GETATTR")?;
    r.fixed()
}

/// LOOKUP.
pub(super) async fn lookup(client: &Client, dir: &[u8], name: &[u8]) -> Result<Found> {
    let what = diropargs3 { dir: fh(dir)?, name: filename3(Opaque::borrowed(name)) };
    let mut r = client.call(LOOKUP, &LOOKUP3args { what }).await?;
    check(&mut r, "LOOKUP")?;
    Ok(Found { handle: handle(&mut r)?, attributes: r.optional()? })
}

/// READLINK.
pub(super) async fn readlink(client: &Client, link: &[u8]) -> Result<Bytes> {
    let mut r = client.call(READLINK, &READLINK3args { symlink: fh(link)? }).await?;
    check(&mut r, "READLINK")?;
    r.optional::<fattr3>()?;
    let target = r.opaque(TARGET_BYTES_MAX)?;
    if target.is_empty() || target.contains(&0) {
        return Err(garbled("a link target that is empty or holds a NUL"));
    }
    Ok(Bytes::copy_from_slice(&target))
}

/// READ of at most `count` bytes at `offset`.
pub(super) async fn read(client: &Client, file: &[u8], offset: u64, count: u32) -> Result<Piece> {
    let mut r = client.call(READ, &READ3args { file: fh(file)?, offset, count }).await?;
    decode_read(&mut r, count)
}

fn decode_read(r: &mut Reader, asked: u32) -> Result<Piece> {
    check(r, "READ")?;
    let attributes = r.optional()?;
    let (count, eof) = (r.u32()?, r.bool()?);
    let data = r.opaque(asked as usize)?;
    if data.len() != count as usize {
        return Err(garbled(&format!("READ says {count} bytes and carries {}", data.len())));
    }
    Ok(Piece { attributes, data, eof })
}

/// READDIRPLUS from `place` on.
pub(super) async fn list(client: &Client, dir: &[u8], place: Place) -> Result<Page> {
    let arguments = READDIRPLUS3args {
        dir: fh(dir)?,
        cookie: place.cookie,
        cookieverf: cookieverf3(place.verifier),
        dircount: PAGE_BYTES.0,
        maxcount: PAGE_BYTES.1,
    };
    let mut r = client.call(READDIRPLUS, &arguments).await?;
    decode_list(&mut r, place)
}

fn decode_list(r: &mut Reader, from: Place) -> Result<Page> {
    check(r, "READDIRPLUS")?;
    r.optional::<fattr3>()?;
    let cookieverf3(verifier) = r.fixed()?;
    let mut place = Place { cookie: from.cookie, verifier };
    let mut entries = Vec::new();
    while r.bool()? {
        r.u64()?;
        // Bounded by the reply only: a name too long to show is reported as hidden, not as an error of the whole directory.
        let name = r.opaque(usize::MAX)?;
        place.cookie = r.u64()?;
        let attributes = r.optional()?;
        let handle = if r.bool()? { Some(handle(r)?) } else { None };
        if !matches!(&name[..], b"." | b"..") {
            entries.push(Listed { name: Bytes::copy_from_slice(&name), handle, attributes });
        }
    }
    let end = r.bool()?;
    if !end && place.cookie == from.cookie {
        return Err(garbled("a directory page that is not the last and gets nowhere"));
    }
    Ok(Page { entries, next: (!end).then_some(place) })
}

/// FSSTAT.
pub(super) async fn fsstat(client: &Client, root: &[u8]) -> Result<FSSTAT3resok> {
    let mut r = client.call(FSSTAT, &FSSTAT3args { fsroot: fh(root)? }).await?;
    check(&mut r, "FSSTAT")?;
    r.fixed()
}

/// FSINFO. Any handle of the file system will do.
pub(super) async fn fsinfo(client: &Client, object: &[u8]) -> Result<FSINFO3resok> {
    let mut r = client.call(FSINFO, &FSINFO3args { fsroot: fh(object)? }).await?;
    check(&mut r, "FSINFO")?;
    r.fixed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(list: &[u32]) -> Bytes {
        list.iter().flat_map(|w| w.to_be_bytes()).collect()
    }

    #[test]
    fn read_data_is_a_slice_of_the_frame() {
        let frame = words(&[0, 0, 4, 1, 4, 0x6162_6364]);
        let piece = decode_read(&mut Reader(frame.clone()), 4).expect("piece");
        assert_eq!((&piece.data[..], piece.eof), (&b"abcd"[..], true));
        assert_eq!(piece.data.as_ptr(), frame[20..].as_ptr());
        assert!(decode_read(&mut Reader(frame), 3).is_err(), "more than asked for");
        assert!(decode_read(&mut Reader(words(&[0, 0, 5, 1, 4, 0])), 8).is_err(), "count and length differ");
    }

    #[test]
    fn a_listing_that_gets_nowhere_is_refused() {
        let frame = words(&[0, 0, 0, 0, 0, 0]);
        assert!(decode_list(&mut Reader(frame), Place::default()).is_err_and(|e| e.is(Kind::Corrupt)));
    }

    proptest! {
        #[test]
        fn any_reply_ends_in_a_value_or_an_error(list in proptest::collection::vec(prop_oneof![0u32..3, any::<u32>()], 0..80)) {
            let _ = decode_list(&mut Reader(words(&list)), Place::default());
            let _ = decode_read(&mut Reader(words(&list)), 64);
        }
    }
}
