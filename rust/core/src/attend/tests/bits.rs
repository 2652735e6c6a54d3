//! Bits of a result, which depend on the keys of a query alone.

use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use super::HEADS;
use super::case::{Case, uninit};
use crate::attend::{DecodeInputs, DecodeOutputs, FloatsMut, InstructionSet, KeysValues, SharedMemory, decode};
use crate::error::Error;

#[test]
fn results_without_a_bias_keep_their_bits() -> Result<(), Error> {
    // FNV-1a of the outputs. The log-sum-exp is left out, because `ln` belongs to the system's library.
    let recorded = [
        ("avx512_bf16", 0x4052_3dcc_8a01_87a2),
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
