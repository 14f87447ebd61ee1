//! Answers to greetings and to requests that run no command.

use sm_guest_proto::PROTOCOL_VERSION;
use sm_guest_proto::exec::{ExecControl, ExecReply, Hello};
use sm_guest_proto::frame::{BULK_PAYLOAD, ExitStatus, FrameType};

use super::{Session, SessionPhase};

impl Session {
    /// Answers with ERROR and EXIT without starting a command.
    pub(crate) fn refuse(&mut self, status: u8, message: &str) {
        if let Some(client) = &mut self.client {
            client.send(FrameType::Error, message.as_bytes());
        }
        self.send_exit(ExitStatus {
            status: u32::from(status),
            peak_rss_kib: None,
        });
    }

    pub(super) fn take_hello(&mut self, payload: &[u8]) {
        match serde_json::from_slice(payload) {
            Ok(ExecControl::Hello(hello)) if hello.protocol == PROTOCOL_VERSION => {
                self.send_reply(&ExecReply::Hello(Hello {
                    protocol: PROTOCOL_VERSION,
                }));
                self.phase = SessionPhase::Request;
            }
            Ok(ExecControl::Hello(hello)) => {
                let text = format!(
                    "this guest agent speaks exec protocol {PROTOCOL_VERSION}, the host {}; \
                     make a new base snapshot with the host's own agent",
                    hello.protocol
                );
                self.refuse(125, &text);
            }
            _ => self.refuse(125, "exec: the first frame must be CONTROL hello"),
        }
    }

    /// Answers that a request was carried out.
    pub(crate) fn confirm(&mut self) {
        self.send_exit(ExitStatus {
            status: 0,
            peak_rss_kib: None,
        });
    }

    /// Answers a request with this output.
    pub(crate) fn answer(&mut self, output: &[u8]) {
        if let Some(client) = &mut self.client {
            for chunk in output.chunks(BULK_PAYLOAD) {
                client.send(FrameType::Stdout, chunk);
            }
        }
        self.confirm();
    }
}
