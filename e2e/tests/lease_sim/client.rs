//! A mount in the simulation: a keeper, what is remembered, and operations.

use crate::net::{Chance, Clock};
use crate::origin::{DIRS, Unit, dir, units};
use efc_common::id::Incarnation;
use efc_common::lease::{Mode, Moment, Scope, Times, Want};
use efc_fuse::lease::{Config, Keeper, OpId};
use std::collections::BTreeMap;
use std::time::Duration;

/// What an operation does once it is admitted.
#[derive(Debug, Clone)]
pub(crate) enum Doing {
    Read(Unit),
    Change(Vec<Unit>),
}

#[derive(Debug)]
pub(crate) struct Op {
    pub(crate) doing: Doing,
    pub(crate) admitted: bool,
    /// What a fetch found, and how often the unit had been written by then.
    pub(crate) fetched: Option<(u64, u64)>,
    pub(crate) until: Moment,
}

/// What a mount remembers of a unit.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    pub(crate) version: Option<u64>,
    /// Own changes that are under way; meanwhile nothing is remembered.
    pub(crate) writing: u32,
    pub(crate) writes: u64,
}

pub(crate) struct Client {
    pub(crate) clock: Clock,
    /// None: crashed.
    pub(crate) keeper: Option<Keeper>,
    /// Counts the processes; what belongs to an old one comes to nothing.
    pub(crate) boot: u64,
    pub(crate) paused_until: Duration,
    /// The master it speaks to.
    pub(crate) leader: usize,
    pub(crate) last_life: Incarnation,
    /// A session is up in this life.
    pub(crate) up: Option<Incarnation>,
    pub(crate) asked_at: Moment,
    pub(crate) answered_at: Moment,
    pub(crate) memory: BTreeMap<Unit, Memory>,
    pub(crate) ops: BTreeMap<OpId, Op>,
    pub(crate) next_op: u64,
}

pub(crate) fn config(times: Times, chance: &mut Chance) -> Config {
    Config {
        times,
        idle: chance.ms(500, 20_000),
        leases_max: if chance.percent(30) { 3 } else { 100 },
        claims_max: 2,
        ..Config::default()
    }
}

impl Client {
    pub(crate) fn new(times: Times, chance: &mut Chance) -> Self {
        Client {
            clock: Clock::new(chance),
            keeper: Some(Keeper::new(config(times, chance))),
            boot: 0,
            paused_until: Duration::ZERO,
            leader: 0,
            last_life: Incarnation(0),
            up: None,
            asked_at: Moment::ZERO,
            answered_at: Moment::ZERO,
            memory: BTreeMap::new(),
            ops: BTreeMap::new(),
            next_op: 0,
        }
    }

    pub(crate) fn restart(&mut self, times: Times, chance: &mut Chance) {
        self.keeper = Some(Keeper::new(config(times, chance)));
        self.boot += 1;
        self.up = None;
        self.memory.clear();
        self.ops.clear();
    }

    pub(crate) fn memory(&mut self, unit: &Unit) -> &mut Memory {
        self.memory.entry(unit.clone()).or_default()
    }

    pub(crate) fn forget(&mut self, scope: Option<&Scope>) {
        for (unit, memory) in &mut self.memory {
            if scope.is_none_or(|s| unit.is_in(s)) {
                memory.version = None;
            }
        }
    }

    /// Would it believe this unit now?
    pub(crate) fn believes(&mut self, real: Duration, unit: &Unit) -> bool {
        let now = self.clock.at(real);
        let Some(keeper) = &mut self.keeper else { return false };
        let Some(guard) = keeper.try_admit(now, &unit.read()) else { return false };
        let mut effects = Vec::new();
        keeper.done(now, guard, &mut effects);
        assert!(effects.is_empty(), "a guard on what is not recalled had effects: {effects:?}");
        true
    }
}

/// An operation, and what it needs.
pub(crate) fn choose(chance: &mut Chance) -> (Doing, Vec<Want>) {
    let units = units();
    let any = |chance: &mut Chance| units[chance.below(units.len() as u64) as usize].clone();
    let names = |d: usize| Unit { dir: dir(DIRS[d]), file: None };
    let with_names = |want: Want, chance: &mut Chance| {
        let names = Want { scope: Scope::Dir(want.scope.dir().clone()), mode: Mode::Shared };
        if chance.percent(50) && matches!(want.scope, Scope::File(..)) { vec![want, names] } else { vec![want] }
    };
    match chance.below(100) {
        0..55 => {
            let unit = any(chance);
            let needs = with_names(unit.read(), chance);
            (Doing::Read(unit), needs)
        }
        55..88 => {
            let unit = any(chance);
            let needs = with_names(unit.change(), chance);
            (Doing::Change(vec![unit]), needs)
        }
        88..96 => {
            let (a, b) = (names(chance.below(4) as usize), names(chance.below(4) as usize));
            let needs = vec![b.change(), a.change()];
            (Doing::Change(if a == b { vec![a] } else { vec![a, b] }), needs)
        }
        _ => {
            // Moves everything below; the parent's names change too.
            let prefix = dir(["a/b/", "a/", "d/"][chance.below(3) as usize]);
            let mut changed: Vec<Unit> = units.iter().filter(|u| u.dir.is_in(&prefix)).cloned().collect();
            let mut needs = vec![Want::subtree(prefix.clone())];
            if prefix == dir("a/b/") {
                needs.push(names(0).change());
                changed.push(names(0));
            }
            (Doing::Change(changed), needs)
        }
    }
}
