use super::*;

fn read_all(reader: &mut LogReader) -> Vec<(Stream, Vec<u8>)> {
    std::iter::from_fn(|| reader.next_record().unwrap())
        .map(|record| (record.stream, record.bytes))
        .collect()
}

#[test]
fn records_come_back_in_order_and_reading_continues() {
    let dir = tempfile::tempdir().unwrap();
    let mut reader = LogReader::open(dir.path()).unwrap();
    assert_eq!(reader.next_record().unwrap(), None);
    let mut writer = LogWriter::create(dir.path(), 1 << 20).unwrap();
    writer.append(Stream::Stdout, b"one").unwrap();
    writer.append(Stream::Stderr, b"").unwrap();
    assert_eq!(
        read_all(&mut reader),
        [
            (Stream::Stdout, b"one".to_vec()),
            (Stream::Stderr, Vec::new())
        ]
    );
    writer.append(Stream::Stdout, &[0, 255]).unwrap();
    assert_eq!(read_all(&mut reader), [(Stream::Stdout, vec![0, 255])]);
}

#[test]
fn a_reader_follows_across_rotation_and_size_stays_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = LogWriter::create(dir.path(), 100).unwrap();
    let mut reader = LogReader::open(dir.path()).unwrap();
    let mut seen = Vec::new();
    for n in 0..50u8 {
        writer.append(Stream::Stdout, &[n; 10]).unwrap();
        seen.extend(read_all(&mut reader));
    }
    let expected: Vec<_> = (0..50u8).map(|n| (Stream::Stdout, vec![n; 10])).collect();
    assert_eq!(seen, expected);
    for name in [FILE, ROTATED] {
        assert!(std::fs::metadata(dir.path().join(name)).unwrap().len() <= 130);
    }
    let late = read_all(&mut LogReader::open(dir.path()).unwrap());
    assert!(late.len() >= 4 && late.last() == expected.last());
}

#[test]
fn a_half_written_record_is_not_returned_and_garbage_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = LogWriter::create(dir.path(), 1 << 20).unwrap();
    writer.append(Stream::Stdout, b"whole").unwrap();
    let path = dir.path().join(FILE);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let mut reader = LogReader::open(dir.path()).unwrap();
    assert_eq!(reader.next_record().unwrap(), None);
    std::fs::write(&path, [9; 32]).unwrap();
    assert!(LogReader::open(dir.path()).unwrap().next_record().is_err());
}

fn text(record: &(Stream, Vec<u8>)) -> String {
    String::from_utf8_lossy(&record.1).into_owned()
}

#[test]
fn a_reader_in_the_older_file_misses_nothing_by_one_rotation() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = LogWriter::create(dir.path(), 100).unwrap();
    let mut n = 0u8;
    let mut rotate = |writer: &mut LogWriter| {
        let inode = || std::fs::metadata(dir.path().join(FILE)).unwrap().ino();
        let before = inode();
        let first = n;
        while inode() == before {
            writer.append(Stream::Stdout, &[n; 10]).unwrap();
            n += 1;
        }
        first
    };
    rotate(&mut writer);
    let mut reader = LogReader::open(dir.path()).unwrap();
    let mut seen = vec![reader.next_record().unwrap().unwrap().bytes];
    rotate(&mut writer);
    seen.extend(read_all(&mut reader).into_iter().map(|(_, bytes)| bytes));
    let expected: Vec<_> = (0..n).map(|n| vec![n; 10]).collect();
    assert_eq!(seen, expected);
}

#[test]
fn a_reader_overtaken_by_two_rotations_learns_its_loss() {
    for open_first in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let early = LogReader::open(dir.path()).unwrap();
        let mut writer = LogWriter::create(dir.path(), 100).unwrap();
        let mut reader = match open_first {
            true => early,
            false => {
                writer.append(Stream::Stdout, &[0; 10]).unwrap();
                LogReader::open(dir.path()).unwrap()
            }
        };
        let begun = read_all(&mut reader).len();
        let first = u8::try_from(begun).unwrap();
        for n in first..50 {
            writer.append(Stream::Stdout, &[n; 10]).unwrap();
        }
        let mut lost = 0;
        let mut bytes = begun * 10;
        for record in read_all(&mut reader) {
            match record.0 {
                Stream::Stdout => bytes += record.1.len(),
                Stream::Stderr => {
                    let note = text(&record);
                    let count = note.strip_prefix("[sm: ").unwrap();
                    let (count, rest) = count.split_once(' ').unwrap();
                    assert!(rest.starts_with("bytes of output were lost"), "{note}");
                    lost += count.parse::<usize>().unwrap();
                }
            }
        }
        assert!(lost > 0 && lost + bytes == 500, "{lost} {bytes}");
    }
}

/// Runs the test `name` in a process of its own, because a file size limit applies to the
/// whole process. Returns true in that process.
fn in_a_process_of_its_own(name: &str) -> bool {
    const OWN: &str = "SM_TEST_OWN_PROCESS";
    if std::env::var_os(OWN).is_some() {
        return true;
    }
    let test = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", name])
        .env(OWN, "1")
        .output()
        .unwrap();
    assert!(test.status.success(), "{test:?}");
    assert!(
        String::from_utf8_lossy(&test.stdout).contains("1 passed"),
        "{test:?}"
    );
    false
}

