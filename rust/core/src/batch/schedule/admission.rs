//! Admission of requests into the running set, and their release.

use super::super::block_tables::PrefixBlock;
use super::super::free_list::Run;
use super::super::int32::to_i32;
use super::super::place::Place;
use super::layer_sets::ALL_LAYERS;
use super::placement::{MAX_ENCODER_RUNS, PlacementRequest};
use super::queue::PROMPT_COST;
use super::request::{Phase, Request, RunningState, TrackedRequest};
use super::sites::Site;
use super::step::StepHeader;
use super::{MAX_ROWS, RESERVED_ROWS, Scheduler, UNIT};
use crate::error::{Limit, Result};

impl Scheduler {
    /// Refuses a request that would not fit into an empty arena.
    pub(super) fn check_room(&self, request: &Request, prefix_units: usize) -> Result<()> {
        let rows = (self.config.arena_rows - RESERVED_ROWS) / UNIT * UNIT;
        let slots = request
            .num_slots()
            .and_then(|slots| slots.checked_next_multiple_of(UNIT))
            .unwrap_or(usize::MAX);
        let encoder_rows = request.encoder_len.checked_next_multiple_of(UNIT).unwrap_or(usize::MAX);
        let reach = self.prefix_cache.total_rows(&request.prefixes)
            + request.prompt_len.min(rows)
            + request.max_new.min(rows)
            + request.encoder_len.min(rows);
        let mut maxima = self.maxima.clone();
        maxima.update(request);
        let limits = [
            (Limit::DecodeRows, request.beams, self.config.usable_rows()),
            (
                Limit::ArenaRows,
                slots.saturating_add(encoder_rows).saturating_add(prefix_units * UNIT),
                rows,
            ),
            (
                Limit::PrefixRows,
                prefix_units * UNIT,
                self.config.prefix_rows / UNIT * UNIT,
            ),
            (
                Limit::TableEntries,
                reach.max(maxima.buffer_len(&self.config, self.has_encoder())),
                MAX_ROWS,
            ),
        ];
        if self.has_encoder() {
            let tokens = request.encoder_len.saturating_add(request.prompt_len);
            Limit::EncoderTokens.check(tokens, self.config.chunk_tokens())?;
        }
        limits
            .into_iter()
            .try_for_each(|(limit, needed, available)| limit.check(needed, available))
    }

    /// Drops cancelled requests, and requests whose deadline has passed.
    pub(super) fn drop_ended(&mut self, now: i64, header: &mut StepHeader) {
        for id in std::mem::take(&mut self.cancelled) {
            self.release(id);
            header.cancelled.push(id);
        }
        while let Some(&(deadline, id)) = self.deadlines.first()
            && deadline <= now
        {
            self.release(id);
            header.expired.push(id);
        }
    }

    /// Admits requests from the head of the queue until one does not fit.
    pub(super) fn admit(&mut self, header: &mut StepHeader) {
        while let Some((id, position)) = self.queue.head() {
            // A failed attempt may have visited every prefix in the arena. It is repeated when rows may be free.
            if self.blocked == Some(id) {
                break;
            }
            let Some(state) = self.allocate(id, header) else {
                self.blocked = Some(id);
                break;
            };
            self.queue.admit(position);
            self.prefilling.insert(state.admission, id);
            if let Some(entry) = self.requests.get_mut(&id) {
                let prompt = entry.request.encoder_len + entry.request.prompt_len;
                let prompt = u64::try_from(prompt).unwrap_or(u64::MAX);
                self.queue.charge(position.account, prompt.saturating_mul(PROMPT_COST));
                entry.phase = Phase::Running(state);
            }
        }
    }

    /// Allocates everything that a request needs until its end.
    fn allocate(&mut self, id: i64, header: &mut StepHeader) -> Option<RunningState> {
        let is_alone = self.num_running() == 0;
        let request = &self.requests.get(&id)?.request;
        let slot_units = request.num_slots()?.div_ceil(UNIT);
        let encoder_units = request.encoder_len.div_ceil(UNIT);
        let decode_rows = self.decode_rows.allocate_low(request.beams)?;
        let prefixes = &*request.prefixes;
        let prefix_budget = self.config.prefix_rows / UNIT;
        let mut place = |evict_all| {
            let request = PlacementRequest {
                prefixes,
                slot_units,
                encoder_units,
                evict_all,
            };
            self.prefix_cache.place(request, &mut self.arena, prefix_budget)
        };
        // With nothing running, evicting everything removes all fragmentation, so a request cannot wait forever.
        let found = match place(false) {
            None if is_alone => place(true),
            found => found,
        };
        let Some(placement) = found else {
            self.decode_rows.free(decode_rows);
            return None;
        };
        let sort_key = self.prefix_cache.start_running(prefixes);
        let (mut blocks, positions) = self.prefix_cache.blocks(prefixes, request.prompt_len);
        header
            .loads
            .extend(placement.loads.iter().map(|(prefix, run)| (*prefix, run.start * UNIT)));
        header.evictions.extend(placement.evictions);
        self.admissions += 1;
        let encoder_blocks = encoder_blocks(self.admissions, &placement.encoder_runs, request.encoder_len);
        blocks.at_mut(Site::Cross).extend(encoder_blocks);
        Some(RunningState {
            admission: self.admissions,
            sort_key,
            decode_rows,
            slot_units: placement.slot_units,
            encoder_runs: placement.encoder_runs,
            blocks,
            positions,
            prefilled: 0,
            decode_steps: 0,
        })
    }

    /// Forgets a request and frees everything that it holds.
    pub(super) fn release(&mut self, id: i64) {
        self.cancelled.remove(&id);
        let Some(TrackedRequest {
            request,
            position,
            phase,
        }) = self.requests.remove(&id)
        else {
            return;
        };
        self.deadlines.remove(&(request.deadline, id));
        self.queue.close(position.account);
        match phase {
            Phase::Waiting => self.queue.remove(position),
            Phase::Running(state) => {
                self.blocked = None;
                self.prefilling.remove(&state.admission);
                self.decoding.remove(&(state.sort_key, position.arrival));
                self.decode_rows.free(state.decode_rows);
                for run in state.slot_units.into_iter().chain(state.encoder_runs) {
                    self.arena.free(run);
                }
                self.prefix_cache.stop_running(&request.prefixes);
            }
        }
        self.prefix_cache.remove_request(&request.prefixes);
    }
}

/// Blocks of the encoder rows of a request, one for each run, which its decode rows see in cross-attention as they see
/// prefixes.
///
/// Their numbers are negative, so that no prefix has them.
fn encoder_blocks(admission: u64, runs: &[Run], rows: usize) -> impl Iterator<Item = PrefixBlock> {
    let first_number = i64::MIN.saturating_add_unsigned(admission * MAX_ENCODER_RUNS as u64);
    runs.iter().zip(first_number..).scan(rows, |left, (run, prefix)| {
        let rows = (run.len * UNIT).min(*left);
        *left -= rows;
        Some(PrefixBlock {
            prefix,
            first: to_i32(run.start * UNIT),
            rows: to_i32(rows),
            slides: 0,
            place: Place::Front,
            layer_set: ALL_LAYERS,
        })
    })
}
