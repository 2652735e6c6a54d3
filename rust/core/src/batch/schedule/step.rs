//! One step: its membership and its tables.

use std::borrow::Cow;

use super::super::block_tables::{Block, Queries, push_uses};
use super::super::decode::{Dead, push_decode_work};
use super::super::int32::int;
use super::super::plan::{Sequence, Tiles, firsts, push_packed, rows};
use super::super::table_buffer::{Section, Tables};
use super::Scheduler;
use super::request::{Held, Phase, Request};
use crate::error::{Error, Result};

/// Tables of one forward.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepTables {
    /// Where they lie in the step's buffer, by view: layers with the same prefixes (in padded steps: whatever prefixes of those registered are used). All
    /// but the blocks and who uses them is the same in each.
    pub views: Vec<Vec<Section>>,
    /// By layer: its view; empty for a single view.
    pub view_of: Vec<usize>,
    /// The most keys a query can see.
    pub reach: i32,
}

/// One step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepHeader {
    /// Prefixes to copy in and their first arena rows; to be done after the evictions.
    pub loads: Vec<(i64, usize)>,
    /// Prefixes whose arena rows were given up.
    pub evictions: Vec<i64>,
    /// Requests of the prefill, in segment order; those whose prompt ends in this step come as often in `logits_idx`.
    pub prefill_ids: Vec<i64>,
    /// Requests of the decode, in row order.
    pub decode_ids: Vec<i64>,
    /// Requests dropped because they were cancelled, ascending.
    pub cancelled: Vec<i64>,
    /// Requests dropped because their deadline has passed, earliest first.
    pub expired: Vec<i64>,
    /// Tables of the prefill.
    pub prefill: Option<StepTables>,
    /// Tables of the decode.
    pub decode: Option<StepTables>,
}

/// A request in a step.
#[derive(Debug)]
struct Member<'a> {
    request: &'a Request,
    held: &'a Held,
    /// Prompt tokens that a prefill takes.
    tokens: usize,
    /// What its queries see.
    blocks: Cow<'a, [Block]>,
}

/// Prompt tokens that a step takes at least, however many rows decode.
const LEAST_PREFILL: usize = 64;

impl Scheduler {
    /// Plans the next step, at `now` microseconds of the caller's clock, and writes its tables into `out`.
    ///
    /// # Errors
    /// [`Error::Capacity`] if `out` is shorter than [`Scheduler::buffer_len`]; [`Error::State`] if the last step was not committed, or a
    /// request has used its `max_new` steps. Nothing has changed then.
    pub fn plan_step(&mut self, now: i64, out: &mut [i32]) -> Result<StepHeader> {
        self.check_step(out.len(), now)?;
        let mut header = StepHeader::default();
        self.drop_ended(now, &mut header);
        self.admit(&mut header);
        let decoding: Vec<(i64, usize)> = self.decoding.values().map(|id| (*id, 0)).collect();
        let prefill = self.choose_prefill(decoding.len());
        header.decode_ids = decoding.iter().map(|(id, _)| *id).collect();
        header.prefill_ids = prefill.iter().map(|(id, _)| *id).collect();
        let mut tables = std::mem::take(&mut self.scratch);
        tables.clear();
        header.prefill = self.tables(&prefill, &mut tables, false, push_prefill);
        let padded = self.limits.decode.padded;
        header.decode = self.tables(&decoding, &mut tables, padded, push_decode);
        let Some(out) = out.get_mut(..tables.data.len()) else {
            let text = "internal error: buffer_len was too small for a step; please report it";
            return Err(Error::State(text.to_owned()));
        };
        out.copy_from_slice(&tables.data);
        self.scratch = tables;
        if header.prefill.is_some() || header.decode.is_some() {
            self.in_flight = Some((prefill, header.decode_ids.clone()));
        }
        Ok(header)
    }

