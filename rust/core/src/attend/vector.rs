//! Vectors of 16 floats: the operations that attention needs of a CPU, and a portable implementation.
//!
//! The attention code is generic over [`SimdOps`]. A value of an implementing type exists only on a CPU that has the
//! type's instructions, so all methods are safe to call. Every method is inlined into a function that is compiled for
//! those instructions (`task::run`).

use super::output::round_to_bf16;

/// Floats per vector, the same on every instruction set.
pub(crate) const LANES: usize = 16;
/// One vector in memory.
pub(crate) type F32x16 = [f32; LANES];

/// Order in which the 16 lanes of a vector are added, the same for every instruction set.
///
/// Each row of four is added as `(a + b) + (c + d)`. The four row sums are added the same way.
pub(crate) const SUM_ORDER: [[usize; 4]; 4] = [[0, 8, 4, 12], [2, 10, 6, 14], [1, 9, 5, 13], [3, 11, 7, 15]];

/// Operations on vectors of 16 floats.
pub(crate) trait SimdOps: Copy {
    /// A vector in registers.
    type Vector: Copy;
    /// Number of vectors of 16 floats that the registers of the CPU can hold.
    const NUM_REGISTERS: usize;

    fn splat(self, x: f32) -> Self::Vector;
    fn load(self, x: &F32x16) -> Self::Vector;
    /// Loads 16 bf16 numbers as fp32. The conversion is exact, since bf16 is the upper half of an fp32.
    fn load_bf16(self, x: &[u16; LANES]) -> Self::Vector;
    /// Loads 16 words as the bits of a vector.
    #[inline(always)]
    fn load_bits(self, x: &[u32; LANES]) -> Self::Vector {
        self.load(&x.map(f32::from_bits))
    }
    fn store(self, x: Self::Vector, to: &mut F32x16);
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn div(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a * b + c`.
    fn fma(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// The larger of `a` and `b` in each lane, `b` if one of them is NaN.
    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// The smaller of `a` and `b` in each lane, `b` if one of them is NaN.
    fn min(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// Rounds to the nearest integer.
    fn round(self, x: Self::Vector) -> Self::Vector;
    /// Two to the power of `x`, for integers from -126 to 127.
    fn exp2_integer(self, x: Self::Vector) -> Self::Vector;
    /// `x` in lanes where `a < b`, `y` in all others.
    fn select_less(self, a: Self::Vector, b: Self::Vector, x: Self::Vector, y: Self::Vector) -> Self::Vector;
    /// Sum over the lanes of each of four vectors, in [`SUM_ORDER`].
    fn reduce_sum4(self, x: [Self::Vector; 4]) -> [f32; 4];
    /// Sum over the lanes of a vector, in [`SUM_ORDER`].
    fn reduce_sum(self, x: Self::Vector) -> f32;
    /// Largest lane of a vector.
    fn reduce_max(self, x: Self::Vector) -> f32;
    /// Vectors of which element `j` of vector `i` is element `i` of vector `j` of `x`.
    #[inline(always)]
    fn transpose(self, x: [Self::Vector; LANES]) -> [Self::Vector; LANES] {
        let (mut rows, mut columns) = ([[0.0; LANES]; LANES], x);
        for (x, row) in x.into_iter().zip(&mut rows) {
            self.store(x, row);
        }
        for (i, column) in columns.iter_mut().enumerate() {
            *column = self.load(&rows.map(|row| row[i]));
        }
        columns
    }
    /// Prefetches the cache line of an address, which may be any.
    fn prefetch<T>(self, _x: *const T) {}
    /// Stores the nearest bf16 numbers, with ties to even.
    fn store_bf16(self, x: Self::Vector, to: &mut [u16; LANES]);
    /// `x` times two to the power of `n`, for integers from -126 to 127.
    #[inline(always)]
    fn mul_exp2(self, x: Self::Vector, n: Self::Vector) -> Self::Vector {
        self.mul(x, self.exp2_integer(n))
    }
}

/// Element type of keys and values in memory: `f32`, or `u16` for the bits of a bf16.
pub(crate) trait Element: Copy {
    fn load<S: SimdOps>(simd: S, x: &[Self; LANES]) -> S::Vector;
    fn to_f32(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    fn load<S: SimdOps>(simd: S, x: &F32x16) -> S::Vector {
        simd.load(x)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for u16 {
    #[inline(always)]
    fn load<S: SimdOps>(simd: S, x: &[u16; LANES]) -> S::Vector {
        simd.load_bf16(x)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }
}

/// Portable loops, which the compiler vectorizes with the baseline instructions of the target.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

#[inline(always)]
fn map2(a: F32x16, b: F32x16, op: impl Fn(f32, f32) -> f32) -> F32x16 {
    std::array::from_fn(|i| op(a[i], b[i]))
}

impl SimdOps for Scalar {
    type Vector = F32x16;
    const NUM_REGISTERS: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> F32x16 {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &F32x16) -> F32x16 {
        *x
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> F32x16 {
        std::array::from_fn(|i| x[i].to_f32())
    }
    #[inline(always)]
    fn store(self, x: F32x16, to: &mut F32x16) {
        *to = x;
    }
    #[inline(always)]
    fn add(self, a: F32x16, b: F32x16) -> F32x16 {
        map2(a, b, |x, y| x + y)
    }
    #[inline(always)]
    fn mul(self, a: F32x16, b: F32x16) -> F32x16 {
        map2(a, b, |x, y| x * y)
    }
    #[inline(always)]
    fn div(self, a: F32x16, b: F32x16) -> F32x16 {
        map2(a, b, |x, y| x / y)
    }
    #[inline(always)]
    fn fma(self, a: F32x16, b: F32x16, c: F32x16) -> F32x16 {
        // `f32::mul_add` is a library call on targets without an FMA instruction.
        self.add(self.mul(a, b), c)
    }
    #[inline(always)]
    fn max(self, a: F32x16, b: F32x16) -> F32x16 {
        map2(a, b, |x, y| if x > y { x } else { y })
    }
    #[inline(always)]
    fn min(self, a: F32x16, b: F32x16) -> F32x16 {
        map2(a, b, |x, y| if x < y { x } else { y })
    }
    #[inline(always)]
    fn round(self, x: F32x16) -> F32x16 {
        // 1.5 * 2^23. The sum with it has no bits left for a fraction.
        const SHIFT: f32 = 12_582_912.0;
        std::array::from_fn(|i| (x[i] + SHIFT) - SHIFT)
    }
    #[inline(always)]
    fn exp2_integer(self, x: F32x16) -> F32x16 {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "callers pass integers from -126 to 127; the result for NaN is unspecified"
        )]
        std::array::from_fn(|i| f32::from_bits(((x[i] as i32).wrapping_add(127) << 23).cast_unsigned()))
    }
    #[inline(always)]
    fn select_less(self, a: F32x16, b: F32x16, x: F32x16, y: F32x16) -> F32x16 {
        std::array::from_fn(|i| if a[i] < b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn reduce_sum4(self, x: [F32x16; 4]) -> [f32; 4] {
        std::array::from_fn(|i| self.reduce_sum(x[i]))
    }
    #[inline(always)]
    fn reduce_sum(self, x: F32x16) -> f32 {
        let [a, b, c, d] = SUM_ORDER.map(|[a, b, c, d]| (x[a] + x[b]) + (x[c] + x[d]));
        (a + b) + (c + d)
    }
    #[inline(always)]
    fn reduce_max(self, x: F32x16) -> f32 {
        x.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    fn store_bf16(self, x: F32x16, to: &mut [u16; LANES]) {
        *to = x.map(round_to_bf16);
    }
}
