//! `entente eval`: how many held-out expressions a running cluster answers exactly.
//!
//! The figure is exact match after trimming white space, with temperature 0: no partial credit,
//! because a price that is nearly right is wrong.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};

use crate::bundled;
use crate::client::{Client, Sampling};
use crate::cluster::{Endpoint, columns};
use crate::exit::Misuse;

/// Wrong answers that the report shows.
const FAILURES_SHOWN: usize = 20;

/// Enough for the longest held-out answer; a model that rambles is cut off and counted as wrong.
const SAMPLING: Sampling = Sampling { max_tokens: 128, temperature: Some(0.0) };

/// How the report is printed.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    /// One line a direction.
    Table,
    /// One JSON object.
    Json,
}

/// The flags of `entente eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    #[command(flatten)]
    endpoint: Endpoint,

    /// JSON lines with `direction`, `prompt` and `answer`; the bundled held-out set if absent.
    #[arg(long, env = "ENTENTE_FILE", value_name = "FILE")]
    file: Option<PathBuf>,

    /// How many questions are asked at the same time.
    #[arg(long, env = "ENTENTE_CONCURRENCY", value_name = "N", default_value_t = 16)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=256))]
    concurrency: u16,

    /// How the report is printed.
    #[arg(short, long, env = "ENTENTE_OUTPUT", value_name = "FORMAT")]
    #[arg(value_enum, default_value = "table")]
    output: Output,
}

/// One held-out expression; other keys of the line are for people.
#[derive(Debug, Deserialize)]
struct Question {
    direction: String,
    prompt: String,
    answer: String,
}

#[derive(Debug, Default, PartialEq, Serialize)]
struct Score {
    accuracy: f64,
    total: usize,
    correct: usize,
}

#[derive(Debug, PartialEq, Serialize)]
struct Failure {
    direction: String,
    prompt: String,
    expected: String,
    answered: String,
}

#[derive(Debug, PartialEq, Serialize)]
struct Report {
    #[serde(flatten)]
    overall: Score,
    directions: BTreeMap<String, Score>,
    failures: Vec<Failure>,
}

/// Asks every question and prints the report.
pub fn run(args: EvalArgs) -> anyhow::Result<()> {
    let questions = load(args.file.as_deref())?;
    let client = args.endpoint.connect()?;
    let answers = ask_all(&client, &questions, usize::from(args.concurrency))?;
    let report = Report::new(&questions, &answers);
    let mut stdout = io::stdout().lock();
    match args.output {
        Output::Json => writeln!(stdout, "{}", serde_json::to_string_pretty(&report)?)?,
        Output::Table => write!(stdout, "{}", report.table())?,
    }
    Ok(())
}

fn load(file: Option<&std::path::Path>) -> anyhow::Result<Vec<Question>> {
    let (name, text) = match file {
        None => ("the bundled set".into(), bundled::HELDOUT.to_owned()),
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .map_err(|error| Misuse(format!("cannot read {}: {error}", path.display())))?;
            (path.display().to_string(), text)
        }
    };
    let questions: Vec<Question> = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(at, line)| {
            serde_json::from_str(line)
                .map_err(|error| Misuse(format!("{name}, line {}: {error}", at + 1)))
        })
        .collect::<Result<_, _>>()?;
    if questions.is_empty() {
        bail!(Misuse(format!("{name} holds no questions")));
    }
    Ok(questions)
}

/// The answers in the order of the questions. The first failed request ends everything: an
/// accuracy over some of the questions would only mislead.
fn ask_all(
    client: &Client,
    questions: &[Question],
    concurrency: usize,
) -> anyhow::Result<Vec<String>> {
    let next = AtomicUsize::new(0);
    let bar = ProgressBar::new(questions.len() as u64);
    let ask = || -> anyhow::Result<Vec<(usize, String)>> {
        let mut answers = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(question) = questions.get(at) else { return Ok(answers) };
            let answer = client.answer(&question.prompt, SAMPLING).inspect_err(|_| {
                next.store(questions.len(), Ordering::Relaxed);
            });
            answers.push((at, answer.with_context(|| format!("asking {:?}", question.prompt))?));
            bar.inc(1);
        }
    };
    let mut answers = thread::scope(|scope| -> anyhow::Result<Vec<(usize, String)>> {
        let workers: Vec<_> = (0..concurrency).map(|_| scope.spawn(ask)).collect();
        let mut answers = Vec::with_capacity(questions.len());
        for worker in workers {
            answers.extend(worker.join().expect("asking does not panic")?);
        }
        Ok(answers)
    })?;
    bar.finish_and_clear();
    answers.sort_unstable_by_key(|(at, _)| *at);
    Ok(answers.into_iter().map(|(_, answer)| answer).collect())
}

impl Score {
    fn add(&mut self, correct: bool) {
        self.total += 1;
        self.correct += usize::from(correct);
        self.accuracy = self.correct as f64 / self.total as f64;
    }
}

impl Report {
    fn new(questions: &[Question], answers: &[String]) -> Self {
        let mut report =
            Self { overall: Score::default(), directions: BTreeMap::new(), failures: Vec::new() };
        for (question, answer) in questions.iter().zip(answers) {
            let answer = answer.trim();
            let correct = answer == question.answer.trim();
            report.overall.add(correct);
            report.directions.entry(question.direction.clone()).or_default().add(correct);
            if !correct && report.failures.len() < FAILURES_SHOWN {
                report.failures.push(Failure {
                    direction: question.direction.clone(),
                    prompt: question.prompt.clone(),
                    expected: question.answer.clone(),
                    answered: answer.to_owned(),
                });
            }
        }
        report
    }

    fn table(&self) -> String {
        let mut table = columns(["DIRECTION", "ACCURACY", "CORRECT", "TOTAL"]);
        let directions = self.directions.iter().map(|(name, score)| (name.as_str(), score));
        for (name, score) in directions.chain([("overall", &self.overall)]) {
            let percent = format!("{:.2} %", score.accuracy * 100.0);
            table.add_row([
                name.to_owned(),
                percent,
                score.correct.to_string(),
                score.total.to_string(),
            ]);
        }
        let mut text = format!("{}\n", table.trim_fmt());
        for failure in &self.failures {
            text += &format!(
                "\n{}\n  expected: {}\n  answered: {}\n",
                failure.prompt, failure.expected, failure.answered
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(direction: &str, answer: &str) -> Question {
        Question { direction: direction.into(), prompt: "p".into(), answer: answer.into() }
    }

    #[test]
    fn only_an_exact_answer_counts() {
        let questions =
            [question("fr-sv", "tjugotre"), question("fr-sv", "tre"), question("sv-fr", "trois")];
        let answers = ["tjugotre\n".to_owned(), "tre.".to_owned(), "trois".to_owned()];
        let report = Report::new(&questions, &answers);
        assert_eq!((report.overall.correct, report.overall.total), (2, 3));
        assert_eq!(report.directions["fr-sv"].accuracy, 0.5);
        assert_eq!(report.failures.len(), 1);
        assert_eq!(report.failures[0].answered, "tre.");
    }

    #[test]
    fn the_bundled_set_covers_all_six_directions() {
        let questions = load(None).unwrap();
        let directions: std::collections::BTreeSet<_> =
            questions.iter().map(|question| question.direction.as_str()).collect();
        assert_eq!(directions.len(), 6, "{directions:?}");
    }
}
