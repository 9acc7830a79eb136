//! `entente audit`: what was done with each request, from the folders in which coordinators record it.
//!
//! Everything here works on files and asks no process, so that it can be done where no cluster is.

mod export;
mod prove;
mod report;
mod source;
mod tail;
mod verify;

use clap::Subcommand;

/// What can be done with audit logs.
#[derive(Debug, Subcommand)]
pub enum AuditVerb {
    /// Print the latest records, and on request those that come.
    Tail(tail::TailArgs),
    /// Write a log, or the records of a tenant, with their proofs into one file.
    Export(export::ExportArgs),
    /// Check a log's folder, an export or a proof, without asking anybody.
    Verify(verify::VerifyArgs),
    /// Write the proof of one request's record.
    Prove(prove::ProveArgs),
    /// Write where a tenant's requests were worked on in a month.
    Report(report::ReportArgs),
}

/// Does it.
pub fn run(verb: AuditVerb) -> anyhow::Result<()> {
    match verb {
        AuditVerb::Tail(args) => tail::run(args),
        AuditVerb::Export(args) => export::run(args),
        AuditVerb::Verify(args) => verify::run(args),
        AuditVerb::Prove(args) => prove::run(args),
        AuditVerb::Report(args) => report::run(args),
    }
}
