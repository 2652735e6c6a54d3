//! Tiles of `R` queries over a chunk of keys: scores, weights and weighted sum of values.
//!
//! Each key and value is loaded and converted once for the queries of a tile, whose results stay in registers. The
//! result of a query does not depend on the other queries.

use std::ops::Range;

use super::online_softmax::{SoftmaxState, update_softmax};
use super::state::{BlockUser, Query, TaskState};
use super::vector::{Element, LANES, SimdOps};

/// Keys whose scores are computed together.
pub(super) const SCORED_KEYS: usize = 4;
/// Vectors of an output that stay in registers.
const VECTORS: usize = 4;

/// Sets the queries of the tiles to those of `users` for some of the task's kv heads, head by head.
///
/// * `start`: index in its block of the first key of the chunk.
#[inline(always)]
pub(super) fn set_queries(state: &mut TaskState<'_>, users: &[BlockUser], heads: Range<usize>, start: usize) {
    state.queries.clear();
    for h in heads {
        for user in users {
            for g in 0..state.group_size {
                state.queries.push(Query {
                    place: (user.row * state.heads.len() + h) * state.group_size + g,
                    head: (state.heads.start + h) * state.group_size + g,
                    distance: user.distance_of(start),
                });
            }
        }
    }
}

/// Writes the scores of keys `j..j + SCORED_KEYS` for the tile from query `n` on. Returns `R`.
///
/// * `keys`: vectors of these keys, from vector `first` on those of the tile's head.
#[inline(always)]
pub(super) fn score_tile<S: SimdOps, K: Element, const R: usize>(
    simd: S,
    state: &mut TaskState<'_>,
    n: usize,
    (keys, first): (&[&[[K; LANES]]; SCORED_KEYS], usize),
    j: usize,
) -> usize {
    let vectors = state.head_vectors;
    let (tile, scores) = (&state.queries[n..n + R], &mut state.scores[n..n + R]);
    let (mut queries, mut rows) = ([&state.q[..0]; R], [&keys[0][..0]; SCORED_KEYS]);
    for r in 0..R {
        queries[r] = &state.q[tile[r].place * vectors..][..vectors];
    }
    for t in 0..SCORED_KEYS {
        rows[t] = &keys[t][first..][..vectors];
    }
    let mut sums = [[simd.splat(0.0); SCORED_KEYS]; R];
    for i in 0..vectors {
        let mut key = [simd.splat(0.0); SCORED_KEYS];
        for t in 0..SCORED_KEYS {
            key[t] = K::load(simd, &rows[t][i]);
        }
        for r in 0..R {
            let x = simd.load(&queries[r][i]);
            for t in 0..SCORED_KEYS {
                sums[r][t] = simd.fma(x, key[t], sums[r][t]);
            }
        }
    }
    for r in 0..R {
        scores[r].as_chunks_mut().0[j / SCORED_KEYS] = simd.reduce_sum4(sums[r]);
    }
    R
}

/// Replaces the scores of `count` keys by weights, for the tile from query `n` on, and rescales its outputs so far to
/// the new maxima. Returns `R`.
#[inline(always)]
pub(super) fn weigh_tile<S: SimdOps, const R: usize>(
    simd: S,
    state: &mut TaskState<'_>,
    n: usize,
    count: usize,
) -> usize {
    let (tile, scores) = (&state.queries[n..n + R], &mut state.scores[n..n + R]);
    let mut states = [SoftmaxState::EMPTY; R];
    for r in 0..R {
        if let Some(bias) = state.bias {
            bias.add(tile[r].head, tile[r].distance, &mut scores[r][..count]);
        }
        states[r] = state.softmax[tile[r].place];
    }
    let rescale = update_softmax(simd, scores, count, state.softcap, &mut states);
    for r in 0..R {
        state.softmax[tile[r].place] = states[r];
        if rescale[r] < 1.0 {
            for o in &mut state.o[tile[r].place * state.head_vectors..][..state.head_vectors] {
                simd.store(simd.mul(simd.splat(rescale[r]), simd.load(o)), o);
            }
        }
    }
    R
}

/// Adds the weighted values of the keys from key `j` on, in ascending order, to the outputs of the tile from query `n`
/// on. Returns `R`.
///
/// * `values`: vectors of these values, from vector `first` on those of the tile's head.
#[inline(always)]
pub(super) fn add_tile<S: SimdOps, K: Element, const R: usize>(
    simd: S,
    state: &mut TaskState<'_>,
    n: usize,
    (values, first): (&[&[[K; LANES]]], usize),
    j: usize,
) -> usize {
    let tiled = state.head_vectors - state.head_vectors % VECTORS;
    for vector in (0..tiled).step_by(VECTORS) {
        add_vectors::<S, K, R, VECTORS>(simd, state, n, (values, first), (j, vector));
    }
    for vector in tiled..state.head_vectors {
        add_vectors::<S, K, R, 1>(simd, state, n, (values, first), (j, vector));
    }
    R
}

/// Adds to `N` vectors of each output, from vector `vector` on.
#[inline(always)]
fn add_vectors<S: SimdOps, K: Element, const R: usize, const N: usize>(
    simd: S,
    state: &mut TaskState<'_>,
    n: usize,
    (values, first): (&[&[[K; LANES]]], usize),
    (j, vector): (usize, usize),
) {
    let (tile, scores) = (&state.queries[n..n + R], &state.scores[n..n + R]);
    let (mut sums, mut at, mut weights) = ([[simd.splat(0.0); N]; R], [0; R], [&scores[0][..0]; R]);
    for r in 0..R {
        weights[r] = &scores[r][j..][..values.len()];
        at[r] = tile[r].place * state.head_vectors + vector;
        let o = &state.o[at[r]..][..N];
        for i in 0..N {
            sums[r][i] = simd.load(&o[i]);
        }
    }
    for (t, row) in values.iter().enumerate() {
        let row = &row[first + vector..][..N];
        let mut value = [simd.splat(0.0); N];
        for i in 0..N {
            value[i] = K::load(simd, &row[i]);
        }
        for r in 0..R {
            let weight = simd.splat(weights[r][t]);
            for i in 0..N {
                sums[r][i] = simd.fma(weight, value[i], sums[r][i]);
            }
        }
    }
    for r in 0..R {
        let o = &mut state.o[at[r]..][..N];
        for i in 0..N {
            simd.store(sums[r][i], &mut o[i]);
        }
    }
}
