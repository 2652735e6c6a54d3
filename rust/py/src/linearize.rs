//! `Linearizer`.

use prefixfast_core::Error;
use prefixfast_core::linearize::{Linearizer as Core, Table, Template};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMapping, PySequence, PyString};

use crate::error::{detached, guarded, raise};

/// Tables to text.
#[pyclass(frozen, module = "prefixfast._rust")]
pub(crate) struct Linearizer(Core);

#[pymethods]
impl Linearizer {
    /// The prefix-tuning authors' form of E2E.
    #[staticmethod]
    fn e2e() -> Self {
        Self(Core::E2e)
    }

    /// One's own tables.
    #[staticmethod]
    #[pyo3(signature = (*, item = "{key} : {value}", separator = " | ", start = "", end = ""))]
    fn template(
        py: Python<'_>,
        item: &str,
        separator: &str,
        start: &str,
        end: &str,
    ) -> PyResult<Self> {
        guarded(py, || {
            Template::new(item, separator, start, end)
                .map(|template| Self(Core::Template(template)))
        })
    }

    /// The linearizer that a `spec` describes.
    #[staticmethod]
    fn from_spec(py: Python<'_>, spec: &str) -> PyResult<Self> {
        guarded(py, || Core::from_spec(spec)).map(Self)
    }

    #[getter]
    fn spec(&self) -> String {
        self.0.spec()
    }

    /// One text a table.
    fn linearize(&self, py: Python<'_>, tables: Vec<Bound<'_, PyAny>>) -> PyResult<Vec<String>> {
        let tables = tables
            .iter()
            .enumerate()
            .map(|(row, item)| table(row, item))
            .collect::<PyResult<Vec<Table>>>()?;
        detached(py, || self.0.linearize(&tables))
    }
}

fn table(row: usize, item: &Bound<'_, PyAny>) -> PyResult<Table> {
    if let Ok(text) = item.cast::<PyString>() {
        return Ok(Table::Text(text.to_str()?.to_owned()));
    }
    let mut pairs = Vec::new();
    if let Ok(dict) = item.cast::<PyDict>() {
        for (key, value) in dict.iter() {
            pairs.push(pair(row, &key, &value)?);
        }
    } else if let Ok(mapping) = item.cast::<PyMapping>() {
        for entry in mapping.items()?.iter() {
            let (key, value) = entry.extract::<(Bound<'_, PyAny>, Bound<'_, PyAny>)>()?;
            pairs.push(pair(row, &key, &value)?);
        }
    } else if let Ok(sequence) = item.cast::<PySequence>() {
        for entry in sequence.try_iter()? {
            let entry = entry?;
            let both = entry.cast::<PySequence>().ok().filter(|both| {
                !both.is_instance_of::<PyString>() && both.len().is_ok_and(|len| len == 2)
            });
            let both =
                both.ok_or_else(|| wrong(item.py(), row, &entry, "a pair of key and value"))?;
            pairs.push(pair(row, &both.get_item(0)?, &both.get_item(1)?)?);
        }
    } else {
        return Err(wrong(
            item.py(),
            row,
            item,
            "text, a mapping or a list of pairs",
        ));
    }
    Ok(Table::Pairs(pairs))
}

fn pair(
    row: usize,
    key: &Bound<'_, PyAny>,
    value: &Bound<'_, PyAny>,
) -> PyResult<(String, String)> {
    let Ok(name) = key.cast::<PyString>() else {
        return Err(wrong(key.py(), row, key, "text as a key"));
    };
    let name = name.to_str()?;
    match value.cast::<PyString>() {
        Ok(value) => Ok((name.to_owned(), value.to_str()?.to_owned())),
        Err(_) => Err(wrong(
            key.py(),
            row,
            value,
            &format!("text as the value of key {name:?}"),
        )),
    }
}

fn wrong(py: Python<'_>, row: usize, found: &Bound<'_, PyAny>, expected: &str) -> PyErr {
    let kind = found
        .get_type()
        .name()
        .map_or_else(|_| "an object".to_owned(), |name| name.to_string());
    raise(
        py,
        &Error::Data(format!(
            "row {row} has {kind}: expected {expected}; convert it"
        )),
    )
}
