//! Requests, and the resources that a running request holds.

use std::sync::Arc;

use super::super::free_list::Run;
use super::super::int32::to_i32;
use super::super::place::Positions;
use super::UNIT;
use super::prefix_cache::SortKey;
use super::queue::QueuePosition;
use super::sites::SiteBlocks;
use crate::error::{Error, Result};

/// A generation request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Request id.
    pub id: i64,
    /// Numbers of its prefixes, from left to right.
    pub prefixes: Arc<[i64]>,
    /// Number of encoder tokens, 0 for a decoder-only base.
    pub encoder_len: usize,
    /// Number of prompt tokens, at least 1. They are the decoder's.
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
    /// Number of arena rows for its decoder tokens: those of the prompt, and `max_new` per beam.
    pub(super) fn num_slots(&self) -> Option<usize> {
        self.beams.checked_mul(self.max_new)?.checked_add(self.prompt_len)
    }

    /// Refuses lengths and counts of 0, and a number of encoder tokens that does not fit the kind of the base.
    pub(super) fn check_numbers(&self, has_encoder: bool) -> Result<()> {
        if has_encoder != (self.encoder_len > 0) {
            let expected = if has_encoder {
                "1 or more, because the scheduler serves an encoder-decoder base; give the tokens of the encoder"
            } else {
                "0, because the scheduler serves a decoder-only base; leave it out"
            };
            return Err(Error::Request(format!(
                "encoder_len of request {} is {}: expected {expected}",
                self.id, self.encoder_len
            )));
        }
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
    /// Arena units for its decoder tokens.
    pub(super) slot_units: Vec<Run>,
    /// Arena units for the keys and values of its encoder tokens in cross-attention.
    pub(super) encoder_runs: Vec<Run>,
    /// Its prefixes in the arena, from left to right.
    pub(super) blocks: SiteBlocks,
    /// Positions of its decoder tokens.
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
