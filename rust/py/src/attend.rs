//! Bindings of attention on CPUs.
//!
//! Tensors are passed as addresses, which the only callers, `cpu_decode.py`, `cpu_dense.py` and `cpu_packed.py` of
//! `prefixfast/attention`, have checked.

use std::ffi::CString;
use std::mem::MaybeUninit;

use prefixfast_core::Error;
use prefixfast_core::attend::{
    self as core, Bias, DecodeInputs, DecodeOutputs, DecodeTables, DenseInputs, Floats, FloatsMut, InstructionSet,
    KeysValues, PackedGradInputs, PackedGrads, PackedInputs, Shape, SharedMemory, Strided,
};
use pyo3::prelude::*;

use crate::error::{detached, guarded, raise};

/// Names of the instruction sets of this CPU, the best first.
#[pyfunction]
pub(crate) fn attend_paths() -> Vec<&'static str> {
    InstructionSet::all().iter().map(InstructionSet::name).collect()
}

/// Runs later calls on the threads of the OpenMP runtime that a loaded library uses.
///
/// Returns the reason if there is no such runtime, else None.
#[pyfunction]
pub(crate) fn attend_join(library: String) -> Option<String> {
    match CString::new(library) {
        Ok(library) => core::use_runtime_of(&library).err(),
        Err(_) => Some("the path of the library has a zero byte".to_owned()),
    }
}

/// Address of a tensor's first element, and number of elements from there on.
pub(crate) type Memory = (usize, usize);

/// A tensor's memory as a slice.
///
/// # Safety
/// The requirements of `std::slice::from_raw_parts` hold. If there are no elements, any address is allowed.
pub(crate) unsafe fn slice<'a, T>((address, count): Memory) -> &'a [T] {
    if count == 0 {
        return &[];
    }
    // SAFETY: the caller promises what `# Safety` demands.
    unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(address), count) }
}

/// A tensor's memory as a writable slice. The memory need not be initialized.
///
/// # Safety
/// The requirements of `std::slice::from_raw_parts_mut` hold. If there are no elements, any address is allowed.
pub(crate) unsafe fn slice_mut<'a, T>((address, count): Memory) -> &'a mut [MaybeUninit<T>] {
    if count == 0 {
        return &mut [];
    }
    // SAFETY: the caller promises what `# Safety` demands.
    unsafe { std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(address), count) }
}

/// A tensor's memory, whose elements are initialized, as a writable slice.
///
/// # Safety
/// The requirements of `std::slice::from_raw_parts_mut` hold. If there are no elements, any address is allowed.
pub(crate) unsafe fn in_place<'a, T>((address, count): Memory) -> &'a mut [T] {
    if count == 0 {
        return &mut [];
    }
    // SAFETY: the caller promises what `# Safety` demands.
    unsafe { std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(address), count) }
}

/// Keys and values from (address of the keys, address of the values, elements of each, whether they are bf16).
///
/// # Safety
/// The requirements of `SharedMemory::new` hold for both addresses and the element type.
unsafe fn keys_values<'a>((k, v, count, is_bf16): (usize, usize, usize, bool)) -> KeysValues<'a> {
    // SAFETY: the caller promises what `# Safety` demands.
    unsafe {
        if is_bf16 {
            KeysValues::Bf16 {
                k: SharedMemory::new(std::ptr::with_exposed_provenance(k), count),
                v: SharedMemory::new(std::ptr::with_exposed_provenance(v), count),
            }
        } else {
            KeysValues::F32 {
                k: SharedMemory::new(std::ptr::with_exposed_provenance(k), count),
                v: SharedMemory::new(std::ptr::with_exposed_provenance(v), count),
            }
        }
    }
}

