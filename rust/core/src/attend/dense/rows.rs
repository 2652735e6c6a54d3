//! Copies of queries, keys and values that the products read, and the rows that they write.

use std::mem::MaybeUninit;

use super::super::Floats;
use super::super::vector::{LANES, SimdOps};
use super::products::Products;
use super::{Block, DenseInputs, PerQuery, Scratch, Strided, TILE};

/// One row of a tensor.
#[derive(Clone, Copy)]
enum Row<'a> {
    F32(&'a [f32]),
    Bf16(&'a [u16]),
}

impl<'a> Row<'a> {
    /// The row of a sequence and head at the index `row`.
    #[inline(always)]
    fn new(tensor: Strided<'a>, [sequence, head, row]: [usize; 3], dim: usize) -> Self {
        let [a, b, c] = tensor.strides;
        let start = sequence * a + head * b + row * c;
        match tensor.data {
            Floats::F32(x) => Self::F32(&x[start..start + dim]),
            Floats::Bf16(x) => Self::Bf16(&x[start..start + dim]),
        }
    }

    /// Elements `16 * i` to `16 * i + 15` in fp32. Beyond the end of the row they are 0.
    #[inline(always)]
    fn floats<S: SimdOps>(self, simd: S, i: usize) -> S::Vector {
        match self {
            Self::F32(x) => simd.load(&part(x, i)),
            Self::Bf16(x) => simd.load_bf16(&part(x, i)),
        }
    }

    /// Bits of elements `32 * i` to `32 * i + 31` of a row in bf16, two in a lane. Beyond the row they are 0.
    #[inline(always)]
    fn pairs<S: SimdOps>(self, simd: S, i: usize) -> S::Vector {
        let mut lanes = [0; LANES];
        if let Self::Bf16(x) = self {
            let part: [u16; 2 * LANES] = part(x, i);
            for (lane, pair) in lanes.iter_mut().zip(part.as_chunks::<2>().0) {
                *lane = words(pair[0], pair[1]);
            }
        }
        simd.load_bits(&lanes)
    }

    /// The lanes that products over the elements of a row read.
    #[inline(always)]
    fn lanes<S: SimdOps, P: Products<S>>(self, simd: S, i: usize) -> S::Vector {
        if P::PACKED == 2 {
            self.pairs(simd, i)
        } else {
            self.floats(simd, i)
        }
    }

    /// Bits of elements `16 * i` to `16 * i + 15` of two rows in bf16. Those of `self` lie in the lower halves of the
    /// lanes.
    #[inline(always)]
    fn interleaved<S: SimdOps>(self, other: Option<Self>, simd: S, i: usize) -> S::Vector {
        let bits = |row| match row {
            Some(Self::Bf16(x)) => part(x, i),
            _ => [0; LANES],
        };
        let (low, high, mut lanes) = (bits(Some(self)), bits(other), [0; LANES]);
        for (lane, (low, high)) in lanes.iter_mut().zip(low.into_iter().zip(high)) {
            *lane = words(low, high);
        }
        simd.load_bits(&lanes)
    }
}

/// Two bf16 numbers in a word.
#[inline(always)]
fn words(low: u16, high: u16) -> u32 {
    u32::from(low) | u32::from(high) << 16
}

/// Elements `N * i` to `N * i + N - 1`, filled up with zeros.
#[inline(always)]
fn part<T: Copy + Default, const N: usize>(row: &[T], i: usize) -> [T; N] {
    let (whole, rest) = row.as_chunks();
    if let Some(part) = whole.get(i) {
        return *part;
    }
    let mut part = [T::default(); N];
    part[..rest.len()].copy_from_slice(rest);
    part
}

/// Copies keys and values of one head.
#[inline(always)]
pub(super) fn copy_keys_and_values<S: SimdOps, P: Products<S>>(
    simd: S,
    inputs: &DenseInputs<'_>,
    [sequence, head]: [usize; 2],
    scratch: &mut Scratch,
) {
    let (dim, rows) = (inputs.shape[3], inputs.lens[1]);
    let (lanes, width) = (
        dim.div_ceil(P::PACKED).next_multiple_of(LANES),
        dim.next_multiple_of(LANES),
    );
    scratch.keys.clear();
    scratch
        .keys
        .resize(rows.next_multiple_of(TILE) * lanes / LANES, [0.0; LANES]);
    for (row, to) in scratch.keys.chunks_exact_mut(lanes / LANES).take(rows).enumerate() {
        let row = Row::new(inputs.k, [sequence, head, row], dim);
        for (i, to) in to.iter_mut().enumerate() {
            simd.store(row.lanes::<S, P>(simd, i), to);
        }
    }
    scratch.values.clear();
    scratch
        .values
        .resize(rows.next_multiple_of(TILE) / P::PACKED * width / LANES, [0.0; LANES]);
    for (j, to) in scratch
        .values
        .chunks_exact_mut(width / LANES)
        .take(rows.div_ceil(P::PACKED))
        .enumerate()
    {
        let row = |row| (row < rows).then(|| Row::new(inputs.v, [sequence, head, row], dim));
        let Some(first) = row(j * P::PACKED) else { continue };
        let second = row(j * P::PACKED + 1);
        for (i, to) in to.iter_mut().enumerate() {
            let lanes = if P::PACKED == 2 {
                first.interleaved(second, simd, i)
            } else {
                first.floats(simd, i)
            };
            simd.store(lanes, to);
        }
    }
}

/// Copies the queries of a block. Those that the block lacks are 0.
#[inline(always)]
pub(super) fn copy_queries<S: SimdOps, P: Products<S>>(
    simd: S,
    inputs: &DenseInputs<'_>,
    block: Block,
    q: &mut Vec<PerQuery>,
) {
    let (dim, [sequence, head]) = (inputs.shape[3], block.place);
    let columns = dim.div_ceil(P::PACKED).div_ceil(LANES);
    q.resize(columns * LANES, PerQuery::default());
    for n in 0..block.count.div_ceil(LANES) {
        for i in 0..columns {
            let mut rows = [simd.splat(0.0); LANES];
            for (t, lanes) in rows.iter_mut().enumerate().take(block.count - LANES * n) {
                let row = Row::new(inputs.q, [sequence, head, block.first + LANES * n + t], dim);
                *lanes = row.lanes::<S, P>(simd, i);
            }
            for (column, to) in simd.transpose(rows).into_iter().zip(&mut q[LANES * i..]) {
                simd.store(column, &mut to[n]);
            }
        }
    }
}

/// Writes output and log-sum-exp of a block. A query whose weights sum to 0 gets 0 and -inf.
#[inline(always)]
pub(super) fn write<S: SimdOps, T>(
    simd: S,
    scratch: &Scratch,
    dim: usize,
    (o, lse): (&mut [MaybeUninit<T>], &mut [MaybeUninit<f32>]),
    convert: impl Fn(f32) -> T,
) {
    for (n, (o, lse)) in o.chunks_mut(LANES * dim).zip(lse.chunks_mut(LANES)).enumerate() {
        let mut inverse = scratch.sum[n];
        for (inverse, (lse, max)) in inverse.iter_mut().zip(lse.iter_mut().zip(scratch.max[n])) {
            let sum = *inverse;
            lse.write(max + sum.ln());
            *inverse = if sum == 0.0 { 0.0 } else { 1.0 / sum };
        }
        let inverse = simd.load(&inverse);
        for (i, columns) in scratch.o.as_chunks::<LANES>().0.iter().enumerate() {
            let mut vectors = [inverse; LANES];
            for (vector, column) in vectors.iter_mut().zip(columns) {
                *vector = simd.mul(inverse, simd.load(&column[n]));
            }
            for (row, o) in simd.transpose(vectors).into_iter().zip(o.chunks_exact_mut(dim)) {
                let mut numbers = [0.0; LANES];
                simd.store(row, &mut numbers);
                for (to, from) in o[LANES * i..].iter_mut().zip(numbers) {
                    to.write(convert(from));
                }
            }
        }
    }
}
