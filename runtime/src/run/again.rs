//! The start of a VM that has a record: it was created, or has exited.

use sm_control::config::SettingsSourceV1;
use sm_control::launch::{ImageSource, LaunchRequest, StartSource};
use sm_control::timings::Phase;
use sm_image::{Digest, Store, StoredImage};

use super::{Launched, program, request, spawn};
use crate::record::{Record, Records};
use crate::sm::Sm;
use crate::vm::Vm;
use crate::{Error, Refusal, volumes};

/// Options of [`Vm::start`]; everything else is as when the VM was created.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StartOptions {
    attach: bool,
    terminal_size: (u16, u16),
    phases: Vec<Phase>,
}

impl Default for StartOptions {
    fn default() -> Self {
        Self {
            attach: false,
            terminal_size: (80, 24),
            phases: Vec::new(),
        }
    }
}

impl StartOptions {
    /// Returns the defaults: the caller is not attached.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Stays attached: [`Vm::take_session`] returns the workload's session, with all
    /// output.
    #[must_use]
    pub fn attach(mut self, yes: bool) -> Self {
        self.attach = yes;
        self
    }

    /// Sets columns and rows, for a workload on a terminal.
    #[must_use]
    pub fn terminal_size(mut self, columns: u16, rows: u16) -> Self {
        self.terminal_size = (columns, rows);
        self
    }

    /// Sets phases that are already complete, for a common list of all phases.
    #[must_use]
    pub fn phases(mut self, phases: Vec<Phase>) -> Self {
        self.phases = phases;
        self
    }
}

impl Vm {
    /// Starts a VM that was created or has exited, and returns once its workload runs. It
    /// has the same identifier, name and options as before, and its output log continues.
    /// A VM that runs already is left alone, and the handle is not attached to it.
    ///
    /// A workload that was cloned from a snapshot continues from the snapshot again.
    ///
    /// # Errors
    /// See [`Error`]: the image, kernel or snapshot is not there any more, or the start
    /// failed. The VM stays, with an exit record that says so if its process was started.
    pub fn start(&mut self, options: StartOptions) -> Result<(), Error> {
        let attach = options.attach;
        if let Some(launched) = launch_again(self.sm(), self.record(), options)? {
            *self = launched.until_started(attach)?;
        }
        Ok(())
    }

    /// Stops a running VM, as [`Self::stop`] does, and starts it.
    ///
    /// # Errors
    /// As for [`Self::stop`] and [`Self::start`].
    pub fn restart(
        &mut self,
        grace: Option<std::time::Duration>,
        options: StartOptions,
    ) -> Result<(), Error> {
        match self.stop(grace) {
            Ok(()) | Err(Error::NotRunning(_)) => self.start(options),
            Err(error) => Err(error),
        }
    }
}

/// Starts the VMM of a VM that has no process; `None` if it has one.
fn launch_again(
    sm: &Sm,
    record: &Record,
    options: StartOptions,
) -> Result<Option<Launched>, Error> {
    let program = program(sm)?;
    sm.describe_agent()?;
    let records = Records::open(sm.home())?;
    let Some((record, lock)) = records.claim(record)? else {
        return Ok(None);
    };
    let launch = || {
        let settings = record.start_settings();
        let settings =
            settings.ok_or_else(|| Refusal::NoStartSettings(record.config().name.clone()))?;
        let (source, _image) = source(sm, &record, &settings.source)?;
        let fixed = request(sm, &record, settings, source)?;
        let mut request = LaunchRequest {
            attach: options.attach,
            columns: options.terminal_size.0,
            rows: options.terminal_size.1,
            phases: options.phases,
            existing: true,
            ..fixed
        };
        request.phases.push(Phase::now("image resolved"));
        let (child, session) = spawn(&record, &request, &lock, &program)?;
        let warnings = volumes::warnings(sm.home(), &request.mounts);
        Ok((child, session, request.phases, warnings))
    };
    match launch() {
        Ok((child, session, phases, warnings)) => Ok(Some(Launched {
            sm: sm.clone(),
            record,
            child,
            session,
            phases,
            warnings,
            existing: true,
        })),
        Err(error) => {
            // If this fails, the next sweep does it.
            let _ = record.return_to_idle();
            Err(error)
        }
    }
}

/// Returns the start source, and the image in the store, which stays there as long as the
/// value lives.
pub(super) fn source(
    sm: &Sm,
    record: &Record,
    source: &SettingsSourceV1,
) -> Result<(StartSource, Option<StoredImage>), Error> {
    let config = record.config();
    match source {
        SettingsSourceV1::Snapshot(name) => Ok((StartSource::Snapshot(name.clone()), None)),
        SettingsSourceV1::Image { cold } => {
            let missing = || Refusal::NoImage {
                vm: config.name.clone(),
                image: config.image.clone(),
            };
            let digest = Digest::parse(&config.image_digest).ok_or_else(missing)?;
            let store = Store::open(&sm.home().images())?;
            let stored = store.open_digest(digest)?.ok_or_else(missing)?;
            let kernel = sm.kernels().find(Some(&config.kernel))?;
            let source = StartSource::Image(ImageSource {
                root: crate::image::segments(&stored),
                modules: kernel.modules,
                cold: *cold,
            });
            Ok((source, Some(stored)))
        }
    }
}