/// Computes the attention of one decode step.
#[pyfunction]
#[pyo3(signature = (shape, q, out, own, prefix, table, tables, scale, window, softcap, threads, path, bias))]
#[expect(
    clippy::too_many_arguments,
    reason = "called once per layer and step; building a Python object would cost more than the rest of the call"
)]
pub(crate) fn attend_decode(
    py: Python<'_>,
    shape: (usize, usize, usize, usize),
    q: (usize, usize, usize, usize, bool),
    out: (usize, usize),
    own: (usize, usize, usize, bool),
    prefix: (usize, usize, usize, bool),
    table: (usize, usize, usize, usize),
    tables: [Memory; 5],
    scale: f32,
    window: usize,
    softcap: f32,
    threads: usize,
    path: Option<&str>,
    bias: Option<(usize, usize, usize)>,
) -> PyResult<()> {
    let instructions = guarded(py, || path.map_or_else(InstructionSet::selected, InstructionSet::named))?;
    let (rows, heads, kv_heads, head_dim) = shape;
    let (address, count, row, head, is_bf16) = q;
    let Some(lse) = rows.checked_mul(heads) else {
        return Err(raise(
            py,
            &Error::Config(format!(
                "{rows} rows of {heads} heads: expected a number of queries that memory can hold"
            )),
        ));
    };
    let sizes = (lse, lse.saturating_mul(head_dim));
    let (slots, table_rows, columns, stride) = table;
    let entries = table_rows
        .saturating_sub(1)
        .saturating_mul(stride)
        .saturating_add(columns);
    // SAFETY: `prefixfast/attention/cpu_decode.py` takes these numbers from CPU tensors whose dtypes, shapes and
    // strides it has checked, and it holds the tensors until this call returns. Addresses are therefore aligned, and
    // counts lie within their tensors. The outputs are newly allocated, so nothing else refers to them.
    // Queries and tables belong to the step of the thread that calls. Only this thread writes to them, before the call
    // (nobody writes to a bias after `model/` has made it):
    // `attention/plan.py` fills the slot table, and `engine/loop.py` makes a new buffer of tables for each step.
    // Keys and values are shared with the thread of `engine/prefix_loader.py`, which copies prefixes into other rows of
    // the arena at the same time. Nobody writes to the rows that the tables name. Own keys lie in rows that
    // `schedule/admission.rs` gives to one request until its end, and `prefixfast::kv_write` of this thread has written
    // them. A prefix's rows are in the tables only when the loader has finished with them (`prefix_ready`,
    // `PrefixCache::are_ready`), and they are not given to another prefix while a running request uses them
    // (`PrefixCache::start_running`). `engine/prefix_cache.py` clears the rows of evicted prefixes in this thread,
    // between steps. `integrations/hf_generate.py` has an arena of its own, which one thread uses.
    let (inputs, output) = unsafe {
        let [block, use_indptr, uses, row_of, lens] = tables.map(|memory| slice(memory));
        let tables = DecodeTables {
            slot_table: slice((slots, if table_rows == 0 { 0 } else { entries })),
            slot_table_shape: [table_rows, columns, stride],
            row: row_of,
            lens,
            block: block.as_chunks().0,
            use_indptr,
            uses: uses.as_chunks().0,
        };
        let inputs = DecodeInputs {
            shape: Shape {
                rows,
                heads,
                kv_heads,
                head_dim,
            },
            q: if is_bf16 {
                Floats::Bf16(slice((address, count)))
            } else {
                Floats::F32(slice((address, count)))
            },
            q_strides: [row, head],
            own: keys_values(own),
            prefix: keys_values(prefix),
            tables,
            scale,
            window,
            softcap,
            bias: bias.map(|(address, count, max_distance)| Bias {
                table: slice((address, count)),
                max_distance,
            }),
        };
        let o = if is_bf16 {
            FloatsMut::Bf16(slice_mut((out.0, sizes.1)))
        } else {
            FloatsMut::F32(slice_mut((out.0, sizes.1)))
        };
        (
            inputs,
            DecodeOutputs {
                o,
                lse: slice_mut((out.1, sizes.0)),
            },
        )
    };
    detached(py, || core::decode(&inputs, output, threads, instructions))
}

/// A tensor from its address, number of elements and strides.
///
/// # Safety
/// The requirements of `slice` hold for the element type.
unsafe fn strided<'a>((address, count, strides): (usize, usize, [usize; 3]), is_bf16: bool) -> Strided<'a> {
    // SAFETY: the caller promises what `# Safety` demands.
    let data = unsafe {
        if is_bf16 {
            Floats::Bf16(slice((address, count)))
        } else {
            Floats::F32(slice((address, count)))
        }
    };
    Strided { data, strides }
}

/// Computes the attention of all queries of sequences over the keys of their sequence.
#[pyfunction]
#[pyo3(signature = (shape, lens, tensors, is_bf16, out, scale, causal, threads, path))]
#[expect(
    clippy::too_many_arguments,
    reason = "a Python object for the arguments would have no other use"
)]
pub(crate) fn attend_dense(
    py: Python<'_>,
    shape: [usize; 4],
    lens: [usize; 2],
    tensors: [(usize, usize, [usize; 3]); 3],
    is_bf16: bool,
    out: (usize, usize),
    scale: f32,
    causal: bool,
    threads: usize,
    path: Option<&str>,
) -> PyResult<()> {
    let instructions = guarded(py, || path.map_or_else(InstructionSet::selected, InstructionSet::named))?;
    let ([batch, heads, _, dim], [queries, _]) = (shape, lens);
    let Some(rows) = batch.checked_mul(heads).and_then(|n| n.checked_mul(queries)) else {
        let text = format!("{batch} x {heads} x {queries} queries: expected a number that memory can hold");
        return Err(raise(py, &Error::Config(text)));
    };
    // SAFETY: `prefixfast/attention/cpu_dense.py` takes these numbers from CPU tensors of one dtype, and it holds the
    // tensors until this call returns. Addresses are therefore aligned, and counts lie within their tensors. The
    // outputs are newly allocated, so nothing else refers to them. Queries, keys and values belong to the forward of
    // the thread that calls, or are the arena's rows of one prefix, which nobody writes to while a running request uses
    // it (see `attend_decode`). The slices end with the last of these rows.
    let (inputs, o, lse) = unsafe {
        let [q, k, v] = tensors.map(|tensor| strided(tensor, is_bf16));
        let inputs = DenseInputs {
            shape,
            lens,
            q,
            k,
            v,
            scale,
            causal,
        };
        let o = if is_bf16 {
            FloatsMut::Bf16(slice_mut((out.0, rows.saturating_mul(dim))))
        } else {
            FloatsMut::F32(slice_mut((out.0, rows.saturating_mul(dim))))
        };
        (inputs, o, slice_mut((out.1, rows)))
    };
    detached(py, || core::attend_dense(&inputs, o, lse, threads, instructions))
}

