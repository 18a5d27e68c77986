//! Showing how far a backup is: a bar on a terminal, lines elsewhere.

use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::output::{Output, complain, size};

/// Shortest time between two lines.
const LINE: Duration = Duration::from_secs(5);
/// How often a bar is drawn at most, per second.
const RATE: u8 = 5;
const BAR: &str = "{msg} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}";
/// Where nobody knows how much there will be.
const COUNT: &str = "{msg} {bytes} {binary_bytes_per_sec}";

/// A display that any thread may tell of progress.
pub(super) enum Display {
    /// A bar that is drawn again and again.
    Bar(ProgressBar),
    /// A line now and then, on standard error.
    Lines(Mutex<Option<Instant>>),
    /// Nobody looks.
    None,
}

impl Display {
    /// What suits the output.
    pub(super) fn new(out: Output) -> Self {
        if out.quiet {
            return Self::None;
        }
        if out.json || !std::io::stdout().is_terminal() || !std::io::stderr().is_terminal() {
            return Self::Lines(Mutex::new(None));
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(RATE));
        if let Ok(style) = ProgressStyle::with_template(COUNT) {
            bar.set_style(style);
        }
        Self::Bar(bar)
    }

    /// So many bytes are done, of nobody knows how many.
    pub(super) fn count(&self, what: &str, done: u64) {
        match self {
            Self::Bar(bar) => {
                bar.set_position(done);
                if bar.message() != what {
                    bar.set_message(what.to_owned());
                }
            }
            Self::Lines(last) => line(last, || format!("{what}: {}", size(done))),
            Self::None => {}
        }
    }

    /// So many bytes of so many are done; `what` says of what.
    pub(super) fn at(&self, what: &str, done: u64, total: u64) {
        match self {
            Self::Bar(bar) => {
                if bar.length() != Some(total) {
                    bar.set_length(total);
                    if let Ok(style) = ProgressStyle::with_template(BAR) {
                        bar.set_style(style.progress_chars("=> "));
                    }
                }
                // After a cut some of it is done again.
                bar.set_position(done.min(total));
                if bar.message() != what {
                    bar.set_message(what.to_owned());
                }
            }
            Self::Lines(last) => {
                line(last, || format!("{what}: {} of {}", size(done.min(total)), size(total)));
            }
            Self::None => {}
        }
    }

    /// Says something above the bar.
    pub(super) fn say(&self, text: &str) {
        match self {
            Self::Bar(bar) => bar.suspend(|| complain(text)),
            Self::Lines(_) => complain(text),
            Self::None => {}
        }
    }

    /// Takes the bar away.
    pub(super) fn end(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

/// Says something unless something was said just now.
fn line(last: &Mutex<Option<Instant>>, text: impl FnOnce() -> String) {
    let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
    if last.is_none_or(|last| last.elapsed() >= LINE) {
        *last = Some(Instant::now());
        complain(&text());
    }
}
