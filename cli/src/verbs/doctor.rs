//! `entente doctor`: says what a machine offers, before anything is started on it.

use std::io::{self, Write};

use clap::{Args, Subcommand};
use entente_model::kernels::DeviceError;
use entente_model::kernels::cuda::{self, DeviceReport, Survey};
use serde::Serialize;

use crate::cluster::columns;
use crate::operator::{Output, or_dash};

/// What can be looked at.
#[derive(Debug, Subcommand)]
pub enum DoctorVerb {
    /// Show the CUDA driver, its devices, and the libraries that are used with them. A machine
    /// without any is no failure: the command then says what is missing.
    Gpu(GpuArgs),
}

/// The flags of `entente doctor gpu`.
#[derive(Debug, Args)]
pub struct GpuArgs {
    /// How the answer is written to standard output.
    #[arg(short, long, env = "ENTENTE_OUTPUT", value_enum, default_value = "table")]
    output: Output,
}

/// What was found.
#[derive(Debug, Serialize)]
struct Gpu {
    /// CUDA's driver: its version is that of the CUDA it speaks.
    driver: Part,
    /// The compiler of the kernels.
    nvrtc: Part,
    /// The library for exchanges between devices.
    nccl: Part,
    /// NVIDIA's matrix product, beside which `entente bench kernels` measures; nothing serves by it.
    cublas: Part,
    devices: Vec<Device>,
}

/// A library.
#[derive(Debug, Serialize)]
struct Part {
    /// Absent when it is not there.
    version: Option<String>,
    /// Why it is not.
    missing: Option<String>,
}

/// A device, or why it tells nothing of itself.
#[derive(Debug, Default, Serialize)]
struct Device {
    /// As `--device` takes it.
    device: String,
    name: Option<String>,
    uuid: Option<String>,
    architecture: Option<String>,
    memory_bytes: Option<u64>,
    bandwidth_bytes_s: Option<u64>,
    error: Option<String>,
}

/// Looks and prints.
pub fn run(verb: DoctorVerb) -> anyhow::Result<()> {
    let DoctorVerb::Gpu(args) = verb;
    let gpu = Gpu::of(cuda::survey());
    let text = match args.output {
        Output::Table => gpu.table(),
        Output::Json => serde_json::to_string_pretty(&gpu)?,
    };
    writeln!(io::stdout().lock(), "{text}")?;
    Ok(())
}

impl Part {
    fn of(found: Result<(u32, u32), DeviceError>) -> Self {
        match found {
            Ok((major, minor)) => Self { version: Some(format!("{major}.{minor}")), missing: None },
            Err(error) => Self { version: None, missing: Some(sentence(error)) },
        }
    }
}

/// What is missing, without the words around it that a log would need.
pub(super) fn sentence(error: DeviceError) -> String {
    match error {
        DeviceError::Unavailable(why) => why,
        error => error.to_string(),
    }
}

impl Device {
    fn of(ordinal: usize, found: Result<DeviceReport, DeviceError>) -> Self {
        let device = format!("cuda:{ordinal}");
        match found {
            Ok(report) => Self {
                device,
                name: Some(report.name),
                uuid: Some(report.uuid),
                architecture: Some(report.architecture.to_string()),
                memory_bytes: Some(report.memory_bytes),
                bandwidth_bytes_s: Some(report.bandwidth_bytes_s),
                error: None,
            },
            Err(error) => Self { device, error: Some(sentence(error)), ..Self::default() },
        }
    }
}

impl Gpu {
    fn of(survey: Survey) -> Self {
        let devices = survey.devices.into_iter().enumerate();
        Self {
            driver: Part::of(survey.driver),
            nvrtc: Part::of(survey.nvrtc),
            nccl: Part::of(survey.nccl),
            cublas: Part::of(survey.cublas),
            devices: devices.map(|(ordinal, found)| Device::of(ordinal, found)).collect(),
        }
    }

    fn table(&self) -> String {
        let mut parts = columns(["PART", "VERSION", "MISSING"]);
        for (name, part) in [
            ("driver", &self.driver),
            ("nvrtc", &self.nvrtc),
            ("nccl", &self.nccl),
            ("cublas", &self.cublas),
        ] {
            let (version, missing) = (part.version.as_ref(), part.missing.as_ref());
            parts.add_row([name.to_owned(), or_dash(version), or_dash(missing)]);
        }
        if self.devices.is_empty() {
            return parts.trim_fmt();
        }
        let header = ["DEVICE", "NAME", "ARCHITECTURE", "MEMORY", "BANDWIDTH", "UUID", "ERROR"];
        let mut devices = columns(header);
        for device in &self.devices {
            let memory =
                device.memory_bytes.map(|n| format!("{:.1} GiB", n as f64 / 2_f64.powi(30)));
            let bandwidth = device.bandwidth_bytes_s.map(|n| format!("{:.0} GB/s", n as f64 / 1e9));
            devices.add_row([
                device.device.clone(),
                or_dash(device.name.as_ref()),
                or_dash(device.architecture.as_ref()),
                or_dash(memory),
                or_dash(bandwidth),
                or_dash(device.uuid.as_ref()),
                or_dash(device.error.as_ref()),
            ]);
        }
        format!("{}\n\n{}", parts.trim_fmt(), devices.trim_fmt())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_a_sentence_and_what_is_there_has_a_version() {
        let unavailable = || DeviceError::Unavailable("there is no such library".to_owned());
        let survey = Survey {
            driver: Ok((12, 4)),
            nvrtc: Err(unavailable()),
            nccl: Ok((2, 27)),
            cublas: Err(unavailable()),
            devices: vec![Err(DeviceError::Lost("fell off the bus".to_owned()))],
        };
        let gpu = Gpu::of(survey);
        let table = gpu.table();
        let row = |of: &str| table.lines().find(|line| line.trim().starts_with(of)).unwrap();
        assert!(row("driver").contains("12.4"), "{table}");
        assert!(row("nvrtc").contains("there is no such library"), "{table}");
        assert!(row("cuda:0").contains("fell off the bus"), "{table}");
        let json = serde_json::to_value(&gpu).unwrap();
        assert_eq!(json["nvrtc"]["version"], serde_json::Value::Null);
        assert_eq!(json["nccl"]["version"], "2.27");
    }
}
