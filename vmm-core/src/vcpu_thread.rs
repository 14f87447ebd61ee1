//! One thread for each vCPU: runs guest code, pauses, saves, ends.
//!
//! A vCPU thread is either *running*, inside [`Vcpu::run`], or *parked*, in a
//! blocking receive on its command channel. Every command is followed by a kick,
//! which is sticky, so that a running vCPU comes out and looks at its channel;
//! nothing polls.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvError, Sender, TryRecvError, channel};
use std::thread::JoinHandle;

use sm_hypervisor::{Arch, Bus, Error, Exit, Kicker, RestoredVcpu, Vcpu, VcpuSeed};
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
pub(crate) enum Start<A: Arch> {
    /// Reset state, the boot processor with registers.
    Boot(Option<Box<A::Boot>>),
    /// Saved state.
    Restore(Arc<A::Vcpu>),
}

enum Command<A: Arch> {
    Run,
    Park(Sender<()>),
    Save(Sender<Result<A::Vcpu, Error>>),
    Reload(Arc<A::Vcpu>, Sender<Result<RestoredVcpu, Error>>),
}

/// A vCPU thread as seen from outside. Dropping it ends the thread.
pub(crate) struct VcpuThread<A: Arch> {
    index: u32,
    kicker: Arc<dyn Kicker>,
    /// `None` once the thread is to end.
    commands: Option<Sender<Command<A>>>,
    thread: Option<JoinHandle<()>>,
}

/// The answer to starting a vCPU: with proof of restoration, if it was restored.
type Bound = Pending<Result<Option<RestoredVcpu>, Error>>;

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

