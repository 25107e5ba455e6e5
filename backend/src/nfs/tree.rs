//! Changes to an NFSv3 export: [`Tree`] of `nfs` sources.
//!
//! The server knows us as root (AUTH_SYS), so a new object gets its owner from us: in the call that makes it, and corrected after it where that was not
//! enough (a directory with the set-group-id bit, seen in the directory's attributes in the same reply; set-id bits, which a change of owner
//! clears). Regular files are made by CREATE EXCLUSIVE, which has no room for attributes, and get theirs by SETATTR. The verifier is a hash of what is
//! to be made where, keyed at random for each client: a call sent again brings the same one, and the server, which keeps it in the file's times,
//! knows its own work again. The *last* SETATTR sets the times, so a file that is not finished is recognised to the end.
//! What cannot be finished is removed again.
//!
//! NFSv3 has no rename that refuses to replace: [`RenameMode::NoReplace`] looks first, and the caller's lease keeps other EFC clients from the
//! name in between. It has no exchange, no extended attributes and no OPEN: opening asks nothing, and a file whose last name is removed is gone
//! for those who have it open (the FUSE client renames such files away instead).

use super::changes::{self, Made};
use super::open::Opened;
use super::{Nfs, Shared, check_name, node, ops};
use crate::tree::{Change, New, NewNode, OpenFile, RenameMode, SetTime, Tree};
use async_trait::async_trait;
use bytes::Bytes;
use efc_common::node::{Node, Time};
use efc_common::{Error, Kind, Result, Retry};
use nfs3_types::nfs3::{
    Nfs3Option, devicedata3, fattr3, mknoddata3, nfstime3, sattr3, set_atime, set_mtime, specdata3,
};
use std::hash::BuildHasher;
use std::sync::Arc;

/// The set-group-id bit.
const SETGID: u32 = 0o2000;
/// The bits that a change of owner clears.
const SETID: u32 = 0o6000;

#[async_trait]
impl Tree for Nfs {
    async fn create(&self, dir: &Bytes, name: &[u8], new: &NewNode) -> Result<Node> {
        check_name(name)?;
        let shared = &self.shared;
        let client = &shared.client;
        let wanted = Change { mode: Some(new.mode), uid: Some(new.uid), gid: Some(new.gid), ..Change::default() };
        let attributes = sattr(&wanted);
        let device = |attributes, n: u32| devicedata3 { dev_attributes: attributes, spec: specdata(n) };
        let made = match &new.what {
            New::File => {
                let hash = shared.keys.hash_one((&dir[..], name, new.mode, new.uid, new.gid));
                changes::create(client, dir, name, hash.to_be_bytes()).await
            }
            New::Directory => changes::mkdir(client, dir, name, attributes).await,
            New::Symlink(target) => {
                let attributes = sattr3 { mode: Nfs3Option::None, ..attributes };
                changes::symlink(client, dir, name, target, attributes).await
            }
            New::Fifo => changes::mknod(client, dir, name, mknoddata3::NF3FIFO(attributes)).await,
            New::Socket => changes::mknod(client, dir, name, mknoddata3::NF3SOCK(attributes)).await,
            New::CharDevice(n) => changes::mknod(client, dir, name, mknoddata3::NF3CHR(device(attributes, *n))).await,
            New::BlockDevice(n) => changes::mknod(client, dir, name, mknoddata3::NF3BLK(device(attributes, *n))).await,
        }?;
        match shared.finish(dir, name, new, made).await {
            Ok(node) => Ok(node),
            // The next attempt finds it and goes on. Part of this one was executed, whatever the error says of the rest.
            Err(e) if e.retry() == Retry::Later => Err(e.share()),
            Err(e) => {
                let left = changes::remove(client, dir, name, new.what == New::Directory).await;
                Err(match left {
                    Ok(()) => refused(e),
                    Err(left) => refused(e).with("left_behind", left),
                })
            }
        }
    }

