//! Upper bound of the length of a step's table buffer.

use super::super::table_buffer::ALIGN;
use super::placement::MAX_ENCODER_RUNS;
use super::sites::Site;
use super::{Request, Scheduler, SchedulerConfig};

/// Upper bound of the number of tables of a prefill and a decode of one site together. Each table may leave a gap
/// before it.
const MAX_SECTIONS: usize = 40;

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
        let entries = self.maxima.entries(&self.config);
        let views = |site| self.layer_sets.at(site).views().count();
        let decoder = entries.decoder.saturating_mul(views(Site::Decoder));
        if !self.has_encoder() {
            return decoder;
        }
        sum([
            decoder,
            entries.encoder.saturating_mul(views(Site::Encoder)),
            entries.cross.saturating_mul(views(Site::Cross)),
        ])
    }
}

/// int32 entries that the tables of one view never exceed in any step.
struct MaxEntries {
    /// Prefill and decode of the decoder's self-attention.
    decoder: usize,
    /// Prefill of the encoder.
    encoder: usize,
    /// Prefill and decode of cross-attention.
    cross: usize,
}

impl RequestMaxima {
    pub(super) fn update(&mut self, request: &Request) {
        self.prompt_len = self.prompt_len.max(request.prompt_len);
        self.beams = self.beams.max(request.beams);
        self.prefixes = self.prefixes.max(request.prefixes.len());
    }

    /// int32 entries that the tables of one view of each site never exceed in any step. The result saturates.
    pub(super) fn buffer_len(&self, config: &SchedulerConfig, has_encoder: bool) -> usize {
        let MaxEntries {
            decoder,
            encoder,
            cross,
        } = self.entries(config);
        sum([decoder]
            .into_iter()
            .chain([encoder, cross].into_iter().filter(|_| has_encoder)))
    }

    fn entries(&self, config: &SchedulerConfig) -> MaxEntries {
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
        let packed = sum([6 * segments, block_tables(prefixes, segments, tokens), tokens, tiles]);
        // Per sequence: chunk 4, logits_idx 1. Per token: scatter, slots, and fill 3 per beam. key_slots: the one
        // prompt that is split over steps, and the other tokens.
        let prefill = sum([
            packed,
            5 * sequences,
            3 * tokens + self.prompt_len,
            tokens.saturating_mul(3 * self.beams),
            padded_tokens,
        ]);
        // Per row: row, slot, lens, position_ids, use_indptr. The encoder rows of a request are up to
        // `MAX_ENCODER_RUNS` more blocks.
        let decode = |blocks: usize| {
            sum([
                5 * config.max_rows,
                block_tables(blocks, config.max_rows, config.max_rows),
                config.decode.max_entries(config.max_rows, blocks),
            ])
        };
        let fixed = MAX_SECTIONS * ALIGN + 4;
        MaxEntries {
            decoder: sum([fixed, 2 * config.buckets, prefill, decode(prefixes)]),
            encoder: sum([fixed, packed]),
            cross: sum([fixed, packed, tokens, decode(prefixes + MAX_ENCODER_RUNS)]),
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
