//! Token ids to text, one at a time, for streaming.
//!
//! A token alone has no text: it may be half of a character, and decoders treat the first token of
//! a text differently from the others. So a token is decoded together with those before it, back to
//! the last place but one where the text ended in a whole character, and only what is new is given
//! out. While the text ends in U+FFFD it is held back, since that may be the beginning of a
//! character whose rest is still to come.
//!
//! Invariant, for byte-level decoders: what [`Detokenizer::push`] gave out, with what
//! [`Detokenizer::finish`] adds, is the decoding of all tokens at once. Decoders with byte fallback
//! promise a little less: they take back a character when an invalid byte follows.

use std::sync::Arc;

use super::{Tokenizer, TokenizerError};

/// Tokens that are decoded together at most, however long no whole character comes.
const WINDOW_MAX: usize = 24;
/// Tokens that stay when the window is cut; more than two characters have bytes.
const KEPT: usize = 8;
/// Replacement characters at the end that are not given out even then: one character has at most
/// four bytes, and an unfinished one is written as one U+FFFD or as one for each byte.
const UNFINISHED_MAX: usize = 3;

/// Text of a growing sequence of tokens.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    /// The last tokens.
    window: Vec<u32>,
    /// Tokens of the window up to the last place where the text ended in a whole character.
    whole: usize,
    /// Bytes of the window's text that were given out.
    given: usize,
}

impl Detokenizer {
    /// `context` is what precedes the first token, usually the prompt, so that a word that begins
    /// with a space keeps it; it may be empty. Its own text is not given out.
    pub fn new(
        tokenizer: Arc<Tokenizer>,
        context: &[u32],
        skip_special: bool,
    ) -> Result<Self, TokenizerError> {
        let window = context[context.len().saturating_sub(KEPT)..].to_vec();
        let mut detokenizer = Self { tokenizer, skip_special, window, whole: 0, given: 0 };
        detokenizer.forget(0)?;
        Ok(detokenizer)
    }

    /// The text that `id` completes; often empty.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        self.window.push(id);
        let text = self.text()?;
        if !text.ends_with('\u{FFFD}') {
            let new = self.give(&text, text.len());
            self.forget(self.whole)?;
            return Ok(new);
        }
        if self.window.len() < WINDOW_MAX {
            return Ok(String::new());
        }
        let new = self.give(&text, finished_len(&text));
        self.forget(WINDOW_MAX - KEPT)?;
        Ok(new)
    }

    /// What is left when no token follows: characters that were never completed.
    pub fn finish(&mut self) -> Result<String, TokenizerError> {
        let text = self.text()?;
        Ok(self.give(&text, text.len()))
    }

    /// Drops the first `count` tokens, whose text has been given out as what follows them has.
    fn forget(&mut self, count: usize) -> Result<(), TokenizerError> {
        self.window.drain(..count);
        self.whole = self.window.len();
        self.given = finished_len(&self.text()?);
        Ok(())
    }

    fn text(&self) -> Result<String, TokenizerError> {
        self.tokenizer.decode(&self.window, self.skip_special)
    }

    fn give(&mut self, text: &str, end: usize) -> String {
        // Where a decoder took a character back, `given` may be past the end or within another one.
        let start = text.ceil_char_boundary(self.given);
        self.given = self.given.max(end);
        text.get(start..end).unwrap_or_default().to_owned()
    }
}

/// Bytes of `text` without the last character, if that may be unfinished.
fn finished_len(text: &str) -> usize {
    let replaced = text.chars().rev().take_while(|c| *c == '\u{FFFD}');
    text.len() - replaced.take(UNFINISHED_MAX).count() * '\u{FFFD}'.len_utf8()
}
