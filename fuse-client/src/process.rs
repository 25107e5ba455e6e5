//! The life of a mount process, top to bottom: resolve the source, reach the origin, reach (or start) a cluster, mount or go on with a mount,
//! serve, tell, end.

use crate::cli::MountArgs;
use crate::cluster::{ClusterLink, Mounted};
use crate::control::{self, ControlSocket};
use crate::fs::directory::Directories;
use crate::fs::failover::{Failover, Inherited, session_from};
use crate::fs::{EfcFs, Parts, Strict};
use crate::holder::line::Item;
use crate::holder::{Held, Left, Wish};
use crate::journal::{self, Journal};
use crate::kernel::{Ended, InitRecord, Mount, MountConfig, Outcomes, Session, SessionConfig, adopt, serve};
use crate::live::{Live, Reach, Shares};
use crate::lock::LocksLeft;
use crate::namespace::{Namespace, Nodes};
use crate::options::MountOptions;
use crate::read::source::DataSource;
use crate::read::{ReadConfig, Reader};
use crate::tell::Teller;
use crate::upgrade::{Agreed, Preflight};
use crate::write::{Kept, ObjectTree, Space};
use efc_backend::DynBackend;
use efc_backend::connect::{Connected, connect_counted};
use efc_backend::object::keys_to_send;
use efc_backend::tree::DynTree;
use efc_client::master::MasterClient;
use efc_common::error::Context as _;
use efc_common::limit::ByteBudget;
use efc_common::node::Node;
use efc_common::policy::{CachePolicy, Consistency};
use efc_common::source::{self, SourceSpec};
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result, log, metrics};
use efc_proto::convert::cache_policy;
use efc_proto::state::Checkpoint;
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tracing::{info, warn};

/// How long requests that are under way may take when another program is to serve the mount; what takes longer is done again by that.
const DRAIN_PATIENCE: Duration = Duration::from_secs(1);
/// How long the mount may take to answer for the first time.
const CHECK_PATIENCE: Duration = Duration::from_secs(30);
/// How long who asked how the mount ended may take to hear it.
const TELL_PATIENCE: Duration = Duration::from_secs(1);
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
    if let Some(option) = options.source.keys().find(|name| !source::RATES.contains(&name.as_str())) {
        let text = format!("option `{option}` is the dataset's here: leave it out (efc dataset show {name})");
        return Err(Error::new(Kind::Invalid, text));
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
pub fn run(args: &MountArgs, options: MountOptions, held: Option<Arc<Held>>, ready: impl FnOnce()) -> Result<()> {
    // Received blocks live for moments: their memory is to be used again, not mapped anew each time. The buffers that `fuser` has for each thread (16 MiB and 4 KiB, of which
    // a request needs 1 MiB at most) are mapped: of heap that was used before all of it would be cleared, and so be taken.
    efc_common::alloc::tune(Some(16 << 20), 32 << 20);
    args.begin_log()?;
    if let Some(level) = &options.log_level {
        log::set_level(level)?;
    }
    let exposition = metrics::install()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("efc-fuse").build()?;
    let outcome = runtime.block_on(async {
        // Who goes on with a mount has what its predecessor was given to keep: it ends in order, also when it is told to end before it serves. Who mounts anew may simply die.
        let early = match &held {
            Some(held) if held.goes_on() => Some(Stop::new()?),
            _ => None,
        };
        let process = Process::start(args, options, exposition, held).await?;
        let stop = early.map_or_else(Stop::new, Ok)?;
        ready();
        process.serve(stop).await
    });
    runtime.shutdown_timeout(STOP_PATIENCE);
    outcome
}

/// Looks whether this program could serve the mount, and says what it would agree on ([`crate::upgrade`]).
///
/// # Errors
/// Why it could not.
pub fn preflight(args: &MountArgs, options: &MountOptions) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let source = runtime.block_on(async {
        let source = resolve(args, options).await?;
        let origin = connect_counted(&source.mounted.spec, source.mounted.keys.as_ref()).await?;
        origin.backend.root().await?;
        if !options.masters.is_empty() {
            MasterClient::new(options.masters.clone())?.list_sessions().await?;
        }
        Ok::<_, Error>(source)
    })?;
    let agreed = Agreed::new(options.read_write, source.consistency.is_strict());
    let said = Preflight { version: env!("CARGO_PKG_VERSION").into(), agreed };
    println!("{}", serde_json::to_string(&said).map_err(|e| Error::new(Kind::Io, "not said").caused_by(e))?);
    Ok(())
}

