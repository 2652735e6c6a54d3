//! Attention on CPUs. Decode attention has one query token per row, over its prefix blocks and its own keys in the
//! arena. Attention of many queries over the same keys is in `dense`.
//!
//! Keys and values are read where they lie and are neither gathered nor expanded. The softmax is computed online, in
//! one pass over the row's prefix blocks, in the order of the row's composition, and then over its own keys, whose
//! arena rows the slot table lists. Rows that share a prefix are processed together, chunk by chunk, so that a chunk
//! is fetched from memory once.
//!
//! All keys of a query are processed on one thread, in an order that depends on these keys alone. The result of a query
//! is therefore bitwise the same for any batch composition and any number of threads.
//!
//! Shape letters: R rows, HQ query heads, H kv heads, D head dim, C prefix blocks, U uses of a block by a row. The
//! specification is `reference.attn_decode` of the Python package `prefixfast_kernels`.

#![expect(
    clippy::inline_always,
    reason = "a vector intrinsic compiles to an instruction only inside of a function that enables the instruction set"
)]
#![expect(clippy::many_single_char_names, reason = "q, k, v and o are the standard names")]

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
mod bias;
mod chunk;
mod dense;
pub(crate) mod dispatch;
mod in_place;
mod key_copy;
pub(crate) mod math;
mod memory;
mod online_softmax;
pub(crate) mod openmp;
mod output;
mod plan;
mod state;
mod tables;
mod task;
mod tile;
mod transposed;
pub(crate) mod vector;

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};

pub use bias::Bias;
pub use dense::{
    DenseInputs, PackedGradInputs, PackedGrads, PackedInputs, Strided, attend_dense, attend_packed,
    attend_packed_backward,
};
pub use dispatch::{InstructionSet, SIMD_VARIABLE};
pub use memory::SharedMemory;
pub(crate) use online_softmax::CHUNK_KEYS;
pub use openmp::use_runtime_of;

use crate::error::{Error, Result};
use output::SharedOutput;
use plan::Plan;

/// Largest supported head dim.
pub const MAX_HEAD_DIM: usize = 256;

/// Floats in memory.
#[derive(Debug, Clone, Copy)]
pub enum Floats<'a> {
    /// fp32.
    F32(&'a [f32]),
    /// Bits of bf16 numbers.
    Bf16(&'a [u16]),
}

impl Floats<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::Bf16(x) => x.len(),
        }
    }
}

/// Writable floats in memory, which need not be initialized.
#[derive(Debug)]
pub enum FloatsMut<'a> {
    /// fp32.
    F32(&'a mut [MaybeUninit<f32>]),
    /// Bits of bf16 numbers.
    Bf16(&'a mut [MaybeUninit<u16>]),
}

impl FloatsMut<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::Bf16(x) => x.len(),
        }
    }
}

/// Keys and values, shape `[rows, H, D]`, both of the same dtype.
#[derive(Debug, Clone, Copy)]
pub enum KeysValues<'a> {
    /// fp32.
    F32 {
        /// Keys.
        k: SharedMemory<'a, f32>,
        /// Values.
        v: SharedMemory<'a, f32>,
    },
    /// Bits of bf16 numbers.
    Bf16 {
        /// Keys.
        k: SharedMemory<'a, u16>,
        /// Values.
        v: SharedMemory<'a, u16>,
    },
}

impl KeysValues<'_> {
    /// Bytes per element.
    fn element_size(&self) -> usize {
        match self {
            Self::F32 { .. } => size_of::<f32>(),
            Self::Bf16 { .. } => size_of::<u16>(),
        }
    }

    /// Number of elements of the keys and of the values.
    fn lens(&self) -> [usize; 2] {
        match self {
            Self::F32 { k, v } => [k.len(), v.len()],
            Self::Bf16 { k, v } => [k.len(), v.len()],
        }
    }
}

/// Sizes of a decode step.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Number of query rows, R.
    pub rows: usize,
    /// Number of query heads, HQ, a multiple of `kv_heads`.
    pub heads: usize,
    /// Number of kv heads, H.
    pub kv_heads: usize,
    /// Head dim, D, at most [`MAX_HEAD_DIM`].
    pub head_dim: usize,
}

/// Tables that say which keys each row sees. The field names are those of the kernels' `DecodeTables`.
#[derive(Debug, Clone, Copy)]
pub struct DecodeTables<'a> {
    /// Slot table, which maps each token to its arena row. Rows are `stride` entries apart.
    pub slot_table: &'a [i32],
    /// Rows, columns and stride of `slot_table`.
    pub slot_table_shape: [usize; 3],
    /// Slot table row of each query row, `[R]`.
    pub row: &'a [i32],
    /// Number of own keys of each query row, `[R]`. A row that sees a block may have none.
    pub lens: &'a [i32],
    /// First prefix row and number of rows of each block, `[C]`.
    pub block: &'a [[i32; 2]],
    /// Borders between the uses of different query rows in `uses`, `[R + 1]`.
    pub use_indptr: &'a [i32],
    /// Blocks that each query row sees, from left to right, `[U]`: block, position of the block's first row relative to
    /// the row's own key 0, and 1 if the attention window slides over the block, else 0.
    pub uses: &'a [[i32; 3]],
}

