//! A small blocking client of the public API: as much as `up`, `chat` and `eval` need.
//!
//! It uses the same door as everyone else, so what these verbs show is what a user would see.
//! Blocking on purpose: callers that want concurrency use threads, which keeps this file plain.

use std::io::BufReader;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use serde_json::{Value, json};
use ureq::http::Response;
use ureq::{Agent, Body, RequestBuilder};

use crate::api_key::ApiKey;
use crate::sse::Events;

/// How long a connection may take to come up. An answer may take as long as it needs.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// How a prompt reaches the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// As one user message, through the model's chat template.
    Chat,
    /// As plain text to continue, for models without a template.
    Completion,
}

/// What to ask for, beside the prompt.
#[derive(Debug, Clone, Copy)]
pub struct Sampling {
    /// Most tokens to generate.
    pub max_tokens: u32,
    /// Randomness; the server's default when absent, 0 takes the likeliest token each time.
    pub temperature: Option<f32>,
}

/// One server and the model that it serves.
#[derive(Debug, Clone)]
pub struct Client {
    agent: Agent,
    base: String,
    key: Option<ApiKey>,
    model: String,
}

impl Client {
    /// Asks the server at `base` (such as `http://127.0.0.1:8080`) for the name of its model, and
    /// shows `key` from then on.
    pub fn connect(base: &str, key: Option<&ApiKey>) -> anyhow::Result<Self> {
        let base = base.trim_end_matches('/').to_owned();
        let mut client = Self { agent: agent(None), base, key: key.cloned(), model: String::new() };
        let request = client.agent.get(format!("{}/v1/models", client.base));
        let response = client.shown(request).call();
        let mut response = response.with_context(|| format!("cannot reach {}", client.base))?;
        let listing = success(&mut response)?;
        let model = listing["data"][0]["id"].as_str();
        model
            .with_context(|| format!("{} serves no model", client.base))?
            .clone_into(&mut client.model);
        Ok(client)
    }

    /// A request that shows the key, if there is one.
    fn shown<B>(&self, request: RequestBuilder<B>) -> RequestBuilder<B> {
        match &self.key {
            Some(key) => request.header("authorization", key.authorization()),
            None => request,
        }
    }

    /// The same server, where no request may take longer than `deadline` from first to last byte.
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { agent: agent(Some(deadline)), ..self }
    }

    /// Status code and body of `GET path`.
    pub fn get(&self, path: &str) -> anyhow::Result<(u16, String)> {
        let mut response = self.agent.get(format!("{}{path}", self.base)).call()?;
        Ok((response.status().as_u16(), response.body_mut().read_to_string()?))
    }

    /// The name of the model, as requests give it.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Streams the answer to `prompt`; `on_text` takes each piece as it arrives.
    pub fn stream(
        &self,
        style: Style,
        prompt: &str,
        sampling: Sampling,
        mut on_text: impl FnMut(&str) -> std::io::Result<()>,
    ) -> anyhow::Result<()> {
        let (path, request) = self.request(style, prompt, sampling, true);
        self.stream_chunks(path, &request, |chunk| {
            on_text(text_of(style, &chunk["choices"][0], "delta"))
        })
    }

    /// Posts `request`, which asks for a stream, and gives each chunk of the answer to `on_chunk`.
    pub fn stream_chunks(
        &self,
        path: &str,
        request: &Value,
        mut on_chunk: impl FnMut(&Value) -> std::io::Result<()>,
    ) -> anyhow::Result<()> {
        let mut response = self.post(path, request)?;
        if !response.status().is_success() {
            success(&mut response)?;
        }
        let body = BufReader::new(response.into_body().into_reader());
        for event in Events::new(body) {
            let data = event.context("the stream broke")?;
            if data == "[DONE]" {
                return Ok(());
            }
            let chunk: Value = serde_json::from_str(&data).context("a chunk is not JSON")?;
            if let Some(error) = error_message(&chunk) {
                bail!("the server stopped: {error}");
            }
            on_chunk(&chunk)?;
        }
        Err(anyhow!("the stream ended before the answer did"))
    }

    /// The whole answer to `prompt`.
    pub fn answer(&self, prompt: &str, sampling: Sampling) -> anyhow::Result<String> {
        let (path, request) = self.request(Style::Chat, prompt, sampling, false);
        let mut response = self.post(path, &request)?;
        let reply = success(&mut response)?;
        Ok(text_of(Style::Chat, &reply["choices"][0], "message").to_owned())
    }

    /// Where a prompt is posted, and the body.
    fn request(
        &self,
        style: Style,
        prompt: &str,
        sampling: Sampling,
        stream: bool,
    ) -> (&'static str, Value) {
        let mut request = json!({
            "model": self.model,
            "max_tokens": sampling.max_tokens,
            "stream": stream,
        });
        if let Some(temperature) = sampling.temperature {
            request["temperature"] = json!(temperature);
        }
        match style {
            Style::Chat => {
                request["messages"] = json!([{"role": "user", "content": prompt}]);
                ("chat/completions", request)
            }
            Style::Completion => {
                request["prompt"] = json!(prompt);
                ("completions", request)
            }
        }
    }

    fn post(&self, path: &str, request: &Value) -> anyhow::Result<Response<Body>> {
        self.shown(self.agent.post(format!("{}/v1/{path}", self.base)))
            .send_json(request)
            .with_context(|| format!("cannot ask {}", self.base))
    }
}

fn agent(deadline: Option<Duration>) -> Agent {
    // A cluster is asked directly: a proxy that is set for the internet would only be in the way.
    Agent::config_builder()
        .http_status_as_error(false)
        .proxy(None)
        .timeout_connect(Some(CONNECT_DEADLINE))
        .timeout_global(deadline)
        .build()
        .into()
}

/// The JSON body of a successful response; else the server's own error text.
fn success(response: &mut Response<Body>) -> anyhow::Result<Value> {
    let status = response.status();
    let text = response.body_mut().read_to_string().context("the answer broke off")?;
    let body: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
    if status.is_success() {
        return Ok(body);
    }
    let message = error_message(&body).unwrap_or(text.trim());
    Err(anyhow!("the server answered {status}: {message}"))
}

fn error_message(body: &Value) -> Option<&str> {
    body.get("error")?.get("message")?.as_str()
}

/// The text of a choice; `part` is `message` or, in a stream, `delta`. Empty when there is none,
/// as in the first chunk of a chat and in the chunk that carries the usage.
fn text_of<'a>(style: Style, choice: &'a Value, part: &str) -> &'a str {
    let text = match style {
        Style::Chat => &choice[part]["content"],
        Style::Completion => &choice["text"],
    };
    text.as_str().unwrap_or_default()
}
