//! Output streams of the lab: bytes up to an end mark.

use std::io::{self, Read, Write};

/// Copies `from` to `to` without delay up to the `mark`, which is not copied. Returns
/// true if the mark was found.
pub(crate) fn copy_until(
    from: &mut impl Read,
    to: &mut impl Write,
    mark: &[u8],
) -> io::Result<bool> {
    let mut pending: Vec<u8> = Vec::new();
    let mut chunk = vec![0; 64 << 10];
    loop {
        let count = match from.read(&mut chunk) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // The sockets of a machine that crashes are reset.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => 0,
            Err(error) => return Err(error),
        };
        if count == 0 {
            to.write_all(&pending)?;
            to.flush()?;
            return Ok(false);
        }
        pending.extend_from_slice(&chunk[..count]);
        if let Some(end) = pending
            .windows(mark.len())
            .position(|window| window == mark)
        {
            to.write_all(&pending[..end])?;
            to.flush()?;
            return Ok(true);
        }
        let keep = longest_prefix_at_end(&pending, mark);
        let ready = pending.len() - keep;
        to.write_all(&pending[..ready])?;
        to.flush()?;
        pending.drain(..ready);
    }
}

/// Returns the length of the longest proper prefix of `mark` with which `bytes` end.
fn longest_prefix_at_end(bytes: &[u8], mark: &[u8]) -> usize {
    (1..mark.len())
        .rev()
        .find(|length| bytes.ends_with(&mark[..*length]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read};

    use super::copy_until;

    /// A reader that returns its bytes in pieces of one size.
    struct Pieces<'a>(&'a [u8], usize);

    impl Read for Pieces<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.1.min(self.0.len());
            buffer[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }

    #[test]
    fn the_mark_is_found_however_it_is_cut() {
        let bytes = b"output with en and end in it, then <end>rest";
        for size in 1..bytes.len() {
            let mut out = Vec::new();
            let seen = copy_until(&mut Pieces(bytes, size), &mut out, b"<end>").unwrap();
            assert!(seen);
            assert_eq!(out, b"output with en and end in it, then ");
        }
    }

    #[test]
    fn without_a_mark_everything_is_copied() {
        let mut out = Vec::new();
        let seen = copy_until(&mut Pieces(b"half a <en", 3), &mut out, b"<end>").unwrap();
        assert!(!seen);
        assert_eq!(out, b"half a <en");
    }
}
