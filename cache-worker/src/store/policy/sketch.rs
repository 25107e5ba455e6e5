//! How often was a key asked for lately? A count-min sketch (Cormode and Muthukrishnan, 2005) of 4-bit counters with conservative
//! update, aged by halving as in TinyLFU (Einziger, Friedman and Manes, 2017).
//!
//! When to age is our own. TinyLFU halves after a fixed number of requests per entry of the *cache*; a data set that is replaced
//! by another one of a different size then takes long to be forgotten, or is forgotten within one pass over it. Here the sketch
//! estimates how many distinct keys it knows and halves when the *mean* count of those reaches [`MEAN_MAX`]: so counts mean
//! "passes over the data set", whatever its size, and a new set needs few passes to overtake the old one.

/// Mean count of the known keys at which all counters are halved.
const MEAN_MAX: u64 = 3;
/// Counters of one key.
const ROWS: u32 = 4;
/// Counters of one row in one word.
const PER_ROW: u64 = 4;
const COUNT_MAX: u64 = 15;
/// Words at the start (8 bytes each).
const WORDS_MIN: usize = 256;
/// Words per entry of the cache at most.
const WORDS_PER_ENTRY_MAX: usize = 4;

/// The sketch.
pub(super) struct Sketch {
    /// 16 counters a word; row r of a key is one of the counters 4r..4r+4 of some word.
    words: Vec<u64>,
    /// Keys with a count above zero, about.
    distinct: u64,
    /// Sum of the counts of those, about.
    sum: u64,
}

impl Default for Sketch {
    fn default() -> Self {
        Sketch { words: vec![0; WORDS_MIN], distinct: 0, sum: 0 }
    }
}

impl Sketch {
    /// Times the key was counted, halvings included; may be too high, 15 at most.
    pub(super) fn estimate(&self, hash: u32) -> u64 {
        let spread = spread(hash);
        (0..ROWS).map(|r| self.count(self.place(spread, r))).min().unwrap_or(0)
    }

    /// Counts a request. `entries` is how many entries the cache holds now: it bounds the memory taken.
    pub(super) fn increment(&mut self, hash: u32, entries: usize) {
        let spread = spread(hash);
        let before = self.estimate(hash);
        if before < COUNT_MAX {
            // Conservative update: counters that are above the minimum already count for someone else.
            for r in 0..ROWS {
                let (word, shift) = self.place(spread, r);
                if self.count((word, shift)) == before {
                    self.words[word] += 1 << shift;
                }
            }
            self.sum += 1;
            self.distinct += (before == 0) as u64;
        }
        let row = self.words.len() as u64 * PER_ROW;
        if self.distinct > row / 2 && self.words.len() < entries.saturating_mul(WORDS_PER_ENTRY_MAX) / 2 {
            // A key's place in the larger table has the same counters in both copies, so no estimate changes.
            self.words.extend_from_within(..);
        } else if self.sum >= MEAN_MAX * self.distinct.max(64) || self.distinct >= row {
            self.halve();
        }
    }

    /// Bytes taken.
    #[cfg(test)]
    pub(super) fn memory_bytes(&self) -> usize {
        self.words.capacity() * size_of::<u64>()
    }

    fn halve(&mut self) {
        let (mut before, mut after) = (0, 0);
        for w in &mut self.words {
            before += nonzero(*w);
            *w = *w >> 1 & 0x7777_7777_7777_7777;
            after += nonzero(*w);
        }
        self.distinct = self.distinct * after / before.max(1);
        self.sum /= 2;
    }

    /// Word and bit position of row `row`'s counter.
    fn place(&self, spread: u64, row: u32) -> (usize, u32) {
        let step = (spread >> 32) | 1;
        let at = spread.wrapping_add(step.wrapping_mul(row as u64 + 1));
        let word = at as usize & (self.words.len() - 1);
        let column = (spread >> (54 + 2 * row)) as u32 & 3;
        (word, 4 * (4 * row + column))
    }

    fn count(&self, (word, shift): (usize, u32)) -> u64 {
        self.words[word] >> shift & COUNT_MAX
    }
}

/// Counters of a word that are not zero.
fn nonzero(word: u64) -> u64 {
    let any = (word | word >> 1 | word >> 2 | word >> 3) & 0x1111_1111_1111_1111;
    any.count_ones() as u64
}

/// 64 well-mixed bits (the finalizer of SplitMix64).
fn spread(hash: u32) -> u64 {
    let mut x = (hash as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_close_and_never_too_low_until_halved() {
        let mut s = Sketch::default();
        for _ in 0..2 {
            (0..400).for_each(|k| s.increment(k, 1000));
        }
        let exact = (0..400).filter(|k| s.estimate(*k) == 2).count();
        assert!((0..400).all(|k| s.estimate(k) >= 2));
        assert!(exact > 390, "{exact} of 400 exact");
        (0..400).for_each(|k| s.increment(k, 1000));
        assert!((0..400).all(|k| (1..=2).contains(&s.estimate(k))), "halved when the mean reached {MEAN_MAX}");
    }

    #[test]
    fn growing_changes_no_estimate() {
        let mut s = Sketch::default();
        (0..500).for_each(|k| s.increment(k, 1 << 20));
        let (words, before) = (s.words.len(), (0..500).map(|k| s.estimate(k)).collect::<Vec<_>>());
        let mut next = 1000;
        while s.words.len() == words {
            s.increment(next, 1 << 20);
            next += 1;
        }
        assert!((0..500).zip(before).all(|(k, b)| s.estimate(k) >= b));
        assert!(next < 2000, "grew late: {next}");
    }

    #[test]
    fn one_hit_keys_neither_fill_it_nor_make_it_grow_past_its_bound() {
        let mut s = Sketch::default();
        (0..200_000).for_each(|k| s.increment(k, 1024));
        assert!(s.memory_bytes() <= 1024 * WORDS_PER_ENTRY_MAX * 8, "{}", s.memory_bytes());
        let high = (200_000..210_000).filter(|k| s.estimate(*k) > 1).count();
        assert!(high < 1000, "{high} of 10000 unknown keys look known");
    }
}
