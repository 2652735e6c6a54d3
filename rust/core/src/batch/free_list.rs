//! Free space as runs of units: arena rows by sixteens, decode rows by ones.

use std::collections::BTreeMap;

/// Consecutive units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First unit.
    pub start: usize,
    /// Number of units, at least 1.
    pub len: usize,
}

/// What is free of units `0..size`. Freed neighbours grow together again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slots {
    /// Start to length; no two runs touch.
    free: BTreeMap<usize, usize>,
    count: usize,
}

impl Slots {
    /// All of `size` units free.
    #[must_use]
    pub fn new(size: usize) -> Self {
        let mut slots = Self {
            free: BTreeMap::new(),
            count: 0,
        };
        slots.give(Run { start: 0, len: size });
        slots
    }

    /// Number of free units.
    #[must_use]
    pub fn free(&self) -> usize {
        self.count
    }

    /// Takes one run of `len` units, the lowest that has room.
    pub fn take_low(&mut self, len: usize) -> Option<Run> {
        let (&start, &found) = self.free.iter().find(|(_, found)| **found >= len)?;
        self.cut(start, found, Run { start, len });
        Some(Run { start, len })
    }

    /// Takes `len` units from the top: the end of the highest run that has room for all, else the highest runs there are. Highest first.
    pub fn take_high(&mut self, len: usize) -> Option<Vec<Run>> {
        if len == 0 || self.count < len {
            return None;
        }
        if let Some((&start, &found)) = self.free.iter().rev().find(|(_, found)| **found >= len) {
            let run = Run {
                start: start + found - len,
                len,
            };
            self.cut(start, found, run);
            return Some(vec![run]);
        }
        let mut runs = Vec::new();
        let mut missing = len;
        while missing > 0 {
            let (start, found) = self.free.last_key_value().map(|(start, found)| (*start, *found))?;
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

    /// Takes exactly this run; false, and nothing taken, unless all of it is free.
    pub fn take(&mut self, run: Run) -> bool {
        let Some((&start, &found)) = self.free.range(..=run.start).next_back() else {
            return false;
        };
        let fits = run.start + run.len <= start + found;
        if fits {
            self.cut(start, found, run);
        }
        fits
    }

    /// Gives a run back that was taken.
    pub fn give(&mut self, run: Run) {
        if run.len == 0 {
            return;
        }
        self.count += run.len;
        let mut grown = run;
        if let Some((&start, &len)) = self.free.range(..run.start).next_back()
            && start + len == run.start
        {
            self.free.remove(&start);
            grown = Run {
                start,
                len: len + run.len,
            };
        }
        if let Some(len) = self.free.remove(&(run.start + run.len)) {
            grown.len += len;
        }
        self.free.insert(grown.start, grown.len);
    }

    /// Cuts `run` out of the free run at `start`.
    fn cut(&mut self, start: usize, found: usize, run: Run) {
        self.count -= run.len;
        self.free.remove(&start);
        if run.start > start {
            self.free.insert(start, run.start - start);
        }
        let end = run.start + run.len;
        if start + found > end {
            self.free.insert(end, start + found - end);
        }
    }
}
