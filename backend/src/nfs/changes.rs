//! The NFSv3 procedures that change something (RFC 1813 section 3): encodes arguments, calls, decodes results. Beside `ops`, which reads.

use super::ops::{fh, handle};
use super::rpc::Client;
use super::status::check;
use super::xdr::{Reader, garbled};
use bytes::Bytes;
use efc_common::Result;
use nfs3_types::nfs3::{
    COMMIT3args, CREATE3args, LINK3args, MKDIR3args, MKNOD3args, REMOVE3args, RENAME3args, RMDIR3args, SETATTR3args,
    SYMLINK3args, cookieverf3, createhow3, createverf3, diropargs3, fattr3, filename3, mknoddata3, nfs_fh3, nfspath3,
    sattr3, sattrguard3, symlinkdata3, wcc_attr,
};
use nfs3_types::xdr_codec::{Opaque, Pack, Result as Packed};
use std::io::Write;

const SETATTR: u32 = 2;
const WRITE: u32 = 7;
const CREATE: u32 = 8;
const MKDIR: u32 = 9;
const SYMLINK: u32 = 10;
const MKNOD: u32 = 11;
const REMOVE: u32 = 12;
const RMDIR: u32 = 13;
const RENAME: u32 = 14;
const LINK: u32 = 15;
const COMMIT: u32 = 21;

/// Tells whether the server lost what it had not committed: another one means that it may have.
pub(super) type Verifier = [u8; 8];

/// What a procedure that makes an object answers; all of it is optional in the protocol.
pub(super) struct Made {
    pub(super) handle: Option<Bytes>,
    pub(super) attributes: Option<fattr3>,
    /// Of the directory, after it.
    pub(super) above: Option<fattr3>,
}

/// A WRITE reply.
pub(super) struct Written {
    pub(super) attributes: Option<fattr3>,
    /// Bytes taken; at least one, at most what was sent.
    pub(super) count: usize,
    /// Is it on stable storage already?
    pub(super) stable: bool,
    pub(super) verifier: Verifier,
}

fn place<'a>(dir: &[u8], name: &'a [u8]) -> Result<diropargs3<'a>> {
    Ok(diropargs3 { dir: fh(dir)?, name: filename3(Opaque::borrowed(name)) })
}

/// The attributes after a change; those before are of no use to us.
fn after(r: &mut Reader) -> Result<Option<fattr3>> {
    r.optional::<wcc_attr>()?;
    r.optional()
}

fn made(mut r: Reader, operation: &str) -> Result<Made> {
    check(&mut r, operation)?;
    let handle = if r.bool()? { Some(handle(&mut r)?) } else { None };
    Ok(Made { handle, attributes: r.optional()?, above: after(&mut r)? })
}

/// CREATE of a regular file, EXCLUSIVE: the same call again with the same verifier finds the file it made.
pub(super) async fn create(client: &Client, dir: &[u8], name: &[u8], verifier: [u8; 8]) -> Result<Made> {
    let how = createhow3::EXCLUSIVE(createverf3(verifier));
    made(client.call(CREATE, &CREATE3args { where_: place(dir, name)?, how }).await?, "CREATE")
}

/// MKDIR.
pub(super) async fn mkdir(client: &Client, dir: &[u8], name: &[u8], attributes: sattr3) -> Result<Made> {
    made(client.call(MKDIR, &MKDIR3args { where_: place(dir, name)?, attributes }).await?, "MKDIR")
}

/// SYMLINK.
pub(super) async fn symlink(
    client: &Client,
    dir: &[u8],
    name: &[u8],
    target: &[u8],
    attributes: sattr3,
) -> Result<Made> {
    let symlink = symlinkdata3 { symlink_attributes: attributes, symlink_data: nfspath3(Opaque::borrowed(target)) };
    made(client.call(SYMLINK, &SYMLINK3args { where_: place(dir, name)?, symlink }).await?, "SYMLINK")
}

/// MKNOD.
pub(super) async fn mknod(client: &Client, dir: &[u8], name: &[u8], what: mknoddata3) -> Result<Made> {
    made(client.call(MKNOD, &MKNOD3args { where_: place(dir, name)?, what }).await?, "MKNOD")
}

