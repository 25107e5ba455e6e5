//! The INIT agreement: what we ask for, what came of it ([`InitRecord`]), and the same record turned back into an INIT request for a process
//! that adopts a running mount. The kernel sends INIT once in the life of a connection; the record is how a successor learns what
//! was agreed, and it travels with the fd.

use efc_common::{Error, Kind, Result};
use fuser::InitFlags;
use serde::{Deserialize, Serialize};

use super::mount::max_pages_limit;
use super::session::SessionConfig;
use super::types::Negotiated;

/// Version of the record's format; a record of another version is refused.
pub const INIT_RECORD_FORMAT: u32 = 1;

/// Size of an INIT request: `fuse_in_header` (40) and `fuse_init_in` (64), bytes.
pub(super) const INIT_REQUEST_BYTES: usize = 104;
const OPCODE_INIT: u32 = 26;

/// Pages of the largest request on kernels without a setting for it.
const PAGES_MAX: u32 = 256;

/// What was agreed at INIT. Plain data, meant to be stored and handed over (as JSON).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitRecord {
    /// [`INIT_RECORD_FORMAT`].
    pub format: u32,
    /// Protocol major version of the kernel.
    pub abi_major: u32,
    /// Protocol minor version of the kernel.
    pub abi_minor: u32,
    /// Everything the kernel offered (INIT flags, `flags2` in the upper half).
    pub offered: u64,
    /// What was switched on.
    pub granted: u64,
    /// Read-ahead the kernel offered, bytes.
    pub max_readahead_offered: u32,
    /// Read-ahead agreed, bytes.
    pub max_readahead: u32,
    /// Largest READ or WRITE, bytes, after the system's limit.
    pub max_request_bytes: u32,
    /// Background requests.
    pub max_background: u16,
    /// Device number of what is mounted (major, minor), for who adopts it. None: an earlier version wrote the record.
    #[serde(default)]
    pub device: Option<(u32, u32)>,
}

impl InitRecord {
    /// The record as bytes.
    ///
    /// # Errors
    /// Never for a record made by this process; the signature is the serialiser's.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(|e| Error::new(Kind::Invalid, "INIT record cannot be written").caused_by(e))
    }

    /// Reads what [`InitRecord::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] for bytes that are no record, [`Kind::Unsupported`] for another format or protocol version.
    pub fn from_bytes(bytes: &[u8]) -> Result<InitRecord> {
        let record: InitRecord = serde_json::from_slice(bytes)
            .map_err(|e| Error::new(Kind::Corrupt, "saved INIT record is not readable").caused_by(e))?;
        record.check()?;
        Ok(record)
    }

    /// Does this kernel send requests again?
    pub(super) fn has_resend(&self) -> bool {
        self.granted & InitFlags::FUSE_HAS_RESEND.bits() != 0
    }

    /// Refuses a record this process cannot serve.
    pub(super) fn check(&self) -> Result<()> {
        if self.format != INIT_RECORD_FORMAT {
            let text = format!("saved INIT record has format {}, this version reads {INIT_RECORD_FORMAT}", self.format);
            return Err(Error::new(Kind::Unsupported, text));
        }
        if self.abi_major != 7 || self.abi_minor < 6 {
            let text = format!("saved INIT record speaks FUSE {}.{}, not 7.x", self.abi_major, self.abi_minor);
            return Err(Error::new(Kind::Unsupported, text));
        }
        Ok(())
    }

    /// The same facts for the file system.
    pub(super) fn negotiated(&self, adopted: bool) -> Negotiated {
        Negotiated {
            abi: (self.abi_major, self.abi_minor),
            offered: self.offered,
            granted: self.granted,
            max_request_bytes: self.max_request_bytes,
            max_readahead: self.max_readahead,
            max_background: self.max_background,
            adopted,
        }
    }

    /// The INIT request the kernel sent, as far as anybody looks at it.
    pub(super) fn replay(&self) -> [u8; INIT_REQUEST_BYTES] {
        let high = (self.offered >> 32) as u32;
        let mut low = self.offered as u32;
        if high != 0 {
            low |= InitFlags::FUSE_INIT_EXT.bits() as u32;
        }
        let mut out = [0u8; INIT_REQUEST_BYTES];
        let mut put32 = |at: usize, v: u32| out[at..at + 4].copy_from_slice(&v.to_ne_bytes());
        put32(0, INIT_REQUEST_BYTES as u32);
        put32(4, OPCODE_INIT);
        // unique = 1; node, uid, gid, pid stay 0.
        put32(8, if cfg!(target_endian = "little") { 1 } else { 0 });
        put32(12, if cfg!(target_endian = "little") { 0 } else { 1 });
        for (i, v) in [self.abi_major, self.abi_minor, self.max_readahead_offered, low, high].into_iter().enumerate() {
            put32(40 + 4 * i, v);
        }
        out
    }

    /// Reads an INIT request as the kernel sends it; only what a feature probe wants to know.
    pub(super) fn offered_by(request: &[u8]) -> Result<((u32, u32), u64)> {
        let word = |at: usize| -> Result<u32> {
            let bytes = request.get(at..at + 4).and_then(|b| b.try_into().ok());
            bytes.map(u32::from_ne_bytes).ok_or_else(|| Error::new(Kind::Corrupt, "INIT request is too short"))
        };
        if word(4)? != OPCODE_INIT {
            return Err(Error::new(Kind::Corrupt, "the kernel's first request is not INIT"));
        }
        let mut offered = u64::from(word(52)?);
        if offered & InitFlags::FUSE_INIT_EXT.bits() != 0 {
            offered |= u64::from(word(56)?) << 32;
        }
        Ok(((word(40)?, word(44)?), offered & !InitFlags::FUSE_INIT_EXT.bits()))
    }
}

