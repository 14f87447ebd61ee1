//! Answers to requests that run no command.

use sm_guest_proto::frame::{BULK_PAYLOAD, ExitStatus, FrameType};

use super::Session;

impl Session {
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
