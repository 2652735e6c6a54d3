//! Binding of micro-batch packing, `pack` and its result `Packing`.

use numpy::{PyArray1, PyReadonlyArray1};
use prefixfast_core::batch::pack as core;
use pyo3::prelude::*;

use crate::arrays::{array, count, values};
use crate::error::detached;

/// Micro-batches, and the loss weights of their examples.
#[pyclass(frozen, module = "prefixfast._rust")]
pub(crate) struct Packing {
    /// Numbers of the input examples, micro-batch after micro-batch, int32.
    #[pyo3(get)]
    order: Py<PyArray1<i32>>,
    /// Borders between micro-batches in `order`, int32.
    #[pyo3(get)]
    micro_indptr: Py<PyArray1<i32>>,
    /// Weight of each target token of an input example in the summed loss, float64.
    #[pyo3(get)]
    weight: Py<PyArray1<f64>>,
}

/// Packs whole per-prefix batches into micro-batches of at most `token_budget` tokens.
#[pyfunction]
#[pyo3(signature = (lengths, targets, batch, *, token_budget, sequence_sum))]
pub(crate) fn pack(
    py: Python<'_>,
    lengths: PyReadonlyArray1<'_, i32>,
    targets: PyReadonlyArray1<'_, i32>,
    batch: PyReadonlyArray1<'_, i32>,
    token_budget: i64,
    sequence_sum: bool,
) -> PyResult<Packing> {
    let (lengths, targets) = (values(py, "lengths", &lengths)?, values(py, "targets", &targets)?);
    let batch = values(py, "batch", &batch)?;
    let examples = core::Examples {
        lengths: &lengths,
        targets: &targets,
        batch: &batch,
    };
    let budget = count(py, "token_budget", token_budget)? as u64;
    let packing = detached(py, || core::pack(examples, budget, sequence_sum))?;
    Ok(Packing {
        order: array(py, packing.order),
        micro_indptr: array(py, packing.micro_indptr),
        weight: array(py, packing.weight),
    })
}