fn page_bytes() -> u32 {
    // SAFETY: plain query of a constant.
    u32::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// What a session wants from INIT.
#[derive(Debug, Clone)]
pub(super) struct InitRequest {
    flags: InitFlags,
    max_write: u32,
    max_readahead: u32,
    max_background: u16,
    congestion_threshold: u16,
}

impl InitRequest {
    /// Never asked for: POSIX_ACL (modes are the whole truth here), READDIRPLUS_AUTO (it stops sending attributes with names after the first
    /// page, and then each file costs a look-up), EXPORT_SUPPORT (the kernel would ask for nodes by number that it has long forgotten), and
    /// SETXATTR_EXT, on which fuser 0.18 panics.
    pub(super) fn new(config: &SessionConfig) -> InitRequest {
        let mut flags = InitFlags::FUSE_ASYNC_READ
            | InitFlags::FUSE_BIG_WRITES
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_CACHE_SYMLINKS
            | InitFlags::FUSE_MAX_PAGES
            | InitFlags::FUSE_HAS_EXPIRE_ONLY
            | InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP;
        flags.set(InitFlags::FUSE_HAS_RESEND, config.resend);
        flags.set(InitFlags::FUSE_DO_READDIRPLUS, config.readdirplus);
        flags.set(InitFlags::FUSE_NO_OPEN_SUPPORT, config.no_open);
        flags.set(InitFlags::FUSE_NO_OPENDIR_SUPPORT, config.no_opendir);
        flags.set(InitFlags::FUSE_POSIX_LOCKS | InitFlags::FUSE_FLOCK_LOCKS, config.locks);
        let max_background = config.max_background.max(1);
        InitRequest {
            flags,
            max_write: config.max_request_bytes,
            max_readahead: config.max_readahead_bytes,
            max_background,
            congestion_threshold: config
                .congestion_threshold
                .unwrap_or(max_background / 4 * 3)
                .clamp(1, max_background),
        }
    }

    /// Settles with the kernel: asks only for what it offers, so nothing here can be refused.
    pub(super) fn negotiate(&self, kernel: &mut fuser::KernelConfig) -> InitRecord {
        let offered = kernel.capabilities();
        let granted = self.flags & offered;
        let mut result = kernel.add_capabilities(granted).map_err(|bits| bits.bits());
        // The setters answer the nearest value they would take.
        let max_readahead_offered = match kernel.set_max_readahead(u32::MAX) {
            Ok(_) => u32::MAX,
            Err(most) => most,
        };
        let max_readahead = self.max_readahead.min(max_readahead_offered);
        if max_readahead > 0 {
            result = result.and(kernel.set_max_readahead(max_readahead).map(drop).map_err(u64::from));
        }
        let max_write = match kernel.set_max_write(self.max_write) {
            Ok(_) => self.max_write,
            Err(nearest) => kernel.set_max_write(nearest).map_or(nearest, |_| nearest),
        };
        result = result.and(kernel.set_max_background(self.max_background).map(drop).map_err(u64::from));
        result = result.and(kernel.set_congestion_threshold(self.congestion_threshold).map(drop).map_err(u64::from));
        if let Err(refused) = result {
            tracing::warn!(refused, "a value of the INIT answer was refused; its default is used");
        }
        let system_bytes = max_pages_limit().unwrap_or(PAGES_MAX).saturating_mul(page_bytes());
        let abi = kernel.kernel_abi();
        InitRecord {
            format: INIT_RECORD_FORMAT,
            abi_major: abi.0,
            abi_minor: abi.1,
            offered: offered.bits(),
            granted: granted.bits(),
            max_readahead_offered,
            max_readahead,
            max_request_bytes: max_write.min(system_bytes),
            max_background: self.max_background,
            device: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> InitRecord {
        InitRecord {
            format: INIT_RECORD_FORMAT,
            abi_major: 7,
            abi_minor: 45,
            offered: InitFlags::FUSE_ASYNC_READ.bits() | InitFlags::FUSE_HAS_RESEND.bits(),
            granted: InitFlags::FUSE_ASYNC_READ.bits(),
            max_readahead_offered: 131_072,
            max_readahead: 131_072,
            max_request_bytes: 1 << 20,
            max_background: 64,
            device: Some((0, 42)),
        }
    }

    #[test]
    fn a_record_survives_storage_and_replay() {
        let r = record();
        assert_eq!(InitRecord::from_bytes(&r.to_bytes().expect("writes")).expect("reads"), r);
        assert_eq!(InitRecord::offered_by(&r.replay()).expect("parses"), ((7, 45), r.offered));
    }

    #[test]
    fn strange_records_are_refused_with_a_reason() {
        let err = |bytes: &[u8]| InitRecord::from_bytes(bytes).expect_err("refused").kind();
        assert_eq!(err(b"{}"), Kind::Corrupt);
        let later = InitRecord { format: 2, ..record() };
        assert_eq!(err(&later.to_bytes().expect("writes")), Kind::Unsupported);
        let other = InitRecord { abi_major: 8, ..record() };
        assert_eq!(err(&other.to_bytes().expect("writes")), Kind::Unsupported);
        assert_eq!(InitRecord::offered_by(&[0; 20]).expect_err("short").kind(), Kind::Corrupt);
    }
}
