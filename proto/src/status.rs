//! The one table between [`Kind`] and wire codes, for data-plane `Fail` frames and gRPC statuses.

use crate::data;
use efc_common::{Error, Kind, Retry};
use tonic::Code;

const TABLE: &[(Kind, u32, Code)] = &[
    (Kind::NotFound, 1, Code::NotFound),
    (Kind::AlreadyExists, 2, Code::AlreadyExists),
    (Kind::NotADirectory, 3, Code::FailedPrecondition),
    (Kind::IsADirectory, 4, Code::FailedPrecondition),
    (Kind::PermissionDenied, 5, Code::PermissionDenied),
    (Kind::Stale, 6, Code::Aborted),
    (Kind::Invalid, 7, Code::InvalidArgument),
    (Kind::Unsupported, 8, Code::Unimplemented),
    (Kind::Timeout, 9, Code::DeadlineExceeded),
    (Kind::Unavailable, 10, Code::Unavailable),
    (Kind::Exhausted, 11, Code::ResourceExhausted),
    (Kind::Corrupt, 12, Code::DataLoss),
    (Kind::NotLeader, 13, Code::Unavailable),
    (Kind::Cancelled, 14, Code::Cancelled),
    (Kind::NoSpace, 15, Code::ResourceExhausted),
    (Kind::NoData, 16, Code::NotFound),
    (Kind::NameTooLong, 17, Code::InvalidArgument),
    (Kind::Busy, 18, Code::FailedPrecondition),
    (Kind::NotEmpty, 20, Code::FailedPrecondition),
    (Kind::NotPermitted, 21, Code::PermissionDenied),
    (Kind::TooLarge, 22, Code::OutOfRange),
    (Kind::TooManyLinks, 23, Code::FailedPrecondition),
    (Kind::CrossDevice, 24, Code::FailedPrecondition),
    (Kind::NoQuota, 25, Code::ResourceExhausted),
    (Kind::Conflict, 26, Code::Aborted),
    (Kind::Deadlock, 27, Code::Aborted),
    (Kind::Fenced, 28, Code::FailedPrecondition),
    (Kind::OutOfRange, 29, Code::OutOfRange),
    (Kind::Io, 19, Code::Internal),
];

/// Metadata keys of a gRPC status: our exact kind, and the leader's address with [`Kind::NotLeader`].
pub const KIND_KEY: &str = "efc-kind";
/// See [`KIND_KEY`].
pub const LEADER_KEY: &str = "efc-leader";

fn row(kind: Kind) -> &'static (Kind, u32, Code) {
    TABLE.iter().find(|r| r.0 == kind).unwrap_or(&TABLE[TABLE.len() - 1])
}

/// The `Fail` message of an error.
pub fn to_fail(e: &Error, item: u32) -> data::Fail {
    data::Fail { item, code: row(e.kind()).1, retry: e.retry() == Retry::Later, message: e.to_string() }
}

/// The error of a `Fail` message; an unknown code is an I/O error.
pub fn from_fail(f: &data::Fail) -> Error {
    let kind = TABLE.iter().find(|r| r.1 == f.code).map_or(Kind::Io, |r| r.0);
    Error::new(kind, f.message.clone()).with_retry(if f.retry { Retry::Later } else { Retry::Never })
}

/// The gRPC status of an error. A `leader` context value travels as metadata.
pub fn to_status(e: &Error) -> tonic::Status {
    let mut s = tonic::Status::new(row(e.kind()).2, e.to_string());
    let mut put = |key: &'static str, value: &str| {
        if let Ok(v) = value.parse() {
            s.metadata_mut().insert(key, v);
        }
    };
    put(KIND_KEY, &row(e.kind()).1.to_string());
    if let Some(leader) = e.context("leader") {
        put(LEADER_KEY, leader);
    }
    s
}

/// The error of a gRPC status, ours or one the transport made.
pub fn from_status(s: &tonic::Status) -> Error {
    let code = s.metadata().get(KIND_KEY).and_then(|v| v.to_str().ok()).and_then(|t| t.parse::<u32>().ok());
    let kind = match code.and_then(|c| TABLE.iter().find(|r| r.1 == c)) {
        Some(r) => r.0,
        None => TABLE.iter().find(|r| r.2 == s.code()).map_or(Kind::Io, |r| r.0),
    };
    let e = Error::new(kind, s.message().to_string());
    match s.metadata().get(LEADER_KEY).and_then(|v| v.to_str().ok()) {
        Some(leader) => e.with("leader", leader),
        None => e,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_both_wires() {
        for (kind, _, _) in TABLE {
            let e = Error::new(*kind, "x").with("leader", "h:1");
            let back = from_fail(&to_fail(&e, 3));
            assert_eq!((back.kind(), back.retry()), (e.kind(), e.retry()));
            let back = from_status(&to_status(&e));
            assert_eq!((back.kind(), back.context("leader")), (*kind, Some("h:1")));
        }
    }

    #[test]
    fn codes_are_unique() {
        let mut codes: Vec<u32> = TABLE.iter().map(|r| r.1).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), TABLE.len());
    }
}
