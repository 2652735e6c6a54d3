//! `Linearizer`.

use prefixfast_core::Error;
use prefixfast_core::linearize::{Dart, Linearizer as Core, Table, Template, Webnlg};
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

    /// The prefix-tuning authors' form of `WebNLG`.
    #[staticmethod]
    #[pyo3(signature = (*, leading_bar = true, bare_first = false))]
    fn webnlg(leading_bar: bool, bare_first: bool) -> Self {
        Self(Core::Webnlg(Webnlg {
            leading_bar,
            bare_first,
        }))
    }

    /// The prefix-tuning authors' form of DART.
    #[staticmethod]
    #[pyo3(signature = (*, lower = true))]
    fn dart(lower: bool) -> Self {
        Self(Core::Dart(Dart { lower }))
    }

    /// One's own tables.
    #[staticmethod]
    #[pyo3(signature = (*, item = "{key} : {value}", separator = " | ", start = "", end = ""))]
    fn template(py: Python<'_>, item: &str, separator: &str, start: &str, end: &str) -> PyResult<Self> {
        guarded(py, || {
            Template::new(item, separator, start, end).map(|template| Self(Core::Template(template)))
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
        return entries(row, sequence);
    } else {
        return Err(wrong(
            item.py(),
            row,
            item,
            "text, a mapping, a list of pairs or a list of triples",
        ));
    }
    Ok(Table::Pairs(pairs))
}

/// A list of pairs, or of triples; the first entry decides which.
fn entries(row: usize, sequence: &Bound<'_, PySequence>) -> PyResult<Table> {
    let py = sequence.py();
    let (mut pairs, mut triples) = (Vec::new(), Vec::new());
    for entry in sequence.try_iter()? {
        let entry = entry?;
        match parts(&entry)?.as_slice() {
            [key, value] if triples.is_empty() => pairs.push(pair(row, key, value)?),
            [subject, property, object] if pairs.is_empty() => {
                let part = |value: &Bound<'_, PyAny>| match value.cast::<PyString>() {
                    Ok(text) => Ok(text.to_str()?.to_owned()),
                    Err(_) => Err(wrong(py, row, value, "text in every place of a triple")),
                };
                triples.push([part(subject)?, part(property)?, part(object)?]);
            }
            _ if !triples.is_empty() => {
                return Err(wrong(
                    py,
                    row,
                    &entry,
                    "a triple of subject, property and object, like those before it",
                ));
            }
            _ => {
                let expected =
                    "a pair of key and value, or a triple of subject, property and object (not both in one table)";
                return Err(wrong(py, row, &entry, expected));
            }
        }
    }
    Ok(if triples.is_empty() {
        Table::Pairs(pairs)
    } else {
        Table::Triples(triples)
    })
}

/// What an entry consists of: a list's items, or the three values of a mapping as in `WebNLG`; nothing for anything else.
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

fn pair(row: usize, key: &Bound<'_, PyAny>, value: &Bound<'_, PyAny>) -> PyResult<(String, String)> {
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
        &Error::Data(format!("row {row}: expected {expected}, got {kind}; convert it")),
    )
}
