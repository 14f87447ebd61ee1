//! A name server for the guest, which asks those of the host.
//!
//! Questions are passed on as they are, each from a socket of its own with a number of its
//! own, so that a forged answer has to guess both. The policy decides about names before, and about
//! addresses in answers afterwards.

use std::collections::VecDeque;
use std::fs;
use std::hash::{BuildHasher as _, RandomState};
use std::io::Read as _;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use sm_event_loop::{Interest, Registered, Registry, SlotQueue, Timer};

use super::config::NameServers;
use super::flow::{DNS_PORT, FlowKey, TokenKind, token};
use super::link::{GuestFrame, LinkFull};
use super::output::Output;
use super::socket;
use super::turn::Turn;
use crate::dns::{DNS_HEADER, DnsQuestion, ResolvConf, ResponseCode, addresses, answers, refusal};
use crate::wire::MAX_IP_PACKET;

/// Longest question: a name, and options.
const MAX_QUESTION: usize = 1024;
/// Answers that wait for room on the link.
const MAX_REPLIES: usize = 64;
/// Buffers that are reused.
const SPARE: usize = 16;
/// Time in which all servers are asked. The C library waits for five seconds.
const TIMEOUT: Duration = Duration::from_millis(4500);
/// Longest `resolv.conf`.
const MAX_FILE: u64 = 64 << 10;
/// Response codes of servers that cannot answer: another may.
const UNABLE: [u8; 3] = [2, 4, 5];

/// The identity of a file's content: device, number, length and time of the last change.
type Stamp = (u64, u64, u64, i64, i64);

/// A question that waits for an answer.
struct Lookup {
    key: FlowKey,
    guest_id: u16,
    name: String,
    /// With a number of this side.
    question: Vec<u8>,
    socket: Registered<OwnedFd>,
    attempts: usize,
    deadline: Instant,
}

struct Reply {
    key: FlowKey,
    message: Vec<u8>,
}

/// The guest's name server.
pub(crate) struct DnsProxy {
    source: Option<NameServers>,
    servers: Vec<SocketAddr>,
    stamp: Option<Stamp>,
    lookups: Vec<Option<Lookup>>,
    free: Vec<u32>,
    /// In the order in which they began.
    order: SlotQueue,
    replies: VecDeque<Reply>,
    spare: Vec<Vec<u8>>,
    buffer: Vec<u8>,
    numbers: RandomState,
    number: u64,
    timer: Option<Timer>,
    limit: usize,
}

