//! Random tar streams, intact and damaged, generated from seeds.

use sm_tar::END;

/// The SplitMix64 generator.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x2545_f491_4f6c_dd1d))
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    fn one_in(&mut self, bound: u64) -> bool {
        self.below(bound) == 0
    }

    fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap()
    }

    fn pick<'a, T: ?Sized>(&mut self, of: &[&'a T]) -> &'a T {
        of[self.index(of.len())]
    }
}

const BLOCK: usize = 512;

/// A header, initialised with fields that all readers accept.
struct Block([u8; BLOCK]);

impl Block {
    fn new(name: &str, kind: u8, size: u64) -> Self {
        let mut block = Self([0; BLOCK]);
        block.text(0, name);
        block.text(100, "0000644");
        block.text(108, "0000001");
        block.text(116, "0000002");
        block.text(124, &format!("{size:011o}"));
        block.text(136, "13000000000");
        block.0[156] = kind;
        block.text(257, "ustar\x0000");
        block.text(329, "0000001");
        block.text(337, "0000003");
        block
    }

    fn text(&mut self, at: usize, text: &str) {
        self.0[at..at + text.len()].copy_from_slice(text.as_bytes());
    }

    fn gnu(mut self) -> Self {
        self.text(257, "ustar  \0");
        self
    }

    fn finish(mut self) -> [u8; BLOCK] {
        seal(&mut self.0);
        self.0
    }
}

/// Updates the checksum.
fn seal(block: &mut [u8]) {
    block[148..156].copy_from_slice(b"        ");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// A stream of entries.
struct Stream {
    bytes: Vec<u8>,
    go: bool,
    common: bool,
}

impl Stream {
    fn header(&mut self, block: Block) {
        self.bytes.extend_from_slice(&block.finish());
    }

    fn data(&mut self, data: &[u8]) {
        self.bytes.extend_from_slice(data);
        let padded = self.bytes.len().next_multiple_of(BLOCK);
        self.bytes.resize(padded, 0);
    }

    fn extended(&mut self, kind: u8, data: &[u8]) {
        self.header(Block::new("extended", kind, data.len() as u64));
        self.data(data);
    }

    fn pax(&mut self, kind: u8, records: &[(&str, String)]) {
        let mut data = Vec::new();
        if kind == b'g' && !self.go {
            return;
        }
        for (number, (key, value)) in records.iter().enumerate() {
            let mut undone = records[number..].iter();
            if !self.go && undone.any(|(later, value)| later == key && value.is_empty()) {
                continue;
            }
            let rest = key.len() + value.len() + 3;
            let len = (rest + 1..rest + 8).find(|len| len.to_string().len() + rest == *len);
            data.extend_from_slice(format!("{} {key}={value}\n", len.unwrap()).as_bytes());
        }
        self.extended(kind, &data);
    }
}

/// Features used in an archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Contents {
    /// Features that all readers interpret alike.
    Common,
    /// Also features that two of the three interpret alike: prefixes in GNU headers, a
    /// slash after a file's name, sizes of entries without data, blank numbers.
    Two,
    /// Also features that only Go ignores: global headers, records without a value, pax
    /// names beside GNU names. For Go, the archive is the same without them.
    Go,
}

/// Generates an intact archive.
pub(super) fn archive(seed: u64, contents: Contents) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut stream = Stream {
        bytes: Vec::new(),
        go: contents == Contents::Go,
        common: contents == Contents::Common,
    };
    for number in 0..1 + random.below(4) {
        match random.below(12) {
            0 => gnu_long(&mut random, &mut stream, number),
            1 | 2 => pax(&mut random, &mut stream, number),
            3 => sparse(&mut random, &mut stream, number),
            4 => odd_numbers(&mut random, &mut stream, number),
            5 => old(&mut random, &mut stream, number),
            _ => plain(&mut random, &mut stream, number),
        }
    }
    stream.bytes.extend_from_slice(&END);
    stream.bytes
}

