//! Short frames for the guest that belong to no flow.

use std::collections::VecDeque;

use super::link::LinkFull;
use super::output::Output;
use crate::wire::Head;

/// Maximum number of frames: one for each frame that the guest can send in a turn. Others are
/// dropped, as they could be lost on any network.
const LIMIT: usize = 64;

/// Frames that wait for room on the link.
#[derive(Default)]
pub(crate) struct Answers {
    frames: VecDeque<Head>,
}

impl Answers {
    /// Adds a frame, unless there are too many.
    pub(crate) fn push(&mut self, frame: Head) {
        if self.frames.len() < LIMIT {
            self.frames.push_back(frame);
        }
    }

    /// Sends all frames.
    pub(crate) fn serve(&mut self, output: &mut Output<'_>) -> Result<(), LinkFull> {
        while let Some(head) = self.frames.front() {
            output.frame(head, &[])?;
            self.frames.pop_front();
        }
        Ok(())
    }

    pub(crate) fn clear(&mut self) {
        self.frames.clear();
    }
}
