//! The scheduler: it alone owns queue, decode rows, arena rows and prefix pins of one engine.

mod admission;
mod buffer_len;
mod layer_sets;
mod pin;
mod placement;
mod prefix_cache;
mod queue;
mod request;
mod step;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::decode::Decode;
use super::free_list::Slots;
use super::table_buffer::Tables;
use crate::error::{Error, Result};
use buffer_len::Most;
use layer_sets::Sets;
use prefix_cache::Residency;
use queue::{Queue, TOKEN_COST};
pub use request::Request;
use request::{Entry, Phase};
pub use step::{StepHeader, StepTables};

/// Arena rows are handed out by this many.
pub const UNIT: usize = 16;
/// Rows at the arena's end that are never handed out: kernels read past a block's tail. The last one is the scratch slot.
pub const TAIL: usize = 64;
/// Largest arena, prefix and position.
const MAX_ROWS: usize = 1 << 30;

/// What a scheduler works with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Rows of the arena, at least 80.
    pub arena_rows: usize,
    /// Decode rows.
    pub max_rows: usize,
    /// Most tokens of a step, decode rows included; a prompt that is longer than what is left is filled over several steps.
    pub max_batched_tokens: usize,
    /// Height of the prefill's tiles; 0 makes none.
    pub tile_rows: usize,
    /// Most groups of the prefill's padded layout.
    pub buckets: usize,
    /// Rows that prefixes may hold together.
    pub prefix_rows: usize,
    /// How decode steps are cut; the default makes no tables for it.
    pub decode: Decode,
}

/// Requests prefilled with how many tokens, and requests decoded.
type InFlight = (Vec<(i64, usize)>, Vec<i64>);

/// Requests from their arrival to their end.
///
/// A step is [`Scheduler::plan_step`], the forward, [`Scheduler::commit`]. A request is admitted with everything it will ever need, so
/// nothing is preempted. When no request is running, everything but the loads under way can be evicted for the head of the queue, and `add`
/// refuses what an empty arena cannot hold: so every request is served in the end.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    most: Most,
    arrivals: u64,
    admissions: u64,
    requests: FxHashMap<i64, Entry>,
    queue: Queue,
    /// Deadlines of all requests that have one.
    deadlines: BTreeSet<(i64, i64)>,
    /// Admitted requests whose prompt is not filled yet, in order of admission.
    admitted: BTreeMap<u64, i64>,
    /// Prefilled requests by their prefixes, so that rows with the same prefixes are neighbours.
    decoding: BTreeMap<(Arc<[i64]>, u64), i64>,
    cancelled: BTreeSet<i64>,
    residency: Residency,
    sets: Sets,
    arena: Slots,
    rows: Slots,
    /// Requests of the step that waits for its commit: prefilled with how many tokens, decoded.
    in_flight: Option<InFlight>,
    scratch: Tables,
}

impl Scheduler {
    /// An empty scheduler.
    ///
    /// # Errors
    /// [`Error::Config`] for a limit out of range.
    pub fn new(limits: Limits) -> Result<Self> {
        let ranges = [
            ("arena_rows", limits.arena_rows, TAIL + UNIT),
            ("max_rows", limits.max_rows, 1),
            ("max_batched_tokens", limits.max_batched_tokens, 1),
            ("tile_rows", limits.tile_rows, 0),
            ("buckets", limits.buckets, 1),
            ("decode: users", limits.decode.users, 0),
            ("decode: fill", limits.decode.fill, limits.decode.users.min(1)),
        ];
        for (name, value, least) in ranges {
            if !(least..=MAX_ROWS).contains(&value) {
                return Err(Error::Config(format!(
                    "{name} is {value}: expected {least} to {MAX_ROWS}"
                )));
            }
        }
        Ok(Self {
            limits,
            most: Most::default(),
            arrivals: 0,
            admissions: 0,
            requests: FxHashMap::default(),
            queue: Queue::default(),
            deadlines: BTreeSet::new(),
            admitted: BTreeMap::new(),
            decoding: BTreeMap::new(),
            cancelled: BTreeSet::new(),
            residency: Residency::default(),
            sets: Sets::default(),
            arena: Slots::new((limits.arena_rows - TAIL) / UNIT),
            rows: Slots::new(limits.max_rows),
            in_flight: None,
            scratch: Tables::default(),
        })
    }

