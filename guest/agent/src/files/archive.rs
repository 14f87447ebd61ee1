//! Archives of files, in both directions.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, BufWriter};
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::io::Errno;
use sm_tar::{ExtractOptions, ExtractionError, TarWriter, XattrPolicy};

use super::FileFailure;
use super::operations::unsent;
use super::place::Places;

/// Directories of the kernel, whose files are not copied with the root.
const KERNELS: [&[u8]; 3] = [b"dev", b"proc", b"sys"];

/// Size of the buffer of a stream in bytes.
const BUFFER: usize = 64 << 10;

pub(super) fn pack(
    places: &Places,
    path: &[u8],
    name: &[u8],
    follow: bool,
    output: File,
) -> Result<(), FileFailure> {
    let fail = |errno: Errno| FileFailure::new("read", path, errno);
    let found = places.find(path, follow).map_err(fail)?;
    // This process's root is that of the container.
    let real = places.path(&found).map_err(fail)?;
    drop(found);
    let prefix = match name {
        b"." => Vec::new(),
        name => [name, b"/"].concat(),
    };
    let of_kernel = |entry: &[u8]| {
        real == b"/"
            && entry
                .strip_prefix(prefix.as_slice())
                .is_some_and(|rest| KERNELS.contains(&rest))
    };
    let mut writer = TarWriter::new(BufWriter::with_capacity(BUFFER, output));
    writer
        .append_tree(Path::new(OsStr::from_bytes(&real)), name, &of_kernel)
        .map_err(|error| FileFailure::new("read", path, error))?;
    writer.finish().map(drop).map_err(unsent)
}

pub(super) fn unpack(
    places: &Places,
    path: &[u8],
    owners: bool,
    input: File,
) -> Result<(), FileFailure> {
    let directory = places
        .directory(path)
        .map_err(|errno| FileFailure::new("write to", path, errno))?;
    let xattrs = match owners {
        true => XattrPolicy::All,
        false => XattrPolicy::None,
    };
    let options = ExtractOptions::new()
        .special_modes(true)
        .owners(owners)
        .devices(owners)
        .xattrs(xattrs);
    let mut input = BufReader::with_capacity(BUFFER, input);
    options
        .extract(&mut input, directory.as_fd())
        .map_err(|error| extract_failure(&error))?;
    // The sender writes until its own end of the archive.
    let _ = io::copy(&mut input, &mut io::sink());
    Ok(())
}

fn extract_failure(error: &ExtractionError) -> FileFailure {
    let errno = match error {
        ExtractionError::Io { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
        ExtractionError::Conflict { .. } => libc::EEXIST,
        ExtractionError::Refused { .. } => libc::EINVAL,
        _ => libc::EBADMSG,
    };
    let cause = std::error::Error::source(error);
    let message = match cause {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    };
    FileFailure { errno, message }
}
