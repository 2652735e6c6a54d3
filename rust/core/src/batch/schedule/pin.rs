//! Prefixes that a user keeps, loads and evicts by hand, apart from requests.

use super::{Scheduler, UNIT};
use crate::error::Result;

/// A prefix that was given room: its first arena row, and the prefixes that had to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Load {
    /// Where it goes.
    pub row: usize,
    /// Whose rows were given up.
    pub evictions: Vec<i64>,
}

impl Scheduler {
    /// Evicts a prefix only when nothing else is left to evict, or as any other again.
    ///
    /// # Errors
    /// [`crate::Error::UnknownPrefix`].
    pub fn keep_prefix(&mut self, prefix: i64, kept: bool) -> Result<()> {
        self.residency.keep(prefix, kept)
    }

    /// Gives a prefix room before a request needs it: copy it in, then call [`Scheduler::prefix_ready`]. `None` if it has room already,
    /// needs none, or there is none now.
    ///
    /// # Errors
    /// [`crate::Error::UnknownPrefix`].
    pub fn load_prefix(&mut self, prefix: i64) -> Result<Option<Load>> {
        self.residency.state(prefix)?;
        let budget = self.limits.prefix_rows / UNIT;
        let found = self.residency.place(&[prefix], 0, false, (&mut self.arena, budget));
        Ok(found.and_then(|placement| {
            let (_, run) = placement.loads.first()?;
            Some(Load {
                row: run.start * UNIT,
                evictions: placement.evictions,
            })
        }))
    }

    /// Gives up the arena rows of a prefix that no running request reads: its first row. `None` if it is not there or not free to go.
    ///
    /// # Errors
    /// [`crate::Error::UnknownPrefix`].
    pub fn evict_prefix(&mut self, prefix: i64) -> Result<Option<usize>> {
        let (start, _) = self.residency.state(prefix)?;
        if !self.residency.is_idle(prefix) {
            return Ok(None);
        }
        self.residency.evict(prefix, &mut self.arena);
        Ok(start.map(|unit| unit * UNIT))
    }

    /// The first arena row of a prefix that is there or on its way, and how many queued and running requests use it.
    ///
    /// # Errors
    /// [`crate::Error::UnknownPrefix`].
    pub fn prefix_state(&self, prefix: i64) -> Result<(Option<usize>, usize)> {
        let (start, holders) = self.residency.state(prefix)?;
        Ok((start.map(|unit| unit * UNIT), holders))
    }
}
