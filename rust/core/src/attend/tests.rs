//! Every path of this CPU against plain sums in fp64, and what must be refused.

use super::plan::Plan;
use super::vector::{Lanes, Scalar, WIDTH};
use super::{Floats, FloatsMut, Output, Problem, Shape, Simd, Source, Tables, decode, math};
use crate::error::Error;

/// Numbers from -1 to 1.
fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        u16::try_from(state >> 48).map_or(0.0, |bits| f32::from(bits) / 32768.0 - 1.0)
    };
    (0..count).map(|_| next()).collect()
}

/// A step: rows of 70, 3 and 20 keys in slots that ascend by 3, blocks of 90 and 5 rows at 4 and 100; row 0 sees both, row 2 the first.
struct Case {
    shape: Shape,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    table: Vec<i32>,
    row: Vec<i32>,
    lens: Vec<i32>,
    block: Vec<[i32; 2]>,
    user_indptr: Vec<i32>,
    user: Vec<i32>,
    user_pos: Vec<i32>,
    user_slides: Vec<i32>,
    window: usize,
    softcap: f32,
}

const ARENA: usize = 400;
const COLUMNS: usize = 80;

impl Case {
    fn new(heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        let size = ARENA * kv_heads * head_dim;
        Self {
            shape: Shape {
                rows: 3,
                heads,
                kv_heads,
                head_dim,
            },
            q: random(3 * heads * head_dim, 1),
            k: random(size, 2),
            v: random(size, 3),
            table: (0..240).map(|i| 110 + (i * 3) % 290).collect(),
            row: vec![2, 0, 1],
            lens: vec![70, 3, 20],
            block: vec![[4, 90], [100, 5]],
            user_indptr: vec![0, 2, 3],
            user: vec![0, 2, 0],
            user_pos: vec![-164, -109, -74],
            user_slides: vec![1, 0, 1],
            window: 0,
            softcap: 0.0,
        }
    }

    /// So many rows, of the keys of the three in turn, that all see the first block.
    fn crowd(rows: usize, (heads, kv_heads, head_dim): (usize, usize, usize)) -> Self {
        let three = Self::new(heads, kv_heads, head_dim);
        let number = |x: usize| i32::try_from(x).unwrap_or(i32::MAX);
        let each = |of: [i32; 3]| (0..rows).map(|i| of[i % 3]).collect::<Vec<_>>();
        let lens = each([70, 3, 20]);
        Self {
            shape: Shape { rows, ..three.shape },
            q: random(rows * heads * head_dim, 4),
            row: each([2, 0, 1]),
            user_indptr: vec![0, number(rows), number(rows) + 1],
            user: (0..number(rows)).chain([0]).collect(),
            user_pos: lens.iter().map(|n| -94 - n).chain([-74]).collect(),
            user_slides: vec![1; rows + 1],
            lens,
            ..three
        }
    }

    /// Row `i` as a batch of its own.
    fn alone(&self, i: usize) -> Self {
        let numbers = self.shape.heads * self.shape.head_dim;
        let second = usize::from(i == 0);
        Self {
            shape: Shape { rows: 1, ..self.shape },
            q: self.q[i * numbers..][..numbers].to_vec(),
            k: self.k.clone(),
            v: self.v.clone(),
            table: self.table.clone(),
            row: vec![self.row[i]],
            lens: vec![self.lens[i]],
            block: self.block.clone(),
            user_indptr: if i == 0 { vec![0, 1, 2] } else { vec![0, 1, 1] },
            user: vec![0; 1 + second],
            user_pos: [self.user_pos[i], -74][..=second].to_vec(),
            user_slides: vec![1; 1 + second],
            ..*self
        }
    }

