//! Is a recorded history linearizable? For each object the operations of all threads are put into one order that respects real time (what ended before another
//! began comes first) and in which every answer is right, or it is shown that there is none.
//!
//! The search is that of Wing and Gong ("Testing and verifying concurrent objects", 1993) over what each thread has done so far: threads are sequential, so a
//! configuration is one index per thread and the object's state. It is done round by round: between rounds nothing runs, and the states an object can be in at the
//! end of one are those it can begin the next in.

use std::collections::HashSet;
use std::hash::Hash;

/// An operation as it was seen: when it was called, when it had returned, and what.
#[derive(Debug, Clone)]
pub(crate) struct Done<O> {
    pub(crate) begun: u64,
    pub(crate) ended: u64,
    pub(crate) what: O,
}

/// What an object does.
pub(crate) trait Model: Clone + Eq + Hash + std::fmt::Debug {
    type Op: Clone + std::fmt::Debug;

    /// The state after an operation with this answer; `None`: it cannot have answered that.
    fn apply(&self, op: &Self::Op) -> Option<Self>;
}

/// All states in which a round can have ended, from all in which it can have begun. There is none: how far an order can be found at most, and what cannot come next.
pub(crate) fn round<M: Model>(begin: &HashSet<M>, threads: &[Vec<Done<M::Op>>]) -> Result<HashSet<M>, String> {
    let mut ends = HashSet::new();
    let mut furthest = (Vec::new(), None);
    let mut seen: HashSet<(Vec<usize>, M)> = HashSet::new();
    let mut open: Vec<(Vec<usize>, M)> = begin.iter().map(|m| (vec![0; threads.len()], m.clone())).collect();
    while let Some((at, state)) = open.pop() {
        if !seen.insert((at.clone(), state.clone())) {
            continue;
        }
        if at.iter().sum::<usize>() > furthest.0.iter().sum() || furthest.1.is_none() {
            furthest = (at.clone(), Some(state.clone()));
        }
        let pending = |t: usize| threads[t].get(at[t]);
        // Whatever comes next must have begun before any other that waits had ended.
        let Some(first_end) = (0..threads.len()).filter_map(|t| pending(t).map(|o| o.ended)).min() else {
            ends.insert(state);
            continue;
        };
        for t in 0..threads.len() {
            let Some(next) = pending(t).filter(|o| o.begun <= first_end) else { continue };
            if let Some(after) = state.apply(&next.what) {
                let mut at = at.clone();
                at[t] += 1;
                open.push((at, after));
            }
        }
    }
    let (at, Some(state)) = furthest else { return Ok(ends) };
    if ends.is_empty() {
        let shown = |t: usize| {
            let near = threads[t].iter().enumerate().skip(at[t].saturating_sub(6)).take(9);
            let line = |(i, o): (usize, &Done<M::Op>)| {
                let mark = if i < at[t] { "ordered" } else { "pending" };
                format!("  thread {t} {mark} {:>12}..{:>12} {:?}", o.begun, o.ended, o.what)
            };
            near.map(line).collect::<Vec<_>>().join("\n")
        };
        let lanes: Vec<String> = (0..threads.len()).map(shown).collect();
        return Err(format!("an order is found up to {state:?}, and then none\n{}", lanes.join("\n")));
    }
    Ok(ends)
}

/// A file that is overwritten whole.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(crate) struct Register(pub(crate) u64);

#[derive(Debug, Clone)]
pub(crate) enum RegisterOp {
    Write(u64),
    Read(u64),
    /// Parts of several writes: reading and writing are not atomic to each other, so one of these must have been under way.
    Torn(Vec<u64>),
}

impl Model for Register {
    type Op = RegisterOp;
    fn apply(&self, op: &RegisterOp) -> Option<Self> {
        match op {
            RegisterOp::Write(v) => Some(Register(*v)),
            RegisterOp::Read(v) => (*v == self.0).then(|| self.clone()),
            RegisterOp::Torn(_) => Some(self.clone()),
        }
    }
}

/// Reads of parts of several writes during which none of these was under way.
pub(crate) fn torn(threads: &[Vec<Done<RegisterOp>>]) -> Vec<String> {
    let all = || threads.iter().flatten();
    let writing = |torn: &Done<RegisterOp>, parts: &[u64]| {
        let at_once = |w: &&Done<RegisterOp>| w.begun < torn.ended && torn.begun < w.ended;
        all().filter(at_once).any(|w| matches!(w.what, RegisterOp::Write(v) if parts.contains(&v)))
    };
    let wrong = |op: &Done<RegisterOp>| match &op.what {
        RegisterOp::Torn(parts) if !writing(op, parts) => Some(format!("torn, and nobody was writing: {op:?}")),
        _ => None,
    };
    all().filter_map(wrong).collect()
}

