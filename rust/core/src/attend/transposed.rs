//! Transposed queries: 16 queries of one kv head in the 16 lanes of a vector, over a chunk of keys.
//!
//! With the queries in the lanes, no sum runs across a vector, and a key is read once for 16 queries. Every number is
//! the result of the same operations in the same order as for a single query (`online_softmax`), so both give the same
//! bits.

use super::math::exp;
use super::online_softmax::{CHUNK_KEYS, ChunkView, SoftmaxState, apply_softcap};
use super::state::{BlockUser, TaskState};
use super::vector::{F32x16, LANES, SUM_ORDER, SimdOps};

/// Smallest number of queries per kv head for which transposing pays off.
const MIN_QUERIES: usize = 9;

/// Transposed queries and their running results.
///
/// A row of `q` and `o` holds one element of 16 queries, so their shape is `[kv heads, vectors of queries, head dim]`
/// with the head dim rounded up to a multiple of 16.
pub(super) struct TransposedQueries<'a> {
    /// Vectors of 16 floats in a head dim.
    head_vectors: usize,
    q: &'a mut [F32x16],
    o: &'a mut [F32x16],
    /// Largest score so far, `[kv heads, vectors of queries]`.
    max: &'a mut [F32x16],
    /// Sum of `exp(score - max)` so far, `[kv heads, vectors of queries]`.
    sum: &'a mut [F32x16],
    /// Scores of one vector of queries, `[CHUNK_KEYS]`.
    scores: &'a mut [F32x16],
}

impl<'a> TransposedQueries<'a> {
    /// Number of floats that the buffers need for `query_vectors` vectors of queries over all kv heads.
    pub(super) fn buffer_floats(query_vectors: usize, head_vectors: usize) -> usize {
        (2 * query_vectors * (head_vectors * LANES + 1) + CHUNK_KEYS) * LANES
    }

    /// Splits `memory`, which holds [`Self::buffer_floats`] floats, into the buffers.
    pub(super) fn new(memory: &'a mut [f32], query_vectors: usize, head_vectors: usize) -> Self {
        let size = query_vectors * head_vectors * LANES;
        let (q, rest) = memory.as_chunks_mut().0.split_at_mut(size);
        let (o, rest) = rest.split_at_mut(size);
        let (max, rest) = rest.split_at_mut(query_vectors);
        let (sum, scores) = rest.split_at_mut(query_vectors);
        Self {
            head_vectors,
            q,
            o,
            max,
            sum,
            scores,
        }
    }
}

/// Whether to transpose the queries of `users`, which all see the whole chunk.
pub(super) fn pays_off(users: &[BlockUser], group_size: usize) -> bool {
    users.len() * group_size >= MIN_QUERIES
}

/// Number of vectors that hold the queries of `num_users` rows for one kv head.
pub(super) fn num_query_vectors(num_users: usize, group_size: usize) -> usize {
    (num_users * group_size).div_ceil(LANES)
}

/// Copies the queries of `users` and their running results into the transposed buffers.
pub(super) fn transpose(state: &mut TaskState<'_>, users: &[BlockUser]) {
    let width = state.head_vectors * LANES;
    let TransposedQueries { q, o, max, sum, .. } = &mut state.transposed;
    for Position { lane, query, vector } in positions(users, state.heads.len(), state.group_size) {
        let (from, to) = (query * state.head_vectors, vector * width);
        for d in 0..width {
            q[to + d][lane] = state.q[from + d / LANES][d % LANES];
            o[to + d][lane] = state.o[from + d / LANES][d % LANES];
        }
        max[vector][lane] = state.softmax[query].max;
        sum[vector][lane] = state.softmax[query].sum;
    }
}

