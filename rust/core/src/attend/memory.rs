//! Memory of keys and values, of which a call reads some rows while other threads may write to the other rows.

use std::marker::PhantomData;

/// Elements in memory. Only the parts that [`Self::get`] is called for are borrowed.
#[derive(Debug, Clone, Copy)]
pub struct SharedMemory<'a, T> {
    start: *const T,
    len: usize,
    lifetime: PhantomData<&'a T>,
}

// SAFETY: the value only reads, and `SharedMemory::new` demands that nobody writes to what is read, on any thread.
unsafe impl<T: Sync> Sync for SharedMemory<'_, T> {}
// SAFETY: as for `Sync`.
unsafe impl<T: Sync> Send for SharedMemory<'_, T> {}

impl<'a, T> SharedMemory<'a, T> {
    /// The `len` elements from `start` on. Without elements, any address is allowed.
    ///
    /// # Safety
    /// During `'a`, the elements lie in one allocation, `start` is aligned, and the elements of the rows that the
    /// tables of the call name are initialized and nobody writes to them. Other threads may write to other rows.
    #[must_use]
    pub unsafe fn new(start: *const T, len: usize) -> Self {
        Self {
            start,
            len,
            lifetime: PhantomData,
        }
    }

    /// Address of element `index`, which need not exist.
    #[inline(always)]
    pub(super) fn address(&self, index: usize) -> *const T {
        self.start.wrapping_add(index)
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The `count` elements from element `first` on.
    ///
    /// # Safety
    /// The elements belong to rows that the tables of the call name, or the memory is a borrowed slice.
    #[inline(always)]
    pub(super) unsafe fn get(&self, first: usize, count: usize) -> &'a [T] {
        assert!(first <= self.len && count <= self.len - first);
        // SAFETY: the assertion keeps the elements in the memory of `new`, and the caller promises that they belong to
        // rows that nobody writes to during `'a`. Without elements, `count` is 0 and `start` may be dangling, which
        // only a chunk without keys could ask for. A chunk has at least one key.
        unsafe { std::slice::from_raw_parts(self.start.add(first), count) }
    }
}

impl<'a, T> From<&'a [T]> for SharedMemory<'a, T> {
    fn from(slice: &'a [T]) -> Self {
        Self {
            start: slice.as_ptr(),
            len: slice.len(),
            lifetime: PhantomData,
        }
    }
}