/// REMOVE, or RMDIR of a directory.
pub(super) async fn remove(client: &Client, dir: &[u8], name: &[u8], directory: bool) -> Result<()> {
    let object = place(dir, name)?;
    if directory {
        check(&mut client.call(RMDIR, &RMDIR3args { object }).await?, "RMDIR")
    } else {
        check(&mut client.call(REMOVE, &REMOVE3args { object }).await?, "REMOVE")
    }
}

/// RENAME.
pub(super) async fn rename(client: &Client, from: (&[u8], &[u8]), to: (&[u8], &[u8])) -> Result<()> {
    let arguments = RENAME3args { from: place(from.0, from.1)?, to: place(to.0, to.1)? };
    check(&mut client.call(RENAME, &arguments).await?, "RENAME")
}

/// LINK; the file's attributes after it.
pub(super) async fn link(client: &Client, file: &[u8], dir: &[u8], name: &[u8]) -> Result<Option<fattr3>> {
    let mut r = client.call(LINK, &LINK3args { file: fh(file)?, link: place(dir, name)? }).await?;
    check(&mut r, "LINK")?;
    r.optional()
}

/// SETATTR without a guard; the attributes after it.
pub(super) async fn setattr(client: &Client, object: &[u8], new_attributes: sattr3) -> Result<Option<fattr3>> {
    let arguments = SETATTR3args { object: fh(object)?, new_attributes, guard: sattrguard3::None };
    let mut r = client.call(SETATTR, &arguments).await?;
    check(&mut r, "SETATTR")?;
    after(&mut r)
}

/// Arguments of WRITE up to the data, which is sent from where it is.
struct WriteHead {
    file: nfs_fh3,
    offset: u64,
    len: u32,
    stable: bool,
}

impl Pack for WriteHead {
    fn packed_size(&self) -> usize {
        self.file.packed_size() + 20
    }

    fn pack(&self, out: &mut impl Write) -> Packed<usize> {
        // stable_how: UNSTABLE or FILE_SYNC. The count, and once more as the length of the data.
        let stable: u32 = if self.stable { 2 } else { 0 };
        let mut n = self.file.pack(out)? + self.offset.pack(out)?;
        for word in [self.len, stable, self.len] {
            n += word.pack(out)?;
        }
        Ok(n)
    }
}

/// WRITE of all or the first part of `data`; `stable` wants it on stable storage at once.
pub(super) async fn write(client: &Client, file: &[u8], offset: u64, data: Bytes, stable: bool) -> Result<Written> {
    let len = data.len();
    let head = WriteHead { file: fh(file)?, offset, len: len as u32, stable };
    let mut r = client.call_with(WRITE, &head, data).await?;
    let written = decode_write(&mut r, len)?;
    if stable && !written.stable {
        return Err(garbled("WRITE is less stable than was asked for"));
    }
    Ok(written)
}

fn decode_write(r: &mut Reader, sent: usize) -> Result<Written> {
    check(r, "WRITE")?;
    let attributes = after(r)?;
    let (count, committed) = (r.u32()? as usize, r.u32()?);
    let cookieverf3(verifier) = r.fixed()?;
    if count == 0 || count > sent {
        return Err(garbled(&format!("WRITE took {count} of {sent} bytes")));
    }
    Ok(Written { attributes, count, stable: committed != 0, verifier })
}

