//! One thread for each vCPU: runs guest code, pauses, saves, ends.
//!
//! A vCPU thread is either *running*, inside [`Vcpu::run`], or *parked*, in a
//! blocking receive on its command channel. Every command is followed by a kick,
//! which is sticky, so that a running vCPU comes out and looks at its channel;
//! nothing polls.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvError, Sender, TryRecvError, channel};
use std::thread::JoinHandle;

use sm_hypervisor::state::BootRegisters;
use sm_hypervisor::{Bus, Error, Exit, Kicker, RestoredVcpu, Vcpu, VcpuSeed, VcpuState};
use thiserror::Error as ThisError;

use crate::exit::{ExitLatch, ExitReason};

/// Why a vCPU thread did not do what it was asked to.
#[derive(Debug, ThisError)]
pub enum VcpuError {
    /// No thread to be had.
    #[error("cannot start the thread of vCPU {vcpu}")]
    Spawn {
        /// Index of the vCPU.
        vcpu: u32,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The thread has ended.
    #[error("the thread of vCPU {vcpu} has ended")]
    Gone {
        /// Index of the vCPU.
        vcpu: u32,
    },
    /// The hypervisor refused.
    #[error("vCPU {vcpu} failed")]
    Hypervisor {
        /// Index of the vCPU.
        vcpu: u32,
        /// What it said.
        #[source]
        source: Error,
    },
}

/// What a vCPU starts with.
pub(crate) enum Start {
    /// Reset state, the boot processor with registers.
    Boot(Option<Box<BootRegisters>>),
    /// Saved state.
    Restore(Arc<VcpuState>),
}

enum Command {
    Run,
    Park(Sender<()>),
    Save(Sender<Result<VcpuState, Error>>),
    Reload(Arc<VcpuState>, Sender<Result<RestoredVcpu, Error>>),
}

/// A vCPU thread as seen from outside. Dropping it ends the thread.
pub(crate) struct VcpuThread {
    index: u32,
    kicker: Arc<dyn Kicker>,
    /// `None` once the thread is to end.
    commands: Option<Sender<Command>>,
    thread: Option<JoinHandle<()>>,
}

/// An answer on its way. Asking all vCPUs before waiting for the first lets
/// them work at the same time.
pub(crate) struct Pending<T> {
    index: u32,
    answer: Receiver<T>,
}

impl<T> Pending<T> {
    pub(crate) fn wait(self) -> Result<T, VcpuError> {
        self.answer
            .recv()
            .map_err(|RecvError| VcpuError::Gone { vcpu: self.index })
    }
}

impl<T> Pending<Result<T, Error>> {
    pub(crate) fn wait_ok(self) -> Result<T, VcpuError> {
        let vcpu = self.index;
        self.wait()?
            .map_err(|source| VcpuError::Hypervisor { vcpu, source })
    }
}

impl VcpuThread {
    /// Starts a thread that binds `seed` and parks. The answer says whether
    /// binding worked, with proof of restoration for [`Start::Restore`].
    pub(crate) fn spawn<S: VcpuSeed>(
        seed: S,
        start: Start,
        bus: Arc<dyn Bus + Send + Sync>,
        exit: Arc<ExitLatch>,
    ) -> Result<(Self, Pending<Result<Option<RestoredVcpu>, Error>>), VcpuError> {
        let index = seed.index();
        let kicker = seed.kicker();
        let (commands, inbox) = channel();
        let (bound, answer) = channel();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || {
                let result = match start {
                    Start::Boot(registers) => {
                        seed.bind(registers.as_deref()).map(|vcpu| (vcpu, None))
                    }
                    Start::Restore(state) => seed
                        .bind_restored(&state)
                        .map(|(vcpu, proof)| (vcpu, Some(proof))),
                };
                // Whoever asked may have given up: then the channel is closed too.
                let vcpu = match result {
                    Ok((vcpu, proof)) => bound.send(Ok(proof)).ok().map(|()| vcpu),
                    Err(error) => bound.send(Err(error)).ok().and(None),
                };
                if let Some(vcpu) = vcpu {
                    Runner {
                        vcpu,
                        index,
                        bus,
                        exit,
                        inbox,
                    }
                    .parked();
                }
            })
            .map_err(|source| VcpuError::Spawn {
                vcpu: index,
                source,
            })?;
        let this = Self {
            index,
            kicker,
            commands: Some(commands),
            thread: Some(thread),
        };
        Ok((this, Pending { index, answer }))
    }

