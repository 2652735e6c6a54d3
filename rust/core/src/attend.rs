//! Decode attention on CPUs: one query a row over its prefix blocks and the arena rows that the slot table names.
//!
//! One pass over keys and values where they lie: nothing is gathered, expanded or merged. A query's softmax runs along (online), its prefix blocks first
//! (in the order of the block table), then its own keys. Rows that share a prefix walk it together, chunk by chunk, so that a chunk comes from memory once.
//! All of one query happens on one thread in an order that its own keys alone decide: its result is the same to the bit whichever rows share
//! the batch and however many threads run.
//!
//! Shape letters: R rows, HQ query heads, H kv heads, G queries per kv head, D head dim, C blocks, E (row, block) pairs.
//! Specification: `reference.attn_decode` of the kernels.

#![expect(
    clippy::inline_always,
    reason = "vector instructions are compiled into the function that enables them, or not at all"
)]
#![expect(
    clippy::many_single_char_names,
    clippy::similar_names,
    reason = "letters are the field's: q, k, v, o"
)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod chunk;
mod dispatch;
mod math;
mod online_softmax;
mod openmp;
mod output;
mod plan;
mod tables;
mod task;
mod transposed;
mod vector;

use std::sync::atomic::{AtomicUsize, Ordering};

pub use dispatch::{SIMD, Simd};
pub use openmp::join;

use crate::error::{Error, Result};
use output::Out;
use plan::Plan;

/// Largest head dim.
pub const MAX_HEAD_DIM: usize = 256;

/// Floats in memory; bf16 as its bits.
#[derive(Debug, Clone, Copy)]
pub enum Floats<'a> {
    /// fp32.
    F32(&'a [f32]),
    /// bf16.
    Bf16(&'a [u16]),
}

impl Floats<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::Bf16(x) => x.len(),
        }
    }
}

/// Floats to write.
#[derive(Debug)]
pub enum FloatsMut<'a> {
    /// fp32.
    F32(&'a mut [f32]),
    /// bf16.
    Bf16(&'a mut [u16]),
}

/// Keys and values `[rows, H, D]`.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// Both fp32.
    F32 {
        /// Keys.
        k: &'a [f32],
        /// Values.
        v: &'a [f32],
    },
    /// Both bf16.
    Bf16 {
        /// Keys.
        k: &'a [u16],
        /// Values.
        v: &'a [u16],
    },
}

impl Source<'_> {
    /// Bytes of a number.
    fn width(&self) -> usize {
        match self {
            Self::F32 { .. } => size_of::<f32>(),
            Self::Bf16 { .. } => size_of::<u16>(),
        }
    }

    fn lens(&self) -> [usize; 2] {
        match self {
            Self::F32 { k, v } => [k.len(), v.len()],
            Self::Bf16 { k, v } => [k.len(), v.len()],
        }
    }
}

/// Sizes of a step.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// R.
    pub rows: usize,
    /// HQ, a multiple of H.
    pub heads: usize,
    /// H.
    pub kv_heads: usize,
    /// D, at most [`MAX_HEAD_DIM`].
    pub head_dim: usize,
}

/// Which keys each row sees; see `tables.py` of the kernels.
#[derive(Debug, Clone, Copy)]
pub struct Tables<'a> {
    /// `[rows, at least columns]`: arena row of each token, `stride` entries from one row to the next.
    pub table: &'a [i32],
    /// Rows, columns and stride of `table`.
    pub table_shape: [usize; 3],
    /// `[R]`: row of `table`.
    pub row: &'a [i32],
    /// `[R]`: keys, at least 1.
    pub lens: &'a [i32],
    /// `[C]`: first prefix row, rows.
    pub block: &'a [[i32; 2]],
    /// `[C + 1]`.
    pub user_indptr: &'a [i32],
    /// `[E]`: row that sees the block.
    pub user: &'a [i32],
    /// `[E]`: position of the block's first row relative to the query.
    pub user_pos: &'a [i32],
    /// `[E]`: the window slides over the block.
    pub user_slides: &'a [i32],
}

/// One step of one layer.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a> {
    /// Sizes.
    pub shape: Shape,
    /// `[R, HQ, D]` with the strides below, D contiguous.
    pub q: Floats<'a>,
    /// Elements from one row, and from one head, of `q` to the next.
    pub q_strides: [usize; 2],
    /// The arena.
    pub own: Source<'a>,
    /// Where prefix rows lie; may be the arena.
    pub prefix: Source<'a>,
    /// Tables.
    pub tables: Tables<'a>,
    /// Multiplies scores.
    pub scale: f32,
    /// Sliding window in tokens, 0 for none.
    pub window: usize,
    /// Score cap, 0 for none.
    pub softcap: f32,
}

/// What [`decode`] fills.
#[derive(Debug)]
pub struct Output<'a> {
    /// `[R, HQ, D]`.
    pub o: FloatsMut<'a>,
    /// `[R, HQ]`, natural.
    pub lse: &'a mut [f32],
}

/// Attention of one decode step.
///
/// # Errors
/// [`Error::Config`] if memory and sizes do not fit, or a table names a row that does not exist; then nothing is written.
pub fn decode(problem: &Problem<'_>, output: Output<'_>, threads: usize, simd: Simd) -> Result<()> {
    check(problem, &output)?;
    let plan = Plan::new(problem, threads)?;
    let next = AtomicUsize::new(0);
    let out = Out::new(problem.shape, output);
    let work = || {
        while let Some(task) = plan.tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
            task::run(simd, problem, &plan, task, &out);
        }
    };
    openmp::run(threads.min(plan.tasks.len()), &work)
}

fn check(problem: &Problem<'_>, output: &Output<'_>) -> Result<()> {
    let Shape {
        rows,
        heads,
        kv_heads,
        head_dim,
    } = problem.shape;
    let wrong = |text: String| Err(Error::Config(format!("attention: {text}")));
    if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
        return wrong(format!(
            "{heads} query heads and {kv_heads} kv heads: expected a multiple"
        ));
    }
    if head_dim == 0 || head_dim > MAX_HEAD_DIM {
        return wrong(format!("head dim {head_dim}: expected 1 to {MAX_HEAD_DIM}"));
    }
    let out = match &output.o {
        FloatsMut::F32(o) => o.len(),
        FloatsMut::Bf16(o) => o.len(),
    };
    let all = rows.checked_mul(heads);
    if all != Some(output.lse.len()) || all.and_then(|n| n.checked_mul(head_dim)) != Some(out) {
        return wrong(format!(
            "outputs of {out} and {} numbers: expected {rows} rows of {heads} heads of {head_dim}",
            output.lse.len()
        ));
    }
    let [row, head] = problem.q_strides;
    let reach = || {
        row.checked_mul(rows - 1)?
            .checked_add(head.checked_mul(heads - 1)?)?
            .checked_add(head_dim)
    };
    if rows > 0 && reach().is_none_or(|n| n > problem.q.len()) {
        return wrong(format!(
            "{} numbers of queries with strides {row} and {head}: too few for {rows} rows of {heads} heads",
            problem.q.len()
        ));
    }
    for [k, v] in [problem.own.lens(), problem.prefix.lens()] {
        if k != v || !k.is_multiple_of(kv_heads * head_dim) {
            return wrong(format!(
                "{k} numbers of keys and {v} of values: expected as many, in rows of {kv_heads} heads of {head_dim}"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
