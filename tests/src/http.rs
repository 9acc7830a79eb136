//! A plain HTTP client that keeps bodies as text.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use ureq::{Agent, RequestBuilder};

/// Longest that any one request of a test may take.
const REQUEST_DEADLINE: Duration = Duration::from_secs(120);

/// Keys by what URLs begin with. A test is a process of its own, and its clusters are few.
static KEYS: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());

/// From now on `key` is shown to the server at `base`.
pub fn show_key(base: &str, key: &str) {
    KEYS.lock().unwrap().insert(base.to_owned(), key.to_owned());
}

/// The value of the header `Authorization` that the server of this URL is shown, if any.
fn authorization(url: &str) -> Option<String> {
    let keys = KEYS.lock().unwrap();
    let of_server = |base: &&String| {
        url.strip_prefix(base.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    keys.keys().find(of_server).map(|base| format!("Bearer {}", keys[base]))
}

/// The same request with the server's key.
fn keyed<B>(request: RequestBuilder<B>, url: &str) -> RequestBuilder<B> {
    match authorization(url) {
        Some(value) => request.header("authorization", value),
        None => request,
    }
}

/// A response that arrived completely.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// HTTP status code.
    pub status: u16,
    /// The body as it came.
    pub text: String,
}

impl Reply {
    /// The body as JSON; null when it is none.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or(Value::Null)
    }

    /// The `choices` of a completion exactly as the server wrote them, so that comparing them
    /// compares every digit of every log-probability.
    ///
    /// # Panics
    /// When the server did not answer with choices.
    pub fn choices(&self) -> String {
        #[derive(Deserialize)]
        struct Completion<'a> {
            #[serde(borrow)]
            choices: &'a RawValue,
        }
        assert_eq!(self.status, 200, "{}", self.text);
        let completion: Completion<'_> = serde_json::from_str(&self.text).unwrap();
        completion.choices.get().to_owned()
    }
}

fn agent() -> Agent {
    let config = Agent::config_builder().http_status_as_error(false).proxy(None);
    config.timeout_global(Some(REQUEST_DEADLINE)).build().into()
}

fn reply(mut response: ureq::http::Response<ureq::Body>) -> Reply {
    let status = response.status().as_u16();
    let text = response.body_mut().with_config().limit(u64::MAX).read_to_string().unwrap();
    Reply { status, text }
}

/// `GET url`.
pub fn get(url: &str) -> Reply {
    reply(keyed(agent().get(url), url).call().unwrap())
}

/// `POST url` with a JSON body.
pub fn post(url: &str, body: &Value) -> Reply {
    post_text(url, &body.to_string())
}

/// `POST url` with any body, said to be JSON.
pub fn post_text(url: &str, body: &str) -> Reply {
    let request = keyed(agent().post(url), url).header("content-type", "application/json");
    reply(request.send(body).unwrap())
}

/// Asks all at once, one connection each; the answers come in the order of the questions.
pub fn post_all(requests: &[(String, Value)]) -> Vec<Reply> {
    thread::scope(|scope| {
        let ask = |(url, body): &(String, Value)| post(url, body);
        let running: Vec<_> =
            requests.iter().map(|request| scope.spawn(move || ask(request))).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Sends a request and gives the bare connection, whose answer nobody reads; dropping it
/// disconnects.
pub fn abandon(url: &str, body: &Value) -> TcpStream {
    let (address, path) = url.trim_start_matches("http://").split_once('/').unwrap();
    let body = body.to_string();
    let key = authorization(url).map_or(String::new(), |key| format!("authorization: {key}\r\n"));
    let mut connection = TcpStream::connect(address).unwrap();
    write!(
        connection,
        "POST /{path} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n\
         {key}content-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    connection
}

/// An open stream of server-sent events; dropping it disconnects.
pub struct Stream {
    lines: Box<dyn Iterator<Item = std::io::Result<String>> + Send>,
}

/// `POST url` with `"stream": true` added to the body.
///
/// # Panics
/// When the server refuses.
pub fn stream(url: &str, body: &Value) -> Stream {
    let mut body = body.clone();
    body["stream"] = Value::Bool(true);
    let response = keyed(agent().post(url), url).send_json(&body).unwrap();
    if response.status() != 200 {
        panic!("the server refused to stream: {}", reply(response).text);
    }
    Stream { lines: Box::new(BufReader::new(response.into_body().into_reader()).lines()) }
}

impl Stream {
    /// The next event, whatever it says; none after `[DONE]`.
    fn event(&mut self) -> Option<Value> {
        loop {
            let line = self.lines.next().expect("a stream ends with [DONE]").unwrap();
            match line.strip_prefix("data: ") {
                None => {}
                Some("[DONE]") => return None,
                Some(data) => return Some(serde_json::from_str(data).unwrap()),
            }
        }
    }

    /// Reads on to the error that the stream ends with.
    ///
    /// # Panics
    /// When it ends well.
    pub fn failure(mut self) -> Value {
        loop {
            let event = self.event().expect("the stream carries an error");
            if event.get("error").is_some() {
                return event;
            }
        }
    }
}

impl Iterator for Stream {
    type Item = Value;

    /// The next chunk; none after `[DONE]`.
    ///
    /// # Panics
    /// When the stream breaks off or carries an error.
    fn next(&mut self) -> Option<Value> {
        let chunk = self.event()?;
        assert!(chunk.get("error").is_none(), "the stream failed: {chunk}");
        Some(chunk)
    }
}

/// The text of a chunk of `/v1/completions`.
pub fn chunk_text(chunk: &Value) -> &str {
    chunk["choices"][0]["text"].as_str().unwrap_or_default()
}

/// The value of a metric, added up over its labels; 0 when the server does not have it.
pub fn metric(base: &str, name: &str) -> f64 {
    let text = get(&format!("{base}/metrics")).text;
    let samples = text.lines().filter_map(|line| line.rsplit_once(' '));
    samples
        .filter(|(sample, _)| sample.split('{').next() == Some(name))
        .map(|(_, value)| value.parse::<f64>().unwrap())
        .sum()
}
