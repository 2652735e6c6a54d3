//! Binding of the linearizers, class `Linearizer`, and conversion of Python tables.

use prefixfast_core::Error;
use prefixfast_core::linearize::{Dart, Linearizer as Core, Table, Template, Webnlg};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMapping, PySequence, PyString};

use crate::error::{detached, guarded, raise};

/// Text format of data tables.
#[pyclass(frozen, module = "prefixfast._rust")]
pub(crate) struct Linearizer(Core);

#[pymethods]
impl Linearizer {
    /// Format of the prefix-tuning authors for E2E.
    #[staticmethod]
    fn e2e() -> Self {
        Self(Core::E2e)
    }

    /// Format of the prefix-tuning authors for `WebNLG`.
    #[staticmethod]
    #[pyo3(signature = (*, leading_bar = true, bare_first = false))]
    fn webnlg(leading_bar: bool, bare_first: bool) -> Self {
        Self(Core::Webnlg(Webnlg {
            leading_bar,
            bare_first,
        }))
    }

    /// Format of the prefix-tuning authors for DART.
    #[staticmethod]
    #[pyo3(signature = (*, lower = true))]
    fn dart(lower: bool) -> Self {
        Self(Core::Dart(Dart { lower }))
    }

    /// Format of the `ToTTo` authors for highlighted cells.
    #[staticmethod]
    fn totto() -> Self {
        Self(Core::Totto)
    }

    /// Custom template for mappings and pairs.
    #[staticmethod]
    #[pyo3(signature = (*, item = "{key} : {value}", separator = " | ", start = "", end = ""))]
    fn template(py: Python<'_>, item: &str, separator: &str, start: &str, end: &str) -> PyResult<Self> {
        guarded(py, || {
            Template::new(item, separator, start, end).map(|template| Self(Core::Template(template)))
        })
    }

    /// Linearizer of a spec.
    #[staticmethod]
    fn from_spec(py: Python<'_>, spec: &str) -> PyResult<Self> {
        guarded(py, || Core::from_spec(spec)).map(Self)
    }

    /// JSON text that `from_spec` reads, with sorted keys.
    #[getter]
    fn spec(&self) -> String {
        self.0.spec()
    }

    /// Text of each table.
    fn linearize(&self, py: Python<'_>, tables: Vec<Bound<'_, PyAny>>) -> PyResult<Vec<String>> {
        let tables = tables
            .iter()
            .enumerate()
            .map(|(row, item)| to_table(row, item))
            .collect::<PyResult<Vec<Table>>>()?;
        detached(py, || self.0.linearize(&tables))
    }
}

fn to_table(row: usize, item: &Bound<'_, PyAny>) -> PyResult<Table> {
    if let Ok(text) = item.cast::<PyString>() {
        return Ok(Table::Text(text.to_str()?.to_owned()));
    }
    let mut pairs = Vec::new();
    if let Ok(dict) = item.cast::<PyDict>() {
        for (key, value) in dict.iter() {
            pairs.push(to_pair(row, &key, &value)?);
        }
    } else if let Ok(mapping) = item.cast::<PyMapping>() {
        for entry in mapping.items()?.iter() {
            let (key, value) = entry.extract::<(Bound<'_, PyAny>, Bound<'_, PyAny>)>()?;
            pairs.push(to_pair(row, &key, &value)?);
        }
    } else if let Ok(sequence) = item.cast::<PySequence>() {
        return table_of_entries(row, sequence);
    } else {
        return Err(unexpected(
            item.py(),
            row,
            item,
            "text, a mapping, a list of pairs or a list of triples",
        ));
    }
    Ok(Table::Pairs(pairs))
}

/// Table from a list of pairs or of triples. The first entry decides which.
fn table_of_entries(row: usize, sequence: &Bound<'_, PySequence>) -> PyResult<Table> {
    let py = sequence.py();
    let (mut pairs, mut triples) = (Vec::new(), Vec::new());
    for entry in sequence.try_iter()? {
        let entry = entry?;
        match parts(&entry)?.as_slice() {
            [key, value] if triples.is_empty() => pairs.push(to_pair(row, key, value)?),
            [subject, property, object] if pairs.is_empty() => {
                let part = |value: &Bound<'_, PyAny>| match value.cast::<PyString>() {
                    Ok(text) => Ok(text.to_str()?.to_owned()),
                    Err(_) => Err(unexpected(py, row, value, "text in every place of a triple")),
                };
                triples.push([part(subject)?, part(property)?, part(object)?]);
            }
            _ if !triples.is_empty() => {
                return Err(unexpected(
                    py,
                    row,
                    &entry,
                    "a triple of subject, property and object, like those before it",
                ));
            }
            _ => {
                let expected =
                    "a pair of key and value, or a triple of subject, property and object (not both in one table)";
                return Err(unexpected(py, row, &entry, expected));
            }
        }
    }
    Ok(if triples.is_empty() {
        Table::Pairs(pairs)
    } else {
        Table::Triples(triples)
    })
}

/// Parts of an entry: the items of a list, or the values of a mapping with the keys of a `WebNLG` triple.
///
/// The result is empty for any other entry.
fn parts<'py>(entry: &Bound<'py, PyAny>) -> PyResult<Vec<Bound<'py, PyAny>>> {
    if entry.is_instance_of::<PyString>() {
        return Ok(Vec::new());
    }
    if let Ok(mapping) = entry.cast::<PyMapping>() {
        let names = ["subject", "property", "object"];
        if mapping.len()? != names.len() {
            return Ok(Vec::new());
        }
        let mut values = Vec::new();
        for name in names {
            if mapping.contains(name)? {
                values.push(mapping.get_item(name)?);
            }
        }
        return Ok(if values.len() == names.len() {
            values
        } else {
            Vec::new()
        });
    }
    match entry.cast::<PySequence>() {
        Ok(sequence) if matches!(sequence.len(), Ok(2 | 3)) => sequence.try_iter()?.collect(),
        _ => Ok(Vec::new()),
    }
}

fn to_pair(row: usize, key: &Bound<'_, PyAny>, value: &Bound<'_, PyAny>) -> PyResult<(String, String)> {
    let Ok(name) = key.cast::<PyString>() else {
        return Err(unexpected(key.py(), row, key, "text as a key"));
    };
    let name = name.to_str()?;
    match value.cast::<PyString>() {
        Ok(value) => Ok((name.to_owned(), value.to_str()?.to_owned())),
        Err(_) => Err(unexpected(
            key.py(),
            row,
            value,
            &format!("text as the value of key {name:?}"),
        )),
    }
}

fn unexpected(py: Python<'_>, row: usize, found: &Bound<'_, PyAny>, expected: &str) -> PyErr {
    let kind = found
        .get_type()
        .name()
        .map_or_else(|_| "an object".to_owned(), |name| name.to_string());
    raise(
        py,
        &Error::Data(format!("row {row}: expected {expected}, got {kind}; convert it")),
    )
}
