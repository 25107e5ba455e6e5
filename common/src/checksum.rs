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
