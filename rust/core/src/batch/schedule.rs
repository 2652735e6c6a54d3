//! Scheduler of a generation engine: queue, decode rows, arena rows and prefix cache.
//!
//! The arena is the KV cache, a tensor whose rows hold the keys and values of one token or of one prefix row each. A
//! decode row is a row of the decode batch, one per beam of a running request. Unlike in vLLM, a request is admitted
//! with all decode rows and arena rows that it will ever need, so no request is preempted.

mod admission;
mod buffer_len;
mod layer_sets;
mod pin;
mod placement;
mod prefix_cache;
mod queue;
mod request;
mod sites;
mod step;
mod step_tables;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::decode::DecodeSizes;
use super::free_list::FreeList;
use super::table_buffer::TableBuffer;
use crate::error::{Error, Result};
use buffer_len::RequestMaxima;
use layer_sets::LayerSets;
pub use pin::PrefixLoad;
use prefix_cache::{PrefixCache, SortKey};
use queue::{Queue, TOKEN_COST};
pub use request::Request;
use request::{Phase, TrackedRequest};
use sites::{BySite, site_layer_sets};
pub use sites::{PrefixPart, PrefixShape};
use step::ScheduledRequest;
pub use step::{StepHeader, StepTables};

/// Arena rows per allocation unit.
pub const UNIT: usize = 16;
/// Number of rows at the arena's end that are never allocated, because kernels read past the end of a block. The last
/// row is the scratch slot of padding rows.
pub const RESERVED_ROWS: usize = 64;
/// Upper bound of the arena size, the size of a prefix, and positions.
const MAX_ROWS: usize = 1 << 30;

/// Sizes that a scheduler works with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Number of arena rows, at least 80.
    pub arena_rows: usize,
    /// Number of decode rows. No more than three quarters of `max_batched_tokens` of them are used.
    pub max_rows: usize,
    /// Largest number of tokens per step. Each decode row counts as one token. A longer prompt is prefilled in chunks
    /// of a fixed size over several steps.
    pub max_batched_tokens: usize,
    /// Query rows per query tile of the prefill, 0 for no tile table.
    pub tile_rows: usize,
    /// Largest number of length buckets in the padded layout of the prefill.
    pub buckets: usize,
    /// Largest number of arena rows that all prefixes together may occupy.
    pub prefix_rows: usize,
    /// Tile size and cost model of decode attention. The default disables the work tables.
    pub decode: DecodeSizes,
}

impl SchedulerConfig {
    /// Number of decode rows that a step can compute. A quarter of the tokens is left for prompts.
    fn usable_rows(&self) -> usize {
        self.max_rows.min(self.max_batched_tokens - self.max_batched_tokens / 4)
    }

    /// Number of tokens of each chunk of a prompt but its last one.
    ///
    /// A request whose prompt is not complete holds a decode row that is not computed, so every step has room for a
    /// chunk. Chunks of one size make the rounding of a request independent of the other requests.
    fn chunk_tokens(&self) -> usize {
        self.max_batched_tokens - self.usable_rows() + 1
    }
}

/// A step that has been planned and not yet committed.
#[derive(Debug, Default)]
struct InFlightStep {
    prefill: Vec<ScheduledRequest>,
    decode_ids: Vec<i64>,
}

/// Scheduler of the requests of one engine, from their arrival to their end.
///
/// A step consists of [`Scheduler::plan_step`], the forward, and [`Scheduler::commit`].
///
/// Every request is served in the end. [`Scheduler::add`] refuses a request that does not fit into an empty arena.
/// While no request is running, everything except prefixes that are being loaded can be evicted for the head of the
/// queue.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    maxima: RequestMaxima,
    /// Number of requests that have arrived.
    arrivals: u64,
    /// Number of requests that have been admitted.
    admissions: u64,
    requests: FxHashMap<i64, TrackedRequest>,
    queue: Queue,
    /// Pairs of deadline and id of all requests that have a deadline.
    deadlines: BTreeSet<(i64, i64)>,
    /// Running requests whose prompt is not complete, in the order of admission.
    prefilling: BTreeMap<u64, i64>,
    /// Running requests whose prompt is complete, sorted by prefixes and arrival so that rows with the same prefixes
    /// are neighbours.
    decoding: BTreeMap<(SortKey, u64), i64>,
    /// Requests to drop at the next step.
    cancelled: BTreeSet<i64>,
    prefix_cache: PrefixCache,
    /// Layer sets of each site.
    layer_sets: BySite<LayerSets>,
    /// Free arena rows in units of [`UNIT`].
    arena: FreeList,
    decode_rows: FreeList,
    /// Head of the queue if there was no room for it, until some may have become free.
    blocked: Option<i64>,
    in_flight: Option<InFlightStep>,
    /// Memory for the tables of a step, reused from step to step.
    tables: TableBuffer,
}

impl Scheduler {
    /// Scheduler of a decoder-only base, without requests and prefixes.
    ///
    /// # Errors
    /// [`Error::Config`] for a size out of range.
    pub fn new(config: SchedulerConfig) -> Result<Self> {
        Self::with_layer_sets(config, site_layer_sets(None))
    }

    /// Scheduler of an encoder-decoder base, without requests and prefixes.
    ///
    /// * `encoder_folds`: fold of each encoder layer. The prefix rows of layers of fold `f` follow those of fold
    ///   `f - 1`.
    ///
    /// # Errors
    /// [`Error::Config`] for a size out of range, no encoder layer, or padded decode steps.
    pub fn with_encoder(config: SchedulerConfig, encoder_folds: Vec<usize>) -> Result<Self> {
        if encoder_folds.is_empty() || encoder_folds.iter().any(|fold| *fold >= encoder_folds.len()) {
            return Err(Error::Config(format!(
                "encoder_folds is {encoder_folds:?}: expected the fold of each encoder layer, less than their number"
            )));
        }
        if config.decode.padded {
            return Err(Error::Config(
                "pad_decode is set: expected decode steps without padding for an encoder-decoder base; leave it out"
                    .to_owned(),
            ));
        }
        Self::with_layer_sets(config, site_layer_sets(Some(encoder_folds)))
    }