#[test]
fn a_log_continues_after_a_full_disk_and_counts_missing_bytes() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let name = "output_log::tests::a_log_continues_after_a_full_disk_and_counts_missing_bytes";
    if !in_a_process_of_its_own(name) {
        return;
    }
    // With SIGXFSZ caught, writes beyond the limit fail with EFBIG.
    let ignored = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGXFSZ, ignored).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut writer = LogWriter::create(dir.path(), 1 << 20).unwrap();
    let mut reader = LogReader::open(dir.path()).unwrap();
    writer.append(Stream::Stdout, b"first").unwrap();
    let len = std::fs::metadata(dir.path().join(FILE)).unwrap().len();
    let before = getrlimit(Resource::Fsize);
    let tight = Rlimit {
        current: Some(len + 30),
        ..before
    };
    setrlimit(Resource::Fsize, tight).unwrap();
    // A part of the record fits below the limit.
    assert!(writer.append(Stream::Stdout, &[b'x'; 100]).is_err());
    assert!(writer.append(Stream::Stderr, &[b'x'; 20]).is_err());
    assert_eq!(
        std::fs::metadata(dir.path().join(FILE)).unwrap().len(),
        len,
        "no part of a record stays"
    );
    assert_eq!(read_all(&mut reader), [(Stream::Stdout, b"first".to_vec())]);
    setrlimit(Resource::Fsize, before).unwrap();
    writer.append(Stream::Stdout, b"second").unwrap();
    let seen = read_all(&mut reader);
    assert_eq!(seen.len(), 2);
    assert!(text(&seen[0]).starts_with("[sm: 120 bytes of output are missing"));
    assert_eq!(seen[1], (Stream::Stdout, b"second".to_vec()));
    assert_eq!(read_all(&mut LogReader::open(dir.path()).unwrap()).len(), 3);
}

#[test]
fn a_record_in_place_of_a_partial_one_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = LogWriter::create(dir.path(), 1 << 20).unwrap();
    writer.append(Stream::Stdout, b"first").unwrap();
    let mut reader = LogReader::open(dir.path()).unwrap();
    assert_eq!(read_all(&mut reader).len(), 1);
    let path = dir.path().join(FILE);
    let whole = std::fs::metadata(&path).unwrap().len();
    let half = encode(Stream::Stdout as u8, &[b'x'; 500]).unwrap();
    let mut file = OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(&half[..100]).unwrap();
    assert_eq!(reader.next_record().unwrap(), None);
    file.set_len(whole).unwrap();
    writer.dropped = 500;
    writer.append(Stream::Stderr, &[b'y'; 1000]).unwrap();
    let seen = read_all(&mut reader);
    assert!(text(&seen[0]).contains("500 bytes"));
    assert_eq!(seen[1], (Stream::Stderr, vec![b'y'; 1000]));
}

#[test]
fn a_failed_rotation_is_retried() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = LogWriter::create(dir.path(), 50).unwrap();
    let mut reader = LogReader::open(dir.path()).unwrap();
    writer.append(Stream::Stdout, &[1; 30]).unwrap();
    // A directory with the draft's name prevents its creation.
    std::fs::create_dir(dir.path().join(NEXT_FILE)).unwrap();
    for _ in 0..3 {
        assert!(writer.append(Stream::Stdout, &[2; 30]).is_err());
    }
    assert_eq!(read_all(&mut reader), [(Stream::Stdout, vec![1; 30])]);
    std::fs::remove_dir(dir.path().join(NEXT_FILE)).unwrap();
    writer.append(Stream::Stdout, &[3; 30]).unwrap();
    let seen = read_all(&mut reader);
    assert!(text(&seen[0]).starts_with("[sm: 90 bytes"), "{seen:?}");
    assert_eq!(seen[1], (Stream::Stdout, vec![3; 30]));
}

/// The next run of a VM.
#[test]
fn a_log_continues_after_a_writer_that_was_killed() {
    let dir = tempfile::tempdir().unwrap();
    let append = |text: &[u8]| {
        let mut writer = LogWriter::create(dir.path(), 60).unwrap();
        writer.append(Stream::Stdout, text).unwrap();
    };
    append(b"one");
    let path = dir.path().join(FILE);
    let whole = std::fs::read(&path).unwrap();
    let torn = encode(1, b"lost").unwrap();
    for cut in 1..torn.len() {
        std::fs::write(&path, [&whole[..], &torn[..cut]].concat()).unwrap();
        LogWriter::create(dir.path(), 60).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), whole, "{cut}");
    }
    append(b"two");
    append(b"three");
    let mut reader = LogReader::open(dir.path()).unwrap();
    let all: Vec<_> = read_all(&mut reader).into_iter().map(|(_, b)| b).collect();
    assert_eq!(all, [b"one".to_vec(), b"two".to_vec(), b"three".to_vec()]);
    // The new file knows how much there was before it.
    let file = File::open(&path).unwrap();
    assert_eq!(extent(&file).unwrap().1, Some(11));
}
