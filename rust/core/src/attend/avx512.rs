//! [`SimdOps`] on AVX-512: 16 floats in one register.

#![expect(
    clippy::cast_ptr_alignment,
    reason = "the loads behind these casts accept any alignment"
)]

use std::arch::x86_64::{
    __m256i, __m512, _CMP_LT_OQ, _CMP_UNORD_Q, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _MM_HINT_T0, _mm_prefetch,
    _mm_storeu_ps, _mm256_loadu_si256, _mm256_storeu_si256, _mm512_add_epi32, _mm512_add_ps, _mm512_and_si512,
    _mm512_castpd_ps, _mm512_castps_pd, _mm512_castps_si512, _mm512_castps512_ps128, _mm512_castsi512_ps,
    _mm512_cmp_ps_mask, _mm512_cvtepi32_epi16, _mm512_cvtepu16_epi32, _mm512_cvtps_epi32, _mm512_div_ps,
    _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_mov_epi32, _mm512_mask_mov_ps, _mm512_max_ps, _mm512_min_ps,
    _mm512_mul_ps, _mm512_permute_ps, _mm512_permutexvar_ps, _mm512_reduce_add_ps, _mm512_reduce_max_ps,
    _mm512_roundscale_ps, _mm512_scalef_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setr_epi32, _mm512_shuffle_f32x4,
    _mm512_slli_epi32, _mm512_srli_epi32, _mm512_storeu_ps, _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd,
    _mm512_unpacklo_ps,
};

use super::vector::{F32x16, LANES, SimdOps};

/// Proof that the CPU has AVX-512F, AVX2 and FMA. [`Avx512::new`] is the only way to make a value.
///
/// Decode attention does not use the bf16 dot products of AVX512-BF16, because they would round softmax weights to 8
/// bits, and because it waits for memory.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// `None` on a CPU without these instructions.
    pub(super) fn new() -> Option<Self> {
        let all =
            is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        all.then_some(Self(()))
    }
}

/// Proof that the CPU has AVX-512F and AVX512-BF16. [`Avx512Bf16::new`] is the only way to make a value.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Bf16(());

impl Avx512Bf16 {
    /// `None` on a CPU without these instructions.
    pub(super) fn new() -> Option<Self> {
        (is_x86_feature_detected!("avx512bf16") && Avx512::new().is_some()).then_some(Self(()))
    }

    /// Whether the dot products are faster than products in fp32.
    ///
    /// They are on AMD's CPUs, the only ones with `sse4a`. On a Xeon of model 207 dense attention of 2 x 12 heads over
    /// 400 tokens of 64 dims takes 27 ms with them and 18 ms without.
    pub(super) fn is_fast() -> bool {
        is_x86_feature_detected!("sse4a")
    }
}

/// Applies one intrinsic to its operands.
macro_rules! one {
    ($op:ident, $($x:expr),+) => {
        // SAFETY: `self` proves that the CPU has AVX-512F, which this intrinsic needs. It accesses no memory.
        unsafe { $op($($x),+) }
    };
}

