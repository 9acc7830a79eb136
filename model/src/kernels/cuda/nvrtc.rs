//! CUDA's compiler as a library that may be missing.

use std::ffi::{CString, c_char};
use std::ptr::null_mut;
use std::sync::OnceLock;

use cudarc::nvrtc::sys::{self, nvrtcProgram, nvrtcResult};

use super::compile::Source;
use crate::kernels::DeviceError;

/// Every function of NVRTC that this program calls.
const SYMBOLS: &[&str] = &[
    "nvrtcCompileProgram",
    "nvrtcCreateProgram",
    "nvrtcDestroyProgram",
    "nvrtcGetCUBIN",
    "nvrtcGetCUBINSize",
    "nvrtcGetProgramLog",
    "nvrtcGetProgramLogSize",
    "nvrtcVersion",
];

/// Loads the library, once in the life of the process, and gives its version, `(major, minor)`.
///
/// # Errors
/// It is not there, or is too old. Always the same answer.
pub(super) fn version() -> Result<(u32, u32), DeviceError> {
    static VERSION: OnceLock<Result<(u32, u32), DeviceError>> = OnceLock::new();
    VERSION.get_or_init(find).clone()
}

fn find() -> Result<(u32, u32), DeviceError> {
    let unavailable = |text: String| Err(DeviceError::Unavailable(text));
    // SAFETY: loading runs the library's own initialisation; NVRTC has none that matters.
    if !unsafe { sys::is_culib_present() } {
        return unavailable(
            "CUDA's compiler library is not installed (libnvrtc.so is not found)".to_owned(),
        );
    }
    // SAFETY: the same library, which was found above.
    let library = unsafe { sys::culib() };
    for symbol in SYMBOLS {
        // SAFETY: the address is only looked for; the bindings know its type.
        if unsafe { library.get::<*const ()>(symbol.as_bytes()) }.is_err() {
            return unavailable(format!("CUDA's compiler library is too old: it has no {symbol}"));
        }
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the pointers are to local integers.
    check("nvrtcVersion", unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) })?;
    Ok((major.unsigned_abs(), minor.unsigned_abs()))
}

fn check(function: &str, code: nvrtcResult) -> Result<(), DeviceError> {
    match code {
        nvrtcResult::NVRTC_SUCCESS => Ok(()),
        code => Err(DeviceError::Compile(format!("{function} says {code:?}"))),
    }
}

/// Compiles `program`, which includes `sources` by their names.
///
/// # Errors
/// There is no compiler, or it refuses the program; then with all that it says of it.
pub(super) fn compile<'a>(
    program: &str,
    sources: impl Iterator<Item = &'a Source>,
    options: &[String],
) -> Result<Vec<u8>, DeviceError> {
    version()?;
    let (names, texts): (Vec<_>, Vec<_>) =
        sources.map(|source| (c_string(source.name), c_string(source.text))).unzip();
    let options: Vec<_> = options.iter().map(|option| c_string(option)).collect();
    let program = Program::new(&c_string(program), &names, &texts)?;
    let options = pointers(&options);
    // SAFETY: the program lives; there are as many options, which end with zeros.
    let code =
        unsafe { sys::nvrtcCompileProgram(program.handle, options.len() as i32, options.as_ptr()) };
    check("nvrtcCompileProgram", code).map_err(|error| match program.log() {
        Ok(log) if !log.is_empty() => DeviceError::Compile(log),
        _ => error,
    })?;
    program.code()
}

fn c_string(text: &str) -> CString {
    CString::new(text).expect("sources and options of this program hold no zero bytes")
}

fn pointers(texts: &[CString]) -> Vec<*const c_char> {
    texts.iter().map(|text| text.as_ptr()).collect()
}

/// A program in the library's hands.
struct Program {
    handle: nvrtcProgram,
}

impl Program {
    fn new(text: &CString, names: &[CString], texts: &[CString]) -> Result<Self, DeviceError> {
        let mut handle = null_mut();
        let (names, texts) = (pointers(names), pointers(texts));
        // SAFETY: a name for each text, all of them ending with zeros; the library copies them.
        check("nvrtcCreateProgram", unsafe {
            sys::nvrtcCreateProgram(
                &raw mut handle,
                text.as_ptr(),
                c"entente.cu".as_ptr(),
                texts.len() as i32,
                texts.as_ptr(),
                names.as_ptr(),
            )
        })?;
        Ok(Self { handle })
    }

    /// What the compiler said.
    fn log(&self) -> Result<String, DeviceError> {
        let mut len = 0;
        // SAFETY: the program lives; the pointer is to a local integer.
        let code = unsafe { sys::nvrtcGetProgramLogSize(self.handle, &raw mut len) };
        check("nvrtcGetProgramLogSize", code)?;
        let mut log = vec![0_u8; len];
        // SAFETY: the log has this length, its zero included.
        let code = unsafe { sys::nvrtcGetProgramLog(self.handle, log.as_mut_ptr().cast()) };
        check("nvrtcGetProgramLog", code)?;
        Ok(String::from_utf8_lossy(&log).trim_end_matches(['\0', '\n']).to_owned())
    }

    /// What it made.
    fn code(&self) -> Result<Vec<u8>, DeviceError> {
        let mut len = 0;
        // SAFETY: the program lives; the pointer is to a local integer.
        let code = unsafe { sys::nvrtcGetCUBINSize(self.handle, &raw mut len) };
        check("nvrtcGetCUBINSize", code)?;
        let mut cubin = vec![0_u8; len];
        // SAFETY: the code has this length.
        let code = unsafe { sys::nvrtcGetCUBIN(self.handle, cubin.as_mut_ptr().cast()) };
        check("nvrtcGetCUBIN", code)?;
        Ok(cubin)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made in `new`, once.
        let _ = unsafe { sys::nvrtcDestroyProgram(&raw mut self.handle) };
    }
}
