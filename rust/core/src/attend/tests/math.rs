//! Accuracy of the exponential and of the hyperbolic tangent.

use crate::attend::math;
use crate::attend::vector::{LANES, Scalar, SimdOps};

#[test]
fn exp_and_tanh_are_accurate() {
    let mut worst = (0.0_f64, 0.0_f64);
    for i in 0..20_000_u16 {
        let (x, y) = (-f32::from(i) * 0.00435, f32::from(i) * 0.0005 - 5.0);
        let got = math::exp(Scalar, Scalar.splat(x))[0];
        worst.0 = worst.0.max((f64::from(got) / f64::from(x).exp() - 1.0).abs());
        let got = math::tanh(Scalar, [y; LANES])[0];
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