impl<A: Arch> VcpuThread<A> {
    /// Starts a thread that binds `seed` and parks. The answer says whether
    /// binding worked, with proof of restoration for [`Start::Restore`].
    pub(crate) fn spawn<S: VcpuSeed<Arch = A>>(
        seed: S,
        start: Start<A>,
        bus: Arc<dyn Bus + Send + Sync>,
        exit: Arc<ExitLatch>,
    ) -> Result<(Self, Bound), VcpuError> {
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

    fn send(&self, command: Command<A>) -> Result<(), VcpuError> {
        let gone = VcpuError::Gone { vcpu: self.index };
        let Some(commands) = &self.commands else {
            return Err(gone);
        };
        commands.send(command).map_err(|_| gone)
    }

    fn ask<T>(
        &self,
        command: impl FnOnce(Sender<T>) -> Command<A>,
    ) -> Result<Pending<T>, VcpuError> {
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
    pub(crate) fn save(&self) -> Result<Pending<Result<A::Vcpu, Error>>, VcpuError> {
        self.ask(Command::Save)
    }

    /// Puts saved state into a parked vCPU.
    pub(crate) fn reload(
        &self,
        state: Arc<A::Vcpu>,
    ) -> Result<Pending<Result<RestoredVcpu, Error>>, VcpuError> {
        self.ask(|reply| Command::Reload(state, reply))
    }
}

impl<A: Arch> Drop for VcpuThread<A> {
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
struct Runner<V: Vcpu> {
    vcpu: V,
    index: u32,
    bus: Arc<dyn Bus + Send + Sync>,
    exit: Arc<ExitLatch>,
    inbox: Receiver<Command<V::Arch>>,
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

    fn obey(&mut self, command: Command<V::Arch>) -> Next {
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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use sm_hypervisor::state::x86_64::{BootRegisters, VcpuState};
    use sm_hypervisor::{FaultInfo, X86_64};

    use super::*;

    /// A vCPU that "runs" until kicked, or leaves with the scripted exits first.
    #[derive(Debug, Default)]
    struct Script {
        exits: Mutex<Vec<Exit>>,
        kicked: Mutex<bool>,
        woken: std::sync::Condvar,
        in_guest: AtomicBool,
        pauses: AtomicU32,
        refuse: bool,
    }

    impl Kicker for Script {
        fn kick(&self) {
            *self.kicked.lock().unwrap() = true;
            self.woken.notify_all();
        }
    }

    struct Seed(Arc<Script>);
    struct Cpu(Arc<Script>);

    impl VcpuSeed for Seed {
        type Arch = X86_64;
        type Vcpu = Cpu;

        fn index(&self) -> u32 {
            3
        }

        fn kicker(&self) -> Arc<dyn Kicker> {
            self.0.clone()
        }

        fn bind(self, _boot: Option<&BootRegisters>) -> Result<Cpu, Error> {
            if self.0.refuse {
                return Err(Error::Unsupported {
                    what: "anything".into(),
                });
            }
            Ok(Cpu(self.0))
        }

        fn bind_restored(self, _state: &VcpuState) -> Result<(Cpu, RestoredVcpu), Error> {
            Err(Error::State {
                reason: "it is not for this vCPU".into(),
            })
        }
    }

    impl Vcpu for Cpu {
        type Arch = X86_64;

        fn run(&mut self, _bus: &dyn Bus) -> Result<Exit, Error> {
            if let Some(exit) = self.0.exits.lock().unwrap().pop() {
                return Ok(exit);
            }
            self.0.in_guest.store(true, Ordering::SeqCst);
            let mut kicked = self.0.kicked.lock().unwrap();
            while !*kicked {
                kicked = self.0.woken.wait(kicked).unwrap();
            }
            *kicked = false;
            self.0.in_guest.store(false, Ordering::SeqCst);
            Ok(Exit::Cancelled)
        }

        fn save(&mut self) -> Result<VcpuState, Error> {
            assert!(!self.0.in_guest.load(Ordering::SeqCst));
            Ok(VcpuState::default())
        }

        fn reload(&mut self, _state: &VcpuState) -> Result<RestoredVcpu, Error> {
            Err(Error::State {
                reason: "it is not for this vCPU".into(),
            })
        }

        fn notify_paused(&mut self) {
            self.0.pauses.fetch_add(1, Ordering::SeqCst);
        }
    }

    struct NoBus;

    impl Bus for NoBus {
        fn mmio_read(&self, _address: u64, _data: &mut [u8]) {}
        fn mmio_write(&self, _address: u64, _data: &[u8]) {}
        fn pio_read(&self, _port: u16, _data: &mut [u8]) {}
        fn pio_write(&self, _port: u16, _data: &[u8]) {}
    }

    fn spawn(script: Script) -> (VcpuThread<X86_64>, Arc<Script>, Arc<ExitLatch>) {
        let script = Arc::new(script);
        let exit = Arc::new(ExitLatch::new().unwrap());
        let (thread, bound) = VcpuThread::spawn(
            Seed(script.clone()),
            Start::Boot(None),
            Arc::new(NoBus),
            exit.clone(),
        )
        .unwrap();
        assert!(bound.wait_ok().unwrap().is_none());
        exit.set_kickers(vec![thread.kicker()]);
        (thread, script, exit)
    }

    #[test]
    fn it_parks_saves_and_runs_again() {
        let (thread, script, exit) = spawn(Script::default());
        thread.save().unwrap().wait_ok().unwrap();
        for round in 1..=3 {
            thread.run().unwrap();
            thread.park().unwrap().wait().unwrap();
            assert!(!script.in_guest.load(Ordering::SeqCst));
            assert_eq!(script.pauses.load(Ordering::SeqCst), round);
            thread.save().unwrap().wait_ok().unwrap();
        }
        // Parked already: answers all the same.
        thread.park().unwrap().wait().unwrap();
        assert_eq!(exit.reason(), None);
    }

    #[test]
    fn dropping_it_ends_a_running_vcpu() {
        let (thread, script, exit) = spawn(Script::default());
        thread.run().unwrap();
        drop(thread);
        drop(exit);
        assert_eq!(Arc::strong_count(&script), 1);
    }

    #[test]
    fn exits_of_the_guest_are_reported_and_leave_it_parked() {
        let info = FaultInfo {
            reason: "it is lost".into(),
            ..FaultInfo::default()
        };
        for (exit, expected) in [
            (Exit::Reset, ExitReason::Reset),
            (Exit::Shutdown, ExitReason::PowerOff),
            (Exit::TripleFault, ExitReason::TripleFault { vcpu: 3 }),
            (Exit::Halt, ExitReason::Halted { vcpu: 3 }),
            (
                Exit::Fault(info.clone()),
                ExitReason::Fault { vcpu: 3, info },
            ),
        ] {
            let (thread, _script, latch) = spawn(Script {
                exits: Mutex::new(vec![exit]),
                ..Script::default()
            });
            thread.run().unwrap();
            assert_eq!(latch.wait(), expected);
            thread.save().unwrap().wait_ok().unwrap();
            // It does not run again.
            thread.run().unwrap();
            thread.save().unwrap().wait_ok().unwrap();
        }
    }

    #[test]
    fn another_ones_exit_takes_it_out_of_the_guest() {
        let (thread, _script, latch) = spawn(Script::default());
        thread.run().unwrap();
        latch.report(ExitReason::PowerOff);
        // Only a parked vCPU obeys, and nothing else has kicked it.
        thread.save().unwrap().wait_ok().unwrap();
    }

    #[test]
    fn failures_name_the_vcpu() {
        let script = Arc::new(Script {
            refuse: true,
            ..Script::default()
        });
        let exit = Arc::new(ExitLatch::new().unwrap());
        let (thread, bound) =
            VcpuThread::spawn(Seed(script), Start::Boot(None), Arc::new(NoBus), exit).unwrap();
        let error = bound.wait_ok().unwrap_err();
        assert!(matches!(error, VcpuError::Hypervisor { vcpu: 3, .. }));
        drop(thread);

        let (thread, _script, _exit) = spawn(Script::default());
        let state = Arc::new(VcpuState::default());
        let error = thread.reload(state).unwrap().wait_ok().unwrap_err();
        assert!(matches!(error, VcpuError::Hypervisor { vcpu: 3, .. }));
    }
}
