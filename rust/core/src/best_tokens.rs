//! Log-probabilities of the most likely tokens of rows of logits on CPUs, without those of all other tokens.

#![expect(
    clippy::inline_always,
    reason = "a vector intrinsic compiles to an instruction only inside of a function that enables the instruction set"
)]

use std::mem::MaybeUninit;
use std::sync::Mutex;

use crate::attend::dispatch::Kind;
use crate::attend::math::exp;
use crate::attend::openmp;
use crate::attend::vector::{Element, F32x16, LANES, Scalar, SimdOps};
use crate::attend::{Floats, InstructionSet};
use crate::error::{Error, Result};

/// Number of tokens in a block, whose largest logit is found before single tokens are compared.
const BLOCK: usize = 16 * LANES;

/// Outputs of [`best_tokens`], `[R, n]` each, which need not be initialized.
#[derive(Debug)]
pub struct BestTokens<'a> {
    /// Log-probabilities, the largest first.
    pub logprobs: &'a mut [MaybeUninit<f32>],
    /// Tokens. Of equally likely ones the smallest is the first.
    pub tokens: &'a mut [MaybeUninit<i64>],
}

/// Finds the most likely tokens of each row of logits `[R, V]`, and their log-probabilities over all V tokens.
///
/// The result of a row depends on no other row. A row with a NaN, or with -inf alone, has log-probabilities of NaN.
///
/// * `[vocab, count]`: V and n, 1 to V.
///
/// # Errors
/// [`Error::Config`] if sizes do not fit each other. Nothing is written then.
pub fn best_tokens(
    logits: Floats<'_>,
    [vocab, count]: [usize; 2],
    out: BestTokens<'_>,
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    let rows = out.tokens.len() / count.max(1);
    let fits = (1..=vocab).contains(&count)
        && out.tokens.len() == out.logprobs.len()
        && out.tokens.len() == rows * count
        && rows.checked_mul(vocab) == Some(logits.len());
    if !fits {
        return Err(Error::Config(format!(
            "best tokens: {} logits of a vocabulary of {vocab}, {} log-probabilities and {} tokens: expected whole \
             rows of logits, and 1 to {vocab} best ones for each, got {count}",
            logits.len(),
            out.logprobs.len(),
            out.tokens.len()
        )));
    }
    match logits {
        Floats::F32(x) => of_rows(x, [vocab, count], out, threads.min(rows), instructions),
        Floats::Bf16(x) => of_rows(x, [vocab, count], out, threads.min(rows), instructions),
    }
}

