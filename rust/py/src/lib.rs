//! The Python face of `prefixfast-core`: it converts, releases the GIL and maps errors, nothing else. The stub `_rust.pyi` documents it.

#![expect(clippy::needless_pass_by_value, reason = "pyo3 hands arguments over by value")]

mod arrays;
mod attend;
mod batch;
mod detokenize;
mod error;
mod linearize;
mod tokenize;

use pyo3::prelude::*;

/// The Rust core: tokens, strings, batch plans, the scheduler, and decode attention on CPUs.
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
    module.add_function(wrap_pyfunction!(attend::attend_join, module)?)?;
    module.add_function(wrap_pyfunction!(attend::attend_paths, module)?)?;
    module.add_function(wrap_pyfunction!(batch::pack::pack, module)?)?;
    module.add_function(wrap_pyfunction!(batch::plan::plan_packed, module)?)
}
