//! Capturing a machine beside the thread that supervises it.
//!
//! The machine is held, its state taken, and a thread copies its memory; the supervisor
//! goes on serving its clients meanwhile. When the copy is complete, or has failed, the
//! supervisor is told and lets the machine run; the thread publishes the snapshot.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sm_control::with_causes;
use sm_hypervisor::Hypervisor;
use sm_snapshot::capture::{Ancestry, Capture, Captured};
use sm_snapshot::chain::Chain;
use sm_snapshot::runs::Run;
use sm_vmm_core::machine::Machine;

use super::saved::Plan;

/// The source of a machine's memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Origin {
    /// The snapshot that it was restored from.
    pub(crate) chain: Option<Arc<Chain>>,
    /// Memory is filled as it is touched, not mapped.
    pub(crate) filled: bool,
    /// Pages that were copied ahead of use.
    pub(crate) copied: Vec<Run>,
}

impl Origin {
    fn ancestry(&self) -> Ancestry<'_> {
        self.chain.as_ref().map_or(Ancestry::Booted, |chain| {
            Ancestry::of(chain, self.filled, &self.copied)
        })
    }
}

/// The result of a capture.
#[derive(Debug)]
pub(crate) struct Made {
    pub(crate) captured: Captured,
    /// The time for which the vCPUs were held.
    pub(crate) pause: Duration,
}

/// Callbacks of the thread that makes a snapshot; errors are clauses.
pub(crate) struct Told {
    /// Memory was copied, or could not be. Only after [`Capturing::end`] is there more.
    pub(crate) copied: Box<dyn FnOnce(Result<(), String>) + Send>,
    /// The snapshot was published, or could not be.
    pub(crate) made: Box<dyn FnOnce(Result<Made, String>) + Send>,
}

/// A machine that is held while its memory is copied. Dropped, it gives that up, and
/// nothing is published even if the copy is complete.
#[derive(Debug)]
pub(crate) struct Capturing {
    begun: Instant,
    given_up: Arc<AtomicBool>,
    /// To say how long the machine was held.
    held: Sender<Duration>,
}

impl Capturing {
    /// Takes the state of a machine and begins to copy its memory. It is held until the
    /// caller lets it run, which is to be after `told.copied`. The thread ends when the
    /// snapshot was published.
    ///
    /// # Errors
    /// The machine cannot be paused or saved, or there is no thread; a clause. Nothing is
    /// told then, and the machine runs on if it can at all.
    pub(crate) fn begin<H: Hypervisor>(
        plan: Plan,
        machine: &mut Machine<H>,
        origin: Origin,
        told: Told,
    ) -> Result<(Self, JoinHandle<()>), String> {
        let given_up = Arc::new(AtomicBool::new(false));
        let (hand_over, taken) = channel();
        let (held, was_held) = channel();
        let (memory, vcpus) = (machine.memory().guest.clone(), machine.vcpus());
        let unless = Arc::clone(&given_up);
        // Created before the machine is held, since creating a thread can fail.
        let thread = std::thread::Builder::new()
            .name("sm-snapshot".to_owned())
            .spawn(move || {
                // Nothing comes when the machine could not be held.
                let Ok(state) = taken.recv() else { return };
                let (store, ancestry) = (&plan.store, origin.ancestry());
                let capture = match Capture::begin_unless(store, &memory, ancestry, &unless) {
                    Ok(capture) => capture,
                    Err(error) => return (told.copied)(Err(with_causes(&error))),
                };
                drop((memory, origin));
                (told.copied)(Ok(()));
                // The capture was given up, and its client was told that it failed.
                let Ok(pause) = was_held.recv() else { return };
                let made = plan.finish(capture, &state, vcpus);
                (told.made)(made.map(|captured| Made { captured, pause }));
            })
            .map_err(|error| format!("cannot start a thread: {error}"))?;
        let begun = Instant::now();
        let state = machine
            .pause()
            .and_then(|()| machine.save_state())
            .map_err(|error| with_causes(&error));
        match state {
            // The thread waits for it.
            Ok(state) => drop(hand_over.send(state)),
            Err(error) => {
                // A machine that cannot be resumed reports its end itself.
                let _ = machine.resume();
                return Err(error);
            }
        }
        let capturing = Self {
            begun,
            given_up,
            held,
        };
        Ok((capturing, thread))
    }

    /// Memory has been copied, and the machine runs again, or stays as it is for good.
    pub(crate) fn end(self) {
        let _ = self.held.send(self.begun.elapsed());
    }

    /// Has copying end soon, with a failure, if it has not ended.
    pub(crate) fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }
}

impl Drop for Capturing {
    fn drop(&mut self) {
        self.give_up();
    }
}
