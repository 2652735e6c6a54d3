//! Requests, and the resources that a running request holds.

use std::sync::Arc;

use super::super::block_tables::PrefixBlock;
use super::super::free_list::Run;
use super::super::int32::to_i32;
use super::super::place::Positions;
use super::UNIT;
use super::prefix_cache::SortKey;
use super::queue::QueuePosition;
use crate::error::{Error, Result};

/// A generation request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Request id.
    pub id: i64,
    /// Numbers of its prefixes, from left to right.
    pub prefixes: Arc<[i64]>,
    /// Number of prompt tokens, at least 1.
    pub prompt_len: usize,
    /// Number of decode rows, at least 1.
    pub beams: usize,
    /// Largest number of decode steps, at least 1.
    pub max_new: usize,
    /// Tenant number. Tenants with requests of the same priority get equal service.
    pub tenant: i64,
    /// Priority. Higher priorities are served first.
    pub priority: i64,
    /// Time after which the request is dropped, in microseconds of the caller's clock. [`i64::MAX`] means never.
    pub deadline: i64,
}

impl Request {
    /// Number of arena rows for its tokens: those of the prompt, and `max_new` per beam.
    pub(super) fn num_slots(&self) -> Option<usize> {
        self.beams.checked_mul(self.max_new)?.checked_add(self.prompt_len)
    }

    /// Refuses lengths and counts of 0.
    pub(super) fn check_numbers(&self) -> Result<()> {
        for (name, value) in [
            ("prompt_len", self.prompt_len),
            ("beams", self.beams),
            ("max_new", self.max_new),
        ] {
            if value == 0 {
                return Err(Error::Request(format!(
                    "{name} of request {} is 0: expected 1 or more",
                    self.id
                )));
            }
        }
        Ok(())
    }
}

/// A queued or running request.
#[derive(Debug)]
pub(super) struct TrackedRequest {
    pub(super) request: Request,
    pub(super) position: QueuePosition,
    pub(super) phase: Phase,
}

#[derive(Debug)]
pub(super) enum Phase {
    Waiting,
    Running(RunningState),
}

impl Phase {
    pub(super) fn is_running(&self) -> bool {
        matches!(self, Self::Running(_))
    }
}

/// Progress of a running request, and the resources that it holds until its end.
#[derive(Debug)]
pub(super) struct RunningState {
    /// Sequence number of its admission.
    pub(super) admission: u64,
    pub(super) sort_key: SortKey,
    pub(super) decode_rows: Run,
    /// Arena units for its tokens.
    pub(super) slot_units: Vec<Run>,
    /// Its prefixes in the arena, from left to right.
    pub(super) blocks: Vec<PrefixBlock>,
    /// Positions of its tokens.
    pub(super) positions: Positions,
    /// Number of prompt tokens whose keys and values are in the arena.
    pub(super) prefilled: usize,
    /// Number of completed decode steps.
    pub(super) decode_steps: usize,
}

impl RunningState {
    /// Arena rows of its tokens `from..from + count`. The prompt comes first, then the new tokens of each beam.
    pub(super) fn slots(&self, from: usize, count: usize) -> impl Iterator<Item = i32> {
        let mut skip = from;
        let mut left = count;
        self.slot_units.iter().flat_map(move |run| {
            let len = run.len * UNIT;
            let start = skip.min(len);
            let end = len.min(start + left);
            skip -= start;
            left -= end - start;
            (run.start * UNIT + start..run.start * UNIT + end).map(to_i32)
        })
    }
}
