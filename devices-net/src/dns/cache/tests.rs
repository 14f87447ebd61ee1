use proptest::prelude::*;

use super::*;

fn question(id: u16, name: &str) -> Vec<u8> {
    let mut bytes = [&id.to_be_bytes()[..], &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]].concat();
    bytes.push(u8::try_from(name.len()).unwrap());
    bytes.extend(name.as_bytes());
    bytes.extend([0, 0, 1, 0, 1]);
    bytes
}

fn response(question: &[u8], ttl: u32, last: u8) -> Vec<u8> {
    let mut bytes = question.to_vec();
    (bytes[2], bytes[3], bytes[7]) = (0x81, 0x80, 1);
    bytes.extend([0xc0, 12, 0, 1, 0, 1]);
    bytes.extend(ttl.to_be_bytes());
    bytes.extend([0, 4, 198, 51, 100, last]);
    bytes
}

#[test]
fn answers_are_those_of_the_question_and_grow_old() {
    let start = Instant::now();
    let mut cache = DnsCache::new(10, 10_000);
    let asked = question(1, "example");
    cache.insert(&asked, &response(&asked, 60, 7), start);
    let mut out = Vec::new();
    // Another number and another spelling.
    let again = question(99, "eXAMPLE");
    let at = start + Duration::from_secs(10);
    assert!(cache.get(&again, at, &mut out));
    assert_eq!(out, response(&again, 50, 7));
    assert!(!cache.get(&again, start + Duration::from_secs(60), &mut out));
    assert!(cache.is_empty() && cache.bytes == 0 && cache.ends.is_empty());
    // Other flags are another question.
    let mut other = question(1, "example");
    cache.insert(&asked, &response(&asked, 60, 7), start);
    other[3] = 0x10;
    assert!(!cache.get(&other, start, &mut out));
    assert!(!cache.get(&[0; 5], start, &mut out));
    cache.clear();
    assert!(!cache.get(&asked, start, &mut out));
}

proptest! {
    #[test]
    fn limits_hold_and_what_is_found_is_the_last_answer(
        steps in prop::collection::vec((0u8..12, 0u32..90, 0u64..20), 1..150),
        entries in 0usize..8,
        bytes in 0usize..400,
    ) {
        let mut now = Instant::now();
        let mut cache = DnsCache::new(entries, bytes);
        let mut model = HashMap::new();
        let mut out = Vec::new();
        for (number, (name, ttl, wait)) in (0u8..).zip(steps) {
            let asked = question(1, &format!("n{name}"));
            let answer = response(&asked, ttl, number);
            cache.insert(&asked, &answer, now);
            model.insert(name, (number, now + Duration::from_secs(ttl.into())));
            prop_assert!(cache.len() <= entries && cache.bytes <= bytes);
            prop_assert_eq!(cache.len(), cache.ends.len());
            now += Duration::from_secs(wait);
            for (name, (last, end)) in &model {
                if cache.get(&question(1, &format!("n{name}")), now, &mut out) {
                    prop_assert_eq!(out.last(), Some(last));
                    prop_assert!(now < *end);
                }
            }
        }
    }
}
