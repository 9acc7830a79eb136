//! One way to print: a table for people, JSON with documented keys for programs.

use std::io::{self, BufRead, IsTerminal, Write};

use clap::ValueEnum;
use serde::Serialize;

use super::Operator;
use crate::exit::{Interrupted, Misuse};

/// How an answer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Columns for people.
    Table,
    /// One JSON document; its keys are part of the interface.
    Json,
}

impl Operator {
    /// Writes an answer to standard output.
    pub fn print<T: Serialize>(
        &self,
        answer: &T,
        table: impl FnOnce(&T) -> String,
    ) -> anyhow::Result<()> {
        let text = match self.output {
            Output::Table => table(answer),
            Output::Json => serde_json::to_string_pretty(answer)?,
        };
        writeln!(io::stdout().lock(), "{text}")?;
        Ok(())
    }
}

/// A cell that may be empty.
pub fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// Asks a person before something is done that cannot be undone. A script says `--yes`.
pub fn confirm(yes: bool, what: &str) -> anyhow::Result<()> {
    if yes {
        return Ok(());
    }
    let mut stdin = io::stdin().lock();
    if !stdin.is_terminal() {
        return Err(Misuse(format!("{what} cannot be undone; say --yes to do it")).into());
    }
    write!(io::stderr(), "{what} cannot be undone. Do it? [y/N] ")?;
    let mut answer = String::new();
    stdin.read_line(&mut answer)?;
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(Interrupted.into()),
    }
}
