//! Gradients of one part of the sequences, in blocks of queries and steps of keys.

use std::cell::RefCell;
use std::mem::MaybeUninit;

use super::super::super::chunk::hide_later_keys;
use super::super::super::rows::{append_rows, transpose_rows};
use super::super::super::{PerQuery, QUERIES, Rows, TILE, VECTORS, View};
use super::super::tiles::{add_from_columns, add_from_rows, set_from_rows};
use super::super::{PackedInputs, Sequence};
use super::PackedGradInputs;
use crate::attend::InstructionSet;
use crate::attend::dispatch::Kind;
use crate::attend::math::exp;
use crate::attend::vector::{F32x16, LANES, Scalar, SimdOps};

/// Keys of one step, and of one step of causal attention, which skips queries before the keys.
const KEYS: usize = 32;
const CAUSAL_KEYS: usize = LANES;
/// Neighbouring sequences with the same prefix rows, and the memory of their gradients.
pub(super) struct Part<'a, T> {
    pub(super) sequences: &'a [Sequence],
    /// Of the queries `[queries, HQ, D]`, and of keys and values `[keys, H, D]` from the part's first key on.
    pub(super) own: Option<[&'a mut [MaybeUninit<T>]; 3]>,
    /// Sums for prefix keys, then values, of each kv head, `[H, 2, prefix rows, D]`. Rows have whole vectors.
    pub(super) prefix: &'a mut Vec<F32x16>,
}

thread_local! {
    pub(super) static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch::EMPTY) };
}

/// Memory of a thread, reused from call to call because fresh memory costs page faults.
///
/// Rows have whole vectors. They are padded by zeros, and so are the numbers of keys and queries.
pub(super) struct Scratch {
    /// Keys, values and their gradients, `[S, D]`.
    keys: Vec<F32x16>,
    values: Vec<F32x16>,
    dk: Vec<F32x16>,
    dv: Vec<F32x16>,
    /// Scaled queries, gradient of the output, output and gradient of the queries of a block, `[QUERIES, D]`.
    q: Vec<F32x16>,
    grad: Vec<F32x16>,
    o: Vec<F32x16>,
    dq: Vec<F32x16>,
    /// The first two transposed, `[D, QUERIES]`.
    q_columns: Vec<PerQuery>,
    grad_columns: Vec<PerQuery>,
    /// Scores, then probabilities, and their gradients, of one step of keys.
    scores: Vec<PerQuery>,
    dscores: Vec<PerQuery>,
    /// Log-sum-exp, and sum of output times gradient, both negated.
    minus_lse: PerQuery,
    minus_delta: PerQuery,
}

impl Scratch {
    const EMPTY: Self = Self {
        keys: Vec::new(),
        values: Vec::new(),
        dk: Vec::new(),
        dv: Vec::new(),
        q: Vec::new(),
        grad: Vec::new(),
        o: Vec::new(),
        dq: Vec::new(),
        q_columns: Vec::new(),
        grad_columns: Vec::new(),
        scores: Vec::new(),
        dscores: Vec::new(),
        minus_lse: [[0.0; LANES]; VECTORS],
        minus_delta: [[0.0; LANES]; VECTORS],
    };
}

