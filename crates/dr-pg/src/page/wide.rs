//! The page checksum with the widest instructions of this processor.
//!
//! The one place of this crate with `unsafe`: a function compiled for AVX2 may only be called
//! where the processor has it, which is asked first. Without this the checksum takes twice the time:
//! the plain instruction set of x86-64 has no multiplication of four 32-bit lanes.
#![allow(unsafe_code)]

/// The checksum of a page, as [`super::checksum`].
pub(super) fn checksum(page: &[u8], block: u32) -> u16 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2; the function has no other condition.
        return unsafe { checksum_avx2(page, block) };
    }
    super::checksum(page, block)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn checksum_avx2(page: &[u8], block: u32) -> u16 {
    super::checksum(page, block)
}
