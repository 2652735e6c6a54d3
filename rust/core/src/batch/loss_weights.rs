//! Loss weights of the training examples of a step.

use std::ops::Range;

use super::int32::to_i32;
use crate::error::{Error, Result};

/// Weight of each target token of an example in the summed loss, one entry per example.
///
/// * `targets`: target tokens of each example.
/// * `batch`: batch number of each example.
/// * `batches`: examples of each batch, in the order of the examples.
/// * `sequence_sum`: whether a target token weighs 1 / (examples of its batch), as in Li & Liang's loss, instead of
///   1 / (targets of its batch).
///
/// # Errors
/// [`Error::Data`] for a batch without targets.
pub(super) fn loss_weights(
    targets: &[i32],
    batch: &[i32],
    batches: impl Iterator<Item = Range<usize>>,
    sequence_sum: bool,
) -> Result<Vec<f64>> {
    let mut weights = Vec::with_capacity(targets.len());
    for Range { start, end } in batches {
        let total: f64 = targets[start..end].iter().map(|count| f64::from(*count)).sum();
        if total == 0.0 {
            return Err(Error::Data(format!(
                "batch {} (examples {start} to {}) has no target tokens: expected at least one; drop its examples or \
                 raise the length limit",
                batch[start],
                end - 1
            )));
        }
        let divisor = if sequence_sum {
            f64::from(to_i32(end - start))
        } else {
            total
        };
        weights.extend((start..end).map(|_| 1.0 / divisor));
    }
    Ok(weights)
}
