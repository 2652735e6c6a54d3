//! Tables to text, to the bit.

mod e2e;
mod template;
mod triples;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
pub use template::Template;
pub use triples::{Dart, Triple, Webnlg};

/// One table as the caller has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Table {
    /// A meaning representation in its official text form.
    Text(String),
    /// Keys and values in order.
    Pairs(Vec<(String, String)>),
    /// Statements in order, at least one.
    Triples(Vec<Triple>),
}

/// A way to write tables as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Linearizer {
    /// The prefix-tuning authors' form of E2E.
    E2e,
    /// The prefix-tuning authors' form of `WebNLG`.
    Webnlg(Webnlg),
    /// The prefix-tuning authors' form of DART.
    Dart(Dart),
    /// The caller's own.
    Template(Template),
}

impl Linearizer {
    /// Reads what [`Linearizer::spec`] wrote; fields other than `style` may be left out and then have their defaults.
    ///
    /// # Errors
    /// [`Error::Config`] for anything but a JSON object with a known style and known fields.
    pub fn from_spec(spec: &str) -> Result<Self> {
        let mut fields: Map<String, Value> = serde_json::from_str(spec).map_err(|error| {
            Error::Config(format!(
                "this linearizer spec is no JSON object ({error}): expected one like {{\"style\": \"e2e\"}}"
            ))
        })?;
        let style = take(&mut fields, "style", "")?;
        let linearizer = match style.as_str() {
            "e2e" => Self::E2e,
            "webnlg" => Self::Webnlg(Webnlg {
                leading_bar: take_bool(&mut fields, "leading_bar", true)?,
                bare_first: take_bool(&mut fields, "bare_first", false)?,
            }),
            "dart" => Self::Dart(Dart {
                lower: take_bool(&mut fields, "lower", true)?,
            }),
            "template" => Self::Template(Template::new(
                &take(&mut fields, "item", template::ITEM)?,
                &take(&mut fields, "separator", template::SEPARATOR)?,
                &take(&mut fields, "start", "")?,
                &take(&mut fields, "end", "")?,
            )?),
            _ => {
                return Err(Error::Config(format!(
                    "linearizer style {style:?}: expected \"e2e\", \"webnlg\", \"dart\" or \"template\"; correct the spec"
                )));
            }
        };
        match fields.keys().next() {
            Some(key) => Err(Error::Config(format!(
                "key {key:?} in the spec of linearizer {style:?} is not known; remove it"
            ))),
            None => Ok(linearizer),
        }
    }

    /// JSON text that [`Linearizer::from_spec`] reads back, keys sorted.
    #[must_use]
    pub fn spec(&self) -> String {
        match self {
            Self::E2e => serde_json::json!({"style": "e2e"}),
            Self::Webnlg(Webnlg {
                leading_bar,
                bare_first,
            }) => {
                serde_json::json!({"bare_first": bare_first, "leading_bar": leading_bar, "style": "webnlg"})
            }
            Self::Dart(Dart { lower }) => serde_json::json!({"lower": lower, "style": "dart"}),
            Self::Template(template) => serde_json::json!({
                "end": template.end, "item": template.item, "separator": template.separator, "start": template.start, "style": "template",
            }),
        }
        .to_string()
    }

    /// One text a table.
    ///
    /// # Errors
    /// [`Error::Data`] that names the row, counted from 0.
    pub fn linearize(&self, tables: &[Table]) -> Result<Vec<String>> {
        let one = |(row, table)| match self {
            Self::E2e => e2e::linearize(row, table),
            Self::Webnlg(webnlg) => webnlg.linearize(row, table),
            Self::Dart(dart) => dart.linearize(row, table),
            Self::Template(template) => template.linearize(row, table),
        };
        tables.iter().enumerate().map(one).collect()
    }
}

fn take(fields: &mut Map<String, Value>, key: &str, default: &str) -> Result<String> {
    match fields.remove(key) {
        None => Ok(default.to_owned()),
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(Error::Config(format!(
            "key {key:?} of the linearizer spec is {other}: expected text in quotes; correct the spec"
        ))),
    }
}

fn take_bool(fields: &mut Map<String, Value>, key: &str, default: bool) -> Result<bool> {
    match fields.remove(key) {
        None => Ok(default),
        Some(Value::Bool(value)) => Ok(value),
        Some(other) => Err(Error::Config(format!(
            "key {key:?} of the linearizer spec is {other}: expected true or false; correct the spec"
        ))),
    }
}
