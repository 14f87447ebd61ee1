//! The handle through which a program uses this library.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::guest_agent::AgentError;
use crate::home::Home;
use crate::{Error, StartError, guest_agent};

/// Variable with the program of VM processes.
const VMM: &str = "SM_VMM";
/// Variable with the kernel to boot.
const KERNEL: &str = "SM_KERNEL";
/// Variable with the log filter of VM processes.
const LOG: &str = "SM_LOG";

/// True if this program can be started as the process of a VM.
static REGISTERED: AtomicBool = AtomicBool::new(false);

/// Registers this program as that of VM processes.
pub(crate) fn register_program() {
    REGISTERED.store(true, Ordering::Relaxed);
}

/// A handle of images, VMs, snapshots and kernels in the directories of a user. Cheap to
/// clone, and usable by all threads; the values that it returns keep a clone of it.
///
/// ```
/// use sm_runtime::{ErrorKind, Sm};
///
/// # fn main() -> Result<(), sm_runtime::Error> {
/// # let directory = tempfile::tempdir().expect("a temporary directory");
/// let sm = Sm::builder().below(directory.path()).build()?;
/// assert!(sm.vms().list()?.is_empty());
/// assert_eq!(sm.vm("web").unwrap_err().kind(), ErrorKind::NotFound);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Sm(Arc<Settings>);

#[derive(Debug)]
struct Settings {
    home: Home,
    vmm: Option<PathBuf>,
    agent: Option<PathBuf>,
    kernel: Option<PathBuf>,
    log: Option<OsString>,
}

/// Builder of an [`Sm`]. Settings that are not set have the values of [`Sm::new`].
#[derive(Clone, Debug, Default)]
pub struct SmBuilder {
    home: Option<Home>,
    vmm: Option<PathBuf>,
    agent: Option<PathBuf>,
    kernel: Option<PathBuf>,
    log: Option<OsString>,
}

impl SmBuilder {
    /// Sets the directories of data, sockets and caches. Relative paths are completed with
    /// the working directory at the time of [`Self::build`].
    #[must_use]
    pub fn home(mut self, home: Home) -> Self {
        self.home = Some(home);
        self
    }

    /// Sets the directories to `data`, `run` and `cache` in `directory`. A path of more than
    /// 70 bytes is too long for the sockets in it (unix(7)).
    #[must_use]
    pub fn below(self, directory: impl AsRef<Path>) -> Self {
        let at = |name| directory.as_ref().join(name);
        let home = Home::new(&at("data"), &at("run"), &at("cache"));
        self.home(home)
    }

    /// Sets the program of VM processes, which calls [`crate::run_vmm_if_asked`] first in
    /// main. By default it is this program, if it has called that function. Another program
    /// uses its own guest agent, unless [`Self::agent`] sets one.
    #[must_use]
    pub fn vmm(mut self, program: impl Into<PathBuf>) -> Self {
        self.vmm = Some(program.into());
        self
    }

    /// Sets the binary of the guest agent.
    #[must_use]
    pub fn agent(mut self, binary: impl Into<PathBuf>) -> Self {
        self.agent = Some(binary.into());
        self
    }

    /// Sets the kernel of VMs whose options name none.
    #[must_use]
    pub fn kernel(mut self, image: impl Into<PathBuf>) -> Self {
        self.kernel = Some(image.into());
        self
    }

    /// Sets the log filter of VM processes, such as `sm_vmm_core=debug`.
    #[must_use]
    pub fn log(mut self, filter: impl Into<OsString>) -> Self {
        self.log = Some(filter.into());
        self
    }

    /// Creates the handle.
    ///
    /// # Errors
    /// No directories are set, and the environment does not determine them; or a path is
    /// empty, or relative to an unknown working directory.
    pub fn build(self) -> Result<Sm, Error> {
        let path = |set: Option<PathBuf>, name| set.or_else(|| variable(name).map(Into::into));
        // The process of a VM has another working directory.
        let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
        Ok(Sm(Arc::new(Settings {
            home: match self.home {
                Some(home) => home.absolute()?,
                None => Home::from_env()?,
            },
            vmm: path(self.vmm, VMM),
            agent: path(self.agent, guest_agent::VARIABLE).map(absolute),
            kernel: path(self.kernel, KERNEL),
            log: self.log.or_else(|| variable(LOG)),
        })))
    }
}

/// Returns the value of an environment variable that is set and not empty.
fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

impl Sm {
    /// Creates a handle with the directories of [`Home::from_env`], and the settings of the
    /// environment: `SM_VMM` (program of VM processes), `SM_AGENT` (guest agent),
    /// `SM_KERNEL` (kernel) and `SM_LOG` (log filter).
    ///
    /// # Errors
    /// The environment does not determine the directories.
    pub fn new() -> Result<Self, Error> {
        Self::builder().build()
    }