    fn check_step(&self, len: usize, now: i64) -> Result<()> {
        let needed = self.buffer_len();
        if len < needed {
            return Err(Error::Capacity(format!(
                "out holds {len} int32: expected at least {needed}; make it buffer_len long"
            )));
        }
        if self.in_flight.is_some() {
            return Err(Error::State(
                "the last step is not committed: expected commit after each plan_step; call it first".to_owned(),
            ));
        }
        for id in self.decoding.values().filter(|id| !self.cancelled.contains(id)) {
            if let Some((request, held)) = self.member(*id)
                && held.steps >= request.max_new
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

    fn member(&self, id: i64) -> Option<(&Request, &Held)> {
        let entry = self.requests.get(&id)?;
        match &entry.phase {
            Phase::Admitted(held) => Some((&entry.request, held)),
            Phase::Waiting => None,
        }
    }

    /// Ready requests in order of admission with the prompt tokens that they take, within what `rows` decode rows leave of the step's
    /// tokens, then ordered by prefixes. A prompt is cut only if it comes first, and a cut one comes first: there is at most one.
    fn choose_prefill(&self, rows: usize) -> Vec<(i64, usize)> {
        let most = self.limits.max_batched_tokens;
        let mut left = most.saturating_sub(rows).max(LEAST_PREFILL.min(most));
        let mut chosen = Vec::new();
        let begun = |wanted: bool| {
            self.admitted.iter().filter_map(move |(admission, id)| {
                let (request, held) = self.member(*id)?;
                let ready = (held.filled > 0) == wanted && self.residency.are_ready(&request.prefixes);
                ready.then_some((admission, *id, request, held))
            })
        };
        for (admission, id, request, held) in begun(true).chain(begun(false)) {
            let missing = request.prompt_len - held.filled;
            if left == 0 || missing > left && !chosen.is_empty() {
                break;
            }
            let tokens = missing.min(left);
            left -= tokens;
            chosen.push((&request.prefixes, admission, id, tokens));
        }
        chosen.sort_unstable();
        chosen.into_iter().map(|(_, _, id, tokens)| (id, tokens)).collect()
    }

    /// `padded`: with the views of all prefixes and not of the step's own, so that the layout seldom changes.
    fn tables(
        &self,
        ids: &[(i64, usize)],
        tables: &mut Tables,
        padded: bool,
        push: impl Fn(&Self, &mut Tables, &[Member<'_>]) -> i32,
    ) -> Option<StepTables> {
        if ids.is_empty() {
            return None;
        }
        let found = ids.iter().filter_map(|&(id, tokens)| {
            let (request, held) = self.member(id)?;
            Some(Member {
                request,
                held,
                tokens,
                blocks: Cow::Borrowed(&held.blocks),
            })
        });
        let mut members: Vec<Member<'_>> = found.collect();
        let all = self.sets.views();
        let views = if padded || all.of_layer().is_empty() {
            Cow::Borrowed(all)
        } else {
            let blocks = members.iter().flat_map(|member| &member.held.blocks);
            let mut sets: Vec<usize> = blocks.map(|block| block.set).collect();
            sets.sort_unstable();
            sets.dedup();
            Cow::Owned(self.sets.views_of(&sets))
        };
        let mut made = StepTables {
            views: Vec::with_capacity(views.count()),
            view_of: views.of_layer().to_vec(),
            reach: 0,
        };
        for view in 0..views.count() {
            if !made.view_of.is_empty() {
                for member in &mut members {
                    member.blocks = self.sets.visible(&views, view, &member.held.blocks);
                }
            }
            made.reach = push(self, tables, &members).max(made.reach);
            made.views.push(std::mem::take(&mut tables.sections));
        }
        Some(made)
    }
}

fn push_prefill(scheduler: &Scheduler, tables: &mut Tables, members: &[Member<'_>]) -> i32 {
    let sequences: Vec<Sequence<'_>> = members
        .iter()
        .map(|member| Sequence {
            context: int(member.held.filled),
            len: int(member.tokens),
            pos_start: member.held.pos_start,
            blocks: &member.blocks,
        })
        .collect();
    let reach = push_packed(
        tables,
        &sequences,
        Tiles {
            tokens: scheduler.limits.tile_rows,
            ..Tiles::default()
        },
        scheduler.limits.buckets,
    );
    let chunk = |member: &Member<'_>| {
        [
            int(member.held.rows.start),
            int(member.request.beams),
            int(member.held.filled),
            int(member.tokens),
        ]
    };
    tables.push_rows("chunk", members.iter().map(chunk));
    tables.push(
        "slots",
        members
            .iter()
            .flat_map(|member| member.held.slots(member.held.filled, member.tokens)),
    );
    let fill = members.iter().flat_map(|Member { held, tokens, .. }| {
        let rows = held.rows.start..held.rows.start + held.rows.len;
        rows.flat_map(move |row| {
            let slots = held.slots(held.filled, *tokens);
            (int(held.filled)..)
                .zip(slots)
                .map(move |(position, slot)| [int(row), position, slot])
        })
    });
    tables.push_rows("fill", fill);
    let continued = members.iter().any(|member| member.held.filled > 0);
    let cached = members.iter().filter(|_| continued);
    tables.push(
        "key_slots",
        cached.flat_map(|Member { held, tokens, .. }| held.slots(0, held.filled + tokens)),
    );
    let ended = |member: &Member<'_>| member.held.filled + member.tokens == member.request.prompt_len;
    let last = firsts(&sequences)
        .into_iter()
        .zip(members)
        .filter(|(_, member)| ended(member))
        .map(|(first, member)| first + int(member.tokens) - 1);
    tables.push("logits_idx", last.collect::<Vec<_>>());
    reach
}

fn push_decode(scheduler: &Scheduler, tables: &mut Tables, members: &[Member<'_>]) -> i32 {
    let beams = || {
        members
            .iter()
            .flat_map(|member| (0..member.request.beams).map(move |beam| (member, beam)))
    };
    let len = |member: &Member<'_>| int(member.request.prompt_len + member.held.steps + 1);
    tables.push("row", beams().map(|(member, beam)| int(member.held.rows.start + beam)));
    let slot = |(Member { request, held, .. }, beam): (&Member<'_>, usize)| {
        let token = request.prompt_len + beam * request.max_new + held.steps;
        held.slots(token, 1).next().unwrap_or(0)
    };
    tables.push("slot", beams().map(slot));
    tables.push("lens", beams().map(|(member, _)| len(member)));
    tables.push(
        "position_ids",
        beams().map(|(member, _)| len(member) - 1 + member.held.pos_start),
    );
    let queries: Vec<Queries<'_>> = beams()
        .enumerate()
        .map(|(row, (member, _))| Queries {
            first: int(row),
            rows: 1,
            position: len(member) - 1,
            blocks: &member.blocks,
        })
        .collect();
    push_uses(tables, &queries);
    let limits = &scheduler.limits;
    let dead = Dead {
        row: limits.max_rows,
        slot: limits.arena_rows - 1,
    };
    let most = (limits.max_rows, scheduler.most.prefixes);
    push_decode_work(tables, &limits.decode, most, dead);
    members
        .iter()
        .map(|member| len(member) + rows(&member.blocks))
        .max()
        .unwrap_or(0)
}