    async fn link(&self, file: &Bytes, dir: &Bytes, name: &[u8]) -> Result<Node> {
        check_name(name)?;
        let attributes = changes::link(&self.shared.client, file, dir, name).await?;
        self.shared.fresh(file, attributes).await
    }

    async fn remove(&self, dir: &Bytes, name: &[u8], directory: bool) -> Result<()> {
        check_name(name)?;
        changes::remove(&self.shared.client, dir, name, directory).await
    }

    async fn rename(&self, from: (&Bytes, &[u8]), to: (&Bytes, &[u8]), mode: RenameMode) -> Result<Node> {
        check_name(from.1)?;
        check_name(to.1)?;
        let client = &self.shared.client;
        match mode {
            RenameMode::Replace => {}
            RenameMode::NoReplace => match ops::lookup(client, to.0, to.1).await {
                Ok(_) => return Err(Error::new(Kind::AlreadyExists, "the target of the rename exists")),
                Err(e) if e.is(Kind::NotFound) => {}
                Err(e) => return Err(e),
            },
            RenameMode::Exchange => return Err(unsupported("exchange of two names")),
        }
        changes::rename(client, (from.0, from.1), (to.0, to.1)).await.map_err(|e| match e.kind() {
            // How some servers say that the directory to be replaced is not empty (RFC 1813 section 3.3.14).
            Kind::AlreadyExists => Error::new(Kind::NotEmpty, "the target of the rename is in use").caused_by(e),
            _ => e,
        })?;
        self.shared.resolve(to.0, to.1).await.map_err(|e| e.share())
    }

    async fn set_attr(&self, locator: &Bytes, change: &Change) -> Result<Node> {
        self.shared.change(locator, change).await
    }

    async fn set_xattr(&self, _locator: &Bytes, _name: &[u8], _value: &[u8], _flags: i32) -> Result<()> {
        Err(unsupported("extended attribute"))
    }

    async fn remove_xattr(&self, _locator: &Bytes, _name: &[u8]) -> Result<()> {
        Err(unsupported("extended attribute"))
    }

    async fn open(&self, locator: &Bytes, _write: bool) -> Result<Arc<dyn OpenFile>> {
        ops::fh(locator)?;
        Ok(Arc::new(Opened::new(self.shared.clone(), locator.clone())))
    }
}

impl Shared {
    /// The node of `attributes`, asked for if the server left them out.
    pub(super) async fn fresh(&self, locator: &Bytes, attributes: Option<fattr3>) -> Result<Node> {
        let attributes = match attributes {
            Some(a) => a,
            None => ops::getattr(&self.client, locator).await.map_err(|e| e.share())?,
        };
        Ok(node(locator.clone(), &attributes))
    }

    /// Sets attributes and returns the fresh ones.
    pub(super) async fn change(&self, locator: &Bytes, change: &Change) -> Result<Node> {
        if change.size.is_some()
            && let Some(kept) = self.kept.of(locator)
        {
            // Else data sent again after a restart of the server would undo this.
            kept.commit(&self.client, locator).await?;
        }
        let attributes = self.set(locator, change).await?;
        self.fresh(locator, attributes).await
    }

    /// SETATTR, in two steps where the first would undo a part of the second.
    async fn set(&self, object: &[u8], change: &Change) -> Result<Option<fattr3>> {
        let owned = change.uid.is_some() || change.gid.is_some();
        if owned && change.mode.is_some_and(|m| m & SETID != 0) {
            let first = Change { mode: None, atime: None, mtime: None, ..*change };
            changes::setattr(&self.client, object, sattr(&first)).await?;
            let second = Change { mode: change.mode, atime: change.atime, mtime: change.mtime, ..Change::default() };
            return changes::setattr(&self.client, object, sattr(&second)).await;
        }
        changes::setattr(&self.client, object, sattr(change)).await
    }

