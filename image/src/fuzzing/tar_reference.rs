//! Comparison of the tar reader with Python's `tarfile` and GNU tar, on random archives,
//! intact and damaged.
//!
//! An archive that all three accept must have the same entries for all, or for this
//! reader and one of the others. An archive that only the others accept must be refused
//! for a reason in [`STRICT`]. No archive may be accepted by this reader alone. Where both
//! others differ from Go's `archive/tar`, this reader follows Go; [`SAME_AS_GO`] has archives
//! that show all known cases.

mod references;
mod streams;

use sm_tar::{TarHeader, TarKind, TarReader};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Read as _;
use std::ops::Range;

use self::references::{Line, Listing, gnu, printable, python};
use self::streams::Contents;

/// Number of intact archives in one run, and of damaged ones.
const ARCHIVES: u64 = 500;
/// Number of archives in a thorough run.
const ARCHIVES_FULL: u64 = 20_000;

/// Reasons for refusing an archive that others accept.
const STRICT: &[&str] = &[
    "it continues after a zero block",
    "it is truncated",
    "a number in a header is malformed",
    "a number in a header is negative",
    "a number is out of range",
    "a number in a pax header is out of range",
    "its device number",
    "its map of a sparse file is malformed",
    // Records that end with zeros.
    "a pax header is malformed",
];

/// Seeds of damaged archives whose entries are those of Go's `archive/tar`, which differ
/// from those of both others, with the reasons.
const SAME_AS_GO: &[(u64, &str)] = &[
    (
        6703,
        "the mode is \" \\0 755 \": Go removes zeros and blanks before a number in any order",
    ),
    (
        8807,
        "the GNU name is empty: the entry has the name of its own header in Go",
    ),
    (
        9450,
        "a link has a pax size, but in Go no data; the time begins with a zero, which Go \
         removes",
    ),
    (
        13999,
        "a GNU name has fewer bytes than its block: Go respects the size",
    ),
    (
        15312,
        "a GNU link target has fewer bytes than its blocks: Go respects the size",
    ),
];

/// Class of archives with other entries than both others have.
const OTHER: &str = "other entries than both";

fn ours(archive: &[u8]) -> Listing {
    let mut reader = TarReader::new(archive);
    let mut lines = Vec::new();
    loop {
        let header = match reader.next_entry() {
            Ok(Some(header)) => header,
            Ok(None) => return Ok(lines),
            Err(error) => return Err(error.reason.to_string()),
        };
        lines.push(line(&header, &mut reader)?);
    }
}

fn line(header: &TarHeader, reader: &mut TarReader<&[u8]>) -> Result<Line, String> {
    let (kind, link) = match &header.kind {
        TarKind::File => ('-', &[][..]),
        TarKind::Directory => ('d', &[][..]),
        TarKind::Symlink(link) => ('l', link.as_slice()),
        TarKind::Hardlink(link) => ('h', link.as_slice()),
        TarKind::CharDevice(..) => ('c', &[][..]),
        TarKind::BlockDevice(..) => ('b', &[][..]),
        TarKind::Fifo => ('p', &[][..]),
    };
    let mut data = Vec::new();
    if kind == '-' && header.size < 1 << 20 {
        let size = usize::try_from(header.size).unwrap();
        data.resize(size, 0);
        let whole = [(0, header.size)];
        for (offset, len) in header.sparse.as_deref().unwrap_or(&whole) {
            let at = usize::try_from(*offset).unwrap();
            let part = &mut data[at..at + usize::try_from(*len).unwrap()];
            reader.read_exact(part).map_err(|_| "it is truncated")?;
        }
    }
    let mut crc = flate2::Crc::new();
    crc.update(&data);
    let path = header.path.as_slice();
    let slashes = path.iter().rev().take_while(|byte| **byte == b'/').count();
    Ok(Line {
        mode: permissions(kind, header.mode),
        owner: format!("{}/{}", header.uid, header.gid),
        path: printable(&path[..path.len() - slashes]),
        link: printable(link),
        size: if kind == '-' { header.size } else { 0 },
        rest: Some((crc.sum(), header.mtime.0)),
    })
}

