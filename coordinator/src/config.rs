//! The coordinator's configuration file. Unknown keys are an error that names the key.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use entente_membership::net::http;
use entente_membership::roster::Roster;
use entente_model::kernels::{DeviceId, KvDtype, WeightFormat};
use entente_proto::ids::{NodeName, Region};
use serde::{Deserialize, Serialize};

use crate::residency::Endpoints;

/// How long a body may take unless the configuration says otherwise.
const BODY_WAIT_MAX: Duration = Duration::from_secs(30);

/// A coordinator, as TOML.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// This process's name.
    pub name: NodeName,
    /// The country that it stands in; it uses expert nodes of this country only.
    pub region: Region,
    /// Address of the public API, such as `127.0.0.1:8080`; port 0 picks a free one.
    pub http: String,
    /// The checkpoint folder, in Hugging Face format or packed.
    pub model: PathBuf,
    /// How weights are kept: `f32`, `bf16`, `q8`, `fp8` or `q4`.
    pub weights: WeightFormat,
    /// Threads for arithmetic; all cores when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Where the coordinator's part of the model is computed: `cpu`, or `cuda:N` for the CUDA device
    /// of this number.
    #[serde(default, skip_serializing_if = "is_cpu")]
    pub device: DeviceId,
    /// How expert nodes are reached.
    #[serde(default)]
    pub transport: Transport,
    /// Name of the model in the API; the folder's name when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub served_model_name: Option<String>,
    /// The public API.
    #[serde(default)]
    pub api: ApiConfig,
    /// Bounds on what runs at once.
    #[serde(default)]
    pub engine: EngineConfig,
    /// Certificate, key and CAs; without them expert nodes are reached on loopback only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<entente_tls::Files>,
    /// Where records of requests are kept; none are without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit: Option<crate::ledger::Config>,
    /// Where rows may travel from GPU to GPU, unencrypted; nowhere when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nccl: Option<entente_expert_node::NcclConfig>,
    /// This process's voter; needed where the cluster has voters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub membership: Option<entente_membership::service::Config>,
    /// The cluster's founders, and the expert nodes that it begins with.
    pub cluster: Roster,
}

impl Config {
    /// Names what the section `[nccl]` lacks, or the first value in it that is out of bounds.
    pub fn check_nccl(&self) -> Result<(), String> {
        let Some(nccl) = &self.nccl else { return Ok(()) };
        let lacks = if self.device == DeviceId::Cpu {
            Some("device = \"cuda:N\"")
        } else if self.tls.is_none() {
            Some("the section [tls]")
        } else if self.transport != Transport::Stream {
            Some("transport = \"stream\"")
        } else {
            None
        };
        if let Some(lacks) = lacks {
            return Err(format!("nccl: the section needs {lacks}"));
        }
        nccl.check()
            .map_err(|(key, have, min, max)| format!("{key} is {have}, allowed is {min} to {max}"))
    }
}

fn is_cpu(device: &DeviceId) -> bool {
    *device == DeviceId::Cpu
}

/// The public API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ApiConfig {
    /// Where the coordinators of all regions are asked, by region: a client whose request may not
    /// be served here is told one of these.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub endpoints: Endpoints,
    /// Whether nobody has to show a key. Only on loopback: whoever reaches this address then may ask
    /// for anything, as nobody. Without effect where the cluster has no voters, and so no keys.
    pub open: bool,
    /// Connections at once; further ones are answered with 503.
    pub connections_max: usize,
    /// Those of one host among them. A proxy is one host.
    pub connections_of_host_max: usize,
    /// How long the head of a request may take, and how long a connection may wait for the next one.
    pub head_wait_max_ms: u64,
    /// How long a body may take from the first look at its request to its last byte.
    pub body_wait_max_ms: u64,
}

impl Default for ApiConfig {
    fn default() -> Self {
        Self {
            endpoints: Endpoints::new(),
            open: false,
            connections_max: http::CONNECTIONS_MAX,
            connections_of_host_max: http::CONNECTIONS_OF_HOST_MAX,
            head_wait_max_ms: http::HEAD_WAIT_MAX.as_millis() as u64,
            body_wait_max_ms: BODY_WAIT_MAX.as_millis() as u64,
        }
    }
}

impl ApiConfig {
    /// Names the first value that is out of bounds.
    pub fn check(&self) -> Result<(), String> {
        let bounds = [
            ("connections_max", self.connections_max as u64, 1, 1 << 20),
            ("connections_of_host_max", self.connections_of_host_max as u64, 1, 1 << 20),
            ("head_wait_max_ms", self.head_wait_max_ms, 1, 600_000),
            ("body_wait_max_ms", self.body_wait_max_ms, 1, 600_000),
        ];
        check("api", bounds)
    }

    /// What clients may take of the listener.
    pub(crate) fn bounds(&self) -> http::Bounds {
        http::Bounds {
            connections_max: self.connections_max,
            connections_of_host_max: self.connections_of_host_max,
            head_wait_max: Duration::from_millis(self.head_wait_max_ms),
        }
    }
}

