//! Sites of an encoder-decoder base: the kinds of attention, each with prefix rows and tables of its own.

use super::super::block_tables::PrefixBlock;
use super::super::place::Place;
use super::layer_sets::LayerSets;
use super::prefix_cache::PrefixSpec;
use super::{MAX_ROWS, Scheduler, UNIT};
use crate::error::{Error, Result};

/// Kind of attention. A decoder-only base has the first one alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Site {
    /// Self-attention of the decoder.
    Decoder,
    /// Attention of the decoder over the encoder's output.
    Cross,
    /// Self-attention of the encoder.
    Encoder,
}

/// All sites, in the order of their rows in the arena.
pub(super) const SITES: [Site; 3] = [Site::Decoder, Site::Cross, Site::Encoder];

/// Values of each site.
#[derive(Debug, Clone, Default)]
pub(super) struct BySite<T>([T; 3]);

impl<T> BySite<T> {
    pub(super) fn at(&self, site: Site) -> &T {
        &self.0[site as usize]
    }

    pub(super) fn at_mut(&mut self, site: Site) -> &mut T {
        &mut self.0[site as usize]
    }
}

/// Rows of a prefix at one site.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct SiteRows {
    /// First row relative to the prefix's first arena row.
    pub(super) offset: usize,
    /// Number of rows in each layer.
    pub(super) rows: usize,
    pub(super) layer_set: usize,
}

/// Part of a prefix that belongs to one site.
#[derive(Debug, Clone, Copy, Default)]
pub struct PrefixPart<'a> {
    /// First row relative to the prefix's first arena row, a multiple of [`UNIT`].
    pub offset: usize,
    /// Number of rows in each layer.
    pub rows: usize,
    /// Whether the prefix lies in each layer, empty for all layers.
    pub layers: &'a [bool],
}

/// Prefix blocks that a request sees at each site. Those of cross-attention end with the blocks of its encoder rows.
pub(super) type SiteBlocks = BySite<Vec<PrefixBlock>>;

/// Numbers of a prefix that do not depend on the site.
#[derive(Debug, Clone, Copy)]
pub struct PrefixShape {
    /// Number of rows in the arena.
    pub rows: usize,
    /// Position of the first token after the prefix.
    pub pos_start: usize,
    /// Whether the sliding window slides over the prefix.
    pub slides: bool,
    /// Place of the prefix in a sequence.
    pub place: Place,
}

impl Scheduler {
    /// Registers a prefix of a decoder. It is loaded when a request needs it. A prefix of 0 rows is never loaded.
    ///
    /// * `prefix`: new number of the prefix.
    /// * `rows`: number of rows.
    /// * `pos_start`: position of the first token after the prefix.
    /// * `slides`: whether the sliding window slides over the prefix.
    /// * `place`: place of the prefix in a sequence.
    /// * `layers`: whether the prefix lies in each layer, empty for all layers.
    ///
    /// # Errors
    /// [`Error::Config`] if the number is already registered, a value exceeds 2**30, or `layers` has another length
    /// than that of earlier prefixes.
    pub fn register_prefix(
        &mut self,
        prefix: i64,
        rows: usize,
        pos_start: usize,
        slides: bool,
        place: Place,
        layers: &[bool],
    ) -> Result<()> {
        let shape = PrefixShape {
            rows,
            pos_start,
            slides,
            place,
        };
        let decoder = PrefixPart {
            offset: 0,
            rows,
            layers,
        };
        self.register(prefix, shape, [decoder, PrefixPart::default(), PrefixPart::default()])
    }

