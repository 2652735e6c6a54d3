//! Sixteen floats at a time: what the walk needs of a CPU, and its plain form for every CPU.
//!
//! A value of a type of lanes exists only where the CPU has its instructions, so its methods are safe. All are inlined into a function that is
//! compiled for those instructions (`walk`).

/// Floats in a vector, on every path.
pub(super) const WIDTH: usize = 16;
/// A vector in memory.
pub(super) type Line = [f32; WIDTH];

/// The order in which the lanes of a vector are added on every path: `(a + b) + (c + d)` of each four, and so of the four sums.
pub(super) const TREE: [[usize; 4]; 4] = [[0, 8, 4, 12], [2, 10, 6, 14], [1, 9, 5, 13], [3, 11, 7, 15]];

/// Vectors of 16 floats.
pub(super) trait Lanes: Copy {
    /// A vector in registers.
    type V: Copy;
    /// How many of them the CPU has.
    const REGISTERS: usize;

    fn splat(self, x: f32) -> Self::V;
    fn load(self, x: &Line) -> Self::V;
    /// bf16 is the upper half of an f32, so this is exact.
    fn widen(self, x: &[u16; WIDTH]) -> Self::V;
    fn store(self, x: Self::V, to: &mut Line);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` if one is no number.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; `b` if one is no number.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest whole number.
    fn round(self, x: Self::V) -> Self::V;
    /// Two to the power of whole numbers from -126 to 127.
    fn exp2_whole(self, x: Self::V) -> Self::V;
    /// `x` where `a < b`, else `y`.
    fn where_less(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// The sum of each of four vectors, in the order of [`TREE`].
    fn sums(self, x: [Self::V; 4]) -> [f32; 4];
    /// The sum of a vector, in the order of [`TREE`].
    fn sum(self, x: Self::V) -> f32;
    fn largest(self, x: Self::V) -> f32;
    /// Asks for the cache line of `x`, into the second-level cache: more lines can be on their way there than to the first.
    fn prefetch<T>(self, _x: &T) {}
}

/// An element of keys and values in memory.
pub(super) trait Element: Copy {
    fn load<L: Lanes>(lanes: L, x: &[Self; WIDTH]) -> L::V;
    fn float(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    fn load<L: Lanes>(lanes: L, x: &Line) -> L::V {
        lanes.load(x)
    }
    #[inline(always)]
    fn float(self) -> f32 {
        self
    }
}

/// The bits of a bf16.
impl Element for u16 {
    #[inline(always)]
    fn load<L: Lanes>(lanes: L, x: &[u16; WIDTH]) -> L::V {
        lanes.widen(x)
    }
    #[inline(always)]
    fn float(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }
}

/// For every CPU: plain loops, which the compiler turns into the vectors that all CPUs of the target have.
#[derive(Clone, Copy)]
pub(super) struct Scalar;

#[inline(always)]
fn each(a: Line, b: Line, op: impl Fn(f32, f32) -> f32) -> Line {
    std::array::from_fn(|i| op(a[i], b[i]))
}

impl Lanes for Scalar {
    type V = Line;
    const REGISTERS: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> Line {
        [x; WIDTH]
    }
    #[inline(always)]
    fn load(self, x: &Line) -> Line {
        *x
    }
    #[inline(always)]
    fn widen(self, x: &[u16; WIDTH]) -> Line {
        std::array::from_fn(|i| x[i].float())
    }
    #[inline(always)]
    fn store(self, x: Line, to: &mut Line) {
        *to = x;
    }
    #[inline(always)]
    fn add(self, a: Line, b: Line) -> Line {
        each(a, b, |x, y| x + y)
    }
    #[inline(always)]
    fn mul(self, a: Line, b: Line) -> Line {
        each(a, b, |x, y| x * y)
    }
    #[inline(always)]
    fn div(self, a: Line, b: Line) -> Line {
        each(a, b, |x, y| x / y)
    }
    #[inline(always)]
    fn fma(self, a: Line, b: Line, c: Line) -> Line {
        self.add(self.mul(a, b), c) // `f32::mul_add` is a call where the target has no such instruction
    }
    #[inline(always)]
    fn max(self, a: Line, b: Line) -> Line {
        each(a, b, |x, y| if x > y { x } else { y })
    }
    #[inline(always)]
    fn min(self, a: Line, b: Line) -> Line {
        each(a, b, |x, y| if x < y { x } else { y })
    }
    #[inline(always)]
    fn round(self, x: Line) -> Line {
        const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves no bits for a fraction
        std::array::from_fn(|i| (x[i] + SHIFT) - SHIFT)
    }
    #[inline(always)]
    fn exp2_whole(self, x: Line) -> Line {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a whole number from -126 to 127; what is no number may become any power"
        )]
        std::array::from_fn(|i| f32::from_bits(((x[i] as i32).wrapping_add(127) << 23).cast_unsigned()))
    }
    #[inline(always)]
    fn where_less(self, a: Line, b: Line, x: Line, y: Line) -> Line {
        std::array::from_fn(|i| if a[i] < b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn sums(self, x: [Line; 4]) -> [f32; 4] {
        std::array::from_fn(|i| self.sum(x[i]))
    }
    #[inline(always)]
    fn sum(self, x: Line) -> f32 {
        let [a, b, c, d] = TREE.map(|[a, b, c, d]| (x[a] + x[b]) + (x[c] + x[d]));
        (a + b) + (c + d)
    }
    #[inline(always)]
    fn largest(self, x: Line) -> f32 {
        x.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}
