//! The life of a mount process, top to bottom: resolve the source, reach the origin, reach (or start) a cluster, mount or take over,
//! serve, tell, end.

use crate::cli::MountArgs;
use crate::cluster::{ClusterLink, Mounted};
use crate::control::{self, ControlSocket};
use crate::fs::directory::Directories;
use crate::fs::{EfcFs, Parts, Strict};
use crate::holder::line::Item;
use crate::holder::{Held, Left};
use crate::kernel::handover::{self, HandoverLimits, HandoverServer};
use crate::kernel::{Ended, InitRecord, Mount, MountConfig, Session, SessionConfig, adopt, serve};
use crate::namespace::{Namespace, Nodes, journal};
use crate::options::MountOptions;
use crate::read::source::DataSource;
use crate::read::{ReadConfig, Reader};
use crate::tell::Teller;
use crate::write::{ObjectTree, Space};
use efc_backend::DynBackend;
use efc_backend::connect::{Connected, connect_counted};
use efc_backend::object::keys_to_send;
use efc_backend::tree::DynTree;
use efc_client::master::MasterClient;
use efc_common::error::Context as _;
use efc_common::limit::ByteBudget;
use efc_common::node::Node;
use efc_common::policy::{CachePolicy, Consistency};
use efc_common::source::SourceSpec;
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result, log, metrics};
use efc_proto::convert::cache_policy;
use parking_lot::Mutex;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

/// Share of the process budget that listings may take: one part of so many.
const LISTING_SHARE: u64 = 4;
/// Share that files may take that are being written to an object store.
const STAGING_SHARE: u64 = 4;
/// How long a predecessor may take to hand over.
const TAKEOVER_DEADLINE: Duration = Duration::from_secs(30);
/// How long tasks of the mount may take to end.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// What a `SOURCE` argument names.
#[derive(Debug, Clone, PartialEq)]
pub enum SourceArg {
    /// A store, directly.
    Store(SourceSpec),
    /// A dataset of the cluster and one of its mounts.
    Dataset {
        /// Its name.
        name: String,
        /// Path of the mount in the dataset, `/` for its only one.
        path: String,
    },
}

/// Parses the SOURCE argument.
///
/// # Errors
/// [`Kind::Invalid`] that says what to write.
pub fn parse_source(text: &str, options: &MountOptions) -> Result<SourceArg> {
    let Some(dataset) = text.strip_prefix("dataset://") else {
        return Ok(SourceArg::Store(SourceSpec::parse(text, options.source.clone(), options.secret.clone())?));
    };
    let (name, path) = dataset.split_once('/').unwrap_or((dataset, ""));
    if name.is_empty() {
        return Err(Error::new(Kind::Invalid, format!("source `{text}` has no dataset; write dataset://name")));
    }
    if options.masters.is_empty() {
        return Err(Error::new(
            Kind::Invalid,
            format!("source `{text}` is a dataset of a cluster: give `-o master=HOST:PORT`"),
        ));
    }
    Ok(SourceArg::Dataset { name: name.into(), path: format!("/{}", path.trim_matches('/')) })
}

/// Mounts, serves until the mount ends, and cleans up. `ready` is called once, when the mount answers. `held`: what keeps the mount, if something does.
///
/// # Errors
/// What kept the mount from coming up (nothing stays mounted then), or how serving failed.
pub fn run(
    args: &MountArgs,
    options: MountOptions,
    held: Option<Arc<Mutex<Held>>>,
    ready: impl FnOnce(),
) -> Result<()> {
    // Received blocks live for moments: their memory is to be used again, not mapped anew each time.
    efc_common::alloc::tune(Some(32 << 20), 32 << 20);
    log::install(&args.log_level, args.log_format.parse()?, args.log_file.as_deref())?;
    let exposition = metrics::install()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("efc-fuse").build()?;
    let outcome = runtime.block_on(async {
        let process = Process::start(args, options, exposition, held).await?;
        ready();
        process.serve().await
    });
    runtime.shutdown_timeout(STOP_PATIENCE);
    outcome
}

/// The source with everything that was looked up for it.
struct Resolved {
    mounted: Mounted,
    consistency: Consistency,
    /// As people named it.
    shown: String,
}

