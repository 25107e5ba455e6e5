//! The operations: threads on both mounts, in rounds between which nothing runs.

use crate::check::{Done, Log, LogOp, Model, NameOp, Names, Register, RegisterOp, round, torn};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Barrier, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Threads on each mount.
const THREADS: usize = 2;
/// Operations of a thread in a round.
const ROUND: usize = 50;
const REGISTERS: usize = 3;
const LOGS: usize = 2;
/// Names are bits: the lower half lies in one directory, the upper in another.
const NAMES: u32 = 6;
/// Long enough that it is not one word, short enough that pages stay partial.
const VALUE_BYTES: usize = 1000;
const RECORD_BYTES: usize = 24;
/// Numbers of the operations on logs in [`Actor::act`], which has a hundred.
const LOG_OPERATIONS: Range<u32> = 38..54;
/// A log that is longer is begun anew between two rounds.
const LOG_RECORDS_MAX: u64 = 2000;

#[derive(Debug, Clone)]
enum Op {
    Register(usize, RegisterOp),
    Log(usize, LogOp),
    Names(NameOp),
}

/// What came of it.
pub(crate) struct Outcome {
    pub(crate) operations: u64,
    pub(crate) violations: Vec<String>,
    pub(crate) slowest: Duration,
    pub(crate) seed: u64,
    kinds: BTreeMap<&'static str, u64>,
}

impl Outcome {
    pub(crate) fn by_kind(&self) -> String {
        let kinds: Vec<String> = self.kinds.iter().map(|(k, n)| format!("{k} {n}")).collect();
        kinds.join(", ")
    }
}

pub(crate) struct Workload {
    done: Arc<AtomicBool>,
    enough: Arc<AtomicBool>,
    main: JoinHandle<Outcome>,
}

/// The content of a register, whole or torn.
fn value(v: u64) -> Vec<u8> {
    v.to_le_bytes().iter().copied().cycle().take(VALUE_BYTES).collect()
}

fn record(v: u64) -> Vec<u8> {
    v.to_le_bytes().iter().copied().cycle().take(RECORD_BYTES).collect()
}

fn parse_value(bytes: &[u8]) -> Result<RegisterOp, String> {
    if bytes.len() != VALUE_BYTES {
        return Err(format!("{} bytes", bytes.len()));
    }
    let words: HashSet<u64> =
        bytes.chunks_exact(8).filter_map(|w| Some(u64::from_le_bytes(w.try_into().ok()?))).collect();
    Ok(match words.iter().collect::<Vec<_>>()[..] {
        [v] => RegisterOp::Read(*v),
        _ => RegisterOp::Torn(words.into_iter().collect()),
    })
}

fn parse_log(bytes: &[u8]) -> Result<Log, String> {
    if !bytes.len().is_multiple_of(RECORD_BYTES) {
        return Err(format!("{} bytes are no whole records", bytes.len()));
    }
    let mut log = Log::default();
    for (i, r) in bytes.chunks(RECORD_BYTES).enumerate() {
        let v = u64::from_le_bytes(r[..8].try_into().map_err(|_| "short")?);
        if r != record(v) {
            return Err(format!("record {i} is torn"));
        }
        log = log.with(v);
    }
    Ok(log)
}

fn name(root: &Path, n: u32) -> PathBuf {
    root.join(if n < NAMES / 2 { "names0" } else { "names1" }).join(format!("n{n}"))
}

fn there(result: std::io::Result<()>, answer: ErrorKind) -> Result<bool, Error> {
    match result {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == answer => Ok(false),
        Err(e) => Err(e),
    }
}

struct Actor {
    root: PathBuf,
    rng: StdRng,
    next: u64,
    /// Files that stay open: read through the kernel's pages, and written to.
    readers: Vec<File>,
    writers: Vec<File>,
    logs: Vec<File>,
}

impl Actor {
    fn new(root: PathBuf, seed: u64, number: u64) -> std::io::Result<Actor> {
        let open = |n: &str, i: usize, o: &mut OpenOptions| o.open(root.join(format!("{n}{i}")));
        Ok(Actor {
            readers: (0..REGISTERS).map(|i| open("reg", i, OpenOptions::new().read(true))).collect::<Result<_, _>>()?,
            writers: (0..REGISTERS)
                .map(|i| open("reg", i, OpenOptions::new().write(true)))
                .collect::<Result<_, _>>()?,
            logs: (0..LOGS).map(|i| open("log", i, OpenOptions::new().append(true))).collect::<Result<_, _>>()?,
            rng: StdRng::seed_from_u64(seed ^ number),
            next: number << 48 | 1,
            root,
        })
    }

