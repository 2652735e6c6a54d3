//! Online softmax of one query over a chunk of keys: scores, softmax update, weighted sum of values.
//!
//! The order of the sums depends neither on how calls are split nor on whether keys lie in place or in a copy. Only the
//! borders between chunks affect the rounding of a result.

use super::math::{exp, tanh};
use super::memory::SharedMemory;
use super::vector::{Element, F32x16, LANES, SimdOps};

/// Largest number of keys in a chunk.
pub(crate) const CHUNK_KEYS: usize = 64;

/// Keys or values of one head in a chunk.
///
/// Row `j` starts at `data[offsets[j] + head_offset]`.
#[derive(Clone, Copy)]
pub(super) struct ChunkView<'a, K> {
    data: SharedMemory<'a, K>,
    pub(super) offsets: &'a [usize],
    head_offset: usize,
}

impl<'a> ChunkView<'a, f32> {
    /// View of a task's own copy of a chunk.
    #[inline(always)]
    pub(super) fn of_copy(data: &'a [f32], offsets: &'a [usize], head_offset: usize) -> Self {
        Self {
            data: data.into(),
            offsets,
            head_offset,
        }
    }
}

impl<'a, K: Element> ChunkView<'a, K> {
    /// View of a chunk in place.
    ///
    /// # Safety
    /// The offsets are those of rows that the tables of the call name, and the head that begins at `head_offset` lies
    /// in each row. Its dimension is a multiple of [`LANES`], and [`Self::row`] is called for no more vectors.
    #[inline(always)]
    pub(super) unsafe fn in_place(data: SharedMemory<'a, K>, offsets: &'a [usize], head_offset: usize) -> Self {
        Self {
            data,
            offsets,
            head_offset,
        }
    }

    /// The first `vectors` vectors of row `j`.
    #[inline(always)]
    pub(super) fn row(&self, j: usize, vectors: usize) -> &'a [[K; LANES]] {
        // SAFETY: the data is a borrowed slice (`of_copy`), or the elements are part of a row that the tables name
        // (`in_place`).
        let row = unsafe { self.data.get(self.offsets[j] + self.head_offset, vectors * LANES) };
        row.as_chunks().0
    }
}

/// Running state of the online softmax of one query.
#[derive(Clone, Copy)]
pub(super) struct SoftmaxState {
    /// Largest score so far.
    pub(super) max: f32,
    /// Sum of `exp(score - max)` over the keys so far.
    pub(super) sum: f32,
}

impl SoftmaxState {
    pub(super) const EMPTY: Self = Self {
        max: f32::NEG_INFINITY,
        sum: 0.0,
    };
}

/// Scores of keys `j..j + 4`. Beyond the end of the chunk the last key is repeated.
///
/// * `q`: query multiplied by the softmax scale.
#[inline(always)]
pub(super) fn score_keys<S: SimdOps, K: Element>(simd: S, q: &[F32x16], keys: ChunkView<'_, K>, j: usize) -> [f32; 4] {
    let (last, n) = (keys.offsets.len() - 1, q.len());
    let (a, b) = (keys.row(j, n), keys.row((j + 1).min(last), n));
    let (c, d) = (keys.row((j + 2).min(last), n), keys.row((j + 3).min(last), n));
    let mut sums = [simd.splat(0.0); 4];
    for i in 0..n {
        let x = simd.load(&q[i]);
        sums[0] = simd.fma(x, K::load(simd, &a[i]), sums[0]);
        sums[1] = simd.fma(x, K::load(simd, &b[i]), sums[1]);
        sums[2] = simd.fma(x, K::load(simd, &c[i]), sums[2]);
        sums[3] = simd.fma(x, K::load(simd, &d[i]), sums[3]);
    }
    simd.reduce_sum4(sums)
}

/// Scores of keys `j..j + 4` by the queries of `R` rows, each to the bit as [`score_keys`] computes them.
#[inline(always)]
pub(super) fn score_keys_by_rows<S: SimdOps, K: Element, const R: usize>(
    simd: S,
    q: [&[F32x16]; R],
    keys: ChunkView<'_, K>,
    j: usize,
) -> [[f32; 4]; R] {
    let (last, n) = (keys.offsets.len() - 1, q[0].len());
    let (a, b) = (keys.row(j, n), keys.row((j + 1).min(last), n));
    let (c, d) = (keys.row((j + 2).min(last), n), keys.row((j + 3).min(last), n));
    let mut sums = [[simd.splat(0.0); 4]; R];
    for i in 0..n {
        let keys = [
            K::load(simd, &a[i]),
            K::load(simd, &b[i]),
            K::load(simd, &c[i]),
            K::load(simd, &d[i]),
        ];
        for r in 0..R {
            let x = simd.load(&q[r][i]);
            for t in 0..4 {
                sums[r][t] = simd.fma(x, keys[t], sums[r][t]);
            }
        }
    }
    let mut found = [[0.0; 4]; R];
    for r in 0..R {
        found[r] = simd.reduce_sum4(sums[r]);
    }
    found
}

