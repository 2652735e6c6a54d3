//! Every instruction set of this CPU against an fp64 reference.

use super::HEADS;
use super::case::{Case, uninit};
use crate::attend::{DecodeInputs, DecodeOutputs, FloatsMut, InstructionSet, KeysValues, decode};
use crate::error::Error;

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
