//! Cross-entropy of rows of logits, and its gradient by the logits, which takes their place.

use super::{Layer, Number, misfit, run_on_parts};
use crate::attend::InstructionSet;
use crate::attend::math::exp;
use crate::attend::vector::{LANES, SimdOps};
use crate::error::Result;

/// Numbers in memory that are read and written.
#[derive(Debug)]
pub enum FloatsInPlace<'a> {
    /// fp32.
    F32(&'a mut [f32]),
    /// bf16 as its bits.
    Bf16(&'a mut [u16]),
}

/// Computes the negative log-likelihood of the target of each row of logits `[R, V]`.
///
/// With `is_grad` the gradient of each row's loss by its logits is written over them, else they stay as they are.
/// A row with NaN or infinity has the loss NaN. -inf counts as a probability of 0.
///
/// # Errors
/// [`Error::Config`] if there are not as many targets and losses as rows, or a target is not below V. Then nothing is
/// written.
///
/// [`Error::Config`]: crate::error::Error::Config
pub fn softmax_loss(
    logits: FloatsInPlace<'_>,
    targets: &[i64],
    losses: &mut [f32],
    is_grad: bool,
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    let count = match &logits {
        FloatsInPlace::F32(x) => x.len(),
        FloatsInPlace::Bf16(x) => x.len(),
    };
    let width = count.checked_div(targets.len()).unwrap_or(0);
    let in_range = |t: &i64| usize::try_from(*t).is_ok_and(|t| t < width);
    if width * targets.len() != count || losses.len() != targets.len() || !targets.iter().all(in_range) {
        let sizes = [count, targets.len(), losses.len()];
        return Err(misfit(
            "cross-entropy",
            &sizes,
            "a target below the number of columns and a loss for each row",
        ));
    }
    if count == 0 {
        return Ok(());
    }
    match logits {
        FloatsInPlace::F32(x) => of_all(&Loss { is_grad }, x, (targets, losses), threads, instructions),
        FloatsInPlace::Bf16(x) => of_all(&Loss { is_grad }, x, (targets, losses), threads, instructions),
    }
}

struct Loss {
    is_grad: bool,
}

fn of_all<K: Number>(
    layer: &Loss,
    logits: &mut [K],
    (targets, losses): (&[i64], &mut [f32]),
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    let (count, width) = (logits.len(), logits.len() / targets.len());
    let parts = logits.chunks_mut(width).zip(targets).zip(losses);
    run_on_parts(layer, parts, count, threads, instructions)
}

impl<'a, K: Number> Layer<((&'a mut [K], &'a i64), &'a mut f32)> for Loss {
    #[inline(always)]
    fn run<S: SimdOps>(&self, simd: S, ((row, target), loss): ((&'a mut [K], &'a i64), &'a mut f32)) {
        let Some(target) = usize::try_from(*target).ok().filter(|t| *t < row.len()) else {
            return; // `softmax_loss` has checked it
        };
        let largest = max(simd, row);
        let sum = sum_exp(simd, row, largest);
        *loss = sum.ln() + (largest - row[target].to_f32());
        if self.is_grad {
            let at = row[target].to_f32();
            softmax(simd, row, largest, 1.0 / sum);
            // the probability of the target minus 1, without a rounding of the probability in between
            let probability = exp(simd, simd.splat(at - largest));
            let grad = simd.fma(probability, simd.splat(1.0 / sum), simd.splat(-1.0));
            row[target] = K::from_vector(simd, grad)[0];
        }
    }
}

#[inline(always)]
fn max<S: SimdOps, K: Number>(simd: S, row: &[K]) -> f32 {
    let (vectors, rest) = row.as_chunks::<LANES>();
    let (fours, others) = vectors.as_chunks::<4>();
    let mut largest = [simd.splat(f32::NEG_INFINITY); 4];
    for four in fours {
        for i in 0..4 {
            largest[i] = simd.max(K::load(simd, &four[i]), largest[i]);
        }
    }
    for x in others {
        largest[0] = simd.max(K::load(simd, x), largest[0]);
    }
    let last = rest.iter().fold(f32::NEG_INFINITY, |a, x| a.max(x.to_f32()));
    let [a, b, c, d] = largest;
    simd.reduce_max(simd.max(simd.max(a, b), simd.max(c, d))).max(last)
}

/// Sum of the exponentials of a row minus its largest number.
#[inline(always)]
fn sum_exp<S: SimdOps, K: Number>(simd: S, row: &[K], largest: f32) -> f32 {
    let (vectors, rest) = row.as_chunks::<LANES>();
    let (fours, others) = vectors.as_chunks::<4>();
    let minus = simd.splat(-largest);
    let mut sums = [simd.splat(0.0); 4];
    for four in fours {
        for i in 0..4 {
            sums[i] = simd.add(sums[i], exp(simd, simd.add(K::load(simd, &four[i]), minus)));
        }
    }
    for x in others {
        sums[0] = simd.add(sums[0], exp(simd, simd.add(K::load(simd, x), minus)));
    }
    if !rest.is_empty() {
        let x = super::padded(simd, rest, f32::NEG_INFINITY);
        sums[1] = simd.add(sums[1], exp(simd, simd.add(x, minus)));
    }
    super::add4(simd, sums)
}

/// Replaces a row by its exponentials minus the largest number, times `factor`.
#[inline(always)]
fn softmax<S: SimdOps, K: Number>(simd: S, row: &mut [K], largest: f32, factor: f32) {
    let (minus, factor) = (simd.splat(-largest), simd.splat(factor));
    let (vectors, rest) = row.as_chunks_mut::<LANES>();
    for x in vectors {
        let power = exp(simd, simd.add(K::load(simd, x), minus));
        *x = K::from_vector(simd, simd.mul(power, factor));
    }
    if !rest.is_empty() {
        let power = exp(simd, simd.add(super::padded(simd, rest, f32::NEG_INFINITY), minus));
        for (x, result) in rest.iter_mut().zip(K::from_vector(simd, simd.mul(power, factor))) {
            *x = result;
        }
    }
}
