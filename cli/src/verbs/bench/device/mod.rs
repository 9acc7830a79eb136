//! `entente bench kernels --device cuda:N`: every kernel on a device, with fresh random inputs,
//! beside the rate at which the device copies its own memory and that of cuBLAS.
//!
//! Few rows can take no less time than reading the weights that they are multiplied with, many no
//! less than multiplying: one share tells of the former, the other of the latter. What share is good
//! is not for a program to say; docs/gpu.md has what is expected. The weights that are multiplied one
//! after the other are more than a device's caches hold, but for those of a gate.

mod experts;
mod machine;
mod rows;
mod shape;
mod trunk;

use comfy_table::Table;
use entente_model::kernels::{ExpertKernels, WeightFormat, cuda};
use serde::Serialize;

use super::kernels::KernelsArgs;
use crate::cluster::columns;
use machine::Machine;
pub use shape::{SHAPES, Shape, TRUNKS, Trunk};

/// One kernel at one number of rows.
#[derive(Debug, Serialize)]
struct Line {
    kernel: &'static str,
    /// Of experts hidden x inner x experts x top-k, of matrices outputs x inputs, of attention heads
    /// x key heads x values of a head and whose positions, else values of a row.
    shape: String,
    rows: usize,
    /// Experts that any row went to; median.
    experts: Option<f64>,
    /// Of the kernels alone; median.
    kernels_us: f64,
    /// Of the whole call, from the host's memory to it; median.
    call_us: Option<f64>,
    /// Weights read a second, or keys and values, or for what has neither values read and written.
    moved_gb_s: f64,
    share_of_copy: f64,
    multiply_tflop_s: Option<f64>,
    /// Of the rate of cuBLAS's large product.
    share_of_cublas: Option<f64>,
    /// What cuBLAS makes of the same product, or for experts of one of them.
    cublas_tflop_s: Option<f64>,
}

/// What a kernel has to do.
struct Work {
    moved_bytes: f64,
    operations: Option<f64>,
    /// Operations a second of cuBLAS for the same.
    cublas_flop_s: Option<f64>,
}

impl Line {
    fn new(
        kernel: &'static str,
        shape: String,
        rows: usize,
        us: f64,
        work: &Work,
        machine: &Machine,
    ) -> Self {
        let moved_bytes_s = work.moved_bytes / us * 1e6;
        let flop_s = work.operations.map(|operations| operations / us * 1e6);
        Self {
            kernel,
            shape,
            rows,
            experts: None,
            kernels_us: us,
            call_us: None,
            moved_gb_s: moved_bytes_s / 1e9,
            share_of_copy: moved_bytes_s / machine.copy_bytes_s,
            multiply_tflop_s: flop_s.map(|rate| rate / 1e12),
            share_of_cublas: flop_s.zip(machine.product_flop_s).map(|(own, best)| own / best),
            cublas_tflop_s: work.cublas_flop_s.map(|rate| rate / 1e12),
        }
    }

    fn cells(&self) -> [String; 11] {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let whole = |value: f64| format!("{value:.0}");
        let tenths = |value: f64| format!("{value:.1}");
        let percent = |share: f64| format!("{:.0} %", share * 100.0);
        [
            self.kernel.to_owned(),
            self.shape.clone(),
            self.rows.to_string(),
            or_dash(self.experts.map(whole)),
            tenths(self.kernels_us),
            or_dash(self.call_us.map(tenths)),
            whole(self.moved_gb_s),
            percent(self.share_of_copy),
            or_dash(self.multiply_tflop_s.map(tenths)),
            or_dash(self.share_of_cublas.map(percent)),
            or_dash(self.cublas_tflop_s.map(tenths)),
        ]
    }
}

/// What was found.
#[derive(Debug, Serialize)]
pub struct Found {
    kernel_class: String,
    device: String,
    uuid: String,
    copy_gb_s: f64,
    /// What clock and bus width make possible; 0 if the device does not tell.
    nominal_gb_s: f64,
    /// The version of cuBLAS; absent when it is not there.
    cublas: Option<String>,
    /// Why it is not.
    cublas_missing: Option<String>,
    /// Sides of its large product.
    product_len: usize,
    product_tflop_s: Option<f64>,
    kernels: Vec<Line>,
}

/// Measures every kernel at every number of rows.
pub fn run(ordinal: u32, args: &KernelsArgs) -> anyhow::Result<Found> {
    for trunk in &args.trunks {
        cuda::check_attention(&trunk.attention())?;
    }
    let product_len = args.product as usize;
    let machine = Machine::open(ordinal, product_len)?;
    let kernels = cuda::experts(&machine.device, WeightFormat::from(args.weights))?;
    let lines = lines(&machine, &*kernels, args)?;
    let facts = machine.device.facts();
    let cublas = machine.cublas();
    Ok(Found {
        kernel_class: kernels.class().to_string(),
        device: facts.name.clone(),
        uuid: facts.uuid.clone(),
        copy_gb_s: machine.copy_bytes_s / 1e9,
        nominal_gb_s: facts.bandwidth_bytes_s as f64 / 1e9,
        cublas_missing: cublas.as_ref().err().cloned(),
        cublas: cublas.ok(),
        product_len,
        product_tflop_s: machine.product_flop_s.map(|rate| rate / 1e12),
        kernels: lines,
    })
}

fn lines(
    machine: &Machine,
    kernels: &dyn ExpertKernels,
    args: &KernelsArgs,
) -> anyhow::Result<Vec<Line>> {
    let rows: Vec<usize> = args.rows.iter().map(|&rows| rows as usize).collect();
    let mut lines = Vec::new();
    for &shape in &args.shapes {
        let layer = experts::Layer::new(machine, kernels, shape)?;
        for &rows in &rows {
            lines.push(layer.line(rows)?);
        }
    }
    for &trunk in &args.trunks {
        let weights = WeightFormat::from(args.weights);
        lines.extend(trunk::products(machine, weights, trunk, &args.shapes, &rows)?);
        for &rows in &rows {
            for &positions in &args.positions {
                lines.extend(trunk::attention(machine, trunk, rows, positions as usize)?);
            }
        }
        for &rows in &rows {
            lines.extend(rows::residual(machine, trunk, rows)?);
            lines.extend(rows::heads(machine, trunk, rows)?);
        }
    }
    Ok(lines)
}

impl super::Report for Found {
    fn table(&self) -> Table {
        let mut table = columns([
            "KERNEL",
            "SHAPE",
            "ROWS",
            "USED",
            "US",
            "CALL US",
            "GB/S",
            "OF COPY",
            "TFLOP/S",
            "OF CUBLAS",
            "CUBLAS",
        ]);
        for line in &self.kernels {
            table.add_row(line.cells());
        }
        table
    }

    fn notes(&self) -> Vec<String> {
        let Self { kernel_class, device, copy_gb_s, nominal_gb_s, product_len, .. } = self;
        let machine = format!(
            "{kernel_class} on {device}; copies {copy_gb_s:.0} GB/s within its memory, \
             {nominal_gb_s:.0} by clock and bus; experts are hidden x inner x experts x top-k"
        );
        let missing = self.cublas_missing.as_deref().unwrap_or_default();
        let cublas = match (&self.cublas, self.product_tflop_s) {
            (Some(version), Some(rate)) => format!(
                "cuBLAS {version}: {rate:.1} TFLOP/s with {product_len} x {product_len} x \
                 {product_len}, of which OF CUBLAS are shares; CUBLAS is its rate with the same \
                 product, of experts with one of them"
            ),
            _ => format!("no shares of cuBLAS: {missing}"),
        };
        vec![machine, cublas]
    }
}
