//! E2E in the format of the prefix-tuning authors.
//!
//! Example: `name : Blue Spice | Type : coffee shop | price : less than £ 20`.

use super::Table;
use crate::error::{Error, Result};

/// Official slot names in the official order, and the names that the authors write.
const SLOTS: [(&str, &str); 8] = [
    ("name", "name"),
    ("eatType", "Type"),
    ("food", "food"),
    ("priceRange", "price"),
    ("customer rating", "customer rating"),
    ("area", "area"),
    ("familyFriendly", "family friendly"),
    ("near", "near"),
];
const PRICE: usize = 3;

type Values<'a> = [Option<&'a str>; SLOTS.len()];

pub(super) fn linearize(row: usize, table: &Table) -> Result<String> {
    let mut values: Values<'_> = [None; SLOTS.len()];
    match table {
        Table::Text(text) => parse(row, text, &mut values)?,
        Table::Pairs(pairs) => pairs
            .iter()
            .try_for_each(|(key, value)| set_slot(row, key, value, &mut values))?,
        Table::Triples(_) => {
            return Err(Error::Data(format!(
                "row {row}: expected slots like name[Blue Spice] or their keys and values, got triples; use linearizer \
                 webnlg or dart"
            )));
        }
    }
    let mut out = String::new();
    for (slot, value) in values.iter().enumerate() {
        let Some(value) = value else { continue };
        if !out.is_empty() {
            out.push_str(" | ");
        }
        out.push_str(SLOTS[slot].1);
        out.push_str(" : ");
        if slot == PRICE {
            push_price(&mut out, value);
        } else {
            out.push_str(value);
        }
    }
    if out.is_empty() {
        return Err(Error::Data(format!(
            "row {row}: the table is empty: expected at least one slot, like name[Blue Spice]; drop the row"
        )));
    }
    Ok(out)
}

fn set_slot<'a>(row: usize, key: &str, value: &'a str, values: &mut Values<'a>) -> Result<()> {
    let Some(slot) = SLOTS.iter().position(|(name, _)| *name == key) else {
        let names = SLOTS.map(|(name, _)| name).join(", ");
        return Err(Error::Data(format!(
            "row {row}: slot {key:?} is not known: expected one of {names}; rename it or use a template linearizer"
        )));
    };
    if value.trim().is_empty() {
        return Err(Error::Data(format!(
            "row {row}: slot {key:?} is empty: expected a value; leave the slot out"
        )));
    }
    if values[slot].replace(value).is_some() {
        return Err(Error::Data(format!(
            "row {row}: slot {key:?} is given twice: expected it once; remove one"
        )));
    }
    Ok(())
}

/// Parses `slot[value], slot[value]`. A value may contain commas but no brackets.
fn parse<'a>(row: usize, text: &'a str, values: &mut Values<'a>) -> Result<()> {
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let at = |part: &str| text[..text.len() - part.len()].chars().count();
        let malformed = |place: usize, what: &str| {
            Error::Data(format!(
                "row {row}: {what} at character {place}: expected slots like name[Blue Spice], food[French]; \
                 correct the row"
            ))
        };
        let open = rest
            .find(['[', ']'])
            .ok_or_else(|| malformed(at(rest), "a slot without '['"))?;
        if rest.as_bytes()[open] == b']' {
            return Err(malformed(at(&rest[open..]), "']' without '['"));
        }
        let inside = &rest[open + 1..];
        let close = inside
            .find(['[', ']'])
            .ok_or_else(|| malformed(at(&rest[open..]), "'[' without ']'"))?;
        if inside.as_bytes()[close] == b'[' {
            return Err(malformed(at(&inside[close..]), "'[' inside a value"));
        }
        set_slot(row, rest[..open].trim(), &inside[..close], values)?;
        rest = inside[close + 1..].trim_start();
        if let Some(after) = rest.strip_prefix(',') {
            rest = after.trim_start();
            if rest.is_empty() {
                return Err(malformed(at(rest), "a comma without a slot after it"));
            }
        } else if !rest.is_empty() {
            return Err(malformed(at(rest), "no comma between two slots"));
        }
    }
    Ok(())
}

/// Appends a price with the spacing of the authors: a space after the pound sign and, after it, on each side of a
/// hyphen.
fn push_price(out: &mut String, value: &str) {
    let mut in_pounds = false;
    let mut chars = value.chars().peekable();
    while let Some(char) = chars.next() {
        let is_hyphen = in_pounds && char == '-';
        if is_hyphen && !out.ends_with(' ') {
            out.push(' ');
        }
        out.push(char);
        in_pounds |= char == '£';
        if (char == '£' || is_hyphen) && chars.peek().is_some_and(|next| *next != ' ') {
            out.push(' ');
        }
    }
}

#[cfg(test)]
#[expect(clippy::expect_used, reason = "a test may fail")]
mod tests {
    use super::linearize;
    use crate::linearize::Table;

    fn text(table: &str) -> Result<String, String> {
        linearize(7, &Table::Text(table.to_owned())).map_err(|error| error.to_string())
    }

    #[test]
    fn output_is_in_the_format_of_the_authors() {
        let source = "area[city centre], priceRange[£20-25], name[The Mill, Ely], eatType[pub], familyFriendly[no]";
        let expected =
            "name : The Mill, Ely | Type : pub | price : £ 20 - 25 | area : city centre | family friendly : no";
        assert_eq!(text(source).as_deref(), Ok(expected));
        assert_eq!(
            text("priceRange[less than £20]").as_deref(),
            Ok("price : less than £ 20")
        );
        assert_eq!(text("priceRange[£ 20 - 25]").as_deref(), Ok("price : £ 20 - 25"));
    }

    #[test]
    fn errors_name_the_row_and_the_character() {
        for (wrong, part) in [
            ("", "empty"),
            ("£[x]", "\"£\" is not known"),
            ("name[£], food", "at character 9"),
            ("name[£] food[x]", "at character 8"),
            ("name[£], ", "at character 9"),
            ("name[a[b]", "at character 6"),
            ("name]", "at character 4"),
            ("name[a", "at character 4"),
            ("name[ ]", "is empty"),
            ("name[a], name[b]", "twice"),
        ] {
            let error = text(wrong).expect_err(wrong);
            assert!(error.starts_with("row 7: ") && error.contains(part), "{wrong}: {error}");
        }
    }
}
