//! Progress of images: a bar for each layer on a terminal, a line for each step
//! elsewhere.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use sm_runtime::image::{LayerStep, Progress};

use crate::printer::Printer;
use crate::shown::Shown;

/// What is shown of a layer whose length is known.
const TEMPLATE: &str = "{prefix}: {msg:14} {wide_bar} {bytes:>10}/{total_bytes}";
/// And of one whose length is not.
const SPINNER: &str = "{prefix}: {msg:14} {spinner} {bytes}";
/// And of one that is complete.
const DONE: &str = "{prefix}: {msg}";
/// Digits of a layer's digest that are shown, as by Docker.
const DIGITS: usize = 12;

/// Shows the progress of one image. Told from any thread.
#[derive(Debug)]
pub(crate) struct Bars<'a> {
    printer: &'a Printer,
    /// Print a line for each step where bars cannot be drawn.
    lines: bool,
    /// What is done to layers.
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
            Progress::Notice(text) => self.notice(text),
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
        }
    }

    fn notice(&self, text: &str) {
        if self.printer.interactive() {
            // Above the bars.
            let _ = self.screen.println(Shown(text).to_string());
        } else if self.lines {
            self.printer.note(text);
        }
    }

    fn layer(&self, number: usize, name: &str, step: LayerStep) {
        // Nothing panics while it holds this.
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

    /// Takes the bars off the screen.
    pub(crate) fn clear(&self) {
        let _ = self.screen.clear();
    }
}

fn style(bar: &ProgressBar, template: &str) {
    // The templates are constants, and sound.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
}
