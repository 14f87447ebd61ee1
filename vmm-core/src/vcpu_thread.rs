//! One thread for each vCPU: runs guest code, pauses, saves, ends.
//!
//! A vCPU thread is either *running*, inside [`Vcpu::run`](sm_hypervisor::Vcpu::run), or
//! *parked*, in a blocking receive on its command channel. A kick follows every command to
//! a running vCPU; it is sticky, so the vCPU leaves the guest and reads its channel.
//! Nothing polls.

mod runner;

use std::sync::mpsc::{Receiver, RecvError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use sm_hypervisor::{Arch, Bus, Error, Finish, Kicker, RestoredVcpu, VcpuSeed};
use thiserror::Error as ThisError;

use self::runner::{Runner, VcpuContext};
use crate::exit::ExitLatch;

/// Failure of a vCPU thread.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum VcpuError {
    /// The thread cannot be created.
    #[error("cannot start the thread of vCPU {vcpu}")]
    Spawn {
        /// Index of the vCPU.
        vcpu: u32,
        /// The operating system's error.
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
        /// The hypervisor's error.
        #[source]
        source: Error,
    },
}

/// Initial state of a vCPU.
pub(crate) enum VcpuStart<A: Arch> {
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
    Finish(Finish, Sender<Result<(), Error>>),
    /// Finishes the restore and executes the command; the exit latch gets an error. One
    /// message: if the vCPU is lost, sending has nevertheless succeeded.
    FinishFirst(Finish, Box<Self>),
}

/// Handle to a vCPU thread. Dropping it ends the thread.
pub(crate) struct VcpuThread<A: Arch> {
    index: u32,
    kicker: Arc<dyn Kicker>,
    /// `None` once the thread has to end.
    commands: Option<Sender<Command<A>>>,
    /// Sent before the next command.
    deferred: Mutex<Option<Finish>>,
    thread: Option<JoinHandle<()>>,
}

/// Reply to starting a vCPU: with proof of restoration, if it was restored.
type Bound = Pending<Result<Option<RestoredVcpu>, Error>>;

