//! The one table from error kinds to errno. What an application sees is decided here and nowhere else.

use efc_common::Kind;

/// The errno of an error kind.
pub fn errno(kind: Kind) -> i32 {
    match kind {
        Kind::NotFound => libc::ENOENT,
        Kind::AlreadyExists => libc::EEXIST,
        Kind::NotADirectory => libc::ENOTDIR,
        Kind::IsADirectory => libc::EISDIR,
        // The origin refuses the *mount's* credentials: for the application it is a permission problem.
        Kind::PermissionDenied => libc::EACCES,
        Kind::Stale => libc::ESTALE,
        Kind::Invalid => libc::EINVAL,
        Kind::Unsupported => libc::EOPNOTSUPP,
        // Waited for long enough: applications understand EIO, few understand ETIMEDOUT from read(2).
        Kind::Timeout | Kind::Unavailable | Kind::Exhausted | Kind::NotLeader | Kind::Corrupt | Kind::Io => libc::EIO,
        Kind::Cancelled => libc::EINTR,
        Kind::NoSpace => libc::ENOSPC,
        Kind::NoData => libc::ENODATA,
        Kind::NameTooLong => libc::ENAMETOOLONG,
        Kind::Busy => libc::EBUSY,
        Kind::NotEmpty => libc::ENOTEMPTY,
        Kind::NotPermitted => libc::EPERM,
        Kind::TooLarge => libc::EFBIG,
        Kind::TooManyLinks => libc::EMLINK,
        Kind::CrossDevice => libc::EXDEV,
        Kind::NoQuota => libc::EDQUOT,
        // Nothing was overwritten and nothing is lost, but what was written is not at its place.
        Kind::Conflict => libc::ESTALE,
        Kind::Deadlock => libc::EDEADLK,
        // The mount was cut off for longer than its lease.
        Kind::Fenced => libc::EIO,
        Kind::OutOfRange => libc::ERANGE,
        // `Kind` is non-exhaustive for other crates; a kind without a line here is an I/O error.
        _ => libc::EIO,
    }
}

/// Why an advisory lock is not had, which is no error of anybody's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoLock {
    /// Somebody else has it.
    Held,
    /// To wait would be to wait for oneself.
    Deadlock,
    /// Who waited has a signal to take.
    Interrupted,
    /// The masters cannot be asked, or there are too many.
    NotNow,
}

/// The errno of a lock that is not had.
pub fn no_lock(why: NoLock) -> i32 {
    match why {
        NoLock::Held => libc::EAGAIN,
        NoLock::Deadlock => libc::EDEADLK,
        NoLock::Interrupted => libc::EINTR,
        NoLock::NotNow => libc::ENOLCK,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_turns_into_success_or_into_a_lie_about_existence() {
        let kinds = [
            Kind::PermissionDenied,
            Kind::Stale,
            Kind::Timeout,
            Kind::Unavailable,
            Kind::Exhausted,
            Kind::Corrupt,
            Kind::Io,
            Kind::Cancelled,
        ];
        for k in kinds {
            assert!(errno(k) > 0 && errno(k) != libc::ENOENT, "{k:?}");
        }
        assert_eq!((errno(Kind::NotFound), errno(Kind::Stale)), (libc::ENOENT, libc::ESTALE));
    }
}
