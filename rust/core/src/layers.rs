//! Layers without matrix products on CPUs, computed in fp32: [`layer_norm`], [`rms_norm`], [`gelu`] and [`gated_silu`],
//! the last three with their gradients by the inputs, and the loss of logits, [`softmax_loss`].
//!
//! The result of a row depends on no other row, and not on the number of threads.

#![expect(
    clippy::inline_always,
    reason = "a vector intrinsic compiles to an instruction only inside of a function that enables the instruction set"
)]

mod gated_silu;
mod gelu;
mod layer_norm;
mod rms_norm;
mod softmax_loss;

use std::mem::MaybeUninit;
use std::sync::Mutex;

pub use gated_silu::{gated_silu, gated_silu_grad};
pub use gelu::{Approximation, gelu, gelu_grad};
pub use layer_norm::{LayerNorm, layer_norm};
pub use rms_norm::{RmsNorm, rms_norm, rms_norm_grad};
pub use softmax_loss::{FloatsInPlace, softmax_loss};

use crate::attend::dispatch::Kind;
use crate::attend::vector::{Element, LANES, Scalar, SimdOps};
use crate::attend::{InstructionSet, openmp};
use crate::error::{Error, Result};

/// Number of elements that a thread takes at once, about.
const PART: usize = 1 << 14;

/// Element type of inputs and outputs.
trait Number: Element + Send + Sync {
    /// The nearest numbers of this type, with ties to even.
    fn from_vector<S: SimdOps>(simd: S, x: S::Vector) -> [Self; LANES];
}

impl Number for f32 {
    #[inline(always)]
    fn from_vector<S: SimdOps>(simd: S, x: S::Vector) -> [f32; LANES] {
        let mut to = [0.0; LANES];
        simd.store(x, &mut to);
        to
    }
}

impl Number for u16 {
    #[inline(always)]
    fn from_vector<S: SimdOps>(simd: S, x: S::Vector) -> [u16; LANES] {
        let mut to = [0; LANES];
        simd.store_bf16(x, &mut to);
        to
    }
}

/// Function on parts of tensors.
trait Layer<P>: Sync {
    /// Computes a part, which consists of whole rows.
    fn run<S: SimdOps>(&self, simd: S, part: P);
}

/// Number of elements of a part of tensors whose rows have `width` elements.
fn part_len(width: usize) -> usize {
    (PART / width).max(1) * width
}

/// Runs a layer on all parts, which together have `count` elements.
fn run_on_parts<P>(
    layer: &impl Layer<P>,
    parts: impl Iterator<Item = P> + Send,
    count: usize,
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    let threads = threads.min(count.div_ceil(PART));
    let parts = Mutex::new(parts);
    let next = || parts.lock().ok().and_then(|mut parts| parts.next());
    openmp::run_on_threads(threads, &|| {
        while let Some(part) = next() {
            match instructions.0 {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the value in `Kind::Avx512` proves that the CPU has the enabled instructions.
                Kind::Avx512(simd, _) => unsafe { run_avx512(simd, layer, part) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the value in `Kind::Avx2` proves that the CPU has the enabled instructions.
                Kind::Avx2(simd) => unsafe { run_avx2(simd, layer, part) },
                Kind::Scalar => layer.run(Scalar, part),
            }
        }
    })
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn run_avx512<P>(simd: crate::attend::avx512::Avx512, layer: &impl Layer<P>, part: P) {
    layer.run(simd, part);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2<P>(simd: crate::attend::avx2::Avx2, layer: &impl Layer<P>, part: P) {
    layer.run(simd, part);
}

/// The elements after the last whole vector, as a vector that ends in `padding`.
#[inline(always)]
fn padded<S: SimdOps, K: Element>(simd: S, rest: &[K], padding: f32) -> S::Vector {
    let mut last = [padding; LANES];
    for (to, from) in last.iter_mut().zip(rest) {
        *to = from.to_f32();
    }
    simd.load(&last)
}

/// Writes a vector.
#[inline(always)]
fn write<S: SimdOps, K: Number>(simd: S, x: S::Vector, to: &mut [MaybeUninit<K>; LANES]) {
    // SAFETY: the pointer is that of an exclusive borrow of as many elements as are written.
    unsafe { to.as_mut_ptr().cast::<[K; LANES]>().write(K::from_vector(simd, x)) }
}

/// Writes the first elements of a vector.
#[inline(always)]
fn write_first<S: SimdOps, K: Number>(simd: S, x: S::Vector, to: &mut [MaybeUninit<K>]) {
    for (to, from) in to.iter_mut().zip(K::from_vector(simd, x)) {
        to.write(from);
    }
}

/// Sum over the lanes of four vectors.
#[inline(always)]
fn add4<S: SimdOps>(simd: S, [a, b, c, d]: [S::Vector; 4]) -> f32 {
    simd.reduce_sum(simd.add(simd.add(a, b), simd.add(c, d)))
}

/// Error for tensors of a layer that do not fit each other.
fn misfit(layer: &str, sizes: &[usize], expected: &str) -> Error {
    Error::Config(format!("{layer}: tensors of {sizes:?} elements: expected {expected}"))
}