    /// Makes a prefix known; its rows are loaded when a request needs them. A prefix of 0 rows is never loaded. `layers`: whether it lies in each
    /// layer; empty: it lies in all.
    ///
    /// # Errors
    /// [`Error::Config`] if the number is taken, a value is beyond 2**30, or `layers` has another length than before.
    pub fn register_prefix(
        &mut self,
        prefix: i64,
        rows: usize,
        pos_start: usize,
        slides: bool,
        layers: &[bool],
    ) -> Result<()> {
        for (name, value) in [("rows", rows), ("pos_start", pos_start)] {
            if value > MAX_ROWS {
                return Err(Error::Config(format!(
                    "{name} of prefix {prefix} is {value}: expected at most {MAX_ROWS}"
                )));
            }
        }
        self.residency.check_new(prefix)?;
        let set = self.sets.add(layers)?;
        self.residency.register(prefix, rows, pos_start, (slides, set));
        Ok(())
    }

    /// Forgets a prefix and frees its rows.
    ///
    /// # Errors
    /// [`Error::UnknownPrefix`]; [`Error::State`] while a request uses it or it is being loaded.
    pub fn forget_prefix(&mut self, prefix: i64) -> Result<()> {
        let set = self.residency.forget(prefix, &mut self.arena)?;
        self.sets.release(set);
        Ok(())
    }

    /// The load of a prefix is complete.
    ///
    /// # Errors
    /// [`Error::UnknownPrefix`]; [`Error::State`] if it is not being loaded.
    pub fn prefix_ready(&mut self, prefix: i64) -> Result<()> {
        self.residency.ready(prefix)
    }

    /// Queues a request.
    ///
    /// # Errors
    /// [`Error::Request`] for a number out of range, an id that is queued or running, or more rows than there will ever be;
    /// [`Error::UnknownPrefix`].
    pub fn add(&mut self, request: Request) -> Result<()> {
        if self.requests.contains_key(&request.id) {
            return Err(Error::Request(format!(
                "request {} is already queued or running: expected a new id",
                request.id
            )));
        }
        request.check_numbers()?;
        let prefix_units = self.residency.units_of(&request.prefixes)?;
        self.check_room(&request, prefix_units)?;
        self.most.see(&request);
        self.residency.hold(&request.prefixes);
        let place = self
            .queue
            .push(request.id, request.tenant, request.priority, self.arrivals);
        if request.deadline < i64::MAX {
            self.deadlines.insert((request.deadline, request.id));
        }
        self.requests.insert(
            request.id,
            Entry {
                place,
                phase: Phase::Waiting,
                request,
            },
        );
        self.arrivals += 1;
        Ok(())
    }

    /// Drops a request at the next step. False if it is not known or already cancelled.
    pub fn cancel(&mut self, id: i64) -> bool {
        self.requests.contains_key(&id) && self.cancelled.insert(id)
    }

    /// Ends the step: its requests advance, the finished ones free everything.
    ///
    /// # Errors
    /// [`Error::Request`] for an id that is not admitted or given twice; nothing has changed then.
    pub fn commit(&mut self, finished: &[i64]) -> Result<()> {
        let mut seen = BTreeSet::new();
        for id in finished {
            let admitted = self.requests.get(id).is_some_and(|entry| entry.phase.is_admitted());
            if !admitted || !seen.insert(id) {
                let what = if admitted { "given twice" } else { "not running" };
                return Err(Error::Request(format!(
                    "finished request {id} is {what}: expected each running request at most once"
                )));
            }
        }
        let (prefilled, decoded) = self.in_flight.take().unwrap_or_default();
        for id in &decoded {
            if let Some(entry) = self.requests.get_mut(id)
                && let Phase::Admitted(held) = &mut entry.phase
            {
                held.steps += 1;
                let rows = u64::try_from(entry.request.beams).unwrap_or(u64::MAX);
                self.queue.charge(entry.place.account, rows.saturating_mul(TOKEN_COST));
            }
        }
        for (id, tokens) in prefilled {
            if let Some(entry) = self.requests.get_mut(&id)
                && let Phase::Admitted(held) = &mut entry.phase
            {
                held.filled += tokens;
                if held.filled == entry.request.prompt_len {
                    self.admitted.remove(&held.admission);
                    self.decoding
                        .insert((Arc::clone(&entry.request.prefixes), entry.place.arrival), id);
                }
            }
        }
        for id in finished {
            self.release(*id);
        }
        Ok(())
    }

    /// int32 entries that suffice for a step now. It grows with the largest requests seen, and with the sets of layers that registered prefixes
    /// lie in.
    #[must_use]
    pub fn buffer_len(&self) -> usize {
        self.most
            .buffer_len(&self.limits)
            .saturating_mul(self.sets.views().count())
    }

    /// Requests in the queue.
    #[must_use]
    pub fn num_waiting(&self) -> usize {
        self.queue.len()
    }

    /// Admitted requests.
    #[must_use]
    pub fn num_running(&self) -> usize {
        self.requests.len() - self.queue.len()
    }

    /// Arena rows that nothing holds.
    #[must_use]
    pub fn free_rows(&self) -> usize {
        self.arena.free() * UNIT
    }
}
