//! Layer sets: in which layers each prefix lies, and which layers can share their tables.
//!
//! A prefix may leave layers out. Layers in which the same prefixes lie form a view and read the same tables. The
//! layers of a deep encoder lie in the tensors of fewer decoder layers. Encoder layers of one tensor have different
//! folds, each with prefix rows of its own, and layers of different folds are in different views.

use std::borrow::Cow;

use rustc_hash::FxHashMap;

use super::super::block_tables::PrefixBlock;
use super::super::int32::to_i32;
use crate::error::{Error, Result};

/// Number of the layer set that contains every layer.
pub(super) const ALL_LAYERS: usize = 0;

/// A set that leaves out at least one layer.
#[derive(Debug)]
struct LayerSet {
    /// Whether the set contains each layer.
    layers: Vec<bool>,
    /// Number of prefixes with this set. The number of a set without prefixes can be reused.
    num_prefixes: usize,
}

/// Partition of the layers into views.
#[derive(Debug, Clone, Default)]
pub(super) struct LayerViews {
    /// View of each layer, empty if the only layer set is [`ALL_LAYERS`].
    of_layer: Vec<usize>,
    /// First layer of each view.
    first_layer: Vec<usize>,
}

impl LayerViews {
    /// Number of views, at least 1.
    pub(super) fn count(&self) -> usize {
        self.first_layer.len().max(1)
    }

    /// View of each layer, empty if all prefixes lie in every layer.
    pub(super) fn of_layer(&self) -> &[usize] {
        &self.of_layer
    }
}

/// Layer sets of all registered prefixes.
#[derive(Debug, Default)]
pub(super) struct LayerSets {
    /// Layer set `i + 1` at index `i`.
    partial: Vec<LayerSet>,
    /// Fold of each layer, empty for a decoder.
    folds: Vec<usize>,
    /// Views of the sets in use: layers that are in the same sets share a view.
    views: LayerViews,
    /// Number of prefixes that lie in all layers.
    num_full: usize,
}

impl LayerSets {
    /// Layer sets of an encoder whose layers have the given folds.
    pub(super) fn with_folds(folds: Vec<usize>) -> Self {
        let mut sets = Self {
            folds,
            ..Self::default()
        };
        sets.update_views();
        sets
    }

    /// Number of folds, `None` for a decoder.
    pub(super) fn num_folds(&self) -> Option<usize> {
        self.folds.iter().max().map(|fold| fold + 1)
    }

    /// Refuses `layers` of another length than the number of layers, as far as it is known.
    pub(super) fn check(&self, layers: &[bool]) -> Result<()> {
        let first = self.partial.first().map(|set| set.layers.len());
        let known = self.num_folds().map(|_| self.folds.len()).or(first);
        if let Some(known) = known
            && !layers.is_empty()
            && layers.len() != known
        {
            return Err(Error::Config(format!(
                "layers has {} entries: expected {known}, one for each layer, as before",
                layers.len(),
            )));
        }
        Ok(())
    }

    /// Counts one more prefix with the given layers and returns the number of its layer set.
    ///
    /// * `layers`: whether the prefix lies in each layer, empty for all layers.
    pub(super) fn add(&mut self, layers: &[bool]) -> Result<usize> {
        self.check(layers)?;
        if layers.iter().all(|has_layer| *has_layer) {
            self.num_full += 1;
            return Ok(ALL_LAYERS);
        }
        let is_same = |set: &LayerSet| set.num_prefixes > 0 && set.layers == layers;
        let index = self.partial.iter().position(is_same);
        let index = index.unwrap_or_else(|| {
            let set = LayerSet {
                layers: layers.to_vec(),
                num_prefixes: 0,
            };
            let free = self.partial.iter().position(|set| set.num_prefixes == 0);
            if let Some(free) = free {
                self.partial[free] = set;
            } else {
                self.partial.push(set);
            }
            free.unwrap_or(self.partial.len() - 1)
        });
        self.partial[index].num_prefixes += 1;
        if self.partial[index].num_prefixes == 1 {
            self.update_views();
        }
        Ok(index + 1)
    }

