//! A pool of warm VMs by hand: one workload is prepared and saved, its clones wait, each
//! serves a request, and is taken back to the saved moment before it serves the next.
//!
//! `SM_AGENT=AGENT cargo run -p sm-runtime --example warm_pool -- IMAGE`, with an image that
//! has a shell. VMs need KVM, a guest kernel and the guest agent: see README.md.

use std::collections::VecDeque;
use std::error::Error;

use sm_runtime::{Force, Image, RunOptions, Sm, Snapshot, Vm};

const MEMBERS: usize = 3;
const REQUESTS: usize = 7;

fn main() -> Result<(), Box<dyn Error>> {
    // This program is also the VMM of the VMs that it starts.
    sm_runtime::run_vmm_if_asked();

    let reference = std::env::args().nth(1).ok_or("usage: warm_pool IMAGE")?;
    let sm = Sm::new()?;
    let image = sm.image(&reference)?;
    let name = format!("warm-pool-{}", std::process::id());
    let served = {
        let mut pool = Pool::new(&image, &name, MEMBERS)?;
        (0..REQUESTS).try_for_each(|request| {
            let vm = pool.take()?;
            // A request leaves something behind, which the next one must not see.
            let script = format!("ls /tmp; hostname; cat /run/warm; touch /tmp/{request}");
            let output = vm.exec(["sh", "-c", &script]).output()?;
            print!(
                "{request}: {}",
                String::from_utf8_lossy(&output.stdout).replace('\n', " ")
            );
            println!("(status {})", output.status);
            pool.recycle(vm)
        })
    };
    sm.snapshots().remove(&name)?;
    Ok(served?)
}

/// Clones of a warm workload that wait for requests.
struct Pool {
    snapshot: Snapshot,
    idle: VecDeque<Vm>,
}

impl Pool {
    /// Warms a workload of `image` up, saves it as `name`, and starts its clones.
    fn new(image: &Image, name: &str, members: usize) -> Result<Self, sm_runtime::Error> {
        let options = RunOptions::new()
            .command(["sleep", "1000000"])
            .memory(128 << 20);
        // Slow preparation belongs here: imports, caches, connections to itself.
        let (snapshot, ()) = image.warm_up(options, name, |vm| {
            vm.exec(["sh", "-c", "date > /run/warm"]).output()?;
            Ok(())
        })?;
        let mut pool = Self {
            snapshot,
            idle: VecDeque::new(),
        };
        for _ in 0..members {
            let vm = pool.start()?;
            pool.idle.push_back(vm);
        }
        Ok(pool)
    }

    fn start(&self) -> Result<Vm, sm_runtime::Error> {
        self.snapshot.run(&RunOptions::new())
    }

    /// Hands a member out; another one is started if all are.
    fn take(&mut self) -> Result<Vm, sm_runtime::Error> {
        match self.idle.pop_front() {
            Some(vm) => Ok(vm),
            None => self.start(),
        }
    }

    /// Takes a member back to where the snapshot was made, with a new identity. One that
    /// cannot be reset is replaced.
    fn recycle(&mut self, mut vm: Vm) -> Result<(), sm_runtime::Error> {
        if let Err(error) = vm.reset() {
            eprintln!("{} is replaced: {error}", vm.name());
            vm.remove(Force::Yes)?;
            vm = self.start()?;
        }
        self.idle.push_back(vm);
        Ok(())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // A VM outlives its `Vm`: without this, the clones would go on.
        for mut vm in self.idle.drain(..) {
            if let Err(error) = vm.remove(Force::Yes) {
                eprintln!("{} is left: {error}", vm.name());
            }
        }
    }
}
