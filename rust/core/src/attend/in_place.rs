//! Attention of a few rows over a chunk in place, without a copy.

use super::key_copy::{ChunkOffsets, KvMemory};
use super::memory::SharedMemory;
use super::online_softmax::ChunkView;
use super::state::{BlockUser, CACHE_LINE, TaskState};
use super::tile::{SCORED_KEYS, add_tile, score_tile, set_queries, weigh_tile};
use super::vector::{Element, SimdOps};

/// Largest number of rows that read a chunk in place together.
pub(super) const ROWS_IN_PLACE: usize = 4;

/// Number of rows by which the prefetch runs ahead.
const ROWS_AHEAD: usize = 8;

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
    let (heads, head_dim, vectors) = (state.heads.clone(), state.head_dim, state.head_vectors);
    let (per_head, count) = (users.len() * state.group_size, current.len());
    let (first_column, row_vectors) = (heads.start * head_dim, heads.len() * vectors);
    // SAFETY: the offsets are those of rows of the plan (`ChunkOffsets`), and `attend_chunk` calls this function only
    // for head dims that are multiples of `LANES`, so that the task's heads have `row_vectors` vectors.
    let (keys, values) = unsafe {
        (
            ChunkView::in_place(memory.keys, current, first_column),
            ChunkView::in_place(memory.values, current, first_column),
        )
    };
    set_queries(state, users, 0..heads.len(), start);
    for j in (0..count).step_by(SCORED_KEYS) {
        let ahead = rows_ahead::<K, SCORED_KEYS>(j, (memory.keys, current), (memory.values, current), first_column);
        let mut rows = [keys.row(j, row_vectors); SCORED_KEYS]; // beyond the end of the chunk the last key is repeated
        for (t, row) in rows.iter_mut().enumerate() {
            *row = keys.row((j + t).min(count - 1), row_vectors);
        }
        for h in 0..heads.len() {
            prefetch(simd, &ahead, (h * head_dim, head_dim));
            let rows = (&rows, h * vectors);
            for_tiles!(S, per_head, n => score_tile::<S, K>(simd, state, h * per_head + n, rows, j));
        }
    }
    let queries = heads.len() * per_head;
    for_tiles!(S, queries, n => weigh_tile::<S>(simd, state, n, count));
    for j in (0..count).step_by(WEIGHTED_KEYS) {
        let ahead = rows_ahead::<K, WEIGHTED_KEYS>(j, (memory.values, current), (memory.keys, next), first_column);
        let mut rows = [values.row(j, row_vectors); WEIGHTED_KEYS];
        let rows = &mut rows[..WEIGHTED_KEYS.min(count - j)];
        for (t, row) in rows.iter_mut().enumerate() {
            *row = values.row(j + t, row_vectors);
        }
        for h in 0..heads.len() {
            prefetch(simd, &ahead, (h * head_dim, head_dim));
            let rows = (&*rows, h * vectors);
            for_tiles!(S, per_head, n => add_tile::<S, K>(simd, state, h * per_head + n, rows, j));
        }
    }
}

/// Addresses of `N` rows that are read [`ROWS_AHEAD`] rows after row `j` of a chunk. Where there are none, they are
/// null.
///
/// * `this`: memory and offsets of the chunk.
/// * `then`: memory and offsets of what is read after it.
/// * `column`: element of a row.
#[inline(always)]
fn rows_ahead<K: Element, const N: usize>(
    j: usize,
    this: (SharedMemory<'_, K>, &[usize]),
    then: (SharedMemory<'_, K>, &[usize]),
    column: usize,
) -> [*const K; N] {
    let mut rows = [std::ptr::null(); N];
    for (t, row) in rows.iter_mut().enumerate() {
        let index = j + t + ROWS_AHEAD;
        if let Some(offset) = this.1.get(index) {
            *row = this.0.address(offset + column);
        } else if let Some(offset) = then.1.get(index - this.1.len()) {
            *row = then.0.address(offset + column);
        }
    }
    rows
}

/// Prefetches some elements of rows.
#[inline(always)]
fn prefetch<S: SimdOps, K: Element>(simd: S, rows: &[*const K], (first, count): (usize, usize)) {
    for row in rows {
        for element in (0..count).step_by(CACHE_LINE / size_of::<K>()) {
            simd.prefetch(row.wrapping_add(first + element));
        }
    }
}