    /// Removes a prefix from the count of the layer set `set`.
    pub(super) fn release(&mut self, set: usize) {
        if set == ALL_LAYERS {
            self.num_full -= 1;
        } else {
            self.partial[set - 1].num_prefixes -= 1;
            if self.partial[set - 1].num_prefixes == 0 {
                self.update_views();
            }
        }
    }

    fn update_views(&mut self) {
        let in_use = |set: &usize| self.partial[*set - 1].num_prefixes > 0;
        let mut in_use: Vec<usize> = (1..=self.partial.len()).filter(in_use).collect();
        in_use.push(ALL_LAYERS);
        self.views = self.views_of(&in_use);
    }

    /// Views of the sets of all registered prefixes.
    pub(super) fn views(&self) -> &LayerViews {
        &self.views
    }

    /// Largest number of views in which one registered prefix lies, 1 without a prefix.
    pub(super) fn max_views_of_a_set(&self) -> usize {
        if self.num_full > 0 || self.views.first_layer.is_empty() {
            return self.views.count();
        }
        let in_use = self.partial.iter().filter(|set| set.num_prefixes > 0);
        let views = |set: &LayerSet| {
            self.views
                .first_layer
                .iter()
                .filter(|layer| set.layers[**layer])
                .count()
        };
        in_use.map(views).max().unwrap_or(1)
    }

    /// Views of the given sets, a single view without a set.
    pub(super) fn views_of(&self, sets: &[usize]) -> LayerViews {
        let partial: Vec<&[bool]> = sets
            .iter()
            .filter(|set| **set != ALL_LAYERS)
            .map(|set| self.partial[*set - 1].layers.as_slice())
            .collect();
        let is_folded = self.folds.iter().any(|fold| *fold > 0) && !sets.is_empty();
        let num_layers = if is_folded {
            self.folds.len()
        } else {
            partial.first().map_or(0, |layers| layers.len())
        };
        let mut views = LayerViews::default();
        let mut view_by_column = FxHashMap::default();
        for layer in 0..num_layers {
            let column: Vec<bool> = partial.iter().map(|layers| layers[layer]).collect();
            let fold = if is_folded { self.folds[layer] } else { 0 };
            let view = *view_by_column.entry((fold, column)).or_insert(views.first_layer.len());
            if view == views.first_layer.len() {
                views.first_layer.push(layer);
            }
            views.of_layer.push(view);
        }
        views
    }

