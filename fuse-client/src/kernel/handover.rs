//! Handing a running mount to another process over a local socket: the connection (SCM_RIGHTS), the INIT record, and the file system's state
//! as bytes. One hand-over is one connection to the socket, served by [`HandoverServer`] in the old process and used by [`take`] in the new.
//!
//! ```text
//! new → old   HELLO  8 bytes: "EFCH", version u32
//! old         drains: from here on it answers nothing
//! old → new   OFFER  24 bytes: "EFCH", version u32, record length u32, zero u32, state length u64, with the fd attached; record; state
//!       or    "EFCE", version u32, text length u32: refused, with the reason as text
//! new         adopts the connection, RESEND, serves
//! new → old   READY  1 byte
//! old → new   BYE    1 byte: the old process has given up the mount
//!       or    BACK   1 byte: it has taken the mount back
//! ```
//! Integers are little-endian. If READY does not come in time, the old process says BACK and serves again (RESEND brings back what it
//! left); the new one must then stop: two may hold the connection, one serves. A connection that ends with neither BYE nor BACK means that
//! the old process died, and the mount is the new one's.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use efc_common::{Error, Kind, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, getsockopt, recvmsg, sendmsg, sockopt};
use tokio::sync::watch;

use super::init::InitRecord;
use super::session::Session;

const VERSION: u32 = 1;
const MAGIC: [u8; 4] = *b"EFCH";
const REFUSED: [u8; 4] = *b"EFCE";
const READY: u8 = b'R';
const BYE: u8 = b'B';
const BACK: u8 = b'K';
const OFFER_BYTES: usize = 24;

/// How long a successor may take to say HELLO.
const HELLO_DEADLINE: Duration = Duration::from_secs(5);

/// Longest INIT record and longest refusal, bytes.
const RECORD_BYTES_MAX: u32 = 64 << 10;

/// Longest state of a file system, bytes: ten million nodes of 400 bytes.
pub const STATE_BYTES_MAX: u64 = 4 << 30;

/// Time limits of a hand-over in the old process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HandoverLimits {
    /// How long requests under way may take to be answered before they are left to the successor.
    pub drain: Duration,
    /// How long the successor may take from the offer to READY.
    pub ready: Duration,
}

impl Default for HandoverLimits {
    fn default() -> Self {
        HandoverLimits { drain: Duration::from_secs(2), ready: Duration::from_secs(60) }
    }
}

/// Writes down the file system's state. Called when the session is drained: nothing changes while it runs.
pub type SaveState = Box<dyn Fn() -> Result<Vec<u8>> + Send>;

/// Waits on a socket for successors of one session. Dropping it stops waiting and removes the socket.
pub struct HandoverServer {
    path: PathBuf,
    wake: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    gone: watch::Receiver<bool>,
}

impl HandoverServer {
    /// Listens at `path`, for the own user only. A socket that is there already is replaced: the former owner of the mount has left it.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn start(
        path: &Path,
        session: Arc<Session>,
        save: SaveState,
        limits: HandoverLimits,
    ) -> Result<HandoverServer> {
        let listener = bind(path).map_err(|e| Error::from(e).with("socket", path.display()))?;
        let (woken, wake) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(io::Error::from)?;
        let (tell, gone) = watch::channel(false);
        let thread = std::thread::Builder::new()
            .name("efc-handover".into())
            .spawn(move || {
                if listen(&listener, &woken, &session, &save, limits) {
                    tell.send_replace(true);
                }
            })
            .map_err(Error::from)?;
        Ok(HandoverServer { path: path.to_path_buf(), wake: Some(wake), thread: Some(thread), gone })
    }

    /// Turns true when the mount belongs to a successor; this process should end, without unmounting.
    pub fn handed_over(&self) -> watch::Receiver<bool> {
        self.gone.clone()
    }
}

impl Drop for HandoverServer {
    fn drop(&mut self) {
        // A closed pipe is readable at its other end: that ends the thread's wait.
        self.wake = None;
        if self.thread.take().is_some_and(|t| t.join().is_err()) {
            tracing::error!("the hand-over thread panicked");
        }
        // After a hand-over the path belongs to the successor.
        if !*self.gone.borrow()
            && let Err(e) = std::fs::remove_file(&self.path)
        {
            tracing::debug!(socket = %self.path.display(), error = %e, "hand-over socket was not removed");
        }
    }
}

