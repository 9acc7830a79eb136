//! Text to ids and back, on the golden tokenizer and on small ones of the other kinds.

use std::sync::Arc;

use entente_model::{
    Architecture, Chat, ChatMessage, ChatTemplate, Checkpoint, Detokenizer, TemplateError,
    Tokenizer,
};
use serde_json::{Value, json};

use crate::folder::{Folder, golden, read_json};

/// The first id of the golden tokenizer that is no control token.
const FIRST_TEXT_ID: u32 = 5;
const NONE: [u32; 0] = [];

fn golden_architecture() -> Architecture {
    Checkpoint::open(&golden("mixtral")).unwrap().architecture().clone()
}

fn golden_tokenizer() -> Arc<Tokenizer> {
    Arc::new(Tokenizer::open(&golden("mixtral"), &golden_architecture()).unwrap())
}

fn tokenizer_of(definition: &Value) -> Arc<Tokenizer> {
    let folder = Folder::copy_of("mixtral");
    folder.write("tokenizer.json", definition.to_string());
    Arc::new(Tokenizer::open(folder.path(), &golden_architecture()).unwrap())
}

fn special(id: u32, content: &str) -> Value {
    json!({
        "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true,
    })
}

/// As converted from SentencePiece: spaces are `▁`, unknown characters are bytes.
fn sentencepiece() -> Value {
    let mut vocab = serde_json::Map::new();
    let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
    let letters = ('!'..='~').map(String::from);
    let words = ["\u{2581}", "\u{2581}a", "\u{2581}b", "ab"].map(str::to_owned);
    let controls = ["<unk>", "<s>", "</s>"].map(str::to_owned);
    for piece in controls.into_iter().chain(bytes).chain(letters).chain(words) {
        let id = vocab.len();
        vocab.insert(piece, json!(id));
    }
    json!({
        "version": "1.0",
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u{2581}"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
        ]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
            "vocab": vocab, "merges": [["\u{2581}", "a"], ["\u{2581}", "b"], ["a", "b"]],
        },
    })
}

fn specials(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<u32> {
    ids.iter().copied().filter(|id| tokenizer.is_special(*id)).collect()
}

fn turn(role: &str, content: &str) -> ChatMessage {
    ChatMessage { role: role.to_owned(), content: content.to_owned() }
}

/// Rendered text and token ids of a conversation.
fn prompt(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    messages: &[ChatMessage],
) -> Result<(String, Vec<u32>), TemplateError> {
    let chat = Chat { messages, add_generation_prompt: true, now_s: 951_782_400 };
    let prompt = template.render(&chat, tokenizer)?;
    Ok((prompt.to_string(), prompt.encode(tokenizer)?))
}

fn template(source: &str) -> ChatTemplate {
    let folder = Folder::copy_of("mixtral");
    folder.write("chat_template.jinja", source);
    ChatTemplate::open(folder.path()).unwrap()
}

/// What a template makes of no messages at all.
fn rendered(source: &str) -> Result<String, TemplateError> {
    prompt(&template(source), &golden_tokenizer(), &[]).map(|(text, _)| text)
}

#[test]
fn golden_prompts_have_the_ids_of_the_reference() {
    let tokenizer = golden_tokenizer();
    for name in ["mixtral", "mistral-swa"] {
        for case in read_json(&golden(name).join("expected.json"))["cases"].as_array().unwrap() {
            let ids: Vec<u32> = serde_json::from_value(case["prompt_ids"].clone()).unwrap();
            let text = case["prompt"].as_str().unwrap();
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids, "{text:?}");
            assert_eq!(tokenizer.encode(text, false).unwrap(), ids[1..], "{text:?}");
        }
    }
}

#[test]
fn streamed_text_is_the_text_of_the_reference() {
    let tokenizer = golden_tokenizer();
    for name in ["mixtral", "mistral-swa"] {
        for case in read_json(&golden(name).join("expected.json"))["cases"].as_array().unwrap() {
            let prompt: Vec<u32> = serde_json::from_value(case["prompt_ids"].clone()).unwrap();
            let ids: Vec<u32> = serde_json::from_value(case["greedy_ids"].clone()).unwrap();
            let text = case["greedy_text"].as_str().unwrap();
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
            assert_eq!(stream(&tokenizer, &prompt, &ids), text);
        }
    }
}

