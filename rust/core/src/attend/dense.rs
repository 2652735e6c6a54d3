//! Attention of all queries of a sequence over the same keys, in the prefill of prompts and of encoders.
//!
//! 16 queries lie in the lanes of a vector, so that scores, softmax and output need no sum over lanes. The operations
//! on a query depend on its keys and their order alone, not on the queries beside it.
//!
//! Shape letters: B sequences, T queries and S keys of each, HQ query heads, H kv heads, D head dim.

mod block;
mod chunk;
mod packed;
mod products;
mod rows;

use std::mem::MaybeUninit;
use std::sync::Mutex;

use super::output::round_to_bf16;
use super::vector::{F32x16, LANES};
use super::{Floats, FloatsMut, InstructionSet, MAX_HEAD_DIM, openmp};
use crate::error::{Error, Result};
use block::{Out, Rows, SCRATCH, Scratch, View, run_block};
pub use packed::{PackedGradInputs, PackedGrads, PackedInputs, attend_packed, attend_packed_backward};

/// Vectors of queries that are processed together.
const VECTORS: usize = 4;
/// Queries that are processed together.
const QUERIES: usize = VECTORS * LANES;
/// Keys of one update of the softmax.
const KEYS: usize = 64;
/// Keys, or dims of the values, of one tile of a product.
const TILE: usize = 4;

/// One number, or one of 16, for each of [`QUERIES`] queries.
type PerQuery = [F32x16; VECTORS];

/// A tensor in memory.
#[derive(Debug, Clone, Copy)]
pub struct Strided<'a> {
    /// Elements from the first one on.
    pub data: Floats<'a>,
    /// Elements from one sequence, one head and one row to the next. The dims of a row are contiguous.
    pub strides: [usize; 3],
}

/// Inputs of [`attend_dense`].
#[derive(Debug, Clone, Copy)]
pub struct DenseInputs<'a> {
    /// B, HQ, H and D.
    pub shape: [usize; 4],
    /// T and S, not 0.
    pub lens: [usize; 2],
    /// Queries `[B, HQ, T, D]`.
    pub q: Strided<'a>,
    /// Keys `[B, H, S, D]`.
    pub k: Strided<'a>,
    /// Values `[B, H, S, D]`.
    pub v: Strided<'a>,
    /// Factor of the scores.
    pub scale: f32,
    /// Whether query `i` sees the first `i + 1` keys instead of all.
    pub causal: bool,
}

/// Computes the attention of every query over the keys of its sequence.
///
/// * `o`: output `[B, HQ, T, D]`, contiguous.
/// * `lse`: log-sum-exp of the scores `[B, HQ, T]`, natural logarithm.
///
/// # Errors
/// [`Error::Config`] if sizes do not fit each other. Nothing is written then.
pub fn attend_dense(
    inputs: &DenseInputs<'_>,
    o: FloatsMut<'_>,
    lse: &mut [MaybeUninit<f32>],
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    let len = match &o {
        FloatsMut::F32(o) => o.len(),
        FloatsMut::Bf16(o) => o.len(),
    };
    check(inputs, len, lse.len())?;
    match o {
        FloatsMut::F32(o) => of_heads(inputs, o, lse, threads, instructions, |x| x),
        FloatsMut::Bf16(o) => of_heads(inputs, o, lse, threads, instructions, round_to_bf16),
    }
}

fn wrong(what: &str) -> Result<()> {
    Err(Error::Config(format!("attention: {what}")))
}

fn check(inputs: &DenseInputs<'_>, o: usize, lse: usize) -> Result<()> {
    check_tensors(inputs)?;
    let ([batch, heads, _, dim], [queries, _]) = (inputs.shape, inputs.lens);
    let size = |sizes: &[usize]| sizes.iter().try_fold(1_usize, |n, m| n.checked_mul(*m));
    let rows = size(&[batch, heads, queries]);
    if rows != Some(lse) || rows.and_then(|n| n.checked_mul(dim)) != Some(o) {
        return wrong(&format!(
            "outputs of {o} and {lse} elements: expected those of {batch} x {heads} x {queries}"
        ));
    }
    Ok(())
}

fn check_tensors(inputs: &DenseInputs<'_>) -> Result<()> {
    let ([batch, heads, kv_heads, dim], [queries, keys]) = (inputs.shape, inputs.lens);
    if [batch, heads, kv_heads, dim, queries, keys].contains(&0)
        || dim > MAX_HEAD_DIM
        || !heads.is_multiple_of(kv_heads)
    {
        return wrong(&format!(
            "{batch} sequences of {queries} queries and {keys} keys, {heads} query heads and {kv_heads} kv heads of \
             {dim}: expected none of them to be 0, query heads a multiple of kv heads, and a head dim of at most \
             {MAX_HEAD_DIM}"
        ));
    }
    check_tensor(inputs.q, [batch, heads, queries], dim)?;
    check_tensor(inputs.k, [batch, kv_heads, keys], dim)?;
    check_tensor(inputs.v, [batch, kv_heads, keys], dim)
}

