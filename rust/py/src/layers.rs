//! Bindings of layers without matrix products on CPUs, and of the loss of logits.
//!
//! Tensors are passed as addresses, which the Python functions of the same names, the only callers, have checked.

use prefixfast_core::attend::{Floats, FloatsMut, InstructionSet};
use prefixfast_core::layers::{self as core, Approximation, FloatsInPlace, LayerNorm, RmsNorm};
use pyo3::prelude::*;

use crate::attend::{in_place, slice, slice_mut};
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
    // SAFETY: `floats` and `floats_mut` say what the caller has checked of these tensors.
    let (x, out) = unsafe { (floats(x, size, is_bf16), floats_mut(out, size, is_bf16)) };
    detached(py, || core::gelu(x, out, approximation(is_tanh), threads, instructions))
}

/// Computes the gradient of GELU by its input.
#[pyfunction]
#[pyo3(signature = (tensors, size, is_bf16, is_tanh, threads, path))]
pub(crate) fn gelu_grad(
    py: Python<'_>,
    tensors: (usize, usize, usize),
    size: usize,
    is_bf16: bool,
    is_tanh: bool,
    threads: usize,
    path: Option<&str>,
) -> PyResult<()> {
    let instructions = guarded(py, || path.map_or_else(InstructionSet::selected, InstructionSet::named))?;
    let (x, dy, dx) = tensors;
    // SAFETY: `floats` and `floats_mut` say what the caller has checked of these tensors.
    let ([x, dy], dx) = unsafe { ([x, dy].map(|t| floats(t, size, is_bf16)), floats_mut(dx, size, is_bf16)) };
    detached(py, || {
        core::gelu_grad(x, dy, dx, approximation(is_tanh), threads, instructions)
    })
}

/// Computes the `SiLU` of a gate times a second input.
#[pyfunction]
#[pyo3(signature = (tensors, size, is_bf16, threads, path))]
pub(crate) fn gated_silu(
    py: Python<'_>,
    tensors: (usize, usize, usize),
    size: usize,
    is_bf16: bool,
    threads: usize,
    path: Option<&str>,
) -> PyResult<()> {
    let instructions = guarded(py, || path.map_or_else(InstructionSet::selected, InstructionSet::named))?;
    let (gate, up, out) = tensors;
    // SAFETY: `floats` and `floats_mut` say what the caller has checked of these tensors.
    let ([gate, up], out) = unsafe {
        (
            [gate, up].map(|t| floats(t, size, is_bf16)),
            floats_mut(out, size, is_bf16),
        )
    };
    detached(py, || core::gated_silu(gate, up, out, threads, instructions))
}

/// Computes the gradients of `gated_silu` by both inputs.
#[pyfunction]
#[pyo3(signature = (inputs, outputs, size, is_bf16, threads, path))]
pub(crate) fn gated_silu_grad(
    py: Python<'_>,
    inputs: [usize; 3],
    outputs: [usize; 2],
    size: usize,
    is_bf16: bool,
    threads: usize,
    path: Option<&str>,
) -> PyResult<()> {
    let instructions = guarded(py, || path.map_or_else(InstructionSet::selected, InstructionSet::named))?;
    // SAFETY: `floats` and `floats_mut` say what the caller has checked of these tensors.
    let (inputs, outputs) = unsafe {
        (
            inputs.map(|t| floats(t, size, is_bf16)),
            outputs.map(|t| floats_mut(t, size, is_bf16)),
        )
    };
    detached(py, || core::gated_silu_grad(inputs, outputs, threads, instructions))
}

/// Scales each row to a mean square of 1.
#[pyfunction]
#[pyo3(signature = (x, out, size, is_bf16, weight, eps, threads, path))]
#[expect(
    clippy::too_many_arguments,
    reason = "a Python object for the arguments would have no other use"
)]
pub(crate) fn rms_norm(
    py: Python<'_>,
    x: usize,
    out: usize,
    size: usize,
    is_bf16: bool,
    weight: (usize, usize, bool),
    eps: f32,
    threads: usize,
    path: Option<&str>,
) -> PyResult<()> {
    let instructions = guarded(py, || path.map_or_else(InstructionSet::selected, InstructionSet::named))?;
    let (weight, width, is_bf16_weight) = weight;
    // SAFETY: `floats` and `floats_mut` say what the caller has checked of these tensors.
    let (x, out, weight) = unsafe {
        (
            floats(x, size, is_bf16),
            floats_mut(out, size, is_bf16),
            floats(weight, width, is_bf16_weight),
        )
    };
    detached(py, || {
        core::rms_norm(x, RmsNorm { weight, eps }, out, threads, instructions)
    })
}

/// Computes the gradient of `rms_norm` by its input.
#[pyfunction]
#[pyo3(signature = (tensors, size, is_bf16, weight, eps, threads, path))]
#[expect(
    clippy::too_many_arguments,
    reason = "a Python object for the arguments would have no other use"
)]
pub(crate) fn rms_norm_grad(
    py: Python<'_>,
    tensors: (usize, usize, usize),
    size: usize,
    is_bf16: bool,
    weight: (usize, usize, bool),
    eps: f32,
    threads: usize,
    path: Option<&str>,
) -> PyResult<()> {
    let instructions = guarded(py, || path.map_or_else(InstructionSet::selected, InstructionSet::named))?;
    let ((x, dy, dx), (weight, width, is_bf16_weight)) = (tensors, weight);
    // SAFETY: `floats` and `floats_mut` say what the caller has checked of these tensors.
    let ([x, dy], dx, weight) = unsafe {
        (
            [x, dy].map(|t| floats(t, size, is_bf16)),
            floats_mut(dx, size, is_bf16),
            floats(weight, width, is_bf16_weight),
        )
    };
    detached(py, || {
        core::rms_norm_grad(x, RmsNorm { weight, eps }, dy, dx, threads, instructions)
    })
}

/// Computes the negative log-likelihood of the target of each row of logits, and its gradient over the logits.
#[pyfunction]
#[pyo3(signature = (logits, size, is_bf16, targets, losses, rows, is_grad, threads, path))]
#[expect(
    clippy::too_many_arguments,
    reason = "a Python object for the arguments would have no other use"
)]
pub(crate) fn softmax_loss(
    py: Python<'_>,
    logits: usize,
    size: usize,
    is_bf16: bool,
    targets: usize,
    losses: usize,
    rows: usize,
    is_grad: bool,
    threads: usize,
    path: Option<&str>,
) -> PyResult<()> {
    let instructions = guarded(py, || path.map_or_else(InstructionSet::selected, InstructionSet::named))?;
    // SAFETY: the addresses are those of contiguous CPU tensors of these sizes, which the caller holds until this call
    // returns. Logits and losses are initialized, and nothing else refers to either.
    let (logits, targets, losses) = unsafe {
        let logits = if is_bf16 {
            FloatsInPlace::Bf16(in_place((logits, size)))
        } else {
            FloatsInPlace::F32(in_place((logits, size)))
        };
        (logits, slice((targets, rows)), in_place((losses, rows)))
    };
    detached(py, || {
        core::softmax_loss(logits, targets, losses, is_grad, threads, instructions)
    })
}

fn approximation(is_tanh: bool) -> Approximation {
    if is_tanh {
        Approximation::Tanh
    } else {
        Approximation::Exact
    }
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