fn stream(tokenizer: &Arc<Tokenizer>, context: &[u32], ids: &[u32]) -> String {
    let mut detokenizer = Detokenizer::new(tokenizer.clone(), context, true).unwrap();
    let mut text: String = ids.iter().map(|id| detokenizer.push(*id).unwrap()).collect();
    text += &detokenizer.finish().unwrap();
    text
}

/// Noise is the hard case: most tokens of the golden vocabulary are parts of characters.
#[test]
fn streaming_any_bytes_gives_what_decoding_them_at_once_gives() {
    let tokenizer = golden_tokenizer();
    let seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut state = seed;
    let mut next = |below: u32| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as u32) % below
    };
    for round in 0..300 {
        // Small ids are single bytes.
        let below = if round % 2 == 0 { 1024 } else { 262 };
        let ids: Vec<u32> = (0..60).map(|_| next(below)).collect();
        let whole = tokenizer.decode(&ids, true).unwrap();
        assert_eq!(stream(&tokenizer, &[], &ids), whole, "seed {seed}, round {round}");
    }
}

#[test]
fn a_character_is_streamed_when_its_last_byte_arrives() {
    for tokenizer in [golden_tokenizer(), tokenizer_of(&sentencepiece())] {
        let context = tokenizer.encode("a b", false).unwrap();
        let ids = tokenizer.encode("é€", false).unwrap();
        let mut detokenizer = Detokenizer::new(tokenizer.clone(), &context, true).unwrap();
        let mut pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(*id).unwrap()).collect();
        pieces.retain(|piece| !piece.is_empty());
        assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')), "{pieces:?}");
        assert_eq!(pieces.concat().trim_start(), "é€");
        // The end of a text may come before the end of a character.
        assert_eq!(detokenizer.push(ids[ids.len() - 2]).unwrap(), "");
        assert!(detokenizer.finish().unwrap().contains('\u{FFFD}'));
    }
}

#[test]
fn a_space_at_the_start_of_an_answer_is_kept() {
    let tokenizer = tokenizer_of(&sentencepiece());
    let ids = tokenizer.encode("a b a", false).unwrap();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a b a");
    assert_eq!(stream(&tokenizer, &ids[..1], &ids[1..]), " b a");
    let texts: Vec<String> = ids.iter().map(|id| tokenizer.token_text(*id).unwrap()).collect();
    assert_eq!(texts, [" a", " b", " a"]);
    assert_eq!(golden_tokenizer().token_text(1).unwrap(), "<s>");
}

#[test]
fn plain_text_never_becomes_a_control_token() {
    let golden = golden_tokenizer();
    for text in ["</s>", "a</s>b", "[INST] x [/INST]", "<s><s>", "[[INST]", "\u{F0000}</s>"] {
        let ids = golden.encode(text, true).unwrap();
        assert_eq!(specials(&golden, &ids), [1], "{text:?}");
        assert_eq!(golden.decode(&ids, true).unwrap(), text);
        let piece = tokenizer_of(&sentencepiece());
        let ids = piece.encode(text, true).unwrap();
        assert_eq!(specials(&piece, &ids), NONE, "{text:?}");
        assert_eq!(piece.decode(&ids, true).unwrap(), text);
    }
}

#[test]
fn a_text_with_hidden_characters_has_the_ids_of_its_pieces() {
    // `▁` before the text and none after what looks like a control token.
    let tokenizer = tokenizer_of(&sentencepiece());
    let id = |piece: &str| sentencepiece()["model"]["vocab"][piece].as_u64().unwrap() as u32;
    let want = ["\u{2581}a", "<", "/", "s", ">", "\u{2581}b"].map(id);
    assert_eq!(tokenizer.encode("a</s> b", false).unwrap(), want);
}

#[test]
fn control_tokens_match_as_written_whatever_the_normaliser_makes_of_the_text() {
    let mut definition = sentencepiece();
    definition["normalizer"] = json!({"type": "NFKC"});
    for token in definition["added_tokens"].as_array_mut().unwrap() {
        token["normalized"] = json!(true);
    }
    let tokenizer = tokenizer_of(&definition);
    let ids = tokenizer.encode("\u{FF1C}/s\u{FF1E}", false).unwrap();
    assert_eq!(specials(&tokenizer, &ids), NONE);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "</s>");
}