/// Formats permissions like `ls -l`.
fn permissions(kind: char, mode: u16) -> String {
    let mut text = String::from(kind);
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (mode & special != 0, bits & 1 != 0) {
            (true, true) => letter,
            (true, false) => letter.to_ascii_uppercase(),
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    text
}

/// Returns the class of an archive's outcome, or an error if the outcome is not
/// permitted.
fn judge(ours: &Listing, python: &Listing, gnu: &Listing) -> Result<String, String> {
    let as_gnu = |listing: &Listing| -> Option<Vec<Line>> {
        let lines = listing.as_ref().ok()?.iter().cloned();
        Some(lines.map(|line| Line { rest: None, ..line }).collect())
    };
    match (ours, python, gnu) {
        (Ok(_), Ok(_), Ok(_)) if ours == python && as_gnu(ours) == as_gnu(gnu) => {
            Ok("the same for all".to_owned())
        }
        (Ok(_), Ok(_), _) if ours == python => Ok("as Python has it".to_owned()),
        (Ok(_), _, Ok(_)) if as_gnu(ours) == as_gnu(gnu) => Ok("as GNU tar has it".to_owned()),
        (Err(_), Err(_), Err(_)) => Ok("refused by all".to_owned()),
        (Err(_), Ok(_), Err(_)) => Ok("taken by Python alone".to_owned()),
        (Err(_), Err(_), Ok(_)) => Ok("taken by GNU tar alone".to_owned()),
        (Err(reason), Ok(_), Ok(_)) => match STRICT.iter().find(|known| reason.contains(**known)) {
            Some(known) => Ok(format!("we alone refuse: {known}")),
            None => Err("we alone refuse it".to_owned()),
        },
        (Ok(_), Err(_), Err(_)) => Err("we alone take it".to_owned()),
        (Ok(_), _, _) => Err(OTHER.to_owned()),
    }
}

/// Returns the archive with padding after its last entry, which some writers omit and
/// this reader does not require.
fn padded(archive: &[u8], ours: &Listing) -> Option<Vec<u8>> {
    let mut padded = archive.to_vec();
    padded.resize(archive.len().next_multiple_of(512), 0);
    (padded.len() != archive.len() && self::ours(&padded) == *ours).then_some(padded)
}

fn compare(archives: &[Vec<u8>], tally: &mut BTreeMap<String, u64>) -> String {
    let directory = tempfile::tempdir().unwrap();
    for (number, archive) in archives.iter().enumerate() {
        fs::write(directory.path().join(number.to_string()), archive).unwrap();
    }
    let python = python(directory.path(), archives.len());
    let mut different = String::new();
    let mut again = Vec::new();
    for (number, (archive, python)) in archives.iter().zip(python).enumerate() {
        let (ours, gnu) = (ours(archive), gnu(archive));
        let outcome = judge(&ours, &python, &gnu);
        if let (Err(_), Some(padded)) = (&outcome, padded(archive, &ours)) {
            again.push(padded);
            continue;
        }
        match outcome {
            Ok(class) => *tally.entry(class).or_default() += 1,
            Err(class) => {
                *tally.entry(class.clone()).or_default() += 1;
                let _ = writeln!(
                    different,
                    "archive {number}: {class}\n{}{}{}",
                    show("ours", &ours),
                    show("Python", &python),
                    show("GNU tar", &gnu)
                );
            }
        }
    }
    if !again.is_empty() {
        different.push_str(&compare(&again, tally));
    }
    different
}

fn show(whose: &str, listing: &Listing) -> String {
    let lines = match listing {
        Ok(lines) => lines,
        Err(reason) => return format!("  {whose}: {reason}\n"),
    };
    let lines = lines.iter().map(|line| {
        let Line {
            mode,
            owner,
            path,
            link,
            size,
            rest,
        } = line;
        format!("  {whose}: {mode} {owner} {size} \"{path}\" \"{link}\" {rest:?}\n")
    });
    lines.collect()
}

fn run(seeds: impl Iterator<Item = u64>, make: fn(u64) -> Vec<u8>) {
    let archives: Vec<_> = seeds.map(make).collect();
    let mut tally = BTreeMap::new();
    let different = compare(&archives, &mut tally);
    eprintln!("{tally:#?}");
    assert!(different.is_empty(), "{different}");
}

fn seeds() -> Range<u64> {
    match std::env::var_os("SM_TEST_FULL") {
        Some(_) => 0..ARCHIVES_FULL,
        None => 0..ARCHIVES,
    }
}

#[test]
fn random_archives_are_listed_as_others_list_them() {
    if !sm_test_needs::programs(&["python3", "tar"]) {
        return;
    }
    run(seeds(), |seed| streams::archive(seed, Contents::Two));
}

#[test]
fn damaged_archives_are_listed_as_others_list_them() {
    if !sm_test_needs::programs(&["python3", "tar"]) {
        return;
    }
    let is_listed = |seed: &u64| SAME_AS_GO.iter().any(|(listed, _)| listed == seed);
    run(seeds().filter(|seed| !is_listed(seed)), streams::mutated);
}

#[test]
fn damaged_archives_are_listed_as_in_go_where_both_others_differ() {
    if !sm_test_needs::programs(&["python3", "tar"]) {
        return;
    }
    for (seed, reason) in SAME_AS_GO {
        let mut tally = BTreeMap::new();
        let different = compare(&[streams::mutated(*seed)], &mut tally);
        assert!(tally.contains_key(OTHER), "{seed}, {reason}: {tally:?}");
        assert!(!different.is_empty());
    }
}

#[test]
fn global_headers_and_empty_records_are_ignored_as_in_go() {
    let mut different = 0;
    for seed in seeds() {
        let (with, without) = (
            streams::archive(seed, Contents::Go),
            streams::archive(seed, Contents::Two),
        );
        assert_eq!(ours(&with), ours(&without), "seed {seed}");
        different += u64::from(with != without);
    }
    assert!(different > ARCHIVES / 20, "{different}");
}
