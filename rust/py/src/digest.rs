//! Bindings of the digest of memory.

use numpy::PyReadonlyArray1;
use prefixfast_core::Error;
use pyo3::prelude::*;

use crate::error::{guarded, raise};

/// Digest of an array. The GIL is held, so that no other Python thread writes to the array meanwhile.
#[pyfunction]
pub(crate) fn digest(py: Python<'_>, array: PyReadonlyArray1<'_, u8>) -> PyResult<u64> {
    let bytes = array.as_slice().map_err(|_| {
        raise(
            py,
            &Error::Config("array is not contiguous: expected a contiguous array".to_owned()),
        )
    })?;
    guarded(py, || prefixfast_core::digest::digest(bytes))
}
