//! `entente init`: founds a cluster on the machine of its first coordinator.
//!
//! It makes a CA for each region, the first coordinator's certificate and configuration, and an
//! operator's certificate. Nothing is started: `entente coordinator --config DIR/coordinator.toml`
//! does that, and `entente token create` and `entente join` bring in everybody else.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::Duration;

use clap::Args;
use entente_membership::roster::{Roster, RosterVoter, VoterRole};
use entente_membership::state::Role;
use entente_proto::identity::{self, Identity};
use entente_proto::ids::{NodeName, Region};
use entente_tls::Authority;
use serde_json::json;

use super::ca;
use crate::cluster::pki;
use crate::exit::Misuse;
use crate::operator::lifetime::Lifetime;
use crate::provision::{Folder, MachineArgs, Process, expect_absent, private_dir};

/// Life of the operator's certificate, which the verbs that use it renew.
const OPERATOR_LIFE: Duration = Duration::from_secs(30 * 24 * 3_600);

/// The flags of `entente init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// The cluster's name: 1 to 63 of a-z, 0-9 and -. It is in every certificate.
    #[arg(long, env = "ENTENTE_CLUSTER", value_name = "NAME")]
    cluster: NodeName,

    /// Its regions; the first coordinator stands in the first. Others can be added later.
    #[arg(long, env = "ENTENTE_CA_REGIONS", value_name = "CC,…", value_delimiter = ',')]
    #[arg(required = true)]
    regions: Vec<Region>,

    /// What the first coordinator is called; `<region>-coordinator` if absent.
    #[arg(long, env = "ENTENTE_NAME", value_name = "NAME")]
    name: Option<NodeName>,

    /// Copies of each expert in each region, each on a different node.
    #[arg(long, env = "ENTENTE_REPLICAS", value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    replicas: u16,

    /// How long a process's certificate lives, such as 24h; it is renewed when half of that is over.
    #[arg(long, env = "ENTENTE_CERTIFICATE_LIFE", value_name = "TIME", default_value = "24h")]
    certificate_life: Lifetime,

    #[command(flatten)]
    machine: MachineArgs,
}

/// Founds it.
pub fn run(args: InitArgs) -> anyhow::Result<()> {
    let region = args.regions[0];
    let name = match &args.name {
        Some(name) => name.clone(),
        None => format!("{region}-coordinator").parse()?,
    };
    let life = pki::certificate_life(args.certificate_life)?;
    let process = process(&args, name, region)?;
    let folder = Folder::open(&args.machine.dir)?;
    expect_absent(&folder.config(Role::Coordinator))?;
    expect_absent(&folder.files(&process.name).ca)?;
    let authorities = authorities(&args, &folder)?;
    let ca_pem: String = authorities.values().map(Authority::certificate_pem).collect();
    let own = identity(&args, region, identity::Role::Coordinator, process.name.clone());
    let issued = authorities[&region].issue(&own, life)?;
    let pair = format!("{}{}", issued.certificate_pem, issued.key_pem);
    folder.settle(&process, &args.machine, &ca_pem, &pair)?;
    let operator = identity(&args, region, identity::Role::Operator, pki::operator());
    let issued = authorities[&region].issue(&operator, OPERATOR_LIFE)?;
    let files = pki::files(&folder.root().join("tls"), &operator.node);
    folder.write(&files.certificate, &issued.certificate_pem)?;
    folder.write(&files.key, &issued.key_pem)?;
    folder.write(&folder.root().join("cluster.json"), &cluster_file(&args, &process)?)?;
    tell(&folder)
}

fn process(args: &InitArgs, name: NodeName, region: Region) -> anyhow::Result<Process> {
    let address = args.machine.advertise.as_ref().unwrap_or(&args.machine.listen);
    let voter = RosterVoter {
        name: name.clone(),
        region,
        role: VoterRole::Coordinator,
        address: address.clone(),
    };
    let roster = Roster::founded(args.cluster.to_string(), args.replicas, vec![voter]);
    let roster = roster.map_err(|error| Misuse(error.to_string()))?;
    Ok(Process {
        name,
        region,
        role: Role::Coordinator,
        roster,
        contacts: Vec::new(),
        joins: false,
        leaf_life_s: Some(args.certificate_life.0.as_secs()),
    })
}

fn authorities(args: &InitArgs, folder: &Folder) -> anyhow::Result<BTreeMap<Region, Authority>> {
    private_dir(&folder.ca_dir())?;
    let mut authorities = BTreeMap::new();
    for region in &args.regions {
        let authority = Authority::new(&args.cluster, *region, ca::LIFE)?;
        ca::write(&folder.ca_dir(), &authority)?;
        if authorities.insert(*region, authority).is_some() {
            return Err(Misuse(format!("--regions names {region} twice")).into());
        }
    }
    Ok(authorities)
}

fn identity(args: &InitArgs, region: Region, role: identity::Role, node: NodeName) -> Identity {
    Identity { cluster: args.cluster.clone(), region, role, node }
}

/// As `entente up` writes it, so that an operator's verbs find this cluster by `--data-dir`.
fn cluster_file(args: &InitArgs, process: &Process) -> anyhow::Result<String> {
    let http = format!("http://{}", args.machine.http);
    let control = process.roster.voters()[0].address.clone();
    let file = json!({
        "http": http,
        "endpoints": { process.region.to_string(): http },
        "control": { process.name.to_string(): control },
        "processes": [],
    });
    Ok(serde_json::to_string_pretty(&file)? + "\n")
}

/// What comes next, for a person. There is nothing for a program.
fn tell(folder: &Folder) -> anyhow::Result<()> {
    let dir = folder.root().display();
    writeln!(
        io::stderr(),
        "The cluster is founded. Start its first coordinator:\n\n  entente coordinator --config \
         {dir}/coordinator.toml\n\nThen make a token for each further process, and join there:\n\n  \
         entente token create --data-dir {dir} --region CC --role expert-node\n  entente join TOKEN \
         --dir DIR --name NAME --listen HOST:PORT\n\n{dir}/tls/ca holds the keys of all regions' CAs. \
         Whoever has one can be any process of its region: see docs/runbook.md for where each belongs."
    )?;
    Ok(())
}
