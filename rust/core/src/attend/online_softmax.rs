//! One query over a chunk of keys: scores, online softmax, weighted values. The order of the sums is the same however the calls are cut, and for keys
//! in place as for copies; only where chunks are cut changes a result.

use super::math::{exp, tanh};
use super::vector::{Element, Lanes, Line, WIDTH};

/// Most keys of a chunk.
pub(super) const CHUNK: usize = 64;

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
    pub(super) fn key(&self, j: usize, lines: usize) -> &'a [[K; WIDTH]] {
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
    pub(super) const EMPTY: Self = Self {
        max: f32::NEG_INFINITY,
        sum: 0.0,
    };
}

/// Scores of up to four keys from `j` on; a last group of fewer repeats the last key.
///
/// * `q`: the query times scale.
#[inline(always)]
pub(super) fn score<L: Lanes, K: Element>(lanes: L, q: &[Line], keys: Chunk<'_, K>, j: usize) -> [f32; 4] {
    let (last, n) = (keys.at.len() - 1, q.len());
    let (a, b) = (keys.key(j, n), keys.key((j + 1).min(last), n));
    let (c, d) = (keys.key((j + 2).min(last), n), keys.key((j + 3).min(last), n));
    let mut sums = [lanes.splat(0.0); 4];
    for i in 0..n {
        let x = lanes.load(&q[i]);
        sums[0] = lanes.fma(x, K::load(lanes, &a[i]), sums[0]);
        sums[1] = lanes.fma(x, K::load(lanes, &b[i]), sums[1]);
        sums[2] = lanes.fma(x, K::load(lanes, &c[i]), sums[2]);
        sums[3] = lanes.fma(x, K::load(lanes, &d[i]), sums[3]);
    }
    lanes.sums(sums)
}

/// Turns the first `count` scores of a chunk into `exp(score - max)` under the new maximum, and what the query has gathered to that maximum.
///
/// * `softcap`: `softcap * tanh(score / softcap)`, 0 for none.
/// * `o`: sum of `exp(score - max) * value` so far.
#[inline(always)]
pub(super) fn weigh<L: Lanes>(
    lanes: L,
    scores: &mut [f32; CHUNK],
    count: usize,
    softcap: f32,
    running: &mut Running,
    o: &mut [Line],
) {
    let scores = &mut scores.as_chunks_mut::<WIDTH>().0[..count.div_ceil(WIDTH)];
    if softcap > 0.0 {
        cap(lanes, softcap, scores);
    }
    scores.as_flattened_mut()[count..].fill(f32::NEG_INFINITY);
    let mut largest = lanes.splat(f32::NEG_INFINITY);
    for line in &*scores {
        largest = lanes.max(largest, lanes.load(line));
    }
    let max = running.max.max(lanes.largest(largest));
    if max == f32::NEG_INFINITY && !scores.as_flattened().iter().any(|s| s.is_nan()) {
        scores.as_flattened_mut().fill(0.0); // every score so far is -inf
        return;
    }
    if max > running.max {
        let share = lanes.largest(exp(lanes, lanes.splat(running.max - max)));
        for line in o {
            lanes.store(lanes.mul(lanes.splat(share), lanes.load(line)), line);
        }
        *running = Running {
            max,
            sum: running.sum * share,
        };
    }
    let (shift, mut sum) = (lanes.splat(-max), lanes.splat(0.0));
    for line in scores {
        let weight = exp(lanes, lanes.add(lanes.load(line), shift));
        sum = lanes.add(sum, weight);
        lanes.store(weight, line);
    }
    running.sum += lanes.sum(sum);
}

/// Adds `weights[i] * values[j + i]` for all weights, one after another.
#[inline(always)]
pub(super) fn gather<L: Lanes, K: Element>(lanes: L, weights: &[f32], values: Chunk<'_, K>, j: usize, o: &mut [Line]) {
    let lines = o.len();
    let (tiles, rest) = o.as_chunks_mut::<4>();
    let tiled = 4 * tiles.len();
    for (t, tile) in tiles.iter_mut().enumerate() {
        gather_part(lanes, weights, values, j, (4 * t, lines), tile);
    }
    for (t, line) in rest.iter_mut().enumerate() {
        gather_part(
            lanes,
            weights,
            values,
            j,
            (tiled + t, lines),
            std::array::from_mut(line),
        );
    }
}

/// `N` vectors of the head dim from `first` on, out of `lines`: as many as stay in registers.
#[inline(always)]
fn gather_part<L: Lanes, K: Element, const N: usize>(
    lanes: L,
    weights: &[f32],
    values: Chunk<'_, K>,
    j: usize,
    (first, lines): (usize, usize),
    o: &mut [Line; N],
) {
    let mut sums = [lanes.splat(0.0); N];
    for i in 0..N {
        sums[i] = lanes.load(&o[i]);
    }
    for (i, weight) in weights.iter().enumerate() {
        let (weight, value) = (lanes.splat(*weight), &values.key(j + i, lines)[first..first + N]);
        for n in 0..N {
            sums[n] = lanes.fma(weight, K::load(lanes, &value[n]), sums[n]);
        }
    }
    for i in 0..N {
        lanes.store(sums[i], &mut o[i]);
    }
}

/// `softcap * tanh(score / softcap)`.
#[inline(always)]
pub(super) fn cap<L: Lanes>(lanes: L, softcap: f32, scores: &mut [Line]) {
    let (most, inverse) = (lanes.splat(softcap), lanes.splat(1.0 / softcap));
    for line in scores {
        let x = lanes.mul(lanes.load(line), inverse);
        lanes.store(lanes.mul(most, tanh(lanes, x)), line);
    }
}
