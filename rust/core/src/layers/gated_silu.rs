//! `SiLU` of a gate, times a second input, and its gradients. `SiLU` is x times the logistic function of x.

use std::mem::MaybeUninit;

use super::{Layer, Number, misfit, padded, part_len, run_on_parts, write, write_first};
use crate::attend::math::exp;
use crate::attend::vector::{LANES, SimdOps};
use crate::attend::{Floats, FloatsMut, InstructionSet};
use crate::error::Result;

const EXPECTED: &str = "the same size and dtype";

/// Computes `silu(gate) * up` of each element.
///
/// # Errors
/// [`Error::Config`] if sizes or dtypes differ. Nothing is written then.
///
/// [`Error::Config`]: crate::error::Error::Config
pub fn gated_silu(
    gate: Floats<'_>,
    up: Floats<'_>,
    out: FloatsMut<'_>,
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    let sizes = [gate.len(), up.len(), out.len()];
    let fits = sizes[1..] == sizes[..2];
    match (gate, up, out) {
        (Floats::F32(gate), Floats::F32(up), FloatsMut::F32(out)) if fits => {
            of_all(gate, up, out, threads, instructions)
        }
        (Floats::Bf16(gate), Floats::Bf16(up), FloatsMut::Bf16(out)) if fits => {
            of_all(gate, up, out, threads, instructions)
        }
        _ => Err(misfit("gated SiLU", &sizes, EXPECTED)),
    }
}

/// Computes the gradients of [`gated_silu`] by `[gate, up]` from that by its output, `dy`.
///
/// # Errors
/// [`Error::Config`] if sizes or dtypes differ. Nothing is written then.
///
/// [`Error::Config`]: crate::error::Error::Config
pub fn gated_silu_grad(
    [gate, up, dy]: [Floats<'_>; 3],
    [dgate, dup]: [FloatsMut<'_>; 2],
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    let sizes = [gate.len(), up.len(), dy.len(), dgate.len(), dup.len()];
    let fits = sizes[1..] == sizes[..4];
    match (gate, up, dy, dgate, dup) {
        (Floats::F32(gate), Floats::F32(up), Floats::F32(dy), FloatsMut::F32(dgate), FloatsMut::F32(dup)) if fits => {
            grad_of_all([gate, up, dy], [dgate, dup], threads, instructions)
        }
        (Floats::Bf16(gate), Floats::Bf16(up), Floats::Bf16(dy), FloatsMut::Bf16(dgate), FloatsMut::Bf16(dup))
            if fits =>
        {
            grad_of_all([gate, up, dy], [dgate, dup], threads, instructions)
        }
        _ => Err(misfit("gated SiLU", &sizes, EXPECTED)),
    }
}

fn of_all<K: Number>(
    gate: &[K],
    up: &[K],
    out: &mut [MaybeUninit<K>],
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    let (count, part) = (gate.len(), part_len(1));
    let parts = gate.chunks(part).zip(up.chunks(part)).zip(out.chunks_mut(part));
    run_on_parts(&Forward, parts, count, threads, instructions)
}

fn grad_of_all<K: Number>(
    [gate, up, dy]: [&[K]; 3],
    [dgate, dup]: [&mut [MaybeUninit<K>]; 2],
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    let (count, part) = (gate.len(), part_len(1));
    let inputs = gate.chunks(part).zip(up.chunks(part)).zip(dy.chunks(part));
    let parts = inputs.zip(dgate.chunks_mut(part).zip(dup.chunks_mut(part)));
    run_on_parts(&Backward, parts, count, threads, instructions)
}

struct Forward;
struct Backward;

type Input<'a, K> = (&'a [K], &'a [K]);
type Output<'a, K> = &'a mut [MaybeUninit<K>];

impl<'a, K: Number> Layer<(Input<'a, K>, Output<'a, K>)> for Forward {
    #[inline(always)]
    fn run<S: SimdOps>(&self, simd: S, ((gate, up), out): (Input<'a, K>, Output<'a, K>)) {
        let ((gate, gate_rest), (up, up_rest)) = (gate.as_chunks::<LANES>(), up.as_chunks::<LANES>());
        let (out, out_rest) = out.as_chunks_mut::<LANES>();
        for ((gate, up), to) in gate.iter().zip(up).zip(out) {
            write(simd, of_vectors(simd, K::load(simd, gate), K::load(simd, up)), to);
        }
        if !gate_rest.is_empty() {
            let result = of_vectors(simd, padded(simd, gate_rest, 0.0), padded(simd, up_rest, 0.0));
            write_first(simd, result, out_rest);
        }
    }
}

impl<'a, K: Number> Layer<((Input<'a, K>, &'a [K]), (Output<'a, K>, Output<'a, K>))> for Backward {
    #[inline(always)]
    fn run<S: SimdOps>(
        &self,
        simd: S,
        (((gate, up), dy), (dgate, dup)): ((Input<'a, K>, &'a [K]), (Output<'a, K>, Output<'a, K>)),
    ) {
        let ((gate, gate_rest), (up, up_rest)) = (gate.as_chunks::<LANES>(), up.as_chunks::<LANES>());
        let (dy, dy_rest) = dy.as_chunks::<LANES>();
        let ((dgate, dgate_rest), (dup, dup_rest)) = (dgate.as_chunks_mut::<LANES>(), dup.as_chunks_mut::<LANES>());
        for (((gate, up), dy), (dgate, dup)) in gate.iter().zip(up).zip(dy).zip(dgate.iter_mut().zip(dup)) {
            let (a, b) = grad_of_vectors(simd, K::load(simd, gate), K::load(simd, up), K::load(simd, dy));
            write(simd, a, dgate);
            write(simd, b, dup);
        }
        if !gate_rest.is_empty() {
            let (gate, up) = (padded(simd, gate_rest, 0.0), padded(simd, up_rest, 0.0));
            let (a, b) = grad_of_vectors(simd, gate, up, padded(simd, dy_rest, 0.0));
            write_first(simd, a, dgate_rest);
            write_first(simd, b, dup_rest);
        }
    }
}

/// The logistic functions of x and of -x, without a loss of digits in either.
#[inline(always)]
fn logistic<S: SimdOps>(simd: S, x: S::Vector) -> (S::Vector, S::Vector) {
    let zero = simd.splat(0.0);
    let power = exp(simd, simd.min(x, simd.mul(x, simd.splat(-1.0)))); // of -|x|
    let above = simd.div(simd.splat(1.0), simd.add(power, simd.splat(1.0)));
    let below = simd.mul(power, above);
    (
        simd.select_less(x, zero, below, above),
        simd.select_less(x, zero, above, below),
    )
}

#[inline(always)]
fn of_vectors<S: SimdOps>(simd: S, gate: S::Vector, up: S::Vector) -> S::Vector {
    simd.mul(simd.mul(gate, logistic(simd, gate).0), up)
}

/// Gradients by gate and up. The derivative of `SiLU` is `s + x s (1 - s)`, where s is the logistic function of x.
#[inline(always)]
fn grad_of_vectors<S: SimdOps>(simd: S, gate: S::Vector, up: S::Vector, dy: S::Vector) -> (S::Vector, S::Vector) {
    let (s, rest) = logistic(simd, gate);
    let slope = simd.fma(simd.mul(gate, s), rest, s);
    (simd.mul(simd.mul(dy, up), slope), simd.mul(dy, simd.mul(gate, s)))
}
