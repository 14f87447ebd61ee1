//! Messages of name servers, and the host's list of these servers, as values without input or
//! output.
//!
//! | module | idea |
//! |---|---|
//! | `message` | questions, the addresses in answers, refusals (RFC 1035, 6891, 9460) |
//! | `servers` | `resolv.conf` |
//!
//! Architecture invariants: no message of a guest or a server makes a parser allocate more
//! than a few names; a record is read once, and a name follows at most 128 references.

mod message;
mod servers;

pub use self::message::{
    DNS_HEADER, DnsAddress, DnsQuestion, MalformedMessage, ResponseCode, addresses, answers,
    refusal,
};
pub use self::servers::ResolvConf;
