//! Checks of the tables of a step.

use std::collections::BTreeSet;

use prefixfast_core::batch::schedule::{Request, StepHeader, StepTables};
use prefixfast_core::batch::table_buffer::Section;

use super::{Model, RunningRequest, at, index, work};

pub(super) fn table<'a>(out: &'a [i32], view: &[Section], name: &str) -> &'a [i32] {
    let section = view.iter().find(|section| section.name == name).expect("a section");
    &out[section.offset..section.offset + section.len()]
}

/// A table that is equal in all views.
fn shared_table<'a>(out: &'a [i32], tables: &StepTables, name: &str) -> &'a [i32] {
    let first = table(out, &tables.views[0], name);
    let others = tables.views.iter().map(|view| table(out, view, name));
    assert!(
        others.into_iter().all(|other| other == first),
        "{name} differs between views"
    );
    first
}

impl Model {
    fn blocks_of(&self, request: &Request, layer: usize) -> Vec<(usize, usize)> {
        let real = request.prefixes.iter().filter(|prefix| {
            let layers = &self.layers[index(**prefix)];
            self.rows[index(**prefix)] > 0 && layers.get(layer).is_none_or(|has| *has)
        });
        real.map(|prefix| (self.resident[prefix], self.rows[index(*prefix)]))
            .collect()
    }

    /// The blocks that each layer reads are those of the prefixes that lie in it.
    fn check_views(&self, request: &Request, out: &[i32], tables: &StepTables, number: usize) {
        for layer in 0..tables.view_of.len().max(1) {
            let view = &tables.views[tables.view_of.get(layer).copied().unwrap_or(0)];
            assert_uses(out, view, number, &self.blocks_of(request, layer));
        }
        if tables.view_of.is_empty() {
            let whole = |prefix: &i64| {
                let number = index(*prefix);
                self.rows[number] == 0 || self.layers[number].iter().all(|has| *has)
            };
            assert!(tables.views.len() == 1 && request.prefixes.iter().all(whole));
        }
    }

    pub(super) fn check_prefill(&mut self, ids: &[i64], out: &[i32], tables: &StepTables) {
        let get = |name: &str| shared_table(out, tables, name);
        let (chunks, seg) = (get("chunk").as_chunks::<4>().0, get("seg").as_chunks::<4>().0);
        let (slots, fill) = (get("slots"), get("fill").as_chunks::<3>().0);
        let mut fill = fill.iter();
        let (mut tokens, mut ends) = (0, get("logits_idx").iter());
        let continued = chunks.iter().any(|[_, _, start, _]| *start > 0);
        for (number, id) in ids.iter().enumerate() {
            let [row, beams, start, len] = chunks[number];
            let mut running = self.running.remove(id).unwrap_or_else(|| RunningRequest {
                request: self.waiting.remove(id).expect("a waiting request"),
                rows: (row..row + beams).collect(),
                slots: Vec::new(),
                prefilled: 0,
                steps: 0,
            });
            let request = &running.request;
            assert!(request.prefixes.iter().all(|prefix| !self.loading.contains(prefix)));
            assert_eq!((at(beams), at(start)), (request.beams, running.prefilled));
            let first = at(seg[number][0]);
            let mine = &slots[first..first + at(len)];
            for beam in &running.rows {
                for (position, slot) in (start..).zip(mine) {
                    assert_eq!(fill.next(), Some(&[*beam, position, *slot]));
                }
            }
            running.slots.extend(mine.iter().map(|slot| at(*slot)));
            running.prefilled += at(len);
            assert_eq!(at(seg[number][3]), running.prefilled);
            assert_eq!(get("seg_pos")[number], start);
            if continued {
                let keys = &get("key_slots")[at(seg[number][2])..][..running.prefilled];
                assert_eq!(keys.iter().map(|slot| at(*slot)).collect::<Vec<_>>(), running.slots);
            }
            if running.prefilled == request.prompt_len {
                assert_eq!(ends.next().map(|end| at(*end)), Some(first + at(len) - 1));
            }
            self.check_views(request, out, tables, number);
            tokens += at(len);
            self.running.insert(*id, running);
        }
        let partial = self
            .running
            .values()
            .filter(|running| running.prefilled < running.request.prompt_len);
        assert!(partial.count() <= 1 && ends.next().is_none());
        assert!(fill.next().is_none() && tokens <= self.config.max_batched_tokens);
    }