    /// Registers a prefix of an encoder-decoder base.
    ///
    /// * `prefix`: new number of the prefix, at least 0.
    /// * `shape`: rows of all parts together, and what does not depend on the site.
    /// * `parts`: rows of the decoder's self-attention, of cross-attention and of the encoder, one after the other. The
    ///   part of the encoder has its rows once for each fold.
    ///
    /// # Errors
    /// As [`Scheduler::register_prefix`]. [`Error::Config`] too if the scheduler serves a decoder-only base, the prefix
    /// is an infix, or the parts overlap or exceed `shape.rows`.
    pub fn register_parts(&mut self, prefix: i64, shape: PrefixShape, parts: [PrefixPart<'_>; 3]) -> Result<()> {
        let wrong = |text: String| Err(Error::Config(format!("sites of prefix {prefix}: {text}")));
        let Some(folds) = self.encoder_folds() else {
            return wrong(
                "expected none, because the scheduler serves a decoder-only base; leave sites out".to_owned(),
            );
        };
        let mut end = 0;
        for (part, copies) in parts.iter().zip([1, 1, folds]) {
            if !part.offset.is_multiple_of(UNIT) || part.offset < end && part.rows > 0 {
                return wrong(format!(
                    "offset {} does not fit: expected a multiple of {UNIT} of at least {end}",
                    part.offset
                ));
            }
            end = end.max(part.offset.saturating_add(part.rows.saturating_mul(copies)));
        }
        if end > shape.rows {
            return wrong(format!(
                "they end at row {end}: expected at most {}, the number of rows",
                shape.rows
            ));
        }
        self.register(prefix, shape, parts)
    }

    fn register(&mut self, prefix: i64, shape: PrefixShape, parts: [PrefixPart<'_>; 3]) -> Result<()> {
        let PrefixShape {
            rows,
            pos_start,
            slides,
            place,
        } = shape;
        for (name, value) in [("rows", rows), ("pos_start", pos_start)] {
            if value > MAX_ROWS {
                return Err(Error::Config(format!(
                    "{name} of prefix {prefix} is {value}: expected at most {MAX_ROWS}"
                )));
            }
        }
        if self.encoder_folds().is_some() && (prefix < 0 || place.is_infix()) {
            return Err(Error::Config(format!(
                "prefix {prefix} does not fit an encoder-decoder base: expected a number of at least 0 and a place \
                 before the first token"
            )));
        }
        self.prefix_cache.check_new(prefix)?;
        for (site, part) in SITES.into_iter().zip(parts) {
            self.layer_sets.at(site).check(part.layers)?;
        }
        let mut sites = BySite::default();
        for (site, part) in SITES.into_iter().zip(parts) {
            *sites.at_mut(site) = SiteRows {
                offset: part.offset,
                rows: part.rows,
                layer_set: self.layer_sets.at_mut(site).add(part.layers)?,
            };
        }
        self.prefix_cache.register(
            prefix,
            PrefixSpec {
                rows,
                pos_start,
                slides,
                place,
                sites,
            },
        );
        Ok(())
    }

    /// Forgets a prefix and frees its arena rows.
    ///
    /// # Errors
    /// [`Error::UnknownPrefix`] if the prefix is not registered. [`Error::State`] while a request uses the prefix or it
    /// is being loaded.
    pub fn forget_prefix(&mut self, prefix: i64) -> Result<()> {
        let sites = self.prefix_cache.forget(prefix, &mut self.arena)?;
        self.blocked = None;
        for site in SITES {
            self.layer_sets.at_mut(site).release(sites.at(site).layer_set);
        }
        Ok(())
    }

    /// Number of folds of the encoder's prefix rows, `None` for a decoder-only base.
    fn encoder_folds(&self) -> Option<usize> {
        self.layer_sets.at(Site::Encoder).num_folds()
    }

    /// Whether the base has an encoder.
    pub(super) fn has_encoder(&self) -> bool {
        self.encoder_folds().is_some()
    }
}

/// Layer sets of each site of a base.
///
/// * `encoder_folds`: fold of each encoder layer, `None` for a decoder-only base.
pub(super) fn site_layer_sets(encoder_folds: Option<Vec<usize>>) -> BySite<LayerSets> {
    let mut sets: BySite<LayerSets> = BySite::default();
    if let Some(folds) = encoder_folds {
        *sets.at_mut(Site::Encoder) = LayerSets::with_folds(folds);
    }
    sets
}
