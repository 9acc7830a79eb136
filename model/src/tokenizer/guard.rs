//! Keeping text that looks like a control token from becoming one.
//!
//! The tokenizer finds control tokens by their spelling. So before it looks, the first character of
//! every spelling that a user wrote is replaced by a **stand-in**: a private-use character that
//! occurs nowhere in the text. What is then found is what the chat template wrote. Afterwards the
//! stand-ins become the characters that they stand for, and the text is tokenized like any other.
//!
//! Texts are put together by the template, so a spelling could also arise where one meets the next:
//! hence the beginning of a text is replaced when it could end a control token, and its end when it
//! could begin one. A template that takes pieces out of the middle of a text and joins the rest is
//! beyond this guard; none of the published ones does.

use std::collections::BTreeMap;

use super::TokenizerError;

/// The first private-use characters beyond the basic plane; the last two of each plane are not
/// characters.
const PRIVATE: [std::ops::RangeInclusive<char>; 2] =
    ['\u{F0000}'..='\u{FFFFD}', '\u{100000}'..='\u{10FFFD}'];

/// Spellings of the control tokens, by first character.
pub(crate) struct Guard {
    spellings: BTreeMap<char, Vec<String>>,
}

impl Guard {
    pub fn new<'a>(specials: impl Iterator<Item = &'a str>) -> Self {
        let mut spellings: BTreeMap<char, Vec<String>> = BTreeMap::new();
        for spelling in specials {
            if let Some(first) = spelling.chars().next() {
                spellings.entry(first).or_default().push(spelling.to_owned());
            }
        }
        Self { spellings }
    }

    /// `text` with every control token in it hidden.
    pub fn hide_whole(
        &self,
        text: &str,
        stand_ins: &mut StandIns,
    ) -> Result<String, TokenizerError> {
        self.hide(text, stand_ins, |_, _| false)
    }

    /// As [`Guard::hide_whole`], and what could become a control token together with the text
    /// before or after. White space at the ends does not count: templates trim it.
    pub fn hide_joined(
        &self,
        text: &str,
        stand_ins: &mut StandIns,
    ) -> Result<String, TokenizerError> {
        let start = text.len() - text.trim_start().len();
        let ends_one = self.all().any(|special| {
            let tails = special.char_indices().skip(1).map(|(at, _)| &special[at..]);
            tails.into_iter().any(|tail| text[start..].starts_with(tail))
        });
        self.hide(text, stand_ins, |at, rest| {
            let begins_one = |special: &String| special.starts_with(rest.trim_end());
            (at == start && ends_one) || self.starting_as(rest).any(begins_one)
        })
    }

    /// Hides the characters that begin a control token and those that `also` points out, which is
    /// given the character's place and the text from there on.
    fn hide(
        &self,
        text: &str,
        stand_ins: &mut StandIns,
        also: impl Fn(usize, &str) -> bool,
    ) -> Result<String, TokenizerError> {
        let mut hidden = String::with_capacity(text.len());
        for (at, c) in text.char_indices() {
            let rest = &text[at..];
            let is_special = self.starting_as(rest).any(|special| rest.starts_with(special));
            let hide = is_special || also(at, rest);
            hidden.push(if hide { stand_ins.of(c)? } else { c });
        }
        Ok(hidden)
    }

    /// The control tokens that start with the same character as `text`.
    fn starting_as(&self, text: &str) -> impl Iterator<Item = &String> {
        text.chars().next().and_then(|first| self.spellings.get(&first)).into_iter().flatten()
    }

    fn all(&self) -> impl Iterator<Item = &String> {
        self.spellings.values().flatten()
    }
}

/// Which character stands for which.
pub(crate) struct StandIns {
    free: Box<dyn Iterator<Item = char> + Send + Sync>,
    by_original: BTreeMap<char, char>,
}

impl StandIns {
    /// Stand-ins that occur in none of the texts.
    pub fn avoiding<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        let private = |c: &char| *c >= *PRIVATE[0].start();
        let taken: std::collections::BTreeSet<char> =
            texts.into_iter().flat_map(str::chars).filter(private).collect();
        let free = PRIVATE.into_iter().flatten().filter(move |c| !taken.contains(c));
        Self { free: Box::new(free), by_original: BTreeMap::new() }
    }

    fn of(&mut self, original: char) -> Result<char, TokenizerError> {
        if let Some(stand_in) = self.by_original.get(&original) {
            return Ok(*stand_in);
        }
        let stand_in = self.free.next().ok_or(TokenizerError::NoStandIn)?;
        self.by_original.insert(original, stand_in);
        Ok(stand_in)
    }

    /// Whether no character was hidden.
    pub fn is_empty(&self) -> bool {
        self.by_original.is_empty()
    }

    /// Each stand-in with the character that it stands for.
    pub fn pairs(&self) -> impl Iterator<Item = (char, char)> + '_ {
        self.by_original.iter().map(|(original, stand_in)| (*stand_in, *original))
    }
}

/// A text with stand-ins in it.
pub(crate) struct Guarded {
    pub text: String,
    pub stand_ins: StandIns,
}

impl Guarded {
    /// The text as people would read it.
    pub fn reveal(&self) -> String {
        let originals: BTreeMap<char, char> = self.stand_ins.pairs().collect();
        self.text.chars().map(|c| originals.get(&c).copied().unwrap_or(c)).collect()
    }
}
