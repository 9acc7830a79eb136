//! The text side of a made-up checkpoint: a byte-level tokenizer that can write anything.
//!
//! Three control tokens, the 256 bytes, and as many merges of printable characters as the
//! vocabulary has room for: all pairs first, then triples. So every id is reached by some text and
//! every text has ids, without training on a corpus.

use serde_json::{Map, Value, json};

/// Starts a text.
pub const BOS: u32 = 1;
/// Ends a text.
pub const EOS: u32 = 2;
const CONTROLS: [&str; 3] = ["<unk>", "<s>", "</s>"];

/// Fewest tokens: the control tokens and the bytes.
pub const VOCAB_MIN: usize = CONTROLS.len() + 256;
/// Most tokens: what pairs and triples of printable characters give, rounded down.
pub const VOCAB_MAX: usize = 800_000;

const CHAT_TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{% if m['role']=='user' %}\
    [INST] {{ m['content'] }} [/INST]{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}\
    {% endfor %}";

/// `generation_config.json`
pub fn generation_config() -> Value {
    json!({"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": false})
}

/// `tokenizer_config.json`
pub fn tokenizer_config(positions_max: usize) -> Value {
    let [unk, bos, eos] = CONTROLS;
    json!({
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unk,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": positions_max,
        "tokenizer_class": "PreTrainedTokenizerFast",
    })
}

/// `tokenizer.json` of `vocab` tokens.
pub fn tokenizer(vocab: usize) -> Value {
    let mut ids = Map::new();
    let controls = CONTROLS.iter().map(|control| (*control).to_owned());
    for token in controls.chain((0..=255).map(|byte| String::from(written(byte)))) {
        ids.insert(token, json!(ids.len()));
    }
    let mut merges = Vec::new();
    for (left, right) in pairs() {
        if ids.len() >= vocab {
            break;
        }
        let word = format!("{left}{right}");
        // A merge must not come upon a control token: that is for templates alone.
        if !ids.contains_key(&word) {
            ids.insert(word, json!(ids.len()));
            merges.push(json!([left, right]));
        }
    }
    let control = |(id, content): (usize, &&str)| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        })
    };
    let start = json!({"SpecialToken": {"id": CONTROLS[BOS as usize], "type_id": 0}});
    let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": CONTROLS.iter().enumerate().map(control).collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": bytes,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, sequence("A")],
            "pair": [start, sequence("A"), sequence("B")],
            "special_tokens": {
                CONTROLS[BOS as usize]: {
                    "id": CONTROLS[BOS as usize], "ids": [BOS], "tokens": [CONTROLS[BOS as usize]],
                },
            },
        },
        "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": ids, "merges": merges,
        },
    })
}

/// What merges join: every printable character with each, then each of those with each again.
fn pairs() -> impl Iterator<Item = (String, char)> {
    let printable = || (b'!'..=b'~').map(char::from);
    let words = move || printable().flat_map(move |a| printable().map(move |b| (a, b)));
    let doubles = words().map(|(a, b)| (a.to_string(), b));
    let triples = words().flat_map(move |(a, b)| printable().map(move |c| (format!("{a}{b}"), c)));
    doubles.chain(triples)
}

/// How byte-level tokenizers write a byte: printable Latin-1 as itself, the others as the
/// characters from U+0100 on, in order (`bytes_to_unicode` of GPT-2).
fn written(byte: u8) -> char {
    let is_printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if is_printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|b| !is_printable(*b)).count() as u32;
    char::from_u32(0x100 + rank).expect("U+0100 to U+0143 are characters")
}