async fn resolve(args: &MountArgs, options: &MountOptions) -> Result<Resolved> {
    let (spec, offered, cache, session) = match parse_source(&args.source, options)? {
        SourceArg::Store(spec) => (spec.clone(), None, CachePolicy::default(), spec.url()),
        SourceArg::Dataset { name, path } => {
            let (spec, offered, cache) = dataset(&MasterClient::new(options.masters.clone())?, &name, &path).await?;
            (spec, offered, cache, name)
        }
    };
    let keys = keys_to_send(&spec, options.keys.as_ref())?;
    let usual = if options.read_write { Consistency::strict() } else { Consistency::default() };
    let consistency = options.consistency.or(offered).unwrap_or(usual);
    let mounted = Mounted { spec, keys, cache, session };
    Ok(Resolved { mounted, consistency, shown: args.source.clone() })
}

async fn dataset(
    master: &MasterClient,
    name: &str,
    path: &str,
) -> Result<(SourceSpec, Option<Consistency>, CachePolicy)> {
    let d = master.get_dataset(name).await.context(format!("dataset `{name}` cannot be found"))?;
    let mount = match (d.mounts.as_slice(), path) {
        ([only], "/") => only,
        (several, path) => several.iter().find(|m| m.path == path).ok_or_else(|| {
            let paths: Vec<&str> = several.iter().map(|m| m.path.as_str()).collect();
            let text = format!(
                "dataset `{name}` has mounts at {}; mount one of them: dataset://{name}/PATH",
                paths.join(", ")
            );
            Error::new(Kind::Invalid, text)
        })?,
    };
    let spec: SourceSpec = serde_json::from_str(&mount.source_json).map_err(|e| {
        Error::new(Kind::Corrupt, format!("dataset `{name}` has a source that is not understood")).caused_by(e)
    })?;
    let consistency = if d.consistency.is_empty() { None } else { Some(d.consistency.parse()?) };
    Ok((spec, consistency, cache_policy(d.cache)))
}

/// Who served the mount before.
enum Before {
    Nobody,
    /// It hands the mount over.
    Lives(handover::Taken),
    /// Its holder kept what it left.
    Died(Left),
}

/// A mount that is up.
struct Process {
    mount: Mount,
    fs: Arc<EfcFs>,
    session: Arc<Session>,
    handover: HandoverServer,
    control: ControlSocket,
    teller: Arc<Teller>,
    cluster: ClusterLink,
    tasks: TaskGroup,
}

