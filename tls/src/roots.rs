//! The CAs of a cluster: one or more for each region, and each believed for its own region only.
//!
//! Whoever holds the CA key of one country can make processes of that country, and of no other.
//! The region is read from the leaf first and its CAs are then the only ones that may have signed
//! it, so there is no order in which CAs are tried and nothing that one CA says about another's
//! region. Several CAs of a region are for the time in which one takes over from another.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::SystemTime;

use entente_proto::identity::Identity;
use entente_proto::ids::{NodeName, Region};
use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use rustls::server::ParsedCertificate;

use crate::Error;
use crate::certificate::{self, Unfit, Validity, identity_in};
use crate::credentials::{provider, unusable};

/// The CAs of a cluster.
#[derive(Debug, Clone)]
pub struct Roots {
    cluster: NodeName,
    regions: BTreeMap<Region, Vec<Authority>>,
}

/// One CA. What is left of its certificate does not say how long it is valid, so that is kept too.
#[derive(Debug, Clone)]
struct Authority {
    certificate: CertificateDer<'static>,
    anchor: TrustAnchor<'static>,
    validity: Validity,
}

impl Roots {
    /// Reads a PEM file with the CAs of all regions.
    ///
    /// # Errors
    /// Names the file.
    pub fn load(file: &Path) -> Result<Self, Error> {
        let pem = std::fs::read(file).map_err(|error| unusable(file, &error))?;
        Self::from_pem(&pem).map_err(|error| unusable(file, &error))
    }

    /// The same from what the file holds.
    ///
    /// # Errors
    /// There is none, one is not the CA of a region, or they are of several clusters.
    pub fn from_pem(pem: &[u8]) -> Result<Self, Error> {
        Self::new(certificates(pem)?)
    }

    /// The same from the certificates themselves.
    ///
    /// # Errors
    /// As [`Roots::from_pem`].
    pub fn new(certificates: Vec<CertificateDer<'static>>) -> Result<Self, Error> {
        let mut cluster = None;
        let mut regions = BTreeMap::<Region, Vec<Authority>>::new();
        for certificate in certificates {
            let (domain, validity) = certificate::authority(&certificate)?;
            let first = cluster.get_or_insert_with(|| domain.clone());
            if first.cluster != domain.cluster {
                return Err(Unfit::Clusters(first.clone(), domain).into());
            }
            let anchor = webpki::anchor_from_trusted_cert(&certificate)
                .map_err(|error| Unfit::Encoding(error.to_string()))?
                .to_owned();
            let authority = Authority { certificate, anchor, validity };
            regions.entry(domain.region).or_default().push(authority);
        }
        let first = cluster.ok_or(rustls::Error::NoCertificatesPresented)?;
        Ok(Self { cluster: first.cluster, regions })
    }

    /// The cluster whose CAs these are.
    pub fn cluster(&self) -> &NodeName {
        &self.cluster
    }

    /// The regions that a CA speaks for.
    pub fn regions(&self) -> impl Iterator<Item = Region> + '_ {
        self.regions.keys().copied()
    }

    /// When the CAs of each region end: the first of them to do so.
    pub fn ends(&self) -> impl Iterator<Item = (Region, SystemTime)> + '_ {
        let first = |cas: &Vec<Authority>| cas.iter().map(|ca| ca.validity.end).min();
        self.regions.iter().filter_map(move |(region, cas)| Some((*region, first(cas)?)))
    }

    /// All CA certificates, by region.
    pub fn certificates(&self) -> impl Iterator<Item = &CertificateDer<'static>> {
        self.regions.values().flatten().map(|ca| &ca.certificate)
    }

    /// The CA certificates of a region.
    pub fn of_region(&self, region: Region) -> impl Iterator<Item = &CertificateDer<'static>> {
        self.regions.get(&region).into_iter().flatten().map(|ca| &ca.certificate)
    }

    /// All of them as PEM, as a file that is to be [loaded](Roots::load) holds them.
    pub fn to_pem(&self) -> String {
        let pem = |ca: &CertificateDer<'_>| pem::Pem::new("CERTIFICATE", ca.to_vec());
        pem::encode_many(&self.certificates().map(pem).collect::<Vec<_>>())
    }

    /// Who the holder of a certificate is, if a CA of its region says so at this time.
    /// `intermediates` are the certificates that came with it.
    ///
    /// # Errors
    /// Says what is wrong with the certificate.
    pub fn identify(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        at: SystemTime,
    ) -> Result<Identity, Error> {
        let domain = identity_in(certificate)?.domain();
        let ours = (domain.cluster == self.cluster).then(|| self.regions.get(&domain.region));
        let valid = ours.flatten().into_iter().flatten().filter(|ca| ca.validity.contains(at));
        let roots: Vec<_> = valid.map(|ca| ca.anchor.clone()).collect();
        if roots.is_empty() {
            return Err(Unfit::NoAuthority(domain).into());
        }
        let now = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(certificate)?,
            &RootCertStore { roots },
            intermediates,
            UnixTime::since_unix_epoch(now),
            provider().signature_verification_algorithms.all,
        )?;
        Ok(certificate::leaf(certificate)?.0)
    }

    /// Who the holder of a certificate was when it began to be valid, if a CA of its region issued
    /// it: for whoever reads what was signed long ago, when certificate and CA may have ended.
    ///
    /// # Errors
    /// As [`Self::identify`].
    pub fn identify_issued(&self, certificate: &CertificateDer<'_>) -> Result<Identity, Error> {
        let (_, validity) = certificate::leaf(certificate)?;
        self.identify(certificate, &[], validity.start)
    }
}

/// All certificates in a PEM text.
pub(crate) fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let certificates = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    certificates.map_err(|error| Unfit::Encoding(error.to_string()).into())
}