/// Inputs of one decode step in one layer.
#[derive(Debug, Clone, Copy)]
pub struct DecodeInputs<'a> {
    /// Sizes.
    pub shape: Shape,
    /// Queries `[R, HQ, D]` with the strides of `q_strides`. D is contiguous.
    pub q: Floats<'a>,
    /// Elements from one row, and from one head, of `q` to the next.
    pub q_strides: [usize; 2],
    /// Keys and values of the arena, which hold each row's own tokens.
    pub own: KeysValues<'a>,
    /// Keys and values of prefix rows. They may be those of the arena.
    pub prefix: KeysValues<'a>,
    /// Tables of the step.
    pub tables: DecodeTables<'a>,
    /// Factor of the scores.
    pub scale: f32,
    /// Sliding window in tokens, 0 for none.
    pub window: usize,
    /// Bound of the scores, applied as `softcap * tanh(score / softcap)`. 0 means no bound.
    pub softcap: f32,
    /// Position bias of the scores, which excludes a bound.
    pub bias: Option<Bias<'a>>,
}

/// Outputs of [`decode`].
#[derive(Debug)]
pub struct DecodeOutputs<'a> {
    /// Attention output `[R, HQ, D]`.
    pub o: FloatsMut<'a>,
    /// Log-sum-exp of the scores `[R, HQ]`, natural logarithm.
    pub lse: &'a mut [MaybeUninit<f32>],
}

/// Computes the attention of one decode step.
///
/// # Errors
/// [`Error::Config`] if sizes do not fit each other or a table names a row that does not exist. Nothing is written
/// then.
pub fn decode(
    inputs: &DecodeInputs<'_>,
    output: DecodeOutputs<'_>,
    threads: usize,
    instructions: InstructionSet,
) -> Result<()> {
    check(inputs, &output)?;
    let plan = Plan::new(inputs, threads)?;
    let next = AtomicUsize::new(0);
    let out = SharedOutput::new(inputs.shape, output);
    let work = || {
        while let Some(task) = plan.tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
            task::run(instructions, inputs, &plan, task, &out);
        }
    };
    openmp::run_on_threads(threads.min(plan.tasks.len()), &work)
}

/// Compares the sizes of all memory with the shape. The unsafe code in `output` relies on it.
fn check(inputs: &DecodeInputs<'_>, output: &DecodeOutputs<'_>) -> Result<()> {
    let Shape {
        rows,
        heads,
        kv_heads,
        head_dim,
    } = inputs.shape;
    let wrong = |text: String| Err(Error::Config(format!("attention: {text}")));
    if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
        return wrong(format!(
            "{heads} query heads and {kv_heads} kv heads: expected the first to be a multiple of the second"
        ));
    }
    if head_dim == 0 || head_dim > MAX_HEAD_DIM {
        return wrong(format!("head dim {head_dim}: expected 1 to {MAX_HEAD_DIM}"));
    }
    let out = match &output.o {
        FloatsMut::F32(o) => o.len(),
        FloatsMut::Bf16(o) => o.len(),
    };
    let queries = rows.checked_mul(heads);
    if queries != Some(output.lse.len()) || queries.and_then(|n| n.checked_mul(head_dim)) != Some(out) {
        return wrong(format!(
            "outputs of {out} and {} elements: expected {rows} rows of {heads} heads of {head_dim}",
            output.lse.len()
        ));
    }
    let [row, head] = inputs.q_strides;
    let end = || {
        row.checked_mul(rows - 1)?
            .checked_add(head.checked_mul(heads - 1)?)?
            .checked_add(head_dim)
    };
    if rows > 0 && end().is_none_or(|n| n > inputs.q.len()) {
        return wrong(format!(
            "{} query elements with strides {row} and {head}: expected enough for {rows} rows of {heads} heads",
            inputs.q.len()
        ));
    }
    if let Some(Bias { table, max_distance }) = inputs.bias {
        let columns = max_distance.checked_mul(2).and_then(|n| n.checked_add(1));
        if inputs.softcap > 0.0 || columns.and_then(|n| n.checked_mul(heads)) != Some(table.len()) {
            return wrong(format!(
                "a position bias of {} numbers up to distance {max_distance} with a bound of {}: expected {heads} rows \
                 of all distances, and no bound",
                table.len(),
                inputs.softcap
            ));
        }
    }
    for [k, v] in [inputs.own.lens(), inputs.prefix.lens()] {
        if k != v || !k.is_multiple_of(kv_heads * head_dim) {
            return wrong(format!(
                "{k} key elements and {v} value elements: expected equal numbers, in rows of {kv_heads} heads of \
                 {head_dim}"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
