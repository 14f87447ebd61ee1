use proptest::prelude::*;

use super::*;

fn vector(len: usize, bytes: &[u8]) -> Vec<u8> {
    let count = bytes.len().to_be_bytes();
    [&count[count.len() - len..], bytes].concat()
}

/// A ClientHello with extensions.
fn hello(extensions: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let mut list = Vec::new();
    for (kind, data) in extensions {
        list.extend(kind.to_be_bytes());
        list.extend(vector(2, data));
    }
    let body = [
        &[3, 3][..],
        &[7; 32],
        &vector(1, &[1; 32]),
        &vector(2, &[0x13, 1, 0x13, 2]),
        &vector(1, &[0]),
        &vector(2, &list),
    ];
    [&[1][..], &vector(3, &body.concat())].concat()
}

fn name(text: &[u8]) -> (u16, Vec<u8>) {
    let entry = [&[0][..], &vector(2, text)].concat();
    (0, vector(2, &entry))
}

/// A message in records of at most `size` bytes.
fn records(message: &[u8], size: usize) -> Vec<u8> {
    let record = |part: &[u8]| [&[22, 3, 1][..], &vector(2, part)].concat();
    message.chunks(size).flat_map(record).collect()
}

fn named(text: &str) -> ClientHello {
    ClientHello::Named(text.to_owned())
}

#[test]
fn the_name_is_found_in_any_number_of_records() {
    let message = hello(&[
        (10, vec![0, 2, 0, 29]),
        name(b"WWW.Example.com."),
        (43, vec![2, 3, 4]),
    ]);
    for size in [1, 2, 5, 100, 10_000] {
        let bytes = records(&message, size);
        assert_eq!(read_client_hello(&bytes), named("www.example.com"));
        // It is not found before it is complete, and what follows does not matter.
        for len in 0..bytes.len() {
            assert_eq!(read_client_hello(&bytes[..len]), ClientHello::Incomplete);
        }
        let more = [&bytes[..], &[20, 3, 3, 0, 1, 1]].concat();
        assert_eq!(read_client_hello(&more), named("www.example.com"));
    }
    let unnamed = records(&hello(&[(10, vec![0, 2, 0, 29])]), 1000);
    assert_eq!(read_client_hello(&unnamed), ClientHello::Unnamed);
}

#[test]
fn other_beginnings_are_known_from_their_first_bytes() {
    for bytes in [
        &b"GET / HTTP/1.1\r\n"[..],
        b"SSH-2.0-x",
        b"G",
        &[22, 2],
        &[22, 3, 1, 0, 0],
        &[22, 3, 1, 0xff, 0xff],
        // A ServerHello, and one that is announced to be larger than any.
        &[22, 3, 1, 0, 1, 2],
        &[22, 3, 1, 0, 4, 1, 1, 0, 0],
    ] {
        assert_eq!(read_client_hello(bytes), ClientHello::Other, "{bytes:?}");
    }
    let long = records(&[&[1, 0, 0x3f, 0xff][..], &[0; 0x4000]].concat(), 16);
    assert_eq!(read_client_hello(&long), ClientHello::Other);
    assert_eq!(read_client_hello(&long[..1000]), ClientHello::Incomplete);
}

/// A peer might read the other name.
#[test]
fn ambiguous_names_are_malformed() {
    let (_, one) = name(b"a.example");
    let entry = |kind: u8, text: &[u8]| [&[kind][..], &vector(2, text)].concat();
    let two = [entry(0, b"a.example"), entry(0, b"b.example")].concat();
    for extensions in [
        vec![name(b"a.example"), name(b"b.example")],
        vec![name(b"a.example"), name(b"a.example")],
        vec![(0, vector(2, &two))],
        vec![(0, vector(2, &entry(1, b"a.example")))],
        vec![(0, [&one[..], &[0]].concat())],
        vec![(0, Vec::new())],
        vec![name(b"")],
        vec![name(b"a.example\0.b.example")],
        vec![name(b"a b")],
        vec![name("bücher.example".as_bytes())],
        vec![name(&[b'a'; 254])],
    ] {
        let bytes = records(&hello(&extensions), 1000);
        assert_eq!(
            read_client_hello(&bytes),
            ClientHello::Other,
            "{extensions:?}"
        );
    }
    // Bytes behind the extensions.
    let mut message = hello(&[name(b"a.example")]);
    message.push(0);
    message[3] += 1;
    let bytes = records(&message, 1000);
    assert_eq!(read_client_hello(&bytes), ClientHello::Other);
}

proptest! {
    #[test]
    fn any_bytes_are_read(bytes: Vec<u8>, size in 1usize..40) {
        let _ = read_client_hello(&bytes);
        let _ = read_client_hello(&records(&bytes, size));
        let _ = client_hello(&bytes);
        let _ = server_name(&bytes);
    }

    #[test]
    fn more_bytes_never_change_a_name(
        before in prop::collection::vec((1u16..60, prop::collection::vec(any::<u8>(), 0..60)), 0..8),
        text in "[a-z0-9-]{1,20}(\\.[a-z0-9-]{1,20}){0,3}",
        size in 1usize..600,
        cut: prop::sample::Index,
        flip in any::<Option<(prop::sample::Index, u8)>>(),
    ) {
        let mut extensions = before;
        extensions.push(name(text.as_bytes()));
        let mut bytes = records(&hello(&extensions), size);
        prop_assert_eq!(read_client_hello(&bytes), named(&text));
        if let Some((at, value)) = flip {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let whole = read_client_hello(&bytes);
        let part = read_client_hello(&bytes[..cut.index(bytes.len())]);
        // The first verdict is the last.
        prop_assert!(part == ClientHello::Incomplete || part == whole, "{:?} {:?}", part, whole);
    }
}
