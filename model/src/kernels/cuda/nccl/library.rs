//! NCCL as a library that may be missing: the dozen functions that this program calls.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use libloading::Library;

use super::super::driver::major_minor;
use super::NcclError;
use super::communicator::{Config, UniqueId};
use crate::kernels::DeviceError;

/// `ncclResult_t`.
pub(super) type Code = c_int;
/// `ncclSuccess`.
pub(super) const SUCCESS: Code = 0;
/// `ncclInProgress`: what was asked for has begun.
pub(super) const IN_PROGRESS: Code = 7;
/// `ncclUint8`.
pub(super) const BYTES: c_int = 1;

/// `ncclComm_t`.
pub(super) type Handle = *mut c_void;

/// Names under which NCCL is installed, with its own packages and with those for building.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// The first version with the configuration that communicators are made with.
const VERSION_MIN: (u32, u32) = (2, 18);

/// Types are those of `nccl.h`, which have been the same since [`VERSION_MIN`].
macro_rules! functions {
    ($($field:ident = $name:literal: fn($($type:ty),*) -> $result:ty;)*) => {
        /// The functions of a library that stays loaded.
        pub(super) struct Functions {
            $(pub $field: unsafe extern "C" fn($($type),*) -> $result,)*
            /// As NCCL writes it, `22703` for 2.27.3.
            pub version: c_int,
        }

        impl Functions {
            fn find(library: &'static Library) -> Result<Self, DeviceError> {
                let mut functions = Self {
                    $($field: {
                        // SAFETY: the function has this type in every version from VERSION_MIN on,
                        // and older ones are not called but for their version.
                        let symbol = unsafe { library.get(concat!($name, "\0").as_bytes()) };
                        *symbol.map_err(|_| unavailable(concat!("NCCL has no ", $name)))?
                    },)*
                    version: 0,
                };
                functions.version = functions.read_version()?;
                Ok(functions)
            }
        }
    };
}

functions! {
    get_version = "ncclGetVersion": fn(*mut c_int) -> Code;
    get_unique_id = "ncclGetUniqueId": fn(*mut UniqueId) -> Code;
    init = "ncclCommInitRankConfig": fn(*mut Handle, c_int, UniqueId, c_int, *const Config) -> Code;
    async_error = "ncclCommGetAsyncError": fn(Handle, *mut Code) -> Code;
    abort = "ncclCommAbort": fn(Handle) -> Code;
    group_start = "ncclGroupStart": fn() -> Code;
    group_end = "ncclGroupEnd": fn() -> Code;
    send = "ncclSend": fn(*const c_void, usize, c_int, c_int, Handle, *mut c_void) -> Code;
    receive = "ncclRecv": fn(*mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> Code;
    error_string = "ncclGetErrorString": fn(Code) -> *const c_char;
}

fn unavailable(text: &str) -> DeviceError {
    DeviceError::Unavailable(text.to_owned())
}

/// Loads the library, once in the life of the process.
///
/// # Errors
/// It is not there, or is too old. Always the same answer.
pub(super) fn load() -> Result<&'static Functions, DeviceError> {
    let functions = found()?;
    let (major, minor) = functions.major_minor();
    if (major, minor) < VERSION_MIN {
        let (major_min, minor_min) = VERSION_MIN;
        return Err(DeviceError::Unavailable(format!(
            "NCCL is {major}.{minor}; {major_min}.{minor_min} or later is needed"
        )));
    }
    Ok(functions)
}

/// The library's version, `(major, minor)`, also of one that is too old.
///
/// # Errors
/// It is not there.
pub(in super::super) fn version() -> Result<(u32, u32), DeviceError> {
    Ok(found()?.major_minor())
}

fn found() -> Result<&'static Functions, DeviceError> {
    static FOUND: OnceLock<Result<Functions, DeviceError>> = OnceLock::new();
    let find = || {
        // SAFETY: loading runs the library's own initialisation; NCCL reads its settings there.
        let library = NAMES.iter().find_map(|name| unsafe { Library::new(*name) }.ok());
        let missing = || unavailable("NCCL is not installed (libnccl.so.2 is not found)");
        // It is never unloaded: its threads could not be ended.
        Functions::find(Box::leak(Box::new(library.ok_or_else(missing)?)))
    };
    FOUND.get_or_init(find).as_ref().map_err(Clone::clone)
}

impl Functions {
    /// Since 2.9; older ones, years out of use, wrote it otherwise.
    fn major_minor(&self) -> (u32, u32) {
        major_minor(self.version, 10_000, 100)
    }

    fn read_version(&self) -> Result<c_int, DeviceError> {
        let mut version = 0;
        // SAFETY: the pointer is to a local integer.
        match unsafe { (self.get_version)(&raw mut version) } {
            SUCCESS => Ok(version),
            _ => Err(unavailable("NCCL does not tell its version")),
        }
    }

    /// An error as ours; that something has only begun is none.
    pub(super) fn check(&self, function: &'static str, code: Code) -> Result<(), NcclError> {
        if matches!(code, SUCCESS | IN_PROGRESS) {
            return Ok(());
        }
        // SAFETY: NCCL has a text for every number.
        let text = unsafe { (self.error_string)(code) };
        let text = match text.is_null() {
            true => format!("code {code}"),
            // SAFETY: its texts are constants that end with a zero.
            false => unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned(),
        };
        Err(NcclError::Failed { function, text })
    }
}
