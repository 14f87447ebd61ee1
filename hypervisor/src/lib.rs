//! One virtual machine seam over KVM (and later HVF and WHP), with complete state save and restore.
#![warn(missing_docs)]
