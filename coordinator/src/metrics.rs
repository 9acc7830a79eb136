//! Counters and gauges of one coordinator, in the Prometheus text format.
//!
//! Expert choices reveal text, so they are only ever counted over everything that the process has
//! served, never by request, tenant or time.

use entente_proto::ids::LayerId;
use entente_router::gate::Choice;
use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

use crate::link::NcclMetrics;

/// Handles to everything that is measured. Names follow vLLM's where there is one.
pub struct Metrics {
    registry: Registry,
    /// Sequences that hold KV blocks.
    pub requests_running: IntGauge,
    /// Sequences that wait.
    pub requests_waiting: IntGauge,
    /// KV blocks in use.
    pub kv_blocks_used: IntGauge,
    /// KV blocks in all.
    pub kv_blocks_total: IntGauge,
    /// Prompt tokens computed, recomputed ones included.
    pub prompt_tokens: IntCounter,
    /// Tokens generated.
    pub generation_tokens: IntCounter,
    /// Sequences that gave their blocks back to be recomputed later.
    pub preemptions: IntCounter,
    /// Prompt rows taken from the prefix cache instead of being computed.
    pub prefix_rows_reused: IntCounter,
    /// Tokens that were guessed and computed.
    pub draft_tokens: IntCounter,
    /// Guessed tokens that were right.
    pub accepted_tokens: IntCounter,
    /// Finished requests by reason.
    pub finished: IntCounterVec,
    /// Requests that were answered with an error, by its code.
    pub refused_requests: IntCounterVec,
    /// Frames sent to expert nodes, repeated ones included.
    pub frames_sent: IntCounter,
    /// (row, expert) pairs sent to expert nodes, repeated ones included, by the node's region.
    pub expert_rows: IntCounterVec,
    /// Links that broke while an exchange waited.
    pub link_breaks: IntCounter,
    /// (row, expert) pairs asked of a second node because the first was slow.
    pub hedged_rows: IntCounter,
    /// (row, expert) pairs sent again because the first attempt came to nothing.
    pub retried_rows: IntCounter,
    /// Rows that another kernel class computed than the one that their expert's rows belong to.
    pub crossed_rows: IntCounter,
    /// What the cluster has agreed on, as this process knows it.
    pub cluster: ClusterMetrics,
    /// What travels by NCCL.
    pub nccl: NcclMetrics,
    /// Whether a step waits for experts that are missing.
    pub step_waiting: IntGauge,
    /// Attempts at a step that came to nothing, and were or will be made again.
    pub steps_held: IntCounter,
    /// Wall-clock time of a step that was computed.
    pub step_seconds: Histogram,
    /// Time from a request's arrival to its first token.
    pub ttft_seconds: Histogram,
    gate_rows: IntCounterVec,
    cache_config: IntGaugeVec,
    device: IntGaugeVec,
}

/// Gauges of the control plane.
pub struct ClusterMetrics {
    /// The committed membership that the engine works by.
    pub membership_epoch: IntGauge,
    /// The committed placement that the engine works by.
    pub placement_epoch: IntGauge,
    /// Whether this process leads the raft group.
    pub raft_leader: IntGauge,
    /// Whether this process knows who leads the raft group.
    pub raft_has_leader: IntGauge,
    /// The raft term that this process is in.
    pub raft_term: IntGauge,
    /// Records under the checkpoint of this coordinator's audit log that the cluster has committed.
    pub audit_committed: IntGauge,
    /// Records under the latest checkpoint of it that each witness has cosigned.
    pub audit_cosigned: IntGaugeVec,
    /// Checkpoints of this coordinator's audit log that contradicted what is committed or cosigned.
    pub audit_alarms: IntCounter,
}

impl ClusterMetrics {
    fn new(
        registry: &Registry,
        gauge: &impl Fn(&str, &str) -> IntGauge,
        counter: &impl Fn(&str, &str) -> IntCounter,
    ) -> Self {
        Self {
            membership_epoch: gauge("membership_epoch", "Committed membership in use."),
            placement_epoch: gauge("placement_epoch", "Committed placement in use."),
            raft_leader: gauge("raft_leader", "1 while this process leads the raft group."),
            raft_has_leader: gauge(
                "raft_has_leader",
                "1 while this process knows who leads the raft group, itself or another.",
            ),
            raft_term: gauge("raft_term", "Raft term that this process is in."),
            audit_committed: gauge(
                "audit_committed_records",
                "Records of the audit log that the cluster has committed a checkpoint of.",
            ),
            audit_cosigned: register(registry, cosigned()),
            audit_alarms: counter(
                "audit_alarms_total",
                "Checkpoints of the audit log that contradicted what is committed or cosigned.",
            ),
        }
    }
}

