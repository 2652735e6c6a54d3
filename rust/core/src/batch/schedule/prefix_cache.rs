//! Prefixes and which of them lie in the arena.

use std::collections::BTreeSet;

use rustc_hash::FxHashMap;

use super::super::block_tables::Block;
use super::super::free_list::{Run, Slots};
use super::super::int32::int;
use super::UNIT;
use super::placement::{Placement, Trial};
use crate::error::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Absent,
    Loading(Run),
    Ready(Run),
}

#[derive(Debug)]
struct Prefix {
    rows: usize,
    pos_start: usize,
    slides: bool,
    /// Which set of layers it lies in.
    set: usize,
    /// Requests that use it, queued or running.
    holders: usize,
    /// Running requests that use it: it cannot be evicted.
    pins: usize,
    /// Evicted only when nothing else is left to evict.
    kept: bool,
    place: Place,
    used: u64,
}

impl Prefix {
    /// Its place among those that can be evicted, the first one first.
    fn turn(&self) -> (bool, u64) {
        (self.kept, self.used)
    }

    fn units(&self) -> usize {
        self.rows.div_ceil(UNIT)
    }
}

/// All registered prefixes.
#[derive(Debug, Default)]
pub(super) struct Residency {
    prefixes: FxHashMap<i64, Prefix>,
    /// Ready and not pinned, least recently used first.
    idle: BTreeSet<((bool, u64), i64)>,
    idle_units: usize,
    /// Units of all that lie in the arena or are on their way.
    held: usize,
    clock: u64,
}

impl Residency {
    /// Refuses a number that is taken.
    pub(super) fn check_new(&self, prefix: i64) -> Result<()> {
        if self.prefixes.contains_key(&prefix) {
            return Err(Error::Config(format!(
                "prefix {prefix} is already registered: expected a new number; forget the old one first"
            )));
        }
        Ok(())
    }

    pub(super) fn register(&mut self, prefix: i64, rows: usize, pos_start: usize, (slides, set): (bool, usize)) {
        let entry = Prefix {
            rows,
            pos_start,
            slides,
            set,
            holders: 0,
            pins: 0,
            kept: false,
            place: Place::Absent,
            used: 0,
        };
        self.prefixes.insert(prefix, entry);
    }

    /// Returns its set of layers.
    pub(super) fn forget(&mut self, prefix: i64, arena: &mut Slots) -> Result<usize> {
        let entry = self.prefixes.get(&prefix).ok_or(Error::UnknownPrefix(prefix))?;
        if entry.holders > 0 {
            return Err(Error::State(format!(
                "prefix {prefix} is in use by {} requests: expected none; finish or cancel them first",
                entry.holders
            )));
        }
        if matches!(entry.place, Place::Loading(_)) {
            return Err(Error::State(format!(
                "prefix {prefix} is being loaded: expected it at rest; call prefix_ready first"
            )));
        }
        let set = entry.set;
        self.evict(prefix, arena);
        self.prefixes.remove(&prefix);
        Ok(set)
    }

    pub(super) fn ready(&mut self, prefix: i64) -> Result<()> {
        let entry = self.prefixes.get_mut(&prefix).ok_or(Error::UnknownPrefix(prefix))?;
        let Place::Loading(run) = entry.place else {
            return Err(Error::State(format!(
                "prefix {prefix} is not being loaded: expected a prefix of a step's loads, once"
            )));
        };
        entry.place = Place::Ready(run);
        if entry.pins == 0 {
            self.idle.insert((entry.turn(), prefix));
            self.idle_units += run.len;
        }
        Ok(())
    }

    /// Arena units of these prefixes, each counted once.
    pub(super) fn units_of(&self, prefixes: &[i64]) -> Result<usize> {
        let mut units = 0;
        for (at, prefix) in prefixes.iter().enumerate() {
            let entry = self.prefixes.get(prefix).ok_or(Error::UnknownPrefix(*prefix))?;
            if !prefixes[..at].contains(prefix) {
                units += entry.units();
            }
        }
        Ok(units)
    }

    /// Rows of these prefixes, counted as often as they are used.
    pub(super) fn rows_of(&self, prefixes: &[i64]) -> usize {
        prefixes
            .iter()
            .filter_map(|prefix| self.prefixes.get(prefix))
            .map(|entry| entry.rows)
            .sum()
    }

    /// A request joins the queue.
    pub(super) fn hold(&mut self, prefixes: &[i64]) {
        self.each(prefixes, |entry| entry.holders += 1);
    }

    /// A request ends.
    pub(super) fn unhold(&mut self, prefixes: &[i64]) {
        self.each(prefixes, |entry| entry.holders -= 1);
    }

    fn each(&mut self, prefixes: &[i64], change: impl Fn(&mut Prefix)) {
        for prefix in prefixes {
            if let Some(entry) = self.prefixes.get_mut(prefix) {
                change(entry);
            }
        }
    }

    /// A request is admitted.
    pub(super) fn pin(&mut self, prefixes: &[i64]) {
        for prefix in prefixes {
            let Some(entry) = self.prefixes.get_mut(prefix) else {
                continue;
            };
            entry.pins += 1;
            if let Place::Ready(run) = entry.place
                && self.idle.remove(&(entry.turn(), *prefix))
            {
                self.idle_units -= run.len;
            }
        }
    }

    /// An admitted request ends.
    pub(super) fn unpin(&mut self, prefixes: &[i64]) {
        self.clock += 1;
        for prefix in prefixes {
            let Some(entry) = self.prefixes.get_mut(prefix) else {
                continue;
            };
            entry.pins -= 1;
            if entry.pins > 0 {
                continue;
            }
            entry.used = self.clock;
            if let Place::Ready(run) = entry.place {
                self.idle.insert((entry.turn(), *prefix));
                self.idle_units += run.len;
            }
        }
    }

