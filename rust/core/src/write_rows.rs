//! Copies of new keys and values to rows of an arena.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::attend::openmp;
use crate::error::{Error, Result};

/// Neighbouring arena rows that one thread writes.
const BLOCK: usize = 64;
/// Bytes of an arena's new rows from which on several threads are faster than one.
const MIN_SHARED_BYTES: usize = 1 << 19;

/// Arena of rows of bytes, of which a call writes some while other threads read or write others.
#[derive(Debug)]
pub struct ArenaRows<'a> {
    start: *mut u8,
    rows: usize,
    row_bytes: usize,
    lifetime: PhantomData<&'a mut [u8]>,
}

// SAFETY: `ArenaRows::new` demands that only the call of `write_rows` uses the rows that it writes. Within the call
// each row belongs to one thread.
unsafe impl Sync for ArenaRows<'_> {}
// SAFETY: as for `Sync`.
unsafe impl Send for ArenaRows<'_> {}

impl ArenaRows<'_> {
    /// Arena of `rows` rows of `row_bytes` bytes from `start` on.
    ///
    /// # Safety
    /// During the value's lifetime, the rows lie in one allocation, and nobody else reads or writes those that the
    /// slots of a call name. Other threads may use other rows.
    #[must_use]
    pub unsafe fn new(start: *mut u8, rows: usize, row_bytes: usize) -> Self {
        Self {
            start,
            rows,
            row_bytes,
            lifetime: PhantomData,
        }
    }
}

/// New rows of the arenas, in memory of its own.
#[derive(Debug, Clone, Copy)]
pub struct NewRows<'a> {
    /// Bytes from the first row to the end of the last.
    pub bytes: &'a [u8],
    /// Bytes from the start of a row to that of the next.
    pub stride: usize,
}

/// Copies row i of `new` to row `slots[i]` of the arena, for each arena and its new rows. Of equal slots the last one
/// counts.
///
/// # Errors
/// [`Error::Config`] if a slot names no row, or the new rows are fewer than the slots. Nothing is written then.
pub fn write_rows(pairs: &[(ArenaRows<'_>, NewRows<'_>)], slots: &[i32], threads: usize) -> Result<()> {
    let mut bytes = 0;
    for (arena, new) in pairs {
        check(arena, new, slots)?;
        bytes += arena.row_bytes * slots.len();
    }
    let threads = if bytes < MIN_SHARED_BYTES { 1 } else { threads.max(1) };
    let next = AtomicUsize::new(0);
    // A row belongs to the thread of its block, so that equal slots are no race.
    openmp::run_on_threads(threads, &|| {
        loop {
            let part = next.fetch_add(1, Ordering::Relaxed);
            if part >= threads {
                return;
            }
            for (arena, new) in pairs {
                write_part(arena, new, slots, [part, threads]);
            }
        }
    })
}

fn check(arena: &ArenaRows<'_>, new: &NewRows<'_>, slots: &[i32]) -> Result<()> {
    let needed = match slots.len() {
        0 => Some(0),
        n => (n - 1)
            .checked_mul(new.stride)
            .and_then(|last| last.checked_add(arena.row_bytes)),
    };
    if needed.is_none_or(|needed| needed > new.bytes.len()) {
        return Err(Error::Config(format!(
            "new rows: expected {} of {} bytes, got {} bytes at a stride of {}",
            slots.len(),
            arena.row_bytes,
            new.bytes.len(),
            new.stride
        )));
    }
    match slots
        .iter()
        .find(|slot| usize::try_from(**slot).map_or(true, |slot| slot >= arena.rows))
    {
        None => Ok(()),
        Some(slot) => Err(Error::Config(format!(
            "slot {slot}: expected one of the {} rows of the arena",
            arena.rows
        ))),
    }
}

/// Copies the rows whose block of the arena is one of `part`, `part + parts`, ...
fn write_part(arena: &ArenaRows<'_>, new: &NewRows<'_>, slots: &[i32], [part, parts]: [usize; 2]) {
    for (i, slot) in slots.iter().enumerate() {
        let slot = usize::try_from(*slot).unwrap_or(usize::MAX);
        if parts > 1 && slot / BLOCK % parts != part {
            continue;
        }
        assert!(slot < arena.rows);
        let row = &new.bytes[i * new.stride..][..arena.row_bytes];
        // SAFETY: the assertion keeps the row in the memory of `ArenaRows::new`, whose caller promises that nobody else
        // uses it. No other thread of the call has this block. `row` is a slice that nobody writes to.
        unsafe {
            std::ptr::copy_nonoverlapping(row.as_ptr(), arena.start.add(slot * arena.row_bytes), arena.row_bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Arena of `rows` rows of 3 bytes after the copies.
    fn run(rows: usize, new: NewRows<'_>, slots: &[i32], threads: usize) -> Result<Vec<u8>> {
        let mut arena = vec![0; rows * 3];
        // SAFETY: nobody else has the memory, which outlives the call.
        let own = unsafe { ArenaRows::new(arena.as_mut_ptr(), rows, 3) };
        write_rows(&[(own, new)], slots, threads)?;
        Ok(arena)
    }

    #[test]
    fn each_row_is_copied_to_its_slot_by_any_number_of_threads() {
        let bytes: Vec<u8> = (0..=u8::MAX).cycle().take(250_000 * 5).collect();
        let slots: Vec<i32> = (0..200_000).map(|i| (i * 7919) % 250_000).collect();
        let mut expected = vec![0; 250_000 * 3];
        for i in 0..200_000 {
            expected[(i * 7919) % 250_000 * 3..][..3].copy_from_slice(&bytes[i * 5..][..3]);
        }
        let new = NewRows {
            bytes: &bytes,
            stride: 5,
        };
        for threads in [0, 1, 2, 5] {
            assert_eq!(run(250_000, new, &slots, threads), Ok(expected.clone()), "{threads}");
        }
    }

    #[test]
    fn of_equal_slots_the_last_counts() {
        let new = NewRows {
            bytes: &[1, 2, 3, 4, 5, 6],
            stride: 3,
        };
        assert_eq!(run(2, new, &[1, 1], 1), Ok(vec![0, 0, 0, 4, 5, 6]));
    }

    #[test]
    fn slots_outside_of_the_arena_and_missing_rows_are_refused() {
        let new = NewRows {
            bytes: &[1; 9],
            stride: 3,
        };
        for slots in [&[0, 4][..], &[-1], &[i32::MAX], &[0, 1, 2, 3]] {
            assert!(matches!(run(4, new, slots, 1), Err(Error::Config(_))), "{slots:?}");
        }
        assert_eq!(run(4, new, &[], 1), Ok(vec![0; 12]));
    }
}
