//! Policies alone, over traces: no files, no locks.

use std::collections::HashMap;

use super::*;

/// A cache of `capacity` unit-cost entries that only keeps count.
struct Sim {
    policy: Box<dyn EvictionPolicy>,
    capacity: u64,
    used: u64,
    trial: bool,
    slot_of: HashMap<u64, u32>,
    key_of: HashMap<u32, (u64, u32)>,
    free: Vec<u32>,
}

const UNIT: u32 = 4096;

fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 30).wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

impl Sim {
    fn new(policy: Policy, entries: u32, trial: bool) -> Self {
        let capacity = entries as u64 * UNIT as u64;
        Sim {
            policy: build(policy, capacity),
            capacity,
            used: 0,
            trial,
            slot_of: HashMap::new(),
            key_of: HashMap::new(),
            free: (0..entries * 2).rev().collect(),
        }
    }

    /// One request; true for a hit.
    fn ask(&mut self, key: u64, cost: u32) -> bool {
        if let Some(id) = self.slot_of.get(&key) {
            self.policy.hit(*id);
            return true;
        }
        let full = self.used + cost as u64 > self.capacity;
        let c = Candidate { hash: mix(key) as u32, cost, full, trial: self.trial };
        self.policy.seen(c.hash);
        if !self.policy.admit(c) {
            return false;
        }
        while self.used + cost as u64 > self.capacity {
            let id = self.policy.victim(c, &mut |_| true).expect("something to evict");
            let (gone, gone_cost) = self.key_of.remove(&id).expect("victims are entries that were inserted");
            self.slot_of.remove(&gone);
            self.used -= gone_cost as u64;
            self.free.push(id);
        }
        let id = self.free.pop().expect("a slot");
        self.policy.insert(id, c);
        self.slot_of.insert(key, id);
        self.key_of.insert(id, (key, cost));
        self.used += cost as u64;
        false
    }

    /// Hit rate of one pass.
    fn pass(&mut self, keys: impl IntoIterator<Item = u64>) -> f64 {
        let (mut hits, mut all) = (0u32, 0u32);
        for k in keys {
            hits += self.ask(k, UNIT) as u32;
            all += 1;
        }
        hits as f64 / all as f64
    }
}

/// The numbers of `range` in an order that `seed` decides.
fn shuffled(range: std::ops::Range<u64>, seed: u64) -> Vec<u64> {
    let mut keys: Vec<u64> = range.collect();
    for i in (1..keys.len()).rev() {
        keys.swap(i, (mix(seed ^ i as u64) % (i as u64 + 1)) as usize);
    }
    keys
}

const ENTRIES: u32 = 2000;
const POLICIES: [Policy; 3] = [Policy::ScanResistant, Policy::Arc, Policy::Lru];

/// Mean hit rate of passes 5 to 16 over 4 times the capacity.
fn epochs(policy: Policy, trial: bool, order: fn(std::ops::Range<u64>, u64) -> Vec<u64>) -> f64 {
    let mut sim = Sim::new(policy, ENTRIES, trial);
    let rates: Vec<f64> = (0..16).map(|e| sim.pass(order(0..ENTRIES as u64 * 4, e))).collect();
    rates[4..].iter().sum::<f64>() / 12.0
}

#[test]
fn an_epoch_scan_keeps_its_hit_rate_with_the_default_policy_only() {
    let cyclic = |r: std::ops::Range<u64>, _| r.collect();
    println!("passes over 4 times the capacity (best possible: 0.25)");
    println!("{:<16} {:>8} {:>8} {:>8}", "policy", "cyclic", "shuffled", "strict");
    for p in POLICIES {
        let (c, s, t) = (epochs(p, true, cyclic), epochs(p, true, shuffled), epochs(p, false, shuffled));
        println!("{:<16} {c:>8.3} {s:>8.3} {t:>8.3}", format!("{p:?}"));
        match p {
            Policy::ScanResistant => assert!(c >= 0.2 && s >= 0.2 && t >= 0.2, "{c} {s} {t}"),
            Policy::Lru => assert!(c < 0.05, "{c}"),
            Policy::Arc => {}
        }
    }
}

