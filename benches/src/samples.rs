//! Measured durations, by subject and phase.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Durations of one phase, in microseconds, in the order they were measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PhaseSamples {
    /// The measured step, such as `map memory`.
    pub name: String,
    /// One for each iteration.
    pub micros: Vec<f64>,
}

/// Statistics of a phase, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

impl PhaseSamples {
    /// Returns percentiles by nearest rank; `None` without a sample.
    #[must_use]
    pub fn summary(&self) -> Option<Summary> {
        let mut sorted = self.micros.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |percent: usize| {
            let rank = (sorted.len() * percent).div_ceil(100).max(1);
            sorted.get(rank - 1).copied()
        };
        Some(Summary {
            p50: at(50)?,
            p90: at(90)?,
            p99: at(99)?,
            max: at(100)?,
        })
    }
}

/// One subject in one configuration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// The name: `sm`, `floor`, or a rival.
    pub subject: String,
    /// Phases in order of time.
    pub phases: Vec<PhaseSamples>,
    /// The time from the first to the last phase.
    pub total: PhaseSamples,
}

impl Series {
    /// Creates an empty series.
    #[must_use]
    pub fn new(subject: &str) -> Self {
        Self {
            subject: subject.to_owned(),
            phases: Vec::new(),
            total: PhaseSamples {
                name: "total".to_owned(),
                micros: Vec::new(),
            },
        }
    }

    /// Adds an iteration: the duration of each of its phases.
    pub fn add(&mut self, phases: &[(&str, Duration)]) {
        let micros = |duration: &Duration| duration.as_secs_f64() * 1e6;
        for (name, duration) in phases {
            match self.phases.iter_mut().find(|phase| phase.name == *name) {
                Some(phase) => phase.micros.push(micros(duration)),
                None => self.phases.push(PhaseSamples {
                    name: (*name).to_owned(),
                    micros: vec![micros(duration)],
                }),
            }
        }
        let total = phases.iter().map(|(_, duration)| micros(duration)).sum();
        self.total.micros.push(total);
    }

    /// Returns the sum of the phases from the one called `name` to the last.
    #[must_use]
    pub fn since(&self, name: &str) -> Option<PhaseSamples> {
        let first = self.phases.iter().position(|phase| phase.name == name)?;
        let mut together = PhaseSamples {
            name: format!("since \"{name}\""),
            micros: vec![0.0; self.total.micros.len()],
        };
        for phase in self.phases.iter().skip(first) {
            for (sum, micros) in together.micros.iter_mut().zip(&phase.micros) {
                *sum += micros;
            }
        }
        Some(together)
    }
}

/// Subjects measured alternately in one configuration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// The configuration, for a person: `1 vCPU, 512 MiB, warm page cache`.
    pub title: String,
    /// The subjects; the first is compared with the others.
    pub series: Vec<Series>,
    /// A phase; the comparison is repeated for the time from it.
    #[serde(default)]
    pub since: Option<String>,
}

impl Comparison {
    /// Returns the median total of the first subject divided by that of `other`.
    #[must_use]
    pub fn ratio(&self, other: &str) -> Option<f64> {
        self.ratio_of(other, |series| Some(series.total.clone()))
    }

    /// Returns the same ratio for the time from phase [`Self::since`].
    #[must_use]
    pub fn ratio_since(&self, other: &str) -> Option<f64> {
        let since = self.since.as_deref()?;
        self.ratio_of(other, |series| series.since(since))
    }

    fn ratio_of(&self, other: &str, of: impl Fn(&Series) -> Option<PhaseSamples>) -> Option<f64> {
        let median = |series: &Series| Some(of(series)?.summary()?.p50);
        let ours = median(self.series.first()?)?;
        let theirs = median(self.series.iter().find(|s| s.subject == other)?)?;
        (theirs > 0.0).then(|| ours / theirs)
    }
}

/// All measurements of one run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BenchReport {
    /// The host and the measured programs, a line each.
    pub notes: Vec<String>,
    /// The measurements.
    pub comparisons: Vec<Comparison>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_the_nearest_rank() {
        let phase = |micros: Vec<f64>| PhaseSamples {
            name: String::new(),
            micros,
        };
        let hundred = phase((1..=100).rev().map(f64::from).collect());
        let summary = hundred.summary().unwrap();
        assert_eq!(
            (summary.p50, summary.p90, summary.p99, summary.max),
            (50.0, 90.0, 99.0, 100.0)
        );
        let one = phase(vec![7.0]).summary().unwrap();
        assert_eq!((one.p50, one.p99, one.max), (7.0, 7.0, 7.0));
        assert_eq!(phase(Vec::new()).summary(), None);
    }

    #[test]
    fn phases_are_collected_by_name_and_totals_compared() {
        let ms = Duration::from_millis;
        let mut ours = Series::new("sm");
        ours.add(&[("a", ms(1)), ("b", ms(2))]);
        ours.add(&[("a", ms(3)), ("b", ms(0))]);
        assert_eq!(ours.phases[0].micros, [1000.0, 3000.0]);
        assert_eq!(ours.total.micros, [3000.0, 3000.0]);
        let mut floor = Series::new("floor");
        floor.add(&[("a", ms(2))]);
        let comparison = Comparison {
            title: String::new(),
            series: vec![ours, floor],
            since: None,
        };
        assert_eq!(comparison.ratio("floor"), Some(1.5));
        assert_eq!(comparison.ratio("nobody"), None);
        assert_eq!(comparison.ratio_since("floor"), None);
    }

    #[test]
    fn first_phases_can_be_excluded_from_a_comparison() {
        let ms = Duration::from_millis;
        let mut ours = Series::new("sm");
        let mut floor = Series::new("floor");
        for extra in 0..3 {
            ours.add(&[("a", ms(9)), ("b", ms(2 + extra)), ("c", ms(1))]);
            floor.add(&[("b", ms(1)), ("c", ms(1))]);
        }
        assert_eq!(ours.since("b").unwrap().micros, [3000.0, 4000.0, 5000.0]);
        assert_eq!(ours.since("d"), None);
        let comparison = Comparison {
            title: String::new(),
            series: vec![ours, floor],
            since: Some("b".to_owned()),
        };
        assert_eq!(comparison.ratio_since("floor"), Some(2.0));
    }
}
