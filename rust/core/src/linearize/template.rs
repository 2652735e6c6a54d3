//! Tables in a custom template.

use super::Table;
use crate::error::{Error, Result};

/// Default item.
pub(super) const ITEM: &str = "{key} : {value}";
/// Default separator.
pub(super) const SEPARATOR: &str = " | ";

/// Part of a parsed item.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Key,
    Value,
}

/// Template that writes `start`, the items joined by `separator`, and `end`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    pub(super) item: String,
    pub(super) separator: String,
    pub(super) start: String,
    pub(super) end: String,
    parts: Vec<Part>,
}

impl Template {
    /// Template from its four texts.
    ///
    /// `item` contains `{key}` and `{value}`, and `{{` and `}}` for literal braces. The other texts are literal.
    ///
    /// # Errors
    /// [`Error::Config`] if `item` lacks `{key}` or `{value}`, contains another name, or has a lone brace.
    pub fn new(item: &str, separator: &str, start: &str, end: &str) -> Result<Self> {
        let parts = parse(item)?;
        for (part, name) in [(Part::Key, "{key}"), (Part::Value, "{value}")] {
            if !parts.contains(&part) {
                return Err(Error::Config(format!(
                    "template item {item:?} has no {name}: expected both {{key}} and {{value}}; add it"
                )));
            }
        }
        let [item, separator, start, end] = [item, separator, start, end].map(str::to_owned);
        Ok(Self {
            item,
            separator,
            start,
            end,
            parts,
        })
    }

    pub(super) fn linearize(&self, row: usize, table: &Table) -> Result<String> {
        let pairs = match table {
            Table::Pairs(pairs) if !pairs.is_empty() => pairs,
            Table::Pairs(_) => {
                return Err(Error::Data(format!(
                    "row {row}: the table is empty: expected at least one key and value; drop the row"
                )));
            }
            Table::Triples(_) => {
                return Err(Error::Data(format!(
                    "row {row}: the table is triples: expected a mapping or pairs; convert it or use linearizer \
                     webnlg or dart"
                )));
            }
            Table::Text(_) => {
                return Err(Error::Data(format!(
                    "row {row}: the table is text: expected a mapping or pairs; parse it first or use linearizer e2e"
                )));
            }
        };
        let mut out = self.start.clone();
        for (index, (key, value)) in pairs.iter().enumerate() {
            if index > 0 {
                out.push_str(&self.separator);
            }
            for part in &self.parts {
                out.push_str(match part {
                    Part::Text(text) => text,
                    Part::Key => key,
                    Part::Value => value,
                });
            }
        }
        out.push_str(&self.end);
        Ok(out)
    }
}

fn parse(item: &str) -> Result<Vec<Part>> {
    let wrong = |what: &str| {
        Error::Config(format!(
            "template item {item:?} has {what}: expected {{key}} and {{value}}, and {{{{ or }}}} for a brace"
        ))
    };
    let mut parts = Vec::new();
    let mut text = String::new();
    let mut rest = item;
    while let Some(at) = rest.find(['{', '}']) {
        text.push_str(&rest[..at]);
        rest = &rest[at..];
        let (part, len) = if rest.starts_with("{{") {
            (Part::Text("{".to_owned()), 2)
        } else if rest.starts_with("}}") {
            (Part::Text("}".to_owned()), 2)
        } else if rest.starts_with("{key}") {
            (Part::Key, 5)
        } else if rest.starts_with("{value}") {
            (Part::Value, 7)
        } else {
            return Err(wrong("a lone brace or an unknown name"));
        };
        rest = &rest[len..];
        if let Part::Text(brace) = part {
            text.push_str(&brace);
        } else {
            parts.push(Part::Text(std::mem::take(&mut text)));
            parts.push(part);
        }
    }
    text.push_str(rest);
    parts.push(Part::Text(text));
    Ok(parts)
}

#[cfg(test)]
#[expect(clippy::expect_used, reason = "a test may fail")]
mod tests {
    use super::{Part, Template, parse};

    #[test]
    fn names_and_braces_are_parsed() {
        let parts = parse("{{{key}}}={value}").expect("a template");
        let text = |text: &str| Part::Text(text.to_owned());
        assert_eq!(parts, [text("{"), Part::Key, text("}="), Part::Value, text("")]);
    }

    #[test]
    fn invalid_items_are_refused() {
        for wrong in [
            "",
            "{key}",
            "{value}",
            "{key} {value} {",
            "{key} {value} }",
            "{key} {value} {name}",
            "{key}{value}{}",
        ] {
            assert!(Template::new(wrong, "", "", "").is_err(), "{wrong}");
        }
    }
}
