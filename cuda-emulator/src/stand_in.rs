//! How a test puts the emulator where programs look for NVIDIA's libraries.
//!
//! - Another process: [`folder`] into its `LD_LIBRARY_PATH`.
//! - The test's own process: [`load`] before anything asks for `libcuda.so`. The libraries bear the
//!   names that are asked for, so that the dynamic linker, asked by name, gives what was loaded by
//!   its path.
//!
//! Cargo builds the libraries with this crate, beside the tests' own executables.
//!
//! On a machine with a GPU the same tests run on it, those that plant faults excepted: where
//! `ENTENTE_TEST_CUDA=device` is set, nothing is put anywhere, and programs find what is installed.

use std::ffi::{CStr, CString, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::{env, fs};

pub use crate::driver::Launches;

/// The libraries as files, and the names under which programs ask for them. NCCL comes last.
const LIBRARIES: [(&str, &[&str]); 4] = [
    ("libentente_cuda_emulator.so", &["libcuda.so", "libcuda.so.1"]),
    ("libentente_nvrtc_emulator.so", &["libnvrtc.so", "libnvrtc.so.12"]),
    ("libentente_cublas_emulator.so", &["libcublas.so", "libcublas.so.12"]),
    ("libentente_nccl_emulator.so", &["libnccl.so.2"]),
];

/// A folder in which the emulator is called as NVIDIA's libraries are.
///
/// # Panics
/// When the libraries are not beside the test that asks, or the folder cannot be made.
pub fn folder() -> PathBuf {
    folder_of("entente-cuda-emulator", &LIBRARIES)
}

/// The same folder of a machine without NCCL.
///
/// # Panics
/// As [`folder`].
pub fn folder_without_nccl() -> PathBuf {
    folder_of("entente-cuda-emulator-without-nccl", &LIBRARIES[..2])
}

fn folder_of(name: &str, libraries: &[(&str, &[&str])]) -> PathBuf {
    let built = built();
    let folder = built.join(name);
    fs::create_dir_all(&folder).expect("the folder of the tests can be written");
    for &(library, names) in libraries {
        for name in names {
            // Many tests do this at once; the first one's link is as good as any.
            let _ = std::os::unix::fs::symlink(Path::new("..").join(library), folder.join(name));
            assert!(folder.join(name).is_file(), "{} is not built", built.join(library).display());
        }
    }
    folder
}

/// Set to `device` where tests are to run on the machine's own device.
const TEST_ON: &str = "ENTENTE_TEST_CUDA";

/// Whether tests run on the machine's own device.
pub fn on_device() -> bool {
    env::var_os(TEST_ON).is_some_and(|on| on == "device")
}

/// An emulator that this process has loaded, or the machine's own device.
#[derive(Clone, Copy, Debug)]
pub struct Emulator {
    functions: Option<Functions>,
}

/// What the loaded library has for tests.
#[derive(Clone, Copy, Debug)]
struct Functions {
    set_seed: extern "C" fn(u64),
    launches: extern "C" fn() -> Launches,
    plant: unsafe extern "C" fn(*const c_char),
}

/// Loads the emulator into this process, whose searches for `libcuda.so`, `libnvrtc.so`,
/// `libcublas.so` and `libnccl.so.2` find it from then on.
///
/// # Panics
/// When the libraries are not beside the test that asks.
pub fn load() -> Emulator {
    if on_device() {
        return Emulator { functions: None };
    }
    let [driver, ..] = LIBRARIES.map(|(library, _)| {
        let path = built().join(library);
        let name = CString::new(path.as_os_str().as_bytes()).expect("a path has no zeros");
        // SAFETY: loading runs no code of these libraries.
        let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
        assert!(!library.is_null(), "{} cannot be loaded", path.display());
        library
    });
    let find = |name: &CStr| {
        // SAFETY: the library stays loaded.
        let function = unsafe { libc::dlsym(driver, name.as_ptr()) };
        assert!(!function.is_null(), "the library was built with this crate");
        function
    };
    // SAFETY: functions of our own library, of these types.
    let functions = unsafe {
        Functions {
            set_seed: std::mem::transmute::<*mut c_void, extern "C" fn(u64)>(find(
                c"entente_emulator_set_seed",
            )),
            launches: std::mem::transmute::<*mut c_void, extern "C" fn() -> Launches>(find(
                c"entente_emulator_launches",
            )),
            plant: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*const c_char)>(find(
                c"entente_emulator_plant",
            )),
        }
    };
    Emulator { functions: Some(functions) }
}

impl Emulator {
    /// Changes the order of blocks, warps and lanes; see [`crate::engine::Order`]. A real device has
    /// its own.
    pub fn set_seed(&self, seed: u64) {
        if let Some(functions) = self.functions {
            (functions.set_seed)(seed);
        }
    }

    /// Plants faults in this process, by the words of [`crate::settings`], in place of those that
    /// were planted before.
    ///
    /// # Panics
    /// On a real device.
    pub fn plant(&self, faults: &str) {
        let functions = self.functions.expect("faults are planted in the emulator");
        let faults = CString::new(faults).expect("words have no zeros");
        // SAFETY: a string that ends with a zero.
        unsafe { (functions.plant)(faults.as_ptr()) };
    }

    /// What the process has asked devices to run so far; a real device does not tell.
    pub fn launches(&self) -> Option<Launches> {
        self.functions.map(|functions| (functions.launches)())
    }
}

/// Where cargo has put the libraries: beside the test's own executable.
fn built() -> PathBuf {
    let test = env::current_exe().expect("a running program has a path");
    test.parent().expect("and a file is in a folder").to_owned()
}

#[unsafe(no_mangle)]
extern "C" fn entente_emulator_set_seed(seed: u64) {
    crate::driver::machine(|driver| {
        driver.set_seed(seed);
        Ok(())
    });
}

#[unsafe(no_mangle)]
extern "C" fn entente_emulator_launches() -> Launches {
    let mut launches = Launches::default();
    crate::driver::machine(|driver| {
        launches = driver.launches();
        Ok(())
    });
    launches
}

#[unsafe(no_mangle)]
unsafe extern "C" fn entente_emulator_plant(faults: *const c_char) {
    // SAFETY: the caller hands over a string that ends with a zero.
    let faults = unsafe { CStr::from_ptr(faults) }.to_string_lossy();
    crate::driver::machine(|driver| {
        driver.plant(&faults);
        Ok(())
    });
}
