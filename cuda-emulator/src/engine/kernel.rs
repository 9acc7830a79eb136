//! The table of kernels that the build has compiled into this library.

use std::ffi::{CStr, c_char, c_void};

/// A kernel as the prelude of the C++ side describes it.
#[repr(C)]
#[derive(Debug)]
pub struct Kernel {
    name: *const c_char,
    call: unsafe extern "C" fn(*const *mut c_void),
    sizes: *const u32,
    parameters: u32,
}

// SAFETY: a constant that only points to constants.
unsafe impl Sync for Kernel {}

#[repr(C)]
struct Table {
    kernels: *const Kernel,
    count: u32,
}

unsafe extern "C" {
    /// One table for each kernel file, then a null pointer.
    #[link_name = "entente_emulator_tables"]
    static TABLES: [*const Table; 0];
}

impl Kernel {
    /// The kernel of a name, if there is one.
    pub fn find(name: &CStr) -> Option<&'static Self> {
        Self::all().find(|kernel| kernel.name() == name)
    }

    /// Every kernel.
    pub fn all() -> impl Iterator<Item = &'static Self> {
        let first = &raw const TABLES as *const *const Table;
        // SAFETY: the tables end with a null pointer, which the iterator does not go beyond; each
        // table is a constant that says how many kernels it has.
        let tables = (0..).map_while(move |at| unsafe { (*first.add(at)).as_ref() });
        // SAFETY: as above.
        tables.flat_map(|table| unsafe {
            std::slice::from_raw_parts(table.kernels, table.count as usize)
        })
    }

    /// Its name.
    pub fn name(&self) -> &'static CStr {
        // SAFETY: a string of the C++ side, which is there as long as the library.
        unsafe { CStr::from_ptr(self.name) }
    }

    /// The bytes of each of its parameters.
    pub fn parameter_bytes(&self) -> &'static [u32] {
        // SAFETY: a constant of the C++ side with as many entries as there are parameters.
        unsafe { std::slice::from_raw_parts(self.sizes, self.parameters as usize) }
    }

    /// Runs one thread of it.
    ///
    /// # Safety
    /// The arguments must be of the parameters' types and as many; it must run on a fiber of a
    /// block, with the thread's place set.
    pub(super) unsafe fn call(&self, arguments: *const *mut c_void) {
        // SAFETY: as the caller promises.
        unsafe { (self.call)(arguments) }
    }
}
