//! `RMSNorm`: rows that are scaled to a mean square of 1, then by a weight per column, and its gradient by the input.

use std::mem::MaybeUninit;

use super::{Layer, Number, add4, misfit, padded, part_len, run_on_parts, write, write_first};
use crate::attend::vector::{Element, LANES, SimdOps};
use crate::attend::{Floats, FloatsMut, InstructionSet};
use crate::error::Result;

/// Parameters of [`rms_norm`].
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm<'a> {
    /// Factor of each column, `[W]`.
    pub weight: Floats<'a>,
    /// Number that is added to the mean square.
    pub eps: f32,
}

const EXPECTED: &str = "whole rows in one dtype, and a weight of one row in that dtype or in fp32";

/// Normalizes each row of `x`, shape `[R, W]`. The mean square is computed in fp32.
///
/// # Errors
/// [`Error::Config`] if sizes or dtypes do not fit each other. Nothing is written then.
///
/// [`Error::Config`]: crate::error::Error::Config
pub fn rms_norm(
    x: Floats<'_>,
    RmsNorm { weight, eps }: RmsNorm<'_>,
    out: FloatsMut<'_>,
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    let (sizes, width) = ([x.len(), out.len(), weight.len()], weight.len());
    let fits = width > 0 && x.len() == out.len() && x.len().is_multiple_of(width);
    match (x, out, weight) {
        (Floats::F32(x), FloatsMut::F32(out), Floats::F32(weight)) if fits => {
            of_all(&Rows { weight, eps }, x, out, threads, instructions)
        }
        (Floats::Bf16(x), FloatsMut::Bf16(out), Floats::F32(weight)) if fits => {
            of_all(&Rows { weight, eps }, x, out, threads, instructions)
        }
        (Floats::Bf16(x), FloatsMut::Bf16(out), Floats::Bf16(weight)) if fits => {
            of_all(&Rows { weight, eps }, x, out, threads, instructions)
        }
        _ => Err(misfit("RMSNorm", &sizes, EXPECTED)),
    }
}

/// Computes the gradient of [`rms_norm`] by its input from that by its output, `dy`.
///
/// # Errors
/// [`Error::Config`] if sizes or dtypes do not fit each other. Nothing is written then.
///
/// [`Error::Config`]: crate::error::Error::Config
pub fn rms_norm_grad(
    x: Floats<'_>,
    RmsNorm { weight, eps }: RmsNorm<'_>,
    dy: Floats<'_>,
    dx: FloatsMut<'_>,
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    let (sizes, width) = ([x.len(), dy.len(), dx.len(), weight.len()], weight.len());
    let fits = width > 0 && sizes[1..3] == sizes[..2] && x.len().is_multiple_of(width);
    match (x, dy, dx, weight) {
        (Floats::F32(x), Floats::F32(dy), FloatsMut::F32(dx), Floats::F32(weight)) if fits => {
            grad_of_all(&Rows { weight, eps }, (x, dy), dx, threads, instructions)
        }
        (Floats::Bf16(x), Floats::Bf16(dy), FloatsMut::Bf16(dx), Floats::F32(weight)) if fits => {
            grad_of_all(&Rows { weight, eps }, (x, dy), dx, threads, instructions)
        }
        (Floats::Bf16(x), Floats::Bf16(dy), FloatsMut::Bf16(dx), Floats::Bf16(weight)) if fits => {
            grad_of_all(&Rows { weight, eps }, (x, dy), dx, threads, instructions)
        }
        _ => Err(misfit("RMSNorm", &sizes, EXPECTED)),
    }
}

struct Rows<'a, P> {
    weight: &'a [P],
    eps: f32,
}

fn of_all<K: Number, P: Element + Sync>(
    rows: &Rows<'_, P>,
    x: &[K],
    out: &mut [MaybeUninit<K>],
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    let (count, part) = (x.len(), part_len(rows.weight.len()));
    run_on_parts(
        rows,
        x.chunks(part).zip(out.chunks_mut(part)),
        count,
        threads,
        instructions,
    )
}

fn grad_of_all<K: Number, P: Element + Sync>(
    rows: &Rows<'_, P>,
    (x, dy): (&[K], &[K]),
    dx: &mut [MaybeUninit<K>],
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    let (count, part) = (x.len(), part_len(rows.weight.len()));
    let parts = x.chunks(part).zip(dy.chunks(part)).zip(dx.chunks_mut(part));
    run_on_parts(rows, parts, count, threads, instructions)
}

