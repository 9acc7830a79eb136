//! Requests of mixed length, and two ways of sending them: as many at once as are wanted, or when
//! a clock says so.
//!
//! All of it follows from a seed: lengths, prompts and arrival times. What a server makes of it
//! does not flow back, except that a closed loop sends as much as the server takes.

use std::io;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::super::random::Random;
use crate::client::Client;

/// Prompts use the ids below this, which every byte-level vocabulary has.
const VOCAB: usize = 256;

/// A range of lengths, from which they are drawn log-uniformly: a length is as likely to lie
/// between 32 and 64 as between 64 and 128, so that most are short and most tokens are in the long
/// ones, as in what people and programs send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lengths {
    min: u16,
    max: u16,
}

impl FromStr for Lengths {
    type Err = String;

    /// Parses `32-512`, or `64` for a fixed length.
    fn from_str(text: &str) -> Result<Self, String> {
        let (min, max) = text.split_once('-').unwrap_or((text, text));
        let number = |text: &str| text.trim().parse().ok().filter(|number: &u16| *number > 0);
        match (number(min), number(max)) {
            (Some(min), Some(max)) if min <= max => Ok(Self { min, max }),
            _ => Err(format!("{text:?} is not a range of lengths, such as 32-512")),
        }
    }
}

impl Lengths {
    fn draw(self, random: &mut Random) -> usize {
        let (min, max) = (f64::from(self.min), f64::from(self.max));
        // Rounded down from a range that is one longer, so that the ends are as likely as others.
        let length = min * ((max + 1.0) / min).powf(random.uniform());
        (length as usize).clamp(self.min.into(), self.max.into())
    }
}

/// Draws one request after the other.
pub struct Mix {
    random: Random,
    model: String,
    prompt: Lengths,
    output: Lengths,
}

/// One request before it is sent.
pub struct Request {
    body: Value,
    prompt_tokens: usize,
    output_tokens: usize,
}

impl Mix {
    /// The requests of this seed.
    pub fn new(seed: u64, model: &str, prompt: Lengths, output: Lengths) -> Self {
        Self { random: Random::new(seed), model: model.to_owned(), prompt, output }
    }

    fn next(&mut self) -> Request {
        let prompt_tokens = self.prompt.draw(&mut self.random);
        let output_tokens = self.output.draw(&mut self.random);
        let body = json!({
            "model": self.model,
            "prompt": self.random.tokens(prompt_tokens, VOCAB),
            "max_tokens": output_tokens,
            "temperature": 0.0,
            "ignore_eos": true,
            "stream": true,
            "return_token_ids": true,
        });
        Request { body, prompt_tokens, output_tokens }
    }
}

/// What became of a request.
#[derive(Debug)]
pub struct Outcome {
    /// When it was to be sent.
    pub due: Instant,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens that were asked for.
    pub output_tokens: usize,
    /// When pieces of the answer arrived, in ms after the request was due, and their tokens.
    pub pieces: Vec<(f64, usize)>,
    /// Why it was not answered in full.
    pub error: Option<String>,
}

impl Outcome {
    /// From when the request was due until its first token.
    pub fn ttft_ms(&self) -> Option<f64> {
        self.pieces.first().map(|(at_ms, _)| *at_ms)
    }

    /// Times between pieces of the answer.
    pub fn gaps_ms(&self) -> impl Iterator<Item = f64> {
        self.pieces.windows(2).map(|pair| pair[1].0 - pair[0].0)
    }

    /// Tokens that arrived.
    pub fn tokens(&self) -> usize {
        self.pieces.iter().map(|(_, tokens)| tokens).sum()
    }

    /// Share of the answer that arrived after `begin`.
    pub fn share_after(&self, begin: Instant) -> f64 {
        let begin_ms = begin.saturating_duration_since(self.due).as_secs_f64() * 1e3;
        let late = self.pieces.iter().filter(|(at_ms, _)| *at_ms >= begin_ms);
        late.map(|(_, tokens)| tokens).sum::<usize>() as f64 / self.output_tokens as f64
    }
}

