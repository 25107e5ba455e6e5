//! The end-to-end checksum: CRC-32C (Castagnoli) of each granule, computed once when the bytes leave the origin, stored
//! beside them in a tier, sent with them on the wire, verified by the reader.

use crate::block::GRANULE_BYTES;
use crate::{Error, Kind, Result};

/// CRC-32C of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// One CRC-32C per granule of `bytes`; the last granule may be short.
pub fn granule_sums(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks(GRANULE_BYTES as usize).map(crc32c).collect()
}

/// Makes granule checksums of bytes that arrive in pieces.
#[derive(Debug)]
pub struct Summer {
    digest: crc_fast::Digest,
    in_granule: usize,
    sums: Vec<u32>,
}

impl Default for Summer {
    fn default() -> Self {
        Summer { digest: crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi), in_granule: 0, sums: Vec::new() }
    }
}

impl Summer {
    /// Takes the next piece.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let n = bytes.len().min(GRANULE_BYTES as usize - self.in_granule);
            self.digest.update(&bytes[..n]);
            self.in_granule += n;
            bytes = &bytes[n..];
            if self.in_granule == GRANULE_BYTES as usize {
                self.end_granule();
            }
        }
    }

    fn end_granule(&mut self) {
        self.sums.push(self.digest.finalize_reset() as u32);
        self.in_granule = 0;
    }

    /// The checksums of all that was taken, one per granule, the last of which may be short. Starts anew.
    pub fn finish(&mut self) -> Vec<u32> {
        if self.in_granule > 0 {
            self.end_granule();
        }
        std::mem::take(&mut self.sums)
    }
}

/// Verifies `bytes` against one checksum per granule.
///
/// # Errors
/// [`Kind::Corrupt`] when a granule differs or the count of checksums does not fit the length.
pub fn verify(bytes: &[u8], sums: &[u32]) -> Result<()> {
    if bytes.len().div_ceil(GRANULE_BYTES as usize) != sums.len() {
        return Err(Error::new(Kind::Corrupt, "checksum count does not fit the data length")
            .with("bytes", bytes.len())
            .with("sums", sums.len()));
    }
    for (i, (chunk, want)) in bytes.chunks(GRANULE_BYTES as usize).zip(sums).enumerate() {
        if crc32c(chunk) != *want {
            return Err(Error::new(Kind::Corrupt, "data checksum does not match").with("granule", i));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_value() {
        // RFC 3720, B.4: 32 bytes of zeroes.
        assert_eq!(crc32c(&[0u8; 32]), 0x8a91_36aa);
    }

    #[test]
    fn pieces_sum_like_the_whole() {
        let data: Vec<u8> = (0..70_001u32).map(|i| (i * 7) as u8).collect();
        let mut s = Summer::default();
        for piece in [1usize, 16_383, 16_384, 9_999].iter().cycle().scan(0, |at, n| {
            let from = *at;
            *at = (from + n).min(data.len());
            (from < data.len()).then_some(from..*at)
        }) {
            s.update(&data[piece]);
        }
        assert_eq!(s.finish(), granule_sums(&data));
        assert!(s.finish().is_empty());
    }

    #[test]
    fn a_flipped_bit_is_found() {
        let mut data = vec![7u8; 40_000];
        let sums = granule_sums(&data);
        assert_eq!(sums.len(), 3);
        assert!(verify(&data, &sums).is_ok());
        data[20_000] ^= 1;
        assert!(verify(&data, &sums).is_err_and(|e| e.is(Kind::Corrupt)));
        assert!(verify(&data, &sums[..2]).is_err());
    }
}