#[test]
fn a_new_data_set_takes_over_within_a_few_passes() {
    println!("{:>8} {:>8} {:>6} | hit rate of each pass over the new set / best possible", "old", "new", "trial");
    for trial in [true, false] {
        for (old, new) in [(4.0f64, 4.0f64), (4.0, 0.5), (0.5, 4.0), (0.9, 0.9), (8.0, 2.0), (2.0, 8.0)] {
            let mut sim = Sim::new(Policy::ScanResistant, ENTRIES, trial);
            let size = |x: f64| (x * ENTRIES as f64) as u64;
            for e in 0..12 {
                sim.pass(shuffled(0..size(old), e));
            }
            let best = f64::min(1.0 / new, 1.0);
            let rates: Vec<f64> =
                (0..10).map(|e| sim.pass(shuffled(1 << 32..(1 << 32) + size(new), e)) / best).collect();
            let text: Vec<String> = rates.iter().map(|r| format!("{r:.2}")).collect();
            println!("{old:>8} {new:>8} {trial:>6} | {}", text.join(" "));
            let settled = rates[5..].iter().sum::<f64>() / 5.0;
            assert!(settled >= 0.7, "{old} -> {new}: {rates:?}");
        }
    }
}

/// Requests by a Zipf law of exponent 1 over `n` keys.
fn zipf(n: u64, count: usize, seed: u64) -> Vec<u64> {
    let harmonic = (n as f64).ln();
    (0..count as u64)
        .map(|i| ((mix(seed.wrapping_mul(31) ^ i) >> 11) as f64 / (1u64 << 53) as f64 * harmonic).exp() as u64)
        .collect()
}

#[test]
fn on_skewed_requests_the_default_is_no_worse_than_lru() {
    let mut rates = HashMap::new();
    for p in POLICIES {
        let mut sim = Sim::new(p, ENTRIES, true);
        sim.pass(zipf(ENTRIES as u64 * 50, 200_000, 1));
        let rate = sim.pass(zipf(ENTRIES as u64 * 50, 200_000, 2));
        println!("zipf {p:?}: {rate:.3}");
        rates.insert(format!("{p:?}"), rate);
    }
    assert!(rates["ScanResistant"] >= rates["Lru"] && rates["Arc"] >= rates["Lru"], "{rates:?}");
}

#[test]
fn a_recency_bound_load_still_hits_through_the_window() {
    // Each key is asked for three times, 20 requests apart, and never again; behind it an old set that nobody asks for.
    let mut sim = Sim::new(Policy::ScanResistant, ENTRIES, true);
    for e in 0..5 {
        sim.pass(0..ENTRIES as u64 + e);
    }
    let rate = sim.pass((0..60_000u64).map(|i| (1 << 32) + i / 3 - (i % 3) * 20 + 100));
    assert!(rate > 0.6, "{rate}");
}

#[test]
fn many_reads_of_one_entry_in_a_row_count_once() {
    let mut p = scan::ScanResistant::new(1 << 30);
    let c = |n: u32| Candidate { hash: n, cost: UNIT, full: false, trial: false };
    for id in 0..1000 {
        p.seen(id);
        p.insert(id, c(id));
    }
    assert!(p.hit(1), "long after its insert");
    assert!(!(0..15).any(|_| p.hit(1)), "one client reading on");
    assert!((0..100).all(|i| p.hit(100 + i)));
    assert!(p.hit(1));
}

#[test]
fn victims_are_usable_entries_and_each_is_named_once() {
    for p in POLICIES {
        let mut policy = build(p, 1 << 20);
        let c = |n: u32| Candidate { hash: mix(n as u64) as u32, cost: UNIT, full: true, trial: n.is_multiple_of(2) };
        for id in 0..200 {
            policy.insert(id, c(id));
        }
        (0..200).step_by(7).for_each(|id| policy.remove(id));
        let mut gone = std::collections::BTreeSet::new();
        while let Some(id) = policy.victim(c(1000), &mut |id| id % 3 == 0) {
            assert!(id % 3 == 0 && id % 7 != 0 && gone.insert(id), "{p:?}: {id}");
        }
        let expected = (0..200).filter(|id| id % 3 == 0 && id % 7 != 0).count();
        assert_eq!(gone.len(), expected, "{p:?}");
    }
}