    pub(super) fn check_decode(&mut self, ids: &[i64], out: &[i32], tables: &StepTables) {
        let get = |name: &str| shared_table(out, tables, name);
        let (row, slot, lens, position) = (get("row"), get("slot"), get("lens"), get("position_ids"));
        let mut at_row = 0;
        if self.config.decode.users > 0 {
            for view in &tables.views {
                work::check_work(out, view);
            }
        }
        for id in ids {
            let running = self.running.get_mut(id).expect("a running request");
            running.steps += 1;
            let pos_start = running
                .request
                .prefixes
                .iter()
                .map(|prefix| self.rows[index(*prefix)])
                .max()
                .unwrap_or(0);
            for beam in &running.rows {
                assert_eq!(row[at_row], *beam);
                assert_eq!(at(lens[at_row]), running.request.prompt_len + running.steps);
                assert_eq!(
                    at(position[at_row]),
                    running.request.prompt_len + running.steps - 1 + pos_start
                );
                assert!(!running.slots.contains(&at(slot[at_row])), "a slot is used twice");
                running.slots.push(at(slot[at_row]));
                at_row += 1;
            }
            let (request, beams) = (&self.running[id].request, self.running[id].rows.len());
            for row in at_row - beams..at_row {
                self.check_views(request, out, tables, row);
            }
        }
        let padding = at_row..row.len();
        assert!(
            padding.is_empty()
                || self.config.decode.padded && row.len().is_power_of_two()
                || row.len() == self.config.max_rows
        );
        assert!(padding.clone().all(|padding| at(row[padding]) == self.config.max_rows
            && lens[padding] == 1
            && at(slot[padding]) == self.config.arena_rows - 1));
        let keys: Vec<&[i64]> = ids.iter().map(|id| &*self.running[id].request.prefixes).collect();
        let distinct: BTreeSet<&[i64]> = keys.iter().copied().collect();
        assert_eq!(
            keys.chunk_by(|a, b| a == b).count(),
            distinct.len(),
            "rows with the same prefixes are not neighbours"
        );
    }

    /// A step computes at most `max_batched_tokens` prompt tokens and decode rows together.
    pub(super) fn check_token_budget(&self, header: &StepHeader, out: &[i32]) {
        let count = |tables: &Option<StepTables>, name: &str| {
            tables.as_ref().map_or(0, |tables| {
                let entries = table(out, &tables.views[0], name);
                entries
                    .iter()
                    .filter(|entry| **entry != i32::try_from(self.config.arena_rows - 1).expect("small"))
                    .count()
            })
        };
        let (prompt, decoded) = (count(&header.prefill, "slots"), count(&header.decode, "slot"));
        assert!(
            prompt + decoded <= self.config.max_batched_tokens,
            "{prompt} prompt tokens and {decoded} decode rows"
        );
        let running: usize = self.running.values().map(|running| running.request.beams).sum();
        assert!(running <= self.config.max_rows, "{running} rows");
    }

    pub(super) fn check_overlaps(&self) {
        let mut used = vec![false; self.config.arena_rows - 64];
        let blocks = self
            .resident
            .iter()
            .flat_map(|(prefix, row)| *row..*row + self.rows[index(*prefix)]);
        for row in blocks.chain(self.running.values().flat_map(|running| running.slots.iter().copied())) {
            assert!(
                !std::mem::replace(&mut used[row], true),
                "arena row {row} is used twice"
            );
        }
        let mut rows: Vec<i32> = self
            .running
            .values()
            .flat_map(|running| running.rows.iter().copied())
            .collect();
        let count = rows.len();
        rows.sort_unstable();
        rows.dedup();
        assert!(rows.len() == count && rows.iter().all(|row| at(*row) < self.config.max_rows));
    }
}

/// Asserts that segment or row `number` uses the blocks `expected` (first row, rows) from left to right, the last of
/// which ends right before key 0.
fn assert_uses(out: &[i32], view: &[Section], number: usize, expected: &[(usize, usize)]) {
    let indptr = table(out, view, "use_indptr");
    let (uses, blocks) = (
        table(out, view, "use").as_chunks::<3>().0,
        table(out, view, "block").as_chunks::<2>().0,
    );
    let mine = &uses[at(indptr[number])..at(indptr[number + 1])];
    assert_eq!(mine.len(), expected.len());
    let mut position = -expected
        .iter()
        .map(|(_, rows)| i32::try_from(*rows).expect("small"))
        .sum::<i32>();
    for ([block, found, _], (first, rows)) in mine.iter().zip(expected) {
        assert_eq!(
            (at(blocks[at(*block)][0]), at(blocks[at(*block)][1]), *found),
            (*first, *rows, position)
        );
        position += blocks[at(*block)][1];
    }
}
