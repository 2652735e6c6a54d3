//! Tables of a step's prefill and decode, once per view.

use std::borrow::Cow;

use super::super::block_tables::{PrefixBlock, QueryRun, push_block_tables};
use super::super::decode::{PaddingRow, StepBounds, push_decode_work};
use super::super::int32::to_i32;
use super::super::place::Positions;
use super::super::plan::{Keys, Sequence, TileSizes, first_rows, num_rows, push_packed};
use super::super::table_buffer::TableBuffer;
use super::placement::MAX_ENCODER_RUNS;
use super::request::{Request, RunningState};
use super::sites::Site;
use super::step::{ScheduledRequest, StepTables};
use super::{Scheduler, UNIT};

/// A request of a step with everything that its tables depend on.
#[derive(Debug)]
pub(super) struct Member<'a> {
    request: &'a Request,
    state: &'a RunningState,
    /// Number of prompt tokens of the prefill.
    tokens: usize,
    /// Blocks that its queries see in the current view.
    blocks: Cow<'a, [PrefixBlock]>,
}

impl Scheduler {
    /// Adds the tables of all views, or nothing and returns `None` if there are no requests.
    ///
    /// * `site`: kind of attention, whose prefix rows the members see.
    /// * `all_prefixes`: whether to make the views of all registered prefixes instead of those of the step's own, so
    ///   that the layout of the tables seldom changes.
    /// * `push`: function that adds the tables of one view and returns their reach.
    pub(super) fn push_views(
        &self,
        requests: &[ScheduledRequest],
        tables: &mut TableBuffer,
        site: Site,
        all_prefixes: bool,
        push: impl Fn(&Self, &mut TableBuffer, &[Member<'_>]) -> i32,
    ) -> Option<StepTables> {
        if requests.is_empty() {
            return None;
        }
        let found = requests.iter().filter_map(|&ScheduledRequest { id, tokens }| {
            let (request, state) = self.running(id)?;
            Some(Member {
                request,
                state,
                tokens,
                blocks: Cow::Borrowed(state.blocks.at(site)),
            })
        });
        let mut members: Vec<Member<'_>> = found.collect();
        let layer_sets = self.layer_sets.at(site);
        let all_views = layer_sets.views();
        let views = if all_prefixes || all_views.of_layer().is_empty() {
            Cow::Borrowed(all_views)
        } else {
            let blocks = members.iter().flat_map(|member| member.state.blocks.at(site));
            let mut sets: Vec<usize> = blocks.map(|block| block.layer_set).collect();
            sets.sort_unstable();
            sets.dedup();
            Cow::Owned(layer_sets.views_of(&sets))
        };
        let mut out = StepTables {
            views: Vec::with_capacity(views.count()),
            view_of: views.of_layer().to_vec(),
            reach: 0,
        };
        for view in 0..views.count() {
            if !out.view_of.is_empty() {
                for member in &mut members {
                    member.blocks = layer_sets.visible(&views, view, member.state.blocks.at(site));
                }
            }
            out.reach = push(self, tables, &members).max(out.reach);
            out.views.push(std::mem::take(&mut tables.sections));
        }
        Some(out)
    }

    /// Query tiles of a prefill.
    fn query_tiles(&self) -> TileSizes {
        TileSizes {
            queries: self.config.tile_rows,
            ..TileSizes::default()
        }
    }

    /// Adds the work tables of a decode whose rows see at most `blocks` blocks each.
    fn push_work(&self, tables: &mut TableBuffer, blocks: usize) {
        let config = &self.config;
        let padding = PaddingRow {
            row: config.max_rows,
            slot: config.arena_rows - 1,
        };
        let bounds = StepBounds {
            rows: config.max_rows,
            blocks,
        };
        push_decode_work(tables, &config.decode, bounds, padding);
    }
}

/// Adds the tables of a packed forward, and `chunk`, `slots`, `fill`, `key_slots` and `logits_idx`. Returns the reach.
pub(super) fn push_prefill(scheduler: &Scheduler, tables: &mut TableBuffer, members: &[Member<'_>]) -> i32 {
    let sequences: Vec<Sequence<'_>> = members
        .iter()
        .map(|member| Sequence {
            context: to_i32(member.state.prefilled),
            len: to_i32(member.tokens),
            keys: Keys::Own,
            positions: member.state.positions,
            blocks: &member.blocks,
        })
        .collect();
    let reach = push_packed(
        tables,
        &sequences,
        scheduler.query_tiles(),
        Some(scheduler.config.buckets),
    );
    let chunk = |member: &Member<'_>| {
        [
            to_i32(member.state.decode_rows.start),
            to_i32(member.request.beams),
            to_i32(member.state.prefilled),
            to_i32(member.tokens),
        ]
    };
    tables.push_rows("chunk", members.iter().map(chunk));
    tables.push(
        "slots",
        members
            .iter()
            .flat_map(|member| member.state.slots(member.state.prefilled, member.tokens)),
    );
    let fill = members.iter().flat_map(|Member { state, tokens, .. }| {
        let rows = state.decode_rows.start..state.decode_rows.start + state.decode_rows.len;
        rows.flat_map(move |row| {
            let slots = state.slots(state.prefilled, *tokens);
            (to_i32(state.prefilled)..)
                .zip(slots)
                .map(move |(position, slot)| [to_i32(row), position, slot])
        })
    });
    tables.push_rows("fill", fill);
    // If every prompt starts in this step, the kernel reads the packed keys of the forward and needs no slots.
    let reads_arena = members.iter().any(|member| member.state.prefilled > 0);
    let cached = members.iter().filter(|_| reads_arena);
    tables.push(
        "key_slots",
        cached.flat_map(|Member { state, tokens, .. }| state.slots(0, state.prefilled + tokens)),
    );
    let ends = |member: &Member<'_>| member.state.prefilled + member.tokens == member.request.prompt_len;
    let last_rows = first_rows(&sequences)
        .into_iter()
        .zip(members)
        .filter(|(_, member)| ends(member))
        .map(|(first, member)| first + to_i32(member.tokens) - 1);
    tables.push("logits_idx", last_rows.collect::<Vec<_>>());
    reach
}

/// Adds the tables of the encoder of a prefill, whose positions count from 0. Returns the reach.
pub(super) fn push_encoder(scheduler: &Scheduler, tables: &mut TableBuffer, members: &[Member<'_>]) -> i32 {
    let sequences: Vec<Sequence<'_>> = members
        .iter()
        .map(|member| Sequence {
            context: 0,
            len: to_i32(member.request.encoder_len),
            keys: Keys::Own,
            positions: Positions::default(),
            blocks: &member.blocks,
        })
        .collect();
    push_packed(tables, &sequences, scheduler.query_tiles(), None)
}

/// Adds the tables of the cross-attention of a prefill, and `slots`, the arena rows of the encoder's tokens. Returns
/// the reach.
pub(super) fn push_cross(scheduler: &Scheduler, tables: &mut TableBuffer, members: &[Member<'_>]) -> i32 {
    let sequences: Vec<Sequence<'_>> = members
        .iter()
        .map(|member| Sequence {
            context: 0,
            len: to_i32(member.tokens),
            keys: Keys::Given(to_i32(member.request.encoder_len)),
            positions: member.state.positions,
            // The last blocks are those of the encoder rows, which this forward writes.
            blocks: &member.blocks[..member.blocks.len() - member.state.encoder_runs.len()],
        })
        .collect();
    let reach = push_packed(tables, &sequences, scheduler.query_tiles(), None);
    let slots = members.iter().flat_map(|Member { request, state, .. }| {
        let runs = state.encoder_runs.iter();
        let rows = runs.flat_map(|run| run.start * UNIT..(run.start + run.len) * UNIT);
        rows.take(request.encoder_len).map(to_i32)
    });
    tables.push("slots", slots);
    reach
}

/// Adds `row`, `lens`, the block tables and the work tables of the cross-attention of a decode. No row has keys besides
/// its blocks, the last of which are those of its encoder rows. Returns the reach.
pub(super) fn push_decode_cross(scheduler: &Scheduler, tables: &mut TableBuffer, members: &[Member<'_>]) -> i32 {
    let rows = members.iter().flat_map(|Member { request, state, .. }| {
        let first = state.decode_rows.start;
        (first..first + request.beams).map(to_i32)
    });
    tables.push("row", rows);
    let count = members.iter().map(|member| member.request.beams).sum();
    tables.push("lens", std::iter::repeat_n(0, count));
    let blocks = members
        .iter()
        .flat_map(|member| (0..member.request.beams).map(|_| &*member.blocks));
    let queries: Vec<QueryRun<'_>> = (0..)
        .zip(blocks)
        .map(|(first, blocks)| QueryRun {
            first,
            rows: 1,
            position: 0,
            blocks,
        })
        .collect();
    push_block_tables(tables, &queries);
    scheduler.push_work(tables, scheduler.maxima.prefixes + MAX_ENCODER_RUNS);
    members.iter().map(|member| num_rows(&member.blocks)).max().unwrap_or(0)
}

/// Adds `row`, `slot`, `lens`, `position_ids`, the block tables and the work tables of a decode. Returns the reach.
pub(super) fn push_decode(scheduler: &Scheduler, tables: &mut TableBuffer, members: &[Member<'_>]) -> i32 {
    let beams = || {
        members
            .iter()
            .flat_map(|member| (0..member.request.beams).map(move |beam| (member, beam)))
    };
    let len = |member: &Member<'_>| to_i32(member.request.prompt_len + member.state.decode_steps + 1);
    tables.push(
        "row",
        beams().map(|(member, beam)| to_i32(member.state.decode_rows.start + beam)),
    );
    let slot = |(Member { request, state, .. }, beam): (&Member<'_>, usize)| {
        let token = request.prompt_len + beam * request.max_new + state.decode_steps;
        state.slots(token, 1).next().unwrap_or(0)
    };
    tables.push("slot", beams().map(slot));
    tables.push("lens", beams().map(|(member, _)| len(member)));
    tables.push(
        "position_ids",
        beams().map(|(member, _)| member.state.positions.at(len(member) - 1)),
    );
    let queries: Vec<QueryRun<'_>> = beams()
        .enumerate()
        .map(|(row, (member, _))| QueryRun {
            first: to_i32(row),
            rows: 1,
            position: len(member) - 1,
            blocks: &member.blocks,
        })
        .collect();
    push_block_tables(tables, &queries);
    scheduler.push_work(tables, scheduler.maxima.prefixes);
    members
        .iter()
        .map(|member| len(member) + num_rows(&member.blocks))
        .max()
        .unwrap_or(0)
}
