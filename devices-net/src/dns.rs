//! Messages of name servers, and the host's list of these servers, as values without input or
//! output.
//!
//! | module | idea |
//! |---|---|
//! | `message` | questions, the addresses in answers, refusals (RFC 1035, 6891, 8914, 9460) |
//! | `records` | times to live, and parameters that are removed |
//! | `cache` | responses that are stored (RFC 2308) |
//! | `servers` | `resolv.conf` |
//!
//! Architecture invariants: no message of a guest or a server makes a parser allocate more
//! than a few names; a record is read once, and a name follows at most 128 references.

mod cache;
mod message;
mod records;
mod servers;

pub use self::cache::DnsCache;
pub use self::message::{
    DNS_HEADER, DnsAddress, DnsQuestion, ExtendedError, MalformedMessage, ResponseCode, addresses,
    answers, refusal,
};
pub use self::records::{age, is_truncated, largest_response, lifetime, strip_ech};
pub use self::servers::ResolvConf;
