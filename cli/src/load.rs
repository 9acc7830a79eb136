//! Requests of mixed length, and two ways of sending them: as many at once as are wanted, or when
//! a clock says so.
//!
//! Lengths, prompts and arrival times follow from a seed. What a server makes of them does not flow
//! back, except that a closed loop sends as much as the server takes. When a piece of an answer
//! arrives is noted to the microsecond; what the times mean is for others to say.

use std::io;
use std::str::FromStr;
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use entente_proto::ids::Region;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::bundled;
use crate::client::Client;
use crate::random::Random;

/// Prompts use the ids below this, which every byte-level vocabulary has.
const VOCAB: usize = 256;

/// How long a stream of a closed loop rests after a failure, so that a server that refuses is not
/// asked as fast as it can say no.
const REST: Duration = Duration::from_millis(200);

/// A range of lengths, from which they are drawn log-uniformly: a length is as likely to lie
/// between 32 and 64 as between 64 and 128, so that most are short and most tokens are in the long
/// ones, as in what people and programs send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
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

impl TryFrom<String> for Lengths {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
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

/// What prompts are made of, and how long they are in that unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prompts {
    /// Random token ids.
    Tokens(Lengths),
    /// Questions that the bundled phrasebook model never saw, one after the other.
    Phrases(Lengths),
}

impl Prompts {
    fn draw(self, random: &mut Random) -> (Value, usize) {
        match self {
            Self::Tokens(lengths) => {
                let len = lengths.draw(random);
                (json!(random.tokens(len, VOCAB)), len)
            }
            Self::Phrases(lengths) => {
                let (len, lines) = (lengths.draw(random), bundled::HELDOUT.lines().count());
                let phrases: Vec<String> = (0..len).map(|_| phrase(random.below(lines))).collect();
                (json!(phrases.join("\n")), len)
            }
        }
    }
}

/// The question in this line of the held-out set.
fn phrase(line: usize) -> String {
    let line = bundled::HELDOUT.lines().nth(line).unwrap_or_default();
    let question: Value = serde_json::from_str(line).unwrap_or_default();
    question["prompt"].as_str().unwrap_or_default().to_owned()
}

/// Draws one request after the other; never ends.
#[derive(Debug)]
pub struct Mix {
    random: Random,
    model: String,
    prompts: Prompts,
    output: Lengths,
    residency: Option<Vec<Region>>,
    drawn: usize,
}

/// One request before it is sent.
#[derive(Debug, Clone)]
pub struct Request {
    /// Which of its mix it is, from 0.
    pub index: usize,
    body: Value,
    prompt_len: usize,
    output_tokens: usize,
}

impl Mix {
    /// The requests of this seed.
    pub fn new(seed: u64, model: &str, prompts: Prompts, output: Lengths) -> Self {
        let (random, model) = (Random::new(seed), model.to_owned());
        Self { random, model, prompts, output, residency: None, drawn: 0 }
    }

    /// The same requests, which may be served in these regions only.
    pub fn within(self, residency: Option<Vec<Region>>) -> Self {
        Self { residency, ..self }
    }
}

impl Iterator for Mix {
    type Item = Request;

    fn next(&mut self) -> Option<Request> {
        let (prompt, prompt_len) = self.prompts.draw(&mut self.random);
        let output_tokens = self.output.draw(&mut self.random);
        let mut body = json!({
            "model": self.model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0.0,
            "seed": self.drawn,
            "ignore_eos": true,
            "stream": true,
            "return_token_ids": true,
        });
        if let Some(regions) = &self.residency {
            body["residency"] = json!(regions);
        }
        let index = self.drawn;
        self.drawn += 1;
        Some(Request { index, body, prompt_len, output_tokens })
    }
}

/// What became of a request.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Which of its mix it was.
    pub index: usize,
    /// Which of the servers was asked.
    pub server: usize,
    /// When it was to be sent.
    pub due: Instant,
    /// When its answer ended, well or not.
    pub ended: Instant,
    /// Length of the prompt, in its own unit.
    pub prompt_len: usize,
    /// Tokens that were asked for.
    pub output_tokens: usize,
    /// When pieces of the answer arrived, in ms after the request was due, and their tokens.
    pub pieces: Vec<(f64, usize)>,
    /// The tokens of the answer.
    pub token_ids: Vec<u64>,
    /// The text of the answer.
    pub text: String,
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
        self.token_ids.len()
    }

    /// Share of the answer that arrived after `begin`.
    pub fn share_after(&self, begin: Instant) -> f64 {
        let begin_ms = begin.saturating_duration_since(self.due).as_secs_f64() * 1e3;
        let late = self.pieces.iter().filter(|(at_ms, _)| *at_ms >= begin_ms);
        late.map(|(_, tokens)| tokens).sum::<usize>() as f64 / self.output_tokens as f64
    }
}

/// Who sends: to which servers, and who watches each piece as it arrives.
#[derive(Clone, Copy)]
pub struct Sender<'a> {
    /// The servers, between which requests are shared out; never empty.
    pub servers: &'a [Client],
    /// Hears how many tokens a piece has; all answers are cut off once it says `false`.
    pub on_piece: &'a (dyn Fn(usize) -> bool + Sync),
}

