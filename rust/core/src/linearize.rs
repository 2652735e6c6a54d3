//! Linearization: data tables as text, in the exact formats of the prefix-tuning paper's authors or a custom template.

mod e2e;
mod template;
mod totto;
mod triples;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
pub use template::Template;
pub use triples::{Dart, Triple, Webnlg};

/// Data table of one example.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Table {
    /// E2E meaning representation in its official text form, `name[Blue Spice], food[French]`.
    Text(String),
    /// Pairs of key and value in order.
    Pairs(Vec<(String, String)>),
    /// Triples in order, at least one.
    Triples(Vec<Triple>),
}

/// Text format of tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Linearizer {
    /// Format of the prefix-tuning authors for E2E.
    E2e,
    /// Format of the prefix-tuning authors for `WebNLG`.
    Webnlg(Webnlg),
    /// Format of the prefix-tuning authors for DART.
    Dart(Dart),
    /// Format of the `ToTTo` authors for highlighted cells.
    Totto,
    /// Custom template.
    Template(Template),
}

impl Linearizer {
    /// Linearizer of a spec as written by [`Linearizer::spec`]. All fields except `style` are optional.
    ///
    /// # Errors
    /// [`Error::Config`] if the spec is not a JSON object with a known style and known fields.
    pub fn from_spec(spec: &str) -> Result<Self> {
        let mut fields: Map<String, Value> = serde_json::from_str(spec).map_err(|error| {
            Error::Config(format!(
                "this linearizer spec is no JSON object ({error}): expected one like {{\"style\": \"e2e\"}}"
            ))
        })?;
        let style = take_string(&mut fields, "style", "")?;
        let linearizer = match style.as_str() {
            "e2e" => Self::E2e,
            "webnlg" => Self::Webnlg(Webnlg {
                leading_bar: take_bool(&mut fields, "leading_bar", true)?,
                bare_first: take_bool(&mut fields, "bare_first", false)?,
            }),
            "dart" => Self::Dart(Dart {
                lower: take_bool(&mut fields, "lower", true)?,
            }),
            "totto" => Self::Totto,
            "template" => Self::Template(Template::new(
                &take_string(&mut fields, "item", template::ITEM)?,
                &take_string(&mut fields, "separator", template::SEPARATOR)?,
                &take_string(&mut fields, "start", "")?,
                &take_string(&mut fields, "end", "")?,
            )?),
            _ => {
                return Err(Error::Config(format!(
                    "linearizer style {style:?}: expected \"e2e\", \"webnlg\", \"dart\", \"totto\" or \"template\"; \
                     correct the spec"
                )));
            }
        };
        match fields.keys().next() {
            Some(key) => Err(Error::Config(format!(
                "key {key:?} in the spec of linearizer {style:?} is unknown: expected keys of this style; remove it"
            ))),
            None => Ok(linearizer),
        }
    }

    /// JSON text that [`Linearizer::from_spec`] reads, with sorted keys.
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
            Self::Totto => serde_json::json!({"style": "totto"}),
            Self::Template(template) => serde_json::json!({
                "end": template.end, "item": template.item, "separator": template.separator, "start": template.start,
                "style": "template",
            }),
        }
        .to_string()
    }

    /// Text of each table.
    ///
    /// # Errors
    /// [`Error::Data`] for a table that the format does not allow. The message names the row, counted from 0.
    pub fn linearize(&self, tables: &[Table]) -> Result<Vec<String>> {
        let one = |(row, table)| match self {
            Self::E2e => e2e::linearize(row, table),
            Self::Webnlg(webnlg) => webnlg.linearize(row, table),
            Self::Dart(dart) => dart.linearize(row, table),
            Self::Totto => totto::linearize(row, table),
            Self::Template(template) => template.linearize(row, table),
        };
        tables.iter().enumerate().map(one).collect()
    }
}

fn take_string(fields: &mut Map<String, Value>, key: &str, default: &str) -> Result<String> {
    match fields.remove(key) {
        None => Ok(default.to_owned()),
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(Error::Config(format!(
            "key {key:?} of the linearizer spec is {other}: expected a string; correct the spec"
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
