//! Sixteen floats in two AVX2 registers.

#![expect(
    clippy::cast_ptr_alignment,
    reason = "the loads behind these casts take any alignment"
)]

use std::arch::x86_64::{
    __m128i, __m256, _CMP_LT_OQ, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _MM_HINT_T1, _mm_add_ps, _mm_add_ss,
    _mm_cvtss_f32, _mm_loadu_si128, _mm_max_ps, _mm_max_ss, _mm_movehl_ps, _mm_prefetch, _mm_shuffle_ps, _mm_storeu_ps,
    _mm_unpacklo_ps, _mm256_add_epi32, _mm256_add_ps, _mm256_blendv_ps, _mm256_castps256_ps128, _mm256_castsi256_ps,
    _mm256_cmp_ps, _mm256_cvtepu16_epi32, _mm256_cvtps_epi32, _mm256_div_ps, _mm256_extractf128_ps, _mm256_fmadd_ps,
    _mm256_hadd_ps, _mm256_loadu_ps, _mm256_max_ps, _mm256_min_ps, _mm256_mul_ps, _mm256_permute2f128_ps,
    _mm256_round_ps, _mm256_set1_epi32, _mm256_set1_ps, _mm256_shuffle_ps, _mm256_slli_epi32, _mm256_storeu_ps,
};

use super::vector::{Lanes, Line, WIDTH};

/// Exists only where the CPU has AVX2 and FMA.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    pub(super) fn new() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Self(()))
    }
}

/// Two registers at once.
macro_rules! both {
    ($op:ident, $($x:expr),+) => {
        // SAFETY: `self` exists, so the CPU has AVX2 and FMA, all that these instructions need; they touch no memory.
        unsafe { [$op($($x[0]),+), $op($($x[1]),+)] }
    };
}

impl Lanes for Avx2 {
    type V = [__m256; 2];
    const REGISTERS: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        // SAFETY: `self` exists, so the CPU has AVX2; no memory is touched.
        [unsafe { _mm256_set1_ps(x) }; 2]
    }
    #[inline(always)]
    fn load(self, x: &Line) -> Self::V {
        let from = x.as_ptr();
        // SAFETY: `self` exists, so the CPU has AVX2. The loads take any alignment and read floats 0..8 and 8..16 of an array of 16.
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }
    #[inline(always)]
    fn widen(self, x: &[u16; WIDTH]) -> Self::V {
        let from = x.as_ptr().cast::<__m128i>();
        // SAFETY: `self` exists, so the CPU has AVX2. The loads take any alignment and read the 2 x 16 bytes of an array of 32 bytes.
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
    fn store(self, x: Self::V, to: &mut Line) {
        let to = to.as_mut_ptr();
        // SAFETY: `self` exists, so the CPU has AVX2. The stores take any alignment and write floats 0..8 and 8..16 of an array of 16.
        unsafe {
            _mm256_storeu_ps(to, x[0]);
            _mm256_storeu_ps(to.add(8), x[1]);
        }
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        both!(_mm256_add_ps, a, b)
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        both!(_mm256_mul_ps, a, b)
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        both!(_mm256_div_ps, a, b)
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        both!(_mm256_fmadd_ps, a, b, c)
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        both!(_mm256_max_ps, a, b)
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        both!(_mm256_min_ps, a, b)
    }
    #[inline(always)]
    fn round(self, x: Self::V) -> Self::V {
        const HOW: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: `self` exists, so the CPU has AVX2; no memory is touched.
        unsafe { [_mm256_round_ps::<HOW>(x[0]), _mm256_round_ps::<HOW>(x[1])] }
    }
    #[inline(always)]
    fn exp2_whole(self, x: Self::V) -> Self::V {
        // SAFETY: `self` exists, so the CPU has AVX2; no memory is touched.
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
    fn where_less(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V {
        // SAFETY: `self` exists, so the CPU has AVX2; no memory is touched.
        unsafe {
            [
                _mm256_blendv_ps(y[0], x[0], _mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0])),
                _mm256_blendv_ps(y[1], x[1], _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1])),
            ]
        }
    }
    #[inline(always)]
    fn sums(self, x: [Self::V; 4]) -> [f32; 4] {
        let mut out = [0.0; 4];
        // SAFETY: `self` exists, so the CPU has AVX2. The store takes any alignment and writes the four floats of `out`.
        unsafe {
            let [a, b, c, d] = [
                _mm256_add_ps(x[0][0], x[0][1]),
                _mm256_add_ps(x[1][0], x[1][1]),
                _mm256_add_ps(x[2][0], x[2][1]),
                _mm256_add_ps(x[3][0], x[3][1]),
            ];
            let ab = _mm256_add_ps(
                _mm256_permute2f128_ps::<0x20>(a, b),
                _mm256_permute2f128_ps::<0x31>(a, b),
            ); // four numbers each
            let cd = _mm256_add_ps(
                _mm256_permute2f128_ps::<0x20>(c, d),
                _mm256_permute2f128_ps::<0x31>(c, d),
            );
            let acbd = _mm256_add_ps(_mm256_shuffle_ps::<0x44>(ab, cd), _mm256_shuffle_ps::<0xEE>(ab, cd)); // two numbers each
            let one = _mm256_hadd_ps(acbd, acbd); // a c a c | b d b d
            _mm_storeu_ps(
                out.as_mut_ptr(),
                _mm_unpacklo_ps(_mm256_castps256_ps128(one), _mm256_extractf128_ps::<1>(one)),
            );
        }
        out
    }
    #[inline(always)]
    fn sum(self, x: Self::V) -> f32 {
        // SAFETY: `self` exists, so the CPU has AVX2; no memory is touched.
        unsafe {
            let eight = _mm256_add_ps(x[0], x[1]);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    fn largest(self, x: Self::V) -> f32 {
        // SAFETY: `self` exists, so the CPU has AVX2; no memory is touched.
        unsafe {
            let eight = _mm256_max_ps(x[0], x[1]);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    fn prefetch<T>(self, x: &T) {
        // SAFETY: a hint; every CPU with AVX2 has it, and it changes nothing whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(x).cast()) }
    }
}
