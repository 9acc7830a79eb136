//! `entente chat`: ask a running cluster from the command line.
//!
//! Each line is a conversation of its own. That keeps piping a file of questions predictable, and
//! it is what the bundled phrasebook was trained for.

use std::io::{self, BufRead, IsTerminal, Write};

use clap::Args;

use crate::client::{Client, Sampling, Style};
use crate::cluster::Endpoint;

/// The flags of `entente chat`.
#[derive(Debug, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    endpoint: Endpoint,

    /// Generate at most this many tokens an answer.
    #[arg(long, env = "ENTENTE_MAX_TOKENS", value_name = "N", default_value_t = 256)]
    max_tokens: u32,

    /// Randomness of the answer: 0 always takes the likeliest token; the model decides if absent.
    #[arg(long, env = "ENTENTE_TEMPERATURE", value_name = "T")]
    temperature: Option<f32>,

    /// What to ask; without it, every line of standard input is asked.
    prompt: Option<String>,
}

/// Asks the one prompt, or every line of standard input until its end.
pub fn run(args: ChatArgs) -> anyhow::Result<()> {
    let client = args.endpoint.connect()?;
    let sampling = Sampling { max_tokens: args.max_tokens, temperature: args.temperature };
    if let Some(prompt) = &args.prompt {
        return ask(&client, prompt, sampling);
    }
    let stdin = io::stdin().lock();
    let interactive = stdin.is_terminal();
    let invite = || match interactive {
        true => write!(io::stderr(), "{}> ", client.model()),
        false => Ok(()),
    };
    invite()?;
    for line in stdin.lines() {
        let line = line?;
        if !line.trim().is_empty() {
            ask(&client, line.trim(), sampling)?;
        }
        invite()?;
    }
    Ok(())
}

fn ask(client: &Client, prompt: &str, sampling: Sampling) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    client.stream(Style::Chat, prompt, sampling, |text| {
        stdout.write_all(text.as_bytes())?;
        stdout.flush()
    })?;
    writeln!(stdout)?;
    Ok(())
}
