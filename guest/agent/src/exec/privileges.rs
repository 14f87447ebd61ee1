//! Limits of a command's privileges, and parameters of the kernel, in its new process.

use std::fs;
use std::io;
use std::path::{Component, Path};

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};
use sm_guest_proto::exec::Sysctl;
use sm_guest_proto::privileges::Privileges;

/// Number of bits in a set of capabilities.
const BITS: u32 = u64::BITS;

/// Limits what programs of this process can gain. It must still have `CAP_SETPCAP`.
pub(super) fn limit_gains(privileges: &Privileges) -> io::Result<()> {
    let Some(permitted) = privileges.capabilities else {
        return Ok(());
    };
    for number in 0..BITS {
        let bit = 1 << number;
        if permitted.bits() & bit != 0 {
            continue;
        }
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(bit)) {
            // The kernel has no further ones.
            Err(Errno::INVAL) => break,
            removed => removed?,
        }
    }
    Ok(clear_ambient_capability_set()?)
}

/// Limits the privileges of this process, after its change of user: a user other than root
/// has no capabilities left.
pub(super) fn limit_own(privileges: &Privileges) -> io::Result<()> {
    if let Some(permitted) = privileges.capabilities {
        let permitted = CapabilitySet::from_bits_retain(permitted.bits());
        let own = capabilities(None)?;
        let sets = CapabilitySets {
            effective: own.effective.intersection(permitted),
            permitted: own.permitted.intersection(permitted),
            inheritable: CapabilitySet::empty(),
        };
        set_capabilities(None, sets)?;
    }
    if privileges.no_new_privileges {
        set_no_new_privs(true)?;
    }
    Ok(())
}

/// Sets a parameter of the kernel; the error is a sentence.
pub(super) fn set_parameter(sysctl: &Sysctl) -> Result<(), String> {
    let relative = Path::new(&sysctl.path);
    let named = |part| matches!(part, Component::Normal(_));
    if sysctl.path.is_empty() || !relative.components().all(named) {
        return Err(format!("{:?} is no kernel parameter", sysctl.path));
    }
    let path = Path::new("/proc/sys").join(relative);
    match fs::write(path, &sysctl.value) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(format!(
            "the guest's kernel has no parameter {:?}",
            sysctl.path
        )),
        Err(error) => Err(format!(
            "set kernel parameter {:?} to {:?}: {error}",
            sysctl.path, sysctl.value
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_parameters_stay_below_their_directory() {
        for path in ["", "/etc/passwd", "../../etc/passwd", "net/../../x", "."] {
            let sysctl = Sysctl {
                path: path.into(),
                value: "1".into(),
            };
            let error = set_parameter(&sysctl).unwrap_err();
            assert!(error.contains("is no kernel parameter"), "{error}");
        }
        let missing = Sysctl {
            path: "net/sm_missing".into(),
            value: "1".into(),
        };
        let error = set_parameter(&missing).unwrap_err();
        assert_eq!(
            error,
            "the guest's kernel has no parameter \"net/sm_missing\""
        );
    }
}
