//! Tree of maxima, which finds the first or the last number that is large enough.

/// Numbers with an index from 0, all of them 0 at first. Every call takes O(log n).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MaxTree {
    leaves: usize,
    /// Node 1 is the root. The children of node `i` are `2 * i` and `2 * i + 1`, and the leaves come last.
    tree: Vec<u64>,
}

impl MaxTree {
    pub(crate) fn new(len: usize) -> Self {
        let leaves = len.next_power_of_two();
        Self {
            leaves,
            tree: vec![0; 2 * leaves],
        }
    }

    pub(crate) fn get(&self, index: usize) -> u64 {
        self.tree[self.leaves + index]
    }

    pub(crate) fn set(&mut self, index: usize, value: u64) {
        let mut node = self.leaves + index;
        self.tree[node] = value;
        while node > 1 {
            node /= 2;
            self.tree[node] = self.tree[2 * node].max(self.tree[2 * node + 1]);
        }
    }

    /// Index of the first number that is at least `min`.
    pub(crate) fn first_at_least(&self, min: u64) -> Option<usize> {
        self.descend(min, |left| left)
    }

    /// Index of the last number that is at least `min`.
    pub(crate) fn last_at_least(&self, min: u64) -> Option<usize> {
        self.descend(min, |left| left + 1)
    }

    /// Descends to a leaf that is at least `min`, through the child that `preferred` chooses where it suffices.
    fn descend(&self, min: u64, preferred: impl Fn(usize) -> usize) -> Option<usize> {
        if self.tree[1] < min {
            return None;
        }
        let mut node = 1;
        while node < self.leaves {
            let child = preferred(2 * node);
            node = if self.tree[child] >= min { child } else { child ^ 1 };
        }
        Some(node - self.leaves)
    }
}
