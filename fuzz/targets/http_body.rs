//! The body of a request of a client.
#![no_main]

use entente_coordinator::api::body;
use entente_coordinator::api::request::{Chat, Common, Completion};
use entente_fuzz::{bounded, seed};
use entente_model::GenerationConfig;
use libfuzzer_sys::fuzz_target;

const COMPLETION: &str = r#"{"model": "m", "prompt": [[1, 2], [3]], "max_tokens": 4, "echo": true,
"logprobs": 2, "temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "seed": 7, "n": 2,
"stop": ["a", "b"], "stream": true, "stream_options": {"include_usage": true}, "suffix": "",
"logit_bias": {"1": 2.5}, "best_of": 1, "return_token_ids": true}"#;

const CHAT: &str = r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "hi \u00e9"}]},
{"role": "assistant", "content": "ho"}], "max_completion_tokens": 4, "logprobs": true,
"top_logprobs": 3, "response_format": {"type": "text"}, "tools": [], "stop": "x"}"#;

fn seeds() {
    seed("completion", COMPLETION.as_bytes());
    seed("chat", CHAT.as_bytes());
}

fuzz_target!(init: seeds(), |input: &[u8]| bounded(input.len(), || {
    let defaults = GenerationConfig::default();
    if let Ok(common) = body::read::<Common>(input) {
        let _ = (common.n(), common.sampling(&defaults), common.stop(16, &defaults));
    }
    if let Ok(completion) = body::read::<Completion>(input) {
        let _ = (completion.max_tokens(), completion.top_logprobs());
    }
    if let Ok(chat) = body::read::<Chat>(input) {
        let _ = (chat.max_tokens(100), chat.top_logprobs());
        chat.messages.0.iter().for_each(|message| drop(message.content.text()));
    }
}));
