//! A name server for the guest, which asks those of the host.
//!
//! Questions are passed on as they are, each from a socket of its own with a number of its
//! own, so that a forged answer has to guess both. The policy decides about names before, and about
//! addresses in answers afterwards, those that are stored included. Under rules about names the
//! questions to other name servers are read, too.

mod lookup;
mod servers;
mod stream;

use std::collections::VecDeque;
use std::hash::{BuildHasher as _, RandomState};
use std::net::SocketAddr;
use std::time::Instant;

use sm_event_loop::{Registry, SlotQueue, Timer};

use self::lookup::Lookup;
use self::servers::HostServers;
use self::stream::NameClient;
use super::config::{EngineLimits, NameServers};
use super::egress::FlowProtocol;
use super::flow::{FlowKey, TokenKind, token};
use super::link::{GuestFrame, LinkFull};
use super::output::Output;
use super::turn::Turn;
use crate::dns::{
    DNS_HEADER, DnsCache, DnsQuestion, ExtendedError, ResponseCode, addresses, largest_response,
    refusal, strip_ech,
};

/// Longest question: a name, and options.
const MAX_QUESTION: usize = 1024;
/// Answers that wait for room on the link.
const MAX_REPLIES: usize = 64;
/// Buffers that are reused.
const SPARE: usize = 16;
/// Response codes of servers that cannot answer: another may.
const UNABLE: [u8; 3] = [2, 4, 5];

/// The sender of a question.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Asker {
    key: FlowKey,
    /// The slot and the generation of a client over TCP.
    client: Option<(u32, u32)>,
}

struct Reply {
    key: FlowKey,
    message: Vec<u8>,
}

/// The decision about a response.
enum Checked {
    Passed,
    Withheld,
    /// Another server may be able to answer.
    Unable,
}

/// The guest's name server.
pub(crate) struct DnsProxy {
    servers: HostServers,
    cache: DnsCache,
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
    clients: Vec<Option<NameClient>>,
    /// Of the newest client.
    generation: u32,
    limits: EngineLimits,
}

impl DnsProxy {
    pub(crate) fn new(limits: EngineLimits) -> Self {
        Self {
            servers: HostServers::default(),
            cache: DnsCache::new(limits.stored_answers, limits.stored_answers_bytes),
            lookups: Vec::new(),
            free: Vec::new(),
            order: SlotQueue::default(),
            replies: VecDeque::new(),
            spare: Vec::new(),
            buffer: Vec::new(),
            numbers: RandomState::new(),
            number: 0,
            timer: None,
            clients: Vec::new(),
            generation: 0,
            limits,
        }
    }

    pub(crate) fn set_servers(&mut self, source: NameServers) {
        self.servers.set(source);
        self.cache.clear();
    }

    /// Returns the first server, as it was at the last question.
    pub(crate) fn known_server(&self) -> Option<SocketAddr> {
        self.servers.known().first().copied()
    }

    pub(crate) fn is_on(&self) -> bool {
        self.servers.is_set()
    }

    /// Processes a question of the guest of `len` bytes from `offset` on, for the server that the
    /// guest has chosen or for those of the host.
    pub(crate) fn receive(
        &mut self,
        turn: &mut Turn<'_>,
        key: FlowKey,
        frame: &dyn GuestFrame,
        (offset, len): (usize, usize),
        chosen: Option<SocketAddr>,
    ) {
        let mut message = self.spare.pop().unwrap_or_default();
        message.clear();
        message.resize(len.min(MAX_QUESTION), 0);
        turn.stats.dns_questions += 1;
        if len > MAX_QUESTION || !frame.copy_out(offset, &mut message) {
            return self.recycle(message);
        }
        let asker = Asker { key, client: None };
        self.question(turn, asker, message, chosen);
    }

