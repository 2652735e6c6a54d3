//! Gradients of [`attend_packed`](super::attend_packed).
//!
//! The scores of a tile are computed again and become probabilities by the log-sum-exp. All products are fp32.
//! A part is up to [`MAX_SEQUENCES`] neighbouring sequences with the same prefix rows, whose gradients it sums in the
//! order of its sequences. The sums of the parts are added in their order, so that no result depends on the number of
//! threads.
//!
//! Shape letters: those of `packed`.

mod part;

use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Mutex;

use part::{Part, SCRATCH, run_part};

use super::super::{Result, Strided, check_tensor, wrong};
use super::{PackedInputs, Sequence, check};
use crate::attend::output::round_to_bf16;
use crate::attend::vector::{F32x16, LANES};
use crate::attend::{FloatsMut, InstructionSet, openmp};

/// Sequences of a part, and parts of a step with many sequences.
const MAX_SEQUENCES: usize = 8;
const MANY_PARTS: usize = 32;

/// Inputs of [`attend_packed_backward`].
#[derive(Debug, Clone, Copy)]
pub struct PackedGradInputs<'a> {
    /// Inputs of the forward.
    pub forward: PackedInputs<'a>,
    /// Gradient of the output `[N, HQ, D]`.
    pub grad: Strided<'a>,
    /// Output `[N, HQ, D]`.
    pub o: Strided<'a>,
    /// Log-sum-exp `[N, HQ]`, contiguous.
    pub lse: &'a [f32],
}

