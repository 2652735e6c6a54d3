//! Where results go.

use std::marker::PhantomData;

use super::online_softmax::Running;
use super::vector::Line;
use super::{FloatsMut, Output, Shape};

/// Where results go.
pub(super) struct Out<'a> {
    o: Numbers,
    lse: *mut f32,
    shape: Shape,
    memory: PhantomData<&'a mut [f32]>,
}

enum Numbers {
    F32(*mut f32),
    Bf16(*mut u16),
}

// SAFETY: the pointers come from exclusive borrows of plain numbers that live as long as the value; threads write disjoint parts (`Out::write`).
unsafe impl Sync for Out<'_> {}

impl<'a> Out<'a> {
    /// `output` has the sizes of `shape` (`check`).
    pub(super) fn new(shape: Shape, output: Output<'a>) -> Self {
        let o = match output.o {
            FloatsMut::F32(o) => Numbers::F32(o.as_mut_ptr()),
            FloatsMut::Bf16(o) => Numbers::Bf16(o.as_mut_ptr()),
        };
        Self {
            o,
            lse: output.lse.as_mut_ptr(),
            shape,
            memory: PhantomData,
        }
    }

    /// Writes one query's result. A query that has seen nothing gives 0 and -inf.
    pub(super) fn write(&self, row: usize, head: usize, running: Running, o: &[Line]) {
        assert!(row < self.shape.rows && head < self.shape.heads);
        let (at, head_dim) = (row * self.shape.heads + head, self.shape.head_dim);
        let share = if running.sum == 0.0 { 0.0 } else { 1.0 / running.sum };
        let values = o.as_flattened().iter().map(|x| x * share);
        // SAFETY: row and head are in range, so entry `at` of lse and numbers `at * D ..` of o lie within the borrowed memory, whose sizes `check` has
        // compared with the shape. The tasks partition (row, kv head) and each runs once, so no other thread touches this query's part.
        let to = unsafe {
            *self.lse.add(at) = running.max + running.sum.ln();
            match self.o {
                Numbers::F32(o) => FloatsMut::F32(std::slice::from_raw_parts_mut(o.add(at * head_dim), head_dim)),
                Numbers::Bf16(o) => FloatsMut::Bf16(std::slice::from_raw_parts_mut(o.add(at * head_dim), head_dim)),
            }
        };
        match to {
            FloatsMut::F32(to) => to.iter_mut().zip(values).for_each(|(to, x)| *to = x),
            FloatsMut::Bf16(to) => to.iter_mut().zip(values).for_each(|(to, x)| *to = bf16(x)),
        }
    }
}

/// The nearest bf16, ties to even.
fn bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    let kept = if x.is_nan() { 0x7fc0_0000 } else { rounded };
    kept.to_be_bytes()[..2]
        .iter()
        .fold(0, |sum, byte| sum << 8 | u16::from(*byte))
}