/// Binds under another name and renames, so that the path always leads to a socket that somebody serves.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(format!(".{}", std::process::id()));
    let fresh = PathBuf::from(fresh);
    match std::fs::remove_file(&fresh) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(&fresh)?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&fresh, path)?;
    Ok(listener)
}

/// Serves one successor after the other until one has taken the mount (true) or the server is dropped (false).
fn listen(
    listener: &UnixListener,
    woken: &OwnedFd,
    session: &Session,
    save: &SaveState,
    limits: HandoverLimits,
) -> bool {
    loop {
        let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN), PollFd::new(woken.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            Err(e) => {
                tracing::error!(error = %e, "waiting for a successor failed; hand-over is off");
                return false;
            }
            Ok(_) => {}
        }
        if fds[1].any().unwrap_or(true) {
            return false;
        }
        let offered = listener.accept().map_err(Error::from).and_then(|(s, _)| offer(s, session, save, limits));
        match offered {
            Ok(()) => return true,
            Err(e) => tracing::warn!(error = %e, "a hand-over came to nothing; this process goes on"),
        }
        if let Err(e) = session.resume() {
            tracing::error!(error = %e, "the session could not go on after a hand-over that came to nothing; the mount hangs");
        }
    }
}

/// The old process's side of one hand-over.
fn offer(mut peer: UnixStream, session: &Session, save: &SaveState, limits: HandoverLimits) -> Result<()> {
    peer.set_read_timeout(Some(HELLO_DEADLINE))?;
    peer.set_write_timeout(Some(limits.ready))?;
    let creds = getsockopt(&peer, sockopt::PeerCredentials).map_err(io::Error::from)?;
    if creds.uid() != 0 && creds.uid() != nix::unistd::geteuid().as_raw() {
        return Err(Error::new(Kind::PermissionDenied, format!("user {} may not take this mount", creds.uid())));
    }
    let mut hello = [0u8; 8];
    peer.read_exact(&mut hello)?;
    let version = u32::from_le_bytes([hello[4], hello[5], hello[6], hello[7]]);
    if hello[..4] != MAGIC || version != VERSION {
        let text = format!("hand-over version {version} is not spoken here, but {VERSION}");
        return refuse(&mut peer, Error::new(Kind::Unsupported, text));
    }
    let drained = session.drain(limits.drain)?;
    let state = match save() {
        Ok(state) if state.len() as u64 <= STATE_BYTES_MAX => state,
        Ok(state) => {
            return refuse(
                &mut peer,
                Error::new(Kind::Exhausted, format!("{} bytes of state are too many", state.len())),
            );
        }
        Err(e) => return refuse(&mut peer, e),
    };
    let record = session.init_record().to_bytes()?;
    if let Err(e) = send_offer(&mut peer, session, &record, &state).and_then(|()| confirm(&mut peer, limits)) {
        // Before this process serves again. If it cannot be sent, nobody is there to be told.
        return Err(match peer.write_all(&[BACK]) {
            Ok(()) => e,
            Err(unsent) => e.with("successor", unsent),
        });
    }
    let (drain_ms, left) = (drained.took.as_millis() as u64, drained.left);
    tracing::info!(drain_ms, left, state_bytes = state.len(), pid = creds.pid(), "mount handed over");
    Ok(())
}

/// READY, and BYE.
fn confirm(peer: &mut UnixStream, limits: HandoverLimits) -> Result<()> {
    peer.set_read_timeout(Some(limits.ready))?;
    let mut ready = [0u8];
    peer.read_exact(&mut ready)?;
    if ready[0] != READY {
        return Err(Error::new(Kind::Corrupt, "the successor answered something else than READY"));
    }
    Ok(peer.write_all(&[BYE])?)
}

fn send_offer(peer: &mut UnixStream, session: &Session, record: &[u8], state: &[u8]) -> Result<()> {
    let mut head = [0u8; OFFER_BYTES];
    head[..4].copy_from_slice(&MAGIC);
    head[4..8].copy_from_slice(&VERSION.to_le_bytes());
    head[8..12].copy_from_slice(&(record.len() as u32).to_le_bytes());
    head[16..].copy_from_slice(&(state.len() as u64).to_le_bytes());
    let fds = [session.fd().as_raw_fd()];
    let sent = sendmsg::<()>(
        peer.as_raw_fd(),
        &[IoSlice::new(&head)],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    );
    if sent.map_err(io::Error::from)? != OFFER_BYTES {
        return Err(Error::new(Kind::Io, "the offer was not sent whole"));
    }
    peer.write_all(record)?;
    peer.write_all(state)?;
    Ok(())
}