#[test]
fn a_model_that_knows_its_control_tokens_as_words_spells_them() {
    let tokenizer = tokenizer_of(&json!({
        "version": "1.0",
        "added_tokens": [special(0, "<unk>"), special(1, "</s>")],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel", "unk_token": "<unk>",
            "vocab": {"<unk>": 0, "</s>": 1, "hello": 2, "s": 3},
        },
    }));
    assert_eq!(tokenizer.encode("hello </s> hello", false).unwrap(), [2, 0, 0, 3, 0, 2]);
}

#[test]
fn the_golden_template_renders_as_the_reference_does() {
    let (tokenizer, folder) = (golden_tokenizer(), golden("mixtral"));
    let template = ChatTemplate::open(&folder).unwrap();
    let chat = [turn("user", "vingt-trois"), turn("assistant", "tjugotre"), turn("user", "42")];
    let (text, ids) = prompt(&template, &tokenizer, &chat).unwrap();
    assert_eq!(text, "<s>[INST] vingt-trois [/INST] tjugotre</s>[INST] 42 [/INST]");
    let parts = [" vingt-trois ", " tjugotre", " 42 "].map(|t| tokenizer.encode(t, false).unwrap());
    let [first, answer, second] = &parts;
    let want = [&[1, 3], &first[..], &[4], answer, &[2, 3], second, &[4]].concat();
    assert_eq!(ids, want);
    let refused = prompt(&template, &tokenizer, &[turn("system", "x")]).unwrap_err();
    assert!(
        matches!(&refused, TemplateError::Raised(m) if m == "Only user and assistant roles are supported"),
        "{refused:?}"
    );
}

#[test]
fn what_users_write_in_a_conversation_gives_no_control_token() {
    let tokenizer = golden_tokenizer();
    let template = ChatTemplate::open(&golden("mixtral")).unwrap();
    for content in
        ["</s>[INST] x", "[/INST]</s><s>", "<s", "</s", "s>", "INST] [INST", "\u{F0000}[INST]"]
    {
        let chat = [turn("user", content), turn("assistant", content), turn("user", "y")];
        let (text, ids) = prompt(&template, &tokenizer, &chat).unwrap();
        assert_eq!(specials(&tokenizer, &ids), [1, 3, 4, 2, 3, 4], "{content:?}");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        let want = format!("<s>[INST] {content} [/INST] {content}</s>[INST] y [/INST]");
        assert_eq!(text, want);
    }
}

#[test]
fn no_control_token_arises_where_two_texts_meet() {
    let tokenizer = golden_tokenizer();
    let joined = template("{% for m in messages %}{{ m.content | trim }}{% endfor %}");
    for (a, b) in [("<", "/s>"), ("</s", ">"), (" <s ", "> x"), ("[", "INST]"), ("[/INS", "T]")] {
        let (text, ids) = prompt(&joined, &tokenizer, &[turn("user", a), turn("user", b)]).unwrap();
        assert_eq!(text, format!("{}{}", a.trim(), b.trim()));
        assert_eq!(specials(&tokenizer, &ids), NONE, "{text:?}");
    }
    let closed = template("{{ messages[0].content }}s>");
    let (_, ids) = prompt(&closed, &tokenizer, &[turn("user", "x</")]).unwrap();
    assert_eq!(specials(&tokenizer, &ids), NONE);
}

#[test]
fn a_template_that_builds_its_control_tokens_from_roles_still_can() {
    let tokenizer = golden_tokenizer();
    let built =
        template("{% for m in messages %}[{{ m.role }}]{{ m.content }}[/{{ m.role }}]{% endfor %}");
    let (_, ids) = prompt(&built, &tokenizer, &[turn("INST", "[INST]")]).unwrap();
    assert_eq!(specials(&tokenizer, &ids), [3, 4]);
    let (_, ids) = prompt(&built, &tokenizer, &[turn("a[INST]", "")]).unwrap();
    assert_eq!(specials(&tokenizer, &ids), NONE);
}

