//! The mount process's side of its holder. It has everything that the holder keeps, so when the holder is gone it starts another.

use super::line::{Event, Item, Line, Message, Past, Upgrade};
use super::{Kept, LIFE_MIN, inherited_line, manager, reap_later, start, tell_all};
use crate::embedded::Orphaned;
use crate::options;
use efc_common::metrics::{counter, histogram};
use efc_common::{Error, Kind, Result};
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use tracing::{error, warn};

/// So many holders in a row that live less than [`LIFE_MIN`], and no more are started.
const HOLDERS_MAX: u32 = 5;

/// One takeover more.
fn observe(pause_ms: u64) {
    histogram!("efc_failover_seconds").record(pause_ms as f64 / 1e3);
}

fn expose(failovers: &BTreeMap<String, u64>) {
    for (reason, count) in failovers {
        counter!("efc_failover_total", "reason" => reason.clone()).absolute(*count);
    }
}

fn quick_deaths() -> Error {
    Error::new(Kind::Io, format!("{HOLDERS_MAX} holders in a row ended at once"))
}

/// What a mount process has of its holder.
#[derive(Debug)]
pub struct Held {
    line: Mutex<Arc<Line>>,
    /// What the holder keeps. Held while it is told of more, so that another one is told of everything.
    kept: Mutex<Kept>,
    /// This process ends: it needs no holder any more.
    ends: AtomicBool,
    past: Mutex<Past>,
    /// What was set since this process began.
    options: Mutex<Vec<String>>,
    /// What the holder wants.
    wish: watch::Sender<Wish>,
}

/// What a holder wants of its mount process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Wish {
    /// Nothing.
    #[default]
    Nothing,
    /// That it has another program started in its place.
    Upgrade(Upgrade),
    /// That it leaves.
    Leave,
}

/// What a predecessor left.
#[derive(Debug)]
pub struct Left {
    /// The connection.
    pub connection: OwnedFd,
    /// Its INIT record.
    pub init: String,
    /// Its journal.
    pub nodes: File,
    /// Requests that it must not have done twice.
    pub outcomes: Option<File>,
    /// Its session with the masters.
    pub session: Option<String>,
    /// Files that are open without a name, by node.
    pub files: HashMap<u64, OwnedFd>,
    /// The memory in which drafts are staged.
    pub staging: Option<File>,
    /// Files in which others are, by number.
    pub staged: HashMap<u64, OwnedFd>,
    /// Its embedded cluster.
    pub cluster: Option<Orphaned>,
}

impl Held {
    /// The holder that started this process, if one did.
    ///
    /// # Errors
    /// When it says something that is not understood.
    pub fn inherited() -> Result<Option<Held>> {
        let Some(line) = inherited_line()? else { return Ok(None) };
        let gone = || Error::new(Kind::Unavailable, "the holder of this mount process is gone");
        let Some((Message::Kept { items: count, past }, _)) = line.receive()? else { return Err(gone()) };
        let mut kept = Kept::new();
        for _ in 0..count {
            let Some((Message::Keep { item, text }, fd)) = line.receive()? else { return Err(gone()) };
            kept.insert(item, (text, fd));
        }
        Ok(Some(Held {
            line: Mutex::new(Arc::new(line)),
            kept: Mutex::new(kept),
            ends: AtomicBool::new(false),
            past: Mutex::new(past),
            options: Mutex::default(),
            wish: watch::Sender::default(),
        }))
    }

