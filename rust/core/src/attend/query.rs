//! One query over a chunk of keys: scores, online softmax, weighted values.

use super::lanes::{Element, Lanes, Line, WIDTH};
use super::math::{exp, tanh};

/// Most keys of a chunk.
pub(super) const CHUNK: usize = 32;

/// Keys or values of one head: those of key j start at `data[at[j] + skip]`.
#[derive(Clone, Copy)]
pub(super) struct Chunk<'a, K> {
    pub(super) data: &'a [K],
    pub(super) at: &'a [usize],
    pub(super) skip: usize,
}

impl<'a, K: Element> Chunk<'a, K> {
    /// `lines` vectors of key `j`.
    #[inline(always)]
    fn key(&self, j: usize, lines: usize) -> &'a [[K; WIDTH]] {
        self.data[self.at[j] + self.skip..][..lines * WIDTH].as_chunks().0
    }
}

/// The running softmax of one query.
#[derive(Clone, Copy)]
pub(super) struct Running {
    /// Largest score so far.
    pub(super) max: f32,
    /// Sum of `exp(score - max)`.
    pub(super) sum: f32,
}

impl Running {
    pub(super) const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };
}

/// Takes the keys of a chunk into one query's output.
///
/// The result is the same to the bit whichever the memory of keys and values; it depends on where the chunks are cut.
///
/// * `q`: the query times scale.
/// * `o`: sum of `exp(score - max) * value` so far.
/// * `softcap`: `softcap * tanh(score / softcap)`, 0 for none.
#[inline(always)]
pub(super) fn absorb<L: Lanes, K: Element>(lanes: L, q: &[Line], keys: Chunk<'_, K>, values: Chunk<'_, K>, softcap: f32, running: &mut Running, o: &mut [Line]) {
    let count = keys.at.len().min(CHUNK);
    let mut scores = [[f32::NEG_INFINITY; WIDTH]; CHUNK / WIDTH];
    let used = &mut scores[..count.div_ceil(WIDTH)];
    score(lanes, q, keys, used.as_flattened_mut());
    if softcap > 0.0 {
        cap(lanes, softcap, used);
    }
    used.as_flattened_mut()[count..].fill(f32::NEG_INFINITY);
    let Some(share) = weigh(lanes, used, running) else {
        return; // every score is -inf: no weight
    };
    let weights = &scores.as_flattened()[..count];
    let lines = o.len();
    let (tiles, rest) = o.as_chunks_mut::<4>();
    for (t, tile) in tiles.iter_mut().enumerate() {
        add_values(lanes, weights, values, (4 * t, lines), share, tile);
    }
    for (t, line) in rest.iter_mut().enumerate() {
        add_values(lanes, weights, values, (lines / 4 * 4 + t, lines), share, std::array::from_mut(line));
    }
}

/// Scores of the keys of a chunk; whatever lies behind them is overwritten.
#[inline(always)]
fn score<L: Lanes, K: Element>(lanes: L, q: &[Line], keys: Chunk<'_, K>, scores: &mut [f32]) {
    let last = keys.at.len() - 1;
    for (i, four) in scores.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        if 4 * i > last {
            return;
        }
        let n = q.len();
        // A last group of fewer than four repeats the last key.
        let (a, b) = (keys.key(4 * i, n), keys.key((4 * i + 1).min(last), n));
        let (c, d) = (keys.key((4 * i + 2).min(last), n), keys.key((4 * i + 3).min(last), n));
        let mut sums = [lanes.splat(0.0); 4];
        for j in 0..n {
            let x = lanes.load(&q[j]);
            sums[0] = lanes.fma(x, K::load(lanes, &a[j]), sums[0]);
            sums[1] = lanes.fma(x, K::load(lanes, &b[j]), sums[1]);
            sums[2] = lanes.fma(x, K::load(lanes, &c[j]), sums[2]);
            sums[3] = lanes.fma(x, K::load(lanes, &d[j]), sums[3]);
        }
        *four = lanes.sums(sums);
    }
}

/// `softcap * tanh(score / softcap)`.
#[inline(always)]
fn cap<L: Lanes>(lanes: L, softcap: f32, scores: &mut [Line]) {
    let (most, inverse) = (lanes.splat(softcap), lanes.splat(1.0 / softcap));
    for line in scores {
        let x = lanes.mul(lanes.load(line), inverse);
        lanes.store(lanes.mul(most, tanh(lanes, x)), line);
    }
}

/// Turns scores into `exp(score - max)` under the new maximum. Returns what the output so far is to be multiplied with, None if all scores are -inf.
#[inline(always)]
fn weigh<L: Lanes>(lanes: L, scores: &mut [Line], running: &mut Running) -> Option<f32> {
    let mut largest = lanes.splat(f32::NEG_INFINITY);
    for line in &*scores {
        largest = lanes.max(largest, lanes.load(line));
    }
    let max = running.max.max(lanes.largest(largest));
    if max == f32::NEG_INFINITY && !scores.as_flattened().iter().any(|s| s.is_nan()) {
        return None;
    }
    let share = if max > running.max { lanes.largest(exp(lanes, lanes.splat(running.max - max))) } else { 1.0 };
    let (shift, mut sum) = (lanes.splat(-max), lanes.splat(0.0));
    for line in scores {
        let weight = exp(lanes, lanes.add(lanes.load(line), shift));
        sum = lanes.add(sum, weight);
        lanes.store(weight, line);
    }
    *running = Running { max, sum: running.sum * share + lanes.sum(sum) };
    Some(share)
}

/// `o * share + sum of weight * value`, for `N` vectors of the head dim from `first` on, out of `lines`.
#[inline(always)]
fn add_values<L: Lanes, K: Element, const N: usize>(lanes: L, weights: &[f32], values: Chunk<'_, K>, (first, lines): (usize, usize), share: f32, o: &mut [Line; N]) {
    let mut sums = [lanes.splat(share); N];
    for i in 0..N {
        sums[i] = lanes.mul(sums[i], lanes.load(&o[i]));
    }
    for (j, weight) in weights.iter().enumerate() {
        let (weight, value) = (lanes.splat(*weight), &values.key(j, lines)[first..first + N]);
        for i in 0..N {
            sums[i] = lanes.fma(weight, K::load(lanes, &value[i]), sums[i]);
        }
    }
    for i in 0..N {
        lanes.store(sums[i], &mut o[i]);
    }
}
