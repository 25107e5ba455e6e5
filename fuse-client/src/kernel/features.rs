//! What the kernel of this machine can do for EFC, for `efc-fuse doctor`. The INIT request says most of it: a FUSE superblock is made without
//! mounting it anywhere (`fsopen`, Linux 5.2), the INIT that the kernel sends is read, and both are thrown away.

use std::fs;
use std::os::fd::AsFd;

use efc_common::{Error, Kind, Result};
use fuser::InitFlags;
use nix::poll::{PollFd, PollFlags, poll};
use rustix::mount::{FsOpenFlags, fsconfig_create, fsconfig_set_string, fsopen};
use serde::Serialize;

use super::init::InitRecord;
use super::mount::{max_pages_limit, open_device};
use super::notify::EPOCH_ABI_MINOR;

/// The answer of a probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KernelFeatures {
    /// Protocol version, (7, minor).
    pub abi: (u32, u32),
    /// A crash of the mount process costs a pause and no error: requests it took are sent to its successor (Linux 6.9).
    pub resend: bool,
    /// All cached names can be dropped without waiting for a directory (Linux 6.16).
    pub epoch: bool,
    /// Names can be made to expire without taking away what is open below them (Linux 6.2).
    pub expire_only: bool,
    /// Warm open, read and close of a read-only file cost no request.
    pub no_open: bool,
    /// Attributes come with directory pages.
    pub readdirplus: bool,
    /// Reads of node-local files can bypass the mount process (Linux 6.9).
    pub passthrough: bool,
    /// The kernel can take requests over io_uring, and the module parameter `enable_uring` is on.
    pub io_uring: bool,
    /// `fs.fuse.max_pages_limit`: the largest request, pages; `None` where it is fixed at 256.
    pub max_pages_limit: Option<u32>,
}

impl KernelFeatures {
    /// Asks the kernel. Needs the right to mount, leaves nothing behind.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] without /dev/fuse, FUSE, or on kernels before 5.2; [`Kind::PermissionDenied`] without CAP_SYS_ADMIN.
    pub fn probe() -> Result<KernelFeatures> {
        let device = open_device()?;
        let failed = |e: rustix::io::Errno| {
            let kind = match e {
                rustix::io::Errno::PERM | rustix::io::Errno::ACCESS => Kind::PermissionDenied,
                _ => Kind::Unsupported,
            };
            Error::new(kind, "no FUSE superblock can be made; probing needs root and Linux 5.2")
                .caused_by(std::io::Error::from(e))
        };
        let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed)?;
        let number = std::os::fd::AsRawFd::as_raw_fd(&device).to_string();
        for (key, value) in [("fd", number.as_str()), ("rootmode", "40000"), ("user_id", "0"), ("group_id", "0")] {
            fsconfig_set_string(context.as_fd(), key, value).map_err(failed)?;
        }
        fsconfig_create(context.as_fd()).map_err(failed)?;
        let mut ready = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, 5_000u16).map_err(std::io::Error::from)? == 0 {
            return Err(Error::new(Kind::Timeout, "the kernel sent no INIT request"));
        }
        // The kernel wants room for its largest header even for INIT.
        let mut request = vec![0u8; 64 << 10];
        let len = nix::unistd::read(&device, &mut request).map_err(std::io::Error::from)?;
        let (abi, offered) = InitRecord::offered_by(&request[..len])?;
        Ok(Self::from_offer(abi, offered))
    }

    /// The features behind the flags of an INIT request.
    pub fn from_offer(abi: (u32, u32), offered: u64) -> KernelFeatures {
        let has = |flag: InitFlags| offered & flag.bits() != 0;
        KernelFeatures {
            abi,
            resend: has(InitFlags::FUSE_HAS_RESEND),
            epoch: abi.1 >= EPOCH_ABI_MINOR,
            expire_only: has(InitFlags::FUSE_HAS_EXPIRE_ONLY),
            no_open: has(InitFlags::FUSE_NO_OPEN_SUPPORT),
            readdirplus: has(InitFlags::FUSE_DO_READDIRPLUS),
            passthrough: has(InitFlags::FUSE_PASSTHROUGH),
            io_uring: has(InitFlags::FUSE_OVER_IO_URING) && uring_enabled(),
            max_pages_limit: max_pages_limit(),
        }
    }
}

fn uring_enabled() -> bool {
    fs::read_to_string("/sys/module/fuse/parameters/enable_uring").is_ok_and(|v| v.trim() == "Y")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_become_features() {
        let old = KernelFeatures::from_offer((7, 31), InitFlags::FUSE_DO_READDIRPLUS.bits());
        assert!(old.readdirplus && !old.resend && !old.epoch && !old.passthrough && !old.io_uring);
        let new =
            KernelFeatures::from_offer((7, 45), (InitFlags::FUSE_HAS_RESEND | InitFlags::FUSE_PASSTHROUGH).bits());
        assert!(new.resend && new.epoch && new.passthrough && !new.readdirplus);
    }
}
