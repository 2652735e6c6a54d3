//! Conversion of numpy arrays.

use numpy::{Element, PyArray1, PyReadonlyArray, PyReadwriteArray1, ndarray::Dimension};
use prefixfast_core::Error;
use prefixfast_core::batch::table_buffer::Section;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::raise;

/// Copy of a contiguous array.
///
/// The caller releases the GIL while it works. A borrowed array could then be written to by another Python thread.
pub(crate) fn values<T: Element + Copy, D: Dimension>(
    py: Python<'_>,
    name: &str,
    array: &PyReadonlyArray<'_, T, D>,
) -> PyResult<Vec<T>> {
    array
        .as_slice()
        .map(<[T]>::to_vec)
        .map_err(|_| not_contiguous(py, name))
}

/// Writable memory of a contiguous array.
pub(crate) fn slice_mut<'a>(
    py: Python<'_>,
    name: &str,
    array: &'a mut PyReadwriteArray1<'_, i32>,
) -> PyResult<&'a mut [i32]> {
    array.as_slice_mut().map_err(|_| not_contiguous(py, name))
}

fn not_contiguous(py: Python<'_>, name: &str) -> PyErr {
    raise(
        py,
        &Error::Config(format!(
            "{name} is not contiguous: expected a contiguous array; pass numpy.ascontiguousarray({name})"
        )),
    )
}

/// Argument `name` as a non-negative integer.
pub(crate) fn count(py: Python<'_>, name: &str, value: i64) -> PyResult<usize> {
    usize::try_from(value).map_err(|_| raise(py, &Error::Config(format!("{name} is {value}: expected 0 or more"))))
}

/// Array that takes over the memory of a list.
pub(crate) fn array<T: Element>(py: Python<'_>, values: Vec<T>) -> Py<PyArray1<T>> {
    PyArray1::from_vec(py, values).unbind()
}

/// Dictionary from section names to (offset, rows, cols).
pub(crate) fn sections<'py>(py: Python<'py>, sections: &[Section]) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for section in sections {
        dict.set_item(section.name, (section.offset, section.rows, section.cols))?;
    }
    Ok(dict)
}