/// Generates a damaged archive.
pub(super) fn mutated(seed: u64) -> Vec<u8> {
    let mut random = Random::new(!seed);
    let mut bytes = archive(seed, Contents::Common);
    let headers: Vec<_> = (0..bytes.len() - END.len())
        .step_by(BLOCK)
        .filter(|at| bytes[at + 257..].starts_with(b"ustar"))
        .collect();
    for _ in 0..1 + random.below(2) {
        if bytes.is_empty() {
            break;
        }
        match random.below(8) {
            0 => {
                // Only Go and this reader accept an empty stream as an empty archive.
                let len = random.index(bytes.len());
                bytes.truncate(len.max(1));
            }
            1 => {
                // Duplicate a block, or insert one of zeros.
                let at = random.index(bytes.len() / BLOCK + 1) * BLOCK;
                let from = at.min(bytes.len().saturating_sub(BLOCK));
                let block = match random.one_in(3) {
                    true => vec![0; BLOCK],
                    false => bytes[from..].iter().copied().take(BLOCK).collect(),
                };
                let at = at.min(bytes.len());
                bytes.splice(at..at, block);
            }
            2 => {
                let all = bytes.clone();
                bytes.extend_from_slice(&all);
            }
            3 => {
                let at = random.index(bytes.len());
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
            _ => {
                // These fields are changed more often than names.
                let field = [100, 108, 116, 124, 136, 156, 157, 257, 263, 329, 482, 483];
                let at = field[random.index(field.len())] + random.index(12);
                let header = headers.get(random.index(headers.len() + 1)).unwrap_or(&0);
                let Some(block) = bytes.get_mut(*header..header + BLOCK) else {
                    continue;
                };
                match random.below(4) {
                    0 => block[at] = *random.pick(&[&0, &b' ', &b'0', &b'7', &0x80, &0xff, &b'-']),
                    _ => block[at] ^= 1 << random.below(8),
                }
                seal(block);
            }
        }
    }
    bytes
}

fn plain(random: &mut Random, stream: &mut Stream, number: u64) {
    let kind = b"001234567"[random.index(9)];
    let slash = match kind == b'5' || random.one_in(8) && !stream.common {
        true => "/",
        false => "",
    };
    let stated = match kind {
        b'0' | b'7' => random.below(700),
        // Some writers store a size for entries without data.
        _ if random.one_in(3) && !stream.common => random.below(3) * 512,
        _ => 0,
    };
    let mut block = Block::new(&format!("n{number}{slash}"), kind, stated);
    if matches!(kind, b'1' | b'2') {
        block.text(157, "n0");
    }
    if random.one_in(4) && !stream.common {
        block.text(345, random.pick(&["prefix", "a/b", "c/"]));
    }
    if random.one_in(4) {
        block.text(
            100,
            random.pick(&["0004755", "0001777", "0100644", "0000000", "   755 "]),
        );
    }
    if random.one_in(4) {
        block = block.gnu();
        block.0[345..500].fill(0);
    }
    stream.header(block);
    if matches!(kind, b'0' | b'7') {
        stream.data(&contents(stated));
    }
}

fn contents(len: u64) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8).collect()
}

/// Appends a header from before POSIX, without magic and with type 0.
fn old(random: &mut Random, stream: &mut Stream, number: u64) {
    let slash = random.pick(&["", "/"]);
    let size = if slash.is_empty() {
        random.below(700)
    } else {
        0
    };
    let mut block = Block::new(&format!("old{number}{slash}"), 0, size);
    block.0[257..].fill(0);
    stream.header(block);
    stream.data(&contents(size));
}

fn gnu_long(random: &mut Random, stream: &mut Stream, number: u64) {
    let long = format!("{}{number}", "long/".repeat(1 + random.index(50)));
    let nul = random.pick(&["", "\0", "\0more"]);
    let link = random.one_in(2);
    if link {
        stream.extended(b'K', format!("{long}link{nul}").as_bytes());
    }
    let long_path = !link || random.one_in(2);
    if long_path {
        stream.extended(b'L', format!("{long}{nul}").as_bytes());
    }
    // If both are present, the GNU name is used.
    if random.one_in(4) && stream.go && (!link || long_path) {
        stream.pax(b'x', &[("path", format!("pax{number}"))]);
    }
    let kind = if link { b'2' } else { b'0' };
    let mut block = Block::new(&format!("short{number}"), kind, 0).gnu();
    if link {
        block.text(157, "short");
    }
    stream.header(block);
}

fn pax(random: &mut Random, stream: &mut Stream, number: u64) {
    let kind = if random.one_in(4) { b'g' } else { b'x' };
    let mut records = Vec::new();
    let mut size = random.below(600);
    for _ in 0..1 + random.below(3) {
        let record = match random.below(10) {
            0 => ("path", format!("pax{number}")),
            1 => ("path", String::new()),
            2 => ("linkpath", format!("target{number}")),
            3 => ("uid", random.below(1 << 33).to_string()),
            4 => ("gid", "4294967294".to_owned()),
            5 if kind == b'x' => {
                size = random.below(600);
                ("size", size.to_string())
            }
            6 => (
                "mtime",
                random
                    .pick(&["1.5", "-3", "0", "1234567890.123"])
                    .to_owned(),
            ),
            7 => ("comment", "of no meaning".to_owned()),
            8 => ("SCHILY.xattr.user.a", "b".to_owned()),
            _ => ("path", "a".repeat(1 + random.index(300))),
        };
        records.push(record);
    }
    stream.pax(kind, &records);
    let stated = match records.iter().any(|(key, _)| *key == "size") {
        true if random.one_in(2) => 0,
        _ => size,
    };
    let link = random.one_in(3);
    let stated = if link && stream.common { 0 } else { stated };
    let mut block = Block::new(
        &format!("n{number}"),
        if link { b'2' } else { b'0' },
        stated,
    );
    if link {
        block.text(157, "n0");
    }
    stream.header(block);
    if !link {
        stream.data(&contents(size));
    }
}

