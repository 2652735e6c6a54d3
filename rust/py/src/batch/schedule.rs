//! Binding of the scheduler, classes `Scheduler` and `StepHeader`.

use numpy::{PyArray1, PyArrayMethods};
use prefixfast_core::Error;
use prefixfast_core::batch::decode::DecodeSizes;
use prefixfast_core::batch::place::Place;
use prefixfast_core::batch::schedule::{
    PrefixPart, PrefixShape, Request, Scheduler as Core, SchedulerConfig, StepHeader as CoreHeader, StepTables,
};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arrays::{count, sections, slice_mut};
use crate::error::{detached, guarded, raise};

/// Plan of one step, made by `Scheduler.plan_step`.
#[pyclass(frozen, module = "prefixfast._rust")]
pub(crate) struct StepHeader(CoreHeader);

#[pymethods]
impl StepHeader {
    /// Prefixes to copy into the arena after the evictions, and their first arena rows.
    #[getter]
    fn loads(&self) -> Vec<(i64, usize)> {
        self.0.loads.clone()
    }

    /// Prefixes whose arena rows were freed.
    #[getter]
    fn evictions(&self) -> Vec<i64> {
        self.0.evictions.clone()
    }

    /// Requests of the prefill, in the order of the segments.
    #[getter]
    fn prefill_ids(&self) -> Vec<i64> {
        self.0.prefill_ids.clone()
    }

    /// Requests of the decode, in the order of the rows.
    #[getter]
    fn decode_ids(&self) -> Vec<i64> {
        self.0.decode_ids.clone()
    }

    /// Requests that were dropped because they were cancelled, in ascending order.
    #[getter]
    fn cancelled(&self) -> Vec<i64> {
        self.0.cancelled.clone()
    }

    /// Requests that were dropped because their deadline has passed, earliest first.
    #[getter]
    fn expired(&self) -> Vec<i64> {
        self.0.expired.clone()
    }

    /// Sections of the prefill's tables by view, and the view of each layer. None without a prefill.
    #[getter]
    fn prefill<'py>(&self, py: Python<'py>) -> PyResult<Option<Layout<'py>>> {
        layout(py, self.0.prefill.as_ref())
    }

    /// Sections of the decode's tables by view, and the view of each layer. None without a decode.
    #[getter]
    fn decode<'py>(&self, py: Python<'py>) -> PyResult<Option<Layout<'py>>> {
        layout(py, self.0.decode.as_ref())
    }

    /// Sections of the encoder's tables by view, and the view of each encoder layer. None without a prefill.
    #[getter]
    fn encoder<'py>(&self, py: Python<'py>) -> PyResult<Option<Layout<'py>>> {
        layout(py, self.0.encoder.as_ref())
    }

    /// Sections of the cross-attention's tables of the prefill by view, and the view of each layer. None without one.
    #[getter]
    fn cross<'py>(&self, py: Python<'py>) -> PyResult<Option<Layout<'py>>> {
        layout(py, self.0.cross.as_ref())
    }

    /// Sections of the cross-attention's tables of the decode by view, and the view of each layer. None without one.
    #[getter]
    fn decode_cross<'py>(&self, py: Python<'py>) -> PyResult<Option<Layout<'py>>> {
        layout(py, self.0.decode_cross.as_ref())
    }

    /// Largest number of keys that a query of the encoder or of cross-attention can see, 0 for a decoder-only base.
    #[getter]
    fn encoder_reach(&self) -> i32 {
        let CoreHeader {
            encoder,
            cross,
            decode_cross,
            ..
        } = &self.0;
        let reaches = [encoder, cross, decode_cross].map(|tables| reach(tables.as_ref()));
        reaches.into_iter().max().unwrap_or(0)
    }

    /// Largest number of keys that a prefill query can see, 0 without a prefill.
    #[getter]
    fn prefill_reach(&self) -> i32 {
        reach(self.0.prefill.as_ref())
    }

    /// Largest number of keys that a decode query can see, 0 without a decode.
    #[getter]
    fn decode_reach(&self) -> i32 {
        reach(self.0.decode.as_ref())
    }
}

/// First row relative to the prefix's own, number of rows, and whether each layer has them, of a prefix at one site.
type SiteRows = (i64, i64, Option<Vec<bool>>);

/// Sections of the tables of each view, and the view of each layer.
type Layout<'py> = (Vec<Bound<'py, PyDict>>, Vec<usize>);

fn layout<'py>(py: Python<'py>, tables: Option<&StepTables>) -> PyResult<Option<Layout<'py>>> {
    let Some(tables) = tables else {
        return Ok(None);
    };
    let views: PyResult<_> = tables.views.iter().map(|view| sections(py, view)).collect();
    Ok(Some((views?, tables.view_of.clone())))
}

