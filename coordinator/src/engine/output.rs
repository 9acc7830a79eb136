//! Turns tokens into the text that a client may see: whole characters only, and nothing that might
//! still turn out to be a stop string.
//!
//! Pure: tokens in, text out. Text is released once and never taken back, which is why a tail that
//! could be the beginning of a stop string is held until the next tokens decide.

use entente_model::{Detokenizer, TokenizerError};

/// When a generation ends.
#[derive(Debug, Clone, Default)]
pub struct StopConditions {
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// Texts that end the generation; they are not part of the answer. None is empty.
    pub strings: Vec<String>,
    /// Tokens that end the generation; empty to ignore the end of sequence.
    pub token_ids: Vec<u32>,
}

/// Why a generation ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finish {
    /// An end-of-sequence token was drawn.
    EndOfSequence,
    /// This stop string appeared.
    StopString(String),
    /// `max_tokens` were generated.
    Length,
}

/// Text of one generation.
pub struct TextStream {
    detokenizer: Detokenizer,
    scanner: StopScanner,
}

impl TextStream {
    /// Starts a text.
    pub fn new(detokenizer: Detokenizer, stop_strings: Vec<String>) -> Self {
        Self { detokenizer, scanner: StopScanner { stop_strings, held: String::new() } }
    }

    /// Takes a token. Returns the text that is certain now, and the stop string if one appeared.
    pub fn push(&mut self, token: u32) -> (String, Option<String>) {
        let text = or_nothing(self.detokenizer.push(token));
        self.scanner.push(&text)
    }

    /// Takes what is left once no more tokens come.
    pub fn finish(&mut self) -> (String, Option<String>) {
        let text = or_nothing(self.detokenizer.finish());
        let (text, stop) = self.scanner.push(&text);
        if stop.is_some() { (text, stop) } else { (text + &self.scanner.finish(), None) }
    }
}

/// A tokenizer that cannot write its own tokens is broken; the ids still reach the client.
fn or_nothing(text: Result<String, TokenizerError>) -> String {
    text.unwrap_or_else(|error| {
        tracing::error!(%error, "a token has no text");
        String::new()
    })
}

/// Releases text up to a stop string, holding back what may become one.
struct StopScanner {
    stop_strings: Vec<String>,
    /// Text that is not released yet.
    held: String,
}

impl StopScanner {
    fn push(&mut self, text: &str) -> (String, Option<String>) {
        self.held.push_str(text);
        let found = self
            .stop_strings
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at, stop)))
            .min_by_key(|(at, _)| *at);
        if let Some((at, stop)) = found {
            let stop = stop.clone();
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), Some(stop));
        }
        let tail = self.held.split_off(self.held.len() - self.undecided_len());
        (std::mem::replace(&mut self.held, tail), None)
    }

    fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes at the end of the held text that begin some stop string.
    fn undecided_len(&self) -> usize {
        let undecided = |stop: &String| {
            let longest = (stop.len() - 1).min(self.held.len());
            (1..=longest).rev().find(|len| {
                // Not on a boundary means that the stop string would begin inside a character.
                let start = self.held.len() - len;
                self.held
                    .get(start..)
                    .is_some_and(|tail| stop.as_bytes().starts_with(tail.as_bytes()))
            })
        };
        self.stop_strings.iter().filter_map(undecided).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds pieces of text as if each were what a token completes.
    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, Option<String>) {
        let stop_strings = stops.iter().map(ToString::to_string).collect();
        let mut scanner = StopScanner { stop_strings, held: String::new() };
        let mut out = Vec::new();
        for piece in pieces {
            let (text, stop) = scanner.push(piece);
            out.push(text);
            if stop.is_some() {
                return (out, stop);
            }
        }
        out.push(scanner.finish());
        (out, None)
    }

    #[test]
    fn text_before_a_stop_string_is_released_and_the_rest_is_not() {
        let (out, stop) = run(&["END"], &["abE", "N", "Dxyz"]);
        assert_eq!((out.concat().as_str(), stop.as_deref()), ("ab", Some("END")));
    }

    #[test]
    fn a_false_alarm_is_released_as_soon_as_it_is_decided() {
        let (out, stop) = run(&["END"], &["aEN", "x", "E"]);
        assert_eq!(out, ["a", "ENx", "", "E"]);
        assert_eq!(stop, None);
    }

    #[test]
    fn the_first_of_several_stop_strings_in_the_text_counts() {
        let (out, stop) = run(&["yz", "c"], &["abcyz"]);
        assert_eq!((out.concat().as_str(), stop.as_deref()), ("ab", Some("c")));
    }

    #[test]
    fn characters_of_several_bytes_are_never_cut() {
        let (out, stop) = run(&["éa"], &["xé", "b"]);
        assert_eq!((out.concat().as_str(), stop), ("xéb", None));
    }
}
