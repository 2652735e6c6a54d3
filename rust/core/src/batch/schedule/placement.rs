//! Placing a request's prefixes and slots, all or nothing.

use super::super::free_list::{Run, Slots};

/// What placing some prefixes and slots took.
#[derive(Debug, Default)]
pub(super) struct Placement {
    pub(super) loads: Vec<(i64, Run)>,
    pub(super) evictions: Vec<i64>,
    pub(super) slots: Vec<Run>,
}

/// An attempt to place something, which can be undone.
pub(super) struct Trial<'a, V> {
    arena: &'a mut Slots,
    victims: V,
    evicted: Vec<(i64, Run)>,
    taken: Vec<Run>,
}

impl<'a, V: Iterator<Item = (i64, Run)>> Trial<'a, V> {
    pub(super) fn new(arena: &'a mut Slots, victims: V) -> Self {
        Self {
            arena,
            victims,
            evicted: Vec::new(),
            taken: Vec::new(),
        }
    }

    /// Takes a block for each of `missing` (prefix, units), then `slots` units.
    pub(super) fn place(&mut self, missing: &[(i64, usize)], slots: usize) -> Option<Placement> {
        let mut loads = Vec::with_capacity(missing.len());
        for (prefix, units) in missing {
            let runs = self.take(|arena| arena.take_low(*units).map(|run| vec![run]))?;
            loads.extend(runs.first().map(|run| (*prefix, *run)));
        }
        let slots = match slots {
            0 => Vec::new(),
            _ => self.take(|arena| arena.take_high(slots))?,
        };
        let evictions = self.evicted.iter().map(|(prefix, _)| *prefix).collect();
        Some(Placement {
            loads,
            evictions,
            slots,
        })
    }

    fn take(&mut self, get: impl Fn(&mut Slots) -> Option<Vec<Run>>) -> Option<Vec<Run>> {
        loop {
            if let Some(runs) = get(self.arena) {
                self.taken.extend(&runs);
                return Some(runs);
            }
            if !self.evict_next() {
                return None;
            }
        }
    }

    pub(super) fn evict_next(&mut self) -> bool {
        let Some(victim) = self.victims.next() else {
            return false;
        };
        self.arena.give(victim.1);
        self.evicted.push(victim);
        true
    }

    pub(super) fn evicted_units(&self) -> usize {
        self.evicted.iter().map(|(_, run)| run.len).sum()
    }

    pub(super) fn undo(self) {
        for run in self.taken {
            self.arena.give(run);
        }
        for (_, run) in self.evicted {
            self.arena.take(run);
        }
    }
}