impl Sender<'_> {
    /// Sends one request and reads its answer.
    fn ask(&self, server: usize, request: &Request, due: Instant) -> Outcome {
        let mut outcome = Outcome {
            index: request.index,
            server,
            due,
            ended: due,
            prompt_len: request.prompt_len,
            output_tokens: request.output_tokens,
            pieces: Vec::new(),
            token_ids: Vec::new(),
            text: String::new(),
            error: None,
        };
        let client = &self.servers[server];
        let answered = client.stream_chunks("completions", &request.body, |chunk| {
            let now = Instant::now();
            let choice = &chunk["choices"][0];
            outcome.text.push_str(choice["text"].as_str().unwrap_or_default());
            let ids = choice["token_ids"].as_array().map_or(&[][..], Vec::as_slice);
            if !ids.is_empty() {
                outcome.pieces.push((now.duration_since(due).as_secs_f64() * 1e3, ids.len()));
                outcome.token_ids.extend(ids.iter().filter_map(Value::as_u64));
            }
            if (self.on_piece)(ids.len()) { Ok(()) } else { Err(io::ErrorKind::TimedOut.into()) }
        });
        outcome.ended = Instant::now();
        outcome.error = answered.err().map(|error| format!("{error:#}"));
        outcome
    }

    /// Keeps `concurrency` requests running for as long as `next` gives any. Each stream stays with
    /// its server, so that one that hangs does not draw in the streams of the others.
    pub fn closed_loop(
        &self,
        concurrency: usize,
        next: impl Fn() -> Option<Request> + Sync,
    ) -> Vec<Outcome> {
        let next = &next;
        let stream = |number: usize| {
            let mut outcomes = Vec::new();
            while let Some(request) = next() {
                let outcome = self.ask(number % self.servers.len(), &request, Instant::now());
                let failed = outcome.error.is_some();
                outcomes.push(outcome);
                if failed {
                    thread::sleep(REST);
                }
            }
            outcomes
        };
        thread::scope(|scope| {
            let streams: Vec<_> =
                (0..concurrency).map(|number| scope.spawn(move || stream(number))).collect();
            let joined = streams.into_iter().map(|stream| stream.join());
            joined.flat_map(|outcomes| outcomes.expect("asking does not panic")).collect()
        })
    }

    /// Sends each request when its time has come, whether or not earlier ones were answered, and
    /// waits for the last answer. No more than `running_max` run at once: what is due beyond that
    /// waits, and its clock runs.
    pub fn open_loop(
        &self,
        arrivals: impl Iterator<Item = (Duration, Request)>,
        running_max: usize,
    ) -> Vec<Outcome> {
        let start = Instant::now();
        let (outcomes, room) = (Mutex::new((Vec::new(), 0)), Condvar::new());
        let lock = || outcomes.lock().unwrap_or_else(PoisonError::into_inner);
        thread::scope(|scope| {
            for (number, (at, request)) in arrivals.enumerate() {
                thread::sleep(at.saturating_sub(start.elapsed()));
                let full = |state: &mut (Vec<Outcome>, usize)| state.1 >= running_max;
                let mut state =
                    room.wait_while(lock(), full).unwrap_or_else(PoisonError::into_inner);
                state.1 += 1;
                drop(state);
                let (lock, room) = (&lock, &room);
                scope.spawn(move || {
                    let outcome = self.ask(number % self.servers.len(), &request, start + at);
                    let mut state = lock();
                    state.0.push(outcome);
                    state.1 -= 1;
                    room.notify_one();
                });
            }
        });
        outcomes.into_inner().unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Gives requests the arrival times of a Poisson process of `rate` a second, counted from now.
pub fn arrivals(
    seed: u64,
    rate: f64,
    requests: impl Iterator<Item = Request>,
) -> impl Iterator<Item = (Duration, Request)> {
    // A stream of its own: that of the requests begins at the seed itself.
    let mut random = Random::new(seed.wrapping_add(1 << 63));
    let mut at = Duration::ZERO;
    requests.map(move |request| {
        at += Duration::from_secs_f64(random.gap_s(rate));
        (at, request)
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
        let outcome = Outcome {
            index: 0,
            server: 0,
            due,
            ended: due,
            prompt_len: 1,
            output_tokens: 8,
            pieces,
            token_ids: vec![],
            text: String::new(),
            error: None,
        };
        let share_after = |ms| outcome.share_after(due + Duration::from_millis(ms));
        assert_eq!([0, 150, 301].map(share_after), [0.5, 0.375, 0.0]);
    }

    #[test]
    fn a_seed_names_all_requests() {
        let bodies = |seed, prompts: fn(Lengths) -> Prompts| {
            let lengths = |text: &str| text.parse().unwrap();
            let mix = Mix::new(seed, "m", prompts(lengths("1-9")), lengths("2-5"));
            mix.take(20).map(|request| request.body.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(bodies(1, Prompts::Tokens), bodies(1, Prompts::Tokens));
        assert_ne!(bodies(1, Prompts::Tokens), bodies(2, Prompts::Tokens));
        assert_ne!(bodies(1, Prompts::Phrases), bodies(2, Prompts::Phrases));
        assert!(bodies(1, Prompts::Phrases)[0].contains("Translate"));
    }
}