/// A reply that has not arrived yet. Sending the command to all vCPUs before waiting for
/// the first lets them work in parallel.
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
    /// Starts a thread that binds `seed` and parks. The reply is the result of binding,
    /// with proof of restoration for [`VcpuStart::Restore`]; such a vCPU waits for
    /// [`VcpuThread::finish`] before it executes other commands.
    pub(crate) fn spawn<S: VcpuSeed<Arch = A>>(
        seed: S,
        start: VcpuStart<A>,
        bus: Arc<dyn Bus + Send + Sync>,
        exit: Arc<ExitLatch>,
    ) -> Result<(Self, Bound), VcpuError> {
        let index = seed.index();
        let kicker = seed.kicker();
        let (commands, inbox) = channel();
        let (bound, answer) = channel();
        let context = VcpuContext {
            index,
            bus,
            exit,
            inbox,
        };
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || {
                // A reply that cannot be sent: the machine was dropped meanwhile.
                let refuse = |error| bound.send(Err(error)).ok().and(None);
                let vcpu = match start {
                    VcpuStart::Boot(registers) => match seed.bind(registers.as_deref()) {
                        Ok(vcpu) => bound.send(Ok(None)).ok().map(|()| (vcpu, None)),
                        Err(error) => refuse(error),
                    },
                    VcpuStart::Restore(state) => match seed.bind_restored(&state) {
                        Ok((restoring, proof)) => {
                            let sent = bound.send(Ok(Some(proof))).ok();
                            sent.and_then(|()| context.finish(restoring))
                        }
                        Err(error) => refuse(error),
                    },
                };
                if let Some((vcpu, first)) = vcpu {
                    Runner { vcpu, context }.serve(first);
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
            deferred: Mutex::new(None),
            thread: Some(thread),
        };
        Ok((this, Pending { index, answer }))
    }

    pub(crate) fn kicker(&self) -> Arc<dyn Kicker> {
        self.kicker.clone()
    }

    fn send(&self, command: Command<A>) -> Result<(), VcpuError> {
        let error = VcpuError::Gone { vcpu: self.index };
        let Some(commands) = &self.commands else {
            return Err(error);
        };
        let mut deferred = self.deferred.lock().unwrap_or_else(PoisonError::into_inner);
        let command = match deferred.take() {
            Some(finish) => Command::FinishFirst(finish, Box::new(command)),
            None => command,
        };
        commands.send(command).map_err(|_| error)
    }

    fn request<T>(
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

    /// Makes the vCPU leave guest code; the reply arrives when it is parked.
    pub(crate) fn park(&self) -> Result<Pending<()>, VcpuError> {
        let pending = self.request(Command::Park)?;
        self.kicker.kick();
        Ok(pending)
    }

    /// Saves the state of a parked vCPU.
    pub(crate) fn save(&self) -> Result<Pending<Result<A::Vcpu, Error>>, VcpuError> {
        self.request(Command::Save)
    }

    /// Restores saved state in a parked vCPU, which then waits for [`VcpuThread::finish`].
    /// The thread ends if that fails.
    pub(crate) fn reload(
        &self,
        state: Arc<A::Vcpu>,
    ) -> Result<Pending<Result<RestoredVcpu, Error>>, VcpuError> {
        self.request(|reply| Command::Reload(state, reply))
    }

    /// Finishes the restore of a vCPU that has its state.
    pub(crate) fn finish(&self, finish: Finish) -> Result<Pending<Result<(), Error>>, VcpuError> {
        self.request(|reply| Command::Finish(finish, reply))
    }

    /// Finishes the restore before the next command, without waking the thread for it. An
    /// error ends the machine.
    pub(crate) fn finish_later(&self, finish: Finish) {
        let mut deferred = self.deferred.lock().unwrap_or_else(PoisonError::into_inner);
        *deferred = Some(finish);
    }
}

impl<A: Arch> Drop for VcpuThread<A> {
    fn drop(&mut self) {
        self.commands = None;
        self.kicker.kick();
        if let Some(thread) = self.thread.take() {
            // The panic hook has reported a panic of the thread.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use sm_hypervisor::state::x86_64::{BootRegisters, VcpuState};
    use sm_hypervisor::{Exit, FaultInfo, RestoringVcpu, Vcpu, VmIdentity, X86_64};

    use super::*;
    use crate::exit::MachineExit;

    /// A vCPU that "runs" until kicked, or first returns the scripted exits.
    #[derive(Debug, Default)]
    struct Script {
        exits: Mutex<Vec<Exit>>,
        kicked: Mutex<bool>,
        woken: std::sync::Condvar,
        in_guest: AtomicBool,
        pauses: AtomicU32,
        refuse: bool,
        identity: VmIdentity,
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

        fn bind_restored(self, state: &VcpuState) -> Result<(Restoring, RestoredVcpu), Error> {
            Cpu(self.0).reload(state)
        }
    }

    /// A vCPU that accepts tokens of [`Script::identity`].
    struct Restoring(Cpu);

    impl RestoringVcpu for Restoring {
        type Vcpu = Cpu;

        fn finish_restore(self, finish: Finish) -> Result<Cpu, Error> {
            self.0.0.identity.redeem(3, finish)?;
            Ok(self.0)
        }
    }

    impl Vcpu for Cpu {
        type Arch = X86_64;
        type Restoring = Restoring;

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

        fn reload(self, state: &VcpuState) -> Result<(Restoring, RestoredVcpu), Error> {
            if state.index != 3 {
                return Err(Error::State {
                    reason: "it is not for this vCPU".into(),
                });
            }
            let proof = RestoredVcpu::new(&self.0.identity, 3);
            Ok((Restoring(self), proof))
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
            VcpuStart::Boot(None),
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
        // Already parked: it replies nevertheless.
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
            (Exit::Reset, MachineExit::Reset),
            (Exit::Shutdown, MachineExit::PowerOff),
            (Exit::TripleFault, MachineExit::TripleFault { vcpu: 3 }),
            (Exit::Halt, MachineExit::Halted { vcpu: 3 }),
            (
                Exit::Fault(info.clone()),
                MachineExit::Fault { vcpu: 3, info },
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
    fn the_exit_of_another_vcpu_makes_it_leave_the_guest() {
        let (thread, _script, latch) = spawn(Script::default());
        thread.run().unwrap();
        latch.report(MachineExit::PowerOff);
        // Only a parked vCPU executes commands, and only the latch has kicked it.
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
            VcpuThread::spawn(Seed(script), VcpuStart::Boot(None), Arc::new(NoBus), exit).unwrap();
        let error = bound.wait_ok().unwrap_err();
        assert!(matches!(error, VcpuError::Hypervisor { vcpu: 3, .. }));
        drop(thread);

        let (thread, _script, _exit) = spawn(Script::default());
        let state = Arc::new(VcpuState::default());
        let error = thread.reload(state).unwrap().wait_ok().unwrap_err();
        assert!(matches!(error, VcpuError::Hypervisor { vcpu: 3, .. }));
    }

    fn saved() -> Arc<VcpuState> {
        Arc::new(VcpuState {
            index: 3,
            ..VcpuState::default()
        })
    }

    #[test]
    fn a_restored_vcpu_runs_once_it_has_finished() {
        let script = Arc::new(Script::default());
        let exit = Arc::new(ExitLatch::new().unwrap());
        let start = VcpuStart::Restore(saved());
        let (thread, bound) =
            VcpuThread::spawn(Seed(script.clone()), start, Arc::new(NoBus), exit.clone()).unwrap();
        assert_eq!(bound.wait_ok().unwrap().unwrap().index(), 3);
        let finish = || Finish::new(&script.identity, 3);
        thread.finish(finish()).unwrap().wait_ok().unwrap();
        for _ in 0..2 {
            thread.run().unwrap();
            thread.park().unwrap().wait().unwrap();
            let _proof = thread.reload(saved()).unwrap().wait_ok().unwrap();
            thread.finish(finish()).unwrap().wait_ok().unwrap();
        }
        assert_eq!(exit.reason(), None);
        // There is nothing to finish any more.
        let finished = thread.finish(finish()).unwrap().wait_ok();
        assert!(matches!(finished, Err(VcpuError::Gone { vcpu: 3 })));
        thread.save().unwrap().wait_ok().unwrap();
    }

    #[test]
    fn a_vcpu_may_finish_with_the_next_command() {
        let (thread, script, exit) = spawn(Script::default());
        for next in [VcpuThread::run, |thread: &VcpuThread<X86_64>| {
            thread.save()?.wait_ok().map(drop)
        }] {
            let _proof = thread.reload(saved()).unwrap().wait_ok().unwrap();
            thread.finish_later(Finish::new(&script.identity, 3));
            next(&thread).unwrap();
            thread.park().unwrap().wait().unwrap();
        }
        assert_eq!(exit.reason(), None);

        // A vCPU that is lost before its command is executed has nevertheless received it.
        for _ in 0..100 {
            let (thread, _script, exit) = spawn(Script::default());
            let _proof = thread.reload(saved()).unwrap().wait_ok().unwrap();
            thread.finish_later(Finish::new(&VmIdentity::new(), 3));
            thread.run().unwrap();
            let MachineExit::Failed { reason } = exit.wait() else {
                panic!("{:?}", exit.reason());
            };
            assert!(reason.contains("vCPU 3"), "{reason}");
        }
    }

    #[test]
    fn a_vcpu_that_has_not_finished_does_not_run() {
        let (thread, script, exit) = spawn(Script::default());
        let _proof = thread.reload(saved()).unwrap().wait_ok().unwrap();
        thread.run().unwrap();
        let reason = exit.wait();
        assert!(matches!(reason, MachineExit::Failed { .. }), "{reason:?}");
        assert!(!script.in_guest.load(Ordering::SeqCst));
        drop(thread);

        let (thread, _script, _exit) = spawn(Script::default());
        let _proof = thread.reload(saved()).unwrap().wait_ok().unwrap();
        let foreign = Finish::new(&VmIdentity::new(), 3);
        let refused = thread.finish(foreign).unwrap().wait_ok().unwrap_err();
        let VcpuError::Hypervisor { vcpu: 3, source } = refused else {
            panic!("{refused:?}");
        };
        assert!(matches!(source, Error::ForeignToken { vcpu: 3 }));
    }
}
