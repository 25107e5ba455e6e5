//! Operations and their counters. Handles are made once per session, because a look-up by name costs more than a warm request.

use std::collections::HashMap;
use std::time::Instant;

use efc_common::metrics::{Counter, Histogram, counter, histogram};
use parking_lot::Mutex;

use super::types::Errno;

macro_rules! ops {
    ($($variant:ident $name:literal),+ $(,)?) => {
        /// One FUSE operation, as a metric label.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub(super) enum Op { $($variant),+ }

        impl Op {
            const ALL: &'static [Op] = &[$(Op::$variant),+];

            /// Label value.
            pub(super) fn name(self) -> &'static str {
                match self { $(Op::$variant => $name),+ }
            }
        }
    };
}

ops! {
    Lookup "lookup", Forget "forget", Getattr "getattr", Setattr "setattr", Readlink "readlink", Mknod "mknod", Mkdir "mkdir",
    Unlink "unlink", Rmdir "rmdir", Symlink "symlink", Rename "rename", Link "link", Open "open", Read "read", Write "write",
    Flush "flush", Release "release", Fsync "fsync", Opendir "opendir", Readdir "readdir", Readdirplus "readdirplus",
    Releasedir "releasedir", Fsyncdir "fsyncdir", Statfs "statfs", Setxattr "setxattr", Getxattr "getxattr", Listxattr "listxattr",
    Removexattr "removexattr", Access "access", Create "create", Ioctl "ioctl", Poll "poll", Fallocate "fallocate", Lseek "lseek",
    CopyFileRange "copy_file_range", Getlk "getlk", Setlk "setlk",
}

impl Op {
    /// Can it be of a kind that must not be done twice?
    pub(super) fn may_be_once(self) -> bool {
        use Op::*;
        matches!(
            self,
            Setattr
                | Mknod
                | Mkdir
                | Unlink
                | Rmdir
                | Symlink
                | Rename
                | Link
                | Create
                | Write
                | Setxattr
                | Removexattr
        )
    }
}

/// Counters of one session.
pub(super) struct Metrics {
    per_op: Vec<(Counter, Histogram)>,
    errors: Mutex<HashMap<(Op, i32), Counter>>,
    read_bytes: Counter,
}

impl Metrics {
    pub(super) fn new() -> Metrics {
        let per_op = Op::ALL
            .iter()
            .map(|op| {
                (
                    counter!("efc_fuse_requests_total", "op" => op.name()),
                    histogram!("efc_fuse_request_seconds", "op" => op.name()),
                )
            })
            .collect();
        Metrics { per_op, errors: Mutex::new(HashMap::new()), read_bytes: counter!("efc_fuse_read_bytes_total") }
    }

    /// A request was answered.
    pub(super) fn answered(&self, op: Op, since: Instant, error: Option<Errno>) {
        let (requests, seconds) = &self.per_op[op as usize];
        requests.increment(1);
        seconds.record(since.elapsed().as_secs_f64());
        if let Some(errno) = error {
            self.failed(op, errno);
        }
    }

    /// `count` FORGETs were taken; they have no answer and no latency.
    pub(super) fn forgotten(&self, count: u64) {
        self.per_op[Op::Forget as usize].0.increment(count);
    }

    /// Bytes handed to the kernel.
    pub(super) fn read_bytes(&self, bytes: usize) {
        self.read_bytes.increment(bytes as u64);
    }

    fn failed(&self, op: Op, errno: Errno) {
        // A name that is not there is an answer, and ENOSYS is how the kernel is told not to ask again.
        if errno == Errno::ENOSYS || (op == Op::Lookup && errno == Errno::ENOENT) {
            return;
        }
        let mut errors = self.errors.lock();
        let handle = errors
            .entry((op, errno.0))
            .or_insert_with(|| counter!("efc_fuse_errors_total", "op" => op.name(), "errno" => errno.name()));
        handle.increment(1);
    }
}
