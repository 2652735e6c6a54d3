//! `ToTTo` in the format of its authors' baselines: titles, then the highlighted cells with their headers.
//!
//! Example: `<page_title> A </page_title> <table> <cell> 1 <col_header> B </col_header> </cell> </table>`.

use super::Table;
use crate::error::{Error, Result};

const CELL: &str = "cell";
const TITLES: [&str; 2] = ["page_title", "section_title"];
const HEADERS: [&str; 2] = ["col_header", "row_header"];

/// Text of pairs with the keys `page_title`, `section_title`, `cell`, `col_header` and `row_header`. Headers follow
/// their cell.
pub(super) fn linearize(row: usize, table: &Table) -> Result<String> {
    let Table::Pairs(pairs) = table else {
        return Err(Error::Data(format!(
            "row {row}: expected pairs of {} and {}, got text or triples; read the file of ToTTo as task totto",
            TITLES.join(", "),
            CELL
        )));
    };
    let mut out = String::new();
    let mut cells = 0;
    for (key, value) in pairs {
        if TITLES.contains(&key.as_str()) && cells == 0 {
            push(&mut out, key, value);
        } else if key == CELL {
            out.push_str(if cells == 0 { "<table> " } else { "</cell> " });
            out.extend(["<cell> ", value, " "]);
            cells += 1;
        } else if HEADERS.contains(&key.as_str()) && cells > 0 {
            push(&mut out, key, value);
        } else {
            return Err(Error::Data(format!(
                "row {row}: key {key:?} after {cells} cells: expected {}, then cells, each followed by its {}; \
                 correct the row",
                TITLES.join(", "),
                HEADERS.join(", ")
            )));
        }
    }
    if cells == 0 {
        return Err(Error::Data(format!(
            "row {row}: the table is empty: expected at least one cell; drop the row"
        )));
    }
    out.push_str("</cell> </table>");
    Ok(out)
}

fn push(out: &mut String, name: &str, value: &str) {
    out.extend(["<", name, "> ", value, " </", name, "> "]);
}

#[cfg(test)]
#[expect(clippy::expect_used, reason = "a test may fail")]
mod tests {
    use super::linearize;
    use crate::linearize::Table;

    fn pairs(pairs: &[(&str, &str)]) -> Table {
        Table::Pairs(pairs.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect())
    }

    #[test]
    fn headers_stand_inside_their_cell() {
        let table = pairs(&[
            ("page_title", "P"),
            ("section_title", "S"),
            ("cell", "1"),
            ("col_header", "A"),
            ("row_header", "B"),
            ("cell", ""),
        ]);
        assert_eq!(
            linearize(0, &table).expect("a text"),
            "<page_title> P </page_title> <section_title> S </section_title> <table> <cell> 1 <col_header> A \
             </col_header> <row_header> B </row_header> </cell> <cell>  </cell> </table>"
        );
    }

    #[test]
    fn other_orders_are_refused() {
        for wrong in [
            &[("page_title", "P")][..],
            &[("col_header", "A"), ("cell", "1")],
            &[("cell", "1"), ("page_title", "P")],
            &[("cell", "1"), ("name", "P")],
            &[],
        ] {
            assert!(linearize(0, &pairs(wrong)).is_err(), "{wrong:?}");
        }
        assert!(linearize(0, &Table::Text("a".to_owned())).is_err());
    }
}