    /// Returns a builder, for explicit directories and programs.
    #[must_use]
    pub fn builder() -> SmBuilder {
        SmBuilder::default()
    }

    /// Returns the directories.
    #[must_use]
    pub fn home(&self) -> &Home {
        &self.0.home
    }

    /// Returns the kernel of VMs whose options name none, if it is set.
    pub(crate) fn kernel(&self) -> Option<&Path> {
        self.0.kernel.as_deref()
    }

    /// Returns the binary of the guest agent, if it is set.
    fn agent(&self) -> Option<&Path> {
        self.0.agent.as_deref()
    }

    /// Describes the guest agent of VMs. If VM processes run another program (see
    /// [`SmBuilder::vmm`]) and no agent is set, that program has an agent of its own, which
    /// is unknown here: the description names the program.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub(crate) fn describe_agent(&self) -> Result<String, AgentError> {
        match (&self.0.vmm, self.agent()) {
            (Some(program), None) => Ok(format!("that of {}", program.display())),
            (_, agent) => guest_agent::describe(agent),
        }
    }

    /// Returns the program of VM processes.
    ///
    /// # Errors
    /// None is set, and this program is not one.
    pub(crate) fn vmm(&self) -> Result<PathBuf, StartError> {
        match &self.0.vmm {
            Some(program) => Ok(program.clone()),
            None if REGISTERED.load(Ordering::Relaxed) => Ok(PathBuf::from("/proc/self/exe")),
            None => Err(StartError::NoProgram),
        }
    }

    /// Returns the variables of VM processes that differ from this process's own; `None`
    /// for those to remove.
    pub(crate) fn vmm_environment(&self) -> [(&'static str, Option<OsString>); 2] {
        [
            (guest_agent::VARIABLE, self.0.agent.clone().map(Into::into)),
            (LOG, self.0.log.clone()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Image, Images};
    use crate::kernel::Kernels;
    use crate::snapshots::{Snapshot, Snapshots};
    use crate::vm::{Vm, Vms};

    #[test]
    fn a_handle_is_shared_by_threads() {
        fn assert_shared<T: Clone + Send + Sync + 'static>() {}
        assert_shared::<Sm>();
        assert_shared::<Images>();
        assert_shared::<Vms>();
        assert_shared::<Snapshots>();
        assert_shared::<Kernels>();
        assert_shared::<Image>();
    }

    #[test]
    fn vms_and_snapshots_are_sent_to_other_threads() {
        fn assert_owned<T: Send + Sync + 'static>() {}
        assert_owned::<Vm>();
        assert_owned::<Snapshot>();
        assert_owned::<crate::exec::ExecBuilder>();
        assert_owned::<crate::session::Session>();
    }

    #[test]
    fn a_program_that_is_no_vmm_needs_another_program() {
        let dir = tempfile::tempdir().unwrap();
        // The test program has not registered itself.
        let sm = Sm::builder().below(dir.path()).build().unwrap();
        if variable(VMM).is_none() {
            assert!(matches!(sm.vmm(), Err(StartError::NoProgram)));
        }
        let named = Sm::builder().below(dir.path()).vmm("/vmm").build().unwrap();
        assert_eq!(named.vmm().unwrap(), Path::new("/vmm"));
    }

    /// The process of a VM has another working directory.
    #[test]
    fn relative_directories_are_completed() {
        let sm = Sm::builder().below("vms").build().unwrap();
        let below = std::env::current_dir().unwrap().join("vms");
        let home = sm.home();
        assert_eq!(home.data(), below.join("data"));
        assert_eq!(home.run(), below.join("run"));
        assert_eq!(home.cache(), below.join("cache"));
        let nowhere = Home::new(Path::new(""), Path::new("/run"), Path::new("/cache"));
        let refused = Sm::builder().home(nowhere).build().unwrap_err();
        assert!(matches!(refused, Error::Home(_)), "{refused}");
    }

    #[test]
    fn settings_reach_the_process_of_a_vm() {
        let dir = tempfile::tempdir().unwrap();
        let builder = Sm::builder().below(dir.path()).log("sm_vmm=debug");
        let sm = builder.agent("agent").kernel("/kernel").build().unwrap();
        assert_eq!(sm.kernel(), Some(Path::new("/kernel")));
        let [(agent, path), (log, filter)] = sm.vmm_environment();
        assert_eq!((agent, log), ("SM_AGENT", "SM_LOG"));
        assert_eq!(filter.unwrap(), "sm_vmm=debug");
        let path = PathBuf::from(path.unwrap());
        assert!(path.is_absolute() && path.ends_with("agent"), "{path:?}");
    }
}
