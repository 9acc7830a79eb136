//! A stand-in for CUDA's compiler library, beside the stand-in for its driver.
//!
//! It compiles nothing: the emulated driver has the kernels already. It looks at the sources as far
//! as a mistake of the host would show in them: a file that is included must have been handed over,
//! and the architecture must be named. The image that it gives names the emulator and the
//! architecture, and is what the emulated driver asks for. A source that holds `#error` fails.

use std::ffi::{CStr, c_char, c_int};

/// Bytes of an image.
pub const IMAGE_BYTES: usize = 64;

/// What an image begins with; then comes the architecture, as `sm_90`, and spaces up to [`IMAGE_END`].
pub const IMAGE_BEGIN: &str = "entente-cuda-emulator image for ";

/// What an image ends with.
pub const IMAGE_END: &str = " end\n\0";

/// The version that this pretends to be.
const VERSION: (c_int, c_int) = (12, 8);

/// `nvrtcResult`.
type Code = c_int;

const SUCCESS: Code = 0;
const INVALID_INPUT: Code = 3;
const INVALID_PROGRAM: Code = 4;
const INVALID_OPTION: Code = 5;
const COMPILATION: Code = 6;

/// `nvrtcProgram`.
#[derive(Debug, Default)]
pub struct Program {
    /// Names and texts; the first is the program's own.
    sources: Vec<(String, String)>,
    log: String,
    image: Vec<u8>,
}

impl Program {
    fn compile(&mut self, options: &[String]) -> Code {
        let named = |option: &String| {
            let value =
                option.strip_prefix("--gpu-architecture=").or(option.strip_prefix("-arch="));
            value.filter(|value| value.starts_with("sm_")).map(str::to_owned)
        };
        let Some(architecture) = options.iter().find_map(named) else {
            self.log = "no option names a real architecture\n".to_owned();
            return INVALID_OPTION;
        };
        self.log = self.faults();
        if !self.log.is_empty() {
            return COMPILATION;
        }
        let begin = format!("{IMAGE_BEGIN}{architecture}");
        let width = IMAGE_BYTES - IMAGE_END.len();
        self.image = format!("{begin:width$}{IMAGE_END}").into_bytes();
        SUCCESS
    }

    /// What a compiler would say of the lines that tell something without compiling them.
    fn faults(&self) -> String {
        let mut faults = String::new();
        for (name, text) in &self.sources {
            for (number, line) in text.lines().enumerate() {
                let place = format!("{name}({}): error", number + 1);
                if let Some(message) = line.trim_start().strip_prefix("#error") {
                    faults += &format!("{place}: #error{message}\n");
                }
                let include = line.trim_start().strip_prefix("#include");
                let wanted = include.map(|rest| rest.trim().trim_matches(['"', '<', '>']));
                if let Some(wanted) = wanted
                    && !self.sources.iter().any(|(name, _)| name == wanted)
                {
                    faults += &format!("{place}: could not open source file \"{wanted}\"\n");
                }
            }
        }
        faults
    }
}

