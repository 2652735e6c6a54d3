//! Digests of memory, by which changed weights are found at the speed of memory.

use rayon::prelude::*;

use crate::error::Result;
use crate::thread_pool::thread_pool;

/// Number of independent sums. A step of one sum takes about as many cycles as steps of all of them.
const LANES: usize = 8;
const BLOCK: usize = 8 * LANES;
/// Bytes that one thread reads at a time.
const PIECE: usize = 1 << 20;
/// Odd factor of well-mixed bits, from the golden ratio.
const FACTOR: u64 = 0x9E37_79B9_7F4A_7C15;

/// Digest of bytes. Bytes that differ in one word of 8 bytes always have different digests, and other different bytes
/// have equal ones with a probability of about 2^-64. A digest is no protection against chosen contents.
///
/// # Errors
/// The errors of [`thread_pool`].
pub fn digest(bytes: &[u8]) -> Result<u64> {
    let pieces: Vec<u64> = thread_pool()?.install(|| bytes.par_chunks(PIECE).map(digest_piece).collect());
    Ok(pieces.into_iter().fold(bytes.len() as u64, mix))
}

fn digest_piece(bytes: &[u8]) -> u64 {
    let mut lanes = [0_u64; LANES];
    let (blocks, rest) = bytes.as_chunks::<BLOCK>();
    for block in blocks {
        add(&mut lanes, block);
    }
    if !rest.is_empty() {
        let mut last = [0_u8; BLOCK];
        last[..rest.len()].copy_from_slice(rest);
        add(&mut lanes, &last);
    }
    lanes.into_iter().fold(bytes.len() as u64, mix)
}

#[inline]
fn add(lanes: &mut [u64; LANES], block: &[u8; BLOCK]) {
    let (words, _) = block.as_chunks::<8>();
    for (lane, word) in lanes.iter_mut().zip(words) {
        *lane = mix(*lane, u64::from_le_bytes(*word));
    }
}

/// A bijection of `sum` for each `word`, and of `word` for each `sum`. The rotation carries high bits to low ones.
#[inline]
fn mix(sum: u64, word: u64) -> u64 {
    (sum ^ word).wrapping_mul(FACTOR).rotate_left(29)
}

#[cfg(test)]
mod tests {
    use super::{BLOCK, PIECE, Result, digest};

    #[test]
    fn each_changed_bit_changes_the_digest() -> Result<()> {
        for len in [1, 8, BLOCK - 1, BLOCK, BLOCK + 9, PIECE + 3] {
            let plain: Vec<u8> = (0..=250).cycle().take(len).collect();
            let before = digest(&plain)?;
            assert_eq!(before, digest(&plain)?);
            for bit in (0..8 * len).step_by(1 + 8 * len / 200).chain([8 * len - 1]) {
                let mut other = plain.clone();
                other[bit / 8] ^= 1 << (bit % 8);
                assert_ne!(digest(&other)?, before, "bit {bit} of {len} bytes");
            }
        }
        Ok(())
    }

    #[test]
    fn changed_signs_places_and_lengths_change_the_digest() -> Result<()> {
        let plain: Vec<u8> = (0..=250).cycle().take(4 * PIECE).collect();
        let mut signs = plain.clone();
        signs.iter_mut().skip(3).step_by(4).for_each(|byte| *byte ^= 128);
        let mut two_signs = plain.clone();
        two_signs[7] ^= 128;
        two_signs[7 + BLOCK] ^= 128;
        let mut places = plain.clone();
        places.swap(0, BLOCK + 1);
        let mut pieces = plain[PIECE..].to_vec();
        pieces.extend_from_slice(&plain[..PIECE]);
        let mut longer = plain.clone();
        longer.push(0);
        let mut found = Vec::new();
        for bytes in [&plain, &signs, &two_signs, &places, &pieces, &longer] {
            found.push(digest(bytes)?);
        }
        found.sort_unstable();
        found.dedup();
        assert_eq!(found.len(), 6);
        assert_ne!(digest(&[])?, digest(&[0])?);
        Ok(())
    }
}
