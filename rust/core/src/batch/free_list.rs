//! Free list of consecutive units: arena rows in units of 16, decode rows in units of one.

use std::collections::BTreeMap;

use super::max_tree::MaxTree;

/// Consecutive units that share an entry of the tree of longest runs.
const GROUP: usize = 64;

/// Consecutive units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First unit.
    pub start: usize,
    /// Number of units, at least 1.
    pub len: usize,
}

/// Free units out of `0..size`. Adjacent free runs are merged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FreeList {
    /// Length of each free run by its start. No two runs touch.
    runs: BTreeMap<usize, usize>,
    /// Longest free run that starts in each group, so that the search for a run does not visit shorter ones.
    longest: MaxTree,
    /// Number of free units.
    count: usize,
}

impl FreeList {
    /// Free list in which all of `size` units are free.
    #[must_use]
    pub fn new(size: usize) -> Self {
        let mut list = Self {
            runs: BTreeMap::new(),
            longest: MaxTree::new(size.div_ceil(GROUP)),
            count: 0,
        };
        list.free(Run { start: 0, len: size });
        list
    }

    /// Number of free units.
    #[must_use]
    pub fn num_free(&self) -> usize {
        self.count
    }

    /// Allocates `len` consecutive units at the start of the lowest free run that is long enough.
    pub fn allocate_low(&mut self, len: usize) -> Option<Run> {
        let group = self.longest.first_at_least(len as u64)?;
        let (&start, &found) = self.runs.range(group * GROUP..).find(|(_, found)| **found >= len)?;
        self.cut(start, found, Run { start, len });
        Some(Run { start, len })
    }

    /// Allocates `len` consecutive units at the end of the highest free run that is long enough.
    pub fn allocate_high_run(&mut self, len: usize) -> Option<Run> {
        let end = (self.longest.last_at_least(len as u64)? + 1) * GROUP;
        let (&start, &found) = self.runs.range(..end).rev().find(|(_, found)| **found >= len)?;
        let run = Run {
            start: start + found - len,
            len,
        };
        self.cut(start, found, run);
        Some(run)
    }

    /// Allocates `len` units from the top, highest first.
    ///
    /// The units are the end of the highest free run that is long enough. If no run is, they are the highest free
    /// units.
    pub fn allocate_high(&mut self, len: usize) -> Option<Vec<Run>> {
        if len == 0 || self.count < len {
            return None;
        }
        if let Some(run) = self.allocate_high_run(len) {
            return Some(vec![run]);
        }
        let mut runs = Vec::new();
        let mut missing = len;
        while missing > 0 {
            let (start, found) = self.runs.last_key_value().map(|(start, found)| (*start, *found))?;
            let len = found.min(missing);
            let run = Run {
                start: start + found - len,
                len,
            };
            self.cut(start, found, run);
            runs.push(run);
            missing -= len;
        }
        Some(runs)
    }

    /// Allocates `len` units in at most `max_runs` runs, all but the last of which are multiples of `multiple` units.
    ///
    /// The units are the end of the highest free run that is long enough. If no run is, they are the ends of the fewest
    /// free runs that suffice, the longest ones. The one with the largest remainder comes last. No other choice holds
    /// more, because a run that is shorter by a multiple loses at least as much as any remainder gains.
    pub fn allocate_few(&mut self, len: usize, multiple: usize, max_runs: usize) -> Option<Vec<Run>> {
        if len == 0 || self.count < len {
            return None;
        }
        if let Some(run) = self.allocate_high_run(len) {
            return Some(vec![run]);
        }
        let mut longest: Vec<(usize, usize)> = self.runs.iter().map(|(start, found)| (*found, *start)).collect();
        longest.sort_unstable_by(|a, b| b.cmp(a));
        let remainder = |(found, _): &(usize, usize)| found % multiple;
        let holds_len = |runs: &&[(usize, usize)]| {
            let whole: usize = runs.iter().map(|run| run.0 - remainder(run)).sum();
            whole + runs.iter().map(remainder).max().unwrap_or(0) >= len
        };
        let counts = 1..=longest.len().min(max_runs);
        let mut chosen = counts.map(|count| &longest[..count]).find(holds_len)?.to_vec();
        chosen.sort_by_key(remainder);
        let mut missing = len;
        let runs = chosen.into_iter().map(|(found, start)| {
            let len = if found < missing {
                found - found % multiple
            } else {
                missing
            };
            missing -= len;
            let run = Run {
                start: start + found - len,
                len,
            };
            self.cut(start, found, run);
            run
        });
        Some(runs.collect())
    }

    /// Allocates exactly `run`. Returns false and allocates nothing unless all of its units are free.
    pub fn allocate_exact(&mut self, run: Run) -> bool {
        let Some((&start, &found)) = self.runs.range(..=run.start).next_back() else {
            return false;
        };
        let fits = run.start + run.len <= start + found;
        if fits {
            self.cut(start, found, run);
        }
        fits
    }

    /// Frees a run that was allocated.
    pub fn free(&mut self, run: Run) {
        if run.len == 0 {
            return;
        }
        self.count += run.len;
        let mut merged = run;
        if let Some((&start, &len)) = self.runs.range(..run.start).next_back()
            && start + len == run.start
        {
            self.remove(start);
            merged = Run {
                start,
                len: len + run.len,
            };
        }
        merged.len += self.remove(run.start + run.len);
        self.insert(merged.start, merged.len);
    }

    /// Cuts `run` out of the free run of length `found` at `start`.
    fn cut(&mut self, start: usize, found: usize, run: Run) {
        self.count -= run.len;
        self.remove(start);
        if run.start > start {
            self.insert(start, run.start - start);
        }
        let end = run.start + run.len;
        if start + found > end {
            self.insert(end, start + found - end);
        }
    }

    fn insert(&mut self, start: usize, len: usize) {
        self.runs.insert(start, len);
        self.update_longest(start / GROUP);
    }

    /// Removes the free run that starts at `start` and returns its length, 0 if there is none.
    fn remove(&mut self, start: usize) -> usize {
        let len = self.runs.remove(&start).unwrap_or(0);
        if len > 0 {
            self.update_longest(start / GROUP);
        }
        len
    }

    fn update_longest(&mut self, group: usize) {
        let runs = self.runs.range(group * GROUP..(group + 1) * GROUP);
        self.longest
            .set(group, runs.map(|(_, len)| *len).max().unwrap_or(0) as u64);
    }
}
