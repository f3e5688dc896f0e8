//! Progress on stderr: a line that is written over on a terminal, a line now and then elsewhere.

use std::io::{IsTerminal, Write, stderr};
use std::time::{Duration, Instant};

/// From one line to the next where nobody watches.
const PAUSE: Duration = Duration::from_secs(10);
/// Characters of the bar.
const BAR: usize = 24;

pub(crate) struct Progress {
    all: usize,
    begun: usize,
    started: Instant,
    is_terminal: bool,
    /// Something stands on the line.
    is_open: bool,
    last: Option<Instant>,
}

impl Progress {
    pub(crate) fn new(all: usize) -> Self {
        Self {
            all,
            begun: 0,
            started: Instant::now(),
            is_terminal: stderr().is_terminal(),
            is_open: false,
            last: None,
        }
    }

    /// What is done already, of how much, took no time of this run.
    pub(crate) fn begin(&mut self, done: usize, all: usize) {
        (self.begun, self.all, self.started) = (done, all, Instant::now());
    }

    /// Shows the bar if it is time to; `about` says what else, after so many seconds.
    pub(crate) fn show(&mut self, done: usize, about: impl FnOnce(f64) -> String) {
        let is_due = self.last.is_none_or(|last| last.elapsed() >= PAUSE);
        if !self.is_terminal && !is_due && done < self.all {
            return;
        }
        self.last = Some(Instant::now());
        let passed = self.started.elapsed().as_secs_f64();
        let left = passed / (done - self.begun).max(1) as f64 * (self.all - done) as f64;
        let full = BAR * done / self.all.max(1);
        let text = format!(
            "[{}{}] {done}/{}  {}  {} left",
            "=".repeat(full),
            " ".repeat(BAR - full),
            self.all,
            about(passed),
            time(left),
        );
        match self.is_terminal {
            true => {
                let _ = write!(stderr(), "\r\x1b[K{text}");
                self.is_open = true;
            }
            false => self.line(&text),
        }
    }

    /// A line that stays.
    pub(crate) fn line(&mut self, text: &str) {
        self.close();
        let _ = writeln!(stderr(), "{text}");
    }

    pub(crate) fn close(&mut self) {
        if std::mem::take(&mut self.is_open) {
            let _ = writeln!(stderr());
        }
    }
}

/// Seconds as people read them: `1:02:03`.
fn time(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    match hours {
        0 => format!("{minutes}:{:02}", seconds % 60),
        _ => format!("{hours}:{minutes:02}:{:02}", seconds % 60),
    }
}