impl Process {
    async fn start(
        args: &MountArgs,
        options: MountOptions,
        exposition: metrics::PrometheusHandle,
        held: Option<Arc<Mutex<Held>>>,
    ) -> Result<Process> {
        let begun = Instant::now();
        for (reason, count) in held.iter().flat_map(|h| h.lock().failovers.clone()) {
            metrics::counter!("efc_failover_total", "reason" => reason).absolute(count);
        }
        let source = resolve(args, &options).await?;
        let origin = connect_counted(&source.mounted.spec, source.mounted.keys.as_ref()).await?;
        let root = origin.backend.root().await?;
        let tasks = TaskGroup::new();
        let ttl = source.consistency.ttl();
        if options.writeback && (!options.read_write || origin.objects.is_none()) {
            let text = "writeback is for read-write mounts of object stores: leave it out, or add -o rw (NAS sources are written through)";
            return Err(Error::new(Kind::Invalid, text));
        }
        let (backend, tree) = if options.read_write {
            let (backend, tree) = writable(origin, &root, &options, ttl, &tasks).await?;
            (backend, Some(tree))
        } else {
            (origin.backend, None)
        };
        let strict = source.consistency.is_strict();
        let nodes = if options.read_write || strict { Nodes::Follow } else { Nodes::Versions };
        let cluster = ClusterLink::start(&options, &source.mounted, &args.mountpoint, &args.log_level, &tasks).await?;
        if !strict {
            cluster.keep_session(&tasks);
        }
        let data = Arc::new(DataSource::new(backend, Some(cluster.peers.clone()), options.workers_only));

        let before = match held.as_ref().and_then(|h| h.lock().take()) {
            Some(left) => Before::Died(left),
            None if args.takeover => {
                Before::Lives(handover::take(&handover_path(&args.mountpoint), TAKEOVER_DEADLINE)?)
            }
            None => Before::Nobody,
        };
        let mut namespace = match &before {
            Before::Died(left) => Namespace::restore(&journal::read(&left.nodes)?, nodes)?,
            Before::Lives(t) => Namespace::load(&t.state, nodes)?,
            Before::Nobody => Namespace::new(root, nodes),
        };
        // What follows its files has more than its nodes to hand on.
        let held = held.filter(|_| nodes == Nodes::Versions);
        if let Some(held) = held.clone() {
            namespace.write_down(Box::new(move |fd| held.lock().keep(Item::Nodes, "", Some(fd))))?;
        }
        let namespace = Arc::new(namespace);
        let keep = |fd: BorrowedFd<'_>| match &held {
            Some(held) => held.lock().keep(Item::Connection, "", Some(fd)),
            None => Ok(()),
        };
        let listing_bytes = options.memory_bytes / LISTING_SHARE;
        let staged_bytes = if tree.is_some() { options.memory_bytes / STAGING_SHARE } else { 0 };
        let budget = ByteBudget::new(options.memory_bytes - listing_bytes - staged_bytes);
        let read = ReadConfig { readahead_bytes: options.readahead_bytes, deadline: options.read_deadline };
        let fs = Arc::new(EfcFs::new(
            Parts {
                namespace: namespace.clone(),
                source: data.clone(),
                directories: Directories::new(data.clone(), tree.clone(), listing_bytes, ttl),
                reader: Reader::new(data.clone(), budget.clone(), tasks.clone(), read),
                tree,
                ownership: options.ownership.clone(),
                ttl,
                tasks: tasks.clone(),
                strict: strict.then(|| Strict {
                    master: cluster.master.clone(),
                    who: cluster.who.clone(),
                    bucket: Some(source.mounted.spec.bucket.clone()).filter(|b| !b.is_empty()),
                    deadline: options.read_deadline,
                }),
            },
            tokio::runtime::Handle::current(),
        ));
        let no_open = !options.read_write;
        let config = SessionConfig {
            threads: options.threads,
            no_open,
            locks: options.read_write && strict,
            ..SessionConfig::default()
        };
        let (session, mount) = match before {
            Before::Died(left) => {
                let mount = Mount::existing(&args.mountpoint)?;
                let record = InitRecord::from_bytes(left.init.as_bytes())?;
                let session = adopt(fs.clone(), left.connection, &record, &config)?;
                let (nodes, took_ms) = (namespace.len(), begun.elapsed().as_millis() as u64);
                info!(nodes, took_ms, "took the mount over from a process that is gone");
                (session, mount)
            }
            Before::Lives(t) => {
                let mount = Mount::existing(&args.mountpoint)?;
                let (fd, record, _, confirm) = t.into_parts();
                keep(fd.as_fd())?;
                let session = adopt(fs.clone(), fd, &record, &config)?;
                confirm.ready()?;
                (session, mount)
            }
            Before::Nobody => serve(fs.clone(), &mount_config(args, &options, &source), &config, keep)?,
        };
        if let Some(held) = &held {
            let record = String::from_utf8_lossy(&session.init_record().to_bytes()?).into_owned();
            held.lock().keep(Item::Init, &record, None)?;
        }
        let session = Arc::new(session);
        fs.set_session(&session);
        let teller = Arc::new(Teller {
            mountpoint: args.mountpoint.clone(),
            source: source.shown,
            started: Instant::now(),
            exposition,
            data,
            namespace: namespace.clone(),
            fs: fs.clone(),
            budget,
            ttl,
            ring: cluster.ring.clone(),
        });
        let process = Process {
            handover: listen_for_successors(&args.mountpoint, &session, namespace)?,
            control: control::listen(&args.mountpoint, teller.clone(), &tasks)?,
            teller,
            mount,
            fs,
            session,
            cluster,
            tasks,
        };
        process.check(args).await?;
        Ok(process)
    }

    /// Proves that the mount answers before anybody is told that it does.
    async fn check(&self, args: &MountArgs) -> Result<()> {
        if let Some(http) = &args.http {
            self.teller.clone().serve_http(http, &self.tasks).await?;
        }
        let path = self.mount.mountpoint().to_path_buf();
        let looked = tokio::task::spawn_blocking(move || std::fs::metadata(path).map(|_| ()));
        match tokio::time::timeout(Duration::from_secs(30), looked).await {
            Ok(Ok(Ok(()))) => {
                info!(mountpoint = %args.mountpoint.display(), source = args.source, takeover = args.takeover, "mounted");
                Ok(())
            }
            other => {
                let why = format!("{other:?}");
                self.leave(true);
                Err(Error::new(Kind::Timeout, format!("the new mount does not answer: {why}")))
            }
        }
    }

    fn leave(&self, detach: bool) {
        match self.mount.unmount(detach) {
            Ok(how) => info!(?how, "unmounted"),
            Err(e) => warn!(error = %e, "mount point could not be unmounted"),
        }
    }

    /// Serves until the mount is gone, handed over, or a signal asks to end.
    async fn serve(self) -> Result<()> {
        let mut ended = self.session.ended();
        let mut handed_over = self.handover.handed_over();
        let mut term = signal(SignalKind::terminate())?;
        let mut int = signal(SignalKind::interrupt())?;
        let outcome = tokio::select! {
            why = ended.wait_for(Option::is_some) => match why.map(|w| w.clone()) {
                Ok(Some(Ended::Failed(e))) => Err(Error::new(Kind::Io, format!("the FUSE session failed: {e}"))),
                _ => Ok(()),
            },
            _ = handed_over.wait_for(|g| *g) => {
                info!("a successor serves the mount");
                self.control.keep();
                Ok(())
            }
            _ = term.recv() => { self.leave(true); Ok(()) }
            _ = int.recv() => { self.leave(true); Ok(()) }
        };
        let kept = self.fs.end(STOP_PATIENCE).await;
        // Reads under way are answered by now or never: nobody is left to hear them.
        self.tasks.shutdown(STOP_PATIENCE).await;
        drop((self.handover, self.control, self.session));
        self.cluster.stop().await;
        outcome.and(kept)
    }
}

