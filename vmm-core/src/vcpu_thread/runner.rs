//! The loop of a vCPU thread.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvError, Sender, TryRecvError};

use sm_hypervisor::{Arch, Bus, Error, Exit, RestoredVcpu, RestoringVcpu, Vcpu};

use super::Command;
use crate::exit::{ExitLatch, MachineExit};

/// Next step of a vCPU thread.
enum Next<A: Arch> {
    Run,
    Park,
    Obey(Command<A>),
    End,
}

/// A vCPU thread without its vCPU.
pub(super) struct VcpuContext<A: Arch> {
    pub(super) index: u32,
    pub(super) bus: Arc<dyn Bus + Send + Sync>,
    pub(super) exit: Arc<ExitLatch>,
    pub(super) inbox: Receiver<Command<A>>,
}

impl<A: Arch> VcpuContext<A> {
    /// Waits for the machine to be restored, and finishes. Returns the vCPU with the command
    /// that it executes first, if there is one, or `None` if the vCPU is lost.
    pub(super) fn finish<R: RestoringVcpu>(&self, restoring: R) -> Option<Finished<R::Vcpu, A>> {
        match self.inbox.recv() {
            Ok(Command::Finish(finish, reply)) => {
                let (answer, vcpu) = match restoring.finish_restore(finish) {
                    Ok(vcpu) => (Ok(()), Some((vcpu, None))),
                    Err(error) => (Err(error), None),
                };
                // A reply without a receiver is no loss.
                let _ = reply.send(answer);
                vcpu
            }
            Ok(Command::FinishFirst(finish, command)) => match restoring.finish_restore(finish) {
                Ok(vcpu) => Some((vcpu, Some(*command))),
                Err(error) => {
                    self.fail(&error);
                    None
                }
            },
            Ok(_) => {
                // The restore of the machine failed halfway.
                self.fail(&"its restore was not finished");
                None
            }
            Err(RecvError) => None,
        }
    }

    fn fail(&self, reason: &dyn std::fmt::Display) {
        self.exit.report(MachineExit::Failed {
            reason: format!("vCPU {}: {reason}", self.index),
        });
    }
}

/// A vCPU whose restore is finished, and the command that it executes first.
pub(super) type Finished<V, A> = (V, Option<Command<A>>);

/// A vCPU on its thread.
pub(super) struct Runner<V: Vcpu> {
    pub(super) vcpu: V,
    pub(super) context: VcpuContext<V::Arch>,
}

impl<V: Vcpu> Runner<V> {
    /// Executes commands, `first` if there is one, parked at first; returns when the thread
    /// has to end.
    pub(super) fn serve(mut self, first: Option<Command<V::Arch>>) {
        let mut next = first.map_or(Next::Park, Next::Obey);
        let mut running = false;
        loop {
            next = match next {
                Next::Run => {
                    running = true;
                    self.run()
                }
                Next::Park => {
                    running = false;
                    match self.context.inbox.recv() {
                        Ok(command) => Next::Obey(command),
                        Err(RecvError) => Next::End,
                    }
                }
                Next::Obey(command) => match self.obey(command, running) {
                    Some((runner, next)) => {
                        self = runner;
                        next
                    }
                    None => return,
                },
                Next::End => return,
            };
        }
    }

    /// Executes one command. Returns `None` if the vCPU is lost.
    fn obey(mut self, command: Command<V::Arch>, running: bool) -> Option<(Self, Next<V::Arch>)> {
        // A reply without a receiver is no loss.
        match command {
            Command::Run => return Some((self, Next::Run)),
            Command::Park(reply) => {
                if running {
                    self.vcpu.notify_paused();
                }
                let _ = reply.send(());
                return Some((self, Next::Park));
            }
            Command::Save(reply) => {
                let _ = reply.send(self.vcpu.save());
            }
            Command::Reload(state, reply) => {
                let first;
                (self, first) = self.reload(&state, &reply)?;
                if let Some(command) = first {
                    return Some((self, Next::Obey(command)));
                }
            }
            // Nothing is unfinished: dropping the sender reports `Gone`.
            Command::Finish(..) | Command::FinishFirst(..) => {}
        }
        Some((self, if running { Next::Run } else { Next::Park }))
    }

    fn reload(
        self,
        state: &<V::Arch as Arch>::Vcpu,
        reply: &Sender<Result<RestoredVcpu, Error>>,
    ) -> Option<Finished<Self, V::Arch>> {
        let Self { vcpu, context } = self;
        match vcpu.reload(state) {
            Ok((restoring, proof)) => {
                let _ = reply.send(Ok(proof));
                let (vcpu, first) = context.finish(restoring)?;
                Some((Self { vcpu, context }, first))
            }
            Err(error) => {
                let _ = reply.send(Err(error));
                None
            }
        }
    }

    /// Runs guest code until the next exit.
    fn run(&mut self) -> Next<V::Arch> {
        if self.context.exit.reason().is_some() {
            return Next::Park;
        }
        let vcpu = self.context.index;
        let reason = match self.vcpu.run(&*self.context.bus) {
            Ok(Exit::Cancelled) => {
                return match self.context.inbox.try_recv() {
                    Ok(command) => Next::Obey(command),
                    // An old kick, or one by the exit latch.
                    Err(TryRecvError::Empty) => Next::Run,
                    Err(TryRecvError::Disconnected) => Next::End,
                };
            }
            Ok(Exit::Reset) => MachineExit::Reset,
            Ok(Exit::Shutdown) => MachineExit::PowerOff,
            Ok(Exit::TripleFault) => MachineExit::TripleFault { vcpu },
            Ok(Exit::Halt) => MachineExit::Halted { vcpu },
            Ok(Exit::Fault(info)) => MachineExit::Fault { vcpu, info },
            // An exit that was added to the seam later.
            Ok(other) => MachineExit::Failed {
                reason: format!("vCPU {vcpu}: an unknown exit, {other:?}"),
            },
            Err(error) => MachineExit::Failed {
                reason: format!("vCPU {vcpu}: {}", chain(&error)),
            },
        };
        self.context.exit.report(reason);
        Next::Park
    }
}

/// Returns an error with its causes, in one line.
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
