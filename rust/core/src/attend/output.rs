//! Outputs of a decode step, written by all threads.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use super::online_softmax::SoftmaxState;
use super::vector::F32x16;
use super::{DecodeOutputs, FloatsMut, Shape};

/// Outputs that several threads write to, each thread the queries of its own tasks.
pub(super) struct SharedOutput<'a> {
    o: OutputPointer,
    lse: *mut MaybeUninit<f32>,
    shape: Shape,
    memory: PhantomData<&'a mut [MaybeUninit<f32>]>,
}

enum OutputPointer {
    F32(*mut MaybeUninit<f32>),
    Bf16(*mut MaybeUninit<u16>),
}

// SAFETY: the pointers come from exclusive borrows of plain numbers, and the borrows live as long as this value.
// Threads write disjoint parts of the memory (`SharedOutput::write`).
unsafe impl Sync for SharedOutput<'_> {}

impl<'a> SharedOutput<'a> {
    /// `output` has the sizes of `shape`, which `check` has verified.
    pub(super) fn new(shape: Shape, output: DecodeOutputs<'a>) -> Self {
        let o = match output.o {
            FloatsMut::F32(o) => OutputPointer::F32(o.as_mut_ptr()),
            FloatsMut::Bf16(o) => OutputPointer::Bf16(o.as_mut_ptr()),
        };
        Self {
            o,
            lse: output.lse.as_mut_ptr(),
            shape,
            memory: PhantomData,
        }
    }

    /// Writes the output and the log-sum-exp of one query.
    ///
    /// A query whose weights sum to 0 gets an output of 0 and a log-sum-exp of -inf.
    pub(super) fn write(&self, row: usize, head: usize, softmax: SoftmaxState, o: &[F32x16]) {
        assert!(row < self.shape.rows && head < self.shape.heads);
        let (query, head_dim) = (row * self.shape.heads + head, self.shape.head_dim);
        let inverse = if softmax.sum == 0.0 { 0.0 } else { 1.0 / softmax.sum };
        let values = o.as_flattened().iter().map(|x| x * inverse);
        // SAFETY: row and head are in range, so entry `query` of lse and elements `query * D .. (query + 1) * D` of o
        // lie within the borrowed memory, whose sizes `check` has compared with the shape. The tasks partition the
        // pairs of row and kv head and each task runs once, so no other thread touches this query's part.
        let to = unsafe {
            (*self.lse.add(query)).write(softmax.max + softmax.sum.ln());
            match self.o {
                OutputPointer::F32(o) => {
                    FloatsMut::F32(std::slice::from_raw_parts_mut(o.add(query * head_dim), head_dim))
                }
                OutputPointer::Bf16(o) => {
                    FloatsMut::Bf16(std::slice::from_raw_parts_mut(o.add(query * head_dim), head_dim))
                }
            }
        };
        match to {
            FloatsMut::F32(to) => to.iter_mut().zip(values).for_each(|(to, x)| _ = to.write(x)),
            FloatsMut::Bf16(to) => to
                .iter_mut()
                .zip(values)
                .for_each(|(to, x)| _ = to.write(round_to_bf16(x))),
        }
    }
}

/// Bits of the nearest bf16, with ties to even.
pub(super) fn round_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    let kept = if x.is_nan() { 0x7fc0_0000 } else { rounded };
    kept.to_be_bytes()[..2]
        .iter()
        .fold(0, |sum, byte| sum << 8 | u16::from(*byte))
}
