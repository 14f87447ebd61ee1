//! The table of `--timings`.

use serde::Serialize;
use sm_runtime::timings::Phase;

use crate::table;

/// A phase with its time relative to the first.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Step {
    name: String,
    /// Milliseconds since the first phase.
    at_ms: f64,
    /// Milliseconds since the previous phase.
    took_ms: f64,
}

/// Returns the steps, sorted by time.
pub(crate) fn steps(phases: &[Phase]) -> Vec<Step> {
    let mut phases: Vec<&Phase> = phases.iter().collect();
    phases.sort_by_key(|phase| phase.at_ns);
    let Some(first) = phases.first().map(|phase| phase.at_ns) else {
        return Vec::new();
    };
    let mut last = first;
    phases
        .into_iter()
        .map(|phase| Step {
            name: phase.name.clone(),
            at_ms: milliseconds(phase.at_ns - first),
            took_ms: milliseconds(phase.at_ns - std::mem::replace(&mut last, phase.at_ns)),
        })
        .collect()
}

/// A float represents whole microseconds exactly for three centuries.
#[expect(clippy::cast_precision_loss, reason = "microseconds of one run")]
fn milliseconds(nanoseconds: u64) -> f64 {
    (nanoseconds / 1000) as f64 / 1000.0
}

pub(crate) fn render(phases: &[Phase]) -> String {
    let rows: Vec<[String; 3]> = steps(phases)
        .into_iter()
        .map(|step| {
            [
                step.name,
                format!("{:>10.3}", step.at_ms),
                format!("{:>10.3}", step.took_ms),
            ]
        })
        .collect();
    table::render(["PHASE", "   AT (ms)", " TOOK (ms)"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_relative_and_sorted() {
        let phases = [Phase::at("b", 3_500_000), Phase::at("a", 1_000_000)];
        let steps = steps(&phases);
        assert_eq!(steps[0].name, "a");
        assert_eq!((steps[1].at_ms, steps[1].took_ms), (2.5, 2.5));
        assert!(render(&phases).contains("2.500"));
    }
}