/// Sums the gradients of a part, on an instruction set.
pub(super) fn run_part<T>(
    instructions: InstructionSet,
    inputs: &PackedGradInputs<'_>,
    part: Part<'_, T>,
    scratch: &mut Scratch,
    convert: impl Fn(f32) -> T + Copy,
) {
    match instructions.0 {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the value in `Kind::Avx512` proves that the CPU has the enabled instructions.
        Kind::Avx512(simd, _) => unsafe { of_part_avx512(simd, inputs, part, scratch, convert) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the value in `Kind::Avx2` proves that the CPU has the enabled instructions.
        Kind::Avx2(simd) => unsafe { of_part_avx2(simd, inputs, part, scratch, convert) },
        Kind::Scalar => of_part(Scalar, inputs, part, scratch, convert),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn of_part_avx512<T>(
    simd: crate::attend::avx512::Avx512,
    inputs: &PackedGradInputs<'_>,
    part: Part<'_, T>,
    scratch: &mut Scratch,
    convert: impl Fn(f32) -> T + Copy,
) {
    of_part(simd, inputs, part, scratch, convert);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn of_part_avx2<T>(
    simd: crate::attend::avx2::Avx2,
    inputs: &PackedGradInputs<'_>,
    part: Part<'_, T>,
    scratch: &mut Scratch,
    convert: impl Fn(f32) -> T + Copy,
) {
    of_part(simd, inputs, part, scratch, convert);
}

#[inline(always)]
fn of_part<S: SimdOps, T>(
    simd: S,
    inputs: &PackedGradInputs<'_>,
    part: Part<'_, T>,
    scratch: &mut Scratch,
    convert: impl Fn(f32) -> T + Copy,
) {
    let PackedInputs { heads, scale, .. } = inputs.forward;
    let (
        [heads, kv_heads, dim],
        Part {
            sequences,
            mut own,
            prefix,
        },
    ) = (heads, part);
    let (Some(start), width) = (sequences.first(), dim.div_ceil(LANES)) else {
        return;
    };
    let (first_query, first_key, rows) = (start.queries.start, start.keys.start, start.num_prefix_rows());
    prefix.resize(kv_heads * 2 * rows * width, [0.0; LANES]);
    for sequence in sequences {
        for kv_head in 0..kv_heads {
            let sources = inputs.forward.sources(sequence, kv_head);
            // The gradient of the prefix needs no other keys.
            let sources = &sources[..sources.len() - usize::from(own.is_none())];
            let keys = sources.iter().map(|[k, _]| k.count).sum::<usize>();
            load_keys(simd, sources, (keys, dim), scratch);
            let view = View {
                dim,
                keys,
                scale,
                own: inputs.forward.own(sequence).filter(|_| own.is_some()),
            };
            let group = heads / kv_heads;
            for head in kv_head * group..(kv_head + 1) * group {
                for first in (0..sequence.queries.len()).step_by(QUERIES) {
                    let count = QUERIES.min(sequence.queries.len() - first);
                    let row = sequence.queries.start + first;
                    load_block(simd, inputs, head, (row, count), scratch);
                    let view = View {
                        own: view.own.map(|own| own + first),
                        ..view
                    };
                    of_block(simd, view, count, scratch);
                    if let Some([dq, ..]) = &mut own {
                        let to = &mut dq[((row - first_query) * heads + head) * dim..];
                        write_rows(
                            simd,
                            &scratch.dq[..count * width],
                            scale,
                            (dim, heads * dim),
                            to,
                            convert,
                        );
                    }
                }
            }
            let sums = prefix[kv_head * 2 * rows * width..][..2 * rows * width].chunks_exact_mut((rows * width).max(1));
            for (sums, from) in sums.zip([&scratch.dk, &scratch.dv]) {
                for (to, from) in sums.iter_mut().zip(from) {
                    simd.store(simd.add(simd.load(to), simd.load(from)), to);
                }
            }
            if let Some([_, dk, dv]) = &mut own {
                let start = ((sequence.keys.start - first_key) * kv_heads + kv_head) * dim;
                for (to, from) in [(dk, &scratch.dk), (dv, &scratch.dv)] {
                    let from = &from[rows * width..keys * width];
                    if !from.is_empty() {
                        write_rows(simd, from, 1.0, (dim, kv_heads * dim), &mut to[start..], convert);
                    }
                }
            }
        }
    }
}

/// Loads keys and values, and makes their gradients 0.
#[inline(always)]
fn load_keys<S: SimdOps>(simd: S, sources: &[[Rows<'_>; 2]], (keys, dim): (usize, usize), scratch: &mut Scratch) {
    let size = keys.next_multiple_of(TILE) * dim.div_ceil(LANES);
    scratch.keys.clear();
    scratch.values.clear();
    for [k, v] in sources {
        append_rows(simd, *k, dim, &mut scratch.keys);
        append_rows(simd, *v, dim, &mut scratch.values);
    }
    scratch.keys.resize(size, [0.0; LANES]);
    scratch.values.resize(size, [0.0; LANES]);
    for to in [&mut scratch.dk, &mut scratch.dv] {
        to.clear();
        to.resize(size, [0.0; LANES]);
    }
}

/// Loads the queries of a block, from row `first` on, and what the backward needs of each. Queries beyond `count` have
/// probabilities and gradients of 0.
#[inline(always)]
fn load_block<S: SimdOps>(
    simd: S,
    inputs: &PackedGradInputs<'_>,
    head: usize,
    (first, count): (usize, usize),
    scratch: &mut Scratch,
) {
    let [heads, _, dim] = inputs.forward.heads;
    let (width, padded) = (dim.div_ceil(LANES), count.next_multiple_of(LANES));
    for (tensor, to) in [
        (inputs.forward.q, &mut scratch.q),
        (inputs.grad, &mut scratch.grad),
        (inputs.o, &mut scratch.o),
    ] {
        let rows = Rows {
            tensor,
            place: [0, head],
            first,
            count,
        };
        to.clear();
        append_rows(simd, rows, dim, to);
        to.resize(padded * width, [0.0; LANES]);
    }
    // The scale goes into the queries, so that neither scores nor their gradients need it.
    let scale = simd.splat(inputs.forward.scale);
    for q in &mut scratch.q {
        simd.store(simd.mul(scale, simd.load(q)), q);
    }
    transpose_rows(simd, &scratch.q, width, &mut scratch.q_columns);
    transpose_rows(simd, &scratch.grad, width, &mut scratch.grad_columns);
    scratch.dq.clear();
    scratch.dq.resize(padded * width, [0.0; LANES]);
    let deltas = scratch.minus_delta.as_flattened_mut().iter_mut();
    for ((o, grad), delta) in scratch
        .o
        .chunks_exact(width)
        .zip(scratch.grad.chunks_exact(width))
        .zip(deltas)
    {
        let mut sum = simd.splat(0.0);
        for (o, grad) in o.iter().zip(grad) {
            sum = simd.fma(simd.load(o), simd.load(grad), sum);
        }
        *delta = -simd.reduce_sum(sum);
    }
    scratch.minus_lse = [[f32::NEG_INFINITY; LANES]; VECTORS];
    let lse = inputs.lse[first * heads + head..].iter().step_by(heads).take(count);
    for (to, lse) in scratch.minus_lse.as_flattened_mut().iter_mut().zip(lse) {
        // A query without visible keys has probabilities of 0.
        *to = if *lse == f32::NEG_INFINITY { *lse } else { -lse };
    }
}

/// Adds the gradients of a block of queries.
#[inline(always)]
fn of_block<S: SimdOps>(simd: S, view: View, queries: usize, scratch: &mut Scratch) {
    let (dim, width, vectors) = (view.dim, view.dim.div_ceil(LANES), queries.div_ceil(LANES));
    let (seen, step) = (view.seen(queries), if view.own.is_some() { CAUSAL_KEYS } else { KEYS });
    scratch.scores.resize(KEYS, PerQuery::default());
    scratch.dscores.resize(KEYS, PerQuery::default());
    for first in (0..seen).step_by(step) {
        let count = step.min(seen - first);
        let padded = count.next_multiple_of(TILE);
        // First vector with a query that sees a key.
        let n = view.own.map_or(0, |own| first.saturating_sub(own) / LANES);
        let rows = first * width..(first + padded) * width;
        let (scores, dscores) = (&mut scratch.scores[..padded], &mut scratch.dscores[..padded]);
        set_from_rows(
            simd,
            &scratch.keys[rows.clone()],
            &scratch.q_columns[..dim],
            (n, vectors),
            scores,
        );
        set_from_rows(
            simd,
            &scratch.values[rows.clone()],
            &scratch.grad_columns[..dim],
            (n, vectors),
            dscores,
        );
        if let Some(own) = view.own
            && first + count > own + 1
        {
            hide_later_keys(simd, scores, first, own);
        }
        for n in n..vectors {
            let (lse, delta) = (simd.load(&scratch.minus_lse[n]), simd.load(&scratch.minus_delta[n]));
            for (score, dscore) in scores[..count].iter_mut().zip(&mut dscores[..count]) {
                let weight = exp(simd, simd.add(simd.load(&score[n]), lse));
                simd.store(weight, &mut score[n]);
                simd.store(simd.mul(weight, simd.add(simd.load(&dscore[n]), delta)), &mut dscore[n]);
            }
            for row in scores[count..].iter_mut().chain(&mut dscores[count..]) {
                row[n] = [0.0; LANES];
            }
        }
        let range = (n * LANES, queries);
        let (q, grad) = (&scratch.q[n * LANES * width..], &scratch.grad[n * LANES * width..]);
        add_from_rows(simd, scores, range, (grad, width), &mut scratch.dv[rows.clone()]);
        add_from_rows(simd, dscores, range, (q, width), &mut scratch.dk[rows.clone()]);
        let dq = &mut scratch.dq[n * LANES * width..];
        add_from_columns(simd, dscores, range, (&scratch.keys[rows], width), dq);
    }
}

/// Writes rows of whole vectors, times a factor, as rows of `dim` numbers that lie `stride` apart.
#[inline(always)]
fn write_rows<S: SimdOps, T>(
    simd: S,
    from: &[F32x16],
    factor: f32,
    (dim, stride): (usize, usize),
    to: &mut [MaybeUninit<T>],
    convert: impl Fn(f32) -> T,
) {
    let factor = simd.splat(factor);
    for (from, to) in from.chunks_exact(dim.div_ceil(LANES)).zip(to.chunks_mut(stride)) {
        for (from, to) in from.iter().zip(to[..dim].chunks_mut(LANES)) {
            let mut numbers = [0.0; LANES];
            simd.store(simd.mul(factor, simd.load(from)), &mut numbers);
            for (to, from) in to.iter_mut().zip(numbers) {
                to.write(convert(from));
            }
        }
    }
}
