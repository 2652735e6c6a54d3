//! Cuts of a step into tasks.

use super::HEADS;
use super::case::Case;
use crate::attend::plan::Plan;
use crate::error::Error;

#[test]
fn a_block_that_is_new_in_a_run_costs_its_read() -> Result<(), Error> {
    // Rows 0 and 1 share both blocks, and row 2 sees a second block of its own.
    let case = Case {
        block: vec![[0, 40], [50, 80], [150, 80]],
        use_indptr: vec![0, 2, 4, 6],
        uses: vec![[0, -40, 0], [1, 0, 0], [0, -40, 0], [1, 0, 0], [0, -40, 0], [2, 0, 0]],
        lens: vec![0; 3],
        ..Case::new(2, 2, 16)
    };
    let cost = |case: &Case| -> Result<Vec<usize>, Error> {
        Ok(Plan::new(&case.inputs(), 1)?
            .runs()
            .into_iter()
            .map(|(_, cost)| cost)
            .collect())
    };
    let own = 3 * (40 + 80);
    assert_eq!(cost(&case)?, [own + 4 * (40 + 80 + 80)]);
    let shared = Case {
        uses: [[0, -40, 0], [1, 0, 0]].repeat(3),
        ..case
    };
    assert_eq!(cost(&shared)?, [own + 4 * (40 + 80)]);
    Ok(())
}

#[test]
fn tasks_cover_every_row_and_kv_head_once() -> Result<(), Error> {
    for threads in [1, 2, 3, 16, 1000] {
        for (heads, kv_heads, head_dim) in HEADS {
            let case = Case::new(heads, kv_heads, head_dim);
            let plan = Plan::new(&case.inputs(), threads)?;
            let mut seen = vec![0; 3 * kv_heads];
            for task in &plan.tasks {
                for (row, h) in task.rows.clone().flat_map(|r| task.heads.clone().map(move |h| (r, h))) {
                    seen[plan.rows[row].index * kv_heads + h] += 1;
                }
            }
            assert!(
                seen.iter().all(|n| *n == 1),
                "{threads} threads, {kv_heads} heads: {seen:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn tasks_balance_the_threads() -> Result<(), Error> {
    for (runs, threads) in [(1, 2), (2, 2), (3, 2), (3, 4), (4, 2), (5, 4), (12, 8), (32, 2)] {
        let number = |x: usize| i32::try_from(x).unwrap_or(i32::MAX);
        let case = Case {
            block: (0..number(runs)).map(|i| [i, 90]).collect(),
            use_indptr: (0..=2 * number(runs)).collect(),
            uses: (0..2 * number(runs)).map(|i| [i / 2, -90, 0]).collect(),
            lens: vec![20; 2 * runs],
            ..Case::shared(2 * runs, (8, 8, 64))
        };
        let plan = Plan::new(&case.inputs(), threads)?;
        let mut busy = vec![0; threads];
        for task in &plan.tasks {
            if let Some(first) = busy.iter_mut().min() {
                *first += task.rows.len() * task.heads.len();
            }
        }
        let (most, all) = (busy.iter().max().copied().unwrap_or(0), busy.iter().sum::<usize>());
        assert!(
            4 * most * threads <= 5 * all,
            "{runs} prefixes on {threads} threads: {busy:?}"
        );
    }
    Ok(())
}
