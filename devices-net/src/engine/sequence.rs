//! Arithmetic of TCP's sequence numbers (RFC 9293 3.4): modulo 2^32, ordered within 2^31.

/// Returns true if `a` is before `b`.
#[must_use]
pub(crate) const fn before(a: u32, b: u32) -> bool {
    // The difference of two numbers of a connection is less than 2^31.
    (a.wrapping_sub(b)).cast_signed() < 0
}

/// Returns true if `a` is `b`, or before it.
#[must_use]
pub(crate) const fn at_most(a: u32, b: u32) -> bool {
    !before(b, a)
}

/// The distance from `from` to `to`; zero if `to` is before it.
#[must_use]
pub(crate) const fn distance(from: u32, to: u32) -> u32 {
    if before(to, from) {
        0
    } else {
        to.wrapping_sub(from)
    }
}

/// The part of a segment that the receiver has not got yet, and has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Acceptable {
    /// Bytes before that part.
    pub(crate) skip: u32,
    /// Length of the part.
    pub(crate) len: u32,
}

/// Returns the part of a segment of `len` bytes from `sequence` on that comes next to a
/// receiver that expects `next` and has room for `room` bytes; `None` if there is a gap before
/// it.
#[must_use]
pub(crate) const fn acceptable(
    sequence: u32,
    len: u32,
    next: u32,
    room: u32,
) -> Option<Acceptable> {
    if before(next, sequence) {
        return None;
    }
    let old = distance(sequence, next);
    let skip = if old < len { old } else { len };
    let rest = len - skip;
    Some(Acceptable {
        skip,
        len: if rest < room { rest } else { room },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bases around which numbers are tried: the wrap, its opposite, and the middle.
    const BASES: [u32; 5] = [0, 1 << 31, u32::MAX, (1 << 31) - 3, 77];

    #[test]
    fn numbers_are_ordered_across_the_wrap() {
        for base in BASES {
            for offset in 0..200u32 {
                let later = base.wrapping_add(offset);
                assert_eq!(before(base, later), offset > 0);
                assert!(!before(later, base));
                assert!(at_most(base, later));
                assert_eq!(at_most(later, base), offset == 0);
                assert_eq!(distance(base, later), offset);
                assert_eq!(distance(later, base), 0);
            }
            let farthest = base.wrapping_add((1 << 31) - 1);
            assert!(before(base, farthest) && !before(farthest, base));
        }
    }

    /// Compares with a model that has a set of bytes, for all segments around the window.
    #[test]
    fn the_acceptable_part_is_that_of_a_model() {
        const SPAN: u32 = 9;
        for base in BASES {
            for (start, len) in (0..SPAN).flat_map(|start| (0..SPAN).map(move |len| (start, len))) {
                for (next, room) in (0..SPAN).flat_map(|n| (0..SPAN).map(move |room| (n, room))) {
                    let at = |offset: u32| base.wrapping_add(offset);
                    let part = acceptable(at(start), len, at(next), room);
                    if start > next {
                        assert_eq!(part, None);
                        continue;
                    }
                    let wanted: Vec<u32> = (start..start + len)
                        .filter(|byte| (next..next + room).contains(byte))
                        .collect();
                    let part = part.unwrap();
                    let got: Vec<u32> = (start + part.skip..).take(part.len as usize).collect();
                    assert_eq!(got, wanted, "{start}+{len} at {next}+{room}");
                    assert!(part.skip + part.len <= len);
                }
            }
        }
    }
}
