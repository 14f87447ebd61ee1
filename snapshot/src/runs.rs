//! Lists of page runs, which are ascending, disjoint and in RAM order.

/// A run of pages: first page and number of pages.
pub type Run = (u64, u64);

/// Appends a run, and merges it with the last one if they are adjacent.
pub fn push(runs: &mut Vec<Run>, (first, pages): Run) {
    match runs.last_mut() {
        Some((start, count)) if *start + *count == first => *count += pages,
        _ if pages == 0 => {}
        _ => runs.push((first, pages)),
    }
}

/// Returns true if a page of `run` is in `runs`.
#[must_use]
pub fn touches(runs: &[Run], (first, pages): Run) -> bool {
    let after = runs.partition_point(|(start, count)| start.saturating_add(*count) <= first);
    let next = runs.get(after);
    pages > 0 && next.is_some_and(|(start, _)| *start < first.saturating_add(pages))
}

/// Returns the union of two lists.
#[must_use]
pub fn union(a: &[Run], b: &[Run]) -> Vec<Run> {
    let mut all: Vec<Run> = Vec::with_capacity(a.len() + b.len());
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    loop {
        let next = match (a.peek(), b.peek()) {
            (Some(x), Some(y)) if x.0 <= y.0 => a.next(),
            (Some(_), None) => a.next(),
            (_, Some(_)) => b.next(),
            (None, None) => return all,
        };
        let Some(&(first, pages)) = next else {
            return all;
        };
        match all.last_mut() {
            Some((start, count)) if *start + *count >= first => {
                *count = (*count).max(first + pages - *start);
            }
            _ => all.push((first, pages)),
        }
    }
}

/// Returns the pages of `a` that are in `b`, or with `inside` false, those that are not.
fn select(a: &[Run], b: &[Run], inside: bool) -> Vec<Run> {
    let mut selected = Vec::new();
    let mut others = b.iter().peekable();
    for &(first, pages) in a {
        let end = first.saturating_add(pages);
        let mut at = first;
        while at < end {
            while others
                .next_if(|(start, count)| start.saturating_add(*count) <= at)
                .is_some()
            {}
            let (start, stop) = others.peek().map_or((end, end), |(start, count)| {
                (*start, start.saturating_add(*count))
            });
            let within = start <= at && at < stop;
            let until = if within { stop } else { start }.min(end);
            if within == inside {
                push(&mut selected, (at, until - at));
            }
            at = until;
        }
    }
    selected
}

/// Returns the pages of `a` that are not in `b`.
#[must_use]
pub fn subtract(a: &[Run], b: &[Run]) -> Vec<Run> {
    select(a, b, false)
}

/// Returns the pages of `a` that are in `b`.
#[must_use]
pub fn intersect(a: &[Run], b: &[Run]) -> Vec<Run> {
    select(a, b, true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(pages: &[bool]) -> Vec<Run> {
        let mut runs = Vec::new();
        for (page, _) in (0..).zip(pages).filter(|(_, there)| **there) {
            push(&mut runs, (page, 1));
        }
        runs
    }

    proptest! {
        #[test]
        fn a_union_has_the_pages_of_both(
            a in prop::collection::vec(any::<bool>(), 40),
            b in prop::collection::vec(any::<bool>(), 40),
        ) {
            let both: Vec<bool> = a.iter().zip(&b).map(|(a, b)| a | b).collect();
            prop_assert_eq!(union(&of(&a), &of(&b)), of(&both));
            let only: Vec<bool> = a.iter().zip(&b).map(|(a, b)| a & !b).collect();
            prop_assert_eq!(subtract(&of(&a), &of(&b)), of(&only));
            let common: Vec<bool> = a.iter().zip(&b).map(|(a, b)| a & b).collect();
            prop_assert_eq!(intersect(&of(&a), &of(&b)), of(&common));
        }

        #[test]
        fn runs_touch_what_they_share_a_page_with(
            pages in prop::collection::vec(any::<bool>(), 40),
            first in 0usize..40,
            count in 0usize..9,
        ) {
            let end = (first + count).min(40);
            let shared = pages[first..end].contains(&true);
            let run = (first as u64, (end - first) as u64);
            prop_assert_eq!(touches(&of(&pages), run), shared);
        }
    }
}