impl DnsProxy {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            source: None,
            servers: Vec::new(),
            stamp: None,
            lookups: Vec::new(),
            free: Vec::new(),
            order: SlotQueue::default(),
            replies: VecDeque::new(),
            spare: Vec::new(),
            buffer: Vec::new(),
            numbers: RandomState::new(),
            number: 0,
            timer: None,
            limit: limit.max(1),
        }
    }

    pub(crate) fn set_servers(&mut self, source: NameServers) {
        self.stamp = None;
        self.servers.clear();
        self.source = Some(source);
        let _ = self.servers();
    }

    /// Returns the first server, as it was at the last question.
    pub(crate) fn known_server(&self) -> Option<SocketAddr> {
        let servers = match &self.source {
            Some(NameServers::Fixed(servers)) => servers,
            _ => &self.servers,
        };
        servers.first().copied()
    }

    pub(crate) fn is_on(&self) -> bool {
        self.source.is_some()
    }

    /// Returns the servers, which a change of the file changes.
    pub(crate) fn servers(&mut self) -> &[SocketAddr] {
        match &self.source {
            Some(NameServers::Fixed(servers)) => return servers,
            Some(NameServers::File(path)) => {
                // Opening a pipe would wait for a writer.
                let file = fs::metadata(path).ok().filter(fs::Metadata::is_file);
                let stamp =
                    file.map(|it| (it.dev(), it.ino(), it.len(), it.mtime(), it.mtime_nsec()));
                if self.servers.is_empty() || stamp != self.stamp {
                    let mut text = Vec::new();
                    // A file that is not there is an empty one.
                    if stamp.is_some() {
                        let _ = fs::File::open(path)
                            .and_then(|file| file.take(MAX_FILE).read_to_end(&mut text));
                    }
                    // Comments may have other characters.
                    let text = String::from_utf8_lossy(&text);
                    let servers = ResolvConf::parse(&text).servers;
                    let servers = servers.iter().map(|it| (*it, DNS_PORT).into());
                    self.servers = servers.collect();
                    self.stamp = stamp;
                }
            }
            None => {}
        }
        &self.servers
    }

    /// Processes a question of the guest of `len` bytes from `offset` on.
    pub(crate) fn receive(
        &mut self,
        turn: &mut Turn<'_>,
        key: FlowKey,
        frame: &dyn GuestFrame,
        (offset, len): (usize, usize),
    ) {
        let mut message = self.spare.pop().unwrap_or_default();
        message.clear();
        message.resize(len.min(MAX_QUESTION), 0);
        turn.stats.dns_questions += 1;
        if len > MAX_QUESTION || !frame.copy_out(offset, &mut message) {
            return self.recycle(message);
        }
        let question = match DnsQuestion::parse(&message) {
            Ok(question) => question,
            Err(_) => return self.refuse(key, message, ResponseCode::FormatError),
        };
        if !question.is_standard() {
            return self.refuse(key, message, ResponseCode::NotImplemented);
        }
        if !turn.policy.may_resolve(&question.name) {
            turn.stats.prohibited += 1;
            let reason = || turn.policy.explain_name(&question.name);
            turn.journal.name_refused(&question.name, reason);
            return self.refuse(key, message, ResponseCode::NoSuchName);
        }
        let repeated = self.lookups.iter().flatten().any(|lookup| {
            let same = lookup.question.get(DNS_HEADER..) == message.get(DNS_HEADER..);
            lookup.key == key && lookup.guest_id == question.id && same
        });
        if repeated {
            return self.recycle(message);
        }
        if self.lookups.len() - self.free.len() >= self.limit
            && let Some(oldest) = self.order.first()
        {
            turn.limited("questions to name servers", &key);
            self.finish(turn.registry, oldest, Some(ResponseCode::ServerFailure));
        }
        self.begin(turn, key, question, message);
    }

    fn begin(
        &mut self,
        turn: &mut Turn<'_>,
        key: FlowKey,
        question: DnsQuestion,
        mut message: Vec<u8>,
    ) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.lookups.push(None);
            u32::try_from(self.lookups.len() - 1).unwrap_or(u32::MAX)
        });
        self.number = self.number.wrapping_add(1);
        let [high, low, ..] = self.numbers.hash_one(self.number).to_ne_bytes();
        if let Some(id) = message.first_chunk_mut() {
            *id = [high, low];
        }
        match self.ask(turn, slot, &message, 0) {
            Some((socket, attempts, deadline)) => {
                let lookup = Lookup {
                    key,
                    guest_id: question.id,
                    name: question.name,
                    question: message,
                    socket,
                    attempts,
                    deadline,
                };
                if let Some(place) = self.lookups.get_mut(slot as usize) {
                    *place = Some(lookup);
                }
                self.order.push_back(slot);
                self.arm(turn.registry);
            }
            None => {
                self.free.push(slot);
                set_id(&mut message, question.id);
                self.refuse(key, message, ResponseCode::ServerFailure);
            }
        }
    }

    /// Sends a question to the next server that can be asked after `attempts` were made;
    /// returns the socket for its answer, the number of attempts, and the time to wait.
    fn ask(
        &mut self,
        turn: &mut Turn<'_>,
        slot: u32,
        question: &[u8],
        attempts: usize,
    ) -> Option<(Registered<OwnedFd>, usize, Instant)> {
        let servers = self.servers();
        let most = servers.len().max(2);
        for attempt in attempts..most {
            let server = *servers.get(attempt % servers.len().max(1))?;
            let Ok(socket) = socket::connect_datagram(server) else {
                continue;
            };
            if rustix::net::send(&socket, question, SendFlags::NOSIGNAL).is_err() {
                continue;
            }
            let wait = TIMEOUT / u32::try_from(most).unwrap_or(1);
            let token = token(TokenKind::Dns, slot);
            let socket = turn
                .registry
                .add(socket, token, Interest::READ.edge_triggered());
            return Some((socket.ok()?, attempt + 1, turn.now + wait));
        }
        None
    }

    /// Asks the next server, or notifies the guest that there is none.
    fn ask_next(&mut self, turn: &mut Turn<'_>, slot: u32) {
        let Some(mut lookup) = self.lookups.get_mut(slot as usize).and_then(Option::take) else {
            return;
        };
        match self.ask(turn, slot, &lookup.question, lookup.attempts) {
            Some((socket, attempts, deadline)) => {
                let old = std::mem::replace(&mut lookup.socket, socket);
                drop(turn.registry.remove(old));
                (lookup.attempts, lookup.deadline) = (attempts, deadline);
                self.put(slot, lookup);
                self.arm(turn.registry);
            }
            None => {
                self.put(slot, lookup);
                self.finish(turn.registry, slot, Some(ResponseCode::ServerFailure));
            }
        }
    }

    fn put(&mut self, slot: u32, lookup: Lookup) {
        if let Some(place) = self.lookups.get_mut(slot as usize) {
            *place = Some(lookup);
        }
    }

    pub(crate) fn host_ready(&mut self, turn: &mut Turn<'_>, slot: u32) {
        self.buffer.resize(MAX_IP_PACKET, 0);
        // An answer that is not one does not end the wait.
        for _ in 0..8 {
            let Some(Some(lookup)) = self.lookups.get(slot as usize) else {
                return;
            };
            let buffer = self.buffer.as_mut_slice();
            let len = match rustix::net::recv(&*lookup.socket, buffer, RecvFlags::empty()) {
                Ok((len, _)) => len,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return,
                // The server is not there.
                Err(_) => return self.ask_next(turn, slot),
            };
            let response = self.buffer.get(..len).unwrap_or_default();
            if answers(&lookup.question, response) {
                return self.answered(turn, slot, len);
            }
        }
        // Others follow: the next event comes with one of them.
    }

    /// Processes the answer in the buffer.
    fn answered(&mut self, turn: &mut Turn<'_>, slot: u32, len: usize) {
        let Some(Some(lookup)) = self.lookups.get(slot as usize) else {
            return;
        };
        let response = self.buffer.get(..len).unwrap_or_default();
        let mut refused = None;
        let code = addresses(response, |found| {
            let accepted = match found.of_name {
                true => (turn.policy).resolved(&lookup.name, found.address, found.ttl),
                false => turn.policy.may_answer(found.address),
            };
            if !accepted {
                refused = Some(found.address);
            }
        });
        match code {
            Ok(code) if !UNABLE.contains(&code) => {}
            _ => return self.ask_next(turn, slot),
        }
        if let Some(address) = refused {
            turn.stats.prohibited += 1;
            let reason = || turn.policy.explain_answer(address);
            turn.journal.name_refused(&lookup.name, reason);
            return self.finish(turn.registry, slot, Some(ResponseCode::NoSuchName));
        }
        let (key, id) = (lookup.key, lookup.guest_id);
        let mut message = self.spare.pop().unwrap_or_default();
        message.clear();
        message.extend_from_slice(response);
        set_id(&mut message, id);
        self.reply(key, message);
        self.finish(turn.registry, slot, None);
    }

    /// Ends a lookup; with a code, the guest is notified.
    fn finish(&mut self, registry: &mut dyn Registry, slot: u32, code: Option<ResponseCode>) {
        let Some(mut lookup) = self.lookups.get_mut(slot as usize).and_then(Option::take) else {
            return;
        };
        self.order.remove(slot);
        self.free.push(slot);
        drop(registry.remove(lookup.socket));
        match code {
            Some(code) => {
                set_id(&mut lookup.question, lookup.guest_id);
                self.refuse(lookup.key, lookup.question, code);
            }
            None => self.recycle(lookup.question),
        }
    }

    /// Asks the policy about each name again, and refuses those that it prohibits now.
    pub(crate) fn judge_again(&mut self, turn: &mut Turn<'_>) {
        for index in 0..self.lookups.len() {
            let lookup = self.lookups.get(index).and_then(Option::as_ref);
            if lookup.is_some_and(|lookup| !turn.policy.may_resolve(&lookup.name)) {
                let slot = u32::try_from(index).unwrap_or(u32::MAX);
                self.finish(turn.registry, slot, Some(ResponseCode::NoSuchName));
            }
        }
    }

    fn refuse(&mut self, key: FlowKey, question: Vec<u8>, code: ResponseCode) {
        let mut message = self.spare.pop().unwrap_or_default();
        refusal(&question, code, &mut message);
        self.recycle(question);
        if message.is_empty() {
            return self.recycle(message);
        }
        self.reply(key, message);
    }

    fn reply(&mut self, key: FlowKey, message: Vec<u8>) {
        if self.replies.len() >= MAX_REPLIES {
            return self.recycle(message);
        }
        self.replies.push_back(Reply { key, message });
    }

    fn recycle(&mut self, message: Vec<u8>) {
        if self.spare.len() < SPARE {
            self.spare.push(message);
        }
    }

    /// Sets the timer for the first deadline.
    fn arm(&mut self, registry: &mut dyn Registry) {
        let lookups = self.lookups.iter().flatten();
        let Some(first) = lookups.map(|lookup| lookup.deadline).min() else {
            return;
        };
        if let Some(timer) = self.timer {
            if timer.at() <= first {
                return;
            }
            registry.cancel_timer(timer);
        }
        self.timer = Some(registry.set_timer(first, token(TokenKind::DnsTimer, 0)));
    }

    /// Asks other servers about what was not answered in time.
    pub(crate) fn timer(&mut self, turn: &mut Turn<'_>) {
        self.timer = None;
        for index in 0..self.lookups.len() {
            let due = |lookup: &Lookup| lookup.deadline <= turn.now;
            if self
                .lookups
                .get(index)
                .and_then(Option::as_ref)
                .is_some_and(due)
            {
                self.ask_next(turn, u32::try_from(index).unwrap_or(u32::MAX));
            }
        }
        self.arm(turn.registry);
    }

    /// Delivers answers.
    pub(crate) fn serve(&mut self, output: &mut Output<'_>) -> Result<(), LinkFull> {
        while let Some(reply) = self.replies.front() {
            let message = &reply.message;
            let id = message
                .first_chunk()
                .map_or(0, |id| u16::from_be_bytes(*id));
            output.datagram(reply.key.remote(), reply.key.guest(), message, id.into())?;
            if let Some(reply) = self.replies.pop_front() {
                self.recycle(reply.message);
            }
        }
        Ok(())
    }

    /// Removes all questions. Without a registry the event loop has ended.
    pub(crate) fn clear(&mut self, registry: Option<&mut (dyn Registry + '_)>) {
        let source = self.source.take();
        if let Some(registry) = registry {
            for lookup in self.lookups.iter_mut().filter_map(Option::take) {
                drop(registry.remove(lookup.socket));
            }
            if let Some(timer) = self.timer.take() {
                registry.cancel_timer(timer);
            }
        }
        *self = Self::new(self.limit);
        self.source = source;
    }
}

fn set_id(message: &mut [u8], id: u16) {
    if let Some(place) = message.first_chunk_mut() {
        *place = id.to_be_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_servers_of_a_file_are_those_that_it_has() {
        let file = std::env::temp_dir().join(format!("sm-resolv-{}", std::process::id()));
        let mut proxy = DnsProxy::new(1);
        for (content, expected) in [
            (&b"nameserver 9.9.9.9\n"[..], "9.9.9.9:53"),
            (b"# B\xfcro\nnameserver 8.8.8.8\n", "8.8.8.8:53"),
            (b"", "127.0.0.1:53"),
        ] {
            fs::write(&file, content).unwrap();
            proxy.set_servers(NameServers::File(file.clone()));
            assert_eq!(proxy.known_server(), Some(expected.parse().unwrap()));
        }
        fs::remove_file(&file).unwrap();
        assert_eq!(proxy.servers(), ["127.0.0.1:53".parse().unwrap()]);
        // A pipe without a writer.
        let mode = rustix::fs::Mode::RUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &file, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        assert_eq!(proxy.servers(), ["127.0.0.1:53".parse().unwrap()]);
        fs::remove_file(&file).unwrap();
    }
}