    fn problem(&self) -> Problem<'_> {
        let source = Source::F32 { k: &self.k, v: &self.v };
        let Shape { heads, head_dim, .. } = self.shape;
        Problem {
            shape: self.shape,
            q: Floats::F32(&self.q),
            q_strides: [heads * head_dim, head_dim],
            own: source,
            prefix: source,
            tables: Tables {
                table: &self.table,
                table_shape: [3, COLUMNS, COLUMNS],
                row: &self.row,
                lens: &self.lens,
                block: &self.block,
                user_indptr: &self.user_indptr,
                user: &self.user,
                user_pos: &self.user_pos,
                user_slides: &self.user_slides,
            },
            scale: 0.3,
            window: self.window,
            softcap: self.softcap,
        }
    }

    fn run(&self, threads: usize, simd: Simd) -> Result<(Vec<f32>, Vec<f32>), Error> {
        let mut o = vec![7.0; self.q.len()];
        let mut lse = vec![7.0; self.shape.rows * self.shape.heads];
        let output = Output {
            o: FloatsMut::F32(&mut o),
            lse: &mut lse,
        };
        let done = decode(&self.problem(), output, threads, simd);
        assert!(
            done.is_ok() || o.iter().chain(&lse).all(|x| x.to_bits() == 7.0_f32.to_bits()),
            "refused, but written to"
        );
        done.map(|()| (o, lse))
    }

    /// Arena rows that a query row sees.
    fn seen(&self, row: usize) -> Vec<usize> {
        let mut out = Vec::new();
        let index = |x: i32| usize::try_from(x).unwrap_or(usize::MAX);
        for (c, [start, rows]) in self.block.iter().enumerate() {
            for e in index(self.user_indptr[c])..index(self.user_indptr[c + 1]) {
                let hidden = |j: &i32| {
                    self.window > 0 && self.user_slides[e] == 1 && index(-(self.user_pos[e] + j)) >= self.window
                };
                if index(self.user[e]) == row {
                    out.extend((0..*rows).filter(|j| !hidden(j)).map(|j| index(start + j)));
                }
            }
        }
        let length = index(self.lens[row]);
        let from = if self.window == 0 {
            0
        } else {
            length.saturating_sub(self.window)
        };
        out.extend(
            self.table[index(self.row[row]) * COLUMNS..][from..length]
                .iter()
                .map(|s| index(*s)),
        );
        out
    }

    /// The largest difference from plain sums.
    fn error(&self, o: &[f32], lse: &[f32]) -> f64 {
        let Shape {
            rows,
            heads,
            kv_heads,
            head_dim,
        } = self.shape;
        let mut worst = 0.0_f64;
        for (row, h) in (0..rows).flat_map(|row| (0..heads).map(move |h| (row, h))) {
            let query = &self.q[(row * heads + h) * head_dim..][..head_dim];
            let place = |slot: usize| (slot * kv_heads + h / (heads / kv_heads)) * head_dim;
            let slots = self.seen(row);
            let scores: Vec<f64> = slots
                .iter()
                .map(|s| {
                    let dot: f64 = query
                        .iter()
                        .zip(&self.k[place(*s)..])
                        .map(|(a, b)| f64::from(*a) * f64::from(*b))
                        .sum();
                    let cap = f64::from(self.softcap);
                    if cap > 0.0 {
                        cap * (dot * f64::from(0.3_f32) / cap).tanh()
                    } else {
                        dot * f64::from(0.3_f32)
                    }
                })
                .collect();
            let sum: f64 = scores.iter().map(|s| s.exp()).sum();
            worst = worst.max((f64::from(lse[row * heads + h]) - sum.ln()).abs());
            for d in 0..head_dim {
                let all: f64 = slots
                    .iter()
                    .zip(&scores)
                    .map(|(slot, s)| s.exp() * f64::from(self.v[place(*slot) + d]))
                    .sum();
                worst = worst.max((f64::from(o[(row * heads + h) * head_dim + d]) - all / sum).abs());
            }
        }
        worst
    }
}

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
fn equals_plain_sums() -> Result<(), Error> {
    for simd in Simd::all() {
        for (i, (heads, kv_heads, head_dim)) in HEADS.into_iter().enumerate() {
            for (window, softcap) in [(0, 0.0), (10, 0.0), (1, 0.0), (90, 2.0)] {
                let case = Case {
                    window,
                    softcap,
                    ..Case::new(heads, kv_heads, head_dim)
                };
                let (o, lse) = case.run(1 + i % 2, simd)?;
                let error = case.error(&o, &lse);
                assert!(
                    error < 2e-5,
                    "{}: {heads}/{kv_heads} of {head_dim}, window {window}, cap {softcap}: {error}",
                    simd.name()
                );
            }
        }
    }
    Ok(())
}

#[test]
fn the_comparison_sees_mistakes() -> Result<(), Error> {
    let case = Case::new(6, 2, 64);
    let (o, lse) = case.run(1, Simd::chosen()?)?;
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
    assert!(with(&|c| c.user_indptr = vec![0, 2, 2]) > 1e-3, "a use dropped");
    assert!(with(&|c| c.lens[1] -= 1) > 1e-3, "the last key dropped");
    assert!(with(&|c| c.window = 60) > 1e-3, "a window");
    assert!(with(&|c| c.row.swap(0, 1)) > 1e-3, "another row's slots");
    Ok(())
}

#[test]
fn bf16_memory_gives_what_its_numbers_give_in_fp32() -> Result<(), Error> {
    for simd in Simd::all() {
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
        let expected = case.run(1, simd)?;
        let (mut o, mut lse) = (vec![0.0; case.q.len()], vec![0.0; 12]);
        let source = Source::Bf16 { k: &k, v: &v };
        for (own, prefix) in [
            (source, source),
            (case.problem().own, source),
            (source, case.problem().own),
        ] {
            let problem = Problem {
                own,
                prefix,
                ..case.problem()
            };
            decode(
                &problem,
                Output {
                    o: FloatsMut::F32(&mut o),
                    lse: &mut lse,
                },
                2,
                simd,
            )?;
            assert_eq!((&o, &lse), (&expected.0, &expected.1), "{}", simd.name());
        }
    }
    Ok(())
}

