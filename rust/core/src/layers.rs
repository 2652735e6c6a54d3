//! Layers without matrix products on CPUs: [`layer_norm`] and [`gelu`], computed in fp32.
//!
//! The result of a row depends on no other row, and not on the number of threads.

#![expect(
    clippy::inline_always,
    reason = "a vector intrinsic compiles to an instruction only inside of a function that enables the instruction set"
)]

mod gelu;
mod layer_norm;

use std::mem::MaybeUninit;
use std::sync::Mutex;

pub use gelu::{Approximation, gelu};
pub use layer_norm::{LayerNorm, layer_norm};

use crate::attend::dispatch::Kind;
use crate::attend::vector::{Element, LANES, Scalar, SimdOps};
use crate::attend::{InstructionSet, openmp};
use crate::error::Result;

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

/// Function on a contiguous part of a tensor.
trait Layer<K>: Sync {
    /// Writes the results of all elements of `x`, which are whole rows.
    fn run<S: SimdOps>(&self, simd: S, x: &[K], out: &mut [MaybeUninit<K>]);
}

/// Runs a layer on all rows of `x`, whose number of elements is that of `out` and a multiple of `width`.
fn run_on_parts<K: Number>(
    layer: &impl Layer<K>,
    x: &[K],
    out: &mut [MaybeUninit<K>],
    width: usize,
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    let part = (PART / width).max(1) * width;
    let threads = threads.min(x.len().div_ceil(part));
    let parts = Mutex::new(x.chunks(part).zip(out.chunks_mut(part)));
    let next = || parts.lock().ok().and_then(|mut parts| parts.next());
    openmp::run_on_threads(threads, &|| {
        while let Some((x, out)) = next() {
            match instructions.0 {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the value in `Kind::Avx512` proves that the CPU has the enabled instructions.
                Kind::Avx512(simd, _) => unsafe { run_avx512(simd, layer, x, out) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the value in `Kind::Avx2` proves that the CPU has the enabled instructions.
                Kind::Avx2(simd) => unsafe { run_avx2(simd, layer, x, out) },
                Kind::Scalar => layer.run(Scalar, x, out),
            }
        }
    })
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn run_avx512<K>(simd: crate::attend::avx512::Avx512, layer: &impl Layer<K>, x: &[K], out: &mut [MaybeUninit<K>]) {
    layer.run(simd, x, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2<K>(simd: crate::attend::avx2::Avx2, layer: &impl Layer<K>, x: &[K], out: &mut [MaybeUninit<K>]) {
    layer.run(simd, x, out);
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
