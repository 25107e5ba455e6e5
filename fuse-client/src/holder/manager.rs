//! The service manager above a holder, systemd or `efc-fuse holder` ([`super::node`]): it keeps what the holder keeps, so that another holder goes on when the holder and the mount process
//! are gone.
//!
//! The protocol is sd_notify(3) with its descriptor store (`FDSTORE=1`), and sd_listen_fds(3) for who comes after. A descriptor is stored as `efc-COUNT-ITEM`; of two of one item the
//! greater count is the valid one: the new one is stored before the old one is removed. What is text is in a file in memory.

use super::Kept;
use super::line::{Item, Past};
use efc_common::{Error, Kind, Result};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use tracing::{debug, warn};

/// Where the manager hears.
pub(super) const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";
/// How many descriptors the manager gives back, from [`FIRST_FD`] on, and their names, with colons between them.
pub(super) const LISTEN_FDS: &str = "LISTEN_FDS";
pub(super) const LISTEN_FDNAMES: &str = "LISTEN_FDNAMES";
const LISTEN_PID: &str = "LISTEN_PID";
/// How many descriptors the manager stores at most; set by those that do (systemd from version 254 on).
pub(super) const FDSTORE: &str = "FDSTORE";
/// What a manager says to its own service, and to nobody whom that starts besides.
pub const OF_MANAGER: [&str; 5] = [NOTIFY_SOCKET, LISTEN_FDS, LISTEN_FDNAMES, LISTEN_PID, FDSTORE];
/// Where they begin.
pub(super) const FIRST_FD: RawFd = 3;
/// Says which process serves the mount: our own addition, which systemd leaves out.
pub(super) const SERVER: &str = "X_EFC_SERVER";
/// Longest text that is kept, bytes: it came in one message.
const TEXT_BYTES_MAX: u64 = 1 << 20;

/// What the holder itself has to remember.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Memory {
    /// What serves the mount, if not the program that was started.
    pub(super) program: Option<String>,
    /// Options that came after the mount's own.
    pub(super) options: Vec<String>,
    pub(super) past: Past,
}

struct Stored {
    name: String,
    /// Device and inode number: the manager stores no file twice.
    file: (u64, u64),
}

/// A service manager.
pub(super) struct Manager {
    address: UnixAddr,
    socket: UnixDatagram,
    /// Does it keep anything? One that says nothing of that is only told how the mount is: a mount process whose holder dies could not tell whether it will be started again.
    stores: bool,
    stored: BTreeMap<Item, Stored>,
    count: u64,
}

fn address() -> Option<UnixAddr> {
    let path = std::env::var_os(NOTIFY_SOCKET)?;
    let address = match path.as_encoded_bytes() {
        [b'@', name @ ..] => UnixAddr::new_abstract(name),
        _ => UnixAddr::new(Path::new(&path)),
    };
    address.inspect_err(|e| warn!(error = %e, "{NOTIFY_SOCKET} is no address")).ok()
}

/// Names and descriptors that a manager gave to this process.
fn given() -> Vec<(String, OwnedFd)> {
    let var = |name| std::env::var(name).ok();
    // Without it, it is said by who knows that nobody else inherits it.
    let is_ours = var(LISTEN_PID).is_none_or(|pid| pid == std::process::id().to_string());
    let count = var(LISTEN_FDS).and_then(|n| n.parse::<RawFd>().ok()).filter(|_| is_ours).unwrap_or(0);
    let names = var(LISTEN_FDNAMES).unwrap_or_default();
    let numbers = FIRST_FD..FIRST_FD.saturating_add(count);
    let named = numbers.zip(names.split(':')).filter(|(_, name)| name.starts_with("efc-"));
    // SAFETY: the manager left these descriptors open for us alone; they are taken once, by the only caller, before there are threads.
    named.map(|(fd, name)| (name.to_string(), unsafe { OwnedFd::from_raw_fd(fd) })).collect()
}

