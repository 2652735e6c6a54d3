//! [`SimdOps`] on AVX2: 16 floats in two registers.

#![expect(
    clippy::cast_ptr_alignment,
    reason = "the loads behind these casts accept any alignment"
)]

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _CMP_LT_OQ, _CMP_UNORD_Q, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _MM_HINT_T1,
    _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_loadu_si128, _mm_max_ps, _mm_max_ss, _mm_movehl_ps, _mm_prefetch,
    _mm_shuffle_ps, _mm_storeu_ps, _mm_unpacklo_ps, _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256,
    _mm256_blendv_epi8, _mm256_blendv_ps, _mm256_castps_si256, _mm256_castps256_ps128, _mm256_castsi256_ps,
    _mm256_cmp_ps, _mm256_cvtepu16_epi32, _mm256_cvtps_epi32, _mm256_div_ps, _mm256_extractf128_ps, _mm256_fmadd_ps,
    _mm256_hadd_ps, _mm256_loadu_ps, _mm256_max_ps, _mm256_min_ps, _mm256_mul_ps, _mm256_packus_epi32,
    _mm256_permute2f128_ps, _mm256_permute4x64_epi64, _mm256_round_ps, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_shuffle_ps, _mm256_slli_epi32, _mm256_srli_epi32, _mm256_storeu_ps, _mm256_storeu_si256,
};

use super::vector::{F32x16, LANES, SimdOps};

/// Proof that the CPU has AVX2 and FMA. [`Avx2::new`] is the only way to make a value.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// `None` on a CPU without these instructions.
    pub(super) fn new() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Self(()))
    }
}

/// Applies one intrinsic to both registers of each operand.
macro_rules! both {
    ($op:ident, $($x:expr),+) => {
        // SAFETY: `self` proves that the CPU has AVX2 and FMA, which these intrinsics need. They access no memory.
        unsafe { [$op($($x[0]),+), $op($($x[1]),+)] }
    };
}

