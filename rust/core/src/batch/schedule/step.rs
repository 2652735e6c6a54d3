//! Planning of one step: which requests are dropped, admitted, prefilled and decoded.

use super::super::table_buffer::Section;
use super::request::{Phase, Request, RunningState};
use super::sites::Site;
use super::step_tables::{push_cross, push_decode, push_decode_cross, push_encoder, push_prefill};
use super::{InFlightStep, Scheduler};
use crate::error::{Error, Limit, Result};

/// Sections of the tables of one forward, in the step's buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepTables {
    /// Sections of each view.
    ///
    /// A view is the set of layers in which the same prefixes of the step lie. In padded steps all registered prefixes
    /// are compared. Views differ in their block tables only.
    pub views: Vec<Vec<Section>>,
    /// View of each layer, empty if there is a single view.
    pub view_of: Vec<usize>,
    /// Largest number of keys that a query can see.
    pub reach: i32,
}

/// Plan of one step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepHeader {
    /// Prefixes to copy into the arena and their first arena rows. The copies must follow the evictions.
    pub loads: Vec<(i64, usize)>,
    /// Prefixes whose arena rows were freed.
    pub evictions: Vec<i64>,
    /// Requests of the prefill, in the order of the segments. `logits_idx` has one entry for each of them whose prompt
    /// ends in this step, in the same order.
    pub prefill_ids: Vec<i64>,
    /// Requests of the decode, in the order of the rows.
    pub decode_ids: Vec<i64>,
    /// Requests that were dropped because they were cancelled, in ascending order.
    pub cancelled: Vec<i64>,
    /// Requests that were dropped because their deadline has passed, earliest first.
    pub expired: Vec<i64>,
    /// Tables of the prefill, `None` without one.
    pub prefill: Option<StepTables>,
    /// Tables of the decode, `None` without one.
    pub decode: Option<StepTables>,
    /// Tables of the encoder, beside the prefill of an encoder-decoder base.
    pub encoder: Option<StepTables>,
    /// Tables of cross-attention, beside the prefill of an encoder-decoder base.
    pub cross: Option<StepTables>,
    /// Tables of cross-attention, beside the decode of an encoder-decoder base.
    pub decode_cross: Option<StepTables>,
}

/// A request of a step.
#[derive(Debug, Clone, Copy)]
pub(super) struct ScheduledRequest {
    pub(super) id: i64,
    /// Number of prompt tokens of the step's prefill, 0 in a decode.
    pub(super) tokens: usize,
}

impl Scheduler {
    /// Plans the next step and writes its tables into `out`.
    ///
    /// * `now`: time in microseconds of the caller's clock, compared with deadlines.
    ///
    /// # Errors
    /// Those of [`Scheduler::plan_tables`].
    pub fn plan_step(&mut self, now: i64, out: &mut [i32]) -> Result<StepHeader> {
        let header = self.plan_tables(now, out.len())?;
        let tables = self.step_tables();
        if let Some(out) = out.get_mut(..tables.len()) {
            out.copy_from_slice(tables);
        }
        Ok(header)
    }

    /// Tables of the last planned step.
    #[must_use]
    pub fn step_tables(&self) -> &[i32] {
        &self.tables.data
    }