/// Names the first key of a section whose value is out of its bounds.
fn check<const N: usize>(section: &str, bounds: [(&str, u64, u64, u64); N]) -> Result<(), String> {
    match bounds.into_iter().find(|(_, value, min, max)| !(*min..=*max).contains(value)) {
        None => Ok(()),
        Some((key, value, min, max)) => {
            Err(format!("{section}.{key} is {value}, allowed is {min} to {max}"))
        }
    }
}

/// How expert nodes are reached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Over the network, frames on a byte stream: the least work for each frame.
    #[default]
    Stream,
    /// Over the network, frames in a gRPC stream.
    Grpc,
    /// In this process: the expert nodes of the region run here.
    Inproc,
}

/// Whether sequences that repeat themselves are decoded several tokens a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Speculation {
    /// Where it is expected to pay. The answers are the same, to the last digit.
    #[default]
    Auto,
    /// Never.
    Off,
}

/// Bounds of the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineConfig {
    /// Rows (decoding sequences and prompt tokens together) of one step.
    pub step_rows_max: usize,
    /// Prompt tokens of a step in which other sequences decode: more of them bring a prompt to its
    /// end sooner, fewer make the others' tokens come more evenly.
    pub prefill_rows_beside_decode_max: usize,
    /// Rows that each half of a step must have for the step to be cut in two, so that one half
    /// attends while the other is with its experts. Both halves read the weights, which small ones
    /// do not make up for. Without effect where expert nodes run in this process.
    pub micro_batch_rows_min: usize,
    /// Sequences that are worked on at once.
    pub running_max: usize,
    /// Sequences that wait beyond those; more are refused with 503.
    pub waiting_max: usize,
    /// Sequences of one tenant that wait; more of its own are refused with 429.
    pub tenant_waiting_max: usize,
    /// Memory of the KV cache in MiB; it bounds prompt and answer together. When absent 256, and on
    /// a device most of the memory that is free once everything else is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_cache_mib: Option<usize>,
    /// How keys and values are kept: `f32` or `bf16`; what goes with the weights when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_dtype: Option<KvDtype>,
    /// Longest time that one exchange may take before it is begun anew.
    pub exchange_deadline_ms: u64,
    /// Longest time that a request waits for experts that are missing before it fails.
    pub request_wait_max_ms: u64,
    /// Whether tokens are guessed and verified.
    pub speculation: Speculation,
    /// Tokens that are guessed at once for one sequence at most.
    pub draft_tokens_max: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            step_rows_max: 512,
            prefill_rows_beside_decode_max: 128,
            micro_batch_rows_min: 128,
            running_max: 128,
            waiting_max: 1_024,
            tenant_waiting_max: 256,
            kv_cache_mib: None,
            kv_dtype: None,
            exchange_deadline_ms: 10_000,
            request_wait_max_ms: 30_000,
            speculation: Speculation::Auto,
            draft_tokens_max: 16,
        }
    }
}

impl EngineConfig {
    /// Names the first value that is out of bounds.
    pub fn check(&self) -> Result<(), String> {
        let rows_max = entente_proto::frame::ROWS_MAX as u64;
        let beside_decode_max = self.prefill_rows_beside_decode_max as u64;
        let bounds = [
            ("step_rows_max", self.step_rows_max as u64, 1, rows_max),
            ("prefill_rows_beside_decode_max", beside_decode_max, 1, rows_max),
            ("micro_batch_rows_min", self.micro_batch_rows_min as u64, 1, 65_536),
            ("running_max", self.running_max as u64, 1, 4_096),
            ("waiting_max", self.waiting_max as u64, 1, 65_536),
            ("tenant_waiting_max", self.tenant_waiting_max as u64, 1, 65_536),
            ("kv_cache_mib", self.kv_cache_mib.unwrap_or(1) as u64, 1, 1 << 20),
            ("exchange_deadline_ms", self.exchange_deadline_ms, 1, 600_000),
            ("request_wait_max_ms", self.request_wait_max_ms, 0, 600_000),
            ("draft_tokens_max", self.draft_tokens_max as u64, 1, 64),
        ];
        check("engine", bounds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_of_connections_are_the_usual_ones_unless_told_and_never_none() {
        let read = |text: &str| toml::from_str::<ApiConfig>(text).unwrap();
        assert_eq!(read("").bounds(), http::Bounds::default());
        let told = read("connections_max = 9\nhead_wait_max_ms = 5");
        assert_eq!(told.check(), Ok(()));
        assert_eq!(told.bounds().connections_max, 9);
        assert_eq!(told.bounds().head_wait_max, Duration::from_millis(5));
        let none = read("connections_of_host_max = 0").check().unwrap_err();
        assert_eq!(none, "api.connections_of_host_max is 0, allowed is 1 to 1048576");
    }
}
