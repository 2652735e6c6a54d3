//! Tests of decode attention.

mod bits;
mod case;
mod math;
mod reads;
mod reference;
mod refusals;
mod tasks;

/// Query heads, kv heads and head dims.
const HEADS: [(usize, usize, usize); 7] = [
    (4, 4, 64),
    (6, 2, 80),
    (3, 1, 96),
    (2, 2, 128),
    (7, 1, 256),
    (2, 2, 20),
    (2, 1, 3),
];
