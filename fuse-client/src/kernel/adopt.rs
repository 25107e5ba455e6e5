//! Adopting a connection whose INIT another process (or an earlier life of this one) has answered.
//!
//! The kernel sends INIT once per connection and `fuser` insists on a handshake, so the saved INIT is replayed: a SEQPACKET socket pair stands
//! in for /dev/fuse, `fuser` shakes hands with it, then `dup3` puts the real connection under the same fd number. RESEND goes out *before*
//! the threads start: it moves every request that was taken and never answered back into the queue, and requests that our own threads had
//! already taken would be executed twice.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use efc_common::{Error, Kind, Result};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::FileSystem;
use super::adapter::Adapter;
use super::conn::Conn;
use super::init::{INIT_REQUEST_BYTES, InitRecord};
use super::outcomes::Done;
use super::readers::put_under;
use super::session::{Session, SessionConfig, handshake};

/// `FUSE_NOTIFY_RESEND` of `enum fuse_notify_code` (Linux 6.9).
const NOTIFY_RESEND: i32 = 7;

/// Serves the running mount behind `fd`. The file system must already know every node id and handle the kernel may use.
///
/// On kernels without RESEND (before 6.9) requests that the former process took and did not answer are ended, with EINTR or, where they may have been done, EIO.
///
/// # Errors
/// [`Kind::Unsupported`] for a record this version cannot serve, [`Kind::Unavailable`] when the connection is gone, else what the system said.
pub fn adopt(fs: Arc<dyn FileSystem>, fd: OwnedFd, record: &InitRecord, config: &SessionConfig) -> Result<Session> {
    record.check()?;
    let conn = Arc::new(Conn::new(fd, fs.outcomes()));
    let session = replay_handshake(&fs, &conn, config, record)?;
    resend(&conn, record)?;
    Session::serve(fs, conn, config, record.clone(), true, session)
}

/// A `fuser` session that has shaken hands with a stand-in and now reads from `conn`.
pub(super) fn replay_handshake(
    fs: &Arc<dyn FileSystem>,
    conn: &Arc<Conn>,
    config: &SessionConfig,
    record: &InitRecord,
) -> Result<fuser::Session<Adapter>> {
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
    let (ours, stand_in) = pair.map_err(io::Error::from)?;
    let written = nix::unistd::write(&ours, &record.replay()).map_err(io::Error::from)?;
    if written != INIT_REQUEST_BYTES {
        return Err(Error::new(Kind::Io, "the saved INIT request was not replayed whole"));
    }
    // What `fuser` agrees on with the stand-in is nobody's agreement: the record holds the one with the kernel.
    let (session, _) = handshake(fs, conn, config, stand_in)?;
    put_under(conn.fd(), session.as_fd().as_raw_fd())?;
    Ok(session)
}

/// Has the kernel send every taken and unanswered request again, marked in its number. A kernel that cannot gets those that are known answered here.
///
/// # Errors
/// [`Kind::Unavailable`] when the connection is gone.
pub(super) fn resend(conn: &Conn, record: &InitRecord) -> Result<()> {
    let gone = |e| Error::new(Kind::Unavailable, "the FUSE connection is gone; mount again").caused_by(e);
    if record.has_resend() {
        return conn.notify(NOTIFY_RESEND, &[]).map_err(gone);
    }
    let Some(outcomes) = &conn.outcomes else { return Ok(()) };
    outcomes.note_all();
    let left = outcomes.unanswered();
    let count = left.len();
    for (unique, Done { errno, payload }) in left {
        conn.answer(unique, errno, &[IoSlice::new(&payload)]).map_err(gone)?;
        outcomes.answered(unique);
    }
    tracing::warn!(
        count,
        "this kernel cannot send requests again (Linux 6.9 can); those of the former process are ended"
    );
    Ok(())
}
