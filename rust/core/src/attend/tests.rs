//! Every instruction set of this CPU against an fp64 reference, and inputs that are refused.

mod case;

use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use super::plan::Plan;
use super::vector::{LANES, Scalar, SimdOps};
use super::{DecodeInputs, DecodeOutputs, FloatsMut, InstructionSet, KeysValues, SharedMemory, decode, math};
use crate::error::Error;
use case::{COLUMNS, Case, uninit};

const HEADS: [(usize, usize, usize); 7] = [
    (4, 4, 64),
    (6, 2, 80),
    (3, 1, 96),
    (2, 2, 128),
    (7, 1, 256),
    (2, 2, 20),
    (2, 1, 3),
];

#[test]
fn matches_the_fp64_reference() -> Result<(), Error> {
    for instructions in InstructionSet::all() {
        for (i, (heads, kv_heads, head_dim)) in HEADS.into_iter().enumerate() {
            for (window, softcap) in [(0, 0.0), (10, 0.0), (1, 0.0), (90, 2.0)] {
                let case = Case {
                    window,
                    softcap,
                    ..Case::new(heads, kv_heads, head_dim)
                };
                let (o, lse) = case.run(1 + i % 2, instructions)?;
                let error = case.error(&o, &lse);
                assert!(
                    error < 2e-5,
                    "{}: {heads}/{kv_heads} of {head_dim}, window {window}, cap {softcap}: {error}",
                    instructions.name()
                );
            }
        }
    }
    Ok(())
}

#[test]
fn rows_without_own_keys_see_their_blocks_alone() -> Result<(), Error> {
    for instructions in InstructionSet::all() {
        for (rows, heads) in [(3, (4, 4, 64)), (24, (4, 2, 80)), (20, (2, 1, 3))] {
            let base = Case::shared(rows, heads);
            let case = Case {
                lens: base.lens.iter().map(|n| if *n == 20 { 20 } else { 0 }).collect(),
                ..base
            };
            let (o, lse) = case.run(2, instructions)?;
            assert!(case.error(&o, &lse) < 2e-5, "{} {heads:?}", instructions.name());
            let numbers = heads.0 * heads.2;
            for i in [0, 1, 2] {
                let alone = case.alone(i).run(1, instructions)?;
                assert_eq!(
                    (&o[i * numbers..][..numbers], &lse[i * heads.0..][..heads.0]),
                    (&*alone.0, &*alone.1)
                );
            }
        }
    }
    Ok(())
}

#[test]
fn results_without_a_bias_keep_their_bits() -> Result<(), Error> {
    // FNV-1a of the outputs. The log-sum-exp is left out, because `ln` belongs to the system's library.
    let recorded = [
        ("avx512", 0x4052_3dcc_8a01_87a2),
        ("avx2", 0x4052_3dcc_8a01_87a2),
        ("scalar", 0x09a8_29e2_2495_f65b),
    ];
    for instructions in InstructionSet::all() {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for (rows, heads) in [(3, (4, 4, 64)), (24, (4, 2, 80)), (20, (2, 1, 3)), (5, (7, 1, 256))] {
            for (window, softcap) in [(0, 0.0), (100, 0.0), (120, 2.0)] {
                let case = Case {
                    window,
                    softcap,
                    ..Case::shared(rows, heads)
                };
                for byte in case
                    .run(2, instructions)?
                    .0
                    .iter()
                    .flat_map(|x| x.to_bits().to_le_bytes())
                {
                    hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
                }
            }
        }
        assert!(
            recorded.contains(&(instructions.name(), hash)),
            "{}: {hash:#x}",
            instructions.name()
        );
    }
    Ok(())
}

/// Largest distances of a bias: none, less and more than the keys of a block.
const DISTANCES: [usize; 3] = [1, 30, 400];

