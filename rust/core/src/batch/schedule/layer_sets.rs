//! Layers in which different prefixes lie: each kind of them, a view, reads tables of its own.

use std::borrow::Cow;

use rustc_hash::FxHashMap;

use super::super::block_tables::Block;
use crate::error::{Error, Result};

/// The number of the set that has every layer.
pub(super) const ALL: usize = 0;

/// A set of layers that prefixes lie in.
#[derive(Debug)]
struct Set {
    /// Whether it has each layer.
    layers: Vec<bool>,
    /// Prefixes that lie in it; without any its place is free.
    users: usize,
}

/// Layers grouped by which of some sets have them.
#[derive(Debug, Clone, Default)]
pub(super) struct Views {
    /// By layer: its view. Empty while the only set is the one of all layers.
    of_layer: Vec<usize>,
    /// By view: one of its layers.
    layers: Vec<usize>,
}

impl Views {
    /// At least 1, and no more than layers.
    pub(super) fn count(&self) -> usize {
        self.layers.len().max(1)
    }

    /// By layer: its view; empty where every layer has all prefixes.
    pub(super) fn of_layer(&self) -> &[usize] {
        &self.of_layer
    }
}

/// The sets of all registered prefixes.
#[derive(Debug, Default)]
pub(super) struct Sets {
    /// Set `i + 1`; each leaves a layer out.
    sets: Vec<Set>,
    /// Of all sets.
    views: Views,
}

impl Sets {
    /// The number of a set that one more prefix lies in; empty `layers` stand for all.
    pub(super) fn add(&mut self, layers: &[bool]) -> Result<usize> {
        if let Some(known) = self.sets.first().map(|set| set.layers.len())
            && !layers.is_empty()
            && layers.len() != known
        {
            return Err(Error::Config(format!(
                "layers has {} entries: expected {known}, one for each layer, as before",
                layers.len(),
            )));
        }
        if layers.iter().all(|has| *has) {
            return Ok(ALL);
        }
        let known = |set: &Set| set.users > 0 && set.layers == layers;
        let place = self.sets.iter().position(known);
        let place = place.unwrap_or_else(|| {
            let set = Set {
                layers: layers.to_vec(),
                users: 0,
            };
            let free = self.sets.iter().position(|set| set.users == 0);
            if let Some(free) = free {
                self.sets[free] = set;
            } else {
                self.sets.push(set);
            }
            free.unwrap_or(self.sets.len() - 1)
        });
        self.sets[place].users += 1;
        if self.sets[place].users == 1 {
            self.group();
        }
        Ok(place + 1)
    }

    /// A prefix of this set is forgotten.
    pub(super) fn release(&mut self, set: usize) {
        if set != ALL {
            self.sets[set - 1].users -= 1;
            if self.sets[set - 1].users == 0 {
                self.group();
            }
        }
    }

    fn group(&mut self) {
        let used = |set: &usize| self.sets[*set - 1].users > 0;
        let used: Vec<usize> = (1..=self.sets.len()).filter(used).collect();
        self.views = self.views_of(&used);
    }

    /// Of all sets.
    pub(super) fn views(&self) -> &Views {
        &self.views
    }

    /// Of these sets.
    pub(super) fn views_of(&self, sets: &[usize]) -> Views {
        let partial: Vec<&[bool]> = sets
            .iter()
            .filter(|set| **set != ALL)
            .map(|set| self.sets[*set - 1].layers.as_slice())
            .collect();
        let mut views = Views::default();
        let mut known = FxHashMap::default();
        for layer in 0..partial.first().map_or(0, |layers| layers.len()) {
            let column: Vec<bool> = partial.iter().map(|layers| layers[layer]).collect();
            let view = *known.entry(column).or_insert(views.layers.len());
            if view == views.layers.len() {
                views.layers.push(layer);
            }
            views.of_layer.push(view);
        }
        views
    }

    /// Those of `blocks` that lie in the layers of a view.
    pub(super) fn visible<'a>(&self, views: &Views, view: usize, blocks: &'a [Block]) -> Cow<'a, [Block]> {
        let visible = |block: &Block| block.set == ALL || self.sets[block.set - 1].layers[views.layers[view]];
        if blocks.iter().all(visible) {
            Cow::Borrowed(blocks)
        } else {
            blocks.iter().copied().filter(visible).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{ALL, Block, Sets};

    fn block(set: usize) -> Block {
        Block {
            prefix: 0,
            first: 0,
            rows: 1,
            slides: 1,
            set,
        }
    }

    fn seen(sets: &Sets, blocks: &[Block]) -> Vec<Vec<usize>> {
        let numbers = |view| {
            let visible = sets.visible(sets.views(), view, blocks);
            visible.iter().map(|block| block.set).collect()
        };
        (0..sets.views().count()).map(numbers).collect()
    }

    #[test]
    fn sets_have_one_number_and_layers_that_nobody_tells_apart_one_view() {
        let mut sets = Sets::default();
        assert_eq!(sets.add(&[true; 4]), Ok(ALL));
        assert_eq!((sets.views().count(), sets.views().of_layer()), (1, [].as_slice()));
        assert_eq!(sets.add(&[true, true, false, false]), Ok(1));
        assert_eq!(sets.views().of_layer(), [0, 0, 1, 1]);
        assert_eq!(sets.add(&[false, true, false, true]), Ok(2));
        assert_eq!(sets.views().of_layer(), [0, 1, 2, 3]);
        assert_eq!(sets.add(&[true, true, false, false]), Ok(1));
        assert_eq!(sets.add(&[]), Ok(ALL));
        assert!(sets.add(&[true, false]).is_err(), "of another model");
        let blocks = [block(ALL), block(1), block(2)];
        assert_eq!(seen(&sets, &blocks), [vec![0, 1], vec![0, 1, 2], vec![0], vec![0, 2]]);
        assert_eq!(sets.views_of(&[ALL, 2]).of_layer(), [0, 1, 0, 1]);
        assert_eq!(sets.views_of(&[ALL]).count(), 1);
    }

    #[test]
    fn a_set_that_nobody_lies_in_any_more_makes_no_view() {
        let mut sets = Sets::default();
        for layers in [[true, false, false], [true, false, false], [true, true, false]] {
            assert!(sets.add(&layers).is_ok());
        }
        sets.release(1);
        assert_eq!(sets.views().of_layer(), [0, 1, 2], "one prefix is left in it");
        sets.release(1);
        assert_eq!(sets.views().of_layer(), [0, 0, 1]);
        assert_eq!(sets.add(&[false, true, true]), Ok(1), "its place is free");
        assert_eq!(seen(&sets, &[block(1), block(2)]), [vec![2], vec![1, 2], vec![1]]);
        sets.release(1);
        sets.release(2);
        sets.release(ALL);
        assert_eq!((sets.views().count(), sets.views().of_layer().len()), (1, 0));
    }
}
