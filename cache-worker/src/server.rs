//! The data plane's door: listens on TCP and on a unix socket, bounds the connections, and knows how busy the worker is.

use crate::conn::{self, REQUESTS_MAX};
use crate::service::Service;
use crate::socket::WriteHalf;
use efc_common::error::Context;
use efc_common::metrics::{counter, gauge};
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use efc_proto::data;
use efc_proto::frame::PROTOCOL_VERSION;
use parking_lot::RwLock;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Notify;

/// Send buffer of unix sockets, which do not tune themselves.
const UNIX_BUFFER_BYTES: usize = 2 << 20;
/// Pause after `accept` failed for want of file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What one connection may do, and how many there may be.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections at once; more are closed at the door.
    pub connections: usize,
    /// A connection without a request for so long is closed.
    pub idle: Duration,
    /// A peer that reads nothing of its answers for so long is cut off.
    pub stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { connections: 4096, idle: Duration::from_secs(600), stall: Duration::from_secs(30) }
    }
}

/// The serving side of a worker.
pub(crate) struct Server {
    id: String,
    cluster: RwLock<String>,
    epoch: AtomicU64,
    limits: Limits,
    service: Service,
    connections: AtomicUsize,
    busy: AtomicUsize,
    quiet: Notify,
}

impl Server {
    pub(crate) fn new(id: String, limits: Limits, service: Service) -> Arc<Self> {
        Arc::new(Server {
            id,
            cluster: RwLock::default(),
            epoch: AtomicU64::new(0),
            limits,
            service,
            connections: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            quiet: Notify::new(),
        })
    }

    pub(crate) fn service(&self) -> &Service {
        &self.service
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(crate) fn cluster(&self) -> String {
        self.cluster.read().clone()
    }

    /// What the masters said of cluster and ring.
    pub(crate) fn set_cluster(&self, cluster: &str, epoch: u64) {
        *self.cluster.write() = cluster.into();
        self.set_epoch(epoch);
    }

    pub(crate) fn set_epoch(&self, epoch: u64) {
        self.epoch.store(epoch, Relaxed);
        gauge!("efc_ring_epoch").set(epoch as f64);
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Relaxed)
    }

    pub(crate) fn hello(&self) -> data::Hello {
        let (cluster, peer, epoch) = (self.cluster(), self.id.clone(), self.epoch());
        data::Hello { protocol: PROTOCOL_VERSION, cluster, peer, epoch, requests: REQUESTS_MAX as u32, share: false }
    }

    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Relaxed)
    }

    /// One more request under way, until the guard is dropped.
    pub(crate) fn busy(self: &Arc<Self>) -> Busy {
        self.busy.fetch_add(1, Relaxed);
        Busy { server: self.clone() }
    }

    /// Is a request under way?
    pub(crate) fn is_busy(&self) -> bool {
        self.busy.load(Relaxed) > 0
    }

    /// Waits until no request is under way.
    pub(crate) async fn quiet(&self) {
        loop {
            let notified = self.quiet.notified();
            if !self.is_busy() {
                return;
            }
            notified.await;
        }
    }

    /// Accepts TCP connections until the group stops.
    pub(crate) fn listen_tcp(self: &Arc<Self>, listener: TcpListener, tasks: &TaskGroup) {
        let (me, group) = (self.clone(), tasks.clone());
        tasks.spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((s, _)) => me.admit(Socket::Tcp(s), &group),
                    Err(e) => pause(&e).await,
                }
            }
        });
    }

    /// Accepts unix connections until the group stops.
    pub(crate) fn listen_unix(self: &Arc<Self>, listener: UnixListener, tasks: &TaskGroup) {
        let (me, group) = (self.clone(), tasks.clone());
        tasks.spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((s, _)) => me.admit(Socket::Unix(s), &group),
                    Err(e) => pause(&e).await,
                }
            }
        });
    }

    fn admit(self: &Arc<Self>, socket: Socket, tasks: &TaskGroup) {
        if self.connections.fetch_add(1, Relaxed) >= self.limits.connections {
            self.connections.fetch_sub(1, Relaxed);
            counter!("efc_data_refused_total", "reason" => "connections").increment(1);
            tracing::debug!(most = self.limits.connections, "data-plane connection refused: too many");
            return;
        }
        let open = Open(self.clone());
        gauge!("efc_data_connections").increment(1.0);
        let me = self.clone();
        tasks.spawn(async move {
            let _open = open;
            match socket {
                Socket::Tcp(s) => {
                    // Best effort: without it small answers wait for an acknowledgement.
                    let _ = s.set_nodelay(true);
                    let (r, w) = s.into_split();
                    conn::serve(me, r, WriteHalf::Tcp(w), false).await;
                }
                Socket::Unix(s) => {
                    let socket = socket2::SockRef::from(&s);
                    // Best effort: a smaller buffer costs wake-ups only.
                    let _ = socket.set_send_buffer_size(UNIX_BUFFER_BYTES);
                    let (r, w) = s.into_split();
                    conn::serve(me, r, WriteHalf::Unix(w), true).await;
                }
            }
        });
    }
}

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// A request under way.
pub(crate) struct Busy {
    server: Arc<Server>,
}

impl Drop for Busy {
    fn drop(&mut self) {
        if self.server.busy.fetch_sub(1, Relaxed) == 1 {
            self.server.quiet.notify_waiters();
        }
    }
}

struct Open(Arc<Server>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Relaxed);
        gauge!("efc_data_connections").decrement(1.0);
    }
}

async fn pause(e: &io::Error) {
    tracing::warn!(error = %e, "cannot accept a data-plane connection; are file descriptors exhausted? (ulimit -n)");
    tokio::time::sleep(ACCEPT_PAUSE).await;
}

/// Listens on `addr` (`host:port`, port 0 for any).
pub(crate) async fn bind_tcp(addr: &str) -> Result<TcpListener> {
    TcpListener::bind(addr).await.context(format!("cannot listen on {addr}; choose another --listen address"))
}

/// A unix socket that only our own user may open; removed when dropped.
pub(crate) struct UnixDoor {
    pub(crate) path: PathBuf,
}

impl Drop for UnixDoor {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Listens on a unix socket. A socket left by a dead worker is replaced; one that somebody serves is not.
pub(crate) async fn bind_unix(path: &Path) -> Result<(UnixListener, UnixDoor)> {
    let named = |e: Error| e.with("unix", path.display());
    if std::fs::symlink_metadata(path).is_ok() {
        if UnixStream::connect(path).await.is_ok() {
            return Err(named(Error::new(
                Kind::AlreadyExists,
                "another process serves this socket; choose another --unix path",
            )));
        }
        std::fs::remove_file(path).context("replace the old socket").map_err(named)?;
    }
    // Bound under a private name first: between bind and chmod nobody can find it.
    let hidden = path.with_extension(format!("new-{}", std::process::id()));
    let listener = UnixListener::bind(&hidden).context("cannot listen on the unix socket").map_err(named)?;
    let door = UnixDoor { path: hidden.clone() };
    std::fs::set_permissions(&hidden, std::fs::Permissions::from_mode(0o600)).context("chmod socket").map_err(named)?;
    std::fs::rename(&hidden, path).context("name socket").map_err(named)?;
    drop(door);
    Ok((listener, UnixDoor { path: path.into() }))
}
