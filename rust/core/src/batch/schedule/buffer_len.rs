//! How long a step's buffer can get.

use super::super::table_buffer::ALIGN;
use super::{Limits, Request};

/// Sections of a prefill and a decode together, rounded up: each may leave a gap before it.
const SECTIONS: usize = 40;

/// The largest requests seen.
#[derive(Debug, Clone, Default)]
pub(super) struct Most {
    prompt_len: usize,
    beams: usize,
    pub(super) prefixes: usize,
}

impl Most {
    pub(super) fn see(&mut self, request: &Request) {
        self.prompt_len = self.prompt_len.max(request.prompt_len);
        self.beams = self.beams.max(request.beams);
        self.prefixes = self.prefixes.max(request.prefixes.len());
    }

    /// int32 entries that no view of a step exceeds; saturates.
    pub(super) fn buffer_len(&self, limits: &Limits) -> usize {
        let tokens = self.prompt_len.max(limits.max_batched_tokens);
        let sequences = tokens.min(limits.max_rows);
        let places = tokens
            .saturating_mul(root(tokens, limits.buckets))
            .min(tokens.saturating_mul(sequences));
        let uses = self.prefixes;
        let tiles = tokens
            .checked_div(limits.tile_rows)
            .map_or(0, |tiles| 2 * (tiles + sequences));
        // By sequence: seg 4, seg_pos, use_indptr, chunk 4, logits_idx; by use: use 3, block 2, user_indptr, span 3, then 3 by token; by
        // token: scatter, position_ids, slots, and fill 3 by beam; key_slots: the one prompt that is cut, and the other tokens.
        let by_use = |queries: usize, tokens: usize| uses.saturating_mul(9 * queries + 3 * tokens);
        let prefill = [
            11 * sequences,
            by_use(sequences, tokens),
            4 * tokens + self.prompt_len,
            tokens.saturating_mul(3 * self.beams),
            places,
            tiles,
        ];
        // By row: row, slot, lens, position_ids, use_indptr.
        let decode = [
            5 * limits.max_rows,
            by_use(limits.max_rows, limits.max_rows),
            limits.decode.len(limits.max_rows, uses),
        ];
        let fixed = SECTIONS * ALIGN + 2 * limits.buckets + 4;
        prefill.into_iter().chain(decode).fold(fixed, usize::saturating_add)
    }
}

/// The least whole number whose `degree`-th power is at least `value`: with cuts at its powers, padding multiplies tokens by at most this, and
/// the best cuts are no worse.
fn root(value: usize, degree: usize) -> usize {
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
    use super::root;

    #[test]
    fn roots_round_up() {
        assert_eq!(
            [root(8192, 4), root(10_000, 4), root(10_001, 4), root(1, 4), root(7, 1)],
            [10, 10, 11, 1, 7]
        );
    }
}