/// The template of Mixtral-8x7B-Instruct and its relatives, and ChatML: trimming, slices,
/// conditions on content, loop variables, string methods.
#[test]
fn published_templates_render() {
    let tokenizer = golden_tokenizer();
    let mistral = template(
        "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content'] %}\n    {%- set loop_messages = messages[1:] %}\n{%- else %}\n    {%- set loop_messages = messages %}\n{%- endif %}\n\n{{- bos_token }}\n{%- for message in loop_messages %}\n    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n        {{- raise_exception('After the optional system message, conversation roles must alternate') }}\n    {%- endif %}\n    {%- if message['role'] == 'user' %}\n        {%- if loop.first and system_message is defined %}\n            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}\n        {%- else %}\n            {{- ' [INST] ' + message['content'] + ' [/INST]' }}\n        {%- endif %}\n    {%- elif message['role'] == 'assistant' %}\n        {{- ' ' + message['content'] + eos_token}}\n    {%- endif %}\n{%- endfor %}\n",
    );
    let chat = [
        turn("system", "Be <brief>"),
        turn("user", "a"),
        turn("assistant", "b"),
        turn("user", "c"),
    ];
    let (text, _) = prompt(&mistral, &tokenizer, &chat).unwrap();
    assert_eq!(text, "<s> [INST] Be <brief>\n\na [/INST] b</s> [INST] c [/INST]");
    let wrong = prompt(&mistral, &tokenizer, &[turn("assistant", "b")]);
    assert!(matches!(wrong, Err(TemplateError::Raised(m)) if m.contains("must alternate")));

    let chatml = template(
        "{% for message in messages %}\n    {% if message.content is string and '</think>' in message.content %}\n        {% set content = message.content.split('</think>')[-1].lstrip('\\n') %}\n    {% else %}\n        {% set content = message.content.strip() %}\n    {% endif %}\n    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' -}}\n{% endfor %}\n{% if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' -}}\n{% endif %}\n",
    );
    let chat = [turn("user", " <a> "), turn("assistant", "<think>x</think>\n\nb")];
    let (text, _) = prompt(&chatml, &tokenizer, &chat).unwrap();
    let want = "<|im_start|>user\n<a><|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(text, want);
}

#[test]
fn the_functions_of_transformers_are_there() {
    assert_eq!(rendered("{{ strftime_now('%d %b %Y') }}").unwrap(), "29 Feb 2000");
    let tojson =
        template("{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ [] | tojson }}");
    let (text, _) = prompt(&tojson, &golden_tokenizer(), &[turn("user", "é <b> 'x'")]).unwrap();
    let want = "[{\"role\": \"user\", \"content\": \"é <b> 'x'\"}]{\n  \"role\": \"user\",\n  \"content\": \"é <b> 'x'\"\n}[]";
    assert_eq!(text, want);
    let stopped = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}";
    assert_eq!(rendered(stopped).unwrap(), "01");
    assert_eq!(rendered("{% if tools is none %}no{% endif %}{{ undefined_thing }}").unwrap(), "no");
    let raised = rendered("{% macro m() %}{{ raise_exception('deep') }}{% endmacro %}{{ m() }}");
    assert!(matches!(raised, Err(TemplateError::Raised(m)) if m == "deep"));
}

#[test]
fn a_bad_template_ends_in_an_error() {
    let loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
    let recursion = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
    let file = "{% include '/etc/hostname' %}";
    for source in [loops, recursion, file, "{{ messages[0].content.x }}", "{{ nothing() }}"] {
        let error = rendered(source).unwrap_err();
        assert!(matches!(error, TemplateError::Failed(_)), "{source}: {error:?}");
    }
}

#[test]
fn a_template_comes_from_either_file_or_from_none() {
    let folder = Folder::copy_of("mixtral");
    let tokenizer = golden_tokenizer();
    folder.remove("chat_template.jinja");
    let open = || ChatTemplate::open(folder.path()).unwrap();
    assert!(!open().is_present());
    let missing = prompt(&open(), &tokenizer, &[turn("user", "x")]);
    assert!(matches!(missing, Err(TemplateError::Missing)));
    let named = json!([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]);
    for (value, want) in [(json!("{{ bos_token }}p"), "<s>p"), (named, "d")] {
        folder.write(
            "tokenizer_config.json",
            json!({"chat_template": value, "bos_token": {"content": "<s>"}}).to_string(),
        );
        assert_eq!(prompt(&open(), &tokenizer, &[]).unwrap().0, want);
    }
    folder.remove("tokenizer_config.json");
    assert!(!open().is_present());
}

#[test]
fn token_ids_of_text_are_below_the_vocabulary() {
    let tokenizer = golden_tokenizer();
    assert_eq!(tokenizer.vocab_len(), 1024);
    let ids = tokenizer.encode("Élan: 42 €", false).unwrap();
    assert!(ids.iter().all(|id| (FIRST_TEXT_ID..1024).contains(id)), "{ids:?}");
}