/// Replaces the first `count` scores of a chunk by `exp(score - max)` for the new maximum, and rescales the query's
/// softmax state and output to that maximum.
///
/// * `softcap`: bound of the scores, applied as `softcap * tanh(score / softcap)`. 0 means no bound.
/// * `o`: sum of `exp(score - max) * value` over the keys so far.
#[inline(always)]
pub(super) fn update_softmax<S: SimdOps>(
    simd: S,
    scores: &mut [f32; CHUNK_KEYS],
    count: usize,
    softcap: f32,
    state: &mut SoftmaxState,
    o: &mut [F32x16],
) {
    let scores = &mut scores.as_chunks_mut::<LANES>().0[..count.div_ceil(LANES)];
    if softcap > 0.0 {
        apply_softcap(simd, softcap, scores);
    }
    scores.as_flattened_mut()[count..].fill(f32::NEG_INFINITY);
    let mut largest = simd.splat(f32::NEG_INFINITY);
    for vector in &*scores {
        largest = simd.max(largest, simd.load(vector));
    }
    let max = state.max.max(simd.reduce_max(largest));
    if max == f32::NEG_INFINITY && !scores.as_flattened().iter().any(|s| s.is_nan()) {
        // Every score so far is -inf, so `score - max` would be NaN.
        scores.as_flattened_mut().fill(0.0);
        return;
    }
    if max > state.max {
        let rescale = simd.reduce_max(exp(simd, simd.splat(state.max - max)));
        for vector in o {
            simd.store(simd.mul(simd.splat(rescale), simd.load(vector)), vector);
        }
        *state = SoftmaxState {
            max,
            sum: state.sum * rescale,
        };
    }
    let (shift, mut sum) = (simd.splat(-max), simd.splat(0.0));
    for vector in scores {
        let weight = exp(simd, simd.add(simd.load(vector), shift));
        sum = simd.add(sum, weight);
        simd.store(weight, vector);
    }
    state.sum += simd.reduce_sum(sum);
}

/// Adds `weights[i] * values[j + i]` to `o`, in ascending order of `i`.
#[inline(always)]
pub(super) fn accumulate_values<S: SimdOps, K: Element>(
    simd: S,
    weights: &[f32],
    values: ChunkView<'_, K>,
    j: usize,
    o: &mut [F32x16],
) {
    let vectors = o.len();
    let (tiles, rest) = o.as_chunks_mut::<4>();
    let tiled = 4 * tiles.len();
    for (t, tile) in tiles.iter_mut().enumerate() {
        accumulate_tile(simd, weights, values, j, (4 * t, vectors), tile);
    }
    for (t, vector) in rest.iter_mut().enumerate() {
        accumulate_tile(
            simd,
            weights,
            values,
            j,
            (tiled + t, vectors),
            std::array::from_mut(vector),
        );
    }
}

/// Accumulates `N` of the `vectors` vectors of the head dim, starting at vector `first`. `N` vectors stay in registers.
#[inline(always)]
fn accumulate_tile<S: SimdOps, K: Element, const N: usize>(
    simd: S,
    weights: &[f32],
    values: ChunkView<'_, K>,
    j: usize,
    (first, vectors): (usize, usize),
    o: &mut [F32x16; N],
) {
    let mut sums = [simd.splat(0.0); N];
    for i in 0..N {
        sums[i] = simd.load(&o[i]);
    }
    for (i, weight) in weights.iter().enumerate() {
        let (weight, value) = (simd.splat(*weight), &values.row(j + i, vectors)[first..first + N]);
        for n in 0..N {
            sums[n] = simd.fma(weight, K::load(simd, &value[n]), sums[n]);
        }
    }
    for i in 0..N {
        simd.store(sums[i], &mut o[i]);
    }
}

/// Adds `weights[r][i] * values[j + i]` to the outputs of `R` rows, each to the bit as [`accumulate_values`] does.
///
/// * `at`: place of each row's first vector in `o`.
#[inline(always)]
pub(super) fn add_weighted_values<S: SimdOps, K: Element, const R: usize>(
    simd: S,
    weights: [&[f32]; R],
    values: ChunkView<'_, K>,
    j: usize,
    o: &mut [F32x16],
    (at, vectors): ([usize; R], usize),
) {
    let mut first = 0;
    while first + 4 <= vectors {
        add_tile::<S, K, R, 4>(simd, weights, values, j, o, (at, first, vectors));
        first += 4;
    }
    while first < vectors {
        add_tile::<S, K, R, 1>(simd, weights, values, j, o, (at, first, vectors));
        first += 1;
    }
}

/// Adds to `N` vectors of each row, from vector `first` on.
#[inline(always)]
fn add_tile<S: SimdOps, K: Element, const R: usize, const N: usize>(
    simd: S,
    weights: [&[f32]; R],
    values: ChunkView<'_, K>,
    j: usize,
    o: &mut [F32x16],
    (at, first, vectors): ([usize; R], usize, usize),
) {
    let mut sums = [[simd.splat(0.0); N]; R];
    for r in 0..R {
        for (n, sum) in sums[r].iter_mut().enumerate() {
            *sum = simd.load(&o[at[r] + first + n]);
        }
    }
    for (i, _) in weights[0].iter().enumerate() {
        let row = &values.row(j + i, vectors)[first..first + N];
        let mut value = [simd.splat(0.0); N];
        for n in 0..N {
            value[n] = K::load(simd, &row[n]);
        }
        for r in 0..R {
            let weight = simd.splat(weights[r][i]);
            for n in 0..N {
                sums[r][n] = simd.fma(weight, value[n], sums[r][n]);
            }
        }
    }
    for r in 0..R {
        for (n, sum) in sums[r].iter().enumerate() {
            simd.store(*sum, &mut o[at[r] + first + n]);
        }
    }
}

/// Replaces scores by `softcap * tanh(score / softcap)`.
#[inline(always)]
pub(super) fn apply_softcap<S: SimdOps>(simd: S, softcap: f32, scores: &mut [F32x16]) {
    let (bound, inverse) = (simd.splat(softcap), simd.splat(1.0 / softcap));
    for vector in scores {
        let x = simd.mul(simd.load(vector), inverse);
        simd.store(simd.mul(bound, tanh(simd, x)), vector);
    }
}