/// A name and what it does to a case.
type Change<'a> = (&'a str, &'a dyn Fn(&mut Case));

#[test]
fn refuses_tables_that_do_not_fit_and_writes_nothing() -> Result<(), Error> {
    let simd = Simd::chosen()?;
    let changes: [Change<'_>; 17] = [
        ("slot beyond the arena", &|c| c.table[165] = 400),
        ("negative slot", &|c| c.table[165] = -1),
        ("no keys", &|c| c.lens[1] = 0),
        ("negative length", &|c| c.lens[1] = -5),
        ("more keys than columns", &|c| c.lens[0] = 81),
        ("row beyond the table", &|c| c.row[0] = 3),
        ("negative row", &|c| c.row[0] = i32::MIN),
        ("too few rows", &|c| c.row.truncate(2)),
        ("too short a table", &|c| c.table.truncate(239)),
        ("block beyond the prefix", &|c| c.block[0] = [311, 90]),
        ("block far beyond", &|c| c.block[0] = [i32::MAX, i32::MAX]),
        ("negative block", &|c| c.block[1] = [-1, 5]),
        ("user beyond the rows", &|c| c.user[1] = 3),
        ("negative user", &|c| c.user[0] = -2),
        ("descending users", &|c| c.user_indptr = vec![0, 3, 2]),
        ("users beyond their table", &|c| {
            c.user_indptr = vec![0, 2, 4];
        }),
        ("a position missing", &|c| c.user_pos.truncate(2)),
    ];
    for (name, change) in changes {
        let mut case = Case::new(2, 2, 16);
        change(&mut case);
        assert!(matches!(case.run(2, simd), Err(Error::Config(_))), "{name}");
    }
    Ok(())
}

#[test]
fn entries_that_nobody_sees_are_not_read() -> Result<(), Error> {
    let mut case = Case::new(2, 2, 16);
    case.table[2 * COLUMNS + 70..].fill(i32::MIN);
    let before = case.run(1, Simd::chosen()?)?;
    assert!(case.error(&before.0, &before.1) < 2e-5);
    Ok(())
}

#[test]
fn refuses_memory_that_does_not_fit() -> Result<(), Error> {
    let simd = Simd::chosen()?;
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
        let done = decode(
            &case.problem(),
            Output {
                o: FloatsMut::F32(&mut o),
                lse: &mut lse,
            },
            1,
            simd,
        );
        assert!(matches!(done, Err(Error::Config(_))), "{name}");
    }
    let case = Case::new(2, 2, 16);
    let done = decode(
        &case.problem(),
        Output {
            o: FloatsMut::F32(&mut [0.0; 95]),
            lse: &mut [0.0; 6],
        },
        1,
        simd,
    );
    assert!(matches!(done, Err(Error::Config(_))), "short output");
    Ok(())
}

