//! The line between a holder and its mount process: a SEQPACKET socket pair. A message is one packet of JSON, with an fd where something is kept that has one.
//!
//! ```text
//! holder → mount   kept { items, past }, then a keep for each item
//!                  event                       one more
//!                  upgrade                     a signal asks for it
//!                  leave                       end as soon as nothing is under way, and leave the mount to another process
//! mount → holder   kept, then a keep for each item, then ready: to a holder that takes the place of another
//!                  keep { item, text } + fd    in place of what the item was before
//!                  drop { item }               it is not needed any more
//!                  ready                       the mount answers
//!                  upgrade { … }               start another program in my place
//!                  options                     successors begin with these as well
//!                  left                        everything is written down
//!                  bye { code, text }          the process ends because it was told to, or cannot go on
//! ```

use efc_common::{Error, Kind, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Longest message, bytes: less than what a socket takes by default.
const MESSAGE_BYTES_MAX: usize = 128 << 10;

/// So many events are remembered, and so many pauses: a message has to hold all of them.
const EVENTS_MAX: usize = 50;
const PAUSES_MAX: usize = 1000;
/// Longest text of an event, characters.
pub(super) const EVENT_TEXT_MAX: usize = 300;

/// What a holder keeps for the next mount process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Item {
    /// The /dev/fuse fd.
    Connection,
    /// What its INIT agreed on ([`crate::kernel::InitRecord`], as text).
    Init,
    /// The journal ([`crate::journal`]).
    Nodes,
    /// Requests that must not be done twice ([`crate::kernel::Outcomes`]).
    Outcomes,
    /// The session with the masters, as text.
    Session,
    /// A file that is open without a name, of the node of this number, where the origin has no other way to it.
    File(u64),
    /// The memory in which drafts are staged.
    Staging,
    /// The file in which the draft of this number is staged.
    Staged(u64),
    /// The end of a pipe for which an embedded cluster lives ([`crate::embedded`]).
    Lifeline,
    /// The locked file of its data directory.
    DataDir,
    /// What of it runs, as text.
    Cluster,
    /// What the holder itself has to remember, as text: kept by a service manager only.
    Memory,
}

impl Item {
    /// Everything a successor needs at least.
    pub const NEEDED: [Item; 3] = [Item::Connection, Item::Init, Item::Nodes];
}

/// What a holder remembers of its mount processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When, seconds since 1970.
    pub at: u64,
    /// `crash`, `hang`, `failed` (a process could not take over), `upgrade`, `upgrade_failed` (the program of before went on), `restart` (holder and process were gone, the service manager
    /// began anew), `holder` (that was replaced itself).
    pub what: String,
    /// The process that serves since then.
    pub pid: u32,
    /// How long the mount was not served, milliseconds.
    pub pause_ms: u64,
    /// More.
    pub text: String,
    /// Number of the upgrade, if it was one.
    pub upgrade: u64,
}

/// What happened to the processes of a mount.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Past {
    /// How often one was replaced, by reason.
    pub failovers: BTreeMap<String, u64>,
    /// The last events.
    pub events: Vec<Event>,
    /// How long nobody served, each time, milliseconds.
    pub pauses_ms: Vec<u64>,
}

impl Past {
    /// A process was replaced.
    pub fn count(&mut self, reason: &str) {
        *self.failovers.entry(reason.into()).or_default() += 1;
    }

    /// This has happened.
    pub fn remember(&mut self, event: Event) {
        fn push<T>(all: &mut Vec<T>, one: T, most: usize) {
            if all.len() >= most {
                all.remove(0);
            }
            all.push(one);
        }
        if event.is_takeover() {
            push(&mut self.pauses_ms, event.pause_ms, PAUSES_MAX);
        }
        push(&mut self.events, event, EVENTS_MAX);
    }
}

impl Event {
    /// Did another process begin to serve?
    pub fn is_takeover(&self) -> bool {
        self.what != "holder"
    }
}

/// A program that is to serve the mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upgrade {
    /// Number by which it is asked for.
    pub id: u64,
    /// Path of the program.
    pub program: String,
    /// Mount options (`name=value`) that come after those of before.
    pub options: Vec<String>,
}

/// What is said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    /// Keep this; comes with an fd if it has one.
    Keep {
        /// What.
        item: Item,
        /// Its bytes, of what has no fd.
        text: String,
    },
    /// This need not be kept any more.
    Drop {
        /// What.
        item: Item,
    },
    /// So many things were kept from the process before; they follow.
    Kept {
        /// How many.
        items: usize,
        /// What happened so far.
        past: Past,
    },
    /// This happened.
    Event(Event),
    /// Another program is to serve the mount.
    Upgrade(Upgrade),
    /// Successors begin with these as well.
    Options(Vec<String>),
    /// The process is to leave the mount to another.
    Leave,
    /// It has.
    Left,
    /// The mount answers.
    Ready,
    /// The process ends by itself.
    Bye {
        /// Its exit code.
        code: u8,
        /// What went wrong.
        text: Option<String>,
    },
}

