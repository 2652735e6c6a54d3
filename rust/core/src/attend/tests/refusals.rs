//! Inputs that are refused, and table entries that are not read.

use super::case::{COLUMNS, Case, uninit};
use crate::attend::{DecodeOutputs, FloatsMut, InstructionSet, decode};
use crate::error::Error;

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
fn refuses_unknown_and_missing_instruction_sets() {
    assert!(InstructionSet::named("scalar").is_ok());
    for instructions in InstructionSet::all() {
        assert!(InstructionSet::named(instructions.name()).is_ok_and(|found| found.name() == instructions.name()));
    }
    for wrong in ["", "AVX2", "neon", "best"] {
        assert!(InstructionSet::named(wrong).is_err(), "{wrong}");
    }
}