#[test]
fn tasks_are_every_row_and_head_once() -> Result<(), Error> {
    for threads in [1, 2, 3, 16, 1000] {
        for (heads, kv_heads, head_dim) in HEADS {
            let case = Case::new(heads, kv_heads, head_dim);
            let plan = Plan::new(&case.problem(), threads)?;
            let mut seen = vec![0; 3 * kv_heads];
            for task in &plan.tasks {
                for (row, h) in task.rows.clone().flat_map(|r| task.heads.clone().map(move |h| (r, h))) {
                    seen[plan.rows[row].number * kv_heads + h] += 1;
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
fn a_row_alone_gives_the_same_bits() -> Result<(), Error> {
    for (i, heads) in HEADS.into_iter().enumerate() {
        let rows = [3, 24, 20][i % 3]; // the last ones enough for one query in each lane, with lanes left over
        for (window, softcap) in [(0, 0.0), (100, 0.0), (120, 2.0)] {
            let case = Case {
                window,
                softcap,
                ..Case::crowd(rows, heads)
            };
            for simd in Simd::all() {
                let (o, lse) = case.run(1, simd)?;
                assert_eq!((o.clone(), lse.clone()), case.run(2, simd)?);
                assert!(case.error(&o, &lse) < 2e-5, "{} {heads:?}", simd.name());
                let numbers = heads.0 * heads.2;
                for i in (0..rows).step_by(6) {
                    let expected = (
                        o[i * numbers..][..numbers].to_vec(),
                        lse[i * heads.0..][..heads.0].to_vec(),
                    );
                    assert_eq!(
                        case.alone(i).run(1, simd)?,
                        expected,
                        "{} {heads:?}, window {window}, row {i}",
                        simd.name()
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_row_of_many_may_see_a_block_twice() -> Result<(), Error> {
    for simd in Simd::all() {
        let mut case = Case::crowd(20, (2, 2, 32));
        case.user_indptr = vec![0, 21, 22];
        case.user.insert(4, 3);
        case.user_pos.insert(4, case.user_pos[3]);
        case.user_slides.push(1);
        let (o, lse) = case.run(1, simd)?;
        assert!(case.error(&o, &lse) < 2e-5, "{}", simd.name());
    }
    Ok(())
}

#[test]
fn tasks_even_the_threads_out() -> Result<(), Error> {
    for (runs, threads) in [(1, 2), (2, 2), (3, 2), (3, 4), (4, 2), (5, 4), (12, 8), (32, 2)] {
        let number = |x: usize| i32::try_from(x).unwrap_or(i32::MAX);
        let case = Case {
            block: (0..number(runs)).map(|i| [i, 90]).collect(),
            user_indptr: (0..=number(runs)).map(|i| i * 2).collect(),
            user: (0..number(runs) * 2).collect(),
            ..Case::crowd(2 * runs, (8, 8, 64))
        };
        let case = Case {
            user_pos: vec![-100; 2 * runs],
            user_slides: vec![0; 2 * runs],
            lens: vec![20; 2 * runs],
            ..case
        };
        let plan = Plan::new(&case.problem(), threads)?;
        let mut busy = vec![0; threads];
        for task in &plan.tasks {
            if let Some(first) = busy.iter_mut().min() {
                *first += task.rows.len() * task.heads.len(); // rows of one length: as much work each
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
fn one_query_of_many_may_have_no_number_or_nothing_but_infinities() -> Result<(), Error> {
    for simd in Simd::all() {
        let mut case = Case::crowd(20, (2, 2, 16));
        case.q[5] = f32::NAN;
        case.q[64..80].fill(f32::INFINITY); // row 2
        case.k.iter_mut().for_each(|k| *k = -k.abs() - 0.1);
        let (o, lse) = case.run(1, simd)?;
        assert!(lse[0].is_nan() && o[..16].iter().all(|x| x.is_nan()));
        assert!(lse[4].to_bits() == f32::NEG_INFINITY.to_bits());
        assert!(o[64..80].iter().all(|x| x.to_bits() == 0.0_f32.to_bits()));
        let alone = case.alone(2).run(1, simd)?;
        assert_eq!(alone.1, lse[4..6]);
        assert!(lse[1..4].iter().chain(&lse[5..]).all(|x| x.is_finite()));
        assert!(o[16..64].iter().chain(&o[80..]).all(|x| x.is_finite()));
        case.k[10 * 32 + 3] = f32::NAN; // the first head of a row of the block that all see
        let (o, lse) = case.run(1, simd)?;
        assert!(lse.iter().step_by(2).all(|x| x.is_nan()));
        assert!(lse[1..].iter().step_by(2).all(|x| x.is_finite()));
        assert!(o.as_chunks::<16>().0.iter().step_by(2).all(|o| o[0].is_nan()));
    }
    Ok(())
}

#[test]
fn exp_and_tanh_are_close() {
    let mut worst = (0.0_f64, 0.0_f64);
    for i in 0..20_000_u16 {
        let (x, y) = (-f32::from(i) * 0.00435, f32::from(i) * 0.0005 - 5.0);
        let got = math::exp(Scalar, Scalar.splat(x))[0];
        worst.0 = worst.0.max((f64::from(got) / f64::from(x).exp() - 1.0).abs());
        let got = math::tanh(Scalar, [y; WIDTH])[0];
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
fn what_is_no_number_stays_none() -> Result<(), Error> {
    for simd in Simd::all() {
        let mut case = Case::new(2, 2, 16);
        case.q[5] = f32::NAN;
        case.v[(110 + 3) * 32] = f32::INFINITY; // the second key of row 1
        let (o, lse) = case.run(1, simd)?;
        assert!(lse[0].is_nan() && o[..16].iter().all(|x| x.is_nan()));
        assert!(lse[1..].iter().all(|x| x.is_finite()));
        assert!(o[32].is_infinite() && o[33].is_finite());
    }
    Ok(())
}

#[test]
fn only_instructions_that_are_there_can_be_named() {
    assert!(Simd::named("scalar").is_ok());
    for simd in Simd::all() {
        assert!(Simd::named(simd.name()).is_ok_and(|found| found.name() == simd.name()));
    }
    for wrong in ["", "AVX2", "neon", "best"] {
        assert!(Simd::named(wrong).is_err(), "{wrong}");
    }
}