    /// Plans the next step. Its tables are [`Scheduler::step_tables`].
    ///
    /// * `now`: time in microseconds of the caller's clock, compared with deadlines.
    /// * `room`: number of int32 entries of the buffer for the tables.
    ///
    /// # Errors
    /// [`Error::Capacity`] if `room` is less than [`Scheduler::buffer_len`]. [`Error::State`] if the last step was
    /// not committed, or if a request has used its `max_new` decode steps. Nothing has changed then.
    pub fn plan_tables(&mut self, now: i64, room: usize) -> Result<StepHeader> {
        self.check_step(room, now)?;
        let mut header = StepHeader::default();
        self.drop_ended(now, &mut header);
        self.admit(&mut header);
        let decode: Vec<ScheduledRequest> = self
            .decoding
            .values()
            .map(|id| ScheduledRequest { id: *id, tokens: 0 })
            .collect();
        let prefill = self.choose_prefill();
        header.decode_ids = decode.iter().map(|request| request.id).collect();
        header.prefill_ids = prefill.iter().map(|request| request.id).collect();
        let mut tables = std::mem::take(&mut self.tables);
        tables.clear();
        let padded = self.config.decode.padded;
        header.prefill = self.push_views(&prefill, &mut tables, Site::Decoder, false, push_prefill);
        if self.has_encoder() {
            header.encoder = self.push_views(&prefill, &mut tables, Site::Encoder, false, push_encoder);
            header.cross = self.push_views(&prefill, &mut tables, Site::Cross, false, push_cross);
        }
        header.decode = self.push_views(&decode, &mut tables, Site::Decoder, padded, push_decode);
        if self.has_encoder() {
            header.decode_cross = self.push_views(&decode, &mut tables, Site::Cross, false, push_decode_cross);
        }
        if tables.data.len() > room {
            let text = "internal error: buffer_len was too small for a step; please report it";
            return Err(Error::State(text.to_owned()));
        }
        self.tables = tables;
        if header.prefill.is_some() || header.decode.is_some() {
            self.in_flight = Some(InFlightStep {
                prefill,
                decode_ids: header.decode_ids.clone(),
            });
        }
        Ok(header)
    }

    fn check_step(&self, len: usize, now: i64) -> Result<()> {
        let needed = self.buffer_len();
        Limit::StepBuffer.check(needed, len)?;
        if self.in_flight.is_some() {
            return Err(Error::State(
                "the last step is not committed: expected commit after each plan_step; call it first".to_owned(),
            ));
        }
        for id in self.decoding.values().filter(|id| !self.cancelled.contains(id)) {
            if let Some((request, state)) = self.running(*id)
                && state.decode_steps >= request.max_new
                && request.deadline > now
            {
                return Err(Error::State(format!(
                    "request {id} has used its {} steps: expected the engine to finish it; pass it to commit",
                    request.max_new
                )));
            }
        }
        Ok(())
    }

    /// The running request of the given id.
    pub(super) fn running(&self, id: i64) -> Option<(&Request, &RunningState)> {
        let entry = self.requests.get(&id)?;
        match &entry.phase {
            Phase::Running(state) => Some((&entry.request, state)),
            Phase::Waiting => None,
        }
    }

    /// Chooses the prefill within the token budget that the decode leaves, and sorts it by prefixes.
    ///
    /// Requests are taken in the order of admission, those with a partly filled prompt first. A prompt is cut only if
    /// it comes first, so at most one request has a partly filled prompt. A request with encoder tokens is not cut.
    fn choose_prefill(&self) -> Vec<ScheduledRequest> {
        let rows = self.decoding.values().filter_map(|id| self.running(*id));
        let decoded: usize = rows.map(|(request, _)| request.beams).sum();
        let mut left = self.config.max_batched_tokens.saturating_sub(decoded);
        let chunk_tokens = self.config.chunk_tokens();
        let mut chosen = Vec::new();
        let ready = |is_started: bool| {
            self.prefilling.iter().filter_map(move |(admission, id)| {
                let (request, state) = self.running(*id)?;
                let is_ready = (state.prefilled > 0) == is_started && self.prefix_cache.are_ready(&request.prefixes);
                is_ready.then_some((admission, *id, request, state))
            })
        };
        for (admission, id, request, state) in ready(true).chain(ready(false)) {
            let next_border = (state.prefilled / chunk_tokens + 1).saturating_mul(chunk_tokens);
            let end = request.prompt_len.min(next_border);
            let tokens = end - state.prefilled;
            let cost = tokens + request.encoder_len;
            if cost > left || end < request.prompt_len && !chosen.is_empty() {
                break;
            }
            left -= cost;
            chosen.push((&state.sort_key, admission, id, tokens));
        }
        chosen.sort_unstable();
        chosen
            .into_iter()
            .map(|(_, _, id, tokens)| ScheduledRequest { id, tokens })
            .collect()
    }
}
