//! Text to token ids and back.
//!
//! Around the `tokenizers` crate, which reads `tokenizer.json`, with one rule of our own that holds
//! without exception: **no text of a user becomes a control token.** Hugging Face's encoding finds
//! `</s>` in a prompt and makes it the end of the text; here only the chat template and the
//! post-processor (which adds the token that starts a text) can write control tokens. How text
//! is kept from being mistaken is in [`guard`].
//!
//! What this module does not know: chat roles, the model's weights, how far a stream has come.

mod detokenizer;
mod guard;

use std::collections::BTreeMap;
use std::path::Path;

use tokenizers::pre_tokenizer::{OffsetType, PreTokenizedString};
use tokenizers::{
    AddedToken, AddedVocabulary, Model, Normalizer, NormalizerWrapper, PreTokenizer, Token,
};

use crate::ModelError;
use crate::config::Architecture;
use crate::json::read_bounded;

pub use detokenizer::Detokenizer;
pub(crate) use guard::{Guard, Guarded, StandIns};

/// Longest `tokenizer.json`, in bytes; those with 200 000 tokens have some thirty million.
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;

/// Why a text has no token ids, or token ids have no text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenizerError {
    /// The text uses up all characters of Unicode's private planes.
    #[error("the text leaves no private-use character free")]
    NoStandIn,
    /// The `tokenizers` crate refused.
    #[error("tokenizer: {0}")]
    Failed(String),
}

