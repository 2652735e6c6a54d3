//! Prefixes that the caller pins, loads and evicts independently of requests.

use super::placement::PlacementRequest;
use super::{Scheduler, UNIT};
use crate::error::Result;

/// Room in the arena for a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrefixLoad {
    /// First arena row of the prefix.
    pub row: usize,
    /// Prefixes that were evicted to make room.
    pub evictions: Vec<i64>,
}

impl Scheduler {
    /// Pins or unpins a prefix. A pinned prefix is evicted only after all unpinned ones.
    ///
    /// # Errors
    /// [`crate::Error::UnknownPrefix`] if the prefix is not registered.
    pub fn set_pinned(&mut self, prefix: i64, pinned: bool) -> Result<()> {
        self.prefix_cache.set_pinned(prefix, pinned)
    }

    /// Prefetches a prefix: allocates its arena rows before a request needs them.
    ///
    /// The caller copies the prefix in and then calls [`Scheduler::prefix_ready`]. Returns `None` if the prefix has
    /// arena rows already or needs none, or if there is no room now.
    ///
    /// # Errors
    /// [`crate::Error::UnknownPrefix`] if the prefix is not registered.
    pub fn load_prefix(&mut self, prefix: i64) -> Result<Option<PrefixLoad>> {
        self.prefix_cache.state(prefix)?;
        self.blocked = None;
        let request = PlacementRequest {
            prefixes: &[prefix],
            slot_units: 0,
            encoder_units: 0,
            evict_all: false,
        };
        let placement = self
            .prefix_cache
            .place(request, &mut self.arena, self.config.prefix_rows / UNIT);
        Ok(placement.and_then(|placement| {
            let (_, run) = placement.loads.first()?;
            Some(PrefixLoad {
                row: run.start * UNIT,
                evictions: placement.evictions,
            })
        }))
    }

    /// Evicts a prefix and returns its first arena row.
    ///
    /// Returns `None` and does nothing if the prefix is not in the arena, is being loaded, or is used by a running
    /// request.
    ///
    /// # Errors
    /// [`crate::Error::UnknownPrefix`] if the prefix is not registered.
    pub fn evict_prefix(&mut self, prefix: i64) -> Result<Option<usize>> {
        let (start, _) = self.prefix_cache.state(prefix)?;
        if !self.prefix_cache.is_evictable(prefix) {
            return Ok(None);
        }
        self.prefix_cache.evict(prefix, &mut self.arena);
        self.blocked = None;
        Ok(start.map(|unit| unit * UNIT))
    }

    /// First arena row of a prefix that is ready or being loaded, and number of queued and running requests that use
    /// it.
    ///
    /// # Errors
    /// [`crate::Error::UnknownPrefix`] if the prefix is not registered.
    pub fn prefix_state(&self, prefix: i64) -> Result<(Option<usize>, usize)> {
        let (start, num_requests) = self.prefix_cache.state(prefix)?;
        Ok((start.map(|unit| unit * UNIT), num_requests))
    }
}
