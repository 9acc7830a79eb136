//! A program as any other that uses a device: it does not know whose driver it finds.
//!
//! Each argument is something to do, and each leads to a line: `ok`, or the error. `launch=KERNEL`
//! runs a kernel of two warps whose argument is 64 numbers; `pause` waits for a line.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaModule, DriverError, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};

fn load(context: &Arc<CudaContext>) -> Result<Arc<CudaModule>, DriverError> {
    let options = CompileOptions { arch: Some("sm_90"), ..Default::default() };
    context.load_module(compile_ptx_with_opts("", options).expect("nothing compiles"))
}

fn launch(context: &Arc<CudaContext>, kernel: &str) -> Result<(), DriverError> {
    let stream = context.new_stream()?;
    let function = load(context)?.load_function(kernel)?;
    let x = stream.clone_htod(&[1.0f32; 64])?;
    let y = stream.alloc_zeros::<f32>(64)?;
    let shape = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (64, 1, 1), shared_mem_bytes: 0 };
    // SAFETY: kernels of the emulator read and write 64 numbers at most.
    unsafe { stream.launch_builder(&function).arg(&x).arg(&y).launch(shape) }?;
    stream.synchronize()
}

fn perform(context: &Arc<CudaContext>, what: &str) -> Result<(), DriverError> {
    match what.split_once('=').unwrap_or((what, "")) {
        ("pause", _) => {
            let mut line = String::new();
            std::io::stdin().read_line(&mut line).expect("standard input can be read");
            Ok(())
        }
        ("load", _) => load(context).map(drop),
        ("launch", kernel) => launch(context, kernel),
        ("memory", _) => context.mem_get_info().map(drop),
        _ => panic!("{what} is nothing to do"),
    }
}

fn main() {
    let context = CudaContext::new(0);
    for what in std::env::args().skip(1) {
        let outcome = context.clone().and_then(|context| perform(&context, &what));
        match outcome {
            Ok(()) => println!("ok"),
            Err(error) => println!("{:?}", error.0),
        }
    }
}
