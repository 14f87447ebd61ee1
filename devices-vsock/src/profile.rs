//! Where the time goes: a histogram for each stage that bytes pass.
//!
//! Off, a stage costs the load of one flag. On, it costs two readings of the
//! clock and a few additions without a lock.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

/// Buckets within each power of two: values are off by less than an eighth.
const FINE: usize = 8;
/// Buckets for values below 2^40 ns, which is 18 minutes.
const BUCKETS: usize = (40 - 3 + 1) * FINE;

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// A frontend accepts a connection and hands it over.
    Accept,
    /// A frontend that speaks TLS moves bytes between its two sides.
    Tls,
    /// From asking the guest for a connection to its answer.
    Open,
    /// Reading from a host socket into the guest's buffers.
    SocketRead,
    /// Writing from the guest's buffers to a host socket.
    SocketWrite,
    /// From the guest's notification to its bytes having been written to a host
    /// socket, the time included that a slow one lets them wait.
    GuestToHost,
    /// Serving a notification of the guest's driver, all in all.
    GuestKick,
    /// Serving a host socket that is ready, all in all.
    HostReady,
    /// Interrupting the guest.
    Interrupt,
}

impl Stage {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Self; 9] = [
        Self::Accept,
        Self::Tls,
        Self::Open,
        Self::SocketRead,
        Self::SocketWrite,
        Self::GuestToHost,
        Self::GuestKick,
        Self::HostReady,
        Self::Interrupt,
    ];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Accept => "accept",
            Self::Tls => "tls",
            Self::Open => "open",
            Self::SocketRead => "socket read",
            Self::SocketWrite => "socket write",
            Self::GuestToHost => "guest to host",
            Self::GuestKick => "guest kick",
            Self::HostReady => "host ready",
            Self::Interrupt => "interrupt",
        }
    }
}

/// What a stage took, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageReport {
    /// Which.
    pub stage: Stage,
    /// How often.
    pub count: u64,
    /// All together.
    pub total_ns: u64,
    /// Not exceeded by half of them.
    pub p50_ns: u64,
    /// Not exceeded by nine in ten.
    pub p90_ns: u64,
    /// Not exceeded by 99 in a hundred.
    pub p99_ns: u64,
    /// The longest.
    pub max_ns: u64,
}

struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    total: AtomicU64,
    max: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
            total: AtomicU64::new(0),
            max: AtomicU64::new(0),
        }
    }
}

/// The bucket of a value; the last one for all that are too large.
fn bucket(value: u64) -> usize {
    let Some(exponent) = value.checked_ilog2().filter(|&exponent| exponent >= 3) else {
        return usize::try_from(value).unwrap_or(0);
    };
    let fine = usize::try_from((value >> (exponent - 3)) & 7).unwrap_or(0);
    ((exponent as usize - 2) * FINE + fine).min(BUCKETS - 1)
}

/// The largest value of a bucket.
fn upper(bucket: usize) -> u64 {
    if bucket < FINE {
        return bucket as u64;
    }
    let (exponent, fine) = (bucket / FINE - 1, bucket % FINE);
    (((FINE + fine + 1) as u64) << exponent) - 1
}

impl Histogram {
    fn add(&self, value: u64) {
        if let Some(bucket) = self.buckets.get(bucket(value)) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.total.fetch_add(value, Ordering::Relaxed);
        self.max.fetch_max(value, Ordering::Relaxed);
    }

    fn clear(&self) {
        for bucket in &self.buckets {
            bucket.store(0, Ordering::Relaxed);
        }
        self.total.store(0, Ordering::Relaxed);
        self.max.store(0, Ordering::Relaxed);
    }

