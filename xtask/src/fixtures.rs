//! Images for the demo and the end-to-end tests.

use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::apt::Apt;

pub(crate) const PACKAGES: [&str; 4] = ["busybox-static", "mmdebstrap", "umoci", "erofs-utils"];

pub(crate) fn make(_apt: &Apt) -> Result<PathBuf> {
    bail!("not yet")
}
pub(crate) fn demo_image(_apt: &Apt) -> Result<PathBuf> {
    bail!("not yet")
}
