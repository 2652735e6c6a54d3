//! exp and tanh of 16 floats.

use super::vector::Lanes;

/// `exp(x)` for x up to 0 (and a little over) to 2 units in the last place; 0 where the result would be subnormal. What is no number stays none.
///
/// Cephes' `expf`: x = n ln 2 + r, and a polynomial of r.
#[inline(always)]
pub(super) fn exp<L: Lanes>(lanes: L, x: L::V) -> L::V {
    const LOWEST: f32 = -87.336_54;
    let low = lanes.splat(LOWEST);
    let y = lanes.max(low, x);
    let n = lanes.round(lanes.mul(y, lanes.splat(std::f32::consts::LOG2_E)));
    // ln 2 in two parts, the first with so few bits that its product is exact.
    let r = lanes.fma(n, lanes.splat(-0.693_359_4), y);
    let r = lanes.fma(n, lanes.splat(2.121_944_4e-4), r);
    let p = [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5];
    let mut sum = lanes.splat(1.987_569_1e-4);
    for c in p {
        sum = lanes.fma(sum, r, lanes.splat(c));
    }
    let sum = lanes.fma(sum, lanes.mul(r, r), lanes.add(r, lanes.splat(1.0)));
    lanes.where_less(x, low, lanes.splat(0.0), lanes.mul(sum, lanes.exp2_whole(n)))
}

/// `tanh(x)` to 4 units in the last place.
///
/// Eigen's rational approximation on [-7.9, 7.9], beyond which tanh is 1 in fp32.
#[inline(always)]
pub(super) fn tanh<L: Lanes>(lanes: L, x: L::V) -> L::V {
    const MOST: f32 = 7.905_311;
    let x = lanes.min(lanes.splat(MOST), lanes.max(lanes.splat(-MOST), x));
    let square = lanes.mul(x, x);
    let over = [
        2.000_188e-13,
        -8.604_672e-11,
        5.122_297e-8,
        1.485_722_4e-5,
        6.372_619e-4,
        4.893_524_6e-3,
    ];
    let under = [1.185_347_1e-4, 2.268_434_6e-3, 4.893_525e-3];
    let (mut p, mut q) = (lanes.splat(-2.760_768_5e-16), lanes.splat(1.198_258_4e-6));
    for c in over {
        p = lanes.fma(p, square, lanes.splat(c));
    }
    for c in under {
        q = lanes.fma(q, square, lanes.splat(c));
    }
    lanes.div(lanes.mul(x, p), q)
}
