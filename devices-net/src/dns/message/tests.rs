use proptest::prelude::*;

use super::*;

fn name(labels: &str) -> Vec<u8> {
    let labels = labels.split('.').filter(|label| !label.is_empty());
    let mut bytes: Vec<u8> = labels
        .flat_map(|label| [&[u8::try_from(label.len()).unwrap()], label.as_bytes()].concat())
        .collect();
    bytes.push(0);
    bytes
}

fn query(id: u16, labels: &str, kind: u16) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    bytes.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    bytes.extend(name(labels));
    bytes.extend(kind.to_be_bytes());
    bytes.extend([0, 1]);
    bytes
}

/// A response with records of the question's name, by reference.
fn response(query: &[u8], records: &[(u16, u32, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = query.to_vec();
    bytes[2] = 0x81;
    bytes[3] = 0x80;
    bytes[7] = u8::try_from(records.len()).unwrap();
    for (kind, ttl, data) in records {
        bytes.extend([0xc0, 12]);
        bytes.extend(kind.to_be_bytes());
        bytes.extend([0, 1]);
        bytes.extend(ttl.to_be_bytes());
        bytes.extend(u16::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(data);
    }
    bytes
}

fn found(message: &[u8]) -> Result<Vec<(String, u32)>, MalformedMessage> {
    let mut found = Vec::new();
    addresses(message, |it| found.push((it.address.to_string(), it.ttl)))?;
    Ok(found)
}

#[test]
fn questions_are_understood() {
    let message = query(7, "WWW.Example.com", TYPE_AAAA);
    let question = DnsQuestion::parse(&message).unwrap();
    assert_eq!(
        (question.id, &*question.name, question.kind),
        (7, "www.example.com", 28)
    );
    assert_eq!(
        (question.end, question.is_standard()),
        (message.len(), true)
    );
    assert_eq!(
        DnsQuestion::parse_response(&message),
        Err(MalformedMessage::Kind)
    );
    // The root has an empty name.
    assert_eq!(DnsQuestion::parse(&query(7, "", 2)).unwrap().name, "");
    // A dot in a label is not one between labels.
    let mut odd = query(7, "a-b.com", 1);
    odd[14] = b'.';
    assert_eq!(DnsQuestion::parse(&odd).unwrap().name, "a?b.com");
    for end in 0..message.len() {
        assert!(DnsQuestion::parse(&message[..end]).is_err(), "{end} bytes");
    }
    let mut two = message.clone();
    two[5] = 2;
    assert_eq!(DnsQuestion::parse(&two), Err(MalformedMessage::Questions));
}

#[test]
fn names_that_refer_to_themselves_are_refused() {
    let mut message = query(7, "abc", 1);
    message.truncate(DNS_HEADER);
    // References to each other, and a name that is repeated by one.
    for loop_ in [
        &[0xc0, 12, 0, 1, 0, 1][..],
        &[0xc0, 14, 0xc0, 12, 0, 1, 0, 1],
        &[1, b'a', 0xc0, 12],
    ] {
        let message = [&message[..], loop_].concat();
        assert_eq!(DnsQuestion::parse(&message), Err(MalformedMessage::Name));
    }
    let long = vec!["a"; 130].join(".");
    assert_eq!(
        DnsQuestion::parse(&query(7, &long, 1)),
        Err(MalformedMessage::Name)
    );
    let longest = vec!["abc"; 63].join(".");
    assert!(DnsQuestion::parse(&query(7, &longest, 1)).is_ok());
}

#[test]
fn addresses_of_answers_are_found() {
    let question = query(7, "example.com", TYPE_A);
    let hints = [
        &[0, 1][..],
        &name("svc.example.net"),
        &[0, 1, 0, 3, 2, b'h', b'2'],
        &[0, 4, 0, 8, 192, 0, 2, 1, 192, 0, 2, 2],
        &[
            0, 6, 0, 16, 0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9,
        ],
    ]
    .concat();
    let message = response(
        &question,
        &[
            (5, 300, name("other.example.com")),
            (TYPE_A, 60, vec![198, 51, 100, 1]),
            (TYPE_AAAA, 1 << 30, Ipv6Addr::LOCALHOST.octets().to_vec()),
            (TYPE_HTTPS, 5, hints.clone()),
            (TYPE_OPT, 0, vec![]),
        ],
    );
    let expected = [
        ("198.51.100.1", 60),
        ("::1", 1 << 30),
        ("192.0.2.1", 5),
        ("192.0.2.2", 5),
        ("2001:db8::9", 5),
    ];
    let expected: Vec<_> = expected.map(|(text, ttl)| (text.to_owned(), ttl)).into();
    assert_eq!(found(&message), Ok(expected));
    assert!(answers(&question, &message));
    for end in 0..message.len() {
        assert!(found(&message[..end]).is_err(), "{end} bytes");
    }
    // Hints that end within a parameter.
    let cut = response(
        &question,
        &[(TYPE_SVCB, 5, hints[..hints.len() - 1].to_vec())],
    );
    assert_eq!(found(&cut), Err(MalformedMessage::Truncated));
}

/// Appends a record of another name.
fn append(message: &mut Vec<u8>, owner: &str, kind: u16, data: &[u8]) {
    message.extend(name(owner));
    message.extend(kind.to_be_bytes());
    message.extend([0, 1, 0, 0, 0, 60]);
    message.extend(u16::try_from(data.len()).unwrap().to_be_bytes());
    message.extend(data);
    message[11] += 1;
}

/// A question for mail servers has their addresses in its answer.
#[test]
fn addresses_of_other_names_are_told_from_those_of_the_name() {
    const TYPE_MX: u16 = 15;
    let question = query(7, "example.com", TYPE_MX);
    let mail = [&[0, 10][..], &name("mail.example.net")].concat();
    let mut message = response(&question, &[(TYPE_MX, 60, mail)]);
    append(&mut message, "mail.example.net", TYPE_A, &[192, 0, 2, 1]);
    // Not an alias of the name, and an alias that comes too late.
    let alias = name("www.example.com");
    append(&mut message, "other.example.net", TYPE_CNAME, &alias);
    append(&mut message, "www.example.com", TYPE_A, &[192, 0, 2, 2]);
    append(&mut message, "EXAMPLE.com", TYPE_CNAME, &alias);
    append(&mut message, "www.example.com", TYPE_A, &[192, 0, 2, 3]);
    let host = [&[0, 0][..], &name("host.example.org")].concat();
    append(&mut message, "www.example.com", TYPE_HTTPS, &host);
    append(&mut message, "host.example.org", TYPE_A, &[192, 0, 2, 4]);
    append(&mut message, "", TYPE_A, &[192, 0, 2, 5]);
    let mut found = Vec::new();
    let code = addresses(&message, |it| {
        found.push((it.address.to_string(), it.of_name));
    });
    assert_eq!(code, Ok(0));
    let expected = [
        ("192.0.2.1", false),
        ("192.0.2.2", false),
        ("192.0.2.3", true),
        ("192.0.2.4", true),
        ("192.0.2.5", false),
    ];
    assert_eq!(found, expected.map(|(text, own)| (text.to_owned(), own)));
    // A target that does not end with its record.
    let mut long = response(&question, &[(TYPE_CNAME, 60, alias[..5].to_vec())]);
    long.extend([0; 12]);
    assert_eq!(addresses(&long, |_| {}), Err(MalformedMessage::Name));
}

#[test]
fn chains_of_aliases_have_an_end() {
    let question = query(7, "n0", TYPE_A);
    let mut message = response(&question, &[]);
    for number in 0..40 {
        let (owner, target) = (format!("n{number}"), format!("n{}", number + 1));
        append(&mut message, &owner, TYPE_A, &[192, 0, 2, number]);
        append(&mut message, &owner, TYPE_CNAME, &name(&target));
    }
    let mut of_name = 0;
    let code = addresses(&message, |it| of_name += usize::from(it.of_name));
    assert_eq!((code, of_name), (Ok(0), 1 + MAX_ALIASES));
}

#[test]
fn only_the_answer_to_the_question_counts() {
    let question = query(7, "example.com", TYPE_A);
    assert!(answers(&question, &response(&question, &[])));
    for other in [
        query(8, "example.com", TYPE_A),
        query(7, "example.org", TYPE_A),
        query(7, "example.com", TYPE_AAAA),
        // Servers return the letters as they are, which is a further secret.
        query(7, "eXample.com", TYPE_A),
        query(7, "example.com.x", TYPE_A),
    ] {
        assert!(!answers(&question, &response(&other, &[])));
    }
    assert!(!answers(&question, &question));
}

#[test]
fn refusals_repeat_the_question() {
    let question = query(7, "example.com", TYPE_A);
    let mut message = Vec::new();
    refusal(&question, ResponseCode::NoSuchName, &mut message);
    assert!(answers(&question, &message));
    assert_eq!(message.len(), question.len());
    assert_eq!((message[2], message[3]), (0x81, 0x83));
    assert_eq!(addresses(&message, |_| {}), Ok(3));
    // Options are answered by options.
    let mut with = question.clone();
    with[11] = 1;
    with.extend([0, 0, 41, 16, 0, 0, 0, 0, 0, 0, 0]);
    refusal(&with, ResponseCode::ServerFailure, &mut message);
    assert_eq!(message.len(), with.len());
    assert_eq!(addresses(&message, |_| {}), Ok(2));
    // A reason is one of the options, and only there (RFC 8914).
    let prohibited = ResponseCode::Prohibited(ExtendedError::Blocked);
    refusal(&with, prohibited, &mut message);
    assert!(message.ends_with(&[0, 6, 0, 15, 0, 2, 0, 15]));
    assert_eq!(message.len(), with.len() + 6);
    assert_eq!(addresses(&message, |_| {}), Ok(3));
    refusal(&question, prohibited, &mut message);
    assert_eq!(message.len(), question.len());
    refusal(&question, ResponseCode::TooLong, &mut message);
    assert_eq!((message[2], message[3]), (0x83, 0x80));
    // A header alone is enough for an error.
    refusal(&question[..13], ResponseCode::FormatError, &mut message);
    assert_eq!(message, [0, 7, 0x81, 0x81, 0, 0, 0, 0, 0, 0, 0, 0]);
    refusal(&question[..11], ResponseCode::FormatError, &mut message);
    assert!(message.is_empty());
}

/// The name would not be a part of the question, which an answer must repeat.
#[test]
fn a_question_refers_to_no_other_part() {
    let mut question = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    question.extend([0xc0, 18, 0, 1, 0, 1]);
    question.extend(b"\x03own\x00");
    assert_eq!(DnsQuestion::parse(&question), Err(MalformedMessage::Name));
    // Nor to the header.
    question[13] = 4;
    assert_eq!(DnsQuestion::parse(&question), Err(MalformedMessage::Name));
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(
        mut bytes in prop::collection::vec(any::<u8>(), 0..200),
        records in 0u8..20,
        references in prop::collection::vec((12usize..200, 0u8..60), 0..12),
    ) {
        if let Some(header) = bytes.first_chunk_mut::<DNS_HEADER>() {
            header[2..].copy_from_slice(&[0x81, 0x80, 0, 1, 0, records, 0, 0, 0, 0]);
        }
        for (at, to) in references {
            if let Some(place) = bytes.get_mut(at..at + 2) {
                place.copy_from_slice(&[0xc0, to]);
            }
        }
        let _ = found(&bytes);
        let mut message = Vec::new();
        if bytes.len() > 2 {
            bytes[2] = 1;
        }
        refusal(&bytes, ResponseCode::FormatError, &mut message);
        prop_assert!(message.len() <= bytes.len() + 11);
        if let Ok(question) = DnsQuestion::parse(&bytes) {
            prop_assert!(question.end <= bytes.len() && question.name.len() <= MAX_NAME);
            prop_assert!(answers(&bytes, &message) || question.end != message.len());
        }
    }
}
