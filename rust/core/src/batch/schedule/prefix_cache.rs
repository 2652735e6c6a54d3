//! Prefix cache: the registered prefixes, and which of them are in the arena.

use std::collections::BTreeSet;
use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::super::block_tables::PrefixBlock;
use super::super::free_list::{FreeList, Run};
use super::super::int32::to_i32;
use super::super::place::{Place, Positions};
use super::UNIT;
use super::sites::{BySite, SITES, SiteBlocks, SiteRows};
use crate::error::{Error, Result};

/// Location of a prefix in the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Location {
    Absent,
    Loading(Run),
    Ready(Run),
}

/// Eviction order: unpinned before pinned prefixes, and least recently used first.
type EvictionKey = (bool, u64);

/// Place of a running request among the rows of a batch, by its prefixes from left to right.
pub(super) type SortKey = Arc<[u64]>;

/// A registered prefix.
#[derive(Debug)]
pub(super) struct CachedPrefix {
    /// Number of arena rows, those of all sites together.
    pub(super) rows: usize,
    pos_start: usize,
    slides: bool,
    place: Place,
    sites: BySite<SiteRows>,
    /// Number of queued and running requests that use it.
    num_requests: usize,
    /// Number of running requests that use it. While there are any, it cannot be evicted.
    num_running: usize,
    /// Sequence number of the first of these running requests.
    in_use_since: u64,
    /// Whether it is evicted only after all unpinned prefixes.
    pinned: bool,
    pub(super) location: Location,
    /// Cache clock when the last running request that used it ended.
    last_used: u64,
}

impl CachedPrefix {
    pub(super) fn eviction_key(&self) -> EvictionKey {
        (self.pinned, self.last_used)
    }

    pub(super) fn num_units(&self) -> usize {
        self.rows.div_ceil(UNIT)
    }
}

/// Description of a prefix at its registration.
#[derive(Debug, Clone)]
pub(super) struct PrefixSpec {
    pub(super) rows: usize,
    pub(super) pos_start: usize,
    pub(super) slides: bool,
    pub(super) place: Place,
    pub(super) sites: BySite<SiteRows>,
}

/// All registered prefixes.
#[derive(Debug, Default)]
pub(super) struct PrefixCache {
    pub(super) prefixes: FxHashMap<i64, CachedPrefix>,
    /// Prefixes that are ready and not used by a running request, in eviction order.
    pub(super) evictable: BTreeSet<(EvictionKey, i64)>,
    /// Arena units of the evictable prefixes.
    pub(super) evictable_units: usize,
    /// Arena units of all prefixes that are ready or being loaded.
    pub(super) used_units: usize,
    clock: u64,
}

impl PrefixCache {
    /// Refuses a prefix number that is already registered.
    pub(super) fn check_new(&self, prefix: i64) -> Result<()> {
        if self.prefixes.contains_key(&prefix) {
            return Err(Error::Config(format!(
                "prefix {prefix} is already registered: expected a new number; forget the old one first"
            )));
        }
        Ok(())
    }

    pub(super) fn register(&mut self, prefix: i64, spec: PrefixSpec) {
        let PrefixSpec {
            rows,
            pos_start,
            slides,
            place,
            sites,
        } = spec;
        let entry = CachedPrefix {
            rows,
            pos_start,
            slides,
            place,
            sites,
            num_requests: 0,
            num_running: 0,
            in_use_since: 0,
            pinned: false,
            location: Location::Absent,
            last_used: 0,
        };
        self.prefixes.insert(prefix, entry);
    }

    /// Forgets a prefix and returns its rows at each site.
    pub(super) fn forget(&mut self, prefix: i64, arena: &mut FreeList) -> Result<BySite<SiteRows>> {
        let entry = self.entry(prefix)?;
        if entry.num_requests > 0 {
            return Err(Error::State(format!(
                "prefix {prefix} is in use by {} requests: expected none; finish or cancel them first",
                entry.num_requests
            )));
        }
        if matches!(entry.location, Location::Loading(_)) {
            return Err(Error::State(format!(
                "prefix {prefix} is being loaded: expected a prefix whose load has ended; call prefix_ready first"
            )));
        }
        self.evict(prefix, arena);
        Ok(self
            .prefixes
            .remove(&prefix)
            .map(|entry| entry.sites)
            .unwrap_or_default())
    }

    /// Marks the load of a prefix as complete.
    pub(super) fn mark_ready(&mut self, prefix: i64) -> Result<()> {
        let entry = self.prefixes.get_mut(&prefix).ok_or(Error::UnknownPrefix(prefix))?;
        let Location::Loading(run) = entry.location else {
            return Err(Error::State(format!(
                "prefix {prefix} is not being loaded: expected a prefix of a step's loads, once"
            )));
        };
        entry.location = Location::Ready(run);
        if entry.num_running == 0 {
            self.evictable.insert((entry.eviction_key(), prefix));
            self.evictable_units += run.len;
        }
        Ok(())
    }

    fn entry(&self, prefix: i64) -> Result<&CachedPrefix> {
        self.prefixes.get(&prefix).ok_or(Error::UnknownPrefix(prefix))
    }

    /// Arena units that the prefixes need, each prefix counted once.
    pub(super) fn num_units(&self, prefixes: &[i64]) -> Result<usize> {
        let mut units = 0;
        for (at, prefix) in prefixes.iter().enumerate() {
            let entry = self.entry(*prefix)?;
            if !prefixes[..at].contains(prefix) {
                units += entry.num_units();
            }
        }
        Ok(units)
    }

    /// Rows of the prefixes at all sites, each prefix counted as often as it occurs.
    pub(super) fn total_rows(&self, prefixes: &[i64]) -> usize {
        prefixes
            .iter()
            .filter_map(|prefix| self.prefixes.get(prefix))
            .map(|entry| entry.rows)
            .sum()
    }

