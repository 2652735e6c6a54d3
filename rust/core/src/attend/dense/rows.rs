//! Copies of queries, keys and values that the products read, and the rows that they write.

use super::super::Floats;
use super::super::vector::{F32x16, LANES, SimdOps};
use super::products::Products;
use super::{Out, PerQuery, Rows, Scratch, Strided, TILE};

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

/// Copies keys and values of one head, the rows of each source behind those of the one before.
#[inline(always)]
pub(super) fn copy_keys_and_values<S: SimdOps, P: Products<S>>(
    simd: S,
    sources: &[[Rows<'_>; 2]],
    dim: usize,
    scratch: &mut Scratch,
) {
    let rows = sources.iter().map(|[k, _]| k.count).sum::<usize>();
    let (lanes, width) = (
        dim.div_ceil(P::PACKED).next_multiple_of(LANES),
        dim.next_multiple_of(LANES),
    );
    scratch.keys.clear();
    scratch
        .keys
        .resize(rows.next_multiple_of(TILE) * lanes / LANES, [0.0; LANES]);
    let keys = sources.iter().flat_map(|[k, _]| rows_of(*k, dim));
    for (row, to) in keys.zip(scratch.keys.chunks_exact_mut(lanes / LANES)) {
        for (i, to) in to.iter_mut().enumerate() {
            simd.store(row.lanes::<S, P>(simd, i), to);
        }
    }
    scratch.values.clear();
    scratch
        .values
        .resize(rows.next_multiple_of(TILE) / P::PACKED * width / LANES, [0.0; LANES]);
    let mut values = sources.iter().flat_map(|[_, v]| rows_of(*v, dim));
    for to in scratch.values.chunks_exact_mut(width / LANES) {
        let Some(first) = values.next() else { break };
        let second = if P::PACKED == 2 { values.next() } else { None };
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

/// The rows of a head, in order.
#[inline(always)]
fn rows_of(rows: Rows<'_>, dim: usize) -> impl Iterator<Item = Row<'_>> {
    (rows.first..rows.first + rows.count).map(move |row| rows.row(row, dim))
}

impl<'a> Rows<'a> {
    #[inline(always)]
    fn row(self, row: usize, dim: usize) -> Row<'a> {
        let [sequence, head] = self.place;
        Row::new(self.tensor, [sequence, head, row], dim)
    }
}

/// Copies the queries of a block. Those that the block lacks are 0.
#[inline(always)]
pub(super) fn copy_queries<S: SimdOps, P: Products<S>>(simd: S, queries: Rows<'_>, dim: usize, q: &mut Vec<PerQuery>) {
    let columns = dim.div_ceil(P::PACKED).div_ceil(LANES);
    q.resize(columns * LANES, PerQuery::default());
    for n in 0..queries.count.div_ceil(LANES) {
        for i in 0..columns {
            let mut rows = [simd.splat(0.0); LANES];
            for (t, lanes) in rows.iter_mut().enumerate().take(queries.count - LANES * n) {
                let row = queries.row(queries.first + LANES * n + t, dim);
                *lanes = row.lanes::<S, P>(simd, i);
            }
            for (column, to) in simd.transpose(rows).into_iter().zip(&mut q[LANES * i..]) {
                simd.store(column, &mut to[n]);
            }
        }
    }
}

/// Copies rows of a head in fp32, in whole vectors, behind what `to` has.
#[inline(always)]
pub(super) fn append_rows<S: SimdOps>(simd: S, rows: Rows<'_>, dim: usize, to: &mut Vec<F32x16>) {
    let (width, start) = (dim.div_ceil(LANES), to.len());
    to.resize(start + rows.count * width, [0.0; LANES]);
    for (row, to) in rows_of(rows, dim).zip(to[start..].chunks_exact_mut(width)) {
        for (i, to) in to.iter_mut().enumerate() {
            simd.store(row.floats(simd, i), to);
        }
    }
}

/// Transposes rows of `width` vectors, of which there are a multiple of 16.
#[inline(always)]
pub(super) fn transpose_rows<S: SimdOps>(simd: S, rows: &[F32x16], width: usize, to: &mut Vec<PerQuery>) {
    to.resize(width * LANES, PerQuery::default());
    for (n, rows) in rows.chunks_exact(LANES * width).enumerate() {
        for (i, to) in to.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let mut block = [simd.splat(0.0); LANES];
            for (to, row) in block.iter_mut().zip(rows.chunks_exact(width)) {
                *to = simd.load(&row[i]);
            }
            for (column, to) in simd.transpose(block).into_iter().zip(to) {
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
    out: Out<'_, T>,
    convert: impl Fn(f32) -> T,
) {
    let ([o_stride, lse_stride], o, lse) = (out.strides, out.o, out.lse);
    for (n, (o, lse)) in o
        .chunks_mut(LANES * o_stride)
        .zip(lse.chunks_mut(LANES * lse_stride))
        .enumerate()
        .take(scratch.vectors)
    {
        let mut inverse = scratch.sum[n];
        for (inverse, (lse, max)) in inverse
            .iter_mut()
            .zip(lse.iter_mut().step_by(lse_stride).zip(scratch.max[n]))
        {
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
            for (row, o) in simd.transpose(vectors).into_iter().zip(o.chunks_mut(o_stride)) {
                let mut numbers = [0.0; LANES];
                simd.store(row, &mut numbers);
                for (to, from) in o[..dim][LANES * i..].iter_mut().zip(numbers) {
                    to.write(convert(from));
                }
            }
        }
    }
}