/// One end.
#[derive(Debug)]
pub struct Line {
    socket: OwnedFd,
}

impl Line {
    pub(super) fn new(socket: OwnedFd) -> Line {
        Line { socket }
    }

    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Says `message`; what it keeps is kept even if this process dies at once.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] when the other end is gone.
    pub fn send(&self, message: &Message, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let text = serde_json::to_vec(message).map_err(|e| Error::new(Kind::Invalid, "not sent").caused_by(e))?;
        let raw: Vec<RawFd> = fd.iter().map(AsRawFd::as_raw_fd).collect();
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &[ControlMessage::ScmRights(&raw)] };
        match sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(&text)], control, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(_) => Ok(()),
            Err(e) => Err(Error::new(Kind::Unavailable, "the other end of the holder's line is gone").caused_by(e)),
        }
    }

    /// Is there a message, or the end?
    ///
    /// # Errors
    /// What the system said.
    pub(super) fn has_more(&self) -> Result<bool> {
        is_readable(self.socket.as_fd())
    }

    /// Waits for a message. `None`: the other end is gone.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] for what is no message.
    pub fn receive(&self) -> Result<Option<(Message, Option<OwnedFd>)>> {
        let (bytes, mut fds) = match receive_packet(self.socket.as_fd(), MESSAGE_BYTES_MAX) {
            Err(nix::errno::Errno::ECONNRESET) => return Ok(None),
            other => other.map_err(io::Error::from)?,
        };
        if bytes.is_empty() {
            return Ok(None);
        }
        let message = serde_json::from_slice(&bytes)
            .map_err(|e| Error::new(Kind::Corrupt, "what came on the holder's line is no message").caused_by(e))?;
        Ok(Some((message, fds.pop())))
    }
}

/// Is there something to receive, or the end?
pub(super) fn is_readable(socket: BorrowedFd<'_>) -> Result<bool> {
    let mut look = [PollFd::new(socket, PollFlags::POLLIN)];
    Ok(poll(&mut look, PollTimeout::ZERO).map_err(io::Error::from)? > 0)
}

/// The next packet of at most so many bytes, with the descriptors that came with it. Empty: the end.
pub(super) fn receive_packet(socket: BorrowedFd<'_>, most: usize) -> nix::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; most];
    let mut space = nix::cmsg_space!([RawFd; 4]);
    let mut fds: Vec<OwnedFd> = Vec::new();
    let length = {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let got = loop {
            match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
                Err(nix::errno::Errno::EINTR) => {}
                other => break other?,
            }
        };
        for control in got.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = control {
                // SAFETY: the kernel has just made these fds for us; nobody else knows them.
                fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        got.bytes
    };
    bytes.truncate(length);
    Ok((bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::fs::File;
    use std::io::Read;

    fn pair() -> (Line, Line) {
        let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).expect("pair");
        (Line::new(pair.0), Line::new(pair.1))
    }

    #[test]
    fn what_is_kept_outlives_its_sender() {
        let (a, b) = pair();
        let dir = tempfile::tempdir().expect("dir");
        std::fs::write(dir.path().join("f"), "hello").expect("write");
        let file = File::open(dir.path().join("f")).expect("open");
        let keep = Message::Keep { item: Item::Nodes, text: String::new() };
        a.send(&keep, Some(file.as_fd())).expect("send");
        a.send(&Message::Ready, None).expect("send");
        drop((a, file));
        let (message, fd) = b.receive().expect("receive").expect("a message");
        assert_eq!(message, keep);
        let mut text = String::new();
        File::from(fd.expect("fd")).read_to_string(&mut text).expect("read");
        assert_eq!(text, "hello");
        assert!(b.has_more().expect("look"));
        assert!(matches!(b.receive(), Ok(Some((Message::Ready, None)))));
        assert!(matches!(b.receive(), Ok(None)), "gone");
        assert!(b.send(&Message::Ready, None).is_err_and(|e| e.is(Kind::Unavailable)));
    }

    #[test]
    fn the_longest_past_is_one_message() {
        let (a, b) = pair();
        let text = "\u{1}".repeat(EVENT_TEXT_MAX);
        let event = Event { at: u64::MAX, what: "upgrade_failed".into(), pid: 1, pause_ms: 99_999, text, upgrade: 1 };
        let mut past = Past::default();
        (0..2 * PAUSES_MAX).for_each(|_| past.remember(event.clone()));
        assert_eq!((past.events.len(), past.pauses_ms.len()), (EVENTS_MAX, PAUSES_MAX));
        let kept = Message::Kept { items: 1, past };
        a.send(&kept, None).expect("send");
        assert_eq!(b.receive().expect("receive").map(|(message, _)| message), Some(kept));
    }

    #[test]
    fn garbage_is_refused() {
        let (a, b) = pair();
        nix::unistd::write(a.socket(), b"{\"keep\":").expect("write");
        assert!(b.receive().is_err_and(|e| e.is(Kind::Corrupt)));
    }
}
