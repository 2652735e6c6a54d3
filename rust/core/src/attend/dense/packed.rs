//! Attention of the sequences of a training step: each over its prefix blocks and its own keys, in one softmax.
//!
//! Shape letters: N queries and M keys of all sequences, R prefix rows, HQ query heads, H kv heads, D head dim.

mod backward;
mod tiles;

use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Mutex;

pub use backward::{PackedGradInputs, PackedGrads, attend_packed_backward};

use super::{MAX_HEAD_DIM, Out, QUERIES, Result, Rows, SCRATCH, Strided, View, check_tensor, run_block, wrong};
use crate::attend::output::round_to_bf16;
use crate::attend::{FloatsMut, InstructionSet, openmp};

/// Inputs of [`attend_packed`]. The sequences follow each other, both their queries and their keys.
#[derive(Debug, Clone, Copy)]
pub struct PackedInputs<'a> {
    /// HQ, H and D.
    pub heads: [usize; 3],
    /// N, M and R.
    pub rows: [usize; 3],
    /// Queries `[N, HQ, D]`. Tensors have no dim of sequences, so that this stride is not used.
    pub q: Strided<'a>,
    /// Keys and values `[M, H, D]`.
    pub own: [Strided<'a>; 2],
    /// Prefix keys and values `[R, H, D]`.
    pub prefix: [Strided<'a>; 2],
    /// First query, queries, first key and keys of each sequence.
    pub segments: &'a [[i32; 4]],
    /// Offsets of each sequence in `uses`.
    pub use_indptr: &'a [i32],
    /// Number of a block, and two numbers that are not used.
    pub uses: &'a [[i32; 3]],
    /// First prefix row and number of rows of each block.
    pub blocks: &'a [[i32; 2]],
    /// Factor of the scores.
    pub scale: f32,
    /// Whether the queries of a sequence are its last keys, and see no later ones.
    pub causal: bool,
}

/// One sequence.
struct Sequence {
    queries: Range<usize>,
    keys: Range<usize>,
    /// Prefix rows that it sees, in order.
    prefix: Vec<Range<usize>>,
}

impl Sequence {
    fn num_prefix_rows(&self) -> usize {
        self.prefix.iter().map(Range::len).sum()
    }
}

/// Computes the attention of every query over the prefix rows and the keys of its sequence.
///
/// * `o`: output `[N, HQ, D]`, contiguous, of the dtype of `q`.
/// * `lse`: log-sum-exp of the scores `[N, HQ]`, natural logarithm.
///
/// # Errors
/// [`crate::Error::Config`] if sizes or tables do not fit each other. Nothing is written then.
pub fn attend_packed(
    inputs: &PackedInputs<'_>,
    o: FloatsMut<'_>,
    lse: &mut [MaybeUninit<f32>],
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    let sequences = check(inputs)?;
    let ([heads, _, dim], [queries, ..]) = (inputs.heads, inputs.rows);
    let len = match &o {
        FloatsMut::F32(o) => o.len(),
        FloatsMut::Bf16(o) => o.len(),
    };
    if lse.len() != queries * heads || len != queries * heads * dim {
        return wrong(&format!(
            "outputs of {len} and {} elements: expected those of {queries} x {heads} queries of {dim}",
            lse.len()
        ));
    }
    match o {
        FloatsMut::F32(o) => of_all(inputs, &sequences, (o, lse), threads, instructions, |x| x),
        FloatsMut::Bf16(o) => of_all(inputs, &sequences, (o, lse), threads, instructions, round_to_bf16),
    }
}

/// Checks the inputs; returns the sequences.
fn check(inputs: &PackedInputs<'_>) -> Result<Vec<Sequence>> {
    let ([heads, kv_heads, dim], [queries, keys, prefix]) = (inputs.heads, inputs.rows);
    if [heads, kv_heads, dim].contains(&0) || dim > MAX_HEAD_DIM || !heads.is_multiple_of(kv_heads) {
        wrong(&format!(
            "{heads} query heads and {kv_heads} kv heads of {dim}: expected none to be 0, query heads a multiple of kv \
             heads, and a head dim of at most {MAX_HEAD_DIM}"
        ))?;
    }
    for (tensors, rows, heads) in [
        ([inputs.q, inputs.q], queries, heads),
        (inputs.own, keys, kv_heads),
        (inputs.prefix, prefix, kv_heads),
    ] {
        for tensor in tensors {
            if rows > 0 {
                check_tensor(tensor, [1, heads, rows], dim)?;
            }
        }
    }
    if queries.checked_mul(heads).and_then(|n| n.checked_mul(dim)).is_none()
        || keys.checked_mul(heads).and_then(|n| n.checked_mul(dim)).is_none()
    {
        wrong(&format!(
            "{queries} queries and {keys} keys: expected numbers that memory can hold"
        ))?;
    }
    match sequences(inputs) {
        Some(found) => Ok(found),
        None => wrong(&format!(
            "tables of {} sequences, {} uses and {} blocks: expected queries and keys that follow each other within \
             {queries} and {keys}, {}and blocks within {prefix} prefix rows",
            inputs.segments.len(),
            inputs.uses.len(),
            inputs.blocks.len(),
            if inputs.causal {
                "no fewer keys than queries, "
            } else {
                ""
            },
        ))
        .map(|()| Vec::new()),
    }
}

/// The sequences of the tables, None if these do not fit the tensors.
fn sequences(inputs: &PackedInputs<'_>) -> Option<Vec<Sequence>> {
    let [queries, keys, prefix] = inputs.rows;
    let range = |first: i32, count: i32, len: usize| {
        let (first, count) = (usize::try_from(first).ok()?, usize::try_from(count).ok()?);
        (count <= len && first <= len - count).then_some(first..first + count)
    };
    if inputs.use_indptr.len() != inputs.segments.len() + 1 {
        return None;
    }
    let mut found = Vec::with_capacity(inputs.segments.len());
    let (mut end, mut key_end) = (0, 0);
    for ([row, rows, key, count], uses) in inputs.segments.iter().zip(inputs.use_indptr.windows(2)) {
        let (own_queries, own_keys) = (range(*row, *rows, queries)?, range(*key, *count, keys)?);
        if own_queries.start != end || own_keys.start < key_end || (inputs.causal && own_keys.len() < own_queries.len())
        {
            return None;
        }
        (end, key_end) = (own_queries.end, own_keys.end);
        let [first, last] = [uses[0], uses[1]].map(usize::try_from);
        let blocks = inputs.uses.get(first.ok()?..last.ok()?)?.iter().map(|[block, ..]| {
            let [first, count] = *inputs.blocks.get(usize::try_from(*block).ok()?)?;
            range(first, count, prefix)
        });
        found.push(Sequence {
            queries: own_queries,
            keys: own_keys,
            prefix: blocks.collect::<Option<_>>()?,
        });
    }
    (end == queries).then_some(found)
}

impl<'a> PackedInputs<'a> {
    /// Keys and values of a sequence and kv head, or another pair of tensors of the same rows.
    fn sources(&self, sequence: &Sequence, head: usize) -> Vec<[Rows<'a>; 2]> {
        let rows = |tensors: [Strided<'a>; 2], range: &Range<usize>| {
            tensors.map(|tensor| Rows {
                tensor,
                place: [0, head],
                first: range.start,
                count: range.len(),
            })
        };
        let prefix = sequence.prefix.iter().map(|range| rows(self.prefix, range));
        prefix.chain([rows(self.own, &sequence.keys)]).collect()
    }

    /// Place of the first query of a sequence among its prefix rows and keys, None if it sees all of them.
    fn own(&self, sequence: &Sequence) -> Option<usize> {
        self.causal
            .then(|| sequence.num_prefix_rows() + sequence.keys.len() - sequence.queries.len())
    }
}

fn of_all<T: Send>(
    inputs: &PackedInputs<'_>,
    sequences: &[Sequence],
    (mut o, mut lse): (&mut [MaybeUninit<T>], &mut [MaybeUninit<f32>]),
    threads: usize,
    instructions: InstructionSet,
    convert: impl Fn(f32) -> T + Copy + Sync,
) -> Result<()> {
    let [heads, kv_heads, dim] = inputs.heads;
    let mut parts = Vec::with_capacity(sequences.len());
    for sequence in sequences {
        let (own_o, own_lse);
        (own_o, o) = o.split_at_mut(sequence.queries.len() * heads * dim);
        (own_lse, lse) = lse.split_at_mut(sequence.queries.len() * heads);
        parts.push((sequence, own_o, own_lse));
    }
    let threads = threads.min(parts.len());
    let parts = Mutex::new(parts.into_iter());
    let next = || parts.lock().ok().and_then(|mut parts| parts.next());
    openmp::run_on_threads(threads, &|| {
        SCRATCH.with_borrow_mut(|scratch| {
            while let Some((sequence, o, lse)) = next() {
                let count = sequence.queries.len();
                for head in 0..heads {
                    let sources = inputs.sources(sequence, head / (heads / kv_heads));
                    for first in (0..count).step_by(QUERIES) {
                        let block = Rows {
                            tensor: inputs.q,
                            place: [0, head],
                            first: sequence.queries.start + first,
                            count: QUERIES.min(count - first),
                        };
                        let view = View {
                            dim,
                            keys: sequence.num_prefix_rows() + sequence.keys.len(),
                            scale: inputs.scale,
                            own: inputs.own(sequence).map(|own| own + first),
                        };
                        let start = first * heads + head;
                        let out = Out {
                            o: &mut o[start * dim..],
                            lse: &mut lse[start..],
                            strides: [heads * dim, heads],
                        };
                        // Query heads of one kv head follow each other.
                        let is_new = first == 0 && head % (heads / kv_heads) == 0;
                        let sources = is_new.then_some(sources.as_slice());
                        run_block(instructions, (sources, block), view, scratch, out, convert);
                    }
                }
            }
        });
    })
}
