//! A stand-in for NVIDIA's matrix products, beside the stand-in for its driver.
//!
//! It knows one product: of bf16 matrices, added up in f32. That is computed by the definition in
//! cuBLAS's manual (matrices are stored by columns, each with a leading dimension), at once and on
//! the calling thread: what was put into the stream before is waited for.

use std::ffi::{CStr, c_int, c_void};

use half::bf16;

/// `cublasStatus_t`.
type Status = c_int;

const SUCCESS: Status = 0;
const NOT_INITIALIZED: Status = 1;
const INVALID_VALUE: Status = 7;
const EXECUTION_FAILED: Status = 13;
const NOT_SUPPORTED: Status = 15;

/// `CUDA_R_16BF`.
const BF16: c_int = 14;
/// `CUBLAS_COMPUTE_32F`.
const COMPUTE_F32: c_int = 68;
/// `CUBLAS_OP_T` and `CUBLAS_OP_N`.
const TRANSPOSED: c_int = 1;
const AS_IT_IS: c_int = 0;

/// The version that this pretends to be: major, minor, patch.
const VERSION: [c_int; 3] = [12, 8, 0];

/// `cublasContext`.
#[derive(Debug)]
pub struct Context {
    /// The driver's handle.
    stream: usize,
}

/// What the caller means by a handle.
///
/// # Safety
/// `handle` must be null or what `cublasCreate_v2` gave, and used by one thread.
unsafe fn context<'a>(handle: *mut Context) -> Result<&'a mut Context, Status> {
    // SAFETY: as the caller promises.
    unsafe { handle.as_mut() }.ok_or(NOT_INITIALIZED)
}

fn status(outcome: Result<(), Status>) -> Status {
    outcome.err().unwrap_or(SUCCESS)
}

/// Waits for a stream of the emulated driver, which whoever has a stream has loaded.
fn synchronise(stream: usize) -> Result<(), Status> {
    type Synchronise = extern "C" fn(usize) -> c_int;
    const NAME: &CStr = c"cuStreamSynchronize";

    // SAFETY: both names end with zeros; nothing is loaded that is not loaded already, and the
    // driver's function has this type.
    let synchronise = unsafe {
        let driver = libc::dlopen(c"libcuda.so".as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD);
        if driver.is_null() {
            return Err(NOT_INITIALIZED);
        }
        let function = libc::dlsym(driver, NAME.as_ptr());
        std::mem::transmute::<*mut c_void, Option<Synchronise>>(function)
    };
    match synchronise.ok_or(NOT_INITIALIZED)?(stream) {
        0 => Ok(()),
        _ => Err(EXECUTION_FAILED),
    }
}

/// A matrix stored by columns.
#[derive(Clone, Copy)]
struct Columns {
    first: *mut bf16,
    leading: usize,
}

impl Columns {
    fn new(first: *mut bf16, leading: c_int, rows: usize) -> Result<Self, Status> {
        let leading = usize::try_from(leading).map_err(|_| INVALID_VALUE)?;
        if leading < rows.max(1) {
            return Err(INVALID_VALUE);
        }
        Ok(Self { first, leading })
    }

    fn at(self, row: usize, column: usize) -> *mut bf16 {
        self.first.wrapping_add(column * self.leading + row)
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cublasCreate_v2(to: *mut *mut Context) -> Status {
    if to.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: the caller has room for a pointer.
    unsafe { *to = Box::into_raw(Box::new(Context { stream: 0 })) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cublasDestroy_v2(handle: *mut Context) -> Status {
    if handle.is_null() {
        return NOT_INITIALIZED;
    }
    // SAFETY: what cublasCreate_v2 gave, once.
    drop(unsafe { Box::from_raw(handle) });
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cublasSetStream_v2(handle: *mut Context, stream: usize) -> Status {
    // SAFETY: null or what cublasCreate_v2 gave.
    status(unsafe { context(handle) }.map(|context| context.stream = stream))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cublasGetProperty(which: c_int, to: *mut c_int) -> Status {
    let Some(value) = usize::try_from(which).ok().and_then(|which| VERSION.get(which)) else {
        return INVALID_VALUE;
    };
    // SAFETY: the caller has room for a number.
    unsafe { *to = *value };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cublasGemmEx(
    handle: *mut Context,
    a_form: c_int,
    b_form: c_int,
    m: c_int,
    n: c_int,
    k: c_int,
    alpha: *const f32,
    a: *mut bf16,
    a_type: c_int,
    a_leading: c_int,
    b: *mut bf16,
    b_type: c_int,
    b_leading: c_int,
    beta: *const f32,
    c: *mut bf16,
    c_type: c_int,
    c_leading: c_int,
    compute: c_int,
    _algorithm: c_int,
) -> Status {
    let product = || {
        // SAFETY: null or what cublasCreate_v2 gave.
        let stream = unsafe { context(handle) }?.stream;
        let forms = (a_form, b_form) == (TRANSPOSED, AS_IT_IS);
        if !forms || [a_type, b_type, c_type] != [BF16; 3] || compute != COMPUTE_F32 {
            return Err(NOT_SUPPORTED);
        }
        let [m, n, k] = [m, n, k].map(|side| usize::try_from(side).map_err(|_| INVALID_VALUE));
        let (m, n, k) = (m?, n?, k?);
        let (a, b) = (Columns::new(a, a_leading, k)?, Columns::new(b, b_leading, k)?);
        let c = Columns::new(c, c_leading, m)?;
        // SAFETY: the caller hands over two numbers.
        let (alpha, beta) = unsafe { (*alpha, *beta) };
        synchronise(stream)?;
        for (column, row) in (0..n).flat_map(|column| (0..m).map(move |row| (column, row))) {
            // SAFETY: the caller promises matrices of these sides, within which these indices are.
            unsafe {
                let pair = |i| a.at(i, row).read().to_f32() * b.at(i, column).read().to_f32();
                let sum: f32 = (0..k).map(pair).sum();
                let to = c.at(row, column);
                // What is multiplied with 0 is not read: it may be nothing yet.
                let old = if beta == 0.0 { 0.0 } else { beta * to.read().to_f32() };
                to.write(bf16::from_f32(alpha * sum + old));
            }
        }
        Ok(())
    };
    status(product())
}