/// Did a manager give this process a mount that somebody else held?
pub fn gave_a_mount() -> bool {
    let names = std::env::var(LISTEN_FDNAMES).unwrap_or_default();
    names.split(':').any(|n| item_of(n).is_some_and(|(_, item)| item == Item::Connection))
}

/// Will a manager that lives start this mount again when its processes are gone?
pub(super) fn starts_again() -> bool {
    let hears = || -> Option<()> {
        let socket = UnixDatagram::unbound().ok()?;
        nix::sys::socket::connect(socket.as_raw_fd(), &address()?).ok()
    };
    stores() && hears().is_some()
}

fn stores() -> bool {
    std::env::var(FDSTORE).is_ok_and(|n| n != "0")
}

fn name_of(count: u64, item: Item) -> String {
    let item = match item {
        Item::Connection => "connection".into(),
        Item::Init => "init".into(),
        Item::Nodes => "nodes".into(),
        Item::Outcomes => "outcomes".into(),
        Item::Session => "session".into(),
        Item::File(node) => format!("file-{node}"),
        Item::Staging => "staging".into(),
        Item::Staged(number) => format!("staged-{number}"),
        Item::Lifeline => "lifeline".into(),
        Item::DataDir => "data_dir".into(),
        Item::Cluster => "cluster".into(),
        Item::Memory => "memory".into(),
    };
    format!("efc-{count}-{item}")
}

pub(super) fn item_of(name: &str) -> Option<(u64, Item)> {
    let (count, item) = name.strip_prefix("efc-")?.split_once('-')?;
    let item = match item.split_once('-') {
        Some(("file", node)) => Item::File(node.parse().ok()?),
        Some(("staged", number)) => Item::Staged(number.parse().ok()?),
        Some(_) => return None,
        None => match item {
            "connection" => Item::Connection,
            "init" => Item::Init,
            "nodes" => Item::Nodes,
            "outcomes" => Item::Outcomes,
            "session" => Item::Session,
            "staging" => Item::Staging,
            "lifeline" => Item::Lifeline,
            "data_dir" => Item::DataDir,
            "cluster" => Item::Cluster,
            "memory" => Item::Memory,
            _ => return None,
        },
    };
    Some((count.parse().ok()?, item))
}

fn is_text(item: Item) -> bool {
    matches!(item, Item::Init | Item::Session | Item::Cluster | Item::Memory)
}

fn in_memory(text: &str) -> Result<OwnedFd> {
    let fd = memfd_create("efc-kept", MemfdFlags::CLOEXEC).map_err(std::io::Error::from)?;
    let file = File::from(fd);
    file.write_all_at(text.as_bytes(), 0)?;
    Ok(file.into())
}

fn text_of(fd: OwnedFd) -> Result<String> {
    let file = File::from(fd);
    let length = file.metadata()?.len();
    if length > TEXT_BYTES_MAX {
        return Err(Error::new(Kind::Corrupt, "what the service manager kept is too long"));
    }
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, 0)?;
    String::from_utf8(bytes)
        .map_err(|e| Error::new(Kind::Corrupt, "what the service manager kept is no text").caused_by(e))
}

fn file_of(fd: BorrowedFd<'_>) -> Result<(u64, u64)> {
    let meta = File::from(fd.try_clone_to_owned()?).metadata()?;
    Ok((meta.dev(), meta.ino()))
}