    /// Processes a question.
    fn question(
        &mut self,
        turn: &mut Turn<'_>,
        asker: Asker,
        message: Vec<u8>,
        chosen: Option<SocketAddr>,
    ) {
        let question = match DnsQuestion::parse(&message) {
            Ok(question) => question,
            Err(_) => return self.refuse(asker, message, ResponseCode::FormatError),
        };
        if !question.is_standard() {
            return self.refuse(asker, message, ResponseCode::NotImplemented);
        }
        if !turn.policy.may_resolve(&question.name) {
            turn.stats.prohibited += 1;
            let reason = turn.policy.explain_name(&question.name);
            let error = match reason.rule {
                Some(_) => ExtendedError::Filtered,
                None => ExtendedError::Blocked,
            };
            turn.journal.name_refused(&question.name, || reason);
            return self.refuse(asker, message, ResponseCode::Prohibited(error));
        }
        let repeated = self.lookups.iter().flatten().any(|lookup| {
            let same = lookup.question.get(DNS_HEADER..) == message.get(DNS_HEADER..);
            lookup.asker == asker && lookup.guest_id == question.id && same
        });
        if repeated {
            return self.recycle(message);
        }
        match chosen {
            // A server that the guest has chosen may say otherwise than those of the host.
            Some(_) => turn.opened_once(FlowProtocol::Udp, &asker.key),
            None => {
                if self.servers.follow() {
                    self.cache.clear();
                }
                if self.answer_stored(turn, asker, &question.name, &message) {
                    return self.recycle(message);
                }
            }
        }
        if self.lookups.len() - self.free.len() >= self.limits.lookups.max(1)
            && let Some(oldest) = self.order.first()
        {
            turn.limited("questions to name servers", &asker.key);
            self.finish(turn.registry, oldest, Some(ResponseCode::ServerFailure));
        }
        self.begin(turn, asker, question, message, chosen);
    }

    /// Answers a question by a response that is stored; returns false if there is none.
    fn answer_stored(
        &mut self,
        turn: &mut Turn<'_>,
        asker: Asker,
        name: &str,
        question: &[u8],
    ) -> bool {
        let mut response = self.spare.pop().unwrap_or_default();
        if !self.cache.get(question, turn.now, &mut response) {
            self.recycle(response);
            return false;
        }
        turn.stats.dns_stored += 1;
        // The policy may have changed.
        match check(turn, name, &response) {
            Checked::Passed => self.deliver(turn, asker, question, response),
            Checked::Withheld => {
                self.recycle(response);
                let code = ResponseCode::Prohibited(ExtendedError::Blocked);
                self.refuse(asker, question.to_vec(), code);
            }
            Checked::Unable => {
                self.recycle(response);
                return false;
            }
        }
        true
    }

    fn begin(
        &mut self,
        turn: &mut Turn<'_>,
        asker: Asker,
        question: DnsQuestion,
        mut message: Vec<u8>,
        chosen: Option<SocketAddr>,
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
        match self.ask(turn, slot, &message, chosen, 0) {
            Some(exchange) => {
                let lookup = Lookup {
                    asker,
                    guest_id: question.id,
                    name: question.name,
                    question: message,
                    chosen,
                    exchange,
                };
                self.put(slot, lookup);
                self.order.push_back(slot);
                self.arm(turn.registry);
            }
            None => {
                self.free.push(slot);
                set_id(&mut message, question.id);
                self.refuse(asker, message, ResponseCode::ServerFailure);
            }
        }
    }

    fn put(&mut self, slot: u32, lookup: Lookup) {
        if let Some(place) = self.lookups.get_mut(slot as usize) {
            *place = Some(lookup);
        }
    }

    /// Processes the response to a question.
    fn answered(&mut self, turn: &mut Turn<'_>, slot: u32, response: &[u8]) {
        let Some(Some(lookup)) = self.lookups.get_mut(slot as usize) else {
            return;
        };
        match check(turn, &lookup.name, response) {
            Checked::Passed => {}
            Checked::Withheld => {
                let code = ResponseCode::Prohibited(ExtendedError::Blocked);
                return self.finish(turn.registry, slot, Some(code));
            }
            Checked::Unable => return self.ask_next(turn, slot),
        }
        if lookup.chosen.is_none() {
            self.cache.insert(&lookup.question, response, turn.now);
        }
        let (asker, id) = (lookup.asker, lookup.guest_id);
        let mut question = std::mem::take(&mut lookup.question);
        set_id(&mut question, id);
        let mut message = self.spare.pop().unwrap_or_default();
        message.clear();
        message.extend_from_slice(response);
        set_id(&mut message, id);
        self.deliver(turn, asker, &question, message);
        self.recycle(question);
        self.finish(turn.registry, slot, None);
    }

