//! Wire types shared by the host and the guest agent.
#![warn(missing_docs)]
