//! Length buckets: groups of sequences of similar length, chosen to minimize padding.

use super::int32::{to_i32, to_usize};

/// Padded layout of a batch of sequences.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LengthBuckets {
    /// Sequence numbers, sorted by length and then by number.
    pub(crate) order: Vec<usize>,
    /// Number of sequences and padded length of each bucket, which cut `order` into consecutive parts.
    pub(crate) buckets: Vec<[i32; 2]>,
}

impl LengthBuckets {
    /// Number of tokens of all buckets, padding included.
    pub(crate) fn padded_tokens(&self) -> usize {
        self.buckets.iter().fold(0, |sum, [count, len]| {
            to_usize(*count).saturating_mul(to_usize(*len)).saturating_add(sum)
        })
    }
}

/// Cuts the sequences into at most `max_buckets` buckets with the fewest padded tokens.
///
/// Among equally good solutions the one with the fewest buckets is chosen.
pub(crate) fn length_buckets(lengths: &[i32], max_buckets: usize) -> LengthBuckets {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&sequence| lengths[sequence]);
    let (mut lens, mut counts) = (Vec::<i32>::new(), vec![0_u64]);
    for (done, &sequence) in order.iter().enumerate() {
        if lens.last() == Some(&lengths[sequence]) {
            counts.pop();
        } else {
            lens.push(lengths[sequence]);
        }
        counts.push(done as u64 + 1);
    }
    let borders = best_borders(&lens, &counts, max_buckets);
    let buckets = borders.windows(2).map(|pair| {
        let sequences = counts[pair[1]] - counts[pair[0]];
        [
            to_i32(usize::try_from(sequences).unwrap_or(usize::MAX)),
            lens[pair[1] - 1],
        ]
    });
    LengthBuckets {
        order,
        buckets: buckets.collect(),
    }
}

/// Borders between buckets, as indices into the distinct lengths `lens`.
///
/// * `counts`: number of sequences shorter than `lens[i]` at index `i`, and the number of all sequences at the end.
fn best_borders(lens: &[i32], counts: &[u64], max_buckets: usize) -> Vec<usize> {
    let n = lens.len();
    let cost = |from: usize, to: usize| (counts[to] - counts[from]) * u64::from(lens[to - 1].unsigned_abs());
    let mut best: Vec<u64> = (0..=n).map(|to| if to == 0 { 0 } else { cost(0, to) }).collect();
    let mut from: Vec<Vec<usize>> = vec![vec![0; n + 1]];
    while from.len() < max_buckets.min(n) {
        let mut round = DynamicProgramRound {
            before: &best,
            after: best.clone(),
            from: vec![usize::MAX; n + 1],
        };
        round.fill(&cost, (1, n), (0, n - 1));
        if round.after[n] == best[n] {
            break;
        }
        let DynamicProgramRound { after, from: cut, .. } = round;
        best = after;
        from.push(cut);
    }
    let mut borders = vec![n];
    let mut to = n;
    for last_border in from.iter().rev() {
        if to > 0 && last_border[to] != usize::MAX {
            to = last_border[to];
            borders.push(to);
        }
    }
    borders.reverse();
    borders
}

/// One round of the dynamic program, which allows one more bucket.
///
/// The cost obeys the quadrangle inequality, so the best last border ascends with the end. Divide and conquer finds all
/// last borders in O(n log n) instead of O(n^2).
struct DynamicProgramRound<'a> {
    /// Least number of padded tokens up to each end, with one bucket less.
    before: &'a [u64],
    /// Least number of padded tokens up to each end.
    after: Vec<u64>,
    /// Last border for each end, `usize::MAX` where the additional bucket saves nothing.
    from: Vec<usize>,
}

impl DynamicProgramRound<'_> {
    fn fill(&mut self, cost: &impl Fn(usize, usize) -> u64, ends: (usize, usize), starts: (usize, usize)) {
        if ends.0 > ends.1 {
            return;
        }
        let middle = usize::midpoint(ends.0, ends.1);
        let (mut least, mut at) = (u64::MAX, starts.0);
        for start in starts.0..=starts.1.min(middle - 1) {
            let total = self.before[start] + cost(start, middle);
            if total < least {
                (least, at) = (total, start);
            }
        }
        if least < self.after[middle] {
            (self.after[middle], self.from[middle]) = (least, at);
        }
        self.fill(cost, (ends.0, middle.saturating_sub(1)), (starts.0, at));
        self.fill(cost, (middle + 1, ends.1), (at, starts.1));
    }
}

#[cfg(test)]
mod tests {
    use super::length_buckets;

    #[test]
    fn equal_lengths_make_one_bucket() {
        assert_eq!(length_buckets(&[5, 5, 5], 4).buckets, [[3, 5]]);
        assert_eq!(length_buckets(&[], 4).buckets, [[0_i32; 2]; 0]);
    }

    #[test]
    fn padding_is_minimal() {
        let lengths = [1, 9, 2, 9, 30, 31, 3, 100, 8, 31];
        for max_buckets in 1..6 {
            assert_eq!(
                length_buckets(&lengths, max_buckets).padded_tokens() as u64,
                brute_force(&lengths, max_buckets),
                "{max_buckets} buckets"
            );
        }
    }

    fn brute_force(lengths: &[i32], max_buckets: usize) -> u64 {
        let mut sorted: Vec<u64> = lengths.iter().map(|len| u64::from(len.unsigned_abs())).collect();
        sorted.sort_unstable();
        let n = sorted.len();
        (0_u32..1 << (n - 1))
            .filter(|cuts| (cuts.count_ones() as usize) < max_buckets)
            .map(|cuts| {
                let (mut total, mut count) = (0, 0);
                for (index, len) in sorted.iter().enumerate() {
                    count += 1;
                    if index == n - 1 || cuts >> index & 1 == 1 {
                        total += count * len;
                        count = 0;
                    }
                }
                total
            })
            .min()
            .unwrap_or(0)
    }
}
