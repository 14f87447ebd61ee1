//! Tests of the table of nodes.

use super::*;

fn identity(inode: u64) -> Identity {
    Identity {
        device: 1,
        inode,
        born: 0,
        kind: crate::abi::linux::S_IFDIR,
    }
}

fn table(max: u32) -> (Nodes, NodeIndex) {
    (Nodes::new(&[identity(0)], max), NodeIndex::of_share(0))
}

fn names(nodes: &Nodes, index: NodeIndex) -> Result<String, Errno> {
    let path = nodes.path(index)?;
    let names = path
        .iter()
        .map(|step| nodes.get(*step).map(|node| node.name().to_owned()));
    let names: Result<Vec<_>, _> = names.collect();
    Ok(names?
        .iter()
        .map(|name| name.to_str().unwrap())
        .collect::<Vec<_>>()
        .join("/"))
}

#[test]
fn numbers_are_never_used_again() {
    let (mut nodes, share) = table(10);
    assert_eq!(nodes.id(NodeIndex::ROOT), 1);
    assert_eq!(nodes.find(2), Ok(share));
    let first = nodes.seen(share, b"a", identity(1)).unwrap();
    let id = nodes.id(first);
    assert_eq!(nodes.seen(share, b"b", identity(1)), Ok(first));
    assert!(!nodes.forget(first, 1));
    assert!(nodes.forget(first, u64::MAX));
    assert_eq!(nodes.find(id), Err(Errno::STALE));
    let second = nodes.seen(share, b"c", identity(2)).unwrap();
    assert_ne!(nodes.id(second), id);
    for wrong in [0, 99, u64::MAX, 1 << 32 | 1, id] {
        assert_eq!(nodes.find(wrong), Err(Errno::STALE), "{wrong}");
    }
    assert!(!nodes.forget(share, u64::MAX));
    assert_eq!(nodes.find(2), Ok(share));
}

#[test]
fn directories_remain_as_long_as_their_entries() {
    let (mut nodes, share) = table(10);
    let a = nodes.seen(share, b"a", identity(1)).unwrap();
    let b = nodes.seen(a, b"b", identity(2)).unwrap();
    let c = nodes.seen(b, b"c", identity(3)).unwrap();
    assert_eq!(names(&nodes, c).unwrap(), "a/b/c");
    assert!(!nodes.forget(a, 1));
    assert!(!nodes.forget(b, 1));
    assert_eq!(names(&nodes, c).unwrap(), "a/b/c");
    assert!(nodes.forget(c, 1));
    assert_eq!(nodes.len(), 0);
}

#[test]
fn directories_that_trade_places_form_no_circle() {
    let (mut nodes, share) = table(10);
    let a = nodes.seen(share, b"a", identity(1)).unwrap();
    let b = nodes.seen(a, b"b", identity(2)).unwrap();
    let c = nodes.seen(b, b"c", identity(3)).unwrap();
    // The host moves `a` into `c`, which it has moved elsewhere before.
    nodes.seen(c, b"a", identity(1)).unwrap();
    assert_eq!(nodes.path(a), Err(Errno::STALE));
    // As soon as `b` is seen where it is, all have paths again.
    nodes.seen(share, b"b", identity(2)).unwrap();
    assert_eq!(names(&nodes, a).unwrap(), "b/c/a");
    assert_eq!(nodes.seen(a, b"x", identity(1)), Err(Errno::LOOP));
    nodes.moved(a, b"x", identity(1));
    assert_eq!(names(&nodes, a).unwrap(), "b/c/a");
}

/// Any sequence of operations leaves a tree, and a table that is empty in the end.
#[test]
fn any_sequence_leaves_a_tree() {
    let mut random = 1u64;
    let mut next = |below: u64| {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (random >> 33) % below
    };
    let (mut nodes, share) = table(40);
    let mut known: Vec<(NodeIndex, u64)> = Vec::new();
    for step in 0..200_000 {
        let parent = match known.len() as u64 {
            0 => share,
            len => match known.get(usize::try_from(next(len + 1)).unwrap()) {
                Some((index, _)) => *index,
                None => share,
            },
        };
        let inode = identity(1 + next(60));
        match next(4) {
            0 | 1 => match nodes.seen(parent, &[b'a'; 3], inode) {
                Ok(index) => known.push((index, nodes.id(index))),
                Err(errno) => assert!(matches!(errno, Errno::NFILE | Errno::LOOP)),
            },
            2 => drop(nodes.moved(parent, b"moved", inode)),
            _ if known.is_empty() => {}
            _ => {
                let at = usize::try_from(next(known.len() as u64)).unwrap();
                let (index, id) = known.swap_remove(at);
                assert_eq!(nodes.find(id), Ok(index), "step {step}");
                nodes.forget(index, 1);
            }
        }
        if let Some((index, _)) = known.last() {
            // Ends, or the test does not.
            let _ = nodes.path(*index);
        }
    }
    for (index, _) in known.drain(..) {
        nodes.forget(index, 1);
    }
    assert_eq!(nodes.len(), 0);
    assert!(nodes.buckets.iter().all(|first| *first == NONE));
    assert!(nodes.slots.iter().all(|node| node.children == 0));
}
