/// An answer's text on its way out: without white space around all of it, and not beyond a stop string.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    stops: Vec<String>,
    /// What may be white space at the end, or the beginning of a stop string.
    held: String,
    /// What has gone out.
    text: String,
    /// The stop string that has come.
    stopped_by: Option<String>,
}

impl Outgoing {
    /// Empty stop strings stop nothing.
    pub(super) fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|stop| !stop.is_empty());
        Self {
            stops: stops.cloned().collect(),
            ..Self::default()
        }
    }

    /// Whether a stop string has come.
    pub(super) fn stopped(&self) -> bool {
        self.stopped_by.is_some()
    }

    /// All that has gone out, and the stop string that ended it.
    pub(super) fn into_text(self) -> (String, Option<String>) {
        (self.text, self.stopped_by)
    }

    /// What goes out when this comes.
    pub(super) fn push(&mut self, piece: &str) -> String {
        if self.stopped() {
            return String::new();
        }
        self.held.push_str(piece);
        let found = |stop| Some((self.held.find(stop)?, stop));
        let found = self.stops.iter().filter_map(found);
        if let Some((at, stop)) = found.min_by_key(|&(at, _)| at) {
            self.stopped_by = Some(stop.clone());
            self.held.truncate(at);
            return self.release(at);
        }
        let begun = self.stops.iter().map(|stop| begun(&self.held, stop));
        let held = begun.max().unwrap_or(0);
        self.release(self.held.len() - held)
    }

    /// What goes out when nothing follows.
    pub(super) fn finish(&mut self) -> String {
        self.release(self.held.len())
    }

    /// Lets go of the first bytes held, but for white space around all text.
    fn release(&mut self, bytes: usize) -> String {
        let ready = &self.held[..bytes];
        let start = match self.text.is_empty() {
            true => bytes - ready.trim_start().len(),
            false => 0,
        };
        let end = ready.trim_end().len().max(start);
        let text = ready[start..end].to_string();
        self.held.drain(..end);
        self.text.push_str(&text);
        text
    }
}

/// How many bytes at the end of a text may begin a stop string.
fn begun(text: &str, stop: &str) -> usize {
    let starts = stop.char_indices().skip(1).map(|(at, _)| at);
    let begins = |&bytes: &usize| text.ends_with(&stop[..bytes]);
    starts.filter(begins).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let stops: Vec<String> = stops.iter().map(|stop| stop.to_string()).collect();
        let mut outgoing = Outgoing::new(&stops);
        let mut sent: Vec<String> = pieces.iter().map(|piece| outgoing.push(piece)).collect();
        sent.push(outgoing.finish());
        assert_eq!(sent.concat(), outgoing.text);
        (sent, outgoing.stopped())
    }

    #[test]
    fn white_space_goes_out_only_between_words() {
        let (sent, _) = sent(&[], &["  ", " a", "\n", " b ", "c  "]);
        assert_eq!(sent, ["", "a", "", "\n b", " c", ""]);
    }

    #[test]
    fn a_stop_string_and_what_follows_it_never_go_out() {
        for (pieces, expected, stopped) in [
            (&["one END two"][..], "one", true),
            (&["one E", "N", "D", " two"], "one", true),
            (&["one E", "N", "T", "RY"], "one ENTRY", false),
            (&["one EN", "EN", "D"], "one EN", true),
            (&["one EN"], "one EN", false),
            (&["END"], "", true),
            (&["é", "ü", "É"], "éüÉ", false),
        ] {
            let (sent, found) = sent(&["END", "", "üÜ"], pieces);
            assert_eq!((sent.concat().as_str(), found), (expected, stopped));
        }
        // The first of two, wherever they stand in the list.
        let (sent, _) = sent(&["later", "now"], &["go now or later"]);
        assert_eq!(sent.concat(), "go");
        let (sent, _) = self::sent(&["\n\n"], &["a\n", "\nb"]);
        assert_eq!(sent.concat(), "a");
    }
}
