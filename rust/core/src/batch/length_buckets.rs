//! Groups of sequences of similar length, so that a padded layout wastes little.

use super::int32::{index, int};

/// Sequences in padded order and how they are cut: `order` by length, then number; each bucket is (sequences, padded length).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Buckets {
    pub(crate) order: Vec<usize>,
    pub(crate) buckets: Vec<[i32; 2]>,
}

impl Buckets {
    /// Places in all padded layouts together.
    pub(crate) fn places(&self) -> usize {
        self.buckets.iter().fold(0, |sum, [count, len]| {
            index(*count).saturating_mul(index(*len)).saturating_add(sum)
        })
    }
}

/// Cuts the sequences into at most `most` groups with the fewest padded tokens; the fewest groups among equals.
pub(crate) fn buckets(lengths: &[i32], most: usize) -> Buckets {
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
    let cuts = cut(&lens, &counts, most);
    let buckets = cuts.windows(2).map(|pair| {
        let sequences = counts[pair[1]] - counts[pair[0]];
        [int(usize::try_from(sequences).unwrap_or(usize::MAX)), lens[pair[1] - 1]]
    });
    Buckets {
        order,
        buckets: buckets.collect(),
    }
}

/// Borders between groups of the distinct lengths `lens`; `counts[i]` sequences are shorter than `lens[i]`.
fn cut(lens: &[i32], counts: &[u64], most: usize) -> Vec<usize> {
    let n = lens.len();
    let cost = |from: usize, to: usize| (counts[to] - counts[from]) * u64::from(lens[to - 1].unsigned_abs());
    let mut best: Vec<u64> = (0..=n).map(|to| if to == 0 { 0 } else { cost(0, to) }).collect();
    let mut from: Vec<Vec<usize>> = vec![vec![0; n + 1]];
    while from.len() < most.min(n) {
        let mut layer = Layer {
            before: &best,
            after: best.clone(),
            from: vec![usize::MAX; n + 1],
        };
        layer.fill(&cost, (1, n), (0, n - 1));
        if layer.after[n] == best[n] {
            break;
        }
        let Layer { after, from: cut, .. } = layer;
        best = after;
        from.push(cut);
    }
    let mut borders = vec![n];
    let mut to = n;
    for layer in from.iter().rev() {
        if to > 0 && layer[to] != usize::MAX {
            to = layer[to];
            borders.push(to);
        }
    }
    borders.reverse();
    borders
}

/// One more group: the best last border for every end. The cost obeys the quadrangle inequality, so the best borders ascend with the end
/// and halving finds all of them in n log n instead of n squared.
struct Layer<'a> {
    before: &'a [u64],
    after: Vec<u64>,
    from: Vec<usize>,
}

impl Layer<'_> {
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
    use super::buckets;

    #[test]
    fn equal_lengths_make_one_bucket() {
        assert_eq!(buckets(&[5, 5, 5], 4).buckets, [[3, 5]]);
        assert_eq!(buckets(&[], 4).buckets, [[0_i32; 2]; 0]);
    }

    #[test]
    fn cuts_are_the_best_of_all() {
        let lengths = [1, 9, 2, 9, 30, 31, 3, 100, 8, 31];
        for most in 1..6 {
            assert_eq!(buckets(&lengths, most).places() as u64, brute(&lengths, most), "{most}");
        }
    }

    fn brute(lengths: &[i32], most: usize) -> u64 {
        let mut sorted: Vec<u64> = lengths.iter().map(|len| u64::from(len.unsigned_abs())).collect();
        sorted.sort_unstable();
        let n = sorted.len();
        (0_u32..1 << (n - 1))
            .filter(|cuts| (cuts.count_ones() as usize) < most)
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