    /// Hears the holder, and starts another when it is gone.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn guard(self: &Arc<Self>) -> Result<()> {
        let this = self.clone();
        let wait = move || {
            let mut deaths = 0;
            loop {
                let begun = Instant::now();
                this.hear();
                if this.ends.load(SeqCst) {
                    return;
                }
                if manager::starts_again() {
                    error!("the holder of this mount is gone; this process ends for the service manager to begin anew");
                    // As a crash: nothing may be cleaned up that the next one goes on with.
                    if let Err(e) =
                        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
                    {
                        error!(error = %e, "this process does not end");
                    }
                }
                deaths = if begun.elapsed() > LIFE_MIN { 1 } else { deaths + 1 };
                let started = if deaths > HOLDERS_MAX { Err(quick_deaths()) } else { this.start_holder() };
                match started {
                    Ok(pid) => warn!(pid, "the holder of this mount was gone; another holds it"),
                    Err(e) => {
                        error!(error = %e, "the holder of this mount is gone; if this process dies, nobody takes over");
                        return;
                    }
                }
            }
        };
        std::thread::Builder::new().name("efc-held".into()).spawn(wait)?;
        Ok(())
    }

    /// Hears the holder until it is gone.
    fn hear(&self) {
        let line = self.line.lock().clone();
        while let Ok(Some((message, _))) = line.receive() {
            match message {
                Message::Event(event) => self.happened(event),
                Message::Upgrade(upgrade) => drop(self.wish.send_replace(Wish::Upgrade(upgrade))),
                Message::Leave => drop(self.wish.send_replace(Wish::Leave)),
                _ => {}
            }
        }
    }

    /// This process serves since then.
    fn happened(&self, event: Event) {
        let mut past = self.past.lock();
        if event.what == "upgrade" {
            // What else it is replaced for was counted before it began.
            past.count(&event.what);
        }
        observe(event.pause_ms);
        past.remember(event);
        expose(&past.failovers);
    }

    /// Shows what happened so far in the metrics of this process.
    pub fn expose(&self) {
        let past = self.past.lock();
        past.pauses_ms.iter().for_each(|pause| observe(*pause));
        expose(&past.failovers);
    }

    /// Starts a holder for this process, and gives it everything. Its process.
    fn start_holder(&self) -> Result<u32> {
        let kept = self.kept.lock();
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let text = "the holder was gone; another holds the mount".into();
        let event = Event { at, what: "holder".into(), pid: std::process::id(), pause_ms: 0, text, upgrade: 0 };
        self.past.lock().remember(event);
        let (child, line) = start(&std::env::current_exe()?, self.options.lock().iter(), Some(std::process::id()))?;
        tell_all(&line, &kept, &self.past.lock())?;
        line.send(&Message::Ready, None)?;
        *self.line.lock() = Arc::new(line);
        let started = child.pid;
        reap_later(child)?;
        Ok(started)
    }

    /// Was there a process before this one, that left what is needed to go on?
    pub fn goes_on(&self) -> bool {
        super::can_go_on(&self.kept.lock())
    }

    /// What a predecessor left, if it left all that is needed. To be asked before anything is kept.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn left_behind(&self) -> Result<Option<Left>> {
        let kept = self.kept.lock();
        let text = |item| kept.get(&item).map(|(text, _)| text.clone());
        let fd = |item| kept.get(&item).and_then(|(_, fd)| fd.as_ref()).map(OwnedFd::try_clone).transpose();
        let (Some(connection), Some(init), Some(nodes)) = (fd(Item::Connection)?, text(Item::Init), fd(Item::Nodes)?)
        else {
            return Ok(None);
        };
        let (outcomes, session) = (fd(Item::Outcomes)?.map(File::from), text(Item::Session));
        let (mut files, mut staged) = (HashMap::new(), HashMap::new());
        for item in kept.keys() {
            match (item, fd(*item)?) {
                (Item::File(node), Some(file)) => drop(files.insert(*node, file)),
                (Item::Staged(number), Some(file)) => drop(staged.insert(*number, file)),
                _ => {}
            }
        }
        let staging = fd(Item::Staging)?.map(File::from);
        let cluster = match (fd(Item::Lifeline)?, fd(Item::DataDir)?, text(Item::Cluster)) {
            (Some(lifeline), Some(lock), Some(running)) => Some(Orphaned { lifeline, lock, running }),
            _ => None,
        };
        Ok(Some(Left { connection, init, nodes: nodes.into(), outcomes, session, files, staging, staged, cluster }))
    }

    /// Has the holder keep something for the next process.
    ///
    /// # Errors
    /// What the system said.
    pub fn keep(&self, item: Item, text: &str, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let ours = fd.map(|fd| fd.try_clone_to_owned()).transpose()?;
        let mut kept = self.kept.lock();
        kept.insert(item, (text.into(), ours));
        self.say(&Message::Keep { item, text: text.into() }, fd)
    }

    /// It need not be kept any more.
    ///
    /// # Errors
    /// As [`Held::keep`].
    pub fn drop_item(&self, item: Item) -> Result<()> {
        let mut kept = self.kept.lock();
        kept.remove(&item);
        self.say(&Message::Drop { item }, None)
    }

    /// Says what another holder is told as well, should this one be gone.
    fn say(&self, message: &Message, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        match self.line.lock().send(message, fd) {
            Err(e) if e.is(Kind::Unavailable) => Ok(()),
            other => other,
        }
    }

    /// What the holder wants, from now on.
    pub fn wishes(&self) -> watch::Receiver<Wish> {
        self.wish.subscribe()
    }

    /// What happened to the mount's processes.
    pub fn events(&self) -> Vec<Event> {
        self.past.lock().events.clone()
    }

    /// How often the mount's process was replaced, and the last time.
    pub fn takeovers(&self) -> (u64, Option<Event>) {
        let past = self.past.lock();
        let last = past.events.iter().rfind(|e| e.is_takeover()).cloned();
        (past.failovers.values().sum(), last)
    }

    /// Successors are to begin with these options as well.
    ///
    /// # Errors
    /// As [`Held::keep`].
    pub fn set_options(&self, new: Vec<String>) -> Result<()> {
        options::replace(&mut self.options.lock(), &new);
        self.say(&Message::Options(new), None)
    }

    /// Has the holder start another program in the place of this process, which will be told to leave.
    ///
    /// # Errors
    /// As [`Held::keep`].
    pub fn upgrade(&self, upgrade: Upgrade) -> Result<()> {
        self.line.lock().send(&Message::Upgrade(upgrade), None)
    }

    /// Everything is written down, and nothing is answered any more.
    ///
    /// # Errors
    /// As [`Held::keep`].
    pub fn left(&self) -> Result<()> {
        self.ends.store(true, SeqCst);
        self.line.lock().send(&Message::Left, None)
    }

    /// The mount answers.
    pub fn ready(&self) {
        if let Err(e) = self.line.lock().send(&Message::Ready, None) {
            warn!(error = %e, "nobody was told that the mount answers");
        }
    }

    /// This process ends by itself.
    pub fn bye(&self, code: u8, text: Option<String>) {
        self.ends.store(true, SeqCst);
        // Without a holder there is nobody who would start another.
        let _ = self.line.lock().send(&Message::Bye { code, text }, None);
    }
}