#[test]
fn a_bias_matches_the_fp64_reference_alone_and_in_a_batch() -> Result<(), Error> {
    for instructions in InstructionSet::all() {
        for (i, heads) in HEADS.into_iter().enumerate() {
            let (rows, max_distance) = ([3, 24, 20][i % 3], DISTANCES[i % 2 + usize::from(i > 3)]);
            for window in [0, 100] {
                let case = Case {
                    window,
                    ..Case::shared(rows, heads).with_bias(max_distance)
                };
                let (o, lse) = case.run(2, instructions)?;
                let error = case.error(&o, &lse);
                assert!(
                    error < 2e-5,
                    "{} {heads:?}, window {window}: {error}",
                    instructions.name()
                );
                let numbers = heads.0 * heads.2;
                for i in (0..rows).step_by(5) {
                    let alone = case.alone(i).run(1, instructions)?;
                    assert_eq!(
                        (&o[i * numbers..][..numbers], &lse[i * heads.0..][..heads.0]),
                        (&*alone.0, &*alone.1)
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn the_reference_detects_a_wrong_bias() -> Result<(), Error> {
    let case = Case::new(6, 2, 64).with_bias(30);
    let (o, lse) = case.run(1, InstructionSet::selected()?)?;
    let with = |change: &dyn Fn(&mut Case)| {
        let mut other = Case::new(6, 2, 64).with_bias(30);
        change(&mut other);
        other.error(&o, &lse)
    };
    assert!(with(&|_| ()) < 2e-5);
    assert!(with(&|c| c.bias.rotate_left(1)) > 1e-3, "off by one");
    assert!(with(&|c| c.bias.rotate_left(61)) > 1e-3, "another head");
    assert!(
        with(&|c| c.uses.iter_mut().for_each(|u| u[1] += 1)) > 1e-3,
        "a prefix one token nearer"
    );
    assert!(with(&|c| c.bias.clear()) > 1e-3, "dropped");
    Ok(())
}

#[test]
fn refuses_a_bias_of_the_wrong_size_or_with_a_soft_cap() -> Result<(), Error> {
    let instructions = InstructionSet::selected()?;
    let changes: [Change<'_>; 4] = [
        ("short", &|c| c.bias.truncate(120)),
        ("another distance", &|c| c.max_distance = 29),
        ("far too large a distance", &|c| c.max_distance = usize::MAX),
        ("cap", &|c| c.softcap = 1.0),
    ];
    for (name, change) in changes {
        let mut case = Case::new(2, 2, 16).with_bias(30);
        change(&mut case);
        assert!(matches!(case.run(1, instructions), Err(Error::Config(_))), "{name}");
    }
    Ok(())
}

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
fn the_reference_detects_wrong_inputs() -> Result<(), Error> {
    let case = Case::new(6, 2, 64);
    let (o, lse) = case.run(1, InstructionSet::selected()?)?;
    let with = |change: &dyn Fn(&mut Case)| {
        let mut other = Case {
            window: case.window,
            ..Case::new(6, 2, 64)
        };
        change(&mut other);
        other.error(&o, &lse)
    };
    assert!(with(&|_| ()) < 2e-5);
    assert!(with(&|c| c.block[0][0] += 1) > 1e-3, "a prefix row off by one");
    assert!(with(&|c| c.block[1][1] -= 1) > 1e-3, "a prefix row short");
    assert!(with(&|c| c.use_indptr = vec![0, 1, 1, 2]) > 1e-3, "a use dropped");
    assert!(with(&|c| c.lens[1] -= 1) > 1e-3, "the last key dropped");
    assert!(with(&|c| c.window = 60) > 1e-3, "a window");
    assert!(with(&|c| c.row.swap(0, 1)) > 1e-3, "another row's slots");
    Ok(())
}

#[test]
fn bf16_memory_gives_the_result_of_the_same_numbers_in_fp32() -> Result<(), Error> {
    for instructions in InstructionSet::all() {
        let mut case = Case::new(4, 2, 80);
        let narrow = |x: &[f32]| -> Vec<u16> {
            x.iter()
                .map(|x| u16::try_from(x.to_bits() >> 16).unwrap_or(0))
                .collect()
        };
        let (k, v) = (narrow(&case.k), narrow(&case.v));
        for (wide, bits) in [(&mut case.k, &k), (&mut case.v, &v)] {
            *wide = bits.iter().map(|x| f32::from_bits(u32::from(*x) << 16)).collect();
        }
        let expected = case.run(1, instructions)?;
        let (mut o, mut lse) = (vec![0.0; case.q.len()], vec![0.0; 12]);
        let bf16 = KeysValues::Bf16 {
            k: k.as_slice().into(),
            v: v.as_slice().into(),
        };
        for (own, prefix) in [(bf16, bf16), (case.inputs().own, bf16), (bf16, case.inputs().own)] {
            let inputs = DecodeInputs {
                own,
                prefix,
                ..case.inputs()
            };
            decode(
                &inputs,
                DecodeOutputs {
                    o: FloatsMut::F32(uninit(&mut o)),
                    lse: uninit(&mut lse),
                },
                2,
                instructions,
            )?;
            assert_eq!((&o, &lse), (&expected.0, &expected.1), "{}", instructions.name());
        }
    }
    Ok(())
}

/// Name of a change, and the function that makes it.
type Change<'a> = (&'a str, &'a dyn Fn(&mut Case));

#[test]
fn refuses_invalid_tables_and_writes_nothing() -> Result<(), Error> {
    let instructions = InstructionSet::selected()?;
    let changes: [Change<'_>; 17] = [
        ("slot beyond the arena", &|c| c.table[165] = 400),
        ("negative slot", &|c| c.table[165] = -1),
        ("neither keys nor blocks", &|c| c.lens[1] = 0),
        ("negative length", &|c| c.lens[1] = -5),
        ("more keys than columns", &|c| c.lens[0] = 81),
        ("row beyond the table", &|c| c.row[0] = 3),
        ("negative row", &|c| c.row[0] = i32::MIN),
        ("too few rows", &|c| c.row.truncate(2)),
        ("too short a table", &|c| c.table.truncate(239)),
        ("block beyond the prefix", &|c| c.block[0] = [311, 90]),
        ("block far beyond", &|c| c.block[0] = [i32::MAX, i32::MAX]),
        ("negative block", &|c| c.block[1] = [-1, 5]),
        ("use of a block beyond the table", &|c| c.uses[1][0] = 2),
        ("use of a negative block", &|c| c.uses[0][0] = -2),
        ("descending uses", &|c| c.use_indptr = vec![0, 3, 2, 3]),
        ("uses beyond their table", &|c| c.use_indptr[3] = 4),
        ("uses of a row missing", &|c| c.use_indptr.truncate(3)),
    ];
    for (name, change) in changes {
        let mut case = Case::new(2, 2, 16);
        change(&mut case);
        assert!(matches!(case.run(2, instructions), Err(Error::Config(_))), "{name}");
    }
    Ok(())
}

#[test]
fn invisible_slot_table_entries_are_not_read() -> Result<(), Error> {
    let mut case = Case::new(2, 2, 16);
    case.table[2 * COLUMNS + 70..].fill(i32::MIN);
    let before = case.run(1, InstructionSet::selected()?)?;
    assert!(case.error(&before.0, &before.1) < 2e-5);
    Ok(())
}

#[test]
fn refuses_memory_of_the_wrong_size() -> Result<(), Error> {
    let instructions = InstructionSet::selected()?;
    let changes: [Change<'_>; 6] = [
        ("short queries", &|c| c.q.truncate(3 * 32 - 1)),
        ("short keys", &|c| c.k.truncate(399 * 32)),
        ("half a row", &|c| {
            c.k.truncate(32 * 399 + 1);
            c.v.truncate(32 * 399 + 1);
        }),
        ("head dim", &|c| c.shape.head_dim = 257),
        ("no kv heads", &|c| c.shape.kv_heads = 0),
        ("heads", &|c| c.shape.kv_heads = 3),
    ];
    for (name, change) in changes {
        let mut case = Case::new(2, 2, 16);
        change(&mut case);
        let (mut o, mut lse) = (vec![0.0; 96], vec![0.0; 6]);
        let result = decode(
            &case.inputs(),
            DecodeOutputs {
                o: FloatsMut::F32(uninit(&mut o)),
                lse: uninit(&mut lse),
            },
            1,
            instructions,
        );
        assert!(matches!(result, Err(Error::Config(_))), "{name}");
    }
    let case = Case::new(2, 2, 16);
    let result = decode(
        &case.inputs(),
        DecodeOutputs {
            o: FloatsMut::F32(uninit(&mut [0.0; 95])),
            lse: uninit(&mut [0.0; 6]),
        },
        1,
        instructions,
    );
    assert!(matches!(result, Err(Error::Config(_))), "short output");
    Ok(())
}

#[test]
fn other_rows_may_be_written_during_a_call() -> Result<(), Error> {
    let case = Case::shared(24, (4, 2, 64));
    let expected = case.run(2, InstructionSet::selected()?)?;
    let (mut k, mut v) = (case.k.clone(), case.v.clone());
    let size = k.len();
    // The tables name the rows up to 93, 100 to 104 and those from 110 on.
    let free = 95 * 128..99 * 128;
    let (keys, values) = (k.as_mut_ptr(), v.as_mut_ptr());
    // SAFETY: the vectors outlive the calls, and the loop below writes only to rows that the tables do not name.
    let memory = unsafe {
        KeysValues::F32 {
            k: SharedMemory::new(keys, size),
            v: SharedMemory::new(values, size),
        }
    };
    let inputs = DecodeInputs {
        own: memory,
        prefix: memory,
        ..case.inputs()
    };
    let stop = AtomicBool::new(false);
    let writer = AtomicPtr::new(keys);
    std::thread::scope(|scope| {
        let (stop, writer, free) = (&stop, &writer, free.clone());
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                for i in free.clone() {
                    // SAFETY: the element lies in the vector, in a row that only this thread accesses.
                    unsafe { writer.load(Ordering::Relaxed).add(i).write(f32::NAN) };
                }
            }
        });
        let mut results = Vec::new();
        for _ in 0..20 {
            let (mut o, mut lse) = (vec![0.0; case.q.len()], vec![0.0; 96]);
            let output = DecodeOutputs {
                o: FloatsMut::F32(uninit(&mut o)),
                lse: uninit(&mut lse),
            };
            results.push(decode(&inputs, output, 2, InstructionSet::all()[0]).map(|()| (o, lse)));
        }
        stop.store(true, Ordering::Relaxed);
        assert!(results.into_iter().all(|result| result == Ok(expected.clone())));
    });
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
fn a_row_alone_and_in_a_batch_gives_the_same_bits() -> Result<(), Error> {
    for (i, heads) in HEADS.into_iter().enumerate() {
        // 24 and 20 rows are enough to transpose the queries, and leave some lanes unused.
        let rows = [3, 24, 20][i % 3];
        for (window, softcap) in [(0, 0.0), (100, 0.0), (120, 2.0)] {
            let case = Case {
                window,
                softcap,
                ..Case::shared(rows, heads)
            };
            for instructions in InstructionSet::all() {
                let (o, lse) = case.run(1, instructions)?;
                assert_eq!((o.clone(), lse.clone()), case.run(2, instructions)?);
                assert!(case.error(&o, &lse) < 2e-5, "{} {heads:?}", instructions.name());
                let numbers = heads.0 * heads.2;
                for i in (0..rows).step_by(6) {
                    let expected = (
                        o[i * numbers..][..numbers].to_vec(),
                        lse[i * heads.0..][..heads.0].to_vec(),
                    );
                    assert_eq!(
                        case.alone(i).run(1, instructions)?,
                        expected,
                        "{} {heads:?}, window {window}, row {i}",
                        instructions.name()
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_row_may_see_a_block_twice() -> Result<(), Error> {
    for instructions in InstructionSet::all() {
        let mut case = Case::shared(20, (2, 2, 32));
        case.use_indptr[4..].iter_mut().for_each(|border| *border += 1);
        case.uses.insert(5, [0, -185, 1]); // row 3 sees block 0 twice
        let (o, lse) = case.run(1, instructions)?;
        assert!(case.error(&o, &lse) < 2e-5, "{}", instructions.name());
        let alone = case.alone(3).run(1, instructions)?;
        assert_eq!((&o[3 * 64..4 * 64], &lse[6..8]), (&*alone.0, &*alone.1));
    }
    Ok(())
}

#[test]
fn the_numbers_of_blocks_do_not_affect_a_bit() -> Result<(), Error> {
    for instructions in InstructionSet::all() {
        for rows in [3, 24] {
            let case = Case::shared(rows, (4, 2, 48));
            let mut other = Case::shared(rows, (4, 2, 48));
            other.block.swap(0, 1);
            other.uses.iter_mut().for_each(|[block, ..]| *block = 1 - *block);
            assert_eq!(case.run(2, instructions)?, other.run(2, instructions)?);
            other.uses[..2].swap(0, 1); // another composition, so that the comparison can fail
            assert_ne!(case.run(2, instructions)?, other.run(2, instructions)?);
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

#[test]
fn nan_and_infinite_queries_do_not_affect_other_queries() -> Result<(), Error> {
    for instructions in InstructionSet::all() {
        let mut case = Case::shared(20, (2, 2, 16));
        case.q[5] = f32::NAN;
        case.q[64..80].fill(f32::INFINITY); // row 2
        case.k.iter_mut().for_each(|k| *k = -k.abs() - 0.1);
        let (o, lse) = case.run(1, instructions)?;
        assert!(lse[0].is_nan() && o[..16].iter().all(|x| x.is_nan()));
        assert!(lse[4].to_bits() == f32::NEG_INFINITY.to_bits());
        assert!(o[64..80].iter().all(|x| x.to_bits() == 0.0_f32.to_bits()));
        let alone = case.alone(2).run(1, instructions)?;
        assert_eq!(alone.1, lse[4..6]);
        assert!(lse[1..4].iter().chain(&lse[5..]).all(|x| x.is_finite()));
        assert!(o[16..64].iter().chain(&o[80..]).all(|x| x.is_finite()));
        case.k[10 * 32 + 3] = f32::NAN; // the first head of a key that all rows see
        let (o, lse) = case.run(1, instructions)?;
        assert!(lse.iter().step_by(2).all(|x| x.is_nan()));
        assert!(lse[1..].iter().step_by(2).all(|x| x.is_finite()));
        assert!(o.as_chunks::<16>().0.iter().step_by(2).all(|o| o[0].is_nan()));
    }
    Ok(())
}

#[test]
fn exp_and_tanh_are_accurate() {
    let mut worst = (0.0_f64, 0.0_f64);
    for i in 0..20_000_u16 {
        let (x, y) = (-f32::from(i) * 0.00435, f32::from(i) * 0.0005 - 5.0);
        let got = math::exp(Scalar, Scalar.splat(x))[0];
        worst.0 = worst.0.max((f64::from(got) / f64::from(x).exp() - 1.0).abs());
        let got = math::tanh(Scalar, [y; LANES])[0];
        let expected = f64::from(y).tanh();
        worst.1 = worst
            .1
            .max((f64::from(got) - expected).abs() / expected.abs().max(1e-30));
    }
    assert!(worst.0 < 3e-7 && worst.1 < 6e-7, "{worst:?}");
    let edge = [
        f32::NEG_INFINITY,
        -1e30,
        -88.0,
        0.0,
        -0.0,
        f32::NAN,
        -87.3,
        -1e-10,
        0.,
        0.,
        0.,
        0.,
        0.,
        0.,
        0.,
        0.,
    ];
    let got = math::exp(Scalar, edge);
    assert_eq!(got[..5], [0.0, 0.0, 0.0, 1.0, 1.0]);
    assert!(got[5].is_nan() && got[6] > 0.0);
}

#[test]
fn nan_and_infinity_propagate() -> Result<(), Error> {
    for instructions in InstructionSet::all() {
        let mut case = Case::new(2, 2, 16);
        case.q[5] = f32::NAN;
        case.v[(110 + 3) * 32] = f32::INFINITY; // the second key of row 1
        let (o, lse) = case.run(1, instructions)?;
        assert!(lse[0].is_nan() && o[..16].iter().all(|x| x.is_nan()));
        assert!(lse[1..].iter().all(|x| x.is_finite()));
        assert!(o[32].is_infinite() && o[33].is_finite());
    }
    Ok(())
}

#[test]
fn refuses_unknown_and_missing_instruction_sets() {
    assert!(InstructionSet::named("scalar").is_ok());
    for instructions in InstructionSet::all() {
        assert!(InstructionSet::named(instructions.name()).is_ok_and(|found| found.name() == instructions.name()));
    }
    for wrong in ["", "AVX2", "neon", "best"] {
        assert!(InstructionSet::named(wrong).is_err(), "{wrong}");
    }
}
