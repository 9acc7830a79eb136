//! The `entente` binary: one program that is every role of a cluster, and the tools beside it.
//!
//! - `entente up` starts a whole cluster on this machine as child processes ([`cluster`]).
//! - `entente coordinator`, `entente expert-node` and `entente witness` are one role each, described
//!   by a TOML file ([`role`]); `up` starts exactly these, so a cluster over several machines is the
//!   same programs with other addresses.
//! - `entente init`, `entente join` and `entente ca` write what a process on a machine of its own
//!   starts from ([`provision`]).
//! - `entente node`, `raft`, `experts`, `token`, `tenant` and `key` are an operator's: they ask the
//!   control plane of a running cluster ([`operator`]).
//! - `entente audit` works on the records of requests that coordinators keep.
//! - `entente chat` and `entente eval` talk to a running cluster over its public API ([`client`]).
//! - `entente drill` puts load on a cluster, breaks parts of it and gives a verdict ([`drill`]).
//! - `entente doctor` looks at the machine, `entente bench` measures, and `entente model` works with checkpoint folders.
//!
//! Conventions that scripts may rely on: data goes to standard output, messages and logs go to
//! standard error, every flag has an environment variable, and exit codes are stable ([`exit`]).
//!
//! This crate holds no model, no protocol and no policy. It parses, starts, measures, prints and stops.

mod api_key;
mod bundled;
mod client;
mod cluster;
mod drill;
mod exit;
mod load;
mod logging;
mod notify;
mod operator;
mod provision;
mod random;
mod role;
mod sse;
mod stats;
mod status;
mod verbs;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Serves Mixture-of-Experts language models from expert nodes in several countries.
#[derive(Debug, Parser)]
#[command(name = "entente", version, about, after_help = exit::HELP)]
struct Cli {
    #[command(flatten)]
    logging: logging::LogArgs,

    #[command(subcommand)]
    verb: Verb,
}

/// One variant a verb, in the order in which a newcomer needs them.
#[derive(Debug, Subcommand)]
enum Verb {
    /// Start a whole cluster on this machine, show that it answers, and serve until Ctrl-C.
    Up(verbs::up::UpArgs),
    /// Ask a running cluster and print the answer as it comes.
    Chat(verbs::chat::ChatArgs),
    /// Measure how many held-out expressions a running cluster translates exactly.
    Eval(verbs::eval::EvalArgs),
    /// Measure kernels, engine, exchanges or a running cluster beside the machine's limits.
    Bench(verbs::bench::BenchArgs),
    /// Say what this machine offers.
    #[command(subcommand)]
    Doctor(verbs::doctor::DoctorVerb),
    /// Put load on a cluster, break parts of it, and say whether it kept its promises.
    Drill(verbs::drill::DrillArgs),
    /// Found a cluster on several machines: CAs, and what its first coordinator starts from.
    Init(verbs::init::InitArgs),
    /// Make this machine a member of a cluster, by a token.
    Join(verbs::join::JoinArgs),
    /// Make CAs, and certificates with the key of a CA.
    #[command(subcommand)]
    Ca(verbs::ca::CaVerb),
    /// Show the members of a cluster; drain them, keep replicas off them, take them out.
    #[command(subcommand)]
    Node(verbs::node::NodeVerb),
    /// Show the raft group; take voters in and out.
    #[command(subcommand)]
    Raft(verbs::raft::RaftVerb),
    /// Show where experts are placed, and move them.
    #[command(subcommand)]
    Experts(verbs::experts::ExpertsVerb),
    /// Make, list and revoke the tokens by which processes join a cluster.
    #[command(subcommand)]
    Token(verbs::token::TokenVerb),
    /// Say who may use a cluster, in which regions, and how much.
    #[command(subcommand)]
    Tenant(verbs::tenant::TenantVerb),
    /// Make, replace and revoke the keys by which tenants use the public API.
    #[command(subcommand)]
    Key(verbs::key::KeyVerb),
    /// Explain where a request may be served, without running it.
    #[command(subcommand)]
    Residency(verbs::residency::ResidencyVerb),
    /// Show, check and prove what was recorded of requests.
    #[command(subcommand)]
    Audit(verbs::audit::AuditVerb),
    /// Change the network between the processes of an `entente up --link`.
    #[command(subcommand)]
    Link(verbs::link::LinkVerb),
    /// Work with checkpoint folders.
    Model(verbs::model::ModelArgs),
    /// Run one coordinator: attention, gating, sampling and the public API of its region.
    Coordinator(verbs::coordinator::CoordinatorArgs),
    /// Run one expert node: holds the experts that are placed on it and computes nothing else.
    ExpertNode(verbs::expert_node::ExpertNodeArgs),
    /// Run one witness: a voter without a model.
    Witness(role::RoleArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    exit::report(run(cli))
}

/// Sockets are files, and the usual allowance of 1,024 is less than what the limits of this program
/// let in.
fn allow_open_files() {
    let allowed = getrlimit(Resource::Nofile);
    // Where the system does not want this, fewer connections fit.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: allowed.maximum, ..allowed });
}

fn run(cli: Cli) -> anyhow::Result<()> {
    logging::init(&cli.logging)?;
    allow_open_files();
    match cli.verb {
        Verb::Up(args) => verbs::up::run(args, &cli.logging),
        Verb::Chat(args) => verbs::chat::run(args),
        Verb::Eval(args) => verbs::eval::run(args),
        Verb::Bench(args) => verbs::bench::run(args, &cli.logging),
        Verb::Doctor(verb) => verbs::doctor::run(verb),
        Verb::Drill(args) => verbs::drill::run(args),
        Verb::Init(args) => verbs::init::run(args),
        Verb::Join(args) => verbs::join::run(args),
        Verb::Ca(verb) => verbs::ca::run(verb),
        Verb::Node(verb) => verbs::node::run(verb),
        Verb::Raft(verb) => verbs::raft::run(verb),
        Verb::Experts(verb) => verbs::experts::run(verb),
        Verb::Token(verb) => verbs::token::run(verb),
        Verb::Tenant(verb) => verbs::tenant::run(verb),
        Verb::Key(verb) => verbs::key::run(verb),
        Verb::Residency(verb) => verbs::residency::run(verb),
        Verb::Audit(verb) => verbs::audit::run(verb),
        Verb::Link(verb) => verbs::link::run(verb),
        Verb::Model(args) => verbs::model::run(args),
        Verb::Coordinator(args) => verbs::coordinator::run(args),
        Verb::ExpertNode(args) => verbs::expert_node::run(args),
        Verb::Witness(args) => verbs::witness::run(args),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::Cli;

    #[test]
    fn every_flag_has_a_help_text_and_an_environment_variable() {
        let root = Cli::command();
        root.clone().debug_assert();
        check(&root);
    }

    fn check(command: &clap::Command) {
        for flag in command.get_arguments().filter(|flag| !flag.is_positional()) {
            let id = format!("{} --{}", command.get_name(), flag.get_id());
            assert!(flag.get_help().is_some(), "{id} has no help");
            let env = flag.get_env().unwrap_or_else(|| panic!("{id} has no variable"));
            assert!(env.to_string_lossy().starts_with("ENTENTE_"), "{id} reads {env:?}");
        }
        command.get_subcommands().for_each(check);
    }
}