/// Copies the running results of `users` back out of the transposed buffers.
pub(super) fn transpose_back(state: &mut TaskState<'_>, users: &[BlockUser]) {
    let width = state.head_vectors * LANES;
    let TransposedQueries { o, max, sum, .. } = &state.transposed;
    for Position { lane, query, vector } in positions(users, state.heads.len(), state.group_size) {
        let (to, from) = (query * state.head_vectors, vector * width);
        for d in 0..width {
            state.o[to + d / LANES][d % LANES] = o[from + d][lane];
        }
        state.softmax[query] = SoftmaxState {
            max: max[vector][lane],
            sum: sum[vector][lane],
        };
    }
}

/// Position of one query in the task's buffers (`query`) and in the transposed buffers (`vector`, `lane`).
struct Position {
    lane: usize,
    query: usize,
    vector: usize,
}

fn positions(users: &[BlockUser], heads: usize, group_size: usize) -> impl Iterator<Item = Position> {
    let query_vectors = num_query_vectors(users.len(), group_size);
    (0..heads).flat_map(move |h| {
        (0..users.len() * group_size).map(move |n| Position {
            lane: n % LANES,
            query: (users[n / group_size].row * heads + h) * group_size + n % group_size,
            vector: h * query_vectors + n / LANES,
        })
    })
}

/// Attention of one vector of queries over the keys and values of a chunk that all of these queries see.
///
/// * `vector`: index of the vector of queries.
#[inline(always)]
pub(super) fn attend_vector<S: SimdOps>(
    simd: S,
    queries: &mut TransposedQueries<'_>,
    vector: usize,
    softcap: f32,
    keys: ChunkView<'_, f32>,
    values: ChunkView<'_, f32>,
) {
    let (head_vectors, width) = (queries.head_vectors, queries.head_vectors * LANES);
    let scores = &mut queries.scores[..keys.offsets.len()];
    score_keys(simd, &queries.q[vector * width..][..width], keys, head_vectors, scores);
    if softcap > 0.0 {
        apply_softcap(simd, softcap, scores);
    }
    let rescale = update_softmax(simd, scores, &mut queries.max[vector], &mut queries.sum[vector]);
    let o = &mut queries.o[vector * width..][..width];
    if S::NUM_REGISTERS >= 32 {
        accumulate_values::<S, 16>(simd, scores, values, head_vectors, rescale, o);
    } else {
        accumulate_values::<S, 4>(simd, scores, values, head_vectors, rescale, o);
    }
}

/// Scores of all keys of the chunk.
#[inline(always)]
fn score_keys<S: SimdOps>(simd: S, q: &[F32x16], keys: ChunkView<'_, f32>, head_vectors: usize, scores: &mut [F32x16]) {
    let mut done = 0;
    if S::NUM_REGISTERS >= 32 {
        let fours = scores.as_chunks_mut::<4>().0;
        done = 4 * fours.len();
        for (j, to) in fours.iter_mut().enumerate() {
            let key = |n| keys.row(4 * j + n, head_vectors);
            dot_products(simd, q, [key(0), key(1), key(2), key(3)], to);
        }
    }
    for (j, to) in scores.iter_mut().enumerate().skip(done) {
        dot_products(simd, q, [keys.row(j, head_vectors)], std::array::from_mut(to));
    }
}

/// Dot products of 16 queries with `N` keys.
#[inline(always)]
fn dot_products<S: SimdOps, const N: usize>(simd: S, q: &[F32x16], keys: [&[F32x16]; N], to: &mut [F32x16; N]) {
    let head_vectors = keys[0].len();
    let (q, keys) = (
        &q.as_chunks::<LANES>().0[..head_vectors],
        keys.map(|key| &key[..head_vectors]),
    );
    let parts = [
        sum_four_lanes(simd, q, keys, SUM_ORDER[0]),
        sum_four_lanes(simd, q, keys, SUM_ORDER[1]),
        sum_four_lanes(simd, q, keys, SUM_ORDER[2]),
        sum_four_lanes(simd, q, keys, SUM_ORDER[3]),
    ];
    for n in 0..N {
        let all = add_four(simd, [parts[0][n], parts[1][n], parts[2][n], parts[3][n]]);
        simd.store(all, &mut to[n]);
    }
}

