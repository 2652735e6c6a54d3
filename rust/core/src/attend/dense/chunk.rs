//! Attention of a block of queries over one chunk of keys: scores, softmax update, weighted sum of values.

use super::super::math::exp;
use super::super::vector::{F32x16, LANES, SimdOps};
use super::products::Products;
use super::{KEYS, PerQuery, Scratch, TILE, VECTORS};

/// Computes the scores of `count` keys from key `first` on.
#[inline(always)]
pub(super) fn score_chunk<S: SimdOps, P: Products<S>>(
    simd: S,
    products: P,
    scratch: &mut Scratch,
    (first, count): (usize, usize),
    (dim, scale): (usize, f32),
) {
    let Scratch {
        keys,
        q,
        scores,
        vectors,
        ..
    } = scratch;
    let lanes = dim.div_ceil(P::PACKED);
    let width = lanes.div_ceil(LANES);
    scores.resize(KEYS, PerQuery::default());
    let rows = &keys[first * width..][..count.next_multiple_of(TILE) * width];
    for (rows, to) in rows.chunks_exact(TILE * width).zip(scores.as_chunks_mut::<TILE>().0) {
        let rows = (rows.as_flattened(), &q[..lanes]);
        if S::NUM_REGISTERS >= 32 && *vectors == VECTORS {
            score_tile::<S, P, VECTORS>(simd, products, rows, (0, scale), to);
        } else if S::NUM_REGISTERS >= 32 && *vectors > 1 {
            score_tile::<S, P, 2>(simd, products, rows, (0, scale), to);
            score_tile::<S, P, 2>(simd, products, rows, (*vectors - 2, scale), to);
        } else {
            for n in 0..*vectors {
                score_tile::<S, P, 1>(simd, products, rows, (n, scale), to);
            }
        }
    }
}

/// Scores of four keys and `N` vectors of queries from vector `n` on.
#[inline(always)]
fn score_tile<S: SimdOps, P: Products<S>, const N: usize>(
    simd: S,
    products: P,
    (keys, q): (&[f32], &[PerQuery]),
    (n, scale): (usize, f32),
    to: &mut [PerQuery; TILE],
) {
    let (a, rest) = keys.split_at(keys.len() / TILE);
    let (b, rest) = rest.split_at(a.len());
    let (c, d) = rest.split_at(a.len());
    let mut sums = [[simd.splat(0.0); N]; TILE];
    for ((((q, a), b), c), d) in q.iter().zip(a).zip(b).zip(c).zip(d) {
        let key = [simd.splat(*a), simd.splat(*b), simd.splat(*c), simd.splat(*d)];
        for i in 0..N {
            let query = simd.load(&q[n + i]);
            for t in 0..TILE {
                sums[t][i] = products.add(query, key[t], sums[t][i]);
            }
        }
    }
    for t in 0..TILE {
        for i in 0..N {
            simd.store(simd.mul(simd.splat(scale), sums[t][i]), &mut to[t][n + i]);
        }
    }
}

/// Sets the scores of keys after the query to -inf.
#[inline(always)]
pub(super) fn hide_later_keys<S: SimdOps>(simd: S, scores: &mut [PerQuery], first_key: usize, first_query: usize) {
    const FIRST: F32x16 = [
        0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
    ];
    // The keys begin less than a chunk before, or less than a block after the first query.
    let mut key = f32::from(u8::try_from(first_key + KEYS - first_query).unwrap_or(u8::MAX)) - 64.0;
    for scores in scores {
        let mut query = simd.load(&FIRST);
        for scores in scores {
            let kept = simd.select_less(query, simd.splat(key), simd.splat(f32::NEG_INFINITY), simd.load(scores));
            simd.store(kept, scores);
            query = simd.add(query, simd.splat(16.0));
        }
        key += 1.0;
    }
}