fn nccl(
    gauge: &impl Fn(&str, &str) -> IntGauge,
    counter: &impl Fn(&str, &str) -> IntCounter,
) -> NcclMetrics {
    NcclMetrics {
        links: gauge("nccl_links", "Links whose rows travel by NCCL."),
        opened: counter("nccl_opened_total", "Links whose rows began to travel by NCCL."),
        failures: counter(
            "nccl_failures_total",
            "Attempts to have rows travel by NCCL that failed, and such links that broke.",
        ),
        sent_bytes: counter("nccl_sent_bytes_total", "Bytes of rows sent by NCCL."),
        received_bytes: counter("nccl_received_bytes_total", "Bytes of rows received by NCCL."),
    }
}

fn cosigned() -> Result<IntGaugeVec, prometheus::Error> {
    let help = "Records of the audit log that a witness has cosigned a checkpoint of.";
    let name = "audit_cosigned_records";
    IntGaugeVec::new(Opts::new(format!("entente_{name}"), help), &["witness"])
}

fn device() -> Result<IntGaugeVec, prometheus::Error> {
    let help = "Where the coordinator's part of the model is computed.";
    IntGaugeVec::new(Opts::new("entente_device_info", help), &["device", "kernel_class"])
}

/// From a small model's step on one machine to a large prefill over a network.
const SECONDS_BUCKETS: [f64; 15] =
    [0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

fn cache_config(registry: &Registry) -> IntGaugeVec {
    register(
        registry,
        IntGaugeVec::new(
            Opts::new("entente_cache_config_info", "What the KV cache is made of."),
            &["cache_dtype", "block_size"],
        ),
    )
}

/// The commonest reason is there before it happens, so that whoever looks for changes sees the first.
fn refused_requests(registry: &Registry) -> IntCounterVec {
    let help = "Requests that were answered with an error, by its code.";
    let opts = Opts::new("entente_refused_requests_total", help);
    let counters = register(registry, IntCounterVec::new(opts, &["reason"]));
    counters.with_label_values(&["invalid_api_key"]);
    counters
}

impl Metrics {
    /// Registers everything under the prefix `entente_`.
    pub fn new() -> Self {
        let registry = Registry::new();
        let gauge = |name: &str, help: &str| {
            register(&registry, IntGauge::new(format!("entente_{name}"), help))
        };
        let counter = |name: &str, help: &str| {
            register(&registry, IntCounter::new(format!("entente_{name}"), help))
        };
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let opts = Opts::new(format!("entente_{name}"), help);
            register(&registry, IntCounterVec::new(opts, labels))
        };
        let seconds = |name: &str, help: &str| {
            let opts = HistogramOpts::new(format!("entente_{name}"), help);
            register(&registry, Histogram::with_opts(opts.buckets(SECONDS_BUCKETS.to_vec())))
        };
        Self {
            requests_running: gauge("requests_running", "Sequences that hold KV blocks."),
            requests_waiting: gauge("requests_waiting", "Sequences that wait for blocks."),
            kv_blocks_used: gauge("kv_blocks_used", "KV cache blocks in use."),
            kv_blocks_total: gauge("kv_blocks_total", "KV cache blocks in all."),
            prompt_tokens: counter("prompt_tokens_total", "Prompt tokens computed."),
            generation_tokens: counter("generation_tokens_total", "Tokens generated."),
            preemptions: counter("preemptions_total", "Sequences set back to be recomputed."),
            prefix_rows_reused: counter(
                "prefix_rows_reused_total",
                "Rows taken from the prefix cache instead of being computed.",
            ),
            draft_tokens: counter(
                "speculation_draft_tokens_total",
                "Tokens guessed from earlier text and computed.",
            ),
            accepted_tokens: counter("speculation_accepted_tokens_total", "Right guesses."),
            finished: counters(
                "requests_finished_total",
                "Requests by how they ended.",
                &["reason"],
            ),
            refused_requests: refused_requests(&registry),
            frames_sent: counter("exchange_frames_total", "Frames sent to expert nodes."),
            expert_rows: counters(
                "expert_rows_total",
                "(row, expert) pairs sent to expert nodes, by the region of the node.",
                &["region"],
            ),
            link_breaks: counter("exchange_link_breaks_total", "Links broken during an exchange."),
            hedged_rows: counter("hedged_rows_total", "Rows asked of a second, faster replica."),
            retried_rows: counter("retried_rows_total", "Rows sent again after a failure."),
            crossed_rows: counter("crossed_rows_total", "Rows sent to another kernel class."),
            cluster: ClusterMetrics::new(&registry, &gauge, &counter),
            nccl: nccl(&gauge, &counter),
            step_waiting: gauge("step_waiting", "1 while a step waits for missing experts."),
            steps_held: counter(
                "steps_held_total",
                "Attempts at a step that came to nothing for want of experts.",
            ),
            step_seconds: seconds("step_seconds", "Wall-clock time of one engine step."),
            ttft_seconds: seconds("time_to_first_token_seconds", "Arrival to first token."),
            gate_rows: counters(
                "gate_rows_total",
                "Rows routed to each expert since the process started.",
                &["layer", "expert"],
            ),
            cache_config: cache_config(&registry),
            device: register(&registry, device()),
            registry,
        }
    }

    /// Tells how the KV cache keeps keys and values: two coordinators that differ in it may differ
    /// in their output too. The value is always 1.
    pub fn tell_cache(&self, dtype: &str, block_len: usize) {
        self.cache_config.with_label_values(&[dtype, &block_len.to_string()]).set(1);
    }

    /// Tells where the coordinator's part of the model is computed, and which bits that gives. The
    /// value is always 1.
    pub fn tell_device(&self, device: &str, kernel_class: &str) {
        self.device.with_label_values(&[device, kernel_class]).set(1);
    }

    /// Counts what the gate of one layer chose.
    pub fn count_choices(&self, layer: LayerId, choices: &[Choice]) {
        let mut counts = std::collections::BTreeMap::new();
        for choice in choices {
            *counts.entry(choice.expert).or_insert(0u64) += 1;
        }
        let layer = layer.to_string();
        for (expert, count) in counts {
            self.gate_rows.with_label_values(&[layer.as_str(), &expert.to_string()]).inc_by(count);
        }
    }

    /// Everything, in the text format.
    pub fn render(&self) -> String {
        let mut text = String::new();
        let encoder = prometheus::TextEncoder::new();
        if let Err(error) = encoder.encode_utf8(&self.registry.gather(), &mut text) {
            tracing::error!(%error, "metrics could not be written");
        }
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Names are constants of this file, so registering cannot fail once a test has run it.
fn register<M>(registry: &Registry, metric: Result<M, prometheus::Error>) -> M
where
    M: prometheus::core::Collector + Clone + 'static,
{
    let metric = metric.expect("a metric's name and labels are valid");
    registry.register(Box::new(metric.clone())).expect("a metric is registered once");
    metric
}

#[cfg(test)]
mod tests {
    use super::*;
    use entente_proto::ids::ExpertId;

    #[test]
    fn what_decides_bits_of_the_output_is_told() {
        let metrics = Metrics::new();
        metrics.tell_cache("bf16", 16);
        metrics.tell_device("cuda:0", "bf16/cuda-sm90/1");
        let text = metrics.render();
        for line in [
            "entente_cache_config_info{block_size=\"16\",cache_dtype=\"bf16\"} 1",
            "entente_device_info{device=\"cuda:0\",kernel_class=\"bf16/cuda-sm90/1\"} 1",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }

    #[test]
    fn choices_are_counted_by_layer_and_expert_over_everything() {
        let metrics = Metrics::new();
        let choice = |expert| Choice { expert: ExpertId(expert), weight: 0.5 };
        metrics.count_choices(LayerId(3), &[choice(1), choice(2), choice(1)]);
        metrics.count_choices(LayerId(3), &[choice(1)]);
        let text = metrics.render();
        assert!(text.contains("entente_gate_rows_total{expert=\"1\",layer=\"3\"} 3"), "{text}");
    }
}
