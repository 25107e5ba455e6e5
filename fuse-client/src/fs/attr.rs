//! Attributes as applications see them: the origin's where it has them, the mount's options where it has not.

use efc_common::node::{Attr, FileKind};

/// Owner and mode options of a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ownership {
    /// `uid=`: owner of everything. `None`: the origin's, else the mounting user.
    pub uid: Option<u32>,
    /// `gid=`: group of everything. `None`: the origin's, else the mounting group.
    pub gid: Option<u32>,
    /// `file_mode=`: permission bits of files. `None`: the origin's, else 0644.
    pub file_mode: Option<u32>,
    /// `dir_mode=`: permission bits of directories. `None`: the origin's, else 0755.
    pub dir_mode: Option<u32>,
    /// `umask=`: bits taken away from every mode.
    pub umask: u32,
    /// Who mounted.
    pub mount_uid: u32,
    /// Group of who mounted.
    pub mount_gid: u32,
}

impl Ownership {
    /// Owner of `attr`.
    pub fn uid(&self, attr: &Attr) -> u32 {
        self.uid.or(attr.uid).unwrap_or(self.mount_uid)
    }

    /// Group of `attr`.
    pub fn gid(&self, attr: &Attr) -> u32 {
        self.gid.or(attr.gid).unwrap_or(self.mount_gid)
    }

    /// Permission bits of `attr`, without the type.
    pub fn permissions(&self, attr: &Attr) -> u32 {
        let bits = match attr.kind {
            FileKind::Directory => self.dir_mode.or(attr.mode).unwrap_or(0o755),
            FileKind::Symlink => attr.mode.unwrap_or(0o777),
            _ => self.file_mode.or(attr.mode).unwrap_or(0o644),
        };
        bits & 0o7777 & !self.umask
    }
}

/// `st_mode` type bits.
pub fn type_bits(kind: FileKind) -> u32 {
    match kind {
        FileKind::File => libc::S_IFREG,
        FileKind::Directory => libc::S_IFDIR,
        FileKind::Symlink => libc::S_IFLNK,
        FileKind::Fifo => libc::S_IFIFO,
        FileKind::Socket => libc::S_IFSOCK,
        FileKind::CharDevice => libc::S_IFCHR,
        FileKind::BlockDevice => libc::S_IFBLK,
    }
}

/// `st_blocks`: 512-byte units, the origin's count or the size rounded up.
pub fn blocks(attr: &Attr) -> u64 {
    attr.used.unwrap_or(attr.size).div_ceil(512)
}

#[cfg(test)]
mod tests {
    use super::*;
    use efc_common::node::Time;

    #[test]
    fn options_win_over_the_origin_and_the_origin_over_defaults() {
        let own = Ownership {
            uid: None,
            gid: Some(7),
            file_mode: None,
            dir_mode: Some(0o700),
            umask: 0o022,
            mount_uid: 1000,
            mount_gid: 1000,
        };
        let object = Attr::object(1, Time::default());
        assert_eq!((own.uid(&object), own.gid(&object), own.permissions(&object)), (1000, 7, 0o644));
        let nas = Attr { uid: Some(5), gid: Some(6), mode: Some(0o777), ..object };
        assert_eq!((own.uid(&nas), own.gid(&nas), own.permissions(&nas)), (5, 7, 0o755));
        assert_eq!(own.permissions(&Attr::prefix(Time::default())), 0o700);
    }
}
