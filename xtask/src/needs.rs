//! The packages that commands need: all are checked before a command starts, so that a
//! user without root is asked once.

use anyhow::Result;

use crate::apt::{self, Apt, Needs};
use crate::test::{self, TestOptions};
use crate::{build, deny, fidelity, fixtures, host, kernel, lab, stock};

/// Ensures the packages of `xtask demo`.
pub(crate) fn demo(apt: &Apt) -> Result<()> {
    let mut needs = Needs {
        packages: build::PACKAGES.into_iter().chain(stock::PACKAGES).collect(),
        ..Needs::default()
    };
    needs.packages.extend(["busybox-static"]);
    if !host::is_probably_able() {
        needs.packages.extend(lab::PACKAGES);
        needs.qemu = true;
    }
    apt.ensure_all(&needs)
}

/// Ensures the packages of `xtask test`.
pub(crate) fn tests(apt: &Apt, options: &TestOptions) -> Result<()> {
    if options.e2e {
        return everything(apt);
    }
    apt.ensure_all(&Needs {
        packages: test::UNIT_PACKAGES.into_iter().collect(),
        ..Needs::default()
    })
}

/// Ensures the packages of all tests and everything else.
pub(crate) fn everything(apt: &Apt) -> Result<()> {
    let mut needs = building();
    needs.packages.extend(test::UNIT_PACKAGES);
    needs.packages.extend(fixtures::PACKAGES);
    needs.packages.extend(fixtures::CLIENTS);
    needs.packages.extend(fidelity::PACKAGES);
    needs.packages.extend(stock::PACKAGES);
    needs.packages.extend(deny::PACKAGES);
    needs.packages.extend(lab::PACKAGES);
    if !apt::is_root() {
        needs.packages.extend(fixtures::ROOTLESS_PACKAGES);
    }
    needs.qemu = true;
    apt.ensure_all(&needs)
}

/// Returns the packages for building `sm` and its kernel.
fn building() -> Needs {
    Needs {
        packages: kernel::PACKAGES
            .into_iter()
            .chain(build::PACKAGES)
            .collect(),
        known: Some(kernel::SOURCE),
        qemu: false,
    }
}