/// Sum of the four lanes `lanes` that the accumulator of `online_softmax::score_keys` would have.
#[inline(always)]
fn sum_four_lanes<S: SimdOps, const N: usize>(
    simd: S,
    q: &[[F32x16; LANES]],
    keys: [&[F32x16]; N],
    lanes: [usize; 4],
) -> [S::Vector; N] {
    let mut sums = [[simd.splat(0.0); 4]; N];
    for (i, q) in q.iter().enumerate() {
        for t in 0..4 {
            let x = simd.load(&q[lanes[t]]);
            for n in 0..N {
                sums[n][t] = simd.fma(x, simd.splat(keys[n][i][lanes[t]]), sums[n][t]);
            }
        }
    }
    let mut out = [simd.splat(0.0); N];
    for n in 0..N {
        out[n] = add_four(simd, sums[n]);
    }
    out
}

/// `(a + b) + (c + d)`, one node of [`SUM_ORDER`].
#[inline(always)]
fn add_four<S: SimdOps>(simd: S, [a, b, c, d]: [S::Vector; 4]) -> S::Vector {
    simd.add(simd.add(a, b), simd.add(c, d))
}

/// Replaces scores by `exp(score - max)` for the new maximum, and updates `max` and `sum`.
///
/// Returns the factor that rescales the output so far to the new maximum.
#[inline(always)]
fn update_softmax<S: SimdOps>(simd: S, scores: &mut [F32x16], max: &mut F32x16, sum: &mut F32x16) -> S::Vector {
    let (none, old) = (simd.splat(f32::NEG_INFINITY), simd.load(max));
    let mut new = old;
    for vector in &*scores {
        new = simd.max(new, simd.load(vector));
    }
    let rescale = simd.select_less(
        old,
        new,
        exp(simd, simd.add(old, simd.mul(simd.splat(-1.0), new))),
        simd.splat(1.0),
    );
    // The shift is 0 while every score so far is -inf, because `score - max` would be NaN.
    let shift = simd.select_less(none, new, simd.mul(simd.splat(-1.0), new), simd.splat(0.0));
    let mut parts = [simd.splat(0.0); 4];
    for part in 0..4 {
        let mut sums = [simd.splat(0.0); 4];
        for t in 0..4 {
            for vector in scores.iter_mut().skip(SUM_ORDER[part][t]).step_by(LANES) {
                let weight = exp(simd, simd.add(simd.load(vector), shift));
                sums[t] = simd.add(sums[t], weight);
                simd.store(weight, vector);
            }
        }
        parts[part] = add_four(simd, sums);
    }
    let added = add_four(simd, parts);
    simd.store(simd.add(simd.mul(rescale, simd.load(sum)), added), sum);
    simd.store(new, max);
    rescale
}

/// Sets `o` to `rescale * o` plus the sum of weights times values, `N` elements of the head dim at a time.
#[inline(always)]
fn accumulate_values<S: SimdOps, const N: usize>(
    simd: S,
    weights: &[F32x16],
    values: ChunkView<'_, f32>,
    head_vectors: usize,
    rescale: S::Vector,
    o: &mut [F32x16],
) {
    for (vector, o) in o.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        for (part, o) in o.as_chunks_mut::<N>().0.iter_mut().enumerate() {
            let mut sums = [rescale; N];
            for n in 0..N {
                sums[n] = simd.mul(rescale, simd.load(&o[n]));
            }
            for (j, weight) in weights.iter().enumerate() {
                let weight = simd.load(weight);
                let value = &values.row(j, head_vectors)[vector].as_chunks::<N>().0[part];
                for n in 0..N {
                    sums[n] = simd.fma(weight, simd.splat(value[n]), sums[n]);
                }
            }
            for n in 0..N {
                simd.store(sums[n], &mut o[n]);
            }
        }
    }
}