/// The source with everything that was looked up for it.
pub(crate) struct Resolved {
    pub(crate) mounted: Mounted,
    consistency: Consistency,
    /// As people named it.
    shown: String,
}

pub(crate) async fn resolve(args: &MountArgs, options: &MountOptions) -> Result<Resolved> {
    let (spec, offered, cache, session) = match parse_source(&args.source, options)? {
        SourceArg::Store(spec) => (spec.clone(), None, CachePolicy::default(), spec.url()),
        SourceArg::Dataset { name, path } => {
            let master = MasterClient::new(options.masters.clone())?;
            let (mut spec, offered, cache) = dataset(&master, &name, &path).await?;
            spec.take_rates(&options.source);
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

/// The signals that end a mount in order, from its making on.
struct Stop {
    term: Signal,
    int: Signal,
}

impl Stop {
    fn new() -> Result<Stop> {
        Ok(Stop { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? })
    }

    async fn asked(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}

/// A mount that is up.
struct Process {
    mount: Mount,
    fs: Arc<EfcFs>,
    session: Arc<Session>,
    /// None: of a mount that is out of the tree, whose place may be another's.
    control: Option<ControlSocket>,
    teller: Arc<Teller>,
    held: Option<Arc<Held>>,
    cluster: ClusterLink,
    tasks: TaskGroup,
}

impl Process {
    async fn start(
        args: &MountArgs,
        options: MountOptions,
        exposition: metrics::PrometheusHandle,
        held: Option<Arc<Held>>,
    ) -> Result<Process> {
        let begun = Instant::now();
        if let Some(held) = &held {
            held.expose();
        }
        let tasks = TaskGroup::new();
        tasks.spawn(efc_common::alloc::trim_when_idle());
        let source = resolve(args, &options).await?;
        let origin = connect_counted(&source.mounted.spec, source.mounted.keys.as_ref()).await?;
        let root = origin.backend.root().await?;
        let ttl = source.consistency.ttl();
        if options.writeback && (!options.read_write || origin.objects.is_none()) {
            let text = "writeback is for read-write mounts of object stores: leave it out, or add -o rw (NAS sources are written through)";
            return Err(Error::new(Kind::Invalid, text));
        }
        let mut left = held.as_ref().map(|h| h.left_behind()).transpose()?.flatten();
        let inherited = left.as_ref().map(|l| journal::read(&l.nodes)).transpose()?;
        let (signer, limits) = (origin.signer.clone(), origin.limits.clone());
        let Origin { backend, tree, drafts } = if options.read_write {
            let before = left.as_ref().and_then(|l| l.staging.as_ref()).zip(inherited.as_ref());
            writable(origin, &root, &options, ttl, before, &tasks)?
        } else {
            Origin { backend: origin.backend, tree: None, drafts: None }
        };
        let strict = source.consistency.is_strict();
        let paths = backend.capabilities().path_locators;
        let nodes = if options.read_write || strict { Nodes::Follow { paths } } else { Nodes::Versions };
        let orphaned = (held.clone(), left.as_mut().and_then(|l| l.cluster.take()));
        let cluster =
            ClusterLink::start(&options, &source.mounted, &args.mountpoint, &args.log_level, &tasks, orphaned).await?;
        if !strict {
            cluster.keep_session(&tasks);
        }
        let data = Arc::new(DataSource::new(backend, Some(cluster.peers.clone()), options.workers_only));

        let mut namespace = match &inherited {
            Some(state) => Namespace::restore(state, nodes)?,
            None => Namespace::new(root, nodes),
        };
        let failover = match (held.clone(), &inherited) {
            (Some(held), Some(state)) => Some(failover(held, left.as_mut(), state, drafts.clone())?),
            (Some(held), None) => {
                let owner = drafts.as_ref().map_or(0, ObjectTree::owner);
                Some(failover(held, None, &Checkpoint { owner, ..namespace.checkpoint() }, drafts.clone())?)
            }
            (None, _) => None,
        };
        if let Some(failover) = &failover {
            namespace.write_down(failover.journal.clone());
        }
        if let Some(tree) = &drafts {
            tree.recover(&tasks).await;
        }
        let namespace = Arc::new(namespace);
        let keep = |fd: BorrowedFd<'_>| match &held {
            Some(held) => held.keep(Item::Connection, "", Some(fd)),
            None => Ok(()),
        };
        let session_before = left.as_ref().and_then(|l| l.session.as_deref()).map(session_from).transpose()?;
        let locks = inherited.iter().flat_map(|s| &s.locks).map(LocksLeft::new).collect::<Result<_>>()?;
        let shares = Shares::of(options.memory_bytes, drafts.is_some());
        let budget = ByteBudget::new(shares.read);
        let (peers, sizes) = (cluster.peers.clone(), cluster.sizes());
        let reach = Reach { drafts, budget: budget.clone(), peers, signer, limits, sizes };
        let live = Live::new(args, source.mounted.spec.clone(), source.mounted.keys.clone(), reach);
        let read = ReadConfig { readahead_bytes: options.readahead_bytes, deadline: options.read_deadline };
        let fs = Arc::new(EfcFs::new(
            Parts {
                namespace: namespace.clone(),
                source: data.clone(),
                directories: Directories::new(data.clone(), tree.clone(), shares.listings, ttl),
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
                    last: session_before,
                    locks,
                }),
                failover,
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
        let (session, mount) = match left {
            Some(left) => {
                let record = InitRecord::from_bytes(left.init.as_bytes())?;
                let mount = match record.device {
                    Some(device) => Mount::made(&args.mountpoint, device)?,
                    None => Mount::existing(&args.mountpoint)?,
                };
                fs.restore(Inherited { state: inherited.unwrap_or_default(), files: left.files }).await?;
                let session = adopt(fs.clone(), left.connection, &record, &config)?;
                let (nodes, took_ms) = (namespace.len(), begun.elapsed().as_millis() as u64);
                info!(nodes, took_ms, "took the mount over from a process that is gone");
                (session, mount)
            }
            None => serve(fs.clone(), &mount_config(args, &options, &source), &config, keep)?,
        };
        if let Some(held) = &held {
            let record = InitRecord { device: Some(mount.device()), ..session.init_record().clone() };
            let record = String::from_utf8_lossy(&record.to_bytes()?).into_owned();
            held.keep(Item::Init, &record, None)?;
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
            live,
            ttl,
            ring: cluster.ring.clone(),
            held: held.clone(),
            agreed: Agreed::new(options.read_write, strict),
            successor_reads: AtomicU32::new(*journal::FORMATS.end()),
            ended: watch::Sender::default(),
        });
        let is_there = mount.is_mounted()?;
        let process = Process {
            control: is_there.then(|| control::listen(&args.mountpoint, teller.clone(), &tasks)).transpose()?,
            teller,
            held,
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
        if self.control.is_none() {
            info!(mountpoint = %args.mountpoint.display(), "serves what is still open of a mount that is out of the tree");
            return Ok(());
        }
        let mount = self.mount.clone();
        let said = tokio::task::spawn_blocking(move || mount.answers(CHECK_PATIENCE)).await;
        match said.unwrap_or_else(|e| Err(Error::new(Kind::Io, "nobody looked at the mount").caused_by(e))) {
            Ok(()) => {
                info!(mountpoint = %args.mountpoint.display(), source = args.source, "mounted");
                Ok(())
            }
            Err(e) => {
                self.leave(true);
                Err(e).context("the new mount does not answer")
            }
        }
    }

    /// Until the holder wants another program in the place of this process; on the way it is asked for one, if the holder was told to by a signal.
    async fn asked_to_leave(&self) {
        let Some(held) = &self.held else { return std::future::pending().await };
        let mut wishes = held.wishes();
        while let Ok(wish) = wishes.wait_for(|w| *w != Wish::Nothing).await.map(|w| w.clone()) {
            match wish {
                Wish::Leave => return,
                Wish::Nothing => {}
                Wish::Upgrade(u) => {
                    if let Err(e) = self.teller.upgrade(u.id, Some(u.program.into()), u.options).await {
                        warn!(error = %e, "no other program takes over");
                    }
                    if wishes.changed().await.is_err() {
                        break;
                    }
                }
            }
        }
        std::future::pending().await
    }

    /// Ends without unmounting: the holder has what another process needs. What is not answered by then comes to that.
    async fn leave_to_another(self) -> Result<()> {
        let session = self.session.clone();
        let drained = tokio::task::spawn_blocking(move || session.drain(DRAIN_PATIENCE)).await;
        let format = self.teller.successor_reads.load(Relaxed);
        self.fs.write_down_for(format);
        if format < *journal::FORMATS.end() {
            // The version before knows nothing of a cluster that is there already.
            self.cluster.stop().await;
        }
        info!(?drained, "leaves the mount to another program");
        if let Some(held) = &self.held {
            held.left()?;
        }
        // Nothing may be cleaned up that the successor goes on with: session, sockets, files put aside.
        std::process::exit(0);
    }

    fn leave(&self, detach: bool) {
        match self.mount.unmount(detach) {
            Ok(how) => info!(?how, "unmounted"),
            Err(e) => warn!(error = %e, "mount point could not be unmounted"),
        }
    }

    /// Serves until the mount is gone, handed over, or a signal asks to end.
    async fn serve(self, mut stop: Stop) -> Result<()> {
        let mut ended = self.session.ended();
        let outcome = tokio::select! {
            why = ended.wait_for(Option::is_some) => match why.map(|w| w.clone()) {
                Ok(Some(Ended::Failed(e))) => Err(Error::new(Kind::Io, format!("the FUSE session failed: {e}"))),
                _ => Ok(()),
            },
            () = self.asked_to_leave() => return self.leave_to_another().await,
            () = stop.asked() => { self.leave(true); Ok(()) }
        };
        let kept = self.fs.end(STOP_PATIENCE).await;
        self.teller.ended.send_replace(Some(kept.as_ref().map(|_| ()).map_err(ToString::to_string)));
        // Who asked for that has it.
        let _ = tokio::time::timeout(TELL_PATIENCE, self.teller.ended.closed()).await;
        // Reads under way are answered by now or never: nobody is left to hear them.
        self.tasks.shutdown(STOP_PATIENCE).await;
        drop((self.control, self.session));
        self.cluster.stop().await;
        outcome.and(kept)
    }
}

/// What is mounted.
struct Origin {
    /// As it is looked at.
    backend: DynBackend,
    /// As it is changed.
    tree: Option<DynTree>,
    /// That of an object store.
    drafts: Option<ObjectTree>,
}

/// Begins to write down what a successor needs, with what the predecessor left.
fn failover(
    held: Arc<Held>,
    left: Option<&mut Left>,
    state: &Checkpoint,
    drafts: Option<ObjectTree>,
) -> Result<Failover> {
    let outcomes = Outcomes::new(left.as_ref().and_then(|l| l.outcomes.as_ref()))?;
    held.keep(Item::Outcomes, "", Some(outcomes.fd()))?;
    let keeper = held.clone();
    let keep = move |fd: BorrowedFd<'_>| keeper.keep(Item::Nodes, "", Some(fd));
    let journal = Arc::new(Journal::new(state, Box::new(keep))?);
    if let Some(tree) = &drafts {
        held.keep(Item::Staging, "", Some(tree.staging()))?;
        let keeper = held.clone();
        let keep_file = move |number, file: Option<BorrowedFd<'_>>| match file {
            Some(_) => keeper.keep(Item::Staged(number), "", file),
            None => keeper.drop_item(Item::Staged(number)),
        };
        let kept = Arc::new(Kept::new(journal.clone(), Box::new(keep_file)));
        let staged = left.map(|l| std::mem::take(&mut l.staged)).unwrap_or_default();
        tree.keep(kept, &state.drafts, staged);
    }
    Ok(Failover { journal, outcomes: Arc::new(outcomes), drafts, held })
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

/// A source that can be changed; `before`: what a predecessor had staged, and what it had written down of that.
fn writable(
    origin: Connected,
    root: &Node,
    options: &MountOptions,
    ttl: Duration,
    before: Option<(&File, &Checkpoint)>,
    tasks: &TaskGroup,
) -> Result<Origin> {
    if origin.tree.is_some() {
        return Ok(Origin { backend: origin.backend, tree: origin.tree, drafts: None });
    }
    let Some(objects) = origin.objects else {
        return Err(Error::new(Kind::Unsupported, "sources of this kind cannot be written to; mount with -o ro"));
    };
    let default = || options.data_dir.as_ref().map_or_else(|| "/var/tmp/efc".into(), |d| d.join("staging"));
    let dir = options.staging.clone().unwrap_or_else(default);
    let (memory, disk) = (Shares::of(options.memory_bytes, true).staged, options.staging_bytes);
    let space = match before {
        Some((file, state)) => {
            let used = state.drafts.iter().filter_map(|d| d.slot).collect();
            Space::inherited(dir, memory, disk, file.try_clone()?, &used)?
        }
        None => Space::new(dir, memory, disk)?,
    };
    let later = options.writeback.then(|| tasks.clone());
    let owner = before.map_or_else(rand::random, |(_, state)| state.owner);
    let stores = (objects, origin.backend);
    let tree = ObjectTree::new(stores, root.locator.clone(), space, ttl, later, owner);
    Ok(Origin { backend: Arc::new(tree.clone()), tree: Some(Arc::new(tree.clone())), drafts: Some(tree) })
}