/// Addresses, numbers of elements and strides of queries, keys, values, prefix keys and prefix values.
type PackedTensors = [(usize, usize, [usize; 3]); 5];

/// Inputs of packed attention.
///
/// # Safety
/// The tensors have one dtype and these places in memory, and the tables are int32 tensors of segments, offsets of
/// uses, uses and blocks. All of them lie on the CPU and live until the call of Rust ends, and nobody writes to them
/// before.
unsafe fn packed<'a>(
    heads: [usize; 3],
    rows: [usize; 3],
    tensors: PackedTensors,
    is_bf16: bool,
    tables: [Memory; 4],
    (scale, causal): (f32, bool),
) -> PackedInputs<'a> {
    // SAFETY: the caller promises what `# Safety` demands.
    let ([q, k, v, prefix_k, prefix_v], [segments, use_indptr, uses, blocks]) = unsafe {
        (
            tensors.map(|tensor| strided(tensor, is_bf16)),
            tables.map(|memory| slice::<i32>(memory)),
        )
    };
    PackedInputs {
        heads,
        rows,
        q,
        own: [k, v],
        prefix: [prefix_k, prefix_v],
        segments: segments.as_chunks().0,
        use_indptr,
        uses: uses.as_chunks().0,
        blocks: blocks.as_chunks().0,
        scale,
        causal,
    }
}

/// Computes the attention of sequences over their prefix rows and own keys.
#[pyfunction]
#[pyo3(signature = (heads, rows, tensors, is_bf16, tables, out, options, threads, path))]
#[expect(
    clippy::too_many_arguments,
    reason = "a Python object for the arguments would have no other use"
)]
pub(crate) fn attend_packed(
    py: Python<'_>,
    heads: [usize; 3],
    rows: [usize; 3],
    tensors: PackedTensors,
    is_bf16: bool,
    tables: [Memory; 4],
    out: [Memory; 2],
    options: (f32, bool),
    threads: usize,
    path: Option<&str>,
) -> PyResult<()> {
    let instructions = guarded(py, || path.map_or_else(InstructionSet::selected, InstructionSet::named))?;
    // SAFETY: `prefixfast/attention/cpu_packed.py` takes these numbers from CPU tensors of the dtypes that `packed`
    // demands, and holds them until this call returns. The outputs are newly allocated, so nothing else refers to them.
    let (inputs, o, lse) = unsafe {
        let inputs = packed(heads, rows, tensors, is_bf16, tables, options);
        let o = if is_bf16 {
            FloatsMut::Bf16(slice_mut(out[0]))
        } else {
            FloatsMut::F32(slice_mut(out[0]))
        };
        (inputs, o, slice_mut(out[1]))
    };
    detached(py, || core::attend_packed(&inputs, o, lse, threads, instructions))
}

/// Computes the gradients of `attend_packed`.
#[pyfunction]
#[pyo3(signature = (heads, rows, tensors, is_bf16, tables, result, own, prefix, options, threads, path))]
#[expect(
    clippy::too_many_arguments,
    reason = "a Python object for the arguments would have no other use"
)]
pub(crate) fn attend_packed_backward(
    py: Python<'_>,
    heads: [usize; 3],
    rows: [usize; 3],
    tensors: PackedTensors,
    is_bf16: bool,
    tables: [Memory; 4],
    result: ([(usize, usize, [usize; 3]); 2], Memory),
    own: Option<[Memory; 3]>,
    prefix: [Memory; 2],
    options: (f32, bool),
    threads: usize,
    path: Option<&str>,
) -> PyResult<()> {
    let instructions = guarded(py, || path.map_or_else(InstructionSet::selected, InstructionSet::named))?;
    // SAFETY: as in `attend_packed`. The gradients of prefix rows are zeros, so they are initialized.
    let (inputs, out) = unsafe {
        let forward = packed(heads, rows, tensors, is_bf16, tables, options);
        let ([grad, o], lse) = (result.0.map(|tensor| strided(tensor, is_bf16)), slice(result.1));
        let own = own.map(|own| {
            own.map(|memory| {
                if is_bf16 {
                    FloatsMut::Bf16(slice_mut(memory))
                } else {
                    FloatsMut::F32(slice_mut(memory))
                }
            })
        });
        let prefix = prefix.map(|memory| in_place(memory));
        (PackedGradInputs { forward, grad, o, lse }, PackedGrads { own, prefix })
    };
    detached(py, || core::attend_packed_backward(&inputs, out, threads, instructions))
}