    /// Whether all of these can be read now.
    pub(super) fn are_ready(&self, prefixes: &[i64]) -> bool {
        let ready = |entry: &Prefix| entry.rows == 0 || matches!(entry.place, Place::Ready(_));
        prefixes
            .iter()
            .all(|prefix| self.prefixes.get(prefix).is_some_and(ready))
    }

    /// Blocks of resident prefixes and the position of the first token after them.
    pub(super) fn blocks(&self, prefixes: &[i64]) -> (Vec<Block>, i32) {
        let (mut blocks, mut pos_start) = (Vec::new(), 0);
        for prefix in prefixes {
            let Some(entry) = self.prefixes.get(prefix) else {
                continue;
            };
            pos_start = pos_start.max(int(entry.pos_start));
            if let Place::Loading(run) | Place::Ready(run) = entry.place {
                let (first, rows) = (int(run.start * UNIT), int(entry.rows));
                blocks.push(Block {
                    prefix: *prefix,
                    first,
                    rows,
                    slides: i32::from(entry.slides),
                    set: entry.set,
                });
            }
        }
        (blocks, pos_start)
    }

    /// Makes room for what is missing of `prefixes` and for `slots` units, evicting idle prefixes where it must. With `own` every idle
    /// prefix goes, also those of the request itself: then nothing but loads under way is in the way. Prefixes together hold at most
    /// `budget` units. Changes nothing if room is short.
    pub(super) fn place(
        &mut self,
        prefixes: &[i64],
        slots: usize,
        own: bool,
        (arena, budget): (&mut Slots, usize),
    ) -> Option<Placement> {
        let missing = self.missing(prefixes, own);
        let added: usize = missing.iter().map(|(_, units)| units).sum();
        if slots + added > arena.free() + self.idle_units {
            return None;
        }
        let victims = self.idle.iter().filter_map(|(_, prefix)| {
            let spared = !own && prefixes.contains(prefix);
            self.run_of(*prefix).filter(|_| !spared).map(|run| (*prefix, run))
        });
        let mut trial = Trial::new(arena, victims);
        while (own || self.held + added > budget + trial.evicted_units()) && trial.evict_next() {}
        let fits = self.held + added <= budget + trial.evicted_units();
        let Some(placement) = fits.then(|| trial.place(&missing, slots)).flatten() else {
            trial.undo();
            return None;
        };
        for prefix in &placement.evictions {
            if let Some(entry) = self.prefixes.get_mut(prefix)
                && let Place::Ready(run) = std::mem::replace(&mut entry.place, Place::Absent)
                && self.idle.remove(&(entry.turn(), *prefix))
            {
                self.idle_units -= run.len;
                self.held -= run.len;
            }
        }
        for (prefix, run) in &placement.loads {
            if let Some(entry) = self.prefixes.get_mut(prefix) {
                entry.place = Place::Loading(*run);
                self.held += run.len;
            }
        }
        Some(placement)
    }

    /// Prefixes to load, each once, and their units.
    fn missing(&self, prefixes: &[i64], own: bool) -> Vec<(i64, usize)> {
        let mut missing: Vec<(i64, usize)> = Vec::new();
        for prefix in prefixes {
            let Some(entry) = self.prefixes.get(prefix) else {
                continue;
            };
            let absent = entry.place == Place::Absent || own && matches!(entry.place, Place::Ready(_));
            if absent && entry.rows > 0 && !missing.iter().any(|(other, _)| other == prefix) {
                missing.push((*prefix, entry.units()));
            }
        }
        missing
    }

    fn run_of(&self, prefix: i64) -> Option<Run> {
        match self.prefixes.get(&prefix)?.place {
            Place::Ready(run) => Some(run),
            Place::Absent | Place::Loading(_) => None,
        }
    }

    /// Evicts a prefix last, or as any other again.
    pub(super) fn keep(&mut self, prefix: i64, kept: bool) -> Result<()> {
        let entry = self.prefixes.get_mut(&prefix).ok_or(Error::UnknownPrefix(prefix))?;
        let idle = self.idle.remove(&(entry.turn(), prefix));
        entry.kept = kept;
        if idle {
            self.idle.insert((entry.turn(), prefix));
        }
        Ok(())
    }

    /// The first unit of a prefix in the arena or on its way there, and how many requests use it.
    pub(super) fn state(&self, prefix: i64) -> Result<(Option<usize>, usize)> {
        let entry = self.prefixes.get(&prefix).ok_or(Error::UnknownPrefix(prefix))?;
        let start = match entry.place {
            Place::Absent => None,
            Place::Loading(run) | Place::Ready(run) => Some(run.start),
        };
        Ok((start, entry.holders))
    }

    /// Whether a prefix lies in the arena and no running request reads it.
    pub(super) fn is_idle(&self, prefix: i64) -> bool {
        self.prefixes
            .get(&prefix)
            .is_some_and(|entry| self.idle.contains(&(entry.turn(), prefix)))
    }

    pub(super) fn evict(&mut self, prefix: i64, arena: &mut Slots) {
        let Some(entry) = self.prefixes.get_mut(&prefix) else {
            return;
        };
        if let Place::Ready(run) = entry.place {
            entry.place = Place::Absent;
            self.held -= run.len;
            arena.give(run);
            if self.idle.remove(&(entry.turn(), prefix)) {
                self.idle_units -= run.len;
            }
        }
    }
}
