//! Conversions between counts and int32 table entries. Callers have checked the ranges. Values out of range saturate.

/// Count or index as int32.
pub(crate) fn to_i32(value: usize) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}

/// Non-negative int32 as a count or index.
pub(crate) fn to_usize(value: i32) -> usize {
    usize::try_from(value).unwrap_or(0)
}
