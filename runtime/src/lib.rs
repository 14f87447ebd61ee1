//! The library API of sm: images, VMs, exec and snapshots, and the process model behind them.
#![warn(missing_docs)]