impl TokenizerError {
    fn failed(error: tokenizers::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

/// The tokenizer of a model. Never changes; share it behind an `Arc`.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Control tokens by id: the added tokens that `tokenizer.json` marks as special.
    specials: BTreeMap<u32, String>,
    guard: Guard,
    vocab_len: usize,
    /// A token with the same text in every context, and that text.
    anchor: Option<(u32, String)>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a checkpoint folder, which must have no id that the embedding has
    /// no row for.
    pub fn open(dir: &Path, arch: &Architecture) -> Result<Self, ModelError> {
        let file = dir.join("tokenizer.json");
        let bytes = read_bounded(&file, TOKENIZER_BYTES_MAX)?;
        let tokenizer =
            Self::from_bytes(&bytes).map_err(|reason| ModelError::file(&file, reason))?;
        if tokenizer.vocab_len > arch.vocab {
            let (ids, rows) = (tokenizer.vocab_len, arch.vocab);
            let reason = format!("{ids} token ids, but the embedding has {rows} rows (vocab_size)");
            return Err(ModelError::file(&file, reason));
        }
        Ok(tokenizer)
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|error| format!("not a tokenizer: {error}"))?;
        // Both are left-overs of training; silently shortened prompts would be a trap.
        inner.with_truncation(None).map_err(|error| error.to_string())?;
        inner.with_padding(None);
        match_controls_as_written(&mut inner)?;
        let highest = inner.get_vocab(true).into_values().max();
        let vocab_len = highest.ok_or("has no tokens")? as usize + 1;
        let specials: BTreeMap<u32, String> = inner
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special && !token.content.is_empty())
            .map(|(id, token)| (id, token.content))
            .collect();
        let guard = Guard::new(specials.values().map(String::as_str));
        let mut tokenizer = Self { inner, specials, guard, vocab_len, anchor: None };
        tokenizer.anchor = tokenizer.find_anchor();
        Ok(tokenizer)
    }

    /// One more than the highest token id.
    pub fn vocab_len(&self) -> usize {
        self.vocab_len
    }

    /// Whether `id` is a control token.
    pub fn is_special(&self, id: u32) -> bool {
        self.specials.contains_key(&id)
    }

    /// The spellings of its control tokens.
    pub(crate) fn guard(&self) -> &Guard {
        &self.guard
    }

    /// Token ids of plain text, which becomes no control token whatever it says. With
    /// `add_special`, the post-processor of `tokenizer.json` adds what starts (and perhaps ends) a
    /// text, as Hugging Face does for a completion.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let mut stand_ins = StandIns::avoiding([text]);
        let guarded = self.guard.hide_whole(text, &mut stand_ins)?;
        self.encode_guarded(&Guarded { text: guarded, stand_ins }, add_special)
    }

    /// Token ids of a rendered chat prompt: control tokens where the template wrote them.
    pub(crate) fn encode_guarded(
        &self,
        guarded: &Guarded,
        add_special: bool,
    ) -> Result<Vec<u32>, TokenizerError> {
        let failed = TokenizerError::failed;
        let mut parts = self.split_at_controls(guarded).map_err(failed)?;
        if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut parts).map_err(failed)?;
        }
        parts.tokenize(|part| self.text_tokens(part.get())).map_err(failed)?;
        let encoding = parts.into_encoding(None, 0, OffsetType::None).map_err(failed)?;
        let encoding = self.inner.post_process(encoding, None, add_special).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The crate's first step, which finds added tokens and normalises what is between them. Where
    /// characters are hidden it must come in two: a normaliser must not see stand-ins.
    fn split_at_controls(&self, guarded: &Guarded) -> tokenizers::Result<PreTokenizedString> {
        let (vocabulary, normalizer) =
            (self.inner.get_added_vocabulary(), self.inner.get_normalizer());
        if guarded.stand_ins.is_empty() {
            return Ok(vocabulary.extract_and_normalize(normalizer, &guarded.text));
        }
        let mut parts = vocabulary.extract_and_normalize(None::<&NormalizerWrapper>, &guarded.text);
        for (stand_in, original) in guarded.stand_ins.pairs() {
            let original = original.to_string();
            parts.normalize(|part| part.replace(stand_in, &original))?;
        }
        if let Some(normalizer) = normalizer {
            parts.normalize(|part| normalizer.normalize(part))?;
        }
        Ok(parts)
    }

    /// Tokens of text between control tokens. A model whose vocabulary lists its control tokens can
    /// come upon one as it would upon any word; such a word is spelled instead.
    fn text_tokens(&self, text: &str) -> tokenizers::Result<Vec<Token>> {
        let model = self.inner.get_model();
        let tokens = model.tokenize(text)?;
        let is_forged = |token: &Token| {
            let written = self.specials.get(&token.id);
            written.is_some_and(|w| text.get(token.offsets.0..token.offsets.1) == Some(w))
        };
        if !tokens.iter().any(is_forged) {
            return Ok(tokens);
        }
        let mut buffer = [0; 4];
        let spelled = text.chars().map(|c| model.tokenize(c.encode_utf8(&mut buffer)));
        Ok(spelled.collect::<tokenizers::Result<Vec<_>>>()?.concat())
    }

    /// The text of token ids; control tokens are left out with `skip_special`. Bytes that are no
    /// UTF-8 become U+FFFD; unknown ids have no text.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        self.inner.decode(ids, skip_special).map_err(TokenizerError::failed)
    }

    /// The text that one token adds in the middle of a text, control tokens included: what
    /// log-probabilities are reported under. Part of a character is U+FFFD.
    pub fn token_text(&self, id: u32) -> Result<String, TokenizerError> {
        // Decoders drop the space that starts a text, hence the token in front.
        if let Some((anchor, text)) = &self.anchor
            && let Some(rest) = self.decode(&[*anchor, id], false)?.strip_prefix(text)
        {
            return Ok(rest.to_owned());
        }
        self.decode(&[id], false)
    }

    /// The first token that is one letter or digit.
    fn find_anchor(&self) -> Option<(u32, String)> {
        (0..self.vocab_len as u32).find_map(|id| {
            let text = self.inner.decode(&[id], true).ok()?;
            let plain = text.len() == 1 && text.chars().all(|c| c.is_ascii_alphanumeric());
            plain.then_some((id, text))
        })
    }
}

/// Makes every control token match the text as it is written. Some files ask for a match after
/// normalisation, which would find `</s>` in full-width letters.
fn match_controls_as_written(inner: &mut tokenizers::Tokenizer) -> Result<(), String> {
    let before: BTreeMap<u32, AddedToken> = inner.get_added_tokens_decoder().into_iter().collect();
    if !before.values().any(|token| token.special && token.normalized) {
        return Ok(());
    }
    let as_written = |token: &AddedToken| AddedToken {
        normalized: token.normalized && !token.special,
        ..token.clone()
    };
    let tokens: Vec<AddedToken> = before.values().map(as_written).collect();
    inner.with_added_vocabulary(AddedVocabulary::new());
    inner.add_tokens(&tokens);
    // Tokens outside the model's vocabulary are numbered on from its end, in order.
    match before.iter().find(|(id, token)| inner.token_to_id(&token.content) != Some(**id)) {
        Some((id, token)) => {
            Err(format!("added token {:?} has no place at id {id}", token.content))
        }
        None => Ok(()),
    }
}
