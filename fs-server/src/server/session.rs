//! The start and end of a session.

use rustix::io::Errno;

use super::{Answer, Server};
use crate::abi::{self, InitOut, init};
use crate::config::CacheMode;

/// Maximum number of bytes in a WRITE, and of pages in any request.
const MAX_WRITE: u32 = 1 << 20;
const MAX_PAGES: u16 = 256;
/// The limit of drivers without MAX_PAGES.
const MAX_WRITE_OLD: u32 = 128 << 10;
/// Requests in the background at once, such as readahead; the driver slows down from the
/// second number on.
const MAX_BACKGROUND: u16 = 64;
const CONGESTION: u16 = 48;

/// Flags that this server uses if the driver has them. Locks are not among them: they stay
/// in the guest.
const FLAGS: u64 = init::ASYNC_READ
    | init::BIG_WRITES
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::MAX_PAGES
    | init::SUBMOUNTS
    | init::HANDLE_KILLPRIV_V2
    | init::SETXATTR_EXT
    | init::INIT_EXT
    | init::DIRECT_IO_ALLOW_MMAP;

/// The negotiated protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Session {
    flags: u64,
}

impl Session {
    /// Returns a session with flags that were negotiated before.
    pub(super) fn restored(flags: u64) -> Self {
        Self { flags }
    }

    pub(super) fn flags(self) -> u64 {
        self.flags
    }

    pub(super) fn has_setxattr_ext(self) -> bool {
        self.flags & init::SETXATTR_EXT != 0
    }

    pub(super) fn has_submounts(self) -> bool {
        self.flags & init::SUBMOUNTS != 0
    }

    /// Returns true if the guest delays writes.
    pub(super) fn has_writeback(self) -> bool {
        self.flags & init::WRITEBACK_CACHE != 0
    }
}

impl Server {
    pub(super) fn init(
        &mut self,
        major: u32,
        minor: u32,
        max_readahead: u32,
        offered: u64,
    ) -> Result<Answer, Errno> {
        self.end_session();
        let mut reply = InitOut {
            major: abi::MAJOR,
            minor: abi::MINOR.min(minor),
            ..InitOut::default()
        };
        if major > abi::MAJOR {
            // The driver repeats the request in this version.
            reply.minor = abi::MINOR;
            return Ok(self.put(reply));
        }
        if major < abi::MAJOR || minor < abi::OLDEST_MINOR {
            return Err(Errno::PROTO);
        }
        let exclusive = self
            .shares
            .iter()
            .all(|share| share.options.cache == CacheMode::Exclusive);
        let mut wanted = FLAGS;
        if exclusive && !self.shares.is_empty() {
            wanted |= init::WRITEBACK_CACHE | init::CACHE_SYMLINKS;
        } else {
            wanted |= init::AUTO_INVAL_DATA;
        }
        let flags = wanted & offered;
        self.session = Some(Session { flags });
        self.begin_watching();
        let has_pages = flags & init::MAX_PAGES != 0;
        reply.max_readahead = max_readahead;
        // The two halves of the flags.
        reply.flags = u32::try_from(flags & 0xffff_ffff).unwrap_or(0);
        reply.flags2 = u32::try_from(flags >> 32).unwrap_or(0);
        reply.max_background = MAX_BACKGROUND;
        reply.congestion_threshold = CONGESTION;
        reply.max_write = if has_pages { MAX_WRITE } else { MAX_WRITE_OLD };
        reply.time_gran = 1;
        reply.max_pages = if has_pages { MAX_PAGES } else { 0 };
        Ok(self.put(reply))
    }

    /// Releases everything that the guest has referred to.
    pub(super) fn end_session(&mut self) {
        self.session = None;
        self.pending.clear();
        self.handles.clear();
        self.directories.clear();
        self.nodes.clear();
    }

    /// Returns true between INIT and DESTROY: the guest has mounted the file system.
    #[must_use]
    pub fn is_mounted(&self) -> bool {
        self.session.is_some()
    }

    /// Releases everything that the driver has referred to, as after DESTROY. A transport
    /// calls it when the driver is gone.
    pub fn reset(&mut self) {
        self.end_session();
    }
}
