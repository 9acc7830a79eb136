//! Certificates for the processes of a cluster on one machine, new at each start.
//!
//! Each region has a CA of its own, and nothing of an earlier start is believed.
//!
//! ```text
//!   ca.pem                the certificates of all CAs: what every process believes
//!   ca/<region>.pem,.key  one CA: what a coordinator of the region may sign with
//!   <name>.pem,.key       one process
//! ```

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use entente_membership::roster::Roster;
use entente_membership::service::{LEAF_LIFE_S_MAX, LEAF_LIFE_S_MIN};
use entente_proto::identity::{Identity, Role as IdentityRole};
use entente_proto::ids::{NodeName, Region};
use entente_tls::{Authority, Files};

use super::plan::{Member, Role};
use crate::exit::Misuse;
use crate::operator::lifetime::Lifetime;

/// Life of what nobody renews: an operator's certificate, and those of a cluster without voters.
pub const UNRENEWED: Duration = Duration::from_secs(30 * 24 * 3_600);

/// No process of one start lives for so long.
const CA_VALID: Duration = Duration::from_secs(10 * 365 * 24 * 3_600);

/// How long a process's certificate lives, as `--certificate-life` says it.
///
/// # Errors
/// It is out of its bounds. A process would say which key of its configuration is wrong, and no flag.
pub fn certificate_life(Lifetime(life): Lifetime) -> Result<Duration, Misuse> {
    if (LEAF_LIFE_S_MIN..=LEAF_LIFE_S_MAX).contains(&life.as_secs()) {
        return Ok(life);
    }
    let days = LEAF_LIFE_S_MAX / 86_400;
    Err(Misuse(format!("--certificate-life must be {LEAF_LIFE_S_MIN}s to {days}d")))
}

/// Where the files of the process `name` are in `folder`.
pub fn files(folder: &Path, name: &NodeName) -> Files {
    let path = |file: String| -> PathBuf { folder.join(file) };
    Files {
        ca: path("ca.pem".to_owned()),
        certificate: path(format!("{name}.pem")),
        key: path(format!("{name}.key")),
    }
}

/// The name in the certificate of whoever gives orders to the cluster from the command line.
pub fn operator() -> NodeName {
    "operator".parse().expect("the word is a valid name")
}

/// The folder with the CAs' certificates and keys.
pub fn ca_dir(folder: &Path) -> PathBuf {
    folder.join("ca")
}

/// Makes a CA for each region and writes a certificate of this life and a key for each of `members`,
/// and for an operator in the first one's region, to `folder`.
pub fn mint(
    folder: &Path,
    roster: &Roster,
    members: &[Member],
    life: Duration,
) -> anyhow::Result<()> {
    let cannot = || format!("cannot write certificates to {}", folder.display());
    let make_dir = |dir: &Path| fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    make_dir(&ca_dir(folder)).with_context(cannot)?;
    let authorities = authorities(roster, members)?;
    let mut all = String::new();
    for (region, authority) in &authorities {
        let ca = ca_dir(folder).join(region.as_str());
        all.push_str(authority.certificate_pem());
        write(&ca.with_extension("pem"), authority.certificate_pem(), 0o644)
            .with_context(cannot)?;
        write(&ca.with_extension("key"), &authority.key_pem(), 0o600).with_context(cannot)?;
    }
    let operator = members.first().map(|member| Identity {
        role: IdentityRole::Operator,
        node: operator(),
        ..identity(roster, member)
    });
    let members = members.iter().map(|member| identity(roster, member));
    for identity in members.chain(operator) {
        let files = files(folder, &identity.node);
        let life = if identity.role == IdentityRole::Operator { UNRENEWED } else { life };
        let issued = authorities[&identity.region].issue(&identity, life)?;
        write(&files.ca, &all, 0o644).with_context(cannot)?;
        write(&files.certificate, &issued.certificate_pem, 0o644).with_context(cannot)?;
        write(&files.key, &issued.key_pem, 0o600).with_context(cannot)?;
    }
    Ok(())
}

/// One CA for each region that has a member.
fn authorities(roster: &Roster, members: &[Member]) -> anyhow::Result<BTreeMap<Region, Authority>> {
    let mut authorities = BTreeMap::new();
    for member in members {
        let Identity { cluster, region, .. } = identity(roster, member);
        if let Entry::Vacant(free) = authorities.entry(region) {
            free.insert(Authority::new(&cluster, region, CA_VALID)?);
        }
    }
    Ok(authorities)
}

fn identity(roster: &Roster, member: &Member) -> Identity {
    let role = match member.role {
        Role::Coordinator => IdentityRole::Coordinator,
        Role::ExpertNode => IdentityRole::Expert,
        Role::Witness => IdentityRole::Witness,
    };
    let cluster = roster.expect(role, None).cluster;
    Identity { cluster, region: member.region, role, node: member.name.clone() }
}

/// Writes a new file, so that nobody has an old one open and its mode is this one from the start.
fn write(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use entente_tls::Credentials;

    use super::*;
    use crate::cluster::plan::{self, Regions};

    #[test]
    fn each_process_gets_its_own_identity_and_a_key_that_nobody_else_reads() {
        let members = "fr=1,se=1".parse::<Regions>().unwrap().members();
        let nodes = members.iter().filter(|member| member.role == Role::ExpertNode);
        let roster = plan::roster(1, nodes.cloned().map(|member| (member, None))).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let life = Duration::from_secs(60);
        // Twice, as a second `up` in the same folder does.
        mint(dir.path(), &roster, &members, life).unwrap();
        mint(dir.path(), &roster, &members, life).unwrap();
        for member in &members {
            let files = files(dir.path(), &member.name);
            let credentials = Credentials::load(&files).unwrap();
            assert_eq!(*credentials.identity(), identity(&roster, member));
            assert!(credentials.expires() <= std::time::SystemTime::now() + life);
            let mode = fs::metadata(&files.key).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
            let ca = ca_dir(dir.path()).join(member.region.as_str());
            let key = fs::read_to_string(ca.with_extension("key")).unwrap();
            let certificate = fs::read_to_string(ca.with_extension("pem")).unwrap();
            let authority = Authority::from_pem(&certificate, &key).unwrap();
            assert_eq!(*authority.domain(), credentials.identity().domain());
            let mode = fs::metadata(ca.with_extension("key")).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        let operator = Credentials::load(&files(dir.path(), &operator())).unwrap();
        assert_eq!(
            operator.identity().to_string(),
            "spiffe://local/region/fr/role/operator/node/operator"
        );
    }
}
