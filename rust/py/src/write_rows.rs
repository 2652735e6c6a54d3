//! Binding of copies of new keys and values to an arena: `write_rows`.
//!
//! Tensors are passed as addresses, which `prefixfast/attention/cpu_write.py`, the only caller, has checked.

use prefixfast_core::write_rows::{self as core, ArenaRows, NewRows};
use pyo3::prelude::*;

use crate::attend::{Memory, slice};
use crate::error::detached;

/// Copies new rows to rows of the arenas of keys and of values.
#[pyfunction]
pub(crate) fn write_rows(
    py: Python<'_>,
    arenas: [usize; 2],
    rows: (usize, usize),
    new: [(usize, usize, usize); 2],
    slots: Memory,
    threads: usize,
) -> PyResult<()> {
    let (count, row_bytes) = rows;
    // SAFETY: `prefixfast/attention/cpu_write.py` takes these numbers from CPU tensors whose dtypes, shapes and strides
    // it has checked, and it holds the tensors until this call returns. New rows and slots belong to the step of the
    // thread that calls, and nobody writes to them meanwhile. The slots lie in rows that `schedule/admission.rs` gives
    // to one request until its end, or to the arena of one call. Other threads use other rows (see `attend_decode`).
    let (pairs, slots) = unsafe {
        let pair = |i: usize| {
            let (address, bytes, stride) = new[i];
            let arena = ArenaRows::new(std::ptr::with_exposed_provenance_mut(arenas[i]), count, row_bytes);
            let bytes = slice((address, bytes));
            (arena, NewRows { bytes, stride })
        };
        ([pair(0), pair(1)], slice(slots))
    };
    detached(py, || core::write_rows(&pairs, slots, threads))
}
