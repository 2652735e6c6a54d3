//! Tables to text, to the bit.

mod e2e;
mod template;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
pub use template::Template;

/// One table as the caller has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Table {
    /// A meaning representation in its official text form.
    Text(String),
    /// Keys and values in order.
    Pairs(Vec<(String, String)>),
}

/// A way to write tables as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Linearizer {
    /// The prefix-tuning authors' form of E2E.
    E2e,
    /// The caller's own.
    Template(Template),
}

impl Linearizer {
    /// Reads what [`Linearizer::spec`] wrote; fields other than `style` may be left out.
    ///
    /// # Errors
    /// [`Error::Config`] for anything but a JSON object with a known style and known text fields.
    pub fn from_spec(spec: &str) -> Result<Self> {
        let mut fields: Map<String, Value> = serde_json::from_str(spec)
            .map_err(|error| Error::Config(format!("this linearizer spec is no JSON object ({error}): expected one like {{\"style\": \"e2e\"}}")))?;
        let style = take(&mut fields, "style", "")?;
        let linearizer = match style.as_str() {
            "e2e" => Self::E2e,
            "template" => Self::Template(Template::new(
                &take(&mut fields, "item", template::ITEM)?,
                &take(&mut fields, "separator", template::SEPARATOR)?,
                &take(&mut fields, "start", "")?,
                &take(&mut fields, "end", "")?,
            )?),
            _ => {
                return Err(Error::Config(format!(
                    "linearizer style {style:?}: expected \"e2e\" or \"template\"; correct the spec"
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
