//! Binding of the tables of a packed forward, `plan_packed` and its result `PlanBuffer`.

use numpy::{PyArray1, PyReadonlyArray1, PyReadonlyArray2};
use prefixfast_core::Error;
use prefixfast_core::batch::plan as core;
use prefixfast_core::batch::table_buffer::Section;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arrays::{array, count, sections, values};
use crate::error::{detached, raise};

/// Tables of a packed forward.
#[pyclass(frozen, module = "prefixfast._rust")]
pub(crate) struct PlanBuffer {
    /// Tables, int32.
    #[pyo3(get)]
    buffer: Py<PyArray1<i32>>,
    /// Largest number of keys that a query can see.
    #[pyo3(get)]
    reach: i32,
    sections: Vec<Section>,
}

#[pymethods]
impl PlanBuffer {
    /// Table names to (offset, rows, cols) in `buffer`.
    #[getter]
    fn sections<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        sections(py, &self.sections)
    }
}

/// Makes the tables of a packed forward.
#[pyfunction]
#[pyo3(signature = (
    lengths, prefix_indptr, prefix, prefix_rows, *, tiles, buckets = 4, last_prompt_token = None, key_lengths = None,
    padded = true
))]
#[expect(clippy::too_many_arguments, reason = "the arguments of the Python function")]
pub(crate) fn plan_packed(
    py: Python<'_>,
    lengths: PyReadonlyArray1<'_, i32>,
    prefix_indptr: PyReadonlyArray1<'_, i32>,
    prefix: PyReadonlyArray1<'_, i32>,
    prefix_rows: PyReadonlyArray2<'_, i32>,
    tiles: (i64, i64, i64),
    buckets: i64,
    last_prompt_token: Option<PyReadonlyArray1<'_, i32>>,
    key_lengths: Option<PyReadonlyArray1<'_, i32>>,
    padded: bool,
) -> PyResult<PlanBuffer> {
    let shape = prefix_rows.as_array().dim();
    let prefix_rows = values(py, "prefix_rows", &prefix_rows)?;
    let (rows, rest) = prefix_rows.as_chunks::<5>();
    if shape.1 != 5 || !rest.is_empty() {
        return Err(raise(
            py,
            &Error::Config(format!("prefix_rows has shape {shape:?}: expected five columns")),
        ));
    }
    let (lengths, prefix) = (values(py, "lengths", &lengths)?, values(py, "prefix", &prefix)?);
    let prefix_indptr = values(py, "prefix_indptr", &prefix_indptr)?;
    let first_tokens = vec![0; lengths.len()];
    let last_prompt_token = match &last_prompt_token {
        Some(array) => values(py, "last_prompt_token", array)?,
        None => first_tokens,
    };
    let key_lengths = match &key_lengths {
        Some(array) => Some(values(py, "key_lengths", array)?),
        None => None,
    };
    let inputs = core::PackedInputs {
        lengths: &lengths,
        last_prompt_token: &last_prompt_token,
        prefix_indptr: &prefix_indptr,
        prefix: &prefix,
        prefix_rows: rows,
        tiles: core::TileSizes {
            queries: count(py, "tiles", tiles.0)?,
            keys: count(py, "tiles", tiles.1)?,
            prefix_rows: count(py, "tiles", tiles.2)?,
        },
        buckets: count(py, "buckets", buckets)?,
        key_lengths: key_lengths.as_deref(),
        padded,
    };
    let (tables, reach) = detached(py, || core::plan_packed(&inputs))?;
    Ok(PlanBuffer {
        buffer: array(py, tables.data),
        reach,
        sections: tables.sections,
    })
}