fn of_rows<K: Element + Sync>(
    logits: &[K],
    [vocab, count]: [usize; 2],
    out: BestTokens<'_>,
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    let BestTokens { logprobs, tokens } = out;
    let outputs = logprobs.chunks_exact_mut(count).zip(tokens.chunks_exact_mut(count));
    let rows = Mutex::new(logits.chunks_exact(vocab).zip(outputs));
    let next = || rows.lock().ok().and_then(|mut rows| rows.next());
    openmp::run_on_threads(threads, &|| {
        let mut scratch = Scratch::default();
        while let Some((row, (logprobs, tokens))) = next() {
            let best = BestTokens { logprobs, tokens };
            match instructions.0 {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the value in `Kind::Avx512` proves that the CPU has the enabled instructions.
                Kind::Avx512(simd, _) => unsafe { of_row_avx512(simd, row, best, &mut scratch) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the value in `Kind::Avx2` proves that the CPU has the enabled instructions.
                Kind::Avx2(simd) => unsafe { of_row_avx2(simd, row, best, &mut scratch) },
                Kind::Scalar => of_row(Scalar, row, best, &mut scratch),
            }
        }
    })
}

/// Memory that the rows of a thread share.
#[derive(Default)]
struct Scratch {
    /// Largest logit of each block.
    largest: Vec<f32>,
    /// `largest` in another order.
    sorted: Vec<f32>,
    /// Logits that can be among the best, and their tokens.
    candidates: Vec<(f32, u32)>,
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn of_row_avx512<K: Element>(
    simd: crate::attend::avx512::Avx512,
    logits: &[K],
    best: BestTokens<'_>,
    scratch: &mut Scratch,
) {
    of_row(simd, logits, best, scratch);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn of_row_avx2<K: Element>(simd: crate::attend::avx2::Avx2, logits: &[K], best: BestTokens<'_>, scratch: &mut Scratch) {
    of_row(simd, logits, best, scratch);
}

#[inline(always)]
fn of_row<S: SimdOps, K: Element>(simd: S, logits: &[K], best: BestTokens<'_>, scratch: &mut Scratch) {
    let count = best.tokens.len();
    block_maxima(simd, logits, &mut scratch.largest);
    let max = scratch.largest.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let log_sum = sum_of_exp(simd, logits, max).ln();
    find_candidates(logits, count, scratch);
    let candidates = &mut scratch.candidates;
    let by_logit = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    if candidates.len() > count {
        candidates.select_nth_unstable_by(count - 1, by_logit);
        candidates.truncate(count);
    }
    candidates.sort_unstable_by(by_logit);
    let outputs = best.logprobs.iter_mut().zip(best.tokens);
    for ((logit, token), (logprob, to)) in candidates.iter().zip(outputs) {
        logprob.write(logit - max - log_sum);
        to.write(i64::from(*token));
    }
}

/// Logits in vectors of 16, padded with -inf.
#[inline(always)]
fn vectors<S: SimdOps, K: Element>(simd: S, logits: &[K]) -> impl Iterator<Item = S::Vector> {
    let (whole, rest) = logits.as_chunks::<LANES>();
    let mut last = [f32::NEG_INFINITY; LANES];
    for (to, from) in last.iter_mut().zip(rest) {
        *to = from.to_f32();
    }
    let last = (!rest.is_empty()).then(|| simd.load(&last));
    whole.iter().map(move |x| K::load(simd, x)).chain(last)
}

/// Largest logit of each block, without NaNs.
#[inline(always)]
fn block_maxima<S: SimdOps, K: Element>(simd: S, logits: &[K], largest: &mut Vec<f32>) {
    largest.clear();
    for block in logits.chunks(BLOCK) {
        let mut max = simd.splat(f32::NEG_INFINITY);
        for x in vectors(simd, block) {
            max = simd.max(x, max); // `max` where `x` is NaN
        }
        largest.push(simd.reduce_max(max));
    }
}

/// Sum of `exp(logit - max)`.
#[inline(always)]
fn sum_of_exp<S: SimdOps, K: Element>(simd: S, logits: &[K], max: f32) -> f32 {
    let (shift, mut sums): (_, [_; 4]) = (simd.splat(-max), [simd.splat(0.0); 4]);
    for block in logits.chunks(BLOCK) {
        for (i, x) in vectors(simd, block).enumerate() {
            sums[i % 4] = simd.add(sums[i % 4], exp(simd, simd.add(x, shift)));
        }
    }
    let mut parts = [[0.0; LANES]; 4];
    for (part, sum) in parts.iter_mut().zip(sums) {
        simd.store(sum, part);
    }
    let added: F32x16 = std::array::from_fn(|i| (parts[0][i] + parts[1][i]) + (parts[2][i] + parts[3][i]));
    simd.reduce_sum(simd.load(&added))
}

/// Finds logits among which the `count` best ones are.
///
/// At least `count` logits reach the `count`-th largest block maximum, so smaller logits are left out.
#[inline(always)]
fn find_candidates<K: Element>(logits: &[K], count: usize, scratch: &mut Scratch) {
    let Scratch {
        largest,
        sorted,
        candidates,
    } = scratch;
    candidates.clear();
    let mut bound = f32::NEG_INFINITY;
    if largest.len() >= count {
        sorted.clone_from(largest);
        bound = *sorted.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1;
    }
    for ((block, max), first) in logits.chunks(BLOCK).zip(largest).zip((0_u32..).step_by(BLOCK)) {
        if *max >= bound {
            let found = block.iter().map(|x| x.to_f32()).zip(first..);
            candidates.extend(found.filter(|(x, _)| *x >= bound));
        }
    }
    if candidates.len() < count {
        candidates.clear(); // the row has NaNs
        candidates.extend(logits.iter().map(|x| x.to_f32()).zip(0..));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Log-probabilities and tokens of all rows.
    fn run(logits: Floats<'_>, vocab: usize, count: usize, instructions: InstructionSet) -> (Vec<f32>, Vec<i64>) {
        let size = logits.len() / vocab * count;
        let (mut logprobs, mut tokens) = (vec![MaybeUninit::new(7.0); size], vec![MaybeUninit::new(-7); size]);
        let out = BestTokens {
            logprobs: &mut logprobs,
            tokens: &mut tokens,
        };
        assert_eq!(best_tokens(logits, [vocab, count], out, 2, instructions), Ok(()));
        // SAFETY: all elements were initialized above.
        unsafe {
            (
                logprobs.iter().map(|x| x.assume_init()).collect(),
                tokens.iter().map(|x| x.assume_init()).collect(),
            )
        }
    }

    /// Pseudo-random numbers with `distinct` different values.
    fn numbers(count: usize, distinct: u32) -> Vec<f32> {
        let mut state = 1_u32;
        let next = |_| {
            state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
            f32::from(u16::try_from((state >> 16) % distinct).unwrap_or(0)) * 1e-3
        };
        (0..count).map(next).collect()
    }

    #[test]
    fn equals_a_sort_of_all_tokens() {
        for instructions in InstructionSet::all() {
            for (vocab, distinct) in [
                (1, 9),
                (7, 9),
                (16, 60_000),
                (300, 3),
                (1000, 1),
                (5003, 60_000),
                (9000, 40),
            ] {
                for count in [1, 2, 9, 40].map(|n: usize| n.min(vocab)) {
                    let logits = numbers(3 * vocab, distinct);
                    let (logprobs, tokens) = run(Floats::F32(&logits), vocab, count, instructions);
                    for (r, row) in logits.chunks(vocab).enumerate() {
                        let mut order: Vec<usize> = (0..vocab).collect();
                        order.sort_by(|a, b| row[*b].total_cmp(&row[*a])); // stable
                        let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
                        for (i, place) in (r * count..(r + 1) * count).enumerate() {
                            assert_eq!(
                                usize::try_from(tokens[place]),
                                Ok(order[i]),
                                "{vocab} {distinct} {count}"
                            );
                            let error = f64::from(row[order[i]]) - sum.ln() - f64::from(logprobs[place]);
                            assert!(error.abs() < 1e-5, "{} {vocab} {count}: {error}", instructions.name());
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn bf16_equals_its_values_in_fp32_to_the_bit() {
        let bits: Vec<u16> = numbers(2 * 3001, 60_000)
            .iter()
            .map(|x| (x.to_bits() >> 16) as u16)
            .collect();
        let values: Vec<f32> = bits.iter().map(|x| x.to_f32()).collect();
        for instructions in InstructionSet::all() {
            let (a, b) = (Floats::Bf16(&bits), Floats::F32(&values));
            assert_eq!(run(a, 3001, 9, instructions), run(b, 3001, 9, instructions));
        }
    }

    #[test]
    fn a_row_without_probabilities_has_nan_and_its_neighbour_is_right() {
        let (vocab, count) = (4000, 3);
        for instructions in InstructionSet::all() {
            let right = numbers(vocab, 60_000);
            let alone = run(Floats::F32(&right), vocab, count, instructions);
            let mut one_nan = right.clone();
            one_nan[1234] = f32::NAN;
            for wrong in [one_nan, vec![f32::NEG_INFINITY; vocab], vec![f32::NAN; vocab]] {
                let (logprobs, tokens) = run(Floats::F32(&[&*wrong, &right].concat()), vocab, count, instructions);
                assert!(logprobs[..count].iter().all(|x| x.is_nan()));
                assert!(tokens[..count].iter().all(|t| (0..4000).contains(t)));
                assert_eq!((logprobs[count..].to_vec(), tokens[count..].to_vec()), alone);
            }
        }
    }

    #[test]
    fn impossible_tokens_come_last() {
        let mut logits = vec![f32::NEG_INFINITY; 2000];
        logits[1500] = 1.0;
        for instructions in InstructionSet::all() {
            let (logprobs, tokens) = run(Floats::F32(&logits), 2000, 3, instructions);
            assert_eq!(
                (logprobs[0], tokens),
                (0.0, vec![1500, 0, 1]),
                "{}",
                instructions.name()
            );
            assert!(logprobs[1..].iter().all(|x| *x == f32::NEG_INFINITY));
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        for (numbers, vocab, count, outputs) in [(8, 4, 0, 0), (8, 4, 5, 10), (8, 4, 2, 6), (9, 4, 2, 4), (8, 4, 2, 3)]
        {
            let (mut logprobs, mut tokens) = (vec![MaybeUninit::new(0.0); outputs], vec![MaybeUninit::new(0); outputs]);
            let out = BestTokens {
                logprobs: &mut logprobs,
                tokens: &mut tokens,
            };
            let logits = vec![0.0; numbers];
            let got = best_tokens(Floats::F32(&logits), [vocab, count], out, 1, InstructionSet::all()[0]);
            assert!(
                matches!(got, Err(Error::Config(_))),
                "{numbers} {vocab} {count} {outputs}"
            );
        }
    }
}
