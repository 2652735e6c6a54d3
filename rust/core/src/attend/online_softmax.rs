//! Online softmax of queries over a chunk of keys.
//!
//! The order of the sums depends neither on how calls are split nor on whether keys lie in place or in a copy. Only the
//! borders between chunks affect the rounding of a result.

use super::math::{exp, tanh};
use super::memory::SharedMemory;
use super::vector::{Element, F32x16, LANES, SimdOps};

/// Largest number of keys in a chunk.
pub(crate) const CHUNK_KEYS: usize = 64;

/// Keys or values of one head, or of neighbouring heads, in a chunk.
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
    /// The offsets are those of rows that the tables of the call name, and the heads that begin at `head_offset` lie in
    /// each row. Their dimension is a multiple of [`LANES`], and [`Self::row`] is called for no more vectors.
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

/// Replaces the first `count` scores of `R` queries by `exp(score - max)` for the new maximum of each, and updates
/// their softmax states.
///
/// Returns the factors that rescale the outputs so far to the new maxima.
///
/// * `scores`: scores of each query.
/// * `softcap`: bound of the scores, applied as `softcap * tanh(score / softcap)`. 0 means no bound.
#[inline(always)]
pub(super) fn update_softmax<S: SimdOps, const R: usize>(
    simd: S,
    scores: &mut [[f32; CHUNK_KEYS]],
    count: usize,
    softcap: f32,
    states: &mut [SoftmaxState; R],
) -> [f32; R] {
    let (scores, vectors) = (&mut scores[..R], count.div_ceil(LANES).min(CHUNK_KEYS / LANES));
    let mut largest = [simd.splat(f32::NEG_INFINITY); R];
    for scores in &mut *scores {
        if softcap > 0.0 {
            apply_softcap(simd, softcap, &mut scores.as_chunks_mut().0[..vectors]);
        }
        scores[count..LANES * vectors].fill(f32::NEG_INFINITY);
    }
    for n in 0..vectors {
        for r in 0..R {
            largest[r] = simd.max(largest[r], simd.load(&scores[r].as_chunks().0[n]));
        }
    }
    let (mut shift, mut change, mut rescale) = ([simd.splat(0.0); R], [0.0; LANES], [0.0; LANES]);
    for r in 0..R {
        let max = states[r].max.max(simd.reduce_max(largest[r]));
        if max > states[r].max {
            change[r] = states[r].max - max;
            states[r].max = max;
        }
        // The shift is 0 while every score so far is -inf, because `score - max` would be NaN.
        shift[r] = simd.splat(if max == f32::NEG_INFINITY { 0.0 } else { -max });
    }
    simd.store(exp(simd, simd.load(&change)), &mut rescale);
    let mut sums = [simd.splat(0.0); 4];
    for n in 0..vectors {
        for r in 0..R {
            let scores = &mut scores[r].as_chunks_mut().0[n];
            let weight = exp(simd, simd.add(simd.load(scores), shift[r]));
            sums[r] = simd.add(sums[r], weight);
            simd.store(weight, scores);
        }
    }
    let sums = simd.reduce_sum4(sums);
    let mut factors = [0.0; R];
    for r in 0..R {
        states[r].sum = states[r].sum * rescale[r] + sums[r];
        factors[r] = rescale[r];
    }
    factors
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
