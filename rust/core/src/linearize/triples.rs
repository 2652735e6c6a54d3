//! `WebNLG` and DART in the format of the prefix-tuning authors: `subject : property : object`, joined by bars.

use super::Table;
use crate::error::{Error, Result};

/// Subject, property, object.
pub type Triple = [String; 3];

const BAR: &str = " | ";

/// Format of `WebNLG`, with a bar before every triple.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Webnlg {
    /// Whether the first triple has a bar too, as in the authors' training data.
    pub leading_bar: bool,
    /// Whether table 0 of a call has no bars at all. The authors' decoding script writes it so, because it tests the
    /// index of the entry instead of the index of the triple.
    pub bare_first: bool,
}

impl Default for Webnlg {
    fn default() -> Self {
        Self {
            leading_bar: true,
            bare_first: false,
        }
    }
}

impl Webnlg {
    pub(super) fn linearize(self, row: usize, table: &Table) -> Result<String> {
        let mut out = String::new();
        for (index, triple) in triples(row, table)?.iter().enumerate() {
            let bar = if index == 0 { self.leading_bar } else { true };
            if bar && !(self.bare_first && row == 0) {
                out.push_str(BAR);
            }
            push(&mut out, triple, &triple[1]);
        }
        Ok(out)
    }
}

/// Format of DART, with a bar between triples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dart {
    /// Whether the relation is converted to lower case.
    pub lower: bool,
}

impl Default for Dart {
    fn default() -> Self {
        Self { lower: true }
    }
}

impl Dart {
    pub(super) fn linearize(self, row: usize, table: &Table) -> Result<String> {
        let mut out = String::new();
        for (index, triple) in triples(row, table)?.iter().enumerate() {
            if index > 0 {
                out.push_str(BAR);
            }
            if self.lower {
                push(&mut out, triple, &triple[1].to_lowercase());
            } else {
                push(&mut out, triple, &triple[1]);
            }
        }
        Ok(out)
    }
}

fn push(out: &mut String, [subject, _, object]: &Triple, property: &str) {
    for part in [subject, " : ", property, " : ", object] {
        out.push_str(part);
    }
}

fn triples(row: usize, table: &Table) -> Result<&[Triple]> {
    let other = |got: &str| {
        Error::Data(format!(
            "row {row}: expected a list of triples (subject, property, object), got {got}; split it first or \
             use another linearizer"
        ))
    };
    match table {
        Table::Triples(triples) if !triples.is_empty() => Ok(triples),
        Table::Pairs(pairs) if !pairs.is_empty() => Err(other("keys and values")),
        Table::Text(_) => Err(other("text")),
        Table::Triples(_) | Table::Pairs(_) => Err(Error::Data(format!(
            "row {row}: there are no triples: expected at least one; drop the row"
        ))),
    }
}

#[cfg(test)]
#[expect(clippy::expect_used, reason = "a test may fail")]
mod tests {
    use super::{Dart, Triple, Webnlg};
    use crate::linearize::{Linearizer, Table};
    use proptest::prelude::*;

    fn table(triples: &[[&str; 3]]) -> Table {
        Table::Triples(triples.iter().map(|t| t.map(str::to_owned)).collect())
    }

    #[test]
    fn output_is_in_the_format_of_the_authors() {
        let rows = [
            table(&[["A_B", "runwayLength", "\"1\""], ["A_B", "City", "X"]]),
            table(&[["C", "Is", "D"]]),
        ];
        let text = |linearizer: Linearizer| linearizer.linearize(&rows).expect("text");
        assert_eq!(
            text(Linearizer::Webnlg(Webnlg::default())),
            [" | A_B : runwayLength : \"1\" | A_B : City : X", " | C : Is : D"]
        );
        let bare = Webnlg {
            bare_first: true,
            ..Webnlg::default()
        };
        assert_eq!(
            text(Linearizer::Webnlg(bare)),
            ["A_B : runwayLength : \"1\"A_B : City : X", " | C : Is : D"]
        );
        let no_leading_bar = Webnlg {
            leading_bar: false,
            bare_first: false,
        };
        assert_eq!(text(Linearizer::Webnlg(no_leading_bar))[1], "C : Is : D");
        assert_eq!(
            text(Linearizer::Dart(Dart::default())),
            ["A_B : runwaylength : \"1\" | A_B : city : X", "C : is : D"]
        );
        assert_eq!(text(Linearizer::Dart(Dart { lower: false }))[1], "C : Is : D");
    }

    #[test]
    fn tables_without_triples_are_refused() {
        for wrong in [
            Table::Text("a : b : c".to_owned()),
            Table::Pairs(vec![]),
            Table::Triples(vec![]),
            Table::Pairs(vec![("a".to_owned(), "b".to_owned())]),
        ] {
            for linearizer in [Linearizer::Webnlg(Webnlg::default()), Linearizer::Dart(Dart::default())] {
                let error = linearizer
                    .linearize(&[table(&[["a", "b", "c"]]), wrong.clone()])
                    .expect_err("no triples");
                assert!(error.to_string().starts_with("row 1: "), "{error}");
            }
        }
    }

    fn hostile() -> impl Strategy<Value = Triple> {
        let text = "[ |:{}\n\"_aZİΣ😀é\u{0}]{0,12}";
        (text, text, text).prop_map(|(s, p, o)| [s, p, o])
    }

    proptest! {
        #[test]
        fn output_equals_a_plain_join(
            rows in prop::collection::vec(prop::collection::vec(hostile(), 1..5), 0..4),
            leading_bar: bool, bare_first: bool, lower: bool,
        ) {
            let tables: Vec<Table> = rows.iter().cloned().map(Table::Triples).collect();
            let webnlg = Linearizer::Webnlg(Webnlg { leading_bar, bare_first }).linearize(&tables).expect("text");
            let dart = Linearizer::Dart(Dart { lower }).linearize(&tables).expect("text");
            for (row, triples) in rows.iter().enumerate() {
                let written: Vec<String> = triples.iter().map(|[s, p, o]| format!("{s} : {p} : {o}")).collect();
                let joined = if bare_first && row == 0 { written.concat() } else { written.join(" | ") };
                let start = if leading_bar && !(bare_first && row == 0) { " | " } else { "" };
                prop_assert_eq!(&webnlg[row], &format!("{start}{joined}"));
                let lowered: Vec<String> = triples
                    .iter()
                    .map(|[s, p, o]| format!("{s} : {} : {o}", if lower { p.to_lowercase() } else { p.clone() }))
                    .collect();
                prop_assert_eq!(&dart[row], &lowered.join(" | "));
            }
        }

        #[test]
        fn a_spec_can_be_read_back(leading_bar: bool, bare_first: bool, lower: bool) {
            let webnlg = Linearizer::Webnlg(Webnlg { leading_bar, bare_first });
            for linearizer in [webnlg, Linearizer::Dart(Dart { lower })] {
                prop_assert_eq!(Linearizer::from_spec(&linearizer.spec()), Ok(linearizer));
            }
        }
    }
}
