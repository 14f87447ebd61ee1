//! Progress of long steps: bars on a terminal, a line for each step elsewhere.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use sm_runtime::image::Progress;

use crate::printer::Printer;

/// What is shown of a step that knows its length.
const TEMPLATE: &str = "{msg} {wide_bar} {bytes}/{total_bytes}";
/// And of one that does not.
const SPINNER: &str = "{msg} {spinner} {bytes}";

/// Shows the progress of one image.
#[derive(Debug)]
pub(crate) struct Bars<'a> {
    printer: &'a Printer,
    /// Print a line for each step where bars cannot be drawn.
    lines: bool,
    bar: Option<(String, ProgressBar)>,
}

impl<'a> Bars<'a> {
    pub(crate) fn new(printer: &'a Printer, lines: bool) -> Self {
        Self {
            printer,
            lines,
            bar: None,
        }
    }

    pub(crate) fn show(&mut self, progress: &Progress<'_>) {
        let known = self
            .bar
            .as_ref()
            .is_some_and(|(what, _)| what == progress.what);
        if !known {
            self.clear();
            if self.lines && !self.printer.interactive() {
                self.printer.note(progress.what);
            }
            self.bar = Some((progress.what.to_owned(), self.start(progress)));
        }
        if let Some((_, bar)) = &self.bar {
            bar.set_position(progress.done);
        }
    }

    fn start(&self, progress: &Progress<'_>) -> ProgressBar {
        let bar = match progress.total {
            Some(total) => ProgressBar::new(total),
            None => ProgressBar::no_length(),
        };
        if !self.printer.interactive() {
            bar.set_draw_target(ProgressDrawTarget::hidden());
            return bar;
        }
        let template = if progress.total.is_some() {
            TEMPLATE
        } else {
            SPINNER
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(progress.what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(100));
        bar
    }

    /// Takes the bar off the screen.
    pub(crate) fn clear(&mut self) {
        if let Some((_, bar)) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
