//! Conversions between counts and int32. The callers have checked the ranges; out of range they saturate.

/// A count or index as int32.
pub(crate) fn int(value: usize) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}

/// An int32 of 0 or more as a count or index.
pub(crate) fn index(value: i32) -> usize {
    usize::try_from(value).unwrap_or(0)
}