    /// Delivers a response that the policy allows.
    fn deliver(&mut self, turn: &Turn<'_>, asker: Asker, question: &[u8], mut message: Vec<u8>) {
        if turn.policy.restricts_names() {
            strip_ech(&mut message);
        }
        if asker.client.is_none() && message.len() > largest_response(question) {
            self.recycle(message);
            return self.refuse(asker, question.to_vec(), ResponseCode::TooLong);
        }
        self.reply(asker, message);
    }

    /// Ends a lookup; with a code, the guest is notified.
    fn finish(&mut self, registry: &mut dyn Registry, slot: u32, code: Option<ResponseCode>) {
        let Some(mut lookup) = self.lookups.get_mut(slot as usize).and_then(Option::take) else {
            return;
        };
        self.order.remove(slot);
        self.free.push(slot);
        drop(registry.remove(lookup.exchange.socket));
        match code {
            Some(code) => {
                set_id(&mut lookup.question, lookup.guest_id);
                self.refuse(lookup.asker, lookup.question, code);
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
                let code = ResponseCode::Prohibited(ExtendedError::Filtered);
                self.finish(turn.registry, slot, Some(code));
            }
        }
    }

    fn refuse(&mut self, asker: Asker, question: Vec<u8>, code: ResponseCode) {
        let mut message = self.spare.pop().unwrap_or_default();
        refusal(&question, code, &mut message);
        self.recycle(question);
        if message.is_empty() {
            return self.recycle(message);
        }
        self.reply(asker, message);
    }

    fn reply(&mut self, asker: Asker, message: Vec<u8>) {
        if let Some(client) = asker.client {
            self.reply_client(client, &message);
            return self.recycle(message);
        }
        if self.replies.len() >= MAX_REPLIES {
            return self.recycle(message);
        }
        let key = asker.key;
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
        let Some(first) = lookups.map(|lookup| lookup.exchange.deadline).min() else {
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
            if self.is_due(index, turn.now) {
                self.ask_next(turn, u32::try_from(index).unwrap_or(u32::MAX));
            }
        }
        self.arm(turn.registry);
    }

    fn is_due(&self, index: usize, now: Instant) -> bool {
        let lookup = self.lookups.get(index).and_then(Option::as_ref);
        lookup.is_some_and(|lookup| lookup.exchange.deadline <= now)
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
        if let Some(registry) = registry {
            for lookup in self.lookups.iter_mut().filter_map(Option::take) {
                drop(registry.remove(lookup.exchange.socket));
            }
            if let Some(timer) = self.timer.take() {
                registry.cancel_timer(timer);
            }
            self.close_clients(registry);
        }
        let servers = std::mem::take(&mut self.servers);
        *self = Self::new(self.limits);
        self.servers = servers;
    }
}

/// Asks the policy about the addresses of a response.
fn check(turn: &mut Turn<'_>, name: &str, response: &[u8]) -> Checked {
    let mut refused = None;
    let code = addresses(response, |found| {
        let accepted = match found.of_name {
            true => (turn.policy).resolved(name, found.address, found.ttl),
            false => turn.policy.may_answer(found.address),
        };
        if !accepted {
            refused = Some(found.address);
        }
    });
    match code {
        Ok(code) if !UNABLE.contains(&code) => {}
        _ => return Checked::Unable,
    }
    let Some(address) = refused else {
        return Checked::Passed;
    };
    turn.stats.prohibited += 1;
    let reason = || turn.policy.explain_answer(address);
    turn.journal.name_refused(name, reason);
    Checked::Withheld
}

fn set_id(message: &mut [u8], id: u16) {
    if let Some(place) = message.first_chunk_mut() {
        *place = id.to_be_bytes();
    }
}
