//! Binding of the most likely tokens of rows of logits: `best_tokens`.
//!
//! Tensors are passed as addresses, which `prefixfast/engine/best_tokens.py`, the only caller, has checked.

use prefixfast_core::attend::{Floats, InstructionSet};
use prefixfast_core::best_tokens::{self as core, BestTokens};
use pyo3::prelude::*;

use crate::attend::{Memory, slice, slice_mut};
use crate::error::{detached, guarded};

/// Writes the log-probabilities and the tokens of the `count` most likely tokens of each row.
#[pyfunction]
#[pyo3(signature = (logits, is_bf16, vocab, count, out, threads, path))]
#[expect(
    clippy::too_many_arguments,
    reason = "a Python object for the arguments would have no other use"
)]
pub(crate) fn best_tokens(
    py: Python<'_>,
    logits: Memory,
    is_bf16: bool,
    vocab: usize,
    count: usize,
    out: (usize, usize, usize),
    threads: usize,
    path: Option<&str>,
) -> PyResult<()> {
    let instructions = guarded(py, || path.map_or_else(InstructionSet::selected, InstructionSet::named))?;
    let (logprobs, tokens, size) = out;
    // SAFETY: `prefixfast/engine/best_tokens.py` takes these numbers from contiguous CPU tensors whose dtypes and
    // shapes it has checked or chosen, and it holds the tensors until this call returns. The outputs are newly
    // allocated, so nothing else refers to them. The logits belong to the step of the thread that calls, and nobody
    // writes to them meanwhile.
    let (logits, out) = unsafe {
        let logits = if is_bf16 {
            Floats::Bf16(slice(logits))
        } else {
            Floats::F32(slice(logits))
        };
        let out = BestTokens {
            logprobs: slice_mut((logprobs, size)),
            tokens: slice_mut((tokens, size)),
        };
        (logits, out)
    };
    detached(py, || {
        core::best_tokens(logits, [vocab, count], out, threads, instructions)
    })
}
