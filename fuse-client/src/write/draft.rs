//! What of a file is changed: a map of byte ranges over a base version. Pure; the bytes lie in `staging`.
//!
//! A byte of the file is *staged* if it lies in an extent, else it is the *base*'s if it lies before `base_len` (the shortest the file has been since that
//! version), else it is zero.

use std::collections::BTreeMap;
use std::ops::Range;

/// Where a range of a file comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    /// From the staging, at the same place.
    Staged(Range<u64>),
    /// From the base version, at the same place.
    Base(Range<u64>),
    /// Zeros.
    Zero(Range<u64>),
}

/// The map of one file.
#[derive(Debug, Clone, Default)]
pub(super) struct Draft {
    size: u64,
    base_len: u64,
    /// Start to end; they neither touch nor overlap.
    extents: BTreeMap<u64, u64>,
}

impl Draft {
    /// Nothing is changed of a base of `size` bytes.
    pub(super) fn new(size: u64) -> Draft {
        Draft { size, base_len: size, extents: BTreeMap::new() }
    }

    /// Length of the file.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of the base that still count.
    pub(super) fn base_len(&self) -> u64 {
        self.base_len
    }

    /// The base is another one now, of `size` bytes: no more of it counts than did.
    pub(super) fn rebase(&mut self, size: u64) {
        self.base_len = self.base_len.min(size);
    }

    /// What is staged: starts and ends, in order.
    pub(super) fn extents(&self) -> impl Iterator<Item = (u64, u64)> {
        self.extents.iter().map(|(start, end)| (*start, *end))
    }

    /// How far it is staged without a gap from its start.
    pub(super) fn staged_to(&self) -> u64 {
        self.extents.get(&0).copied().unwrap_or(0)
    }

    /// Bytes that staging `range` adds to those staged already.
    pub(super) fn growth(&self, range: &Range<u64>) -> u64 {
        let before = self.extents.range(..range.end).rev();
        let covered: u64 = before
            .take_while(|(_, end)| **end > range.start)
            .map(|(start, end)| (*end).min(range.end) - (*start).max(range.start))
            .sum();
        (range.end - range.start).saturating_sub(covered)
    }

    /// `range` is staged.
    pub(super) fn write(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let Range { mut start, mut end } = range;
        while let Some((s, e)) = self.extents.range(..=end).next_back().map(|(s, e)| (*s, *e)) {
            if e < start {
                break;
            }
            (start, end) = (start.min(s), end.max(e));
            self.extents.remove(&s);
        }
        self.extents.insert(start, end);
        self.size = self.size.max(end);
    }

    /// Cuts or extends the file. Bytes that are no longer staged.
    pub(super) fn truncate(&mut self, size: u64) -> u64 {
        let mut freed = 0;
        while let Some((start, end)) = self.extents.range(..).next_back().map(|(s, e)| (*s, *e)) {
            if end <= size {
                break;
            }
            freed += end - start.max(size);
            if start < size {
                self.extents.insert(start, size);
            } else {
                self.extents.remove(&start);
            }
        }
        self.size = size;
        self.base_len = self.base_len.min(size);
        freed
    }

    /// Does all of `range` come from the base?
    pub(super) fn is_base(&self, range: &Range<u64>) -> bool {
        range.end <= self.base_len && self.extents.range(..range.end).next_back().is_none_or(|(_, e)| *e <= range.start)
    }

    /// Does anything come from the base?
    pub(super) fn needs_base(&self) -> bool {
        self.base_len > 0 && self.pieces(0..self.base_len).iter().any(|p| matches!(p, Piece::Base(_)))
    }

    /// Where the bytes of `range`, cut at the end of the file, come from; in order.
    pub(super) fn pieces(&self, range: Range<u64>) -> Vec<Piece> {
        let end = range.end.min(self.size);
        let mut at = range.start;
        let mut out = Vec::new();
        if at >= end {
            return out;
        }
        let first = self.extents.range(..=at).next_back().map_or(at, |(s, _)| *s);
        for (&s, &e) in self.extents.range(first..end) {
            if e <= at {
                continue;
            }
            self.gap(at..s.min(end), &mut out);
            let from = s.max(at);
            at = e.min(end);
            out.push(Piece::Staged(from..at));
        }
        self.gap(at..end, &mut out);
        out
    }

    fn gap(&self, range: Range<u64>, out: &mut Vec<Piece>) {
        if range.start >= range.end {
            return;
        }
        let base = range.end.min(self.base_len);
        if range.start < base {
            out.push(Piece::Base(range.start..base));
        }
        if range.start.max(base) < range.end {
            out.push(Piece::Zero(range.start.max(base)..range.end));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Op {
        Write(u64, u64),
        Truncate(u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![3 => (0u64..60, 1u64..20).prop_map(|(at, n)| Op::Write(at, n)), 1 => (0u64..80).prop_map(Op::Truncate)]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Against a vector that says of each byte where it comes from.
        #[test]
        fn the_map_is_that_of_a_vector(base in 0u64..50, ops in vec(op(), 0..25), from in 0u64..90, len in 0u64..90) {
            let mut model = vec!['b'; base as usize];
            let mut draft = Draft::new(base);
            let mut staged = 0u64;
            for op in ops {
                match op {
                    Op::Write(at, n) => {
                        staged += draft.growth(&(at..at + n));
                        draft.write(at..at + n);
                        let end = (at + n) as usize;
                        model.resize(model.len().max(end), '0');
                        model[at as usize..end].fill('s');
                    }
                    Op::Truncate(size) => {
                        staged -= draft.truncate(size);
                        model.resize(size as usize, '0');
                    }
                }
                prop_assert_eq!(draft.size(), model.len() as u64);
                prop_assert_eq!(staged, model.iter().filter(|c| **c == 's').count() as u64);
            }
            let mut shown = Vec::new();
            for piece in draft.pieces(from..from + len) {
                let (c, r) = match piece {
                    Piece::Staged(r) => ('s', r),
                    Piece::Base(r) => ('b', r),
                    Piece::Zero(r) => ('0', r),
                };
                prop_assert_eq!(r.start, from + shown.len() as u64);
                prop_assert!(r.start < r.end);
                shown.extend(std::iter::repeat_n(c, (r.end - r.start) as usize));
            }
            let end = ((from + len) as usize).min(model.len());
            let wanted = model.get(from as usize..end).unwrap_or(&[]);
            prop_assert_eq!(&shown[..], wanted);
            if end as u64 == from + len && len > 0 {
                prop_assert_eq!(draft.is_base(&(from..from + len)), wanted.iter().all(|c| *c == 'b'));
            }
            prop_assert_eq!(draft.needs_base(), model.contains(&'b'));
        }
    }
}