/// Memory of the gradients of [`attend_packed_backward`], all contiguous.
#[derive(Debug)]
pub struct PackedGrads<'a> {
    /// Gradients of the queries `[N, HQ, D]`, and of keys and values `[M, H, D]`, in the dtype of the queries. None if
    /// they are not needed.
    pub own: Option<[FloatsMut<'a>; 3]>,
    /// Gradients of prefix keys and values `[R, H, D]`, to which those of this call are added.
    pub prefix: [&'a mut [f32]; 2],
}

/// Computes the gradients of [`attend_packed`](super::attend_packed).
///
/// # Errors
/// [`crate::Error::Config`] if sizes or tables do not fit each other. Nothing is written then.
pub fn attend_packed_backward(
    inputs: &PackedGradInputs<'_>,
    out: PackedGrads<'_>,
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    let sequences = check(&inputs.forward)?;
    check_sizes(inputs, &out)?;
    let PackedGrads { own, prefix } = out;
    match own {
        Some([FloatsMut::F32(q), FloatsMut::F32(k), FloatsMut::F32(v)]) => of_all(
            inputs,
            &sequences,
            Some([q, k, v]),
            prefix,
            threads,
            instructions,
            |x| x,
        ),
        Some([FloatsMut::Bf16(q), FloatsMut::Bf16(k), FloatsMut::Bf16(v)]) => of_all(
            inputs,
            &sequences,
            Some([q, k, v]),
            prefix,
            threads,
            instructions,
            round_to_bf16,
        ),
        Some(_) => wrong("gradients of several dtypes: expected one"),
        None => of_all(inputs, &sequences, None, prefix, threads, instructions, |x: f32| x),
    }
}

fn check_sizes(inputs: &PackedGradInputs<'_>, out: &PackedGrads<'_>) -> Result<()> {
    let PackedInputs {
        heads: [heads, kv_heads, dim],
        rows: [queries, keys, prefix],
        ..
    } = inputs.forward;
    for tensor in [inputs.grad, inputs.o] {
        if queries > 0 {
            check_tensor(tensor, [1, heads, queries], dim)?;
        }
    }
    let own = out.own.as_ref().map(|own| {
        own.each_ref().map(|x| match x {
            FloatsMut::F32(x) => x.len(),
            FloatsMut::Bf16(x) => x.len(),
        })
    });
    let of_keys = keys * kv_heads * dim;
    let found = (own, out.prefix.each_ref().map(|x| x.len()), inputs.lse.len());
    let expected = (
        own.map(|_| [queries * heads * dim, of_keys, of_keys]),
        [prefix * kv_heads * dim; 2],
        queries * heads,
    );
    if found != expected {
        return wrong(&format!(
            "gradients and log-sum-exp of {found:?} elements: expected {expected:?}"
        ));
    }
    Ok(())
}

fn of_all<T: Send + Default + Copy>(
    inputs: &PackedGradInputs<'_>,
    sequences: &[Sequence],
    mut own: Option<[&mut [MaybeUninit<T>]; 3]>,
    prefix: [&mut [f32]; 2],
    threads: usize,
    instructions: InstructionSet,
    convert: impl Fn(f32) -> T + Copy + Sync,
) -> Result<()> {
    let [heads, kv_heads, dim] = inputs.forward.heads;
    let groups = groups(sequences);
    let mut sums = vec![Vec::new(); groups.len()];
    let mut parts = Vec::with_capacity(groups.len());
    let mut key = 0;
    for (group, prefix) in groups.iter().zip(&mut sums) {
        let sequences = &sequences[group.clone()];
        let (queries, end) = (
            sequences.iter().map(|s| s.queries.len()).sum::<usize>(),
            sequences.last().map_or(key, |s| s.keys.end),
        );
        // Keys before the first one of the part are of no sequence.
        let gap = sequences.first().map_or(0, |s| s.keys.start - key);
        let mut take = |i: usize, skipped: usize, count: usize| {
            let from = std::mem::take(&mut own.as_mut()?[i]);
            let (none, from) = from.split_at_mut(skipped);
            none.fill(MaybeUninit::new(T::default()));
            let (taken, rest) = from.split_at_mut(count);
            own.as_mut()?[i] = rest;
            Some(taken)
        };
        let (skipped, count) = (gap * kv_heads * dim, (end - key - gap) * kv_heads * dim);
        let own = match (
            take(0, 0, queries * heads * dim),
            take(1, skipped, count),
            take(2, skipped, count),
        ) {
            (Some(q), Some(k), Some(v)) => Some([q, k, v]),
            _ => None,
        };
        key = end;
        parts.push(Part { sequences, own, prefix });
    }
    if let Some([_, k, v]) = own {
        k.fill(MaybeUninit::new(T::default()));
        v.fill(MaybeUninit::new(T::default()));
    }
    let threads = threads.min(parts.len());
    let parts = Mutex::new(parts.into_iter());
    let next = || parts.lock().ok().and_then(|mut parts| parts.next());
    openmp::run_on_threads(threads, &|| {
        SCRATCH.with_borrow_mut(|scratch| {
            while let Some(part) = next() {
                run_part(instructions, inputs, part, scratch, convert);
            }
        });
    })?;
    let [dk, dv] = prefix;
    for (group, sums) in groups.iter().zip(&sums) {
        add_prefix_sums(&inputs.forward, &sequences[group.start], sums, [&mut *dk, &mut *dv]);
    }
    Ok(())
}

/// Ranges of the sequences of each part, which follow from the sequences alone.
fn groups(sequences: &[Sequence]) -> Vec<Range<usize>> {
    let size = (sequences.len() / MANY_PARTS).clamp(1, MAX_SEQUENCES);
    let mut found: Vec<Range<usize>> = Vec::new();
    for (i, sequence) in sequences.iter().enumerate() {
        match found.last_mut() {
            Some(last) if last.len() < size && sequences[last.start].prefix == sequence.prefix => last.end = i + 1,
            _ => found.push(i..i + 1),
        }
    }
    found
}

/// Adds the sums of a part to the gradients of the prefix rows of its sequences.
fn add_prefix_sums(inputs: &PackedInputs<'_>, sequence: &Sequence, sums: &[F32x16], [dk, dv]: [&mut [f32]; 2]) {
    let [_, kv_heads, dim] = inputs.heads;
    let (width, rows) = (dim.div_ceil(LANES), sequence.num_prefix_rows());
    if sums.is_empty() {
        return;
    }
    for (head, sums) in sums.chunks_exact(2 * rows * width).enumerate() {
        for (sums, out) in sums.chunks_exact(rows * width).zip([&mut *dk, &mut *dv]) {
            let places = sequence.prefix.iter().flat_map(Clone::clone);
            for (row, from) in places.zip(sums.chunks_exact(width)) {
                let to = &mut out[(row * kv_heads + head) * dim..][..dim];
                for (to, from) in to.iter_mut().zip(from.as_flattened()) {
                    *to += from;
                }
            }
        }
    }
}
