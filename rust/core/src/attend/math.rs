//! exp and tanh of vectors of 16 floats.

use super::vector::SimdOps;

/// `exp(x)` for x up to slightly above 0, with an error of at most 2 units in the last place.
///
/// The result is 0 where it would be subnormal, and NaN for NaN. The method is that of Cephes' `expf`, a polynomial of
/// r in x = n ln 2 + r.
#[inline(always)]
pub(crate) fn exp<S: SimdOps>(simd: S, x: S::Vector) -> S::Vector {
    const MIN_NORMAL_LOG: f32 = -87.336_54;
    let low = simd.splat(MIN_NORMAL_LOG);
    let y = simd.max(low, x);
    let n = simd.round(simd.mul(y, simd.splat(std::f32::consts::LOG2_E)));
    // ln 2 is split in two parts. The first has so few bits that its product with n is exact.
    let r = simd.fma(n, simd.splat(-0.693_359_4), y);
    let r = simd.fma(n, simd.splat(2.121_944_4e-4), r);
    let coefficients = [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5];
    let mut sum = simd.splat(1.987_569_1e-4);
    for c in coefficients {
        sum = simd.fma(sum, r, simd.splat(c));
    }
    let sum = simd.fma(sum, simd.mul(r, r), simd.add(r, simd.splat(1.0)));
    simd.select_less(x, low, simd.splat(0.0), simd.mul(sum, simd.exp2_integer(n)))
}

/// `tanh(x)` with an error of at most 4 units in the last place.
///
/// The method is Eigen's rational approximation on [-7.9, 7.9]. Outside of that interval tanh is -1 or 1 in fp32.
#[inline(always)]
pub(super) fn tanh<S: SimdOps>(simd: S, x: S::Vector) -> S::Vector {
    const SATURATION: f32 = 7.905_311;
    let x = simd.min(simd.splat(SATURATION), simd.max(simd.splat(-SATURATION), x));
    let square = simd.mul(x, x);
    let numerator = [
        2.000_188e-13,
        -8.604_672e-11,
        5.122_297e-8,
        1.485_722_4e-5,
        6.372_619e-4,
        4.893_524_6e-3,
    ];
    let denominator = [1.185_347_1e-4, 2.268_434_6e-3, 4.893_525e-3];
    let (mut p, mut q) = (simd.splat(-2.760_768_5e-16), simd.splat(1.198_258_4e-6));
    for c in numerator {
        p = simd.fma(p, square, simd.splat(c));
    }
    for c in denominator {
        q = simd.fma(q, square, simd.splat(c));
    }
    simd.div(simd.mul(x, p), q)
}
