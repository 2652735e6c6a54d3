//! Position bias of the scores, a table over the distance between key and query.

/// Numbers that are added to the scores by clamped (key position - query position).
#[derive(Debug, Clone, Copy)]
pub struct Bias<'a> {
    /// Numbers `[HQ, 2 * max_distance + 1]`, from distance `-max_distance` on.
    pub table: &'a [f32],
    /// Largest distance. Larger ones count as this one.
    pub max_distance: usize,
}

impl Bias<'_> {
    /// Adds the bias of query head `head` to the scores of consecutive keys.
    ///
    /// * `first`: position of the first key relative to the query.
    #[inline(always)]
    pub(super) fn add(&self, head: usize, first: i64, scores: &mut [f32]) {
        let columns = 2 * self.max_distance + 1;
        let row = &self.table[head * columns..][..columns];
        // Column of the first key in a table without limits.
        let column = first.saturating_add_unsigned(self.max_distance as u64);
        let from_first = |to: i64| {
            usize::try_from(to.saturating_sub(column))
                .unwrap_or(0)
                .min(scores.len())
        };
        let (below, inside) = (from_first(0), from_first(i64::try_from(columns).unwrap_or(i64::MAX)));
        let row_start = usize::try_from(column).unwrap_or(0).min(columns);
        for score in &mut scores[..below] {
            *score += row[0];
        }
        for (score, bias) in scores[below..inside].iter_mut().zip(&row[row_start..]) {
            *score += bias;
        }
        for score in &mut scores[inside..] {
            *score += row[columns - 1];
        }
    }
}