    /// Those of `blocks` that lie in the layers of a view, with the rows of the view's fold.
    pub(super) fn visible<'a>(
        &self,
        views: &LayerViews,
        view: usize,
        blocks: &'a [PrefixBlock],
    ) -> Cow<'a, [PrefixBlock]> {
        let is_visible = |block: &PrefixBlock| {
            block.layer_set == ALL_LAYERS || self.partial[block.layer_set - 1].layers[views.first_layer[view]]
        };
        let fold = views.first_layer.get(view).and_then(|layer| self.folds.get(*layer));
        let fold = fold.copied().unwrap_or(0);
        if fold > 0 {
            let visible = blocks.iter().copied().filter(is_visible);
            visible
                .map(|block| PrefixBlock {
                    first: block.first + to_i32(fold) * block.rows,
                    ..block
                })
                .collect()
        } else if blocks.iter().all(is_visible) {
            Cow::Borrowed(blocks)
        } else {
            blocks.iter().copied().filter(is_visible).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::place::Place;
    use super::{ALL_LAYERS, LayerSets, PrefixBlock};

    fn block(layer_set: usize) -> PrefixBlock {
        PrefixBlock {
            prefix: 0,
            first: 0,
            rows: 1,
            slides: 1,
            place: Place::Front,
            layer_set,
        }
    }

    fn visible_sets(sets: &LayerSets, blocks: &[PrefixBlock]) -> Vec<Vec<usize>> {
        let numbers = |view| {
            let visible = sets.visible(sets.views(), view, blocks);
            visible.iter().map(|block| block.layer_set).collect()
        };
        (0..sets.views().count()).map(numbers).collect()
    }

    #[test]
    fn equal_sets_share_a_number_and_equal_layers_share_a_view() {
        let mut sets = LayerSets::default();
        assert_eq!(sets.add(&[true; 4]), Ok(ALL_LAYERS));
        assert_eq!((sets.views().count(), sets.views().of_layer()), (1, [].as_slice()));
        assert_eq!(sets.add(&[true, true, false, false]), Ok(1));
        assert_eq!(sets.views().of_layer(), [0, 0, 1, 1]);
        assert_eq!(sets.add(&[false, true, false, true]), Ok(2));
        assert_eq!(sets.views().of_layer(), [0, 1, 2, 3]);
        assert_eq!(sets.add(&[true, true, false, false]), Ok(1));
        assert_eq!(sets.add(&[]), Ok(ALL_LAYERS));
        assert!(sets.add(&[true, false]).is_err(), "another number of layers");
        let blocks = [block(ALL_LAYERS), block(1), block(2)];
        assert_eq!(
            visible_sets(&sets, &blocks),
            [vec![0, 1], vec![0, 1, 2], vec![0], vec![0, 2]]
        );
        assert_eq!(sets.views_of(&[ALL_LAYERS, 2]).of_layer(), [0, 1, 0, 1]);
        assert_eq!(sets.views_of(&[ALL_LAYERS]).count(), 1);
    }

    #[test]
    fn layers_of_different_folds_are_in_different_views() {
        let mut sets = LayerSets::with_folds(vec![0, 0, 1, 1, 2]);
        assert_eq!((sets.num_folds(), LayerSets::default().num_folds()), (Some(3), None));
        assert!(sets.check(&[true; 4]).is_err() && sets.check(&[true; 5]).is_ok());
        let first_rows = |sets: &LayerSets| -> Vec<Vec<(usize, i32)>> {
            let numbers = |view| {
                let blocks = [block(ALL_LAYERS), block(1)];
                let visible = sets.visible(sets.views(), view, &blocks);
                visible.iter().map(|block| (block.layer_set, block.first)).collect()
            };
            (0..sets.views().count()).map(numbers).collect()
        };
        assert_eq!(sets.views().of_layer(), [0, 0, 1, 1, 2]);
        assert_eq!(sets.add(&[true, false, true, true, false]), Ok(1));
        assert_eq!(sets.views().of_layer(), [0, 1, 2, 2, 3]);
        assert_eq!(
            first_rows(&sets),
            [vec![(0, 0), (1, 0)], vec![(0, 0)], vec![(0, 1), (1, 1)], vec![(0, 2)]]
        );
        assert_eq!(sets.views_of(&[]).count(), 1, "no prefix is in use");
        assert_eq!(sets.views_of(&[ALL_LAYERS]).count(), 3);
        let shallow = LayerSets::with_folds(vec![0, 0]);
        assert_eq!((shallow.num_folds(), shallow.views().count()), (Some(1), 1));
    }

    #[test]
    fn a_set_without_prefixes_does_not_affect_the_views() {
        let mut sets = LayerSets::default();
        for layers in [[true, false, false], [true, false, false], [true, true, false]] {
            assert!(sets.add(&layers).is_ok());
        }
        assert_eq!(sets.max_views_of_a_set(), 2);
        sets.release(1);
        assert_eq!(sets.views().of_layer(), [0, 1, 2], "one prefix of the set is left");
        assert_eq!((sets.add(&[]), sets.max_views_of_a_set()), (Ok(ALL_LAYERS), 3));
        sets.release(ALL_LAYERS);
        assert_eq!(sets.max_views_of_a_set(), 2);
        sets.release(1);
        assert_eq!(sets.views().of_layer(), [0, 0, 1]);
        assert_eq!(
            sets.add(&[false, true, true]),
            Ok(1),
            "the number of the unused set is reused"
        );
        assert_eq!(
            visible_sets(&sets, &[block(1), block(2)]),
            [vec![2], vec![1, 2], vec![1]]
        );
        sets.release(1);
        sets.release(2);
        assert_eq!((sets.views().count(), sets.views().of_layer().len()), (1, 0));
    }
}
