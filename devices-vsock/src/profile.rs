//! Profiling: a histogram for each stage that bytes pass.
//!
//! Off, a stage costs the load of one flag. On, it costs two readings of the clock and a
//! few additions without a lock.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

/// Buckets within each power of two: the error of a value is less than an eighth.
const FINE: usize = 8;
/// Buckets for values below 2^40 ns, which is 18 minutes.
const BUCKETS: usize = (40 - 3 + 1) * FINE;

/// A measured stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProfileStage {
    /// A frontend accepts a connection and passes it on.
    Accept,
    /// A frontend that speaks TLS moves bytes between its two sides.
    Tls,
    /// From the request for a connection to the guest's answer.
    Open,
    /// Reading from a host socket into the guest's buffers.
    SocketRead,
    /// Writing from the guest's buffers to a host socket.
    SocketWrite,
    /// From the guest's notification until its bytes are written to a host socket,
    /// including the time that they wait for a slow one.
    GuestToHost,
    /// Serving a notification of the guest's driver, in total.
    GuestKick,
    /// Serving a ready host socket, in total.
    HostReady,
    /// Interrupting the guest.
    Interrupt,
}

impl ProfileStage {
    /// All stages, in the order of display.
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

    /// Returns the stage's name.
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

/// Durations of a stage, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageReport {
    /// The stage.
    pub stage: ProfileStage,
    /// Number of measurements.
    pub count: u64,
    /// Sum of all durations.
    pub total_ns: u64,
    /// Median.
    pub p50_ns: u64,
    /// 90th percentile.
    pub p90_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// Maximum.
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

/// Returns the bucket of a value; the last one for values that are too large.
fn bucket(value: u64) -> usize {
    let Some(exponent) = value.checked_ilog2().filter(|&exponent| exponent >= 3) else {
        return usize::try_from(value).unwrap_or(0);
    };
    let fine = usize::try_from((value >> (exponent - 3)) & 7).unwrap_or(0);
    ((exponent as usize - 2) * FINE + fine).min(BUCKETS - 1)
}

/// Returns the largest value of a bucket.
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

    fn report(&self, stage: ProfileStage) -> StageReport {
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

/// Measures the stages while it is on.
#[derive(Default)]
pub struct Profiler {
    on: AtomicBool,
    /// Created by the first start.
    stages: OnceLock<Box<[Histogram; ProfileStage::ALL.len()]>>,
}

impl Profiler {
    /// Discards earlier measurements and starts to measure.
    pub fn start(&self) {
        for histogram in self.stages.get_or_init(Box::default).iter() {
            histogram.clear();
        }
        self.on.store(true, Ordering::Release);
    }

    /// Stops measuring; the measurements stay.
    pub fn stop(&self) {
        self.on.store(false, Ordering::Release);
    }

    /// Returns the measurements of stages that occurred.
    #[must_use]
    pub fn report(&self) -> Vec<StageReport> {
        let Some(stages) = self.stages.get() else {
            return Vec::new();
        };
        let reports = ProfileStage::ALL.iter().zip(stages.iter());
        let reports = reports.map(|(&stage, histogram)| histogram.report(stage));
        reports.filter(|report| report.count > 0).collect()
    }

    /// Starts a stage; returns `None` if nothing is measured.
    #[must_use]
    pub fn begin(&self) -> Option<Instant> {
        self.on.load(Ordering::Relaxed).then(Instant::now)
    }

    /// Ends a stage that started at `since`.
    pub fn end(&self, stage: ProfileStage, since: Option<Instant>) {
        if let Some(since) = since
            && let Some(histogram) = self
                .stages
                .get()
                .and_then(|stages| stages.get(stage as usize))
        {
            let took = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
            histogram.add(took);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn stages_are_measured_separately_and_only_while_it_is_on() {
        let profiler = Profiler::default();
        profiler.end(ProfileStage::Tls, profiler.begin());
        assert_eq!(profiler.report(), []);
        profiler.start();
        let since = profiler.begin();
        profiler.end(ProfileStage::Tls, since);
        profiler.end(ProfileStage::Interrupt, since);
        profiler.stop();
        profiler.end(ProfileStage::Accept, profiler.begin());
        let stages: Vec<_> = profiler
            .report()
            .iter()
            .map(|r| (r.stage, r.count))
            .collect();
        assert_eq!(
            stages,
            [(ProfileStage::Tls, 1), (ProfileStage::Interrupt, 1)]
        );
        profiler.start();
        assert_eq!(profiler.report(), []);
    }

    proptest! {
        #[test]
        fn the_error_of_a_bucket_is_less_than_an_eighth(value in 0_u64..1 << 40) {
            let shown = upper(bucket(value));
            prop_assert!(shown >= value && shown - value <= value / 8, "{value} {shown}");
            prop_assert_eq!(bucket(shown), bucket(value));
        }

        #[test]
        fn quantiles_are_those_of_the_values(mut values in prop::collection::vec(0_u64..1 << 50, 1..200)) {
            let histogram = Histogram::default();
            values.iter().for_each(|&value| histogram.add(value));
            values.sort_unstable();
            let report = histogram.report(ProfileStage::Open);
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