impl<'a, K: Number, P: Element + Sync> Layer<(&'a [K], &'a mut [MaybeUninit<K>])> for Rows<'_, P> {
    #[inline(always)]
    fn run<S: SimdOps>(&self, simd: S, (x, out): (&[K], &mut [MaybeUninit<K>])) {
        let width = self.weight.len();
        let (weights, weights_rest) = self.weight.as_chunks::<LANES>();
        for (row, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let scale = simd.splat(self.scale(simd, row));
            let (vectors, rest) = row.as_chunks::<LANES>();
            let (out, out_rest) = out.as_chunks_mut::<LANES>();
            for ((x, weight), to) in vectors.iter().zip(weights).zip(out) {
                write(
                    simd,
                    simd.mul(simd.mul(K::load(simd, x), scale), P::load(simd, weight)),
                    to,
                );
            }
            if !rest.is_empty() {
                let x = simd.mul(padded(simd, rest, 0.0), scale);
                write_first(simd, simd.mul(x, padded(simd, weights_rest, 0.0)), out_rest);
            }
        }
    }
}

impl<'a, K: Number, P: Element + Sync> Layer<((&'a [K], &'a [K]), &'a mut [MaybeUninit<K>])> for Rows<'_, P> {
    #[inline(always)]
    fn run<S: SimdOps>(&self, simd: S, ((x, dy), dx): ((&[K], &[K]), &mut [MaybeUninit<K>])) {
        let width = self.weight.len();
        let rows = x.chunks_exact(width).zip(dy.chunks_exact(width));
        for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(width)) {
            self.grad_of_row(simd, x, dy, dx);
        }
    }
}

impl<P: Element> Rows<'_, P> {
    /// Factor of a row: 1 over its root mean square.
    #[inline(always)]
    fn scale<S: SimdOps, K: Element>(&self, simd: S, row: &[K]) -> f32 {
        let (vectors, rest) = row.as_chunks::<LANES>();
        let (fours, others) = vectors.as_chunks::<4>();
        let mut squares = [simd.splat(0.0); 4];
        for four in fours {
            for i in 0..4 {
                let x = K::load(simd, &four[i]);
                squares[i] = simd.fma(x, x, squares[i]);
            }
        }
        for x in others {
            let x = K::load(simd, x);
            squares[0] = simd.fma(x, x, squares[0]);
        }
        let x = padded(simd, rest, 0.0);
        squares[1] = simd.fma(x, x, squares[1]);
        1.0 / (add4(simd, squares) / self.width() + self.eps).sqrt()
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "rounding the number of elements changes the result by a rounding"
    )]
    fn width(&self) -> f32 {
        self.weight.len() as f32
    }

    /// With `n = scale * x` and `d = weight * dy`, the gradient is `scale * (d - n * mean(n * d))`.
    #[inline(always)]
    fn grad_of_row<S: SimdOps, K: Number>(&self, simd: S, x: &[K], dy: &[K], dx: &mut [MaybeUninit<K>]) {
        let (weights, weights_rest) = self.weight.as_chunks::<LANES>();
        let factor = self.scale(simd, x);
        let scale = simd.splat(factor);
        let ((x, rest), (dy, above)) = (x.as_chunks::<LANES>(), dy.as_chunks::<LANES>());
        let (dx, to_rest) = dx.as_chunks_mut::<LANES>();
        let mut sums = [simd.splat(0.0); 2];
        for ((x, dy), weight) in x.iter().zip(dy).zip(weights) {
            let d = simd.mul(K::load(simd, dy), P::load(simd, weight));
            sums = [sums[1], simd.fma(simd.mul(K::load(simd, x), scale), d, sums[0])];
        }
        let last = simd.mul(padded(simd, rest, 0.0), scale);
        let last_d = simd.mul(padded(simd, above, 0.0), padded(simd, weights_rest, 0.0));
        sums[0] = simd.fma(last, last_d, sums[0]);
        let mean = simd.reduce_sum(simd.add(sums[0], sums[1])) / self.width();
        let minus = simd.splat(-mean);
        for (((x, dy), weight), to) in x.iter().zip(dy).zip(weights).zip(dx) {
            let d = simd.mul(K::load(simd, dy), P::load(simd, weight));
            let n = simd.mul(K::load(simd, x), scale);
            write(simd, simd.mul(simd.fma(n, minus, d), scale), to);
        }
        if !rest.is_empty() {
            write_first(simd, simd.mul(simd.fma(last, minus, last_d), scale), to_rest);
        }
    }
}
