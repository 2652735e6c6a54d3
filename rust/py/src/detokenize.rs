//! Binding of the streaming detokenizer, class `DetokenizeStream`.

use prefixfast_core::Error;
use prefixfast_core::detokenize::Stream;
use pyo3::prelude::*;

use crate::error::{guarded, raise};

/// Streaming decoder of one growing sequence of ids.
#[pyclass(module = "prefixfast._rust")]
pub(crate) struct DetokenizeStream(pub(crate) Stream);

#[pymethods]
impl DetokenizeStream {
    /// Adds ids and returns the text that can no longer change.
    fn push(&mut self, py: Python<'_>, ids: Vec<i64>) -> PyResult<String> {
        let convert = |id: &i64| {
            i32::try_from(*id).map_err(|_| {
                raise(
                    py,
                    &Error::Data(format!("id {id}: expected 0 to {}; check the ids", i32::MAX)),
                )
            })
        };
        let ids = ids.iter().map(convert).collect::<PyResult<Vec<i32>>>()?;
        guarded(py, || self.0.push(&ids))
    }

    /// Returns the text that was held back, and resets the stream.
    fn finish(&mut self, py: Python<'_>) -> PyResult<String> {
        guarded(py, || self.0.finish())
    }
}
