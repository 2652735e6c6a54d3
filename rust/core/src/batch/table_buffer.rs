//! Several tables in one int32 buffer.

use super::int32::int;

/// Offsets are multiples of this many int32 (64 bytes), so that a kernel sees equally aligned pointers in every step.
pub const ALIGN: usize = 16;

/// Where a table lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Section {
    /// Its name.
    pub name: &'static str,
    /// First entry in the buffer.
    pub offset: usize,
    /// Rows.
    pub rows: usize,
    /// Entries of a row; 0 for a 1-D table.
    pub cols: usize,
}

impl Section {
    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows * self.cols.max(1)
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A buffer under construction.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tables {
    /// All tables, zeros in the gaps.
    pub data: Vec<i32>,
    /// Where they lie, in order.
    pub sections: Vec<Section>,
}

impl Tables {
    /// Starts a table: what is pushed to `data` until [`Tables::close`] belongs to it.
    pub(crate) fn open(&mut self) -> usize {
        let offset = self.data.len().next_multiple_of(ALIGN);
        self.data.resize(offset, 0);
        offset
    }

    /// Ends the table that starts at `offset`.
    pub(crate) fn close(&mut self, name: &'static str, offset: usize, cols: usize) {
        let rows = (self.data.len() - offset) / cols.max(1);
        self.sections.push(Section {
            name,
            offset,
            rows,
            cols,
        });
    }

    /// The rows of a 2-D table that has been added.
    pub(crate) fn rows<const C: usize>(&self, name: &str) -> Vec<[i32; C]> {
        let found = self.sections.iter().find(|section| section.name == name);
        found.map_or_else(Vec::new, |section| {
            self.data[section.offset..][..section.len()].as_chunks::<C>().0.to_vec()
        })
    }

    /// Adds a 1-D table.
    pub(crate) fn push(&mut self, name: &'static str, values: impl IntoIterator<Item = i32>) {
        let offset = self.open();
        self.data.extend(values);
        self.close(name, offset, 0);
    }

    /// Adds a 2-D table.
    pub(crate) fn push_rows<const C: usize>(&mut self, name: &'static str, rows: impl IntoIterator<Item = [i32; C]>) {
        let offset = self.open();
        for row in rows {
            self.data.extend_from_slice(&row); // twice as fast as a flattened iterator
        }
        self.close(name, offset, C);
    }

    /// Adds running sums of `counts`, from 0.
    pub(crate) fn push_indptr(&mut self, name: &'static str, counts: impl IntoIterator<Item = usize>) {
        let mut sum = 0;
        let ends = counts.into_iter().map(|count| {
            sum += count;
            int(sum)
        });
        let offset = self.open();
        self.data.push(0);
        self.data.extend(ends);
        self.close(name, offset, 0);
    }

    /// The entries of a table, by name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&[i32]> {
        let section = self.sections.iter().find(|section| section.name == name)?;
        self.data.get(section.offset..section.offset + section.len())
    }

    /// Forgets everything, keeps the memory.
    pub(crate) fn clear(&mut self) {
        self.data.clear();
        self.sections.clear();
    }
}