    /// Counts a queued request.
    pub(super) fn add_request(&mut self, prefixes: &[i64]) {
        self.update_each(prefixes, |entry| entry.num_requests += 1);
    }

    /// Removes an ended request from the counts.
    pub(super) fn remove_request(&mut self, prefixes: &[i64]) {
        self.update_each(prefixes, |entry| entry.num_requests -= 1);
    }

    /// Updates each of the prefixes once, even if a request composes a prefix with itself.
    fn update_each(&mut self, prefixes: &[i64], update: impl Fn(&mut CachedPrefix)) {
        for (at, prefix) in prefixes.iter().enumerate() {
            if !prefixes[..at].contains(prefix)
                && let Some(entry) = self.prefixes.get_mut(prefix)
            {
                update(entry);
            }
        }
    }

    /// Protects the prefixes of a request from eviction while it runs, and returns the request's sort key.
    ///
    /// Keys are equal for equal prefixes. They tell when the first running request began to use each prefix, so the
    /// order of the rows of a batch does not depend on requests that have ended, or on the numbers of prefixes.
    pub(super) fn start_running(&mut self, prefixes: &[i64]) -> SortKey {
        let mut key = Vec::with_capacity(prefixes.len());
        for prefix in prefixes {
            let Some(entry) = self.prefixes.get_mut(prefix) else {
                continue;
            };
            if entry.num_running == 0 {
                self.clock += 1;
                entry.in_use_since = self.clock;
            }
            key.push(entry.in_use_since);
            entry.num_running += 1;
            if let Location::Ready(run) = entry.location
                && self.evictable.remove(&(entry.eviction_key(), *prefix))
            {
                self.evictable_units -= run.len;
            }
        }
        key.into()
    }

    /// Ends the protection by [`PrefixCache::start_running`].
    pub(super) fn stop_running(&mut self, prefixes: &[i64]) {
        self.clock += 1;
        for prefix in prefixes {
            let Some(entry) = self.prefixes.get_mut(prefix) else {
                continue;
            };
            entry.num_running -= 1;
            if entry.num_running > 0 {
                continue;
            }
            entry.last_used = self.clock;
            if let Location::Ready(run) = entry.location {
                self.evictable.insert((entry.eviction_key(), *prefix));
                self.evictable_units += run.len;
            }
        }
    }

    /// Whether all of the prefixes can be read now.
    pub(super) fn are_ready(&self, prefixes: &[i64]) -> bool {
        let is_ready = |entry: &CachedPrefix| entry.rows == 0 || matches!(entry.location, Location::Ready(_));
        prefixes
            .iter()
            .all(|prefix| self.prefixes.get(prefix).is_some_and(is_ready))
    }

    /// Blocks of the prefixes that have room in the arena, and the positions of the decoder's tokens of a request.
    pub(super) fn blocks(&self, prefixes: &[i64], prompt_len: usize) -> (SiteBlocks, Positions) {
        let (mut blocks, mut places) = (SiteBlocks::default(), Vec::with_capacity(prefixes.len()));
        for prefix in prefixes {
            let Some(entry) = self.prefixes.get(prefix) else {
                continue;
            };
            places.push((entry.place, to_i32(entry.pos_start)));
            let (Location::Loading(run) | Location::Ready(run)) = entry.location else {
                continue;
            };
            for site in SITES {
                let here = entry.sites.at(site);
                if here.rows > 0 {
                    blocks.at_mut(site).push(PrefixBlock {
                        prefix: *prefix,
                        first: to_i32(run.start * UNIT + here.offset),
                        rows: to_i32(here.rows),
                        slides: i32::from(entry.slides),
                        place: entry.place,
                        layer_set: here.layer_set,
                    });
                }
            }
        }
        (
            blocks,
            Positions::new(places.into_iter(), to_i32(prompt_len.saturating_sub(1))),
        )
    }

    /// Pins or unpins a prefix. A pinned prefix is evicted only after all unpinned ones.
    pub(super) fn set_pinned(&mut self, prefix: i64, pinned: bool) -> Result<()> {
        let entry = self.prefixes.get_mut(&prefix).ok_or(Error::UnknownPrefix(prefix))?;
        let was_evictable = self.evictable.remove(&(entry.eviction_key(), prefix));
        entry.pinned = pinned;
        if was_evictable {
            self.evictable.insert((entry.eviction_key(), prefix));
        }
        Ok(())
    }

    /// First arena unit of a prefix that is ready or being loaded, and number of queued and running requests that use
    /// it.
    pub(super) fn state(&self, prefix: i64) -> Result<(Option<usize>, usize)> {
        let entry = self.entry(prefix)?;
        let start = match entry.location {
            Location::Absent => None,
            Location::Loading(run) | Location::Ready(run) => Some(run.start),
        };
        Ok((start, entry.num_requests))
    }

    /// Whether a prefix is ready and no running request uses it.
    pub(super) fn is_evictable(&self, prefix: i64) -> bool {
        self.prefixes
            .get(&prefix)
            .is_some_and(|entry| self.evictable.contains(&(entry.eviction_key(), prefix)))
    }

    /// Evicts a prefix that is ready, and frees its arena units.
    pub(super) fn evict(&mut self, prefix: i64, arena: &mut FreeList) {
        let Some(entry) = self.prefixes.get_mut(&prefix) else {
            return;
        };
        if let Location::Ready(run) = entry.location {
            entry.location = Location::Absent;
            self.used_units -= run.len;
            arena.free(run);
            if self.evictable.remove(&(entry.eviction_key(), prefix)) {
                self.evictable_units -= run.len;
            }
        }
    }
}
