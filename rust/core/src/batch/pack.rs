//! Micro-batches of a token budget that keep each prefix's optimizer step together.

use super::int32::int;
use crate::error::{Error, Result};

/// Which examples go together, and what their target tokens weigh.
#[derive(Debug, Clone, PartialEq)]
pub struct Packing {
    /// Example numbers, micro-batch after micro-batch.
    pub order: Vec<i32>,
    /// Borders between micro-batches in `order`.
    pub micro_indptr: Vec<i32>,
    /// By example: the weight of each of its target tokens.
    pub weight: Vec<f64>,
}

/// A run of examples of one optimizer step.
#[derive(Debug, Clone, Copy)]
struct Batch {
    first: usize,
    end: usize,
    tokens: u64,
}

/// Packs whole batches first-fit decreasing into micro-batches of at most `token_budget` tokens, in the order in which these are opened. A
/// larger batch is split, alone; a larger example goes alone.
///
/// # Errors
/// [`Error::Config`] for lists of different lengths, a length below 1, targets outside 0 to length, descending `batch` or a budget of 0;
/// [`Error::Data`] for a batch without targets.
pub fn pack(lengths: &[i32], targets: &[i32], batch: &[i32], token_budget: u64, sequence_sum: bool) -> Result<Packing> {
    check(lengths, targets, batch, token_budget)?;
    let batches = batches(lengths, batch);
    let weight = weights(targets, batch, &batches, sequence_sum)?;
    let mut by_size: Vec<usize> = (0..batches.len()).collect();
    by_size.sort_by_key(|&number| std::cmp::Reverse(batches[number].tokens));
    let mut micros: Vec<Vec<usize>> = Vec::new();
    let mut room = Room::new(batches.len());
    let (mut order, mut micro_indptr) = (Vec::with_capacity(lengths.len()), vec![0]);
    for number in by_size {
        let found = batches[number];
        if found.tokens > token_budget {
            // The largest come first, so these micro-batches are complete before any other is opened.
            split(found, lengths, token_budget, &mut order, &mut micro_indptr);
        } else if let Some(micro) = room.take(found.tokens) {
            micros[micro].push(number);
        } else {
            room.set(micros.len(), token_budget - found.tokens);
            micros.push(vec![number]);
        }
    }
    for mut micro in micros {
        micro.sort_unstable();
        order.extend(
            micro
                .iter()
                .flat_map(|&number| batches[number].first..batches[number].end)
                .map(int),
        );
        micro_indptr.push(int(order.len()));
    }
    Ok(Packing {
        order,
        micro_indptr,
        weight,
    })
}

fn check(lengths: &[i32], targets: &[i32], batch: &[i32], token_budget: u64) -> Result<()> {
    let wrong = |text: String| Err(Error::Config(text));
    let sizes = [lengths.len(), targets.len(), batch.len()];
    if sizes != [lengths.len(); 3] || int(lengths.len()) == i32::MAX {
        return wrong(format!(
            "lengths, targets and batch have {sizes:?} entries: expected one of each for every example"
        ));
    }
    if token_budget == 0 {
        return wrong("token_budget is 0: expected 1 or more".to_owned());
    }
    for (example, (&length, &target)) in lengths.iter().zip(targets).enumerate() {
        if length < 1 || !(0..=length).contains(&target) {
            return wrong(format!(
                "example {example} has length {length} and {target} targets: expected a length of 1 or more and targets from 0 to it"
            ));
        }
    }
    match batch.windows(2).position(|pair| pair[0] > pair[1]) {
        Some(at) => wrong(format!(
            "batch descends after example {at}: expected the examples of one batch side by side, in ascending order; sort them"
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

fn weights(targets: &[i32], batch: &[i32], batches: &[Batch], sequence_sum: bool) -> Result<Vec<f64>> {
    let mut weight = Vec::with_capacity(targets.len());
    for &Batch { first, end, .. } in batches {
        let total: f64 = targets[first..end].iter().map(|count| f64::from(*count)).sum();
        if total == 0.0 {
            return Err(Error::Data(format!(
                "batch {} (examples {first} to {}) has no target tokens: expected at least one; drop its examples or raise the length limit",
                batch[first],
                end - 1
            )));
        }
        let parts = if sequence_sum {
            f64::from(int(end - first))
        } else {
            total
        };
        weight.extend((first..end).map(|_| 1.0 / parts));
    }
    Ok(weight)
}

fn split(batch: Batch, lengths: &[i32], budget: u64, order: &mut Vec<i32>, micro_indptr: &mut Vec<i32>) {
    let mut used = 0;
    for (example, length) in (batch.first..batch.end).zip(&lengths[batch.first..batch.end]) {
        let length = u64::from(length.unsigned_abs());
        if used > 0 && used + length > budget {
            micro_indptr.push(int(order.len()));
            used = 0;
        }
        used += length;
        order.push(int(example));
    }
    micro_indptr.push(int(order.len()));
}

/// Tokens left in each open micro-batch, as a tree of maxima: the first with enough room is found in log n.
struct Room {
    leaves: usize,
    tree: Vec<u64>,
}

impl Room {
    fn new(most: usize) -> Self {
        let leaves = most.next_power_of_two();
        Self {
            leaves,
            tree: vec![0; 2 * leaves],
        }
    }

    fn set(&mut self, leaf: usize, left: u64) {
        let mut node = self.leaves + leaf;
        self.tree[node] = left;
        while node > 1 {
            node /= 2;
            self.tree[node] = self.tree[2 * node].max(self.tree[2 * node + 1]);
        }
    }

    /// Takes `tokens`, at least 1, from the first micro-batch that has them.
    fn take(&mut self, tokens: u64) -> Option<usize> {
        if self.tree[1] < tokens {
            return None;
        }
        let mut node = 1;
        while node < self.leaves {
            node = if self.tree[2 * node] >= tokens {
                2 * node
            } else {
                2 * node + 1
            };
        }
        let leaf = node - self.leaves;
        self.set(leaf, self.tree[node] - tokens);
        Some(leaf)
    }
}
