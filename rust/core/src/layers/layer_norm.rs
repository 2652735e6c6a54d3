//! `LayerNorm`: rows that are shifted and scaled to mean 0 and variance 1, then by a weight and a bias per column.

use std::mem::MaybeUninit;

use super::{Layer, Number, add4, padded, part_len, run_on_parts, write, write_first};
use crate::attend::vector::{Element, LANES, SimdOps};
use crate::attend::{Floats, FloatsMut, InstructionSet};
use crate::error::{Error, Result};

/// Parameters of [`layer_norm`].
#[derive(Debug, Clone, Copy)]
pub struct LayerNorm<'a> {
    /// Factor of each column, `[W]`.
    pub weight: Floats<'a>,
    /// Term of each column, `[W]`, of the dtype of `weight`.
    pub bias: Floats<'a>,
    /// Number that is added to the variance.
    pub eps: f32,
}

/// Normalizes each row of `x`, shape `[R, W]`.
///
/// Mean and variance are computed in fp32. A row whose squares overflow there has no useful result.
///
/// # Errors
/// [`Error::Config`] if sizes or dtypes do not fit each other. Nothing is written then.
pub fn layer_norm(
    x: Floats<'_>,
    parameters: LayerNorm<'_>,
    out: FloatsMut<'_>,
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    let LayerNorm { weight, bias, eps } = parameters;
    let sizes = [x.len(), out.len(), weight.len(), bias.len()];
    let width = weight.len();
    let fits = width > 0 && bias.len() == width && x.len() == out.len() && x.len().is_multiple_of(width);
    match (x, out, weight, bias) {
        (Floats::F32(x), FloatsMut::F32(out), Floats::F32(weight), Floats::F32(bias)) if fits => {
            of_all(&Rows { weight, bias, eps }, x, out, threads, instructions)
        }
        (Floats::Bf16(x), FloatsMut::Bf16(out), Floats::F32(weight), Floats::F32(bias)) if fits => {
            of_all(&Rows { weight, bias, eps }, x, out, threads, instructions)
        }
        (Floats::Bf16(x), FloatsMut::Bf16(out), Floats::Bf16(weight), Floats::Bf16(bias)) if fits => {
            of_all(&Rows { weight, bias, eps }, x, out, threads, instructions)
        }
        _ => Err(Error::Config(format!(
            "LayerNorm: input, output, weight and bias of {sizes:?} elements: expected whole rows in one dtype, and a \
             weight and a bias of one row each, both in that dtype or in fp32"
        ))),
    }
}

struct Rows<'a, P> {
    weight: &'a [P],
    bias: &'a [P],
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

impl<'a, K: Number, P: Element + Sync> Layer<(&'a [K], &'a mut [MaybeUninit<K>])> for Rows<'_, P> {
    #[inline(always)]
    fn run<S: SimdOps>(&self, simd: S, (x, out): (&[K], &mut [MaybeUninit<K>])) {
        let width = self.weight.len();
        for (row, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let moments = Moments::of_row(simd, row, self.eps);
            self.write_row(simd, row, moments, out);
        }
    }
}

/// Numbers that shift and scale a row: `(x - mean) * scale + offset`.
#[derive(Clone, Copy)]
struct Moments {
    mean: f32,
    scale: f32,
    /// Correction of the rounding of `mean`. Without it a constant row of large numbers would not become 0.
    offset: f32,
}

impl Moments {
    #[inline(always)]
    fn of_row<S: SimdOps, K: Element>(simd: S, row: &[K], eps: f32) -> Self {
        #[expect(
            clippy::cast_precision_loss,
            reason = "rounding the number of elements changes the result by a rounding"
        )]
        let count = row.len() as f32;
        let mean = sum(simd, row) / count;
        let (rest, squares) = sums_around(simd, row, mean);
        let (rest, variance) = (rest / count, squares / count);
        let square = rest * rest;
        let variance = if square < variance { variance - square } else { variance }; // NaN stays NaN
        let scale = 1.0 / (variance + eps).sqrt();
        Self {
            mean,
            scale,
            offset: -rest * scale,
        }
    }
}

#[inline(always)]
fn sum<S: SimdOps, K: Element>(simd: S, row: &[K]) -> f32 {
    let (vectors, rest) = row.as_chunks::<LANES>();
    let (fours, others) = vectors.as_chunks::<4>();
    let mut sums = [simd.splat(0.0); 4];
    for four in fours {
        for i in 0..4 {
            sums[i] = simd.add(sums[i], K::load(simd, &four[i]));
        }
    }
    for x in others {
        sums[0] = simd.add(sums[0], K::load(simd, x));
    }
    sums[1] = simd.add(sums[1], padded(simd, rest, 0.0));
    add4(simd, sums)
}

/// Sum of `x - mean`, and of its square.
#[inline(always)]
fn sums_around<S: SimdOps, K: Element>(simd: S, row: &[K], mean: f32) -> (f32, f32) {
    let (vectors, rest) = row.as_chunks::<LANES>();
    let (fours, others) = vectors.as_chunks::<4>();
    let minus = simd.splat(-mean);
    let (mut sums, mut squares) = ([simd.splat(0.0); 4], [simd.splat(0.0); 4]);
    for four in fours {
        for i in 0..4 {
            let x = simd.add(K::load(simd, &four[i]), minus);
            (sums[i], squares[i]) = (simd.add(sums[i], x), simd.fma(x, x, squares[i]));
        }
    }
    for x in others {
        let x = simd.add(K::load(simd, x), minus);
        (sums[0], squares[0]) = (simd.add(sums[0], x), simd.fma(x, x, squares[0]));
    }
    let x = simd.add(padded(simd, rest, mean), minus);
    (sums[1], squares[1]) = (simd.add(sums[1], x), simd.fma(x, x, squares[1]));
    (add4(simd, sums), add4(simd, squares))
}

impl<P: Element> Rows<'_, P> {
    #[inline(always)]
    fn write_row<S: SimdOps, K: Number>(&self, simd: S, row: &[K], moments: Moments, out: &mut [MaybeUninit<K>]) {
        let (weights, weights_rest) = self.weight.as_chunks::<LANES>();
        let (biases, biases_rest) = self.bias.as_chunks::<LANES>();
        let (vectors, rest) = row.as_chunks::<LANES>();
        let (out, out_rest) = out.as_chunks_mut::<LANES>();
        let [minus, scale, offset] = [-moments.mean, moments.scale, moments.offset].map(|x| simd.splat(x));
        for (((x, weight), bias), to) in vectors.iter().zip(weights).zip(biases).zip(out) {
            let x = simd.fma(simd.add(K::load(simd, x), minus), scale, offset);
            write(simd, simd.fma(x, P::load(simd, weight), P::load(simd, bias)), to);
        }
        if !rest.is_empty() {
            let x = simd.fma(simd.add(padded(simd, rest, 0.0), minus), scale, offset);
            let (weight, bias) = (padded(simd, weights_rest, 0.0), padded(simd, biases_rest, 0.0));
            write_first(simd, simd.fma(x, weight, bias), out_rest);
        }
    }
}