    fn report(&self, stage: Stage) -> StageReport {
        let counts: Vec<u64> = self
            .buckets
            .iter()
            .map(|bucket| bucket.load(Ordering::Relaxed))
            .collect();
        let count: u64 = counts.iter().sum();
        let max_ns = self.max.load(Ordering::Relaxed);
        let quantile = |percent: u64| {
            let rank = (count * percent).div_ceil(100);
            let mut seen = 0;
            let found = counts.iter().position(|&here| {
                seen += here;
                here > 0 && seen >= rank
            });
            found.map_or(0, |bucket| upper(bucket).min(max_ns))
        };
        StageReport {
            stage,
            count,
            total_ns: self.total.load(Ordering::Relaxed),
            p50_ns: quantile(50),
            p90_ns: quantile(90),
            p99_ns: quantile(99),
            max_ns,
        }
    }
}

/// Times the stages, when it is asked to.
#[derive(Default)]
pub struct Profiler {
    on: AtomicBool,
    /// Made when it is needed first.
    stages: OnceLock<Box<[Histogram; Stage::ALL.len()]>>,
}

impl Profiler {
    /// Forgets what was measured and begins anew.
    pub fn start(&self) {
        for histogram in self.stages.get_or_init(Box::default).iter() {
            histogram.clear();
        }
        self.on.store(true, Ordering::Release);
    }

    /// Measures no more; what was measured stays.
    pub fn stop(&self) {
        self.on.store(false, Ordering::Release);
    }

    /// What was measured, of stages that occurred.
    #[must_use]
    pub fn report(&self) -> Vec<StageReport> {
        let Some(stages) = self.stages.get() else {
            return Vec::new();
        };
        let reports = Stage::ALL.iter().zip(stages.iter());
        let reports = reports.map(|(&stage, histogram)| histogram.report(stage));
        reports.filter(|report| report.count > 0).collect()
    }

    /// The beginning of a stage; `None` when nothing is measured.
    #[must_use]
    pub fn begin(&self) -> Option<Instant> {
        self.on.load(Ordering::Relaxed).then(Instant::now)
    }

    /// The end of a stage that began then.
    pub fn end(&self, stage: Stage, begun: Option<Instant>) {
        if let Some(begun) = begun
            && let Some(histogram) = self
                .stages
                .get()
                .and_then(|stages| stages.get(stage as usize))
        {
            let took = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
            histogram.add(took);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn stages_are_told_apart_and_only_while_it_is_on() {
        let profiler = Profiler::default();
        profiler.end(Stage::Tls, profiler.begin());
        assert_eq!(profiler.report(), []);
        profiler.start();
        let begun = profiler.begin();
        profiler.end(Stage::Tls, begun);
        profiler.end(Stage::Interrupt, begun);
        profiler.stop();
        profiler.end(Stage::Accept, profiler.begin());
        let stages: Vec<_> = profiler
            .report()
            .iter()
            .map(|r| (r.stage, r.count))
            .collect();
        assert_eq!(stages, [(Stage::Tls, 1), (Stage::Interrupt, 1)]);
        profiler.start();
        assert_eq!(profiler.report(), []);
    }

    proptest! {
        #[test]
        fn a_bucket_is_off_by_less_than_an_eighth(value in 0_u64..1 << 40) {
            let shown = upper(bucket(value));
            prop_assert!(shown >= value && shown - value <= value / 8, "{value} {shown}");
            prop_assert_eq!(bucket(shown), bucket(value));
        }

        #[test]
        fn quantiles_are_those_of_the_values(mut values in prop::collection::vec(0_u64..1 << 50, 1..200)) {
            let histogram = Histogram::default();
            values.iter().for_each(|&value| histogram.add(value));
            values.sort_unstable();
            let report = histogram.report(Stage::Open);
            prop_assert_eq!(report.count, values.len() as u64);
            prop_assert_eq!(Some(&report.max_ns), values.last());
            let exact = values[(values.len() - 1) / 2];
            if exact < 1 << 40 {
                prop_assert!(report.p50_ns >= exact && report.p50_ns - exact <= exact / 8);
            }
            prop_assert!(report.p50_ns <= report.p90_ns && report.p99_ns <= report.max_ns);
        }
    }
}