impl SimdOps for Avx512 {
    type Vector = __m512;
    const NUM_REGISTERS: usize = 32;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        one!(_mm512_set1_ps, x)
    }
    #[inline(always)]
    fn load(self, x: &F32x16) -> __m512 {
        // SAFETY: `self` proves that the CPU has AVX-512F. The load accepts any alignment and reads
        // the 16 floats of `x`.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> __m512 {
        // SAFETY: `self` proves that the CPU has AVX-512F. The load accepts any alignment and reads
        // the 32 bytes of `x`.
        unsafe {
            let half = _mm256_loadu_si256(x.as_ptr().cast::<__m256i>());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
        }
    }
    #[inline(always)]
    fn store(self, x: __m512, to: &mut F32x16) {
        // SAFETY: `self` proves that the CPU has AVX-512F. The store accepts any alignment and writes
        // the 16 floats of `to`.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        one!(_mm512_add_ps, a, b)
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        one!(_mm512_mul_ps, a, b)
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        one!(_mm512_div_ps, a, b)
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        one!(_mm512_fmadd_ps, a, b, c)
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        one!(_mm512_max_ps, a, b)
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        one!(_mm512_min_ps, a, b)
    }
    #[inline(always)]
    fn round(self, x: __m512) -> __m512 {
        const MODE: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: `self` proves that the CPU has AVX-512F. No memory is accessed.
        unsafe { _mm512_roundscale_ps::<MODE>(x) }
    }
    #[inline(always)]
    fn exp2_integer(self, x: __m512) -> __m512 {
        // SAFETY: `self` proves that the CPU has AVX-512F. No memory is accessed.
        unsafe {
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(
                _mm512_cvtps_epi32(x),
                _mm512_set1_epi32(127),
            )))
        }
    }
    #[inline(always)]
    fn select_less(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        // SAFETY: `self` proves that the CPU has AVX-512F. No memory is accessed.
        unsafe { _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), x) }
    }
    #[inline(always)]
    fn reduce_sum4(self, x: [__m512; 4]) -> [f32; 4] {
        let mut out = [0.0; 4];
        // SAFETY: `self` proves that the CPU has AVX-512F. The store accepts any alignment and writes
        // the four floats of `out`.
        unsafe {
            // Eight partial sums of each vector.
            let ab = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0x44>(x[0], x[1]),
                _mm512_shuffle_f32x4::<0xEE>(x[0], x[1]),
            );
            let cd = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0x44>(x[2], x[3]),
                _mm512_shuffle_f32x4::<0xEE>(x[2], x[3]),
            );
            // Four partial sums of each vector.
            let four = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0x88>(ab, cd),
                _mm512_shuffle_f32x4::<0xDD>(ab, cd),
            );
            let two = _mm512_add_ps(four, _mm512_permute_ps::<0x4E>(four));
            let one = _mm512_add_ps(two, _mm512_permute_ps::<0xB1>(two));
            let first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
            _mm_storeu_ps(
                out.as_mut_ptr(),
                _mm512_castps512_ps128(_mm512_permutexvar_ps(first, one)),
            );
        }
        out
    }
    #[inline(always)]
    fn reduce_sum(self, x: __m512) -> f32 {
        one!(_mm512_reduce_add_ps, x)
    }
    #[inline(always)]
    fn reduce_max(self, x: __m512) -> f32 {
        one!(_mm512_reduce_max_ps, x)
    }
    #[inline(always)]
    fn load_bits(self, x: &[u32; LANES]) -> __m512 {
        // SAFETY: `self` proves that the CPU has AVX-512F. The load accepts any alignment and reads the 64 bytes of
        // `x`.
        unsafe { _mm512_loadu_ps(x.as_ptr().cast()) }
    }
    #[inline(always)]
    fn transpose(self, x: [__m512; LANES]) -> [__m512; LANES] {
        let (mut two, mut four, mut all) = (x, x, x);
        // SAFETY: `self` proves that the CPU has AVX-512F. No memory is accessed.
        unsafe {
            for i in (0..LANES).step_by(2) {
                two[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
                two[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
            }
            for i in (0..LANES).step_by(4) {
                for j in 0..2 {
                    let (a, b) = (_mm512_castps_pd(two[i + j]), _mm512_castps_pd(two[i + j + 2]));
                    four[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                    four[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
                }
            }
            // Vector 4 i + j holds elements j, j + 4, j + 8 and j + 12 of vectors 4 i to 4 i + 3 of `x`.
            for j in 0..4 {
                let low = _mm512_shuffle_f32x4::<0x44>(four[j], four[4 + j]);
                let high = _mm512_shuffle_f32x4::<0xEE>(four[j], four[4 + j]);
                let low_2 = _mm512_shuffle_f32x4::<0x44>(four[8 + j], four[12 + j]);
                let high_2 = _mm512_shuffle_f32x4::<0xEE>(four[8 + j], four[12 + j]);
                all[j] = _mm512_shuffle_f32x4::<0x88>(low, low_2);
                all[4 + j] = _mm512_shuffle_f32x4::<0xDD>(low, low_2);
                all[8 + j] = _mm512_shuffle_f32x4::<0x88>(high, high_2);
                all[12 + j] = _mm512_shuffle_f32x4::<0xDD>(high, high_2);
            }
        }
        all
    }
    #[inline(always)]
    fn prefetch<T>(self, x: *const T) {
        // SAFETY: every CPU with AVX-512F has this instruction. A prefetch is a hint that is valid for any address and
        // has no effect on memory.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(x.cast()) }
    }
    #[inline(always)]
    fn store_bf16(self, x: __m512, to: &mut [u16; LANES]) {
        // SAFETY: `self` proves that the CPU has AVX-512F. The store accepts any alignment and writes
        // the 32 bytes of `to`.
        unsafe {
            let bits = _mm512_castps_si512(x);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
            let kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0_0000));
            let half = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(kept));
            _mm256_storeu_si256(to.as_mut_ptr().cast::<__m256i>(), half);
        }
    }
    #[inline(always)]
    fn mul_exp2(self, x: __m512, n: __m512) -> __m512 {
        one!(_mm512_scalef_ps, x, n)
    }
}
