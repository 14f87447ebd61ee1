//! Extraction of the uncompressed kernel from a bzImage, so that guests need not decompress
//! it at every boot.

use std::io::{self, Read};

use thiserror::Error;

use super::bzimage::SetupHeader;

/// Maximum length of an uncompressed kernel in bytes: a limit for hostile files.
const MAX_KERNEL: u64 = 512 << 20;
/// Maximum memory for decompressing xz, in KiB. Kernels are built with dictionaries of up
/// to 128 MiB.
const XZ_MEMORY_KIB: u32 = 140 << 10;

/// Reason why no kernel could be extracted. The bzImage itself may still boot.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ExtractError {
    /// Not a bzImage, or one with an inconsistent header.
    #[error("this file is not a bzImage with a payload: {reason}")]
    Format {
        /// The fault.
        reason: String,
    },
    /// A compression other than gzip, xz and zstd.
    #[error("the kernel inside this bzImage is compressed in a way that is not supported")]
    Compression,
    /// The payload is corrupt.
    #[error("cannot decompress the kernel inside this bzImage")]
    Decompress(#[source] io::Error),
}

/// Extracts the ELF kernel from the bytes of a bzImage (gzip, xz, zstd, or stored).
///
/// # Errors
/// Not a bzImage, another compression, corrupt contents, or more than 512 MiB.
pub fn extract_vmlinux(image: &[u8]) -> Result<Vec<u8>, ExtractError> {
    let format = |reason: &str| ExtractError::Format {
        reason: reason.into(),
    };
    let header = SetupHeader::parse(image).map_err(|error| ExtractError::Format {
        reason: error.to_string(),
    })?;
    let range = header
        .code_offset
        .checked_add(header.payload_offset)
        .and_then(|start| Some(start..start.checked_add(header.payload_len)?))
        .and_then(|range| {
            Some(usize::try_from(range.start).ok()?..usize::try_from(range.end).ok()?)
        })
        .ok_or_else(|| format("its payload ends past the file"))?;
    let payload = image
        .get(range)
        .ok_or_else(|| format("its payload ends past the file"))?;

    let elf =
        match payload {
            [0x1f, 0x8b, ..] => read_all(flate2::read::GzDecoder::new(payload))?,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => read_all(
                lzma_rust2::XzReader::new_mem_limit(payload, false, XZ_MEMORY_KIB),
            )?,
            // One frame, followed by the length, which the kernel's build appends.
            [0x28, 0xb5, 0x2f, 0xfd, ..] => read_all(
                zstd::stream::read::Decoder::with_buffer(payload)
                    .map_err(ExtractError::Decompress)?
                    .single_frame(),
            )?,
            [0x7f, b'E', b'L', b'F', ..] => payload.to_vec(),
            _ => return Err(ExtractError::Compression),
        };
    if elf.starts_with(b"\x7fELF") {
        Ok(elf)
    } else {
        Err(format("its payload is not an ELF file"))
    }
}

fn read_all(reader: impl Read) -> Result<Vec<u8>, ExtractError> {
    let mut out = Vec::new();
    let len = reader
        .take(MAX_KERNEL + 1)
        .read_to_end(&mut out)
        .map_err(ExtractError::Decompress)?;
    if u64::try_from(len).unwrap_or(u64::MAX) > MAX_KERNEL {
        return Err(ExtractError::Format {
            reason: "its payload is larger than 512 MiB".into(),
        });
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::loader::bzimage::tests::image;

    fn with_payload(payload: &[u8]) -> Vec<u8> {
        let mut code = vec![0; 16];
        code.extend_from_slice(payload);
        image(&code)
    }

    fn elf() -> Vec<u8> {
        let mut elf = b"\x7fELF".to_vec();
        elf.extend((0..100_000u32).flat_map(u32::to_le_bytes));
        elf
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd_with_length(bytes: &[u8]) -> Vec<u8> {
        let mut out = zstd::encode_all(bytes, 1).unwrap();
        out.extend(u32::try_from(bytes.len()).unwrap().to_le_bytes());
        out
    }

    /// Output of `printf '\177ELF and more' | xz --x86 --lzma2=dict=32MiB --check=crc32`,
    /// and the length as the kernel's build appends it.
    const XZ: &[u8] = &[
        0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00, 0x00, 0x01, 0x69, 0x22, 0xde, 0x36, 0x02, 0x01, 0x04,
        0x00, 0x21, 0x01, 0x1a, 0x00, 0x01, 0xc9, 0x80, 0xb3, 0x01, 0x00, 0x0c, 0x7f, 0x45, 0x4c,
        0x46, 0x20, 0x61, 0x6e, 0x64, 0x20, 0x6d, 0x6f, 0x72, 0x65, 0x00, 0x00, 0x00, 0x00, 0x0a,
        0x89, 0x4d, 0xc8, 0x00, 0x01, 0x21, 0x0d, 0x75, 0xdc, 0xa8, 0xd2, 0x90, 0x42, 0x99, 0x0d,
        0x01, 0x00, 0x00, 0x00, 0x00, 0x01, 0x59, 0x5a, 0x0d, 0x00, 0x00, 0x00,
    ];

    #[test]
    fn xz_with_the_x86_filter_is_supported() {
        assert_eq!(
            extract_vmlinux(&with_payload(XZ)).unwrap(),
            b"\x7fELF and more"
        );
    }

    #[test]
    fn every_supported_compression_is_extracted() {
        for payload in [gzip(&elf()), zstd_with_length(&elf()), elf()] {
            assert_eq!(extract_vmlinux(&with_payload(&payload)).unwrap(), elf());
        }
    }

    #[test]
    fn each_invalid_content_has_its_error() {
        let lz4 = with_payload(b"\x02\x21\x4c\x18 and so on");
        assert!(matches!(
            extract_vmlinux(&lz4),
            Err(ExtractError::Compression)
        ));
        let xz = with_payload(b"\xfd7zXZ\0 and so on");
        assert!(matches!(
            extract_vmlinux(&xz),
            Err(ExtractError::Decompress(_))
        ));
        let text = with_payload(&gzip(b"not a kernel"));
        assert!(matches!(
            extract_vmlinux(&text),
            Err(ExtractError::Format { .. })
        ));
        let cut = gzip(&elf());
        let cut = with_payload(&cut[..cut.len() / 2]);
        assert!(matches!(
            extract_vmlinux(&cut),
            Err(ExtractError::Decompress(_))
        ));
        let mut long = with_payload(&gzip(&elf()));
        long.pop();
        assert!(matches!(
            extract_vmlinux(&long),
            Err(ExtractError::Format { .. })
        ));
        assert!(extract_vmlinux(b"").is_err());
    }
}