impl SimdOps for Avx2 {
    type Vector = [__m256; 2];
    const NUM_REGISTERS: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::Vector {
        // SAFETY: `self` proves that the CPU has AVX2. No memory is accessed.
        [unsafe { _mm256_set1_ps(x) }; 2]
    }
    #[inline(always)]
    fn load(self, x: &F32x16) -> Self::Vector {
        let from = x.as_ptr();
        // SAFETY: `self` proves that the CPU has AVX2. The loads accept any alignment and read
        // floats 0..8 and 8..16 of an array of 16.
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> Self::Vector {
        let from = x.as_ptr().cast::<__m128i>();
        // SAFETY: `self` proves that the CPU has AVX2. The loads accept any alignment and read the
        // two halves of an array of 32 bytes.
        unsafe {
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from)))),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(
                    from.add(1),
                )))),
            ]
        }
    }
    #[inline(always)]
    fn store(self, x: Self::Vector, to: &mut F32x16) {
        let to = to.as_mut_ptr();
        // SAFETY: `self` proves that the CPU has AVX2. The stores accept any alignment and write
        // floats 0..8 and 8..16 of an array of 16.
        unsafe {
            _mm256_storeu_ps(to, x[0]);
            _mm256_storeu_ps(to.add(8), x[1]);
        }
    }
    #[inline(always)]
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        both!(_mm256_add_ps, a, b)
    }
    #[inline(always)]
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        both!(_mm256_mul_ps, a, b)
    }
    #[inline(always)]
    fn div(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        both!(_mm256_div_ps, a, b)
    }
    #[inline(always)]
    fn fma(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector {
        both!(_mm256_fmadd_ps, a, b, c)
    }
    #[inline(always)]
    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        both!(_mm256_max_ps, a, b)
    }
    #[inline(always)]
    fn min(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        both!(_mm256_min_ps, a, b)
    }
    #[inline(always)]
    fn round(self, x: Self::Vector) -> Self::Vector {
        const MODE: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: `self` proves that the CPU has AVX2. No memory is accessed.
        unsafe { [_mm256_round_ps::<MODE>(x[0]), _mm256_round_ps::<MODE>(x[1])] }
    }
    #[inline(always)]
    fn exp2_integer(self, x: Self::Vector) -> Self::Vector {
        // SAFETY: `self` proves that the CPU has AVX2. No memory is accessed.
        unsafe {
            let bias = _mm256_set1_epi32(127);
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(
                    _mm256_cvtps_epi32(x[0]),
                    bias,
                ))),
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(
                    _mm256_cvtps_epi32(x[1]),
                    bias,
                ))),
            ]
        }
    }
    #[inline(always)]
    fn select_less(self, a: Self::Vector, b: Self::Vector, x: Self::Vector, y: Self::Vector) -> Self::Vector {
        // SAFETY: `self` proves that the CPU has AVX2. No memory is accessed.
        unsafe {
            [
                _mm256_blendv_ps(y[0], x[0], _mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0])),
                _mm256_blendv_ps(y[1], x[1], _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1])),
            ]
        }
    }
    #[inline(always)]
    fn reduce_sum4(self, x: [Self::Vector; 4]) -> [f32; 4] {
        let mut out = [0.0; 4];
        // SAFETY: `self` proves that the CPU has AVX2. The store accepts any alignment and writes
        // the four floats of `out`.
        unsafe {
            let [a, b, c, d] = [
                _mm256_add_ps(x[0][0], x[0][1]),
                _mm256_add_ps(x[1][0], x[1][1]),
                _mm256_add_ps(x[2][0], x[2][1]),
                _mm256_add_ps(x[3][0], x[3][1]),
            ];
            // Four partial sums of each vector.
            let ab = _mm256_add_ps(
                _mm256_permute2f128_ps::<0x20>(a, b),
                _mm256_permute2f128_ps::<0x31>(a, b),
            );
            let cd = _mm256_add_ps(
                _mm256_permute2f128_ps::<0x20>(c, d),
                _mm256_permute2f128_ps::<0x31>(c, d),
            );
            // Two partial sums of each vector.
            let acbd = _mm256_add_ps(_mm256_shuffle_ps::<0x44>(ab, cd), _mm256_shuffle_ps::<0xEE>(ab, cd));
            // Sums of a, c, a, c in the lower half and of b, d, b, d in the upper half.
            let one = _mm256_hadd_ps(acbd, acbd);
            _mm_storeu_ps(
                out.as_mut_ptr(),
                _mm_unpacklo_ps(_mm256_castps256_ps128(one), _mm256_extractf128_ps::<1>(one)),
            );
        }
        out
    }
    #[inline(always)]
    fn reduce_sum(self, x: Self::Vector) -> f32 {
        // SAFETY: `self` proves that the CPU has AVX2. No memory is accessed.
        unsafe {
            let eight = _mm256_add_ps(x[0], x[1]);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    fn reduce_max(self, x: Self::Vector) -> f32 {
        // SAFETY: `self` proves that the CPU has AVX2. No memory is accessed.
        unsafe {
            let eight = _mm256_max_ps(x[0], x[1]);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    fn prefetch<T>(self, x: *const T) {
        // SAFETY: every CPU with AVX2 has this instruction. A prefetch is a hint that is valid for any address and has
        // no effect on memory.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(x.cast()) }
    }
    #[inline(always)]
    fn store_bf16(self, x: Self::Vector, to: &mut [u16; LANES]) {
        // SAFETY: `self` proves that the CPU has AVX2. The store accepts any alignment and writes
        // the 32 bytes of `to`.
        unsafe {
            let halves = x.map(|x| {
                let bits = _mm256_castps_si256(x);
                let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
                let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
                let kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0_0000), nan);
                _mm256_srli_epi32::<16>(kept)
            });
            // The instruction interleaves the 128-bit lanes of its operands.
            let packed = _mm256_permute4x64_epi64::<0xD8>(_mm256_packus_epi32(halves[0], halves[1]));
            _mm256_storeu_si256(to.as_mut_ptr().cast::<__m256i>(), packed);
        }
    }
}
