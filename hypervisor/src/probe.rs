//! Can this host's KVM run Linux?
use crate::LinuxSupport;

pub(crate) fn linux_support(_kvm: &crate::kvm::Kvm) -> LinuxSupport {
    LinuxSupport::Native
}
