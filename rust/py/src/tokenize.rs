//! Binding of the tokenizer, class `Tokenizer`.

use numpy::{PyArray1, PyReadonlyArray1};
use prefixfast_core::tokenize::{Ragged, Tokenizer as Core};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;

use crate::arrays::{array, values};
use crate::detokenize::DetokenizeStream;
use crate::error::{detached, guarded};

/// Ids and indptr of concatenated lists.
type RaggedArrays = (Py<PyArray1<i32>>, Py<PyArray1<i32>>);

/// Tokenizer of a `tokenizer.json`, which runs on the threads of the core.
#[pyclass(frozen, module = "prefixfast._rust")]
pub(crate) struct Tokenizer(Core);

#[pymethods]
impl Tokenizer {
    #[new]
    fn new(py: Python<'_>, json: &str) -> PyResult<Self> {
        detached(py, || Core::new(json)).map(Self)
    }

    /// Number of tokens, including added ones.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.0.vocab_size()
    }

    /// Ids of each text, concatenated, and the borders between them.
    #[pyo3(signature = (texts, *, add_special_tokens))]
    fn encode_batch(
        &self,
        py: Python<'_>,
        texts: Vec<PyBackedStr>,
        add_special_tokens: bool,
    ) -> PyResult<RaggedArrays> {
        let Ragged { ids, indptr } = detached(py, || self.0.encode_batch(&texts, add_special_tokens))?;
        Ok((array(py, ids), array(py, indptr)))
    }

    /// Text of each list of ids.
    #[pyo3(signature = (ids, indptr, *, skip_special_tokens))]
    fn decode_batch(
        &self,
        py: Python<'_>,
        ids: PyReadonlyArray1<'_, i32>,
        indptr: PyReadonlyArray1<'_, i32>,
        skip_special_tokens: bool,
    ) -> PyResult<Vec<String>> {
        let (ids, indptr) = (values(py, "ids", &ids)?, values(py, "indptr", &indptr)?);
        detached(py, || self.0.decode_batch(&ids, &indptr, skip_special_tokens))
    }

    /// Id of a token, None if there is no such token.
    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.token_to_id(token)
    }

    /// Token of an id, None if there is no such id.
    fn id_to_token(&self, id: i64) -> Option<String> {
        u32::try_from(id).ok().and_then(|id| self.0.id_to_token(id))
    }

    /// New stream that decodes one growing sequence of ids.
    #[pyo3(signature = (*, skip_special_tokens))]
    fn stream(&self, py: Python<'_>, skip_special_tokens: bool) -> PyResult<DetokenizeStream> {
        guarded(py, || Ok(DetokenizeStream(self.0.stream(skip_special_tokens))))
    }
}
