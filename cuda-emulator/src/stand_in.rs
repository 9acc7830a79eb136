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

use std::ffi::{CString, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::{env, fs};

/// The libraries as files, and the names under which programs ask for them. NCCL comes last.
const LIBRARIES: [(&str, &[&str]); 3] = [
    ("libentente_cuda_emulator.so", &["libcuda.so", "libcuda.so.1"]),
    ("libentente_nvrtc_emulator.so", &["libnvrtc.so", "libnvrtc.so.12"]),
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

/// An emulator that this process has loaded, or the machine's own device.
#[derive(Clone, Copy, Debug)]
pub struct Emulator {
    set_seed: Option<extern "C" fn(u64)>,
}

/// Loads the emulator into this process, whose searches for `libcuda.so`, `libnvrtc.so` and
/// `libnccl.so.2` find it from then on.
///
/// # Panics
/// When the libraries are not beside the test that asks.
pub fn load() -> Emulator {
    if env::var_os(TEST_ON).is_some_and(|on| on == "device") {
        return Emulator { set_seed: None };
    }
    let [driver, ..] = LIBRARIES.map(|(library, _)| {
        let path = built().join(library);
        let name = CString::new(path.as_os_str().as_bytes()).expect("a path has no zeros");
        // SAFETY: loading runs no code of these libraries.
        let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
        assert!(!library.is_null(), "{} cannot be loaded", path.display());
        library
    });
    // SAFETY: a function of our own library, of this type.
    let set_seed = unsafe {
        let function = libc::dlsym(driver, c"entente_emulator_set_seed".as_ptr());
        std::mem::transmute::<*mut c_void, Option<extern "C" fn(u64)>>(function)
    };
    assert!(set_seed.is_some(), "the library was built with this crate");
    Emulator { set_seed }
}

impl Emulator {
    /// Changes the order of blocks, warps and lanes; see [`crate::engine::Order`]. A real device has
    /// its own.
    pub fn set_seed(&self, seed: u64) {
        if let Some(set_seed) = self.set_seed {
            set_seed(seed);
        }
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