    fn with_layer_sets(config: SchedulerConfig, layer_sets: BySite<LayerSets>) -> Result<Self> {
        let ranges = [
            ("arena_rows", config.arena_rows, RESERVED_ROWS + UNIT),
            ("max_rows", config.max_rows, 1),
            ("max_batched_tokens", config.max_batched_tokens, 1),
            ("tile_rows", config.tile_rows, 0),
            ("buckets", config.buckets, 1),
            ("decode: users", config.decode.users, 0),
            ("decode: fill", config.decode.fill, config.decode.users.min(1)),
        ];
        for (name, value, min) in ranges {
            if !(min..=MAX_ROWS).contains(&value) {
                return Err(Error::Config(format!(
                    "{name} is {value}: expected {min} to {MAX_ROWS}"
                )));
            }
        }
        Ok(Self {
            config,
            maxima: RequestMaxima::default(),
            arrivals: 0,
            admissions: 0,
            requests: FxHashMap::default(),
            queue: Queue::default(),
            deadlines: BTreeSet::new(),
            prefilling: BTreeMap::new(),
            decoding: BTreeMap::new(),
            cancelled: BTreeSet::new(),
            prefix_cache: PrefixCache::default(),
            layer_sets,
            arena: FreeList::new((config.arena_rows - RESERVED_ROWS) / UNIT),
            decode_rows: FreeList::new(config.usable_rows()),
            blocked: None,
            in_flight: None,
            tables: TableBuffer::default(),
        })
    }

    /// Marks the load of a prefix as complete.
    ///
    /// # Errors
    /// [`Error::UnknownPrefix`] if the prefix is not registered. [`Error::State`] if it is not being loaded.
    pub fn prefix_ready(&mut self, prefix: i64) -> Result<()> {
        self.blocked = None;
        self.prefix_cache.mark_ready(prefix)
    }

    /// Adds a request to the queue.
    ///
    /// # Errors
    /// [`Error::Request`] for a number out of range, or the id of a queued or running request. [`Error::Capacity`] for
    /// a request that an empty arena cannot hold. [`Error::UnknownPrefix`] for a prefix that is not registered.
    pub fn add(&mut self, request: Request) -> Result<()> {
        if self.requests.contains_key(&request.id) {
            return Err(Error::Request(format!(
                "request {} is already queued or running: expected a new id",
                request.id
            )));
        }
        request.check_numbers(self.has_encoder())?;
        let prefix_units = self.prefix_cache.num_units(&request.prefixes)?;
        self.check_room(&request, prefix_units)?;
        self.maxima.update(&request);
        self.prefix_cache.add_request(&request.prefixes);
        let position = self
            .queue
            .push(request.id, request.tenant, request.priority, self.arrivals);
        if request.deadline < i64::MAX {
            self.deadlines.insert((request.deadline, request.id));
        }
        self.requests.insert(
            request.id,
            TrackedRequest {
                position,
                phase: Phase::Waiting,
                request,
            },
        );
        self.arrivals += 1;
        Ok(())
    }

    /// Cancels a request, which is dropped at the next step. Returns false if it is unknown or already cancelled.
    pub fn cancel(&mut self, id: i64) -> bool {
        self.requests.contains_key(&id) && self.cancelled.insert(id)
    }

    /// Ends the step. Its requests advance, and the `finished` ones free everything that they hold.
    ///
    /// # Errors
    /// [`Error::Request`] for an id that is not running or occurs twice. Nothing has changed then.
    pub fn commit(&mut self, finished: &[i64]) -> Result<()> {
        let mut seen = BTreeSet::new();
        for id in finished {
            let is_running = self.requests.get(id).is_some_and(|entry| entry.phase.is_running());
            if !is_running || !seen.insert(id) {
                let what = if is_running { "given twice" } else { "not running" };
                return Err(Error::Request(format!(
                    "finished request {id} is {what}: expected each running request at most once"
                )));
            }
        }
        let InFlightStep { prefill, decode_ids } = self.in_flight.take().unwrap_or_default();
        for id in &decode_ids {
            if let Some(entry) = self.requests.get_mut(id)
                && let Phase::Running(state) = &mut entry.phase
            {
                state.decode_steps += 1;
                let rows = u64::try_from(entry.request.beams).unwrap_or(u64::MAX);
                self.queue
                    .charge(entry.position.account, rows.saturating_mul(TOKEN_COST));
            }
        }
        for ScheduledRequest { id, tokens } in prefill {
            if let Some(entry) = self.requests.get_mut(&id)
                && let Phase::Running(state) = &mut entry.phase
            {
                state.prefilled += tokens;
                if state.prefilled == entry.request.prompt_len {
                    self.prefilling.remove(&state.admission);
                    self.decoding
                        .insert((Arc::clone(&state.sort_key), entry.position.arrival), id);
                }
            }
        }
        for id in finished {
            self.release(*id);
        }
        Ok(())
    }

    /// Number of queued requests.
    #[must_use]
    pub fn num_waiting(&self) -> usize {
        self.queue.len()
    }

    /// Number of running requests.
    #[must_use]
    pub fn num_running(&self) -> usize {
        self.requests.len() - self.queue.len()
    }

    /// Number of free arena rows. Rows of cached prefixes count as occupied.
    #[must_use]
    pub fn free_rows(&self) -> usize {
        self.arena.num_free() * UNIT
    }
}