fn mount_config(args: &MountArgs, options: &MountOptions, source: &Resolved) -> MountConfig {
    MountConfig {
        mountpoint: args.mountpoint.clone(),
        source: source.shown.clone(),
        read_only: !options.read_write,
        allow_other: options.allow_other,
        default_permissions: options.default_permissions,
        max_read_bytes: None,
        raise_max_pages_limit: None,
    }
}

/// What a read-write mount changes, and the view of the origin it looks at.
async fn writable(
    origin: Connected,
    root: &Node,
    options: &MountOptions,
    ttl: Duration,
    tasks: &TaskGroup,
) -> Result<(DynBackend, DynTree)> {
    if let Some(tree) = origin.tree {
        return Ok((origin.backend, tree));
    }
    let Some(objects) = origin.objects else {
        return Err(Error::new(Kind::Unsupported, "sources of this kind cannot be written to; mount with -o ro"));
    };
    let default = || options.data_dir.as_ref().map_or_else(|| "/var/tmp/efc".into(), |d| d.join("staging"));
    let dir = options.staging.clone().unwrap_or_else(default);
    let space = Space::new(dir, options.memory_bytes / STAGING_SHARE, options.staging_bytes);
    let later = options.writeback.then(|| tasks.clone());
    let tree = ObjectTree::new(objects, origin.backend, root.locator.clone(), space, ttl, later);
    tree.recover(tasks).await;
    let tree = Arc::new(tree);
    Ok((tree.clone(), tree))
}

fn handover_path(mountpoint: &Path) -> PathBuf {
    control::socket_path(mountpoint).with_extension("handover")
}

fn listen_for_successors(
    mountpoint: &Path,
    session: &Arc<Session>,
    namespace: Arc<Namespace>,
) -> Result<HandoverServer> {
    std::fs::create_dir_all(control::run_dir())?;
    let save = Box::new(move || {
        if namespace.follows() {
            // Its open files and its leases would be unknown to the successor.
            return Err(Error::new(Kind::Unsupported, "a read-write or strict mount cannot be handed over yet"));
        }
        Ok(namespace.save())
    });
    HandoverServer::start(&handover_path(mountpoint), session.clone(), save, HandoverLimits::default())
}