/// A file that is appended to: how many records it has, and a digest of them in their order.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(crate) struct Log {
    pub(crate) count: u64,
    pub(crate) digest: u64,
}

impl Log {
    pub(crate) fn with(&self, record: u64) -> Log {
        let mixed = (self.digest ^ record).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31);
        Log { count: self.count + 1, digest: mixed }
    }
}

#[derive(Debug, Clone)]
pub(crate) enum LogOp {
    Append(u64),
    Read(Log),
    /// By `stat`: only how many.
    Count(u64),
}

impl Model for Log {
    type Op = LogOp;
    fn apply(&self, op: &LogOp) -> Option<Self> {
        match op {
            LogOp::Append(record) => Some(self.with(*record)),
            LogOp::Read(seen) => (seen == self).then(|| self.clone()),
            LogOp::Count(n) => (*n == self.count).then(|| self.clone()),
        }
    }
}

/// Which of a few names exist, a bit for each; of two directories.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(crate) struct Names(pub(crate) u32);

#[derive(Debug, Clone)]
pub(crate) enum NameOp {
    /// `O_CREAT | O_EXCL`; true: made.
    Create(u32, bool),
    /// True: there was one.
    Unlink(u32, bool),
    /// From, to; true: there was one to move.
    Rename(u32, u32, bool),
    Stat(u32, bool),
    /// All names under a mask.
    List(u32, u32),
}

impl Model for Names {
    type Op = NameOp;
    fn apply(&self, op: &NameOp) -> Option<Self> {
        let has = |n: u32| self.0 >> n & 1 == 1;
        match *op {
            NameOp::Create(n, made) => (made != has(n)).then_some(Names(self.0 | 1 << n)),
            NameOp::Unlink(n, was) => (was == has(n)).then_some(Names(self.0 & !(1 << n))),
            NameOp::Rename(from, to, was) if was == has(from) => {
                Some(if was && from != to { Names(self.0 & !(1 << from) | 1 << to) } else { self.clone() })
            }
            NameOp::Rename(..) => None,
            NameOp::Stat(n, was) => (was == has(n)).then(|| self.clone()),
            NameOp::List(mask, seen) => (self.0 & mask == seen).then(|| self.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op<O>(begun: u64, ended: u64, what: O) -> Done<O> {
        Done { begun, ended, what }
    }

    fn ends(threads: &[Vec<Done<RegisterOp>>]) -> usize {
        round(&HashSet::from([Register(0)]), threads).map_or(0, |ends| ends.len())
    }

    #[test]
    fn a_read_that_began_after_a_write_had_returned_sees_it() {
        use RegisterOp::{Read, Torn, Write};
        assert_eq!(ends(&[vec![op(0, 10, Write(1))], vec![op(11, 12, Read(1))]]), 1);
        assert_eq!(ends(&[vec![op(0, 10, Write(1))], vec![op(11, 12, Read(0))]]), 0);
        assert_eq!(ends(&[vec![op(0, 10, Write(1))], vec![op(9, 12, Read(0))]]), 1, "at the same time: either");
        // What one reader has seen nobody may miss later.
        let back = [vec![op(0, 100, Write(1))], vec![op(1, 2, Read(1))], vec![op(3, 4, Read(0))]];
        assert_eq!(ends(&back), 0);
        let parts = vec![op(20, 30, Torn(vec![1, 2]))];
        assert!(torn(&[vec![op(0, 25, Write(2))], parts.clone()]).is_empty());
        assert_eq!(torn(&[vec![op(0, 10, Write(2))], parts]).len(), 1);
        let two = [vec![op(0, 100, Write(1))], vec![op(0, 100, Write(2))]];
        assert_eq!(ends(&two), 2);
    }

    #[test]
    fn names_and_logs_do_what_a_file_system_does() {
        let names = Names::default().apply(&NameOp::Create(3, true)).unwrap();
        assert!(names.apply(&NameOp::Create(3, true)).is_none() && names.apply(&NameOp::Create(3, false)).is_some());
        let moved = names.apply(&NameOp::Rename(3, 0, true)).unwrap();
        assert_eq!(moved, Names(1));
        assert!(moved.apply(&NameOp::List(0b1111, 0b1)).is_some() && moved.apply(&NameOp::Stat(3, true)).is_none());
        let log = Log::default().with(5).with(6);
        assert!(log.apply(&LogOp::Read(Log::default().with(6).with(5))).is_none());
        assert!(log.apply(&LogOp::Count(2)).is_some());
    }
}