/// Appends headers with numbers in base 256, with blanks, or without terminator.
fn odd_numbers(random: &mut Random, stream: &mut Stream, number: u64) {
    let mut size = random.below(600);
    let mut block = Block::new(&format!("odd{number}"), b'0', size).gnu();
    let base256 = |block: &mut Block, at: usize, len: usize, value: i64| {
        let bytes = i128::from(value).to_be_bytes();
        block.0[at..at + len].copy_from_slice(&bytes[16 - len..]);
        block.0[at] = if value < 0 { 0xff } else { 0x80 };
    };
    for _ in 0..1 + random.below(2) {
        match random.below(8) {
            0 => base256(&mut block, 108, 8, 3_000_000),
            1 => base256(&mut block, 108, 8, -1),
            2 => base256(&mut block, 124, 12, i64::try_from(size).unwrap()),
            3 => base256(&mut block, 124, 12, -1),
            4 => base256(&mut block, 136, 12, -100),
            5 => base256(&mut block, 136, 12, 1 << 33),
            6 => block.text(
                108,
                random.pick(&["      1 ", "0000001 ", "00000001", "\0\0\0\0\0\0\0\0"]),
            ),
            _ if stream.common => {}
            _ => {
                size = 0;
                block.text(
                    124,
                    random.pick(&["            ", "\0\0\0\0\0\0\0\0\0\0\0\0"]),
                );
            }
        }
    }
    stream.header(block);
    stream.data(&contents(size));
}

/// Appends a file with holes, in one of the four formats.
fn sparse(random: &mut Random, stream: &mut Stream, number: u64) {
    let mut extents = Vec::new();
    let mut end = 0;
    for _ in 0..random.below(6) {
        let begin = end + random.below(3) * 512;
        let len = (1 + random.below(3)) * 512;
        extents.push((begin, len));
        end = begin + len;
    }
    // A hole at the end is followed by a part without length.
    let size = end + random.below(2) * 700;
    if size > end {
        extents.push((size, 0));
    }
    let data: u64 = extents.iter().map(|(_, len)| len).sum();
    let name = format!("sparse{number}");
    let version = random.below(4);
    match version {
        0 => {
            let mut block = Block::new(&name, b'S', data).gnu();
            block.0[345..500].fill(0);
            let mut pairs = extents.iter();
            pair_fields(&mut block.0, 386, pairs.by_ref().take(4));
            let more = extents.len() > 4;
            block.0[482] = u8::from(more);
            block.text(483, &format!("{size:011o}"));
            stream.header(block);
            if more {
                let mut next = [0; BLOCK];
                pair_fields(&mut next, 0, pairs);
                stream.bytes.extend_from_slice(&next);
            }
            stream.data(&contents(data));
        }
        1 | 2 => {
            let mut records = vec![
                ("GNU.sparse.size", size.to_string()),
                ("GNU.sparse.numblocks", extents.len().to_string()),
            ];
            if version == 1 {
                for (offset, len) in &extents {
                    records.push(("GNU.sparse.offset", offset.to_string()));
                    records.push(("GNU.sparse.numbytes", len.to_string()));
                }
            } else {
                let numbers = extents
                    .iter()
                    .map(|(offset, len)| format!("{offset},{len}"));
                records.push(("GNU.sparse.map", numbers.collect::<Vec<_>>().join(",")));
                records.push(("GNU.sparse.name", name.clone()));
            }
            stream.pax(b'x', &records);
            stream.header(Block::new(&name, b'0', data));
            stream.data(&contents(data));
        }
        _ => {
            let mut map = format!("{}\n", extents.len());
            for (offset, len) in &extents {
                map.push_str(&format!("{offset}\n{len}\n"));
            }
            let mut all = map.into_bytes();
            all.resize(all.len().next_multiple_of(BLOCK), 0);
            all.extend(contents(data));
            let records = [
                ("GNU.sparse.major", "1".to_owned()),
                ("GNU.sparse.minor", "0".to_owned()),
                ("GNU.sparse.name", name),
                ("GNU.sparse.realsize", size.to_string()),
            ];
            stream.pax(b'x', &records);
            stream.header(Block::new("GNUSparseFile.0/x", b'0', all.len() as u64));
            stream.data(&all);
        }
    }
}

/// Writes offsets and lengths in the form of old GNU headers.
fn pair_fields<'a>(
    block: &mut [u8; BLOCK],
    at: usize,
    pairs: impl Iterator<Item = &'a (u64, u64)>,
) {
    for (number, (offset, len)) in pairs.enumerate() {
        let at = at + 24 * number;
        let text = format!("{offset:011o}\0{len:011o}\0");
        block[at..at + 24].copy_from_slice(text.as_bytes());
    }
}
