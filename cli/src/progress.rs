//! Progress of images: a bar for each layer on a terminal, otherwise a line for each
//! step.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use sm_runtime::image::{LayerStep, Progress};

use crate::printer::Printer;
use crate::shown::Shown;

/// Template of a layer with a known length.
const TEMPLATE: &str = "{prefix}: {msg:14} {wide_bar} {bytes:>10}/{total_bytes}";
/// Template of a layer with an unknown length.
const SPINNER: &str = "{prefix}: {msg:14} {spinner} {bytes}";
/// Template of a complete layer.
const DONE: &str = "{prefix}: {msg}";
/// Digits of a layer's digest to show, as for Docker.
const DIGITS: usize = 12;

/// Shows the progress of one image. Steps may come from any thread.
#[derive(Debug)]
pub(crate) struct Bars<'a> {
    printer: &'a Printer,
    /// True to print a line for each step where bars cannot be drawn.
    lines: bool,
    /// The operation on layers.
    moving: &'static str,
    screen: MultiProgress,
    layers: Mutex<BTreeMap<usize, Layer>>,
}

#[derive(Debug)]
struct Layer {
    bar: ProgressBar,
    moving: bool,
    ended: bool,
}

impl<'a> Bars<'a> {
    pub(crate) fn new(printer: &'a Printer, lines: bool, moving: &'static str) -> Self {
        Self {
            printer,
            lines: lines && !printer.interactive(),
            moving,
            screen: MultiProgress::new(),
            layers: Mutex::default(),
        }
    }

    pub(crate) fn show(&self, progress: Progress<'_>) {
        match progress {
            Progress::Message(text) => self.print_message(text),
            Progress::Layer {
                number,
                digest,
                step,
                ..
            } => {
                let digits = digest.hex();
                let name = digits.get(..DIGITS).unwrap_or(&digits);
                self.layer(number, name, step);
            }
            _ => {}
        }
    }

    fn print_message(&self, text: &str) {
        if self.printer.interactive() {
            // The line appears above the bars.
            let _ = self.screen.println(Shown(text).to_string());
        } else if self.lines {
            self.printer.note(text);
        }
    }

    fn layer(&self, number: usize, name: &str, step: LayerStep) {
        // No code panics while it holds this lock.
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        let layer = layers.entry(number).or_insert_with(|| Layer {
            bar: self.bar(name),
            moving: false,
            ended: false,
        });
        if layer.ended {
            return;
        }
        match step {
            LayerStep::Moving { done, total } => {
                if !layer.moving {
                    layer.moving = true;
                    style(&layer.bar, total.map_or(SPINNER, |_| TEMPLATE));
                    layer.bar.set_message(self.moving);
                    if let Some(total) = total {
                        layer.bar.set_length(total);
                    }
                    self.line(name, self.moving);
                }
                layer.bar.set_position(done);
            }
            LayerStep::Done => self.end(layer, name, "Done"),
            LayerStep::Present => self.end(layer, name, "Already exists"),
            _ => {}
        }
    }

    fn end(&self, layer: &mut Layer, name: &str, text: &'static str) {
        layer.ended = true;
        style(&layer.bar, DONE);
        layer.bar.finish_with_message(text);
        self.line(name, text);
    }

    fn line(&self, name: &str, text: &str) {
        if self.lines {
            self.printer.note(format_args!("{name}: {text}"));
        }
    }

    fn bar(&self, name: &str) -> ProgressBar {
        if !self.printer.interactive() {
            return ProgressBar::hidden();
        }
        let bar = self.screen.add(ProgressBar::no_length());
        bar.set_prefix(name.to_owned());
        bar
    }

    /// Removes the bars from the screen.
    pub(crate) fn clear(&self) {
        let _ = self.screen.clear();
    }
}

fn style(bar: &ProgressBar, template: &str) {
    // The templates are valid constants.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
}