    pub(crate) fn kicker(&self) -> Arc<dyn Kicker> {
        self.kicker.clone()
    }

    fn send(&self, command: Command) -> Result<(), VcpuError> {
        let gone = VcpuError::Gone { vcpu: self.index };
        let Some(commands) = &self.commands else {
            return Err(gone);
        };
        commands.send(command).map_err(|_| gone)
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Result<Pending<T>, VcpuError> {
        let (reply, answer) = channel();
        self.send(command(reply))?;
        Ok(Pending {
            index: self.index,
            answer,
        })
    }

    /// Runs guest code from now on.
    pub(crate) fn run(&self) -> Result<(), VcpuError> {
        self.send(Command::Run)
    }

    /// Takes the vCPU out of guest code; answers when it is parked.
    pub(crate) fn park(&self) -> Result<Pending<()>, VcpuError> {
        let pending = self.ask(Command::Park)?;
        self.kicker.kick();
        Ok(pending)
    }

    /// Saves the state of a parked vCPU.
    pub(crate) fn save(&self) -> Result<Pending<Result<VcpuState, Error>>, VcpuError> {
        self.ask(Command::Save)
    }

    /// Puts saved state into a parked vCPU.
    pub(crate) fn reload(
        &self,
        state: Arc<VcpuState>,
    ) -> Result<Pending<Result<RestoredVcpu, Error>>, VcpuError> {
        self.ask(|reply| Command::Reload(state, reply))
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.commands = None;
        self.kicker.kick();
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// What a vCPU thread does next.
enum Next {
    Run,
    Park,
    End,
}

/// The inside of a vCPU thread.
struct Runner<V> {
    vcpu: V,
    index: u32,
    bus: Arc<dyn Bus + Send + Sync>,
    exit: Arc<ExitLatch>,
    inbox: Receiver<Command>,
}

impl<V: Vcpu> Runner<V> {
    /// Parks until told otherwise; returns when the thread is to end.
    fn parked(mut self) {
        while let Ok(command) = self.inbox.recv() {
            let mut next = self.obey(command);
            while matches!(next, Next::Run) {
                next = self.run();
            }
            if matches!(next, Next::End) {
                return;
            }
        }
    }

    fn obey(&mut self, command: Command) -> Next {
        // An answer nobody waits for is no loss.
        match command {
            Command::Run => return Next::Run,
            Command::Park(reply) => {
                let _ = reply.send(());
            }
            Command::Save(reply) => {
                let _ = reply.send(self.vcpu.save());
            }
            Command::Reload(state, reply) => {
                let _ = reply.send(self.vcpu.reload(&state));
            }
        }
        Next::Park
    }

    /// One stay in the guest.
    fn run(&mut self) -> Next {
        if self.exit.reason().is_some() {
            return Next::Park;
        }
        let vcpu = self.index;
        let reason = match self.vcpu.run(&*self.bus) {
            Ok(Exit::Cancelled) => {
                return match self.inbox.try_recv() {
                    Ok(Command::Park(reply)) => {
                        self.vcpu.notify_paused();
                        let _ = reply.send(());
                        Next::Park
                    }
                    Ok(command) => {
                        self.obey(command);
                        Next::Run
                    }
                    // An old kick, or one because of the exit latch.
                    Err(TryRecvError::Empty) => Next::Run,
                    Err(TryRecvError::Disconnected) => Next::End,
                };
            }
            Ok(Exit::Reset) => ExitReason::Reset,
            Ok(Exit::Shutdown) => ExitReason::PowerOff,
            Ok(Exit::TripleFault) => ExitReason::TripleFault { vcpu },
            Ok(Exit::Halt) => ExitReason::Halted { vcpu },
            Ok(Exit::Fault(info)) => ExitReason::Fault { vcpu, info },
            Err(error) => ExitReason::Failed {
                reason: format!("vCPU {vcpu}: {}", chain(&error)),
            },
        };
        self.exit.report(reason);
        Next::Park
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