/// Sends one request and reads its answer, until `stop` at the latest.
fn ask(client: &Client, request: &Request, due: Instant, stop: Option<Instant>) -> Outcome {
    let mut pieces = Vec::new();
    let answered = client.stream_chunks("completions", &request.body, |chunk| {
        let now = Instant::now();
        if stop.is_some_and(|stop| now >= stop) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let tokens = chunk["choices"][0]["token_ids"].as_array().map_or(0, Vec::len);
        if tokens > 0 {
            pieces.push((now.duration_since(due).as_secs_f64() * 1e3, tokens));
        }
        Ok(())
    });
    Outcome {
        due,
        prompt_tokens: request.prompt_tokens,
        output_tokens: request.output_tokens,
        pieces,
        error: answered.err().map(|error| format!("{error:#}")),
    }
}

/// Keeps `concurrency` requests running for so long. Returns what became of all, the last ones cut
/// off in the middle.
pub fn closed_loop(client: &Client, mix: Mix, concurrency: usize, long: Duration) -> Vec<Outcome> {
    let mix = Mutex::new(mix);
    let stop = Instant::now() + long;
    let work = || {
        let mut outcomes = Vec::new();
        while Instant::now() < stop {
            let request = mix.lock().unwrap_or_else(PoisonError::into_inner).next();
            let outcome = ask(client, &request, Instant::now(), Some(stop));
            let failed = outcome.error.is_some();
            outcomes.push(outcome);
            if failed {
                break;
            }
        }
        outcomes
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..concurrency).map(|_| scope.spawn(work)).collect();
        let joined = workers.into_iter().map(|worker| worker.join());
        joined.flat_map(|outcomes| outcomes.expect("asking does not panic")).collect()
    })
}

/// Sends `requests` requests when a Poisson process of `rate` a second says so, whether or not
/// earlier ones were answered, and waits for the last answer.
pub fn open_loop(client: &Client, mut mix: Mix, requests: u16, rate: f64) -> Vec<Outcome> {
    let mut at_s = 0.0;
    let mut planned = Vec::with_capacity(requests.into());
    for _ in 0..requests {
        at_s += mix.random.gap_s(rate);
        planned.push((Duration::from_secs_f64(at_s), mix.next()));
    }
    let start = Instant::now();
    thread::scope(|scope| {
        let mut asked = Vec::with_capacity(planned.len());
        for (at, request) in &planned {
            thread::sleep(at.saturating_sub(start.elapsed()));
            asked.push(scope.spawn(move || ask(client, request, start + *at, None)));
        }
        asked.into_iter().map(|asked| asked.join().expect("asking does not panic")).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_log_uniform_and_both_ends_occur() {
        let lengths: Lengths = "16-255".parse().unwrap();
        let mut random = Random::new(3);
        let drawn: Vec<usize> = (0..40_000).map(|_| lengths.draw(&mut random)).collect();
        let within = |from, to| drawn.iter().filter(|n| (from..to).contains(*n)).count();
        assert_eq!(within(16, 256), drawn.len());
        for from in [16, 32, 64, 128] {
            let share = within(from, 2 * from) as f64 / drawn.len() as f64;
            assert!((share - 0.25).abs() < 0.01, "{share} of all in {from}..{}", 2 * from);
        }
        assert!(drawn.contains(&16) && drawn.contains(&255));
        let fixed: Lengths = "64".parse().unwrap();
        assert_eq!(fixed.draw(&mut random), 64);
    }

    #[test]
    fn what_is_no_range_of_lengths_is_refused() {
        for text in ["", "0", "0-4", "5-4", "4-", "4-x", "1-70000"] {
            assert!(text.parse::<Lengths>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn the_share_of_an_answer_counts_from_the_moment_that_is_asked_for() {
        let due = Instant::now();
        let pieces = vec![(100.0, 1), (200.0, 1), (300.0, 2)];
        let outcome = Outcome { due, prompt_tokens: 1, output_tokens: 8, pieces, error: None };
        let share_after = |ms| outcome.share_after(due + Duration::from_millis(ms));
        assert_eq!([0, 150, 301].map(share_after), [0.5, 0.375, 0.0]);
    }

    #[test]
    fn a_seed_names_all_requests() {
        let bodies = |seed| {
            let lengths = |text: &str| text.parse().unwrap();
            let mut mix = Mix::new(seed, "m", lengths("1-9"), lengths("2-5"));
            (0..20).map(|_| mix.next().body.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(bodies(1), bodies(1));
        assert_ne!(bodies(1), bodies(2));
    }
}
