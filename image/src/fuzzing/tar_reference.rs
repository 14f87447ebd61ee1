//! Random archives are read as Python's `tarfile` reads them.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::tar::{END, Kind, Reader};

/// Archives in one run.
const ARCHIVES: u64 = 500;

/// Lists all archives of a directory: a line for each entry, or for an error.
const LIST: &str = r#"
import sys, tarfile, os
for number in range(int(sys.argv[2])):
    print("@", number)
    try:
        archive = tarfile.open(os.path.join(sys.argv[1], str(number)), "r:", errorlevel=2, encoding="latin-1")
        for m in archive:
            kind = "d" if m.isdir() else "l" if m.issym() else "h" if m.islnk() else "c" if m.ischr() else "b" if m.isblk() else "p" if m.isfifo() else "f"
            print(kind, m.name.rstrip("/"), m.size if kind == "f" else 0, m.linkname if kind in "lh" else "", m.uid)
    except Exception as error:
        print("refused")
"#;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

fn archive(seed: u64) -> Vec<u8> {
    let mut random = Random(seed.wrapping_mul(0x2545_f491_4f6c_dd1d));
    let mut archive = Vec::new();
    for number in 0..1 + random.below(4) {
        let kinds = b"001234567";
        let kind = kinds[usize::try_from(random.below(9)).unwrap()];
        let mut block = [0u8; 512];
        let slash = if kind == b'5' || random.below(8) == 0 {
            "/"
        } else {
            ""
        };
        let name = format!("n{number}{slash}");
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[100..107].copy_from_slice(b"0000644");
        block[108..115].copy_from_slice(b"0000001");
        block[116..123].copy_from_slice(b"0000000");
        let stated = match kind {
            b'0' | b'7' => random.below(700),
            // Some writers note a size where there is no data.
            _ if random.below(3) == 0 => random.below(3) * 512,
            _ => 0,
        };
        block[124..135].copy_from_slice(format!("{stated:011o}").as_bytes());
        block[136..147].copy_from_slice(b"00000000000");
        block[156] = kind;
        if matches!(kind, b'1' | b'2') {
            block[157..159].copy_from_slice(b"n0");
        }
        block[257..265].copy_from_slice(b"ustar\x0000");
        block[329..336].copy_from_slice(b"0000001");
        block[337..344].copy_from_slice(b"0000003");
        block[148..156].copy_from_slice(b"        ");
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        archive.extend_from_slice(&block);
        if matches!(kind, b'0' | b'7') {
            let len = usize::try_from(stated).unwrap();
            archive.resize(archive.len() + len.next_multiple_of(512), b'x');
        }
    }
    archive.extend_from_slice(&END);
    archive
}

fn ours(archive: &[u8]) -> String {
    let mut reader = Reader::new(archive);
    let mut text = String::new();
    loop {
        let header = match reader.next_entry() {
            Ok(Some(header)) => header,
            Ok(None) => return text,
            Err(_) => {
                text.push_str("refused\n");
                return text;
            }
        };
        let (kind, link) = match &header.kind {
            Kind::File => ("f", &[][..]),
            Kind::Directory => ("d", &[][..]),
            Kind::Symlink(link) => ("l", link.as_slice()),
            Kind::Hardlink(link) => ("h", link.as_slice()),
            Kind::CharDevice(..) => ("c", &[][..]),
            Kind::BlockDevice(..) => ("b", &[][..]),
            Kind::Fifo => ("p", &[][..]),
        };
        let path = String::from_utf8_lossy(&header.path);
        let link = String::from_utf8_lossy(link);
        let path = path.trim_end_matches('/');
        let _ = writeln!(text, "{kind} {path} {} {link} {}", header.size, header.uid);
    }
}

fn theirs(directory: &Path) -> Vec<String> {
    let output = Command::new("python3")
        .args(["-c", LIST])
        .arg(directory)
        .arg(ARCHIVES.to_string())
        .output()
        .expect("python3 is needed by this test");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).unwrap();
    text.split("@ ")
        .skip(1)
        .map(|part| part.split_once('\n').unwrap().1.to_owned())
        .collect()
}

#[test]
fn random_archives_are_listed_as_python_lists_them() {
    let directory = tempfile::tempdir().unwrap();
    for seed in 0..ARCHIVES {
        fs::write(directory.path().join(seed.to_string()), archive(seed)).unwrap();
    }
    let mut different = String::new();
    for (seed, theirs) in (0..ARCHIVES).zip(theirs(directory.path())) {
        let ours = ours(&archive(seed));
        if ours != theirs {
            let _ = writeln!(different, "seed {seed}, ours:\n{ours}Python's:\n{theirs}");
        }
    }
    assert!(different.is_empty(), "{different}");
}