/// Tells the successor why not, and gives the reason back.
fn refuse(peer: &mut UnixStream, why: Error) -> Result<()> {
    let text = why.to_string();
    let mut message = Vec::with_capacity(OFFER_BYTES + text.len());
    message.extend_from_slice(&REFUSED);
    message.extend_from_slice(&VERSION.to_le_bytes());
    message.extend_from_slice(&(text.len() as u32).to_le_bytes());
    message.resize(OFFER_BYTES, 0);
    message.extend_from_slice(text.as_bytes());
    match peer.write_all(&message) {
        Ok(()) => Err(why),
        Err(e) => Err(why.with("refusal", e)),
    }
}

/// A mount taken from its former process, which answers nothing any more and waits for [`Taken::ready`].
pub struct Taken {
    /// The connection, for [`super::adopt`].
    pub fd: OwnedFd,
    /// What its INIT agreed on.
    pub record: InitRecord,
    /// The file system's state.
    pub state: Vec<u8>,
    confirm: Confirm,
}

/// The open hand-over.
pub struct Confirm {
    peer: UnixStream,
}

impl Taken {
    /// The parts: connection, INIT record, state, and the hand-over to be confirmed.
    pub fn into_parts(self) -> (OwnedFd, InitRecord, Vec<u8>, Confirm) {
        (self.fd, self.record, self.state, self.confirm)
    }
}

impl Confirm {
    /// Tells the former process that the mount is served. Start waiting for the next successor only afterwards. Succeeds as well when the
    /// former process has died meanwhile.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] when it has taken the mount back, [`Kind::Timeout`] when it does not say. The caller must drop its session at
    /// once and not unmount.
    pub fn ready(mut self) -> Result<()> {
        // Also when this fails: what the former process said last can still be read.
        let said = self.peer.write_all(&[READY]);
        let mut answer = [0u8];
        match self.peer.read(&mut answer) {
            Ok(1) if answer[0] == BYE && said.is_ok() => Ok(()),
            Ok(1) => Err(Error::new(Kind::Unavailable, "the former process took the mount back")),
            Ok(_) => Ok(()),
            Err(e) if matches!(e.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe) => Ok(()),
            Err(e) => Err(Error::new(Kind::Timeout, "the former process did not let the mount go").caused_by(e)),
        }
    }
}

/// Takes the mount whose process serves hand-overs at `path`. Blocks for at most about `deadline`, which must leave the former process the
/// time to drain.
///
/// # Errors
/// [`Kind::NotFound`] or [`Kind::Unavailable`] when nobody serves there, [`Kind::Unsupported`] and others when it refuses, with its reason;
/// [`Kind::Corrupt`] for bytes that are no offer. The former process then serves on.
pub fn take(path: &Path, deadline: Duration) -> Result<Taken> {
    let mut peer = UnixStream::connect(path).map_err(|e| Error::from(e).with("socket", path.display()))?;
    peer.set_read_timeout(Some(deadline))?;
    peer.set_write_timeout(Some(deadline))?;
    let mut hello = [0u8; 8];
    hello[..4].copy_from_slice(&MAGIC);
    hello[4..].copy_from_slice(&VERSION.to_le_bytes());
    peer.write_all(&hello)?;
    let (head, fd) = receive_head(&mut peer)?;
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let (version, length) = (word(4), word(8));
    if head[..4] == REFUSED && length <= RECORD_BYTES_MAX {
        let text = receive(&mut peer, u64::from(length))?;
        let text = format!("the mount was not handed over: {}", String::from_utf8_lossy(&text));
        return Err(Error::new(Kind::Unsupported, text));
    }
    if head[..4] != MAGIC || version != VERSION || length > RECORD_BYTES_MAX {
        return Err(Error::new(Kind::Corrupt, "the answer on the hand-over socket is no offer of this version"));
    }
    let state_length = u64::from(word(16)) | u64::from(word(20)) << 32;
    if state_length > STATE_BYTES_MAX {
        return Err(Error::new(Kind::Corrupt, format!("an offer with {state_length} bytes of state is too large")));
    }
    let fd = fd.ok_or_else(|| Error::new(Kind::Corrupt, "the offer came without the connection"))?;
    check_device(&fd)?;
    let record = InitRecord::from_bytes(&receive(&mut peer, u64::from(length))?)?;
    let state = receive(&mut peer, state_length)?;
    Ok(Taken { fd, record, state, confirm: Confirm { peer } })
}