    fn unique(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Does one operation, of those that `range` covers.
    fn act(&mut self, range: Range<u32>) -> Result<Op, String> {
        let told = |what: &str, e: Error| format!("{what}: {e}");
        let r = self.rng.random_range(0..REGISTERS);
        let l = self.rng.random_range(0..LOGS);
        let (n, m) = (self.rng.random_range(0..NAMES), self.rng.random_range(0..NAMES));
        Ok(match self.rng.random_range(range) {
            0..12 => {
                let v = self.unique();
                self.writers[r].write_all_at(&value(v), 0).map_err(|e| told("write", e))?;
                Op::Register(r, RegisterOp::Write(v))
            }
            12..30 => {
                let mut bytes = vec![0; VALUE_BYTES];
                self.readers[r].read_exact_at(&mut bytes, 0).map_err(|e| told("read", e))?;
                Op::Register(r, parse_value(&bytes).map_err(|e| format!("register {r}: {e}"))?)
            }
            30..38 => {
                let bytes = std::fs::read(self.root.join(format!("reg{r}"))).map_err(|e| told("open and read", e))?;
                Op::Register(r, parse_value(&bytes).map_err(|e| format!("register {r}: {e}"))?)
            }
            38..44 => {
                let v = self.unique();
                self.logs[l].write_all(&record(v)).map_err(|e| told("append", e))?;
                Op::Log(l, LogOp::Append(v))
            }
            44..48 => {
                let mut bytes = Vec::new();
                let read = File::open(self.root.join(format!("log{l}"))).and_then(|mut f| f.read_to_end(&mut bytes));
                read.map_err(|e| told("read log", e))?;
                Op::Log(l, LogOp::Read(parse_log(&bytes).map_err(|e| format!("log {l}: {e}"))?))
            }
            48..54 => {
                let size = std::fs::metadata(self.root.join(format!("log{l}"))).map_err(|e| told("stat log", e))?.len();
                if !size.is_multiple_of(RECORD_BYTES as u64) {
                    return Err(format!("log {l} has {size} bytes"));
                }
                Op::Log(l, LogOp::Count(size / RECORD_BYTES as u64))
            }
            54..64 => {
                let made = OpenOptions::new().write(true).create_new(true).open(name(&self.root, n)).map(drop);
                Op::Names(NameOp::Create(n, there(made, ErrorKind::AlreadyExists).map_err(|e| told("create", e))?))
            }
            64..71 => {
                let gone = std::fs::remove_file(name(&self.root, n));
                Op::Names(NameOp::Unlink(n, there(gone, ErrorKind::NotFound).map_err(|e| told("unlink", e))?))
            }
            71..78 => {
                let moved = std::fs::rename(name(&self.root, n), name(&self.root, m));
                Op::Names(NameOp::Rename(n, m, there(moved, ErrorKind::NotFound).map_err(|e| told("rename", e))?))
            }
            78..93 => {
                let seen = std::fs::symlink_metadata(name(&self.root, n)).map(drop);
                Op::Names(NameOp::Stat(n, there(seen, ErrorKind::NotFound).map_err(|e| told("stat", e))?))
            }
            _ => {
                let half = self.rng.random_range(0..2u32);
                let mut seen = 0;
                for entry in std::fs::read_dir(self.root.join(format!("names{half}"))).map_err(|e| told("list", e))? {
                    let entry = entry.map_err(|e| told("list", e))?.file_name();
                    let number = entry.to_str().and_then(|n| n.strip_prefix('n')?.parse::<u32>().ok());
                    seen |= 1 << number.ok_or_else(|| format!("a name nobody made: {}", entry.display()))?;
                }
                let mask = ((1 << (NAMES / 2)) - 1) << (half * (NAMES / 2));
                Op::Names(NameOp::List(mask, seen))
            }
        })
    }
}

fn kind(op: &Op) -> &'static str {
    match op {
        Op::Register(_, RegisterOp::Write(_)) => "write",
        Op::Register(_, RegisterOp::Read(_)) => "read",
        Op::Register(_, RegisterOp::Torn(_)) => "torn read",
        Op::Log(_, LogOp::Append(_)) => "append",
        Op::Log(_, LogOp::Read(_)) => "read log",
        Op::Log(_, LogOp::Count(_)) => "size",
        Op::Names(NameOp::Create(..)) => "create",
        Op::Names(NameOp::Unlink(..)) => "unlink",
        Op::Names(NameOp::Rename(..)) => "rename",
        Op::Names(NameOp::Stat(..)) => "stat",
        Op::Names(NameOp::List(..)) => "list",
    }
}

/// States that the objects can be in.
struct States {
    registers: Vec<HashSet<Register>>,
    logs: Vec<HashSet<Log>>,
    names: HashSet<Names>,
}

impl States {
    fn check(&mut self, rounds: &[Vec<Done<Op>>]) -> Vec<String> {
        let mut wrong = Vec::new();
        for r in 0..REGISTERS {
            let of = pick(rounds, |op| if let Op::Register(i, o) = op { (*i == r).then(|| o.clone()) } else { None });
            wrong.extend(torn(&of));
            step(&mut self.registers[r], &of, &format!("register {r}"), &mut wrong);
        }
        for l in 0..LOGS {
            let of = pick(rounds, |op| if let Op::Log(i, o) = op { (*i == l).then(|| o.clone()) } else { None });
            step(&mut self.logs[l], &of, &format!("log {l}"), &mut wrong);
        }
        let of = pick(rounds, |op| if let Op::Names(o) = op { Some(o.clone()) } else { None });
        step(&mut self.names, &of, "names", &mut wrong);
        wrong
    }
}