/// Replaces the first `count` scores by `exp(score - max)` for the new maximum, and rescales sums and output to it.
#[inline(always)]
pub(super) fn update_softmax<S: SimdOps>(simd: S, scratch: &mut Scratch, count: usize) {
    let Scratch {
        o,
        scores,
        max,
        sum,
        vectors,
        ..
    } = scratch;
    let (none, zero, one) = (simd.splat(f32::NEG_INFINITY), simd.splat(0.0), simd.splat(1.0));
    for n in 0..*vectors {
        let old = simd.load(&max[n]);
        let mut new = old;
        for scores in &scores[..count] {
            new = simd.max(new, simd.load(&scores[n])); // NaN where a score is NaN, and so the weights below
        }
        let minus_new = simd.mul(simd.splat(-1.0), new);
        let rescale = simd.select_less(old, new, exp(simd, simd.add(old, minus_new)), one);
        // The shift is 0 while every score so far is -inf, because `score - max` would be NaN.
        let shift = simd.select_less(none, new, minus_new, zero);
        let mut sums = [zero; 4];
        for (j, scores) in scores[..count].iter_mut().enumerate() {
            let weight = exp(simd, simd.add(simd.load(&scores[n]), shift));
            sums[j % 4] = simd.add(sums[j % 4], weight);
            simd.store(weight, &mut scores[n]);
        }
        for scores in &mut scores[count..count.next_multiple_of(TILE)] {
            simd.store(zero, &mut scores[n]);
        }
        let added = simd.add(simd.add(sums[0], sums[1]), simd.add(sums[2], sums[3]));
        simd.store(simd.add(simd.mul(rescale, simd.load(&sum[n])), added), &mut sum[n]);
        simd.store(new, &mut max[n]);
        for o in o.iter_mut() {
            simd.store(simd.mul(rescale, simd.load(&o[n])), &mut o[n]);
        }
    }
}

/// Packs the weights of `count` keys in pairs of keys.
#[inline(always)]
pub(super) fn pack_weights<S: SimdOps, P: Products<S>>(simd: S, products: P, weights: &mut [PerQuery], count: usize) {
    for j in 0..count.next_multiple_of(TILE) / 2 {
        let (low, high) = (weights[2 * j], weights[2 * j + 1]);
        for ((to, low), high) in weights[j].iter_mut().zip(&low).zip(&high) {
            simd.store(products.pack(simd.load(low), simd.load(high)), to);
        }
    }
}

/// Adds the weighted values of `count` keys from key `first` on to the output.
#[inline(always)]
pub(super) fn add_values<S: SimdOps, P: Products<S>>(
    simd: S,
    products: P,
    scratch: &mut Scratch,
    (first, count): (usize, usize),
    dim: usize,
) {
    let Scratch {
        values,
        o,
        scores,
        vectors,
        ..
    } = scratch;
    let (first, count) = (first / P::PACKED, count.next_multiple_of(TILE) / P::PACKED);
    let width = dim.div_ceil(LANES);
    let rows = (values[first * width..][..count * width].as_flattened(), width * LANES);
    let weights = &scores[..count];
    for (tile, o) in o
        .as_chunks_mut::<TILE>()
        .0
        .iter_mut()
        .enumerate()
        .take(dim.div_ceil(TILE))
    {
        if S::NUM_REGISTERS >= 32 && *vectors == VECTORS {
            value_tile::<S, P, VECTORS>(simd, products, weights, (rows, tile), 0, o);
        } else {
            for n in 0..*vectors {
                value_tile::<S, P, 1>(simd, products, weights, (rows, tile), n, o);
            }
        }
    }
}

/// Adds four dims of weighted values for `N` vectors of queries from vector `n` on.
#[inline(always)]
fn value_tile<S: SimdOps, P: Products<S>, const N: usize>(
    simd: S,
    products: P,
    weights: &[PerQuery],
    ((rows, width), tile): ((&[f32], usize), usize),
    n: usize,
    o: &mut [PerQuery; TILE],
) {
    let mut sums = [[simd.splat(0.0); N]; TILE];
    for t in 0..TILE {
        for i in 0..N {
            sums[t][i] = simd.load(&o[t][n + i]);
        }
    }
    for (weight, row) in weights.iter().zip(rows.chunks_exact(width)) {
        let row = row.as_chunks::<TILE>().0[tile];
        let value = [
            simd.splat(row[0]),
            simd.splat(row[1]),
            simd.splat(row[2]),
            simd.splat(row[3]),
        ];
        for i in 0..N {
            let weight = simd.load(&weight[n + i]);
            for t in 0..TILE {
                sums[t][i] = products.add(weight, value[t], sums[t][i]);
            }
        }
    }
    for t in 0..TILE {
        for i in 0..N {
            simd.store(sums[t][i], &mut o[t][n + i]);
        }
    }
}
