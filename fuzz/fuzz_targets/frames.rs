//! Arbitrary bytes as frames of the exec and control protocols, in any pieces: frames or
//! an error, and never more buffered than the maximum of a frame.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sm_guest_proto::control::{ControlReply, ControlRequest};
use sm_guest_proto::exec::{ExecControl, ExecReply, ExecRequest};
use sm_guest_proto::forward::{ForwardHeader, HEADER_LEN};
use sm_guest_proto::frame::{ExitStatus, FrameDecoder, parse_resize};

fuzz_target!(|data: &[u8]| {
    if let Some(header) = data.first_chunk::<HEADER_LEN>() {
        let _ = ForwardHeader::decode(*header);
    }
    let [size, bytes @ ..] = data else {
        return;
    };
    let mut decoder = FrameDecoder::new();
    for piece in bytes.chunks(usize::from(*size).max(1)) {
        decoder.push(piece);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => {
                    let _ = ExitStatus::parse(frame.payload);
                    let _ = parse_resize(frame.payload);
                    let _ = serde_json::from_slice::<ExecRequest>(frame.payload);
                    let _ = serde_json::from_slice::<ExecControl>(frame.payload);
                    let _ = serde_json::from_slice::<ExecReply>(frame.payload);
                    let _ = serde_json::from_slice::<ControlRequest>(frame.payload);
                    let _ = serde_json::from_slice::<ControlReply>(frame.payload);
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
});