/// Checks that a tensor has all rows of `dim` elements.
fn check_tensor(tensor: Strided<'_>, [batch, heads, rows]: [usize; 3], dim: usize) -> Result<()> {
    let [a, b, c] = tensor.strides;
    let last = [(a, batch), (b, heads), (c, rows)]
        .iter()
        .try_fold(dim, |n, (stride, count)| n.checked_add(stride.checked_mul(count - 1)?));
    if last.is_none_or(|n| n > tensor.data.len()) {
        return wrong(&format!(
            "{} elements with strides {:?}: expected enough for {batch} x {heads} x {rows} rows of {dim}",
            tensor.data.len(),
            tensor.strides
        ));
    }
    Ok(())
}

fn of_heads<T: Send>(
    inputs: &DenseInputs<'_>,
    o: &mut [MaybeUninit<T>],
    lse: &mut [MaybeUninit<f32>],
    threads: usize,
    instructions: InstructionSet,
    convert: impl Fn(f32) -> T + Copy + Sync,
) -> Result<()> {
    let ([batch, heads, kv_heads, dim], [queries, keys]) = (inputs.shape, inputs.lens);
    let outputs = o.chunks_exact_mut(queries * dim).zip(lse.chunks_exact_mut(queries));
    let parts = Mutex::new((0..batch * heads).zip(outputs));
    let next = || parts.lock().ok().and_then(|mut parts| parts.next());
    openmp::run_on_threads(threads.min(batch * heads), &|| {
        SCRATCH.with_borrow_mut(|scratch| {
            while let Some((part, (o, lse))) = next() {
                let (sequence, head) = (part / heads, part % heads);
                let source = [inputs.k, inputs.v].map(|tensor| Rows {
                    tensor,
                    place: [sequence, head / (heads / kv_heads)],
                    first: 0,
                    count: keys,
                });
                for (block, (o, lse)) in o.chunks_mut(QUERIES * dim).zip(lse.chunks_mut(QUERIES)).enumerate() {
                    let block = Rows {
                        tensor: inputs.q,
                        place: [sequence, head],
                        first: block * QUERIES,
                        count: lse.len(),
                    };
                    let view = View {
                        dim,
                        keys,
                        scale: inputs.scale,
                        own: inputs.causal.then_some(block.first),
                    };
                    let sources = (block.first == 0).then_some(std::slice::from_ref(&source));
                    let out = Out {
                        o,
                        lse,
                        strides: [dim, 1],
                    };
                    run_block(instructions, (sources, block), view, scratch, out, convert);
                }
            }
        });
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Attends with tensors of the given numbers of elements.
    fn attend(shape: [usize; 4], lens: [usize; 2], strides: [usize; 3], [q, kv, o, lse]: [usize; 4]) -> Result<()> {
        let (q, kv) = (vec![0.5; q], vec![0.5; kv]);
        let (mut o, mut lse) = (vec![MaybeUninit::new(0.0); o], vec![MaybeUninit::new(0.0); lse]);
        let keys = Strided {
            data: Floats::F32(&kv),
            strides,
        };
        let queries = Strided {
            data: Floats::F32(&q),
            strides,
        };
        let inputs = DenseInputs {
            shape,
            lens,
            q: queries,
            k: keys,
            v: keys,
            scale: 1.0,
            causal: false,
        };
        attend_dense(&inputs, FloatsMut::F32(&mut o), &mut lse, 1, InstructionSet::all()[0])
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let (shape, strides) = ([1, 2, 1, 8], [80, 40, 8]);
        assert_eq!(attend(shape, [5, 3], strides, [80, 24, 80, 10]), Ok(()));
        for (shape, lens, strides, sizes) in [
            (shape, [5, 3], strides, [79, 24, 80, 10]),
            (shape, [5, 3], strides, [80, 23, 80, 10]),
            (shape, [5, 3], strides, [80, 24, 79, 10]),
            (shape, [5, 3], strides, [80, 24, 80, 11]),
            (shape, [5, 3], [80, 41, 8], [80, 24, 80, 10]),
            (shape, [5, 3], [80, usize::MAX, 8], [80, 24, 80, 10]),
            (shape, [5, 0], strides, [80, 24, 80, 10]),
            (shape, [0, 3], strides, [80, 24, 0, 0]),
            ([1, 2, 0, 8], [5, 3], strides, [80, 24, 80, 10]),
            ([1, 3, 2, 8], [5, 3], strides, [800, 800, 120, 15]),
            ([1, 2, 1, 300], [5, 3], strides, [8000, 8000, 3000, 10]),
        ] {
            let got = attend(shape, lens, strides, sizes);
            assert!(
                matches!(got, Err(Error::Config(_))),
                "{shape:?} {lens:?} {strides:?} {sizes:?}"
            );
        }
    }
}
