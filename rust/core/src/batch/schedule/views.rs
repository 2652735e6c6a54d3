//! Layers in which different prefixes lie: each kind of them, a view, reads tables of its own.

use std::borrow::Cow;

use super::super::uses::Block;
use crate::error::{Error, Result};

/// The number of the set that has every layer.
pub(super) const ALL: usize = 0;

/// Sets of layers that prefixes lie in, and the views that they make.
#[derive(Debug, Default)]
pub(super) struct Views {
    /// Set `i + 1`: whether it has each layer. Distinct; each leaves a layer out.
    sets: Vec<Vec<bool>>,
    /// By layer: its view. Empty while every set has all layers.
    of_layer: Vec<usize>,
    /// By view: whether each set but the first has its layers.
    shown: Vec<Vec<bool>>,
}

impl Views {
    /// The number of a set; an empty one stands for all layers.
    pub(super) fn set(&mut self, layers: &[bool]) -> Result<usize> {
        if let Some(known) = self.sets.first()
            && !layers.is_empty()
            && layers.len() != known.len()
        {
            return Err(Error::Config(format!(
                "layers has {} entries: expected {}, one for each layer, as before",
                layers.len(),
                known.len()
            )));
        }
        if layers.iter().all(|has| *has) {
            return Ok(ALL);
        }
        if let Some(set) = self.sets.iter().position(|known| known == layers) {
            return Ok(set + 1);
        }
        self.sets.push(layers.to_vec());
        self.shown.clear();
        let columns =
            (0..layers.len()).map(|layer| self.sets.iter().map(|set| set[layer]).collect());
        let columns: Vec<Vec<bool>> = columns.collect();
        self.of_layer = columns
            .into_iter()
            .map(|column| {
                self.shown
                    .iter()
                    .position(|known| *known == column)
                    .unwrap_or_else(|| {
                        self.shown.push(column);
                        self.shown.len() - 1
                    })
            })
            .collect();
        Ok(self.sets.len())
    }

    /// At least 1, and no more than layers.
    pub(super) fn count(&self) -> usize {
        self.shown.len().max(1)
    }

    /// By layer: its view; empty for a single view.
    pub(super) fn of_layer(&self) -> &[usize] {
        &self.of_layer
    }

    /// Those of `blocks` that lie in the layers of `view`.
    pub(super) fn visible<'a>(&self, view: usize, blocks: &'a [Block]) -> Cow<'a, [Block]> {
        let visible = |block: &Block| block.set == ALL || self.shown[view][block.set - 1];
        if blocks.iter().all(visible) {
            Cow::Borrowed(blocks)
        } else {
            blocks.iter().copied().filter(visible).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{ALL, Block, Views};

    fn block(set: usize) -> Block {
        Block {
            prefix: 0,
            first: 0,
            rows: 1,
            slides: 1,
            set,
        }
    }

    #[test]
    fn sets_have_one_number_and_layers_that_nobody_tells_apart_one_view() {
        let mut views = Views::default();
        assert_eq!(views.set(&[true; 4]), Ok(ALL));
        assert_eq!((views.count(), views.of_layer()), (1, [].as_slice()));
        assert_eq!(views.set(&[true, true, false, false]), Ok(1));
        assert_eq!(views.of_layer(), [0, 0, 1, 1]);
        assert_eq!(views.set(&[false, true, false, true]), Ok(2));
        assert_eq!(views.of_layer(), [0, 1, 2, 3]);
        assert_eq!(views.set(&[true, true, false, false]), Ok(1));
        assert_eq!(views.set(&[]), Ok(ALL));
        assert!(views.set(&[true, false]).is_err(), "of another model");
        let blocks = [block(ALL), block(1), block(2)];
        let seen = (0..views.count()).map(|view| {
            let visible = views.visible(view, &blocks);
            visible.iter().map(|block| block.set).collect::<Vec<_>>()
        });
        assert_eq!(
            seen.collect::<Vec<_>>(),
            [vec![0, 1], vec![0, 1, 2], vec![0], vec![0, 2]]
        );
    }
}
