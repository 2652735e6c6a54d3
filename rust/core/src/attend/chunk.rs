//! Attention over one chunk of at most 64 keys, by all queries of a task that see the chunk.
//!
//! A single row reads the keys in place, and so do several rows with AVX-512, four at a time. Other rows read a copy in
//! fp32, so that each key is converted and fetched from memory once. Many queries read the copy in transposed form
//! (`transposed`).

use super::in_place::{ROWS_IN_PLACE, attend_in_place};
use super::key_copy::{ChunkOffsets, KvMemory, copy_chunk, prefetch_part, row_offsets};
use super::online_softmax::{CHUNK_KEYS, ChunkView};
use super::state::{BlockUser, TaskState};
use super::tile::{SCORED_KEYS, add_tile, score_tile, set_queries, weigh_tile};
use super::transposed;
use super::vector::{Element, LANES, SimdOps};

/// Attention of `users` over one chunk.
///
/// * `start`: index of the chunk's first key in its block.
#[inline(always)]
pub(super) fn attend_chunk<S: SimdOps, K: Element>(
    simd: S,
    state: &mut TaskState<'_>,
    memory: KvMemory<'_, K>,
    ChunkOffsets { current, next }: ChunkOffsets<'_>,
    start: usize,
    users: &[BlockUser],
) {
    if state.head_dim.is_multiple_of(LANES) {
        let sees_all = |u: &BlockUser| u.first_in_chunk(start) == 0;
        if S::NUM_REGISTERS >= 32 && users.iter().all(sees_all) {
            for users in users.chunks(ROWS_IN_PLACE) {
                attend_in_place(simd, state, memory, ChunkOffsets { current, next }, start, users);
            }
            return;
        }
        if let [user] = users {
            let first = user.first_in_chunk(start);
            if first < current.len() {
                let offsets = ChunkOffsets {
                    current: &current[first..],
                    next,
                };
                attend_in_place(simd, state, memory, offsets, start + first, users);
            }
            return;
        }
    }
    let parts = state.heads.len() * users.len();
    let copied = row_offsets(0, state.head_vectors * LANES);
    copy_chunk(simd, state, memory, current);
    for part in 0..parts {
        prefetch_part(simd, state, memory, next, part, parts);
        let user = users[part % users.len()];
        if user.first_in_chunk(start) < current.len() {
            let first = user.first_in_chunk(start);
            let copied = &copied[first..current.len()];
            attend_copied(simd, state, copied, part / users.len(), start + first, &user);
        }
    }
}

/// Attention over one chunk by transposed queries, all of which see the whole chunk.
///
/// * `query_vectors`: vectors of queries per kv head.
#[inline(always)]
pub(super) fn attend_chunk_transposed<S: SimdOps, K: Element>(
    simd: S,
    state: &mut TaskState<'_>,
    memory: KvMemory<'_, K>,
    ChunkOffsets { current, next }: ChunkOffsets<'_>,
    query_vectors: usize,
) {
    let copied = row_offsets(0, state.head_vectors * LANES);
    let parts = state.heads.len() * query_vectors;
    copy_chunk(simd, state, memory, current);
    for part in 0..parts {
        prefetch_part(simd, state, memory, next, part, parts);
        let [keys, values] = [&*state.copies[0], &*state.copies[1]];
        let offsets = &copied[..current.len()];
        let head_offset = part / query_vectors * CHUNK_KEYS * state.head_vectors * LANES;
        let keys = ChunkView::of_copy(keys, offsets, head_offset);
        let values = ChunkView::of_copy(values, offsets, head_offset);
        let softcap = state.softcap;
        transposed::attend_vector(simd, &mut state.transposed, part, softcap, keys, values);
    }
}

/// Attention of the queries of one row and kv head over keys of the copied chunk.
///
/// * `start`: index of the first of these keys in its block.
#[inline(always)]
fn attend_copied<S: SimdOps>(
    simd: S,
    state: &mut TaskState<'_>,
    offsets: &[usize],
    h: usize,
    start: usize,
    user: &BlockUser,
) {
    let (count, head_offset) = (offsets.len(), h * CHUNK_KEYS * state.head_vectors * LANES);
    let copies = std::mem::take(&mut state.copies); // put back below, `state` is borrowed as a whole meanwhile
    let keys = ChunkView::of_copy(copies[0], offsets, head_offset);
    let values = ChunkView::of_copy(copies[1], offsets, head_offset);
    set_queries(state, std::slice::from_ref(user), h..h + 1, start);
    let mut rows = [values.row(0, state.head_vectors); CHUNK_KEYS];
    for (j, row) in rows[..count].iter_mut().enumerate() {
        *row = values.row(j, state.head_vectors);
    }
    for n in 0..state.group_size {
        for j in (0..count).step_by(SCORED_KEYS) {
            let mut rows = [keys.row(j, state.head_vectors); SCORED_KEYS];
            for (t, row) in rows.iter_mut().enumerate() {
                *row = keys.row((j + t).min(count - 1), state.head_vectors);
            }
            score_tile::<S, f32, 1>(simd, state, n, (&rows, 0), j);
        }
        weigh_tile::<S, 1>(simd, state, n, count);
        add_tile::<S, f32, 1>(simd, state, n, (&rows[..count], 0), 0);
    }
    state.copies = copies;
}
