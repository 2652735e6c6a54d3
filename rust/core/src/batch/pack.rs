//! Micro-batches for training: whole optimizer-step batches of several prefixes, packed into a token budget.

use super::int32::to_i32;
use super::loss_weights::loss_weights;
use super::max_tree::MaxTree;
use crate::error::{Error, Result};

/// Examples of a step to pack.
#[derive(Debug, Clone, Copy)]
pub struct Examples<'a> {
    /// Tokens of each example, at least 1.
    pub lengths: &'a [i32],
    /// Target tokens of each example, from 0 to its length.
    pub targets: &'a [i32],
    /// Batch number of each example, non-decreasing. Equal numbers form one optimizer step of one prefix.
    pub batch: &'a [i32],
}

/// Micro-batches, and the loss weights of their examples.
#[derive(Debug, Clone, PartialEq)]
pub struct Packing {
    /// Example numbers, micro-batch after micro-batch.
    pub order: Vec<i32>,
    /// Borders between micro-batches in `order`.
    pub micro_indptr: Vec<i32>,
    /// Weight of each target token of an example in the summed loss, one entry per input example.
    pub weight: Vec<f64>,
}

/// The consecutive examples of one batch.
#[derive(Debug, Clone, Copy)]
struct Batch {
    first: usize,
    end: usize,
    tokens: u64,
}

/// Packs whole batches into micro-batches of at most `token_budget` tokens, first-fit decreasing.
///
/// Micro-batches are listed in the order in which they are opened. A batch over the budget is split over micro-batches
/// of its own. An example over the budget gets a micro-batch of its own.
///
/// * `sequence_sum`: whether a target token weighs 1 / (examples of its batch) instead of 1 / (targets of its batch).
///
/// # Errors
/// [`Error::Config`] for lists of different lengths, a length below 1, targets outside of 0 to the length, descending
/// batch numbers or a budget of 0. [`Error::Data`] for a batch without targets.
pub fn pack(examples: Examples<'_>, token_budget: u64, sequence_sum: bool) -> Result<Packing> {
    check(examples, token_budget)?;
    let Examples {
        lengths,
        targets,
        batch,
    } = examples;
    let batches = batches(lengths, batch);
    let weight = loss_weights(targets, batch, batches.iter().map(|b| b.first..b.end), sequence_sum)?;
    let mut by_size: Vec<usize> = (0..batches.len()).collect();
    by_size.sort_by_key(|&number| std::cmp::Reverse(batches[number].tokens));
    let mut micro_batches: Vec<Vec<usize>> = Vec::new();
    // Remaining tokens of each open micro-batch.
    let mut budgets = MaxTree::new(batches.len());
    let (mut order, mut micro_indptr) = (Vec::with_capacity(lengths.len()), vec![0]);
    for number in by_size {
        let found = batches[number];
        if found.tokens > token_budget {
            // The largest batches come first, so these micro-batches are complete before any other is opened.
            split(found, lengths, token_budget, &mut order, &mut micro_indptr);
        } else if let Some(micro_batch) = budgets.first_at_least(found.tokens) {
            budgets.set(micro_batch, budgets.get(micro_batch) - found.tokens);
            micro_batches[micro_batch].push(number);
        } else {
            budgets.set(micro_batches.len(), token_budget - found.tokens);
            micro_batches.push(vec![number]);
        }
    }
    for mut micro_batch in micro_batches {
        micro_batch.sort_unstable();
        order.extend(
            micro_batch
                .iter()
                .flat_map(|&number| batches[number].first..batches[number].end)
                .map(to_i32),
        );
        micro_indptr.push(to_i32(order.len()));
    }
    Ok(Packing {
        order,
        micro_indptr,
        weight,
    })
}

fn check(
    Examples {
        lengths,
        targets,
        batch,
    }: Examples<'_>,
    token_budget: u64,
) -> Result<()> {
    let wrong = |text: String| Err(Error::Config(text));
    let sizes = [lengths.len(), targets.len(), batch.len()];
    if sizes != [lengths.len(); 3] || to_i32(lengths.len()) == i32::MAX {
        return wrong(format!(
            "lengths, targets and batch have {sizes:?} entries: expected one entry per example in each"
        ));
    }
    if token_budget == 0 {
        return wrong("token_budget is 0: expected 1 or more".to_owned());
    }
    for (example, (&length, &target)) in lengths.iter().zip(targets).enumerate() {
        if length < 1 || !(0..=length).contains(&target) {
            return wrong(format!(
                "example {example} has length {length} and {target} targets: expected a length of at least 1 and \
                 from 0 to {length} targets"
            ));
        }
    }
    match batch.windows(2).position(|pair| pair[0] > pair[1]) {
        Some(at) => wrong(format!(
            "batch descends after example {at}: expected ascending batch numbers; sort the examples by batch"
        )),
        None => Ok(()),
    }
}

fn batches(lengths: &[i32], batch: &[i32]) -> Vec<Batch> {
    let mut first = 0;
    let runs = batch.chunk_by(|a, b| a == b).map(|run| {
        let end = first + run.len();
        let tokens = lengths[first..end]
            .iter()
            .map(|len| u64::from(len.unsigned_abs()))
            .sum();
        let found = Batch { first, end, tokens };
        first = end;
        found
    });
    runs.collect()
}

/// Splits a batch over micro-batches, in the order of its examples.
fn split(batch: Batch, lengths: &[i32], token_budget: u64, order: &mut Vec<i32>, micro_indptr: &mut Vec<i32>) {
    let mut used = 0;
    for (example, length) in (batch.first..batch.end).zip(&lengths[batch.first..batch.end]) {
        let length = u64::from(length.unsigned_abs());
        if used > 0 && used + length > token_budget {
            micro_indptr.push(to_i32(order.len()));
            used = 0;
        }
        used += length;
        order.push(to_i32(example));
    }
    micro_indptr.push(to_i32(order.len()));
}
