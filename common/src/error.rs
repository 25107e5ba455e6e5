//! The one error type of the house: what went wrong ([`Kind`]), whether asking again may help ([`Retry`]),
//! where (context pairs) and why (source).
//!
//! Errno and wire codes are derived from [`Kind`] in exactly one table each (`fuse-client/src/fs/errno.rs`,
//! `proto/src/status.rs`). An error is logged where it is *handled*, never where it passes by.

use std::fmt;

/// Result with the house's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, in terms a caller can branch on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// The named object, file, dataset, worker ... does not exist.
    NotFound,
    /// It exists already, or is in use.
    AlreadyExists,
    /// A directory was needed and something else was found.
    NotADirectory,
    /// A directory was found where it is not allowed.
    IsADirectory,
    /// The origin or a peer refused our identity or rights.
    PermissionDenied,
    /// The content changed under the version that was asked for.
    Stale,
    /// The caller's arguments or configuration are wrong; the message says how to mend them.
    Invalid,
    /// The operation is not offered by this origin, mount or peer.
    Unsupported,
    /// A deadline passed.
    Timeout,
    /// The peer or origin cannot be reached, or is overloaded.
    Unavailable,
    /// A budget or queue bound was hit.
    Exhausted,
    /// Bytes failed a checksum or a format check.
    Corrupt,
    /// This node is not the leader (master only); the context may name who is.
    NotLeader,
    /// The caller was cancelled or the process is stopping.
    Cancelled,
    /// The origin has no room (ENOSPC).
    NoSpace,
    /// The attribute asked for does not exist (ENODATA).
    NoData,
    /// A name is longer than the system or the origin permits.
    NameTooLong,
    /// The resource is busy (mountpoint in use, dataset mounted ...).
    Busy,
    /// The directory is not empty (ENOTEMPTY).
    NotEmpty,
    /// The operation itself is refused, whoever asks (EPERM).
    NotPermitted,
    /// The file would become larger than the origin permits (EFBIG).
    TooLarge,
    /// The origin permits no further hard link (EMLINK).
    TooManyLinks,
    /// Source and target are in different file systems (EXDEV).
    CrossDevice,
    /// The quota at the origin is used up (EDQUOT).
    NoQuota,
    /// Somebody else changed it meanwhile: a conditional write was refused, nothing was overwritten.
    Conflict,
    /// Waiting for this lock would never end (EDEADLK).
    Deadlock,
    /// The session that asks was given up: its leases have passed on.
    Fenced,
    /// A value is larger than the buffer or the origin permits (ERANGE, E2BIG).
    OutOfRange,
    /// Anything else: an I/O error or a broken invariant.
    Io,
}

impl Kind {
    /// Short lower-case name: used in logs, metrics labels and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Kind::NotFound => "not_found",
            Kind::AlreadyExists => "already_exists",
            Kind::NotADirectory => "not_a_directory",
            Kind::IsADirectory => "is_a_directory",
            Kind::PermissionDenied => "permission_denied",
            Kind::Stale => "stale",
            Kind::Invalid => "invalid",
            Kind::Unsupported => "unsupported",
            Kind::Timeout => "timeout",
            Kind::Unavailable => "unavailable",
            Kind::Exhausted => "exhausted",
            Kind::Corrupt => "corrupt",
            Kind::NotLeader => "not_leader",
            Kind::Cancelled => "cancelled",
            Kind::NoSpace => "no_space",
            Kind::NoData => "no_data",
            Kind::NameTooLong => "name_too_long",
            Kind::Busy => "busy",
            Kind::NotEmpty => "not_empty",
            Kind::NotPermitted => "not_permitted",
            Kind::TooLarge => "too_large",
            Kind::TooManyLinks => "too_many_links",
            Kind::CrossDevice => "cross_device",
            Kind::NoQuota => "no_quota",
            Kind::Conflict => "conflict",
            Kind::Deadlock => "deadlock",
            Kind::Fenced => "fenced",
            Kind::OutOfRange => "out_of_range",
            Kind::Io => "io",
        }
    }
}

/// May the same request be sent again?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Retry {
    /// Asking again gives the same answer.
    Never,
    /// A passing fault: ask again after a pause.
    Later,
}

/// An error: kind, retry verdict, message, context pairs and the error below it.
pub struct Error {
    inner: Box<Inner>,
}

struct Inner {
    kind: Kind,
    retry: Retry,
    message: String,
    context: Vec<(&'static str, String)>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind` whose retry verdict is the kind's usual one: [`Retry::Later`] for timeouts,
    /// unreachable or overloaded peers, exhausted budgets and a changed leader; else [`Retry::Never`].
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        let retry = match kind {
            Kind::Timeout | Kind::Unavailable | Kind::Exhausted | Kind::NotLeader => Retry::Later,
            _ => Retry::Never,
        };
        Error { inner: Box::new(Inner { kind, retry, message: message.into(), context: Vec::new(), source: None }) }
    }

