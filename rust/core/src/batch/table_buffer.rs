//! Several named tables in one int32 buffer.

use super::int32::to_i32;

/// Alignment of table offsets in int32 entries (64 bytes), so that a kernel gets equally aligned pointers in every
/// step.
pub const ALIGN: usize = 16;

/// Name, position and shape of a table in the buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Section {
    /// Table name.
    pub name: &'static str,
    /// Index of the first entry in the buffer.
    pub offset: usize,
    /// Number of rows.
    pub rows: usize,
    /// Entries per row, 0 for a 1-D table.
    pub cols: usize,
}

impl Section {
    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows * self.cols.max(1)
    }

    /// Whether the table has no entries.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Buffer to which tables are appended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TableBuffer {
    /// Entries of all tables, with zeros in the gaps between them.
    pub data: Vec<i32>,
    /// Sections of the tables in ascending order of their offsets.
    pub sections: Vec<Section>,
}

impl TableBuffer {
    /// Begins a table and returns its offset. Entries pushed to `data` until [`TableBuffer::end`] belong to it.
    pub(crate) fn begin(&mut self) -> usize {
        let offset = self.data.len().next_multiple_of(ALIGN);
        self.data.resize(offset, 0);
        offset
    }

    /// Ends the table that begins at `offset`.
    pub(crate) fn end(&mut self, name: &'static str, offset: usize, cols: usize) {
        let rows = (self.data.len() - offset) / cols.max(1);
        self.sections.push(Section {
            name,
            offset,
            rows,
            cols,
        });
    }

    /// Rows of a 2-D table that has been added, empty if there is none of this name.
    pub(crate) fn rows<const C: usize>(&self, name: &str) -> Vec<[i32; C]> {
        let found = self.sections.iter().find(|section| section.name == name);
        found.map_or_else(Vec::new, |section| {
            self.data[section.offset..][..section.len()].as_chunks::<C>().0.to_vec()
        })
    }

    /// Adds a 1-D table.
    pub(crate) fn push(&mut self, name: &'static str, values: impl IntoIterator<Item = i32>) {
        let offset = self.begin();
        self.data.extend(values);
        self.end(name, offset, 0);
    }

    /// Adds a 2-D table.
    pub(crate) fn push_rows<const C: usize>(&mut self, name: &'static str, rows: impl IntoIterator<Item = [i32; C]>) {
        let offset = self.begin();
        for row in rows {
            // Twice as fast as extending by a flattened iterator.
            self.data.extend_from_slice(&row);
        }
        self.end(name, offset, C);
    }

    /// Adds the running sums of `counts`, starting at 0.
    pub(crate) fn push_indptr(&mut self, name: &'static str, counts: impl IntoIterator<Item = usize>) {
        let mut sum = 0;
        let ends = counts.into_iter().map(|count| {
            sum += count;
            to_i32(sum)
        });
        let offset = self.begin();
        self.data.push(0);
        self.data.extend(ends);
        self.end(name, offset, 0);
    }

    /// Entries of the table of the given name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&[i32]> {
        let section = self.sections.iter().find(|section| section.name == name)?;
        self.data.get(section.offset..section.offset + section.len())
    }

    /// Removes all tables but keeps the allocated memory.
    pub(crate) fn clear(&mut self) {
        self.data.clear();
        self.sections.clear();
    }
}
