//! `attend_decode` and what belongs to it. Tensors come as addresses: `prefixfast/attend.py`, the only caller, has checked them.

use std::ffi::CString;

use prefixfast_core::Error;
use prefixfast_core::attend::{self as core, Floats, FloatsMut, Output, Problem, Shape, Simd, Source, Tables};
use pyo3::prelude::*;

use crate::error::{detached, guarded, raise};

/// The names of the instruction sets of this CPU, the best first.
#[pyfunction]
pub(crate) fn attend_paths() -> Vec<&'static str> {
    Simd::all().iter().map(Simd::name).collect()
}

/// Joins the OpenMP runtime of a loaded library; None, or why it cannot.
#[pyfunction]
pub(crate) fn attend_join(library: String) -> Option<String> {
    match CString::new(library) {
        Ok(library) => core::join(&library).err(),
        Err(_) => Some("its path has a zero byte".to_owned()),
    }
}

/// Memory of a tensor: address of its first element, number of elements that may be read from there on.
type Memory = (usize, usize);

/// A slice of a tensor's memory.
///
/// # Safety
/// As `std::slice::from_raw_parts`; the address may be anything if there are no elements.
unsafe fn slice<'a, T>((address, count): Memory) -> &'a [T] {
    if count == 0 {
        return &[];
    }
    // SAFETY: what the caller promises.
    unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(address), count) }
}

/// # Safety
/// As `slice`, and nothing else refers to the memory.
unsafe fn slice_mut<'a, T>((address, count): Memory) -> &'a mut [T] {
    if count == 0 {
        return &mut [];
    }
    // SAFETY: what the caller promises.
    unsafe { std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(address), count) }
}

/// # Safety
/// As `slice`, for elements of the named type.
unsafe fn source<'a>((k, v, count, narrow): (usize, usize, usize, bool)) -> Source<'a> {
    // SAFETY: what the caller promises.
    unsafe {
        if narrow {
            Source::Bf16 {
                k: slice((k, count)),
                v: slice((v, count)),
            }
        } else {
            Source::F32 {
                k: slice((k, count)),
                v: slice((v, count)),
            }
        }
    }
}

/// Attention of one decode step.
#[pyfunction]
#[pyo3(signature = (shape, q, out, own, prefix, table, tables, scale, window, softcap, threads, path))]
#[expect(
    clippy::too_many_arguments,
    reason = "one call a layer and step: a structure would cost more than the call's other arguments together"
)]
pub(crate) fn attend_decode(
    py: Python<'_>,
    shape: (usize, usize, usize, usize),
    q: (usize, usize, usize, usize, bool),
    out: (usize, usize),
    own: (usize, usize, usize, bool),
    prefix: (usize, usize, usize, bool),
    table: (usize, usize, usize, usize),
    tables: [Memory; 7],
    scale: f32,
    window: usize,
    softcap: f32,
    threads: usize,
    path: Option<&str>,
) -> PyResult<()> {
    let simd = guarded(py, || path.map_or_else(Simd::chosen, Simd::named))?;
    let (rows, heads, kv_heads, head_dim) = shape;
    let (address, count, row, head, narrow) = q;
    let Some(lse) = rows.checked_mul(heads) else {
        return Err(raise(
            py,
            &Error::Config(format!("{rows} rows of {heads} heads: more than memory holds")),
        ));
    };
    let sizes = (lse, lse.saturating_mul(head_dim));
    let (slots, table_rows, columns, stride) = table;
    let entries = table_rows
        .saturating_sub(1)
        .saturating_mul(stride)
        .saturating_add(columns);
    // SAFETY: `prefixfast/attend.py` makes these numbers from tensors on the CPU whose dtypes, shapes and strides it has checked, and which it holds until
    // this call returns: addresses are aligned and counts are within their tensors. It has just made the outputs, so nothing else refers to them; that
    // no other thread writes to the inputs meanwhile is the contract of every operator of torch.
    let (problem, output) = unsafe {
        let [block, user_indptr, user, user_pos, user_slides, row_of, lens] = tables.map(|memory| slice(memory));
        let tables = Tables {
            table: slice((slots, if table_rows == 0 { 0 } else { entries })),
            table_shape: [table_rows, columns, stride],
            row: row_of,
            lens,
            block: block.as_chunks().0,
            user_indptr,
            user,
            user_pos,
            user_slides,
        };
        let problem = Problem {
            shape: Shape {
                rows,
                heads,
                kv_heads,
                head_dim,
            },
            q: if narrow {
                Floats::Bf16(slice((address, count)))
            } else {
                Floats::F32(slice((address, count)))
            },
            q_strides: [row, head],
            own: source(own),
            prefix: source(prefix),
            tables,
            scale,
            window,
            softcap,
        };
        let o = if narrow {
            FloatsMut::Bf16(slice_mut((out.0, sizes.1)))
        } else {
            FloatsMut::F32(slice_mut((out.0, sizes.1)))
        };
        (
            problem,
            Output {
                o,
                lse: slice_mut((out.1, sizes.0)),
            },
        )
    };
    detached(py, || core::decode(&problem, output, threads, simd))
}
