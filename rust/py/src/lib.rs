//! Python bindings of `prefixfast-core`: conversion of arguments, release of the GIL, and conversion of errors.
//!
//! The stub `prefixfast/_rust.pyi` documents the module for users.

#![expect(clippy::needless_pass_by_value, reason = "pyo3 passes arguments by value")]

mod arrays;
mod attend;
mod batch;
mod best_tokens;
mod detokenize;
mod digest;
mod error;
mod layers;
mod linearize;
mod tokenize;
mod write_rows;

use pyo3::prelude::*;

/// Rust core of prefixfast: tokenization, linearization, batch tables, the scheduler, and attention on CPUs.
#[pymodule(gil_used = false)]
fn _rust(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<tokenize::Tokenizer>()?;
    module.add_class::<detokenize::DetokenizeStream>()?;
    module.add_class::<linearize::Linearizer>()?;
    module.add_class::<batch::pack::Packing>()?;
    module.add_class::<batch::plan::PlanBuffer>()?;
    module.add_class::<batch::schedule::Scheduler>()?;
    module.add_class::<batch::schedule::StepHeader>()?;
    module.add_function(wrap_pyfunction!(attend::attend_decode, module)?)?;
    module.add_function(wrap_pyfunction!(attend::attend_dense, module)?)?;
    module.add_function(wrap_pyfunction!(attend::attend_join, module)?)?;
    module.add_function(wrap_pyfunction!(attend::attend_packed, module)?)?;
    module.add_function(wrap_pyfunction!(attend::attend_packed_backward, module)?)?;
    module.add_function(wrap_pyfunction!(attend::attend_paths, module)?)?;
    module.add_function(wrap_pyfunction!(best_tokens::best_tokens, module)?)?;
    module.add_function(wrap_pyfunction!(batch::pack::pack, module)?)?;
    module.add_function(wrap_pyfunction!(digest::digest, module)?)?;
    module.add_function(wrap_pyfunction!(layers::gated_silu, module)?)?;
    module.add_function(wrap_pyfunction!(layers::gated_silu_grad, module)?)?;
    module.add_function(wrap_pyfunction!(layers::gelu, module)?)?;
    module.add_function(wrap_pyfunction!(layers::gelu_grad, module)?)?;
    module.add_function(wrap_pyfunction!(layers::layer_norm, module)?)?;
    module.add_function(wrap_pyfunction!(layers::rms_norm, module)?)?;
    module.add_function(wrap_pyfunction!(layers::rms_norm_grad, module)?)?;
    module.add_function(wrap_pyfunction!(layers::softmax_loss, module)?)?;
    module.add_function(wrap_pyfunction!(batch::plan::plan_packed, module)?)?;
    module.add_function(wrap_pyfunction!(write_rows::write_rows, module)?)
}
