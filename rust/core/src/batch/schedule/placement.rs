//! Placement of a request's prefixes and slots in the arena. It succeeds as a whole or changes nothing.

use super::super::free_list::{FreeList, Run};
use super::UNIT;
use super::prefix_cache::{Location, PrefixCache};
use crate::attend::CHUNK_KEYS;

/// Largest number of runs of a request's encoder rows. Each is a block in the tables of cross-attention.
///
/// Random requests in small arenas need 2.8 % more steps with 4 runs than with any number of runs of any size. With one
/// run they need 14.5 % more.
pub(super) const MAX_ENCODER_RUNS: usize = 4;
/// Multiple of the arena units of a run of encoder rows that is not the last one. Decode attention rounds between
/// chunks of keys, so that runs of whole chunks give the same bits as a single run.
const ENCODER_RUN_MULTIPLE: usize = CHUNK_KEYS / UNIT;

/// Prefixes and slots to place.
#[derive(Debug, Clone, Copy)]
pub(super) struct PlacementRequest<'a> {
    pub(super) prefixes: &'a [i64],
    /// Number of arena units for the request's tokens.
    pub(super) slot_units: usize,
    /// Number of arena units for the request's encoder rows.
    pub(super) encoder_units: usize,
    /// Whether to evict every evictable prefix, including those of the request itself. Then only prefixes that are
    /// being loaded can be in the way.
    pub(super) evict_all: bool,
}

/// Result of a placement.
#[derive(Debug, Default)]
pub(super) struct Placement {
    /// Prefixes to load, and their arena units.
    pub(super) loads: Vec<(i64, Run)>,
    /// Evicted prefixes.
    pub(super) evictions: Vec<i64>,
    /// Arena units for the request's tokens.
    pub(super) slot_units: Vec<Run>,
    /// Arena units for the request's encoder rows.
    pub(super) encoder_runs: Vec<Run>,
}

impl PrefixCache {
    /// Makes room for the missing prefixes and the slots of a request, evicting prefixes where necessary.
    ///
    /// Returns `None` and changes nothing if the arena has too little room, or if all prefixes together would occupy
    /// more than `prefix_budget` units.
    pub(super) fn place(
        &mut self,
        request: PlacementRequest<'_>,
        arena: &mut FreeList,
        prefix_budget: usize,
    ) -> Option<Placement> {
        let PlacementRequest {
            prefixes,
            slot_units,
            encoder_units,
            evict_all,
        } = request;
        let missing = self.missing(prefixes, evict_all);
        let added: usize = missing.iter().map(|(_, units)| units).sum();
        let evictable = self.evictable_units
            - if evict_all {
                0
            } else {
                self.own_evictable_units(prefixes)
            };
        if slot_units + encoder_units + added > arena.num_free() + evictable
            || self.used_units + added > prefix_budget + evictable
        {
            return None;
        }
        let candidates = self.evictable.iter().filter_map(|(_, prefix)| {
            let spared = !evict_all && prefixes.contains(prefix);
            self.ready_run(*prefix).filter(|_| !spared).map(|run| (*prefix, run))
        });
        let mut attempt = Attempt::new(arena, candidates);
        while (evict_all || self.used_units + added > prefix_budget + attempt.evicted_units()) && attempt.evict_next() {
        }
        let is_within_budget = self.used_units + added <= prefix_budget + attempt.evicted_units();
        let Some(placement) = is_within_budget
            .then(|| attempt.allocate(&missing, encoder_units, slot_units))
            .flatten()
        else {
            attempt.undo();
            return None;
        };
        for prefix in &placement.evictions {
            if let Some(entry) = self.prefixes.get_mut(prefix)
                && let Location::Ready(run) = std::mem::replace(&mut entry.location, Location::Absent)
                && self.evictable.remove(&(entry.eviction_key(), *prefix))
            {
                self.evictable_units -= run.len;
                self.used_units -= run.len;
            }
        }
        for (prefix, run) in &placement.loads {
            if let Some(entry) = self.prefixes.get_mut(prefix) {
                entry.location = Location::Loading(*run);
                self.used_units += run.len;
            }
        }
        Some(placement)
    }

