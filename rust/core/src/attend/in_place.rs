//! Attention of a few rows over a chunk in place, without a copy.

use super::key_copy::{ChunkOffsets, KvMemory, prefetch_ahead};
use super::online_softmax::ChunkView;
use super::state::{BlockUser, TaskState};
use super::tile::{SCORED_KEYS, add_tile, score_tile, set_queries, weigh_tile};
use super::vector::{Element, SimdOps};

/// Largest number of rows that read a chunk in place together.
pub(super) const ROWS_IN_PLACE: usize = 4;

/// Values that are read together.
const WEIGHTED_KEYS: usize = 8;

/// Calls a function of tiles of queries for `$count` queries, `$n` being the first query of a tile. With AVX-512, the
/// results of four queries fit in half of the registers.
macro_rules! for_tiles {
    ($simd:ty, $count:expr, $n:ident => $function:ident::<$($types:ty),*>($($argument:expr),*)) => {{
        let mut $n = 0;
        while $n < $count {
            $n += match $count - $n {
                4.. if <$simd>::NUM_REGISTERS >= 32 => $function::<$($types,)* 4>($($argument),*),
                3 if <$simd>::NUM_REGISTERS >= 32 => $function::<$($types,)* 3>($($argument),*),
                2 if <$simd>::NUM_REGISTERS >= 32 => $function::<$($types,)* 2>($($argument),*),
                _ => $function::<$($types,)* 1>($($argument),*),
            };
        }
    }};
}

/// Attention of the queries of `users`, all of which see all keys of the chunk.
///
/// A few keys at a time are read for all heads, so that memory is read in order, and those that follow are prefetched.
///
/// * `start`: index of the chunk's first key in its block.
#[inline(always)]
pub(super) fn attend_in_place<S: SimdOps, K: Element>(
    simd: S,
    state: &mut TaskState<'_>,
    memory: KvMemory<'_, K>,
    ChunkOffsets { current, next }: ChunkOffsets<'_>,
    start: usize,
    users: &[BlockUser],
) {
    let (heads, head_dim) = (state.heads.clone(), state.head_dim);
    let (per_head, count) = (users.len() * state.group_size, current.len());
    let KvMemory { keys, values } = memory;
    set_queries(state, users, 0..heads.len(), start);
    for j in (0..count).step_by(SCORED_KEYS) {
        for h in 0..heads.len() {
            let head_offset = (heads.start + h) * head_dim;
            let rows = j..count.min(j + SCORED_KEYS);
            prefetch_ahead(simd, rows, (keys, current), (values, current), (head_offset, head_dim));
            // SAFETY: the offsets are those of rows of the plan (`ChunkOffsets`), and `attend_chunk` calls this
            // function only for head dims that are multiples of `LANES`, which have `head_vectors` vectors.
            let keys = unsafe { ChunkView::in_place(keys, current, head_offset) };
            for_tiles!(S, per_head, n => score_tile::<S, K>(simd, state, h * per_head + n, keys, j));
        }
    }
    let queries = heads.len() * per_head;
    for_tiles!(S, queries, n => weigh_tile::<S>(simd, state, n, count));
    for j in (0..count).step_by(WEIGHTED_KEYS) {
        let rows = j..count.min(j + WEIGHTED_KEYS);
        for h in 0..heads.len() {
            let head_offset = (heads.start + h) * head_dim;
            prefetch_ahead(simd, rows.clone(), (values, current), (keys, next), (head_offset, head_dim));
            // SAFETY: as for the keys.
            let values = unsafe { ChunkView::in_place(values, current, head_offset) };
            for_tiles!(S, per_head, n => add_tile::<S, K>(simd, state, h * per_head + n, values, rows.clone()));
        }
    }
}