impl Manager {
    /// The one that started this process, if one did, with what it kept. To be asked once, before there are threads.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] when what it kept is not understood.
    pub(super) fn of_this_process() -> Result<Option<(Manager, Kept)>> {
        let Some(address) = address() else { return Ok(None) };
        let socket = UnixDatagram::unbound()?;
        let mut manager = Manager { address, socket, stores: stores(), stored: BTreeMap::new(), count: 0 };
        let mut newest: BTreeMap<Item, (u64, String, OwnedFd)> = BTreeMap::new();
        for (name, fd) in given() {
            rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC).map_err(std::io::Error::from)?;
            let Some((count, item)) = item_of(&name) else { continue };
            manager.count = manager.count.max(count);
            let old = match newest.get(&item) {
                Some((other, ..)) if *other > count => Some(name),
                _ => newest.insert(item, (count, name, fd)).map(|(_, name, _)| name),
            };
            if let Some(old) = old {
                manager.remove(&old);
            }
        }
        let mut kept = Kept::new();
        for (item, (_, name, fd)) in newest {
            manager.stored.insert(item, Stored { name, file: file_of(fd.as_fd())? });
            let entry = if is_text(item) { (text_of(fd)?, None) } else { (String::new(), Some(fd)) };
            kept.insert(item, entry);
        }
        Ok(Some((manager, kept)))
    }

    /// It keeps this in place of what the item was before.
    pub(super) fn keep(&mut self, item: Item, text: &str, fd: Option<BorrowedFd<'_>>) {
        if self.stores
            && let Err(e) = self.store(item, text, fd)
        {
            warn!(error = %e, ?item, "the service manager does not keep this; if both processes of the mount die, it is lost");
        }
    }

    fn store(&mut self, item: Item, text: &str, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let made = if fd.is_none() { Some(in_memory(text)?) } else { None };
        let Some(fd) = fd.or(made.as_ref().map(AsFd::as_fd)) else { return Ok(()) };
        let file = file_of(fd)?;
        if self.stored.get(&item).is_some_and(|s| s.file == file) {
            return Ok(());
        }
        self.count += 1;
        let name = name_of(self.count, item);
        self.say(&format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"), Some(fd));
        if let Some(old) = self.stored.insert(item, Stored { name, file }) {
            self.remove(&old.name);
        }
        Ok(())
    }

    /// It need not keep this any more.
    pub(super) fn drop_item(&mut self, item: Item) {
        if let Some(old) = self.stored.remove(&item) {
            self.remove(&old.name);
        }
    }

    fn remove(&self, name: &str) {
        self.say(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), None);
    }

    /// The mount answers.
    pub(super) fn ready(&self) {
        self.say("READY=1\nSTATUS=serves", None);
    }

    /// This process serves the mount.
    pub(super) fn served_by(&self, pid: u32) {
        self.say(&format!("{SERVER}={pid}"), None);
    }

    /// The mount ends with this error.
    pub(super) fn failed(&self, e: &Error) {
        self.say(&format!("STATUS={}", e.to_string().replace('\n', " ")), None);
    }

    fn say(&self, text: &str, fd: Option<BorrowedFd<'_>>) {
        let raw: Vec<RawFd> = fd.iter().map(AsRawFd::as_raw_fd).collect();
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &[ControlMessage::ScmRights(&raw)] };
        let parts = [IoSlice::new(text.as_bytes())];
        if let Err(e) = sendmsg(self.socket.as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, Some(&self.address)) {
            debug!(error = %e, text, "the service manager does not hear");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_their_items() {
        for item in [
            Item::Connection,
            Item::Init,
            Item::Nodes,
            Item::Outcomes,
            Item::Session,
            Item::File(7),
            Item::Staging,
            Item::Staged(8),
            Item::Lifeline,
            Item::DataDir,
            Item::Cluster,
            Item::Memory,
        ] {
            let name = name_of(3, item);
            // As systemd takes them.
            assert!(name.len() < 256 && name.bytes().all(|b| b.is_ascii_graphic() && b != b':'), "{name}");
            assert_eq!(item_of(&name), Some((3, item)));
        }
        for name in ["efc-3", "efc-x-init", "efc-3-other", "efc-3-file-x", "efc-3-other-3", "stored", ""] {
            assert_eq!(item_of(name), None, "{name}");
        }
    }

    #[test]
    fn text_is_kept_in_memory() {
        assert_eq!(text_of(in_memory("kept").expect("memfd")).expect("read"), "kept");
        let fd = in_memory("").expect("memfd");
        rustix::fs::ftruncate(&fd, TEXT_BYTES_MAX + 1).expect("longer");
        assert!(text_of(fd).is_err_and(|e| e.is(Kind::Corrupt)));
    }
}
