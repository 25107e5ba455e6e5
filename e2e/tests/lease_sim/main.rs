//! The lease engines of master and client, run against each other in one thread on a simulated network, clock and origin, with leaders that are
//! deposed without noticing, lost, late, doubled and reordered messages, partitions, clients that crash or sleep, and clocks that drift.
//!
//! What is checked: what a client serves from what it remembers is what the origin has; nobody else believes a thing at the moment it is changed;
//! once faults stop, every operation ends. A failure names its seed; `EFC_SIM_SEED=n` runs exactly that one, `EFC_SIM_SEEDS=n` so many,
//! `EFC_SIM_LOG=1` tells what happens. The broken worlds show that the check can fail.

mod client;
mod net;
mod origin;
mod world;

use world::{Broken, Outcome, World};

const SEEDS: u64 = 150;

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|v| v.parse().ok())
}

fn run(seed: u64, broken: Option<Broken>) -> Outcome {
    World::new(seed, broken).run()
}

#[test]
fn clients_never_believe_what_is_not_so_and_every_operation_ends() {
    let seeds = match env("EFC_SIM_SEED") {
        Some(one) => one..one + 1,
        None => 0..env("EFC_SIM_SEEDS").unwrap_or(SEEDS),
    };
    let (begun, count) = (std::time::Instant::now(), seeds.end - seeds.start);
    let mut sum = Outcome::default();
    for seed in seeds {
        let outcome = run(seed, None);
        assert!(outcome.violation.is_none(), "EFC_SIM_SEED={seed}: {}", outcome.violation.unwrap_or_default());
        sum.add(&outcome);
    }
    println!("{count} seeds in {:?}: {sum:?}", begun.elapsed());
    // A world in which nothing happens proves nothing.
    let each = |n: u64| n > count * 2;
    assert!(each(sum.hits) && each(sum.changes) && each(sum.recalls), "{sum:?}");
}

#[test]
fn a_seed_gives_the_same_run_again() {
    for seed in 0..5 {
        let (a, b) = (run(seed, None), run(seed, None));
        assert_eq!((a.trace, a.events), (b.trace, b.events), "seed {seed}");
    }
    assert_ne!(run(0, None).trace, run(1, None).trace);
}

#[test]
fn broken_worlds_are_caught() {
    for broken in Broken::ALL {
        let caught = (0..400).find(|&seed| run(seed, Some(broken)).violation.is_some());
        println!("{broken:?}: caught with seed {caught:?}");
        assert!(caught.is_some(), "{broken:?} was not noticed");
    }
}