/// A string of the caller's; empty for a null pointer.
///
/// # Safety
/// `text` must be null or end with a zero.
unsafe fn string(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: as the caller promises.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// `count` strings of the caller's.
///
/// # Safety
/// `texts` must point to so many pointers as [`string`] takes.
unsafe fn strings(texts: *const *const c_char, count: c_int) -> Vec<String> {
    // SAFETY: as the caller promises.
    (0..count.max(0) as usize).map(|at| unsafe { string(*texts.add(at)) }).collect()
}

/// Writes bytes to where the caller wants them.
///
/// # Safety
/// `program` must be null or alive, and there must be room for what `part` gives.
unsafe fn give(program: *mut Program, to: *mut c_char, part: fn(&Program) -> &[u8]) -> Code {
    // SAFETY: as the caller promises.
    let Some(program) = (unsafe { program.as_ref() }) else { return INVALID_PROGRAM };
    let bytes = part(program);
    if bytes.is_empty() {
        return INVALID_PROGRAM;
    }
    // SAFETY: as the caller promises.
    unsafe { to.cast::<u8>().copy_from(bytes.as_ptr(), bytes.len()) };
    SUCCESS
}

/// Writes a length to where the caller wants it.
///
/// # Safety
/// `program` must be null or alive, and `to` a place for a number.
unsafe fn give_len(program: *mut Program, to: *mut usize, len: fn(&Program) -> usize) -> Code {
    // SAFETY: as the caller promises.
    let Some(program) = (unsafe { program.as_ref() }) else { return INVALID_PROGRAM };
    // SAFETY: as the caller promises.
    unsafe { *to = len(program) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcVersion(major: *mut c_int, minor: *mut c_int) -> Code {
    // SAFETY: the caller has room for two numbers.
    unsafe { (*major, *minor) = VERSION };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcCreateProgram(
    to: *mut *mut Program,
    text: *const c_char,
    name: *const c_char,
    count: c_int,
    texts: *const *const c_char,
    names: *const *const c_char,
) -> Code {
    if text.is_null() {
        return INVALID_INPUT;
    }
    // SAFETY: strings that end with zeros, as many as the caller says.
    let (own, headers) = unsafe {
        let headers = strings(names, count).into_iter().zip(strings(texts, count));
        ((string(name), string(text)), headers)
    };
    let sources = std::iter::once(own).chain(headers).collect();
    let program = Box::new(Program { sources, ..Program::default() });
    // SAFETY: the caller has room for a pointer.
    unsafe { *to = Box::into_raw(program) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcCompileProgram(
    program: *mut Program,
    count: c_int,
    options: *const *const c_char,
) -> Code {
    // SAFETY: null or what nvrtcCreateProgram gave.
    let Some(program) = (unsafe { program.as_mut() }) else { return INVALID_PROGRAM };
    // SAFETY: strings that end with zeros, as many as the caller says.
    program.compile(&unsafe { strings(options, count) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcDestroyProgram(program: *mut *mut Program) -> Code {
    // SAFETY: the caller hands over where it keeps what nvrtcCreateProgram gave, once.
    unsafe {
        if (*program).is_null() {
            return INVALID_PROGRAM;
        }
        drop(Box::from_raw(*program));
        *program = std::ptr::null_mut();
    }
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetCUBINSize(program: *mut Program, to: *mut usize) -> Code {
    // SAFETY: as the function promises to its callers.
    unsafe { give_len(program, to, |program| program.image.len()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetCUBIN(program: *mut Program, to: *mut c_char) -> Code {
    // SAFETY: as above.
    unsafe { give(program, to, |program| &program.image) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetPTXSize(program: *mut Program, to: *mut usize) -> Code {
    // SAFETY: as above.
    unsafe { give_len(program, to, |program| program.image.len()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetPTX(program: *mut Program, to: *mut c_char) -> Code {
    // SAFETY: as above.
    unsafe { give(program, to, |program| &program.image) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetProgramLogSize(program: *mut Program, to: *mut usize) -> Code {
    // SAFETY: as above.
    unsafe { give_len(program, to, |program| program.log.len() + 1) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetProgramLog(program: *mut Program, to: *mut c_char) -> Code {
    // SAFETY: null or what nvrtcCreateProgram gave.
    let Some(program) = (unsafe { program.as_ref() }) else { return INVALID_PROGRAM };
    // SAFETY: the caller has asked how long it is, the zero included.
    unsafe {
        to.cast::<u8>().copy_from(program.log.as_ptr(), program.log.len());
        *to.add(program.log.len()) = 0;
    }
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcGetErrorString(code: Code) -> *const c_char {
    let text = match code {
        SUCCESS => c"NVRTC_SUCCESS",
        INVALID_INPUT => c"NVRTC_ERROR_INVALID_INPUT",
        INVALID_PROGRAM => c"NVRTC_ERROR_INVALID_PROGRAM",
        INVALID_OPTION => c"NVRTC_ERROR_INVALID_OPTION",
        COMPILATION => c"NVRTC_ERROR_COMPILATION",
        _ => c"NVRTC_ERROR_INTERNAL_ERROR",
    };
    text.as_ptr()
}
