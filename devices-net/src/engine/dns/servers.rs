//! The name servers of the host.

use std::fs;
use std::io::Read as _;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt as _;

use super::super::config::NameServers;
use super::super::flow::DNS_PORT;
use crate::dns::ResolvConf;

/// Longest `resolv.conf`.
const MAX_FILE: u64 = 64 << 10;

/// The identity of a file's content: device, number, length and time of the last change.
type Stamp = (u64, u64, u64, i64, i64);

/// The name servers of the host, which follow changes of a file.
#[derive(Default)]
pub(super) struct HostServers {
    source: Option<NameServers>,
    servers: Vec<SocketAddr>,
    stamp: Option<Stamp>,
}

impl HostServers {
    pub(super) fn set(&mut self, source: NameServers) {
        *self = Self {
            source: Some(source),
            ..Self::default()
        };
        let _ = self.follow();
    }

    pub(super) fn is_set(&self) -> bool {
        self.source.is_some()
    }

    /// Returns the servers, as they were at the last question.
    pub(super) fn known(&self) -> &[SocketAddr] {
        match &self.source {
            Some(NameServers::Fixed(servers)) => servers,
            _ => &self.servers,
        }
    }

    /// Reads a file that has changed; returns true if that has changed the servers.
    pub(super) fn follow(&mut self) -> bool {
        let Some(NameServers::File(path)) = &self.source else {
            return false;
        };
        // Opening a pipe would wait for a writer.
        let file = fs::metadata(path).ok().filter(fs::Metadata::is_file);
        let stamp = file.map(|it| (it.dev(), it.ino(), it.len(), it.mtime(), it.mtime_nsec()));
        if !self.servers.is_empty() && stamp == self.stamp {
            return false;
        }
        let mut text = Vec::new();
        // A file that is not there is an empty one.
        if stamp.is_some() {
            let _ =
                fs::File::open(path).and_then(|file| file.take(MAX_FILE).read_to_end(&mut text));
        }
        // Comments may have other characters.
        let text = String::from_utf8_lossy(&text);
        let servers = ResolvConf::parse(&text).servers;
        let servers: Vec<_> = servers.iter().map(|it| (*it, DNS_PORT).into()).collect();
        self.stamp = stamp;
        let changed = servers != self.servers;
        self.servers = servers;
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_servers_of_a_file_are_those_that_it_has() {
        let file = std::env::temp_dir().join(format!("sm-resolv-{}", std::process::id()));
        let mut servers = HostServers::default();
        for (content, expected) in [
            (&b"nameserver 9.9.9.9\n"[..], "9.9.9.9:53"),
            (b"# B\xfcro\nnameserver 8.8.8.8\n", "8.8.8.8:53"),
            (b"", "127.0.0.1:53"),
        ] {
            fs::write(&file, content).unwrap();
            servers.set(NameServers::File(file.clone()));
            assert_eq!(servers.known(), [expected.parse().unwrap()]);
        }
        fs::write(&file, b"nameserver 9.9.9.9\n").unwrap();
        assert!(servers.follow() && !servers.follow());
        fs::remove_file(&file).unwrap();
        assert!(servers.follow());
        assert_eq!(servers.known(), ["127.0.0.1:53".parse().unwrap()]);
        // A pipe without a writer.
        let mode = rustix::fs::Mode::RUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &file, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        assert!(!servers.follow());
        assert_eq!(servers.known(), ["127.0.0.1:53".parse().unwrap()]);
        fs::remove_file(&file).unwrap();
    }
}
