//! What commands need of the distribution: all of it is seen to before they begin, so
//! that who is not root is asked once.

use anyhow::Result;

use crate::apt::{self, Apt, Needs};
use crate::test::{self, Wanted};
use crate::{build, fidelity, fixtures, host, kernel, lab, stock};

/// For `xtask demo`.
pub(crate) fn demo(apt: &Apt) -> Result<()> {
    let mut needs = building();
    needs.packages.extend(["busybox-static"]);
    if !host::looks_able() {
        needs.packages.extend(lab::PACKAGES);
        needs.qemu = true;
    }
    apt.ensure_all(&needs)
}

/// For `xtask test`.
pub(crate) fn tests(apt: &Apt, wanted: &Wanted) -> Result<()> {
    if wanted.e2e {
        return everything(apt);
    }
    apt.ensure_all(&Needs {
        packages: test::UNIT_PACKAGES.into_iter().collect(),
        ..Needs::default()
    })
}

/// For all tests, and anything else.
pub(crate) fn everything(apt: &Apt) -> Result<()> {
    let mut needs = building();
    needs.packages.extend(test::UNIT_PACKAGES);
    needs.packages.extend(fixtures::PACKAGES);
    needs.packages.extend(fixtures::CLIENTS);
    needs.packages.extend(fidelity::PACKAGES);
    needs.packages.extend(stock::PACKAGES);
    needs.packages.extend(lab::PACKAGES);
    if !apt::is_root() {
        needs.packages.extend(fixtures::ROOTLESS_PACKAGES);
    }
    needs.qemu = true;
    apt.ensure_all(&needs)
}

/// For building `sm` and its kernel.
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