fn pick<O>(threads: &[Vec<Done<Op>>], pick: impl Fn(&Op) -> Option<O>) -> Vec<Vec<Done<O>>> {
    let of = |d: &Done<Op>| Some(Done { begun: d.begun, ended: d.ended, what: pick(&d.what)? });
    threads.iter().map(|t| t.iter().filter_map(of).collect()).collect()
}

fn step<M: Model>(states: &mut HashSet<M>, threads: &[Vec<Done<M::Op>>], what: &str, wrong: &mut Vec<String>) {
    match round(states, threads) {
        Ok(after) => *states = after,
        Err(e) => wrong.push(format!("{what}: {e}")),
    }
}

impl Workload {
    pub(crate) fn start(mounts: [PathBuf; 2], operations: u64, slowest: Duration) -> Workload {
        let done = Arc::new(AtomicBool::new(false));
        let enough = Arc::new(AtomicBool::new(false));
        let (ended, may_end) = (done.clone(), enough.clone());
        let main = std::thread::spawn(move || {
            let outcome = rounds(&mounts, operations, slowest, &may_end);
            ended.store(true, Relaxed);
            outcome
        });
        Workload { done, enough, main }
    }

    /// What was to happen meanwhile has happened: it may end when it has done its operations.
    pub(crate) fn may_end(&self) {
        self.enough.store(true, Relaxed);
    }

    pub(crate) fn is_done(&self) -> bool {
        self.done.load(Relaxed) || self.main.is_finished()
    }

    pub(crate) fn finish(self) -> Outcome {
        self.main.join().expect("the workload panicked")
    }
}

fn rounds(mounts: &[PathBuf; 2], operations: u64, limit: Duration, may_end: &AtomicBool) -> Outcome {
    let seed = std::env::var("EFC_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(rand::random);
    let a = &mounts[0];
    for r in 0..REGISTERS {
        std::fs::write(a.join(format!("reg{r}")), value(0)).expect("make a register");
    }
    for l in 0..LOGS {
        std::fs::write(a.join(format!("log{l}")), b"").expect("make a log");
    }
    std::fs::create_dir(a.join("names0")).expect("make a directory");
    std::fs::create_dir(a.join("names1")).expect("make a directory");
    let base = Instant::now();
    let actors: Vec<Mutex<Actor>> = (0..2 * THREADS)
        .map(|t| Mutex::new(Actor::new(mounts[t % 2].clone(), seed, t as u64 + 1).expect("open on both mounts")))
        .collect();
    let mut states = States {
        registers: vec![HashSet::from([Register(0)]); REGISTERS],
        logs: vec![HashSet::from([Log::default()]); LOGS],
        names: HashSet::from([Names(0)]),
    };
    let mut out =
        Outcome { operations: 0, violations: Vec::new(), slowest: Duration::ZERO, seed, kinds: BTreeMap::new() };
    let mut number = 0;
    while (out.operations < operations || !may_end.load(Relaxed)) && out.violations.is_empty() {
        let start = Barrier::new(actors.len());
        number += 1;
        // Every fourth round all are at the logs, which grow under each other's hands.
        let range = if number % 4 == 0 { LOG_OPERATIONS } else { 0..100 };
        let lanes: Vec<(Vec<Done<Op>>, Option<String>)> = std::thread::scope(|s| {
            let threads: Vec<_> = actors
                .iter()
                .map(|actor| {
                    let (start, range) = (&start, &range);
                    s.spawn(move || {
                        let mut actor = actor.lock().expect("one round at a time");
                        let (mut ops, mut wrong) = (Vec::with_capacity(ROUND), None);
                        start.wait();
                        for _ in 0..ROUND {
                            let begun = base.elapsed();
                            let what = actor.act(range.clone());
                            let ended = base.elapsed();
                            match what {
                                Ok(what) => ops.push(Done {
                                    begun: begun.as_nanos() as u64,
                                    ended: ended.as_nanos() as u64,
                                    what,
                                }),
                                Err(e) => {
                                    wrong = Some(e);
                                    break;
                                }
                            }
                        }
                        (ops, wrong)
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().expect("an actor panicked")).collect()
        });
        for (ops, wrong) in &lanes {
            out.operations += ops.len() as u64;
            out.violations.extend(wrong.clone());
            for op in ops {
                *out.kinds.entry(kind(&op.what)).or_default() += 1;
                out.slowest = out.slowest.max(Duration::from_nanos(op.ended - op.begun));
            }
        }
        if out.slowest > limit {
            out.violations.push(format!("an operation took {:?}", out.slowest));
        }
        let lanes: Vec<_> = lanes.into_iter().map(|(ops, _)| ops).collect();
        out.violations.extend(states.check(&lanes));
        for (l, log) in states.logs.iter_mut().enumerate() {
            if log.iter().any(|s| s.count > LOG_RECORDS_MAX) {
                // By a file of its own, so that nobody is in the middle of it.
                actors[0].lock().expect("between rounds").logs[l].set_len(0).expect("empty the log");
                *log = HashSet::from([Log::default()]);
            }
        }
    }
    out
}
