//! One request and what it holds.

use std::sync::Arc;

use super::super::block_tables::Block;
use super::super::free_list::Run;
use super::super::int32::int;
use super::UNIT;
use super::queue::Place;
use crate::error::{Error, Result};

/// A request as the caller states it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Its number.
    pub id: i64,
    /// Its prefixes, left to right.
    pub prefixes: Arc<[i64]>,
    /// Prompt tokens, at least 1.
    pub prompt_len: usize,
    /// Decode rows, at least 1.
    pub beams: usize,
    /// Most decode steps, at least 1.
    pub max_new: usize,
    /// Who asks: tenants of one priority get equal service.
    pub tenant: i64,
    /// Higher goes first.
    pub priority: i64,
    /// When it is dropped, in microseconds of the caller's clock; [`i64::MAX`] for never.
    pub deadline: i64,
}

impl Request {
    /// Arena rows for its tokens: prompt and, for each beam, the new ones.
    pub(super) fn slots(&self) -> Option<usize> {
        self.beams.checked_mul(self.max_new)?.checked_add(self.prompt_len)
    }

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

/// A request the scheduler knows.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) request: Request,
    pub(super) place: Place,
    pub(super) phase: Phase,
}

/// Where a request stands.
#[derive(Debug)]
pub(super) enum Phase {
    Waiting,
    Admitted(Held),
}

impl Phase {
    pub(super) fn is_admitted(&self) -> bool {
        matches!(self, Self::Admitted(_))
    }
}

/// What an admitted request holds until its end.
#[derive(Debug)]
pub(super) struct Held {
    /// Number of its admission.
    pub(super) admission: u64,
    /// Decode rows.
    pub(super) rows: Run,
    /// Arena units for its tokens.
    pub(super) slots: Vec<Run>,
    /// Its prefixes in the arena, left to right.
    pub(super) blocks: Vec<Block>,
    /// Position of its first token.
    pub(super) pos_start: i32,
    /// Prompt tokens whose keys and values are in the arena.
    pub(super) filled: usize,
    /// Decode steps done.
    pub(super) steps: usize,
}

impl Held {
    /// Arena rows of its tokens `from..from + count`; the prompt comes first, then the new tokens of each beam.
    pub(super) fn slots(&self, from: usize, count: usize) -> impl Iterator<Item = i32> {
        let mut skip = from;
        let mut left = count;
        self.slots.iter().flat_map(move |run| {
            let len = run.len * UNIT;
            let start = skip.min(len);
            let end = len.min(start + left);
            skip -= start;
            left -= end - start;
            (run.start * UNIT + start..run.start * UNIT + end).map(int)
        })
    }
}
