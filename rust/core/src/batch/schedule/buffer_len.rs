//! Upper bound of the length of a step's table buffer.

use super::super::table_buffer::ALIGN;
use super::placement::MAX_ENCODER_RUNS;
use super::sites::{SITES, Site};
use super::{Request, Scheduler, SchedulerConfig};

/// Upper bound of the number of tables of a prefill and a decode of one site together. Each table may leave a gap
/// before it.
const MAX_SECTIONS: usize = 40;
/// int32 entries of a work item of a decode.
const WORK_ITEM: usize = 6;

/// Largest sizes of all requests so far.
#[derive(Debug, Clone, Default)]
pub(super) struct RequestMaxima {
    prompt_len: usize,
    beams: usize,
    pub(super) prefixes: usize,
}

/// int32 entries of the block tables of `segments` segments, rows or both with `tokens` tokens, which see at most
/// `blocks` blocks each.
fn block_tables(blocks: usize, segments: usize, tokens: usize) -> usize {
    // Per block use: use 3, block 2, user_indptr 1, span 3, and per token of the use: user, user_pos, user_slides.
    blocks.saturating_mul(9 * segments + 3 * tokens)
}

fn sum(parts: impl IntoIterator<Item = usize>) -> usize {
    parts.into_iter().fold(0, usize::saturating_add)
}

impl Scheduler {
    /// Number of int32 entries that suffice for the next step.
    ///
    /// It grows with the largest requests so far and with the number of views of the registered prefixes.
    #[must_use]
    pub fn buffer_len(&self) -> usize {
        let entries = |site: Site| {
            let layer_sets = self.layer_sets.at(site);
            let (views, shared) = (layer_sets.views().count(), layer_sets.max_views_of_a_set());
            self.maxima.entries(&self.config, site).of_views(views, shared)
        };
        let sites = SITES.into_iter().take(if self.has_encoder() { SITES.len() } else { 1 });
        sum(sites.map(entries))
    }
}

/// int32 entries that the tables of a site never exceed in any step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct MaxEntries {
    /// Entries of a view that no prefix adds to.
    view: usize,
    /// Entries of a view in which all prefixes of all requests lie, beyond those of `view`.
    prefixes: usize,
}

impl MaxEntries {
    /// Entries of `views` views if a prefix lies in at most `shared` of them.
    ///
    /// A prefix adds the same number of entries to each view in which it lies, and none to the others. The entries of
    /// all prefixes in all views are therefore at most `shared` times those in one view. A step that leaves some layer
    /// sets out has coarser views. A prefix does not lie in more of them, because each of its coarser views contains a
    /// finer one in which it lies. The number of work items of a decode is rounded up in each view.
    fn of_views(self, views: usize, shared: usize) -> usize {
        let all = sum([self.view, self.prefixes]).saturating_mul(views);
        let split = [
            self.view.saturating_mul(views),
            self.prefixes.saturating_mul(shared),
            views * WORK_ITEM,
        ];
        all.min(sum(split))
    }
}

impl RequestMaxima {
    pub(super) fn update(&mut self, request: &Request) {
        self.prompt_len = self.prompt_len.max(request.prompt_len);
        self.beams = self.beams.max(request.beams);
        self.prefixes = self.prefixes.max(request.prefixes.len());
    }

    /// int32 entries that the tables of one view of each site never exceed in any step. The result saturates.
    pub(super) fn buffer_len(&self, config: &SchedulerConfig, has_encoder: bool) -> usize {
        let sites = SITES.into_iter().take(if has_encoder { SITES.len() } else { 1 });
        sum(sites.map(|site| self.entries(config, site).of_views(1, 1)))
    }

    fn entries(&self, config: &SchedulerConfig, site: Site) -> MaxEntries {
        let tokens = self.prompt_len.max(config.max_batched_tokens);
        let sequences = tokens.min(config.max_rows);
        // A sequence with an infix has two.
        let segments = 2 * sequences;
        let padded_tokens = tokens
            .saturating_mul(ceil_root(tokens, config.buckets))
            .min(tokens.saturating_mul(sequences));
        let prefixes = self.prefixes;
        let tiles = tokens
            .checked_div(config.tile_rows)
            .map_or(0, |tiles| 2 * (tiles + segments));
        // Per segment: seg 4, seg_pos 1, use_indptr 1. Per token: position_ids.
        let packed = sum([6 * segments, tokens, tiles]);
        let packed_blocks = block_tables(prefixes, segments, tokens);
        // Per sequence: chunk 4, logits_idx 1. Per token: scatter, slots, and fill 3 per beam. key_slots: the one
        // prompt that is split over steps, and the other tokens.
        let prefill = sum([
            packed,
            5 * sequences,
            3 * tokens + self.prompt_len,
            tokens.saturating_mul(3 * self.beams),
            padded_tokens,
        ]);
        // Per row: row, slot, lens, position_ids, use_indptr.
        let decode = |blocks: usize| {
            sum([
                5 * config.max_rows,
                block_tables(blocks, config.max_rows, config.max_rows),
                config.decode.max_entries(config.max_rows, blocks),
            ])
        };
        // Padded tables have the same size in all views.
        let decode = |own: usize| {
            let view = decode(if config.decode.padded { own + prefixes } else { own });
            [view, decode(own + prefixes).saturating_sub(view)]
        };
        let (packed, [decode_view, decode_prefixes]) = match site {
            Site::Decoder => (sum([prefill, 2 * config.buckets]), decode(0)),
            // The blocks of a request's encoder rows lie in every view.
            Site::Cross => (sum([packed, tokens]), decode(MAX_ENCODER_RUNS)),
            Site::Encoder => (packed, [0, 0]),
        };
        MaxEntries {
            view: sum([MAX_SECTIONS * ALIGN + 4, packed, decode_view]),
            prefixes: sum([packed_blocks, decode_prefixes]),
        }
    }
}

/// Smallest integer whose `degree`-th power is at least `value`.
///
/// It bounds the padding of `degree` length buckets. With borders at its powers, padding multiplies the number of
/// tokens by at most this factor, and the best borders are no worse.
fn ceil_root(value: usize, degree: usize) -> usize {
    let degree = u32::try_from(degree).unwrap_or(u32::MAX);
    let (mut low, mut high) = (1, value.max(1));
    while low < high {
        let middle = usize::midpoint(low, high);
        if middle.saturating_pow(degree) >= value {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::ceil_root;

    #[test]
    fn roots_round_up() {
        assert_eq!(
            [
                ceil_root(8192, 4),
                ceil_root(10_000, 4),
                ceil_root(10_001, 4),
                ceil_root(1, 4),
                ceil_root(7, 1)
            ],
            [10, 10, 11, 1, 7]
        );
    }
}
