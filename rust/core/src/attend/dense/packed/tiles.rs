//! Products of small matrices in fp32, in tiles of four rows and up to four vectors that stay in registers.

use super::super::{PerQuery, QUERIES, TILE, VECTORS};
use crate::attend::vector::{F32x16, LANES, SimdOps};

/// Calls a function of a constant number of vectors until the vectors from `$n` to `$end` are done.
macro_rules! in_groups {
    ($simd:ident: $S:ident, $n:expr, $end:expr, |$at:ident, $N:ident| $call:expr) => {
        let (mut $at, end) = ($n, $end);
        while $at < end {
            let left = if $S::NUM_REGISTERS >= 32 { end - $at } else { 1 };
            if left >= VECTORS {
                const $N: usize = VECTORS;
                $call;
                $at += $N;
            } else if left == 3 {
                const $N: usize = 3;
                $call;
                $at += $N;
            } else if left == 2 {
                const $N: usize = 2;
                $call;
                $at += $N;
            } else {
                const $N: usize = 1;
                $call;
                $at += $N;
            }
        }
    };
}

/// For each row of `a`, sets vectors `n` to `end` of a row of `to` to the sum of the rows of `b`, weighted by it.
#[inline(always)]
pub(super) fn set_from_rows<S: SimdOps>(
    simd: S,
    a: &[F32x16],
    b: &[PerQuery],
    (n, end): (usize, usize),
    to: &mut [PerQuery],
) {
    let width = b.len().div_ceil(LANES);
    for (a, to) in a.chunks_exact(TILE * width).zip(to.as_chunks_mut::<TILE>().0) {
        let a = quarters(a.as_flattened());
        in_groups!(simd: S, n, end, |at, N| {
            let sums = weigh_rows::<S, N>(simd, a, (b.as_flattened(), VECTORS, at));
            for t in 0..TILE {
                for i in 0..N {
                    simd.store(sums[t][i], &mut to[t][at + i]);
                }
            }
        });
    }
}

/// For each row of `a`, adds the rows of `b`, weighted by numbers `from` to `end` of it, to a row of `to`.
#[inline(always)]
pub(super) fn add_from_rows<S: SimdOps>(
    simd: S,
    a: &[PerQuery],
    (from, end): (usize, usize),
    (b, width): (&[F32x16], usize),
    to: &mut [F32x16],
) {
    for (a, to) in a.as_chunks::<TILE>().0.iter().zip(to.chunks_exact_mut(TILE * width)) {
        let [a, b_, c, d] = a;
        let rows = [a, b_, c, d].map(|row| &row.as_flattened()[from..end]);
        in_groups!(simd: S, 0, width, |at, N| {
            add::<S, N>(simd, &weigh_rows::<S, N>(simd, rows, (b, width, at)), to, (width, at));
        });
    }
}

/// For each column from `from` to `end` of `a`, adds the rows of `b`, weighted by it, to a row of `to`.
#[inline(always)]
pub(super) fn add_from_columns<S: SimdOps>(
    simd: S,
    a: &[PerQuery],
    (from, end): (usize, usize),
    (b, width): (&[F32x16], usize),
    to: &mut [F32x16],
) {
    let columns = from / TILE..end.div_ceil(TILE);
    for (column, to) in columns.zip(to.chunks_exact_mut(TILE * width)) {
        in_groups!(simd: S, 0, width, |at, N| {
            let mut sums = [[simd.splat(0.0); N]; TILE];
            let weights = a.as_flattened().as_flattened().as_chunks::<TILE>().0;
            let weights = weights[column..].iter().step_by(QUERIES / TILE);
            for (a, b) in weights.zip(b.chunks_exact(width)) {
                add_row::<S, N>(simd, *a, &b[at..], &mut sums);
            }
            add::<S, N>(simd, &sums, to, (width, at));
        });
    }
}

/// Sum of `rows`, weighted by each of four rows. They have `width` vectors, of which those from `at` on count.
#[inline(always)]
fn weigh_rows<S: SimdOps, const N: usize>(
    simd: S,
    [a, b, c, d]: [&[f32]; TILE],
    (rows, width, at): (&[F32x16], usize, usize),
) -> [[S::Vector; N]; TILE] {
    let mut sums = [[simd.splat(0.0); N]; TILE];
    for ((((row, a), b), c), d) in rows.chunks_exact(width).zip(a).zip(b).zip(c).zip(d) {
        add_row::<S, N>(simd, [*a, *b, *c, *d], &row[at..], &mut sums);
    }
    sums
}

#[inline(always)]
fn add_row<S: SimdOps, const N: usize>(
    simd: S,
    weights: [f32; TILE],
    row: &[F32x16],
    sums: &mut [[S::Vector; N]; TILE],
) {
    let row = &row[..N];
    let [a, b, c, d] = weights;
    let weights = [simd.splat(a), simd.splat(b), simd.splat(c), simd.splat(d)];
    for i in 0..N {
        let vector = simd.load(&row[i]);
        for t in 0..TILE {
            sums[t][i] = simd.fma(vector, weights[t], sums[t][i]);
        }
    }
}

/// Adds the sums of one tile. They start at 0 and not at what `to` holds, because one running sum over all queries has
/// nearly twice the error over 1,024 of them.
#[inline(always)]
fn add<S: SimdOps, const N: usize>(
    simd: S,
    sums: &[[S::Vector; N]; TILE],
    to: &mut [F32x16],
    (width, at): (usize, usize),
) {
    for t in 0..TILE {
        for i in 0..N {
            let to = &mut to[t * width + at + i];
            simd.store(simd.add(simd.load(to), sums[t][i]), to);
        }
    }
}

/// The four equal parts of a slice.
#[inline(always)]
fn quarters(x: &[f32]) -> [&[f32]; TILE] {
    let (a, rest) = x.split_at(x.len() / TILE);
    let (b, rest) = rest.split_at(a.len());
    let (c, d) = rest.split_at(a.len());
    [a, b, c, d]
}
