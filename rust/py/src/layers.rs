//! Bindings of layers without matrix products on CPUs: `layer_norm` and `gelu`.
//!
//! Tensors are passed as addresses, which `prefixfast/model/cpu_layers.py`, the only caller, has checked.

use prefixfast_core::attend::{Floats, FloatsMut, InstructionSet};
use prefixfast_core::layers::{self as core, Approximation, LayerNorm};
use pyo3::prelude::*;

use crate::attend::{slice, slice_mut};
use crate::error::{detached, guarded};

/// Normalizes each row.
#[pyfunction]
#[pyo3(signature = (x, out, size, is_bf16, parameters, eps, threads, path))]
#[expect(
    clippy::too_many_arguments,
    reason = "a Python object for the arguments would have no other use"
)]
pub(crate) fn layer_norm(
    py: Python<'_>,
    x: usize,
    out: usize,
    size: usize,
    is_bf16: bool,
    parameters: (usize, usize, usize, bool),
    eps: f32,
    threads: usize,
    path: Option<&str>,
) -> PyResult<()> {
    let instructions = guarded(py, || path.map_or_else(InstructionSet::selected, InstructionSet::named))?;
    let (weight, bias, width, is_bf16_weight) = parameters;
    // SAFETY: `floats` and `floats_mut` say what the caller has checked of these tensors.
    let (x, out, parameters) = unsafe {
        let parameters = LayerNorm {
            weight: floats(weight, width, is_bf16_weight),
            bias: floats(bias, width, is_bf16_weight),
            eps,
        };
        (floats(x, size, is_bf16), floats_mut(out, size, is_bf16), parameters)
    };
    detached(py, || core::layer_norm(x, parameters, out, threads, instructions))
}

/// Computes GELU of each element.
#[pyfunction]
#[pyo3(signature = (x, out, size, is_bf16, is_tanh, threads, path))]
#[expect(
    clippy::too_many_arguments,
    reason = "a Python object for the arguments would have no other use"
)]
pub(crate) fn gelu(
    py: Python<'_>,
    x: usize,
    out: usize,
    size: usize,
    is_bf16: bool,
    is_tanh: bool,
    threads: usize,
    path: Option<&str>,
) -> PyResult<()> {
    let instructions = guarded(py, || path.map_or_else(InstructionSet::selected, InstructionSet::named))?;
    let approximation = if is_tanh {
        Approximation::Tanh
    } else {
        Approximation::Exact
    };
    // SAFETY: `floats` and `floats_mut` say what the caller has checked of these tensors.
    let (x, out) = unsafe { (floats(x, size, is_bf16), floats_mut(out, size, is_bf16)) };
    detached(py, || core::gelu(x, out, approximation, threads, instructions))
}

/// Elements of a tensor.
///
/// # Safety
/// The address is that of a contiguous CPU tensor of this size and dtype, which the caller holds until the call of
/// Rust returns. Nobody writes to it meanwhile: inputs belong to the forward of the thread that calls, and weights do
/// not change while requests run.
unsafe fn floats<'a>(address: usize, size: usize, is_bf16: bool) -> Floats<'a> {
    // SAFETY: the caller promises what `# Safety` demands.
    unsafe {
        if is_bf16 {
            Floats::Bf16(slice((address, size)))
        } else {
            Floats::F32(slice((address, size)))
        }
    }
}

/// Elements of an output.
///
/// # Safety
/// The address is that of a newly allocated contiguous CPU tensor of this size and dtype, to which nothing else refers.
unsafe fn floats_mut<'a>(address: usize, size: usize, is_bf16: bool) -> FloatsMut<'a> {
    // SAFETY: the caller promises what `# Safety` demands.
    unsafe {
        if is_bf16 {
            FloatsMut::Bf16(slice_mut((address, size)))
        } else {
            FloatsMut::F32(slice_mut((address, size)))
        }
    }
}
