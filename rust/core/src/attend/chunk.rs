//! Attention over one chunk of at most 64 keys, by all queries of a task that see the chunk.
//!
//! A single row reads the keys in place, and so do several rows with AVX-512, four at a time. Other rows read a copy in
//! fp32, so that each key is converted and fetched from memory once. Many queries read the copy in transposed form
//! (`transposed`).

use super::key_copy::{ChunkOffsets, KvMemory, copy_chunk, prefetch_head, prefetch_part, row_offsets};
use super::online_softmax::{
    CHUNK_KEYS, ChunkView, accumulate_values, add_weighted_values, score_keys, score_keys_by_rows, update_softmax,
};
use super::state::{BlockUser, TaskState};
use super::transposed;
use super::vector::{Element, LANES, SimdOps};

/// Smallest number of rows for which a chunk is copied.
const MIN_ROWS_TO_COPY: usize = 2;

/// Rows that read a chunk in place together. Their results for four vectors fit in half of AVX-512's registers.
pub(super) const ROWS_IN_PLACE: usize = 4;

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
    let sees_all = |u: &BlockUser| u.first_in_chunk(start) == 0;
    if users.len() > 1 && state.head_dim.is_multiple_of(LANES) && S::NUM_REGISTERS >= 32 && users.iter().all(sees_all) {
        let offsets = ChunkOffsets { current, next };
        let (groups, rest) = users.as_chunks::<ROWS_IN_PLACE>();
        for users in groups {
            attend_rows_in_place(simd, state, memory, offsets, start, users);
        }
        match *rest {
            [a, b, c] => attend_rows_in_place(simd, state, memory, offsets, start, &[a, b, c]),
            [a, b] => attend_rows_in_place(simd, state, memory, offsets, start, &[a, b]),
            [a] => attend_in_place(simd, state, memory, offsets, (a.row, a.distance_of(start))),
            _ => {}
        }
        return;
    }
    if users.len() < MIN_ROWS_TO_COPY && state.head_dim.is_multiple_of(LANES) {
        for user in users.iter().filter(|u| u.first_in_chunk(start) < current.len()) {
            let first = user.first_in_chunk(start);
            let (current, distance) = (&current[first..], user.distance_of(start + first));
            attend_in_place(
                simd,
                state,
                memory,
                ChunkOffsets { current, next },
                (user.row, distance),
            );
        }
        return;
    }
    let parts = state.heads.len() * users.len();
    let copied = row_offsets(0, state.head_vectors * LANES);
    let mut scores = [0.0; CHUNK_KEYS];
    copy_chunk(simd, state, memory, current);
    for part in 0..parts {
        prefetch_part(simd, state, memory, next, part, parts);
        let user = users[part % users.len()];
        if user.first_in_chunk(start) < current.len() {
            let first = user.first_in_chunk(start);
            let (copied, distance) = (&copied[first..current.len()], user.distance_of(start + first));
            attend_copied(
                simd,
                state,
                copied,
                (user.row, part / users.len(), distance),
                &mut scores,
            );
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

/// Attention of the queries of one row and kv head over keys of the copied chunk, the first of them at a distance from
/// the query.
#[inline(always)]
fn attend_copied<S: SimdOps>(
    simd: S,
    state: &mut TaskState<'_>,
    offsets: &[usize],
    (row, h, distance): (usize, usize, i64),
    scores: &mut [f32; CHUNK_KEYS],
) {
    let (vectors, count) = (state.head_vectors, offsets.len());
    let head_offset = h * CHUNK_KEYS * vectors * LANES;
    let first = (row * state.heads.len() + h) * state.group_size;
    for i in first..first + state.group_size {
        let (q, o) = (
            &state.q[i * vectors..][..vectors],
            &mut state.o[i * vectors..][..vectors],
        );
        let [k, v] = state
            .copies
            .each_ref()
            .map(|data| ChunkView::of_copy(data, offsets, head_offset));
        for j in (0..count).step_by(4) {
            scores[j..j + 4].copy_from_slice(&score_keys(simd, q, k, j));
        }
        if let Some(bias) = state.bias {
            bias.add(
                (state.heads.start + h) * state.group_size + i - first,
                distance,
                &mut scores[..count],
            );
        }
        update_softmax(simd, scores, count, state.softcap, &mut state.softmax[i], o);
        accumulate_values(simd, &scores[..count], v, 0, o);
    }
}

/// Attention of the queries of one row over a chunk in place, whose first key is at a distance from the query.
///
/// Four keys at a time are read for all heads, so that memory is read in order, while the next four are prefetched.
#[inline(always)]
fn attend_in_place<S: SimdOps, K: Element>(
    simd: S,
    state: &mut TaskState<'_>,
    memory: KvMemory<'_, K>,
    ChunkOffsets { current: offsets, next }: ChunkOffsets<'_>,
    (row, distance): (usize, i64),
) {
    let (heads, group_size, vectors, head_dim) =
        (state.heads.len(), state.group_size, state.head_vectors, state.head_dim);
    let queries = row * heads * group_size..(row + 1) * heads * group_size;
    let (q, o) = (
        &state.q[queries.start * vectors..queries.end * vectors],
        &mut state.o[queries.start * vectors..queries.end * vectors],
    );
    let softmax = &mut state.softmax[queries];
    let scores = state.scores.as_chunks_mut::<CHUNK_KEYS>().0;
    let count = offsets.len();
    for j in (0..count).step_by(4) {
        let (soon, from) = if j + 4 < count {
            (&offsets[j + 4..], memory.keys)
        } else {
            (offsets, memory.values)
        };
        for h in 0..heads {
            let head_offset = (state.heads.start + h) * head_dim;
            prefetch_head(simd, from, soon, head_offset, head_dim);
            // SAFETY: the offsets are those of rows of the plan (`ChunkOffsets`), and `attend_chunk` calls this
            // function only for head dims that are multiples of `LANES`, which have `vectors` vectors.
            let keys = unsafe { ChunkView::in_place(memory.keys, offsets, head_offset) };
            for i in h * group_size..(h + 1) * group_size {
                let found = score_keys(simd, &q[i * vectors..][..vectors], keys, j);
                scores[i][j..j + 4].copy_from_slice(&found);
            }
        }
    }
    for (i, o) in o.chunks_exact_mut(vectors).enumerate() {
        if let Some(bias) = state.bias {
            let head = state.heads.start * group_size + i;
            bias.add(head, distance, &mut scores[i][..count]);
        }
        update_softmax(simd, &mut scores[i], count, state.softcap, &mut softmax[i], o);
    }
    for j in (0..count).step_by(4) {
        let (soon, from) = if j + 4 < count {
            (&offsets[j + 4..], memory.values)
        } else {
            (next, memory.keys)
        };
        for h in 0..heads {
            let head_offset = (state.heads.start + h) * head_dim;
            prefetch_head(simd, from, soon, head_offset, head_dim);
            // SAFETY: as for the keys.
            let values = unsafe { ChunkView::in_place(memory.values, offsets, head_offset) };
            for i in h * group_size..(h + 1) * group_size {
                let weights = &scores[i][j..count.min(j + 4)];
                accumulate_values(simd, weights, values, j, &mut o[i * vectors..][..vectors]);
            }
        }
    }
}

/// Attention of the queries of `R` rows, all of which see the whole chunk, over the chunk in place.
///
/// Results are those of [`attend_in_place`] for each row. Each key and value is loaded and converted once.
#[inline(always)]
fn attend_rows_in_place<S: SimdOps, K: Element, const R: usize>(
    simd: S,
    state: &mut TaskState<'_>,
    memory: KvMemory<'_, K>,
    ChunkOffsets { current: offsets, next }: ChunkOffsets<'_>,
    start: usize,
    users: &[BlockUser; R],
) {
    let (heads, group_size, vectors, head_dim) =
        (state.heads.len(), state.group_size, state.head_vectors, state.head_dim);
    let queries_of_row = heads * group_size;
    let scores = state.scores.as_chunks_mut::<CHUNK_KEYS>().0;
    let count = offsets.len();
    for j in (0..count).step_by(4) {
        let (soon, from) = if j + 4 < count {
            (&offsets[j + 4..], memory.keys)
        } else {
            (offsets, memory.values)
        };
        for h in 0..heads {
            let head_offset = (state.heads.start + h) * head_dim;
            prefetch_head(simd, from, soon, head_offset, head_dim);
            // SAFETY: the offsets are those of rows of the plan (`ChunkOffsets`), and `attend_chunk` calls this
            // function only for head dims that are multiples of `LANES`, which have `vectors` vectors.
            let keys = unsafe { ChunkView::in_place(memory.keys, offsets, head_offset) };
            for i in h * group_size..(h + 1) * group_size {
                let mut q = [&state.q[..0]; R];
                for (q, user) in q.iter_mut().zip(users) {
                    *q = &state.q[(user.row * queries_of_row + i) * vectors..][..vectors];
                }
                let found = score_keys_by_rows(simd, q, keys, j);
                for (r, found) in found.iter().enumerate() {
                    scores[r * queries_of_row + i][j..j + 4].copy_from_slice(found);
                }
            }
        }
    }
    for (r, user) in users.iter().enumerate() {
        for i in 0..queries_of_row {
            let (query, scores) = (user.row * queries_of_row + i, &mut scores[r * queries_of_row + i]);
            if let Some(bias) = state.bias {
                let head = state.heads.start * group_size + i;
                bias.add(head, user.distance_of(start), &mut scores[..count]);
            }
            let o = &mut state.o[query * vectors..][..vectors];
            update_softmax(simd, scores, count, state.softcap, &mut state.softmax[query], o);
        }
    }
    for j in (0..count).step_by(4) {
        let (soon, from) = if j + 4 < count {
            (&offsets[j + 4..], memory.values)
        } else {
            (next, memory.keys)
        };
        for h in 0..heads {
            let head_offset = (state.heads.start + h) * head_dim;
            prefetch_head(simd, from, soon, head_offset, head_dim);
            // SAFETY: as for the keys.
            let values = unsafe { ChunkView::in_place(memory.values, offsets, head_offset) };
            for i in h * group_size..(h + 1) * group_size {
                let (mut weights, mut at) = ([&scores[0][..0]; R], [0; R]);
                for (r, user) in users.iter().enumerate() {
                    weights[r] = &scores[r * queries_of_row + i][j..count.min(j + 4)];
                    at[r] = (user.row * queries_of_row + i) * vectors;
                }
                add_weighted_values::<S, K, R>(simd, weights, values, j, state.o, (at, vectors));
            }
        }
    }
}
