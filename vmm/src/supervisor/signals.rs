//! Signals of clients for the workload.
//!
//! A signal is answered when the agent has answered it, so a caller learns of a signal
//! that was not delivered. The number of signals that a guest has not answered is limited,
//! and so is the time that a client waits.

use std::time::{Duration, Instant};

use sm_control::launch::ControlAnswer;
use sm_control::signal::KILL;
use sm_guest_proto::control::ControlReply;

use super::restarting::EndRequest;
use super::stage::SupervisorStage;
use super::{Supervisor, SupervisorTimer, printable};
use crate::guest::GuestMachine;

/// Time that a guest has to answer a signal. Shorter than the time that clients wait for
/// an answer of this process.
pub(super) const SIGNAL_TIMEOUT: Duration = Duration::from_secs(5);

/// A signal of a client that the guest has not answered.
#[derive(Clone, Copy, Debug)]
pub(super) struct UnansweredSignal {
    number: u64,
    client: u64,
    signal: u8,
    deadline: Instant,
}

impl<G: GuestMachine> Supervisor<G> {
    /// Passes on a signal, for `client` if one waits for the answer. Returns the answer,
    /// or `None` if the client is answered later.
    pub(super) fn signal(&mut self, client: Option<u64>, signal: u8) -> Option<ControlAnswer> {
        // SIGKILL ends a workload that is held; other signals stay pending until it
        // continues, as they do for a frozen process.
        if signal == KILL {
            self.cancel_capture();
            if let Err(error) = self.resume_vcpus() {
                return Some(ControlAnswer::Error(error));
            }
        }
        // As for Docker, a VM that its user has killed stays ended.
        let ends = signal == KILL || signal == self.request.config.workload.stop_signal;
        if ends && matches!(self.stage, SupervisorStage::Running(_)) {
            self.end_is_requested(EndRequest::Client);
        }
        let halted = self.stage.is_halted();
        let refusal = match (&self.stage, &mut self.agent) {
            (SupervisorStage::Running(_) | SupervisorStage::Resetting(_), Some(agent))
                if agent.is_behind() =>
            {
                "the guest does not answer"
            }
            (SupervisorStage::Running(_) | SupervisorStage::Resetting(_), Some(agent)) => {
                let Some(client) = client.filter(|_| !halted) else {
                    agent.signal_main(signal, false, None);
                    self.note_signal(signal);
                    return Some(ControlAnswer::Done);
                };
                let number = self.signals_sent;
                self.signals_sent += 1;
                agent.signal_main(signal, false, Some(number));
                self.signals.push(UnansweredSignal {
                    number,
                    client,
                    signal,
                    deadline: Instant::now() + self.signal_timeout,
                });
                self.note_signal(signal);
                if !self.is_set(SupervisorTimer::Signal) {
                    self.set_timer(SupervisorTimer::Signal, self.signal_timeout);
                }
                return None;
            }
            (SupervisorStage::Starting(_), _) => "the workload has not started yet",
            (SupervisorStage::Running(_) | SupervisorStage::Resetting(_), None)
            | (SupervisorStage::Ending(_), _) => "the workload has ended",
        };
        Some(ControlAnswer::Error(refusal.to_owned()))
    }

    /// The agent has answered signal `number` of a client, or one of this process.
    pub(super) fn signalled(&mut self, number: Option<u64>, reply: ControlReply) {
        let answer = match reply {
            ControlReply::Done => ControlAnswer::Done,
            ControlReply::Error { message } => {
                // Most likely it has just ended.
                let message = printable(&message);
                tracing::info!(message, "the workload was not signalled");
                ControlAnswer::Error(message)
            }
            other => ControlAnswer::Error(printable(&format!("the guest answered {other:?}"))),
        };
        let waiting = self
            .signals
            .iter()
            .position(|waiting| Some(waiting.number) == number);
        if let Some(at) = waiting {
            let client = self.signals.remove(at).client;
            self.answer(client, &answer);
        }
    }

    /// Answers the signals that the guest has not answered in time.
    pub(super) fn signals_are_overdue(&mut self) {
        let now = Instant::now();
        let due = self
            .signals
            .partition_point(|waiting| waiting.deadline <= now);
        let overdue: Vec<_> = self.signals.drain(..due).collect();
        for waiting in overdue {
            let text = "the guest does not answer: the signal may still be delivered".to_owned();
            self.answer(waiting.client, &ControlAnswer::Error(text));
        }
        if let Some(next) = self.signals.first() {
            let left = next.deadline.saturating_duration_since(now);
            self.set_timer(SupervisorTimer::Signal, left);
        }
    }

    /// Answers all remaining signals, as the VM has ended. Answers of the agent that have
    /// arrived count: it sent them before the workload's end.
    pub(super) fn conclude_signals(&mut self) {
        self.clear_timer(SupervisorTimer::Signal);
        if self.signals.is_empty() {
            return;
        }
        if let Some(agent) = &mut self.agent {
            agent.conn.read();
        }
        while let Some(agent) = &mut self.agent
            && let Some((number, reply)) = agent.next_signal_reply()
        {
            self.signalled(number, reply);
        }
        for waiting in std::mem::take(&mut self.signals) {
            let answer = match waiting.signal {
                KILL => ControlAnswer::Done,
                _ => ControlAnswer::Error("the VM ended before its guest answered".to_owned()),
            };
            self.answer(waiting.client, &answer);
        }
    }
}
