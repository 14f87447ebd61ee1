//! Listings of archives by Python's `tarfile` and GNU tar.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// A listed entry: type and permissions in the format of `ls`, owner, name, target of a
/// link, size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) mode: String,
    pub(super) owner: String,
    pub(super) path: String,
    pub(super) link: String,
    /// Size of a regular file.
    pub(super) size: u64,
    /// CRC-32 of a file's contents, and time. GNU tar's listing contains neither.
    pub(super) rest: Option<(u32, i64)>,
}

/// Result of a reader: the entries of an archive, or an error.
pub(super) type Listing = Result<Vec<Line>, String>;

/// Lists all archives in a directory. `tarfile` stops silently at an invalid header, so
/// the script checks the block at which it stopped.
const LIST: &str = r#"
import os, stat, sys, tarfile, zlib
for number in range(int(sys.argv[2])):
    print("@")
    try:
        path = os.path.join(sys.argv[1], str(number))
        archive = tarfile.open(path, "r:", errorlevel=2, encoding="latin-1")
        lines = []
        for m in archive:
            kind = "d" if m.isdir() else "l" if m.issym() else "h" if m.islnk() else "c" if m.ischr() else "b" if m.isblk() else "p" if m.isfifo() else "-"
            if m.type not in b"\0" + b"01234567S":
                raise ValueError("unknown type")
            data = archive.extractfile(m).read() if kind == "-" and m.size < 1 << 20 else b""
            if kind == "-" and m.size < 1 << 20 and len(data) != m.size:
                raise ValueError("short")
            name, link = (text.encode("latin-1").hex() for text in (m.name.rstrip("/"), m.linkname if kind in "lh" else ""))
            lines.append("\t".join(map(str, [kind + stat.filemode(m.mode & 0o7777)[1:], f"{m.uid}/{m.gid}", name, link, m.size if kind == "-" else 0, zlib.crc32(data), int(m.mtime // 1)])))
        with open(path, "rb") as file:
            file.seek(archive.offset)
            if any(file.read(512)):
                raise ValueError("no header")
        for line in lines:
            print(line)
    except Exception as error:
        print("!", repr(error))
"#;

/// Lists `count` archives whose names are their numbers.
pub(super) fn python(directory: &Path, count: usize) -> Vec<Listing> {
    let output = Command::new("python3")
        .args(["-c", LIST])
        .arg(directory)
        .arg(count.to_string())
        .output()
        .expect("python3 is needed by this test");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let text = String::from_utf8(output.stdout).unwrap();
    let listings: Vec<_> = text.split("@\n").skip(1).map(python_listing).collect();
    assert_eq!(listings.len(), count);
    listings
}

fn python_listing(text: &str) -> Listing {
    if let Some(error) = text.strip_prefix('!') {
        return Err(error.trim().to_owned());
    }
    let number = |text: &str| {
        text.parse()
            .map_err(|_| format!("beyond what we tell: {text}"))
    };
    let lines = text.lines().map(|line| {
        let fields: Vec<_> = line.split('\t').collect();
        let [mode, owner, path, link, size, crc, time] = fields.try_into().unwrap();
        Ok(Line {
            mode: mode.to_owned(),
            owner: owner.to_owned(),
            path: unhex(path),
            link: unhex(link),
            size: size
                .parse()
                .map_err(|_| format!("beyond what we tell: {size}"))?,
            rest: Some((crc.parse().unwrap(), number(time)?)),
        })
    });
    lines.collect()
}

fn unhex(text: &str) -> String {
    let bytes: Vec<_> = (0..text.len() / 2)
        .map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap())
        .collect();
    printable(&bytes)
}

/// Quotes bytes like GNU tar.
pub(super) fn printable(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in bytes {
        match byte {
            b'"' | b'\\' => text.extend(['\\', char::from(*byte)]),
            7 => text.push_str("\\a"),
            8 => text.push_str("\\b"),
            9 => text.push_str("\\t"),
            10 => text.push_str("\\n"),
            11 => text.push_str("\\v"),
            12 => text.push_str("\\f"),
            13 => text.push_str("\\r"),
            b' '..=b'~' => text.push(char::from(*byte)),
            _ => text.push_str(&format!("\\{byte:03o}")),
        }
    }
    text
}

pub(super) fn gnu(archive: &[u8]) -> Listing {
    let mut tar = Command::new("tar")
        .args([
            "--list",
            "--verbose",
            "--numeric-owner",
            "--full-time",
            "--quoting-style=c",
        ])
        .args(["--file", "-"])
        .env("LC_ALL", "C")
        .env("TZ", "UTC")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("GNU tar is needed by this test");
    // GNU tar may exit before it has read everything.
    let _ = tar.stdin.take().unwrap().write_all(archive);
    let output = tar.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if !output.status.success() || said.contains("unknown file type") {
        return Err(said);
    }
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().map(gnu_line).collect()
}

fn gnu_line(line: &str) -> Result<Line, String> {
    let strange = || format!("not understood: {line}");
    let (columns, names) = line.split_once('"').ok_or_else(strange)?;
    let columns: Vec<_> = columns.split_whitespace().collect();
    let [mode, owner, size, ..] = columns.as_slice() else {
        return Err(strange());
    };
    let (path, link) = match names.strip_suffix('"').ok_or_else(strange)? {
        names if mode.starts_with('l') => names.split_once("\" -> \"").ok_or_else(strange)?,
        names if mode.starts_with('h') => names.split_once("\" link to \"").ok_or_else(strange)?,
        path => (path, ""),
    };
    // Contiguous files are listed as files.
    let mode = mode.replacen('C', "-", 1);
    let size = match mode.starts_with('-') {
        true => size.parse().map_err(|_| strange())?,
        false => 0,
    };
    Ok(Line {
        mode,
        owner: (*owner).to_owned(),
        path: path.trim_end_matches('/').to_owned(),
        link: link.to_owned(),
        size,
        rest: None,
    })
}