/// COMMIT of a whole file: its attributes, and the verifier that earlier WRITEs must have had.
pub(super) async fn commit(client: &Client, file: &[u8]) -> Result<(Option<fattr3>, Verifier)> {
    let mut r = client.call(COMMIT, &COMMIT3args { file: fh(file)?, offset: 0, count: 0 }).await?;
    check(&mut r, "COMMIT")?;
    let attributes = after(&mut r)?;
    let cookieverf3(verifier) = r.fixed()?;
    Ok((attributes, verifier))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connect::connect_counted;
    use crate::tree::{New, NewNode};
    use efc_common::Kind;
    use efc_common::source::{SecretRef, SourceSpec};
    use proptest::prelude::*;

    fn words(list: &[u32]) -> Reader {
        Reader(list.iter().flat_map(|w| w.to_be_bytes()).collect())
    }

    #[test]
    fn a_write_that_takes_nothing_or_too_much_is_refused() {
        let written = decode_write(&mut words(&[0, 0, 0, 5, 0, 1, 2]), 8).expect("written");
        assert_eq!((written.count, written.stable, written.verifier), (5, false, [0, 0, 0, 1, 0, 0, 0, 2]));
        assert!(decode_write(&mut words(&[0, 0, 0, 8, 2, 1, 2]), 8).expect("written").stable);
        for count in [0, 9] {
            let refused = decode_write(&mut words(&[0, 0, 0, count, 0, 1, 2]), 8);
            assert!(refused.is_err_and(|e| e.is(Kind::Corrupt)), "{count}");
        }
    }

    #[test]
    fn the_head_of_a_write_is_as_long_as_it_says() {
        let head = WriteHead { file: fh(b"handle").expect("a handle"), offset: 1 << 40, len: 5, stable: true };
        let mut out = Vec::new();
        assert_eq!(head.pack(&mut out).expect("packed"), out.len());
        assert_eq!(head.packed_size(), out.len());
        assert_eq!(out[12..], [0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 2, 0, 0, 0, 5]);
    }

    /// What [`create`] relies on, of a real server.
    #[tokio::test]
    async fn a_server_knows_its_own_file_by_the_verifier() {
        let dir = efc_testkit::scratch("exclusive").expect("scratch");
        let server = efc_testkit::Ganesha::start(dir.path()).expect("ganesha");
        let timeout = std::time::Duration::from_secs(5);
        let port = Some(server.mount_port());
        let path = dir.path().to_str().expect("utf-8");
        let root = super::super::mount::mount("127.0.0.1", port, path, timeout).await.expect("mount").handle;
        let client = Client::new(super::super::ops::NFS, &format!("127.0.0.1:{}", server.port()), 1, timeout);
        let first = create(&client, &root, b"file", [7; 8]).await.expect("create");
        let again = create(&client, &root, b"file", [7; 8]).await.expect("the same again");
        assert_eq!(first.handle.expect("a handle"), again.handle.expect("a handle"));
        let other = create(&client, &root, b"file", [8; 8]).await;
        assert!(other.is_err_and(|e| e.is(Kind::AlreadyExists)));
    }

    /// What another process leaves when it dies between CREATE and SETATTR.
    #[tokio::test]
    async fn a_file_that_another_process_left_without_attributes_is_finished() {
        let dir = efc_testkit::scratch("unfinished").expect("scratch");
        let server = efc_testkit::Ganesha::start(dir.path()).expect("ganesha");
        let options = [("mount_port".to_string(), server.mount_port().to_string())].into();
        let spec = SourceSpec::parse(&server.url(), options, SecretRef::Anonymous).expect("a source");
        let origin = connect_counted(&spec, None).await.expect("connect");
        let (tree, root) = (origin.tree.expect("a tree"), origin.backend.root().await.expect("root").locator);
        let doubt = tree.in_doubt().expect("a tree in doubt");
        let client = Client::new(super::super::ops::NFS, &spec.endpoint, 1, std::time::Duration::from_secs(5));
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock").as_secs() as i64;
        for (name, mode, uid) in [(&b"root"[..], 0o600, 0), (b"user", 0o4711, 1234), (b"object", 0o444, 1234)] {
            let wanted = NewNode { what: New::File, mode, uid, gid: uid };
            let left = create(&client, &root, name, [7; 8]).await.expect("create").attributes.expect("attributes");
            assert!((i64::from(left.mtime.seconds) - now).abs() > 3600, "the verifier: {:?}", left.mtime);
            assert!(tree.create(&root, name, &wanted).await.is_err_and(|e| e.is(Kind::AlreadyExists)));
            let made = doubt.create(&root, name, &wanted).await.expect("finished").attr;
            assert_eq!(made.fileid, left.fileid);
            assert_eq!((made.mode, made.uid, made.gid), (Some(mode), Some(uid), Some(uid)), "{left:?}");
            assert!((made.mtime.secs - now).abs() < 3600, "{:?}", made.mtime);
            // Finished, but by another verifier.
            let again = doubt.create(&root, name, &wanted).await.expect("made already").attr;
            assert_eq!(again.fileid, left.fileid);
            if uid != 0 {
                let other = NewNode { uid: 99, ..wanted };
                let refused = doubt.create(&root, name, &other).await;
                assert!(refused.is_err_and(|e| e.is(Kind::AlreadyExists)), "it is somebody's");
            }
        }
    }

    proptest! {
        #[test]
        fn any_reply_ends_in_a_value_or_an_error(list in proptest::collection::vec(prop_oneof![0u32..3, any::<u32>()], 0..80)) {
            let _ = decode_write(&mut words(&list), 64);
            let _ = made(words(&list), "MKDIR");
        }
    }
}
