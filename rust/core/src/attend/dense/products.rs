//! The two ways to multiply: in fp32, and with the bf16 dot products of AVX512-BF16.
//!
//! A dot product adds two products of bf16 numbers to an fp32 sum. The two numbers of a factor lie in one lane of a
//! vector, of which only the bits count.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256bh, __m256i, __m512, __m512bh, _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_cvtneps_pbh,
    _mm512_dpbf16_ps, _mm512_or_si512, _mm512_slli_epi32,
};
#[cfg(target_arch = "x86_64")]
use std::mem::transmute;

#[cfg(target_arch = "x86_64")]
use super::super::avx512::{Avx512, Avx512Bf16};
use super::super::vector::SimdOps;

/// A way to multiply.
pub(super) trait Products<S: SimdOps>: Copy {
    /// Numbers of one factor in a lane.
    const PACKED: usize;
    /// The product of `a` and `b`, added to `sum`.
    fn add(self, a: S::Vector, b: S::Vector, sum: S::Vector) -> S::Vector;
    /// `a` and `b`, rounded to bf16, in one vector. Only called if two numbers lie in a lane.
    fn pack(self, a: S::Vector, b: S::Vector) -> S::Vector;
}

/// Products of floats.
#[derive(Clone, Copy)]
pub(super) struct Fma<S>(pub(super) S);

impl<S: SimdOps> Products<S> for Fma<S> {
    const PACKED: usize = 1;
    #[inline(always)]
    fn add(self, a: S::Vector, b: S::Vector, sum: S::Vector) -> S::Vector {
        self.0.fma(a, b, sum)
    }
    #[inline(always)]
    fn pack(self, a: S::Vector, _: S::Vector) -> S::Vector {
        a
    }
}

#[cfg(target_arch = "x86_64")]
impl Products<Avx512> for Avx512Bf16 {
    const PACKED: usize = 2;
    #[inline(always)]
    fn add(self, a: __m512, b: __m512, sum: __m512) -> __m512 {
        // SAFETY: `self` proves that the CPU has the instruction. All types are 512 bits without invalid values.
        unsafe { _mm512_dpbf16_ps(sum, transmute::<__m512, __m512bh>(a), transmute::<__m512, __m512bh>(b)) }
    }
    #[inline(always)]
    fn pack(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves that the CPU has the instructions. Rounded numbers are 256 bits of either type.
        unsafe {
            let low = _mm512_cvtepu16_epi32(transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(a)));
            let high = _mm512_cvtepu16_epi32(transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(b)));
            _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32::<16>(high)))
        }
    }
}