    /// Gives a new object what the call that made it could not.
    async fn finish(&self, dir: &Bytes, name: &[u8], new: &NewNode, made: Made) -> Result<Node> {
        let handle = match made.handle {
            Some(handle) => handle,
            None => ops::lookup(&self.client, dir, name).await?.handle,
        };
        let is = match made.attributes {
            Some(a) => a,
            None => ops::getattr(&self.client, &handle).await?,
        };
        let above = match made.above {
            Some(a) => a,
            None => ops::getattr(&self.client, dir).await?,
        };
        let inherits = above.mode & SETGID != 0;
        let gid = if inherits { above.gid } else { new.gid };
        let mode = new.mode & 0o7777 | if inherits && new.what == New::Directory { SETGID } else { 0 };
        let has_mode = !matches!(new.what, New::Symlink(_));
        let times = (new.what == New::File).then_some(SetTime::Now);
        let change = Change {
            uid: (is.uid != new.uid).then_some(new.uid),
            gid: (is.gid != gid).then_some(gid),
            mode: (has_mode && is.mode & 0o7777 != mode).then_some(mode),
            size: None,
            atime: times,
            mtime: times,
        };
        if change == Change::default() {
            return Ok(node(handle, &is));
        }
        let attributes = self.set(&handle, &change).await?;
        self.fresh(&handle, attributes).await
    }
}

/// The error of a new object that could not be given its owner.
fn refused(e: Error) -> Error {
    match e.kind() {
        Kind::NotPermitted | Kind::PermissionDenied => Error::new(
            Kind::PermissionDenied,
            "the server does not let us give a new file to its owner; export with no_root_squash",
        )
        .caused_by(e),
        _ => e,
    }
}

pub(super) fn unsupported(what: &str) -> Error {
    Error::new(Kind::Unsupported, format!("NFSv3 has no {what}"))
}

fn sattr(change: &Change) -> sattr3 {
    fn option<T: nfs3_types::xdr_codec::Pack + nfs3_types::xdr_codec::Unpack>(value: Option<T>) -> Nfs3Option<T> {
        value.map_or(Nfs3Option::None, Nfs3Option::Some)
    }
    sattr3 {
        mode: option(change.mode.map(|m| m & 0o7777)),
        uid: option(change.uid),
        gid: option(change.gid),
        size: option(change.size),
        atime: match change.atime {
            None => set_atime::DONT_CHANGE,
            Some(SetTime::Now) => set_atime::SET_TO_SERVER_TIME,
            Some(SetTime::At(t)) => set_atime::SET_TO_CLIENT_TIME(wire_time(t)),
        },
        mtime: match change.mtime {
            None => set_mtime::DONT_CHANGE,
            Some(SetTime::Now) => set_mtime::SET_TO_SERVER_TIME,
            Some(SetTime::At(t)) => set_mtime::SET_TO_CLIENT_TIME(wire_time(t)),
        },
    }
}

/// NFSv3 has unsigned 32-bit seconds: times before 1970 and after 2106 become the nearest it has, as in the kernel's client.
fn wire_time(t: Time) -> nfstime3 {
    match u32::try_from(t.secs) {
        Ok(seconds) => nfstime3 { seconds, nseconds: t.nanos.min(999_999_999) },
        Err(_) if t.secs < 0 => nfstime3 { seconds: 0, nseconds: 0 },
        Err(_) => nfstime3 { seconds: u32::MAX, nseconds: 0 },
    }
}

/// The reverse of [`super::device`].
fn specdata(device: u32) -> specdata3 {
    specdata3 { specdata1: device >> 8 & 0xfff, specdata2: device & 0xff | device >> 12 & 0xfff00 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_go_there_and_back() {
        for n in [0, 0x103, 0x801, 0xf_ffff, u32::MAX, 0x1234_5678] {
            let s = specdata(n);
            assert_eq!(super::super::device(s.specdata1, s.specdata2), n, "{n:x}");
        }
    }

    #[test]
    fn times_that_the_wire_does_not_have_become_the_nearest() {
        let at = |secs| wire_time(Time { secs, nanos: 5 });
        assert_eq!((at(-1).seconds, at(7).seconds, at(7).nseconds, at(1 << 33).seconds), (0, 7, 5, u32::MAX));
    }
}