/// Grows with what arrives, so a wrong length costs no memory.
fn receive(peer: &mut UnixStream, length: u64) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    peer.take(length).read_to_end(&mut out)?;
    if out.len() as u64 != length {
        return Err(Error::new(Kind::Unavailable, "the former process closed the hand-over half way"));
    }
    Ok(out)
}

/// The head of the answer and the fd that came with it.
fn receive_head(peer: &mut UnixStream) -> Result<([u8; OFFER_BYTES], Option<OwnedFd>)> {
    let mut head = [0u8; OFFER_BYTES];
    let mut fds: Vec<OwnedFd> = Vec::new();
    let mut space = nix::cmsg_space!([RawFd; 4]);
    let mut parts = [IoSliceMut::new(&mut head)];
    let got = {
        let message = recvmsg::<()>(peer.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
            .map_err(io::Error::from)?;
        for control in message.cmsgs().map_err(io::Error::from)? {
            if let ControlMessageOwned::ScmRights(raw) = control {
                // SAFETY: the kernel has just made these fds for us; nobody else knows them.
                fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        message.bytes
    };
    if got == 0 {
        return Err(Error::new(Kind::Unavailable, "the former process closed the hand-over"));
    }
    peer.read_exact(&mut head[got..])?;
    if fds.len() > 1 {
        return Err(Error::new(Kind::Corrupt, "the offer came with more than one fd"));
    }
    Ok((head, fds.pop()))
}

/// Is it a /dev/fuse fd? Anything else would be written to as if it were.
fn check_device(fd: &OwnedFd) -> Result<()> {
    let stat = rustix::fs::fstat(fd).map_err(io::Error::from)?;
    let is_char = stat.st_mode & libc::S_IFMT == libc::S_IFCHR;
    if !is_char || stat.st_rdev != rustix::fs::makedev(10, 229) {
        return Err(Error::new(Kind::Corrupt, "the offered fd is no FUSE connection"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// A former process that answers HELLO with `answer`.
    fn answering(answer: Vec<u8>) -> Result<Taken> {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).expect("bind");
        let server = thread::spawn(move || {
            let (mut peer, _) = listener.accept().expect("accept");
            peer.read_exact(&mut [0u8; 8]).expect("hello");
            peer.write_all(&answer).expect("answer");
        });
        let taken = take(&path, Duration::from_secs(5));
        server.join().expect("server");
        taken
    }

    fn head(magic: &[u8; 4], version: u32, record: u32, state: u64) -> Vec<u8> {
        let mut out = magic.to_vec();
        out.extend(version.to_le_bytes());
        out.extend(record.to_le_bytes());
        out.extend([0; 4]);
        out.extend(state.to_le_bytes());
        out
    }

    #[test]
    fn answers_that_are_no_offer_are_refused_with_a_reason() {
        let kind = |answer: Vec<u8>| answering(answer).err().expect("refused").kind();
        assert_eq!(kind(vec![]), Kind::Unavailable);
        assert_eq!(kind(b"HTTP/1.1 400 Bad Request\r\n".to_vec()), Kind::Corrupt);
        assert_eq!(kind(head(&MAGIC, VERSION + 1, 10, 10)), Kind::Corrupt);
        assert_eq!(kind(head(&MAGIC, VERSION, u32::MAX, 10)), Kind::Corrupt);
        assert_eq!(kind(head(&MAGIC, VERSION, 10, u64::MAX)), Kind::Corrupt);
        assert_eq!(kind(head(&MAGIC, VERSION, 10, 10)), Kind::Corrupt);
    }

    #[test]
    fn a_refusal_carries_its_reason() {
        let mut answer = head(&REFUSED, VERSION, 8, 0);
        answer.extend(b"too busy");
        let e = answering(answer).err().expect("refused");
        assert!(e.to_string().contains("too busy"), "{e}");
    }

    #[test]
    fn nobody_there_is_not_found() {
        let dir = tempfile::tempdir().expect("dir");
        let e = take(&dir.path().join("none"), Duration::from_secs(1)).err().expect("nobody");
        assert_eq!(e.kind(), Kind::NotFound);
    }
}
