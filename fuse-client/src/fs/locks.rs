//! Advisory locks: GETLK, SETLK and SETLKW, which are asked of the masters ([`crate::lock`]).
//!
//! `flock` arrives as a lock on the whole file whose owner is the open file. The kernel tells FLUSH and RELEASE: POSIX locks of a process end when it closes any descriptor of the
//! file, others with the open file.

use super::Shared;
use super::callers::interrupted;
use super::errno::NoLock;
use crate::kernel::{Caller, LockOut, LockRange};
use crate::lock::Asker;
use crate::namespace::Inode;
use efc_common::Result;
use efc_common::lock::{Lock, LockFile, LockOwner, Patience, Verdict};

impl Shared {
    /// The file as locks name it: by its number where the origin has one, which stays when it is renamed.
    fn lock_file(&self, inode: &Inode) -> Result<LockFile> {
        let now = inode.now();
        let source = self.parts.source.id();
        match now.attr.fileid {
            0 => LockFile::new(source, &now.locator),
            id => LockFile::new(source, &id.to_be_bytes()),
        }
    }

    fn asker(&self, inode: &Inode, owner: u64, handle: u64, pid: u32) -> Result<Asker> {
        Ok(Asker { file: self.lock_file(inode)?, owner: LockOwner(owner), handle, pid })
    }

    /// GETLK: the lock that stands against `range`, if any.
    pub(super) async fn test_lock(&self, inode: &Inode, fh: u64, owner: u64, range: LockRange) -> Result<Had<LockOut>> {
        let Some(beliefs) = self.beliefs.as_ref() else { return Ok(Err(NoLock::NotNow)) };
        let lock = wanted(range);
        let by = self.asker(inode, owner, fh, range.pid)?;
        let asked =
            tokio::time::timeout(beliefs.deadline, beliefs.leases.locks().lock(&by, lock, Patience::Test)).await;
        Ok(match asked {
            Err(_) | Ok(Ok(Verdict::TooMany | Verdict::Deadlock)) => Err(NoLock::NotNow),
            Ok(Err(e)) => return Err(e),
            Ok(Ok(Verdict::Granted)) => Ok(LockOut { kind: libc::F_UNLCK, ..range }),
            Ok(Ok(Verdict::Denied { by, pid })) => {
                let kind = if by.exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
                Ok(LockOut { start: by.start, end: by.end, kind, pid })
            }
        })
    }

    /// SETLK and SETLKW.
    pub(super) async fn set_lock(
        &self,
        caller: Caller,
        inode: &Inode,
        fh: u64,
        owner: u64,
        range: LockRange,
        wait: bool,
    ) -> Result<Had<()>> {
        let Some(beliefs) = self.beliefs.as_ref() else { return Ok(Err(NoLock::NotNow)) };
        let by = self.asker(inode, owner, fh, range.pid)?;
        if range.kind == libc::F_UNLCK {
            beliefs.leases.locks().unlock(&by.file, by.owner, range.start, range.end).await;
            return Ok(Ok(()));
        }
        let lock = wanted(range);
        let patience = if wait { Patience::Wait } else { Patience::Try };
        let verdict = tokio::select! {
            verdict = beliefs.leases.locks().lock(&by, lock, patience) => verdict?,
            () = interrupted(caller.pid), if wait => return Ok(Err(NoLock::Interrupted)),
            () = tokio::time::sleep(beliefs.deadline), if !wait => return Ok(Err(NoLock::NotNow)),
        };
        Ok(match verdict {
            Verdict::Granted => Ok(()),
            Verdict::Denied { .. } => Err(NoLock::Held),
            Verdict::Deadlock => Err(NoLock::Deadlock),
            Verdict::TooMany => Err(NoLock::NotNow),
        })
    }

    /// FLUSH: a process closed a descriptor of the file, which ends its POSIX locks there.
    pub(super) async fn unlock_owner(&self, inode: &Inode, owner: u64) {
        let Some(beliefs) = self.beliefs.as_ref().filter(|b| !b.leases.locks().is_empty()) else { return };
        if let Ok(file) = self.lock_file(inode) {
            beliefs.leases.locks().unlock(&file, LockOwner(owner), 0, u64::MAX).await;
        }
    }

    /// RELEASE: the open file is closed for good.
    pub(super) async fn unlock_handle(&self, fh: u64) {
        let Some(beliefs) = self.beliefs.as_ref().filter(|b| !b.leases.locks().is_empty()) else { return };
        if let Ok(handle) = self.files.get(fh)
            && let Ok(file) = self.lock_file(&handle.inode)
        {
            beliefs.leases.locks().close(&file, fh).await;
        }
    }
}

fn wanted(range: LockRange) -> Lock {
    Lock { start: range.start, end: range.end, exclusive: range.kind == libc::F_WRLCK }
}

/// Or why not.
pub(super) type Had<T> = std::result::Result<T, NoLock>;