    /// The same error with another retry verdict.
    pub fn with_retry(mut self, retry: Retry) -> Self {
        self.inner.retry = retry;
        self
    }

    /// Adds a `key=value` pair that helps the reader of the log line (path, endpoint, attempt ...).
    pub fn with(mut self, key: &'static str, value: impl fmt::Display) -> Self {
        self.inner.context.push((key, value.to_string()));
        self
    }

    /// Keeps the error below this one as its cause.
    pub fn caused_by(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.inner.source = Some(source.into());
        self
    }

    /// The same error for one more waiter: kind and verdict of the original, its context and causes folded into the
    /// message.
    pub fn share(&self) -> Self {
        Error::new(self.kind(), self.to_string()).with_retry(self.retry())
    }

    /// What went wrong.
    pub fn kind(&self) -> Kind {
        self.inner.kind
    }

    /// Whether the same request may be sent again.
    pub fn retry(&self) -> Retry {
        self.inner.retry
    }

    /// The message without context and cause.
    pub fn message(&self) -> &str {
        &self.inner.message
    }

    /// The value of a context key, if it was given.
    pub fn context(&self, key: &str) -> Option<&str> {
        self.inner.context.iter().find(|(k, _)| *k == key).map(|(_, v)| v.as_str())
    }

    /// Is this an error of `kind`?
    pub fn is(&self, kind: Kind) -> bool {
        self.inner.kind == kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.inner.message)?;
        if !self.inner.context.is_empty() {
            f.write_str(" (")?;
            for (i, (k, v)) in self.inner.context.iter().enumerate() {
                if i > 0 {
                    f.write_str(", ")?;
                }
                write!(f, "{k}={v}")?;
            }
            f.write_str(")")?;
        }
        let mut next = self.inner.source.as_deref().map(|s| s as &dyn std::error::Error);
        while let Some(s) = next {
            write!(f, ": {s}")?;
            // Our own Display already prints its causes.
            next = if s.is::<Error>() { None } else { s.source() };
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{:?}: {self}", self.inner.kind.name(), self.inner.retry)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.inner.source.as_deref().map(|s| s as _)
    }
}

/// Maps a local I/O error to the kind with the same meaning.
impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Self {
        use std::io::ErrorKind as K;
        let kind = match e.kind() {
            K::NotFound => Kind::NotFound,
            K::AlreadyExists => Kind::AlreadyExists,
            K::NotADirectory => Kind::NotADirectory,
            K::IsADirectory => Kind::IsADirectory,
            K::PermissionDenied => Kind::PermissionDenied,
            K::TimedOut => Kind::Timeout,
            K::StorageFull | K::QuotaExceeded => Kind::NoSpace,
            K::ConnectionRefused
            | K::ConnectionReset
            | K::ConnectionAborted
            | K::NotConnected
            | K::BrokenPipe
            | K::UnexpectedEof
            | K::HostUnreachable
            | K::NetworkUnreachable
            | K::NetworkDown => Kind::Unavailable,
            K::InvalidFilename => Kind::NameTooLong,
            K::InvalidInput => Kind::Invalid,
            K::InvalidData => Kind::Corrupt,
            K::Unsupported => Kind::Unsupported,
            K::StaleNetworkFileHandle => Kind::Stale,
            K::ResourceBusy => Kind::Busy,
            _ => Kind::Io,
        };
        Error::new(kind, e.to_string())
    }
}

/// Adds a message above a lower error while keeping its kind and retry verdict.
pub trait Context<T> {
    /// Wraps the error: `message` first, the old error as its cause.
    fn context(self, message: impl Into<String>) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, message: impl Into<String>) -> Result<T> {
        self.map_err(|e| {
            let below: Error = e.into();
            Error::new(below.kind(), message).with_retry(below.retry()).caused_by(below)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_names_message_context_and_cause() {
        let io = std::io::Error::new(std::io::ErrorKind::ConnectionRefused, "refused");
        let e = std::result::Result::<(), _>::Err(io).context("connect to worker").map_err(|e| e.with("addr", "h:1"));
        let e = e.expect_err("is an error");
        assert_eq!(e.to_string(), "connect to worker (addr=h:1): refused");
        assert_eq!((e.kind(), e.retry()), (Kind::Unavailable, Retry::Later));
        assert_eq!(e.context("addr"), Some("h:1"));
    }

    #[test]
    fn verdict_follows_kind_and_can_be_overruled() {
        assert_eq!(Error::new(Kind::Timeout, "x").retry(), Retry::Later);
        assert_eq!(Error::new(Kind::Stale, "x").retry(), Retry::Never);
        assert_eq!(Error::new(Kind::Timeout, "x").with_retry(Retry::Never).retry(), Retry::Never);
    }
}