    /// Prefixes to load, each once, and their units. With `evict_all` a prefix in the arena is evicted and loaded
    /// again.
    fn missing(&self, prefixes: &[i64], evict_all: bool) -> Vec<(i64, usize)> {
        let mut missing: Vec<(i64, usize)> = Vec::new();
        for prefix in prefixes {
            let Some(entry) = self.prefixes.get(prefix) else {
                continue;
            };
            let is_missing =
                entry.location == Location::Absent || evict_all && matches!(entry.location, Location::Ready(_));
            if is_missing && entry.rows > 0 && !missing.iter().any(|(other, _)| other == prefix) {
                missing.push((*prefix, entry.num_units()));
            }
        }
        missing
    }

    /// Units of those of a request's prefixes that are evictable.
    fn own_evictable_units(&self, prefixes: &[i64]) -> usize {
        let own = prefixes
            .iter()
            .enumerate()
            .filter(|(at, prefix)| !prefixes[..*at].contains(prefix));
        own.filter(|(_, prefix)| self.is_evictable(**prefix))
            .filter_map(|(_, prefix)| self.ready_run(*prefix))
            .map(|run| run.len)
            .sum()
    }

    fn ready_run(&self, prefix: i64) -> Option<Run> {
        match self.prefixes.get(&prefix)?.location {
            Location::Ready(run) => Some(run),
            Location::Absent | Location::Loading(_) => None,
        }
    }
}

/// Allocations and evictions in the arena that can be undone.
struct Attempt<'a, C> {
    arena: &'a mut FreeList,
    /// Prefixes that may be evicted, in the order of eviction.
    candidates: C,
    evicted: Vec<(i64, Run)>,
    allocated: Vec<Run>,
}

impl<'a, C: Iterator<Item = (i64, Run)>> Attempt<'a, C> {
    fn new(arena: &'a mut FreeList, candidates: C) -> Self {
        Self {
            arena,
            candidates,
            evicted: Vec::new(),
            allocated: Vec::new(),
        }
    }

    /// Allocates one run for each of `missing` (prefix, units), then `encoder_units` units in few runs, then
    /// `slot_units` units in any number of runs.
    ///
    /// Encoder rows come from the top, as slots do, so that the room for prefixes stays whole.
    fn allocate(&mut self, missing: &[(i64, usize)], encoder_units: usize, slot_units: usize) -> Option<Placement> {
        let mut loads = Vec::with_capacity(missing.len());
        for (prefix, units) in missing {
            let runs = self.evict_until(|arena| arena.allocate_low(*units).map(|run| vec![run]))?;
            loads.extend(runs.first().map(|run| (*prefix, *run)));
        }
        let encoder_runs = match encoder_units {
            0 => Vec::new(),
            _ => self.evict_until(|arena| arena.allocate_few(encoder_units, ENCODER_RUN_MULTIPLE, MAX_ENCODER_RUNS))?,
        };
        let slot_units = match slot_units {
            0 => Vec::new(),
            _ => self.evict_until(|arena| arena.allocate_high(slot_units))?,
        };
        let evictions = self.evicted.iter().map(|(prefix, _)| *prefix).collect();
        Some(Placement {
            loads,
            evictions,
            slot_units,
            encoder_runs,
        })
    }

    /// Evicts candidates until `allocate` succeeds.
    fn evict_until(&mut self, allocate: impl Fn(&mut FreeList) -> Option<Vec<Run>>) -> Option<Vec<Run>> {
        loop {
            if let Some(runs) = allocate(self.arena) {
                self.allocated.extend(&runs);
                return Some(runs);
            }
            if !self.evict_next() {
                return None;
            }
        }
    }

    fn evict_next(&mut self) -> bool {
        let Some(candidate) = self.candidates.next() else {
            return false;
        };
        self.arena.free(candidate.1);
        self.evicted.push(candidate);
        true
    }

    fn evicted_units(&self) -> usize {
        self.evicted.iter().map(|(_, run)| run.len).sum()
    }

    fn undo(self) {
        for run in self.allocated {
            self.arena.free(run);
        }
        for (_, run) in self.evicted {
            self.arena.allocate_exact(run);
        }
    }
}
