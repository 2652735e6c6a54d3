//! GELU, x times the normal distribution function of x.

use std::mem::MaybeUninit;

use super::{Layer, Number, misfit, padded, part_len, run_on_parts, write, write_first};
use crate::attend::math::exp;
use crate::attend::vector::{LANES, SimdOps};
use crate::attend::{Floats, FloatsMut, InstructionSet};
use crate::error::Result;

/// Way to compute GELU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Approximation {
    /// The function itself, with an error of at most 1e-7 times the larger of 1 and |x|.
    Exact,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`, with an error of the same size.
    Tanh,
}

/// Computes GELU of each element. The result is 0 for -inf.
///
/// # Errors
/// [`Error::Config`] if the output has another size or dtype than the input. Nothing is written then.
///
/// [`Error::Config`]: crate::error::Error::Config
pub fn gelu(
    x: Floats<'_>,
    out: FloatsMut<'_>,
    approximation: Approximation,
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    let sizes = [x.len(), out.len()];
    match (x, out) {
        (Floats::F32(x), FloatsMut::F32(out)) if x.len() == out.len() => {
            of_all(approximation, x, out, threads, instructions)
        }
        (Floats::Bf16(x), FloatsMut::Bf16(out)) if x.len() == out.len() => {
            of_all(approximation, x, out, threads, instructions)
        }
        _ => Err(misfit("GELU", &sizes, EXPECTED)),
    }
}

/// Computes the gradient of [`gelu`] by its input from that by its output, `dy`.
///
/// # Errors
/// [`Error::Config`] if sizes or dtypes differ. Nothing is written then.
///
/// [`Error::Config`]: crate::error::Error::Config
pub fn gelu_grad(
    x: Floats<'_>,
    dy: Floats<'_>,
    dx: FloatsMut<'_>,
    approximation: Approximation,
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    let sizes = [x.len(), dy.len(), dx.len()];
    let fits = sizes[1..] == sizes[..2];
    match (x, dy, dx) {
        (Floats::F32(x), Floats::F32(dy), FloatsMut::F32(dx)) if fits => {
            grad_of_all(approximation, (x, dy), dx, threads, instructions)
        }
        (Floats::Bf16(x), Floats::Bf16(dy), FloatsMut::Bf16(dx)) if fits => {
            grad_of_all(approximation, (x, dy), dx, threads, instructions)
        }
        _ => Err(misfit("GELU", &sizes, EXPECTED)),
    }
}

const EXPECTED: &str = "the same size and dtype";

fn of_all<K: Number>(
    layer: Approximation,
    x: &[K],
    out: &mut [MaybeUninit<K>],
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    let (count, part) = (x.len(), part_len(1));
    run_on_parts(
        &layer,
        x.chunks(part).zip(out.chunks_mut(part)),
        count,
        threads,
        instructions,
    )
}

fn grad_of_all<K: Number>(
    layer: Approximation,
    (x, dy): (&[K], &[K]),
    dx: &mut [MaybeUninit<K>],
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    let (count, part) = (x.len(), part_len(1));
    let parts = x.chunks(part).zip(dy.chunks(part)).zip(dx.chunks_mut(part));
    run_on_parts(&layer, parts, count, threads, instructions)
}

impl<'a, K: Number> Layer<(&'a [K], &'a mut [MaybeUninit<K>])> for Approximation {
    #[inline(always)]
    fn run<S: SimdOps>(&self, simd: S, (x, out): (&[K], &mut [MaybeUninit<K>])) {
        match self {
            Self::Exact => of_part::<S, K, false>(simd, x, out),
            Self::Tanh => of_part::<S, K, true>(simd, x, out),
        }
    }
}

impl<'a, K: Number> Layer<((&'a [K], &'a [K]), &'a mut [MaybeUninit<K>])> for Approximation {
    #[inline(always)]
    fn run<S: SimdOps>(&self, simd: S, ((x, dy), dx): ((&[K], &[K]), &mut [MaybeUninit<K>])) {
        match self {
            Self::Exact => grad_of_part::<S, K, false>(simd, (x, dy), dx),
            Self::Tanh => grad_of_part::<S, K, true>(simd, (x, dy), dx),
        }
    }
}

#[inline(always)]
fn of_part<S: SimdOps, K: Number, const TANH: bool>(simd: S, x: &[K], out: &mut [MaybeUninit<K>]) {
    let (x, rest) = x.as_chunks::<LANES>();
    let (out, out_rest) = out.as_chunks_mut::<LANES>();
    for (x, to) in x.iter().zip(out) {
        write(simd, of_vector::<S, TANH>(simd, K::load(simd, x)), to);
    }
    if !rest.is_empty() {
        write_first(simd, of_vector::<S, TANH>(simd, padded(simd, rest, 0.0)), out_rest);
    }
}

#[inline(always)]
fn grad_of_part<S: SimdOps, K: Number, const TANH: bool>(simd: S, (x, dy): (&[K], &[K]), dx: &mut [MaybeUninit<K>]) {
    let ((x, rest), (dy, above)) = (x.as_chunks::<LANES>(), dy.as_chunks::<LANES>());
    let (dx, to_rest) = dx.as_chunks_mut::<LANES>();
    for ((x, dy), to) in x.iter().zip(dy).zip(dx) {
        let slope = slope::<S, TANH>(simd, K::load(simd, x));
        write(simd, simd.mul(slope, K::load(simd, dy)), to);
    }
    if !rest.is_empty() {
        let slope = slope::<S, TANH>(simd, padded(simd, rest, 0.0));
        write_first(simd, simd.mul(slope, padded(simd, above, 0.0)), to_rest);
    }
}

/// The product with p, and p times x^3, are below 1e-11 from here on.
const END: f32 = -8.0;

/// -|x|, at least [`END`].
#[inline(always)]
fn below<S: SimdOps>(simd: S, x: S::Vector) -> S::Vector {
    simd.max(simd.splat(END), simd.min(x, simd.mul(x, simd.splat(-1.0))))
}

/// Probability of a value below a number from [`END`] to 0, and 0 for [`END`] itself.
#[inline(always)]
fn probability<S: SimdOps, const TANH: bool>(simd: S, below: S::Vector) -> S::Vector {
    let p = if TANH {
        logistic(simd, below)
    } else {
        normal(simd, below)
    };
    simd.select_less(simd.splat(END), below, p, simd.splat(0.0))
}

/// `max(x, 0) - |x| p`, where p is the probability of a value below -|x|. No digits cancel.
#[inline(always)]
fn of_vector<S: SimdOps, const TANH: bool>(simd: S, x: S::Vector) -> S::Vector {
    let below = below(simd, x);
    let p = probability::<S, TANH>(simd, below);
    simd.fma(below, p, simd.max(simd.splat(0.0), x))
}

/// Derivative of GELU: the probability of a value below x, plus x times the density at x.
///
/// The derivative at -|x| is p - |x| density, and that at |x| is 1 minus it.
#[inline(always)]
fn slope<S: SimdOps, const TANH: bool>(simd: S, x: S::Vector) -> S::Vector {
    let zero = simd.splat(0.0);
    let below = below(simd, x);
    let p = probability::<S, TANH>(simd, below);
    let square = simd.mul(below, below);
    let density = if TANH {
        let inner = simd.fma(square, simd.splat(TWICE * 3.0 * 0.044_715), simd.splat(TWICE));
        simd.mul(inner, simd.fma(simd.mul(p, p), simd.splat(-1.0), p))
    } else {
        const FACTOR: f32 = 0.398_942_3; // 1 / sqrt(2 pi)
        simd.mul(exp(simd, simd.mul(square, simd.splat(-0.5))), simd.splat(FACTOR))
    };
    let left = simd.fma(below, density, p);
    let right = simd.fma(left, simd.splat(-1.0), simd.splat(1.0));
    let slope = simd.select_less(x, zero, left, right);
    simd.fma(x, zero, slope) // NaN stays NaN
}

/// Probability of a normal variable below x, for x from -8 to 0.
///
/// A polynomial of x is the base-2 logarithm. Its coefficients minimize the largest error of x times the probability,
/// and of the logarithm near 0.
#[inline(always)]
fn normal<S: SimdOps>(simd: S, x: S::Vector) -> S::Vector {
    let log2 = [
        -2.261_377_2e-6,
        -2.440_556_8e-5,
        -9.807_931e-5,
        3.793_726e-4,
        7.416_297e-3,
        5.276_867e-2,
        -0.459_105_43,
        1.151_120_2,
        -0.999_999_64,
    ];
    let mut sum = simd.splat(-7.911_922_5e-8);
    for c in log2 {
        sum = simd.fma(sum, x, simd.splat(c));
    }
    let n = simd.round(sum);
    let r = simd.fma(n, simd.splat(-1.0), sum);
    let mut power = simd.splat(1.327_647_2e-3);
    for c in [9.675_541e-3, 5.550_713e-2, 0.240_221_2, 0.693_146_94, 1.000_000_1] {
        power = simd.fma(power, r, simd.splat(c));
    }
    simd.mul_exp2(power, n)
}

const TWICE: f32 = 1.595_769; // 2 sqrt(2 / pi)

/// `(1 + tanh(y)) / 2` for y = sqrt(2 / pi) * (x + 0.044715 x^3) and x from -8 to 0.
#[inline(always)]
fn logistic<S: SimdOps>(simd: S, x: S::Vector) -> S::Vector {
    let cube = simd.mul(simd.mul(x, x), simd.splat(TWICE * 0.044_715));
    let power = exp(simd, simd.mul(x, simd.add(cube, simd.splat(TWICE))));
    simd.div(power, simd.add(power, simd.splat(1.0)))
}
