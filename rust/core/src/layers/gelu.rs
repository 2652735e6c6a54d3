//! GELU, x times the normal distribution function of x.

use std::mem::MaybeUninit;

use super::{Layer, Number, padded, run_on_parts, write, write_first};
use crate::attend::math::exp;
use crate::attend::vector::{LANES, SimdOps};
use crate::attend::{Floats, FloatsMut, InstructionSet};
use crate::error::{Error, Result};

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
pub fn gelu(
    x: Floats<'_>,
    out: FloatsMut<'_>,
    approximation: Approximation,
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    match (x, out) {
        (Floats::F32(x), FloatsMut::F32(out)) if x.len() == out.len() => {
            run_on_parts(&approximation, x, out, 1, threads, instructions)
        }
        (Floats::Bf16(x), FloatsMut::Bf16(out)) if x.len() == out.len() => {
            run_on_parts(&approximation, x, out, 1, threads, instructions)
        }
        (x, out) => Err(Error::Config(format!(
            "GELU: an input of {} elements and an output of {}: expected the same size and dtype",
            x.len(),
            out.len()
        ))),
    }
}

impl<K: Number> Layer<K> for Approximation {
    #[inline(always)]
    fn run<S: SimdOps>(&self, simd: S, x: &[K], out: &mut [MaybeUninit<K>]) {
        match self {
            Self::Exact => of_part::<S, K, false>(simd, x, out),
            Self::Tanh => of_part::<S, K, true>(simd, x, out),
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

/// `max(x, 0) - |x| p`, where p is the probability of a value below -|x|. No digits cancel.
#[inline(always)]
fn of_vector<S: SimdOps, const TANH: bool>(simd: S, x: S::Vector) -> S::Vector {
    /// The product with p is below 1e-14 from here on.
    const END: f32 = -8.0;
    let end = simd.splat(END);
    let below = simd.max(end, simd.min(x, simd.mul(x, simd.splat(-1.0)))); // -|x|
    let p = if TANH {
        logistic(simd, below)
    } else {
        normal(simd, below)
    };
    let p = simd.select_less(end, below, p, simd.splat(0.0));
    simd.fma(below, p, simd.max(simd.splat(0.0), x))
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

/// `(1 + tanh(y)) / 2` for y = sqrt(2 / pi) * (x + 0.044715 x^3) and x from -8 to 0.
#[inline(always)]
fn logistic<S: SimdOps>(simd: S, x: S::Vector) -> S::Vector {
    const TWICE: f32 = 1.595_769; // 2 sqrt(2 / pi)
    let cube = simd.mul(simd.mul(x, x), simd.splat(TWICE * 0.044_715));
    let power = exp(simd, simd.mul(x, simd.add(cube, simd.splat(TWICE))));
    simd.div(power, simd.add(power, simd.splat(1.0)))
}
