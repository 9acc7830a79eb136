//! The CAs whose keys this process has, and what it issues with them.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use entente_proto::identity::{Identity, Role};
use entente_proto::ids::Region;
use entente_tls::Authority;
use tonic::Status;

use super::ServiceError;
use super::config::CaConfig;
use crate::net::Reason;

/// Life of an operator's certificate: people do not renew every day, and there is no process of
/// theirs that could.
const OPERATOR_LIFE: Duration = Duration::from_secs(30 * 24 * 3_600);

/// One CA a region at most.
pub(super) struct Authorities {
    of: BTreeMap<Region, Authority>,
    leaf_life: Duration,
}

impl Authorities {
    /// Reads every `<region>.pem` of the folder, with its key. Without a folder there are none.
    ///
    /// # Errors
    /// Names the file.
    pub(super) fn load(config: Option<&CaConfig>) -> Result<Self, ServiceError> {
        let Some(CaConfig { dir, leaf_life_s }) = config else {
            return Ok(Self { of: BTreeMap::new(), leaf_life: Duration::ZERO });
        };
        let wrong = |reason: &dyn std::fmt::Display| {
            ServiceError::Ca(format!("{}: {reason}", dir.display()))
        };
        let mut of = BTreeMap::new();
        for entry in std::fs::read_dir(dir).map_err(|error| wrong(&error))? {
            let path = entry.map_err(|error| wrong(&error))?.path();
            if path.extension().is_some_and(|extension| extension == "pem") {
                let authority = read(&path)?;
                let region = authority.domain().region;
                if of.insert(region, authority).is_some() {
                    return Err(wrong(&format_args!("there are two CAs of {region}")));
                }
            }
        }
        Ok(Self { of, leaf_life: Duration::from_secs(*leaf_life_s) })
    }

    /// The chain of a new certificate, PEM.
    ///
    /// # Errors
    /// Somebody else has the CA, or the request is none.
    pub(super) fn certify(&self, csr: &[u8], identity: &Identity) -> Result<String, Status> {
        let Some(authority) = self.of.get(&identity.region) else {
            let text = format!("the key of {}'s CA is not here", identity.region);
            return Err(Reason::NoAuthority.status(text));
        };
        let life = match identity.role {
            Role::Operator => OPERATOR_LIFE,
            _ => self.leaf_life,
        };
        let signed = authority.sign_request(csr, identity, life);
        signed.map_err(|error| Status::invalid_argument(error.to_string()))
    }
}

fn read(certificate: &Path) -> Result<Authority, ServiceError> {
    let key = certificate.with_extension("key");
    let text = |path: &Path| {
        std::fs::read_to_string(path)
            .map_err(|error| ServiceError::Ca(format!("{}: {error}", path.display())))
    };
    let authority = Authority::from_pem(&text(certificate)?, &text(&key)?);
    let wrong = |error| ServiceError::Ca(format!("{}: {error}", certificate.display()));
    let authority = authority.map_err(wrong)?;
    let named = certificate.file_stem().and_then(|stem| stem.to_str());
    if named != Some(&authority.domain().region.to_string()) {
        let text = format!("{}: it is the CA of {}", certificate.display(), authority.domain());
        return Err(ServiceError::Ca(text));
    }
    Ok(authority)
}