fn reach(tables: Option<&StepTables>) -> i32 {
    tables.map_or(0, |tables| tables.reach)
}

/// Scheduler of one engine, which owns its queue, decode rows, arena rows and prefix cache.
#[pyclass(module = "prefixfast._rust")]
pub(crate) struct Scheduler(Core);

#[pymethods]
impl Scheduler {
    #[new]
    #[pyo3(signature = (
        arena_rows, max_rows, max_batched_tokens, *, tile_rows = 0, buckets = 4, prefix_rows = None, decode = None,
        pad_decode = false, encoder_folds = None
    ))]
    #[expect(clippy::too_many_arguments, reason = "the arguments of the Python method")]
    fn new(
        py: Python<'_>,
        arena_rows: i64,
        max_rows: i64,
        max_batched_tokens: i64,
        tile_rows: i64,
        buckets: i64,
        prefix_rows: Option<i64>,
        decode: Option<[i64; 6]>,
        pad_decode: bool,
        encoder_folds: Option<Vec<i64>>,
    ) -> PyResult<Self> {
        let [users, fill, key_bytes, part_bytes, item_bytes, launch_bytes] = decode.unwrap_or_default();
        let config = SchedulerConfig {
            arena_rows: count(py, "arena_rows", arena_rows)?,
            max_rows: count(py, "max_rows", max_rows)?,
            max_batched_tokens: count(py, "max_batched_tokens", max_batched_tokens)?,
            tile_rows: count(py, "tile_rows", tile_rows)?,
            buckets: count(py, "buckets", buckets)?,
            prefix_rows: count(py, "prefix_rows", prefix_rows.unwrap_or(arena_rows))?,
            decode: DecodeSizes {
                users: count(py, "decode: users", users)?,
                fill: count(py, "decode: fill", fill)?,
                key_bytes: count(py, "decode: key_bytes", key_bytes)?,
                part_bytes: count(py, "decode: part_bytes", part_bytes)?,
                item_bytes: count(py, "decode: item_bytes", item_bytes)?,
                launch_bytes: count(py, "decode: launch_bytes", launch_bytes)?,
                padded: pad_decode,
            },
        };
        let folds: Option<Vec<usize>> = match encoder_folds {
            Some(folds) => Some(
                folds
                    .into_iter()
                    .map(|fold| count(py, "encoder_folds", fold))
                    .collect::<PyResult<_>>()?,
            ),
            None => None,
        };
        guarded(py, || match folds {
            Some(folds) => Core::with_encoder(config, folds),
            None => Core::new(config),
        })
        .map(Self)
    }

    /// Registers a prefix. It is loaded when a request needs it.
    #[pyo3(signature = (prefix, rows, pos_start, slides, *, place = 0, layers = None, sites = None))]
    #[expect(clippy::too_many_arguments, reason = "the arguments of the Python method")]
    fn register_prefix(
        &mut self,
        py: Python<'_>,
        prefix: i64,
        rows: i64,
        pos_start: i64,
        slides: bool,
        place: i64,
        layers: Option<Vec<bool>>,
        sites: Option<[SiteRows; 3]>,
    ) -> PyResult<()> {
        let (rows, pos_start) = (count(py, "rows", rows)?, count(py, "pos_start", pos_start)?);
        let Some(sites) = sites else {
            let layers = layers.as_deref().unwrap_or_default();
            return guarded(py, || {
                self.0
                    .register_prefix(prefix, rows, pos_start, slides, Place::from_number(place)?, layers)
            });
        };
        let mut parts = [PrefixPart::default(); 3];
        for (part, (offset, rows, layers)) in parts.iter_mut().zip(&sites) {
            *part = PrefixPart {
                offset: count(py, "offset", *offset)?,
                rows: count(py, "rows", *rows)?,
                layers: layers.as_deref().unwrap_or_default(),
            };
        }
        guarded(py, || {
            let shape = PrefixShape {
                rows,
                pos_start,
                slides,
                place: Place::from_number(place)?,
            };
            if layers.is_some() {
                return Err(Error::Config(format!(
                    "layers and sites of prefix {prefix} are both given: expected one of them; give layers with sites"
                )));
            }
            self.0.register_parts(prefix, shape, parts)
        })
    }

    /// Forgets a prefix and frees its arena rows.
    fn forget_prefix(&mut self, py: Python<'_>, prefix: i64) -> PyResult<()> {
        guarded(py, || self.0.forget_prefix(prefix))
    }

    /// Pins or unpins a prefix. A pinned prefix is evicted only after all unpinned ones.
    fn keep_prefix(&mut self, py: Python<'_>, prefix: i64, kept: bool) -> PyResult<()> {
        guarded(py, || self.0.set_pinned(prefix, kept))
    }

    /// Allocates the arena rows of a prefix before a request needs them.
    fn load_prefix(&mut self, py: Python<'_>, prefix: i64) -> PyResult<Option<(usize, Vec<i64>)>> {
        let found = guarded(py, || self.0.load_prefix(prefix))?;
        Ok(found.map(|load| (load.row, load.evictions)))
    }

    /// Evicts a prefix that no running request uses.
    fn evict_prefix(&mut self, py: Python<'_>, prefix: i64) -> PyResult<Option<usize>> {
        guarded(py, || self.0.evict_prefix(prefix))
    }

    /// First arena row of a prefix, and number of queued and running requests that use it.
    fn prefix_state(&self, py: Python<'_>, prefix: i64) -> PyResult<(Option<usize>, usize)> {
        guarded(py, || self.0.prefix_state(prefix))
    }

    /// Adds a request to the queue.
    #[pyo3(signature = (
        id, prefixes, prompt_len, beams, max_new, *, encoder_len = 0, tenant = 0, priority = 0, deadline = None
    ))]
    #[expect(clippy::too_many_arguments, reason = "the arguments of the Python method")]
    fn add(
        &mut self,
        py: Python<'_>,
        id: i64,
        prefixes: Vec<i64>,
        prompt_len: i64,
        beams: i64,
        max_new: i64,
        encoder_len: i64,
        tenant: i64,
        priority: i64,
        deadline: Option<f64>,
    ) -> PyResult<()> {
        let number = |name: &str, value: i64| {
            usize::try_from(value).map_err(|_| {
                raise(
                    py,
                    &Error::Request(format!("{name} of request {id} is {value}: expected 1 or more")),
                )
            })
        };
        let request = Request {
            id,
            prefixes: prefixes.into(),
            encoder_len: number("encoder_len", encoder_len)?,
            prompt_len: number("prompt_len", prompt_len)?,
            beams: number("beams", beams)?,
            max_new: number("max_new", max_new)?,
            tenant,
            priority,
            deadline: deadline.map_or(i64::MAX, microseconds),
        };
        guarded(py, || self.0.add(request))
    }

    /// Cancels a request, which is dropped at the next step. Returns False if it is unknown or already cancelled.
    fn cancel(&mut self, id: i64) -> bool {
        self.0.cancel(id)
    }

    /// Marks the load of a prefix as complete.
    fn prefix_ready(&mut self, py: Python<'_>, prefix: i64) -> PyResult<()> {
        guarded(py, || self.0.prefix_ready(prefix))
    }

    /// Plans the next step and writes its tables into `out`.
    #[pyo3(signature = (out, now = 0.0))]
    fn plan_step(&mut self, py: Python<'_>, out: &Bound<'_, PyArray1<i32>>, now: f64) -> PyResult<StepHeader> {
        let borrow = || {
            out.try_readwrite().map_err(|_| {
                raise(
                    py,
                    &Error::Config(
                        "out is not writable: expected an array that is not borrowed elsewhere; pass a new one"
                            .to_owned(),
                    ),
                )
            })
        };
        // The array is not borrowed while the GIL is released, because another Python thread could access it.
        let room = slice_mut(py, "out", &mut borrow()?)?.len();
        let header = detached(py, || self.0.plan_tables(microseconds(now), room))?;
        let tables = self.0.step_tables();
        if let Some(out) = slice_mut(py, "out", &mut borrow()?)?.get_mut(..tables.len()) {
            out.copy_from_slice(tables);
        }
        Ok(StepHeader(header))
    }

    /// Ends the step. Its requests advance, and the finished ones free everything that they hold.
    fn commit(&mut self, py: Python<'_>, finished: Vec<i64>) -> PyResult<()> {
        guarded(py, || self.0.commit(&finished))
    }

    /// Number of int32 entries that suffice for the next step.
    #[getter]
    fn buffer_len(&self) -> usize {
        self.0.buffer_len()
    }

    /// Number of queued requests.
    #[getter]
    fn num_waiting(&self) -> usize {
        self.0.num_waiting()
    }

    /// Number of running requests.
    #[getter]
    fn num_running(&self) -> usize {
        self.0.num_running()
    }

    /// Number of free arena rows. Rows of cached prefixes count as occupied.
    #[getter]
    fn free_rows(&self) -> usize {
        self.0.free_rows()
    }
}

/// Seconds as integer microseconds. Values out of range saturate, and NaN becomes 0.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a float out of range becomes the nearest integer"
)]
fn microseconds(seconds: f64) -> i64 {
    (seconds * 1e6) as i64
}
