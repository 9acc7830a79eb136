//! Modules and their functions. Every module holds all kernels: they are compiled into this library.

use std::ffi::CStr;

use super::{Code, Driver, Handle, device};
use crate::engine::{Kernel, SHARED_BYTES_MAX, SHARED_BYTES_USUAL};

/// Images as the emulated compiler library gives them.
use entente_nvrtc_emulator::{IMAGE_BEGIN, IMAGE_BYTES, IMAGE_END};

/// A loaded image.
#[derive(Debug)]
pub struct Module {
    device: usize,
}

/// A kernel of a module.
#[derive(Clone, Copy, Debug)]
pub struct Function {
    /// Its code.
    pub kernel: &'static Kernel,
    /// The most bytes of dynamic shared memory that a launch may ask for.
    pub shared_bytes_max: usize,
    module: Handle,
}

impl Driver {
    /// Loads an image.
    pub fn load_module(
        &mut self,
        device: usize,
        image: &[u8; IMAGE_BYTES],
    ) -> Result<Handle, Code> {
        let text = str::from_utf8(image).ok();
        let text = text.and_then(|text| text.strip_prefix(IMAGE_BEGIN)?.strip_suffix(IMAGE_END));
        let architecture = text.ok_or(Code::ERROR_INVALID_IMAGE)?.trim_end();
        let (major, minor) = device::CAPABILITY;
        let fits = architecture.trim_end_matches('a') == format!("sm_{major}{minor}");
        if !fits || self.settings.faults().wrong_architecture {
            return Err(Code::ERROR_NO_BINARY_FOR_GPU);
        }
        let handle = self.handle();
        self.modules.insert(handle, Module { device });
        Ok(handle)
    }

    /// Unloads a module; its functions are gone with it.
    pub fn unload_module(&mut self, module: Handle) -> Result<(), Code> {
        let Module { device } = self.modules.remove(&module).ok_or(Code::ERROR_INVALID_HANDLE)?;
        self.functions.retain(|_, function| function.module != module);
        self.synchronise_device(device)
    }

    /// Finds a kernel by its name.
    pub fn find_function(&mut self, module: Handle, name: &CStr) -> Result<Handle, Code> {
        if !self.modules.contains_key(&module) {
            return Err(Code::ERROR_INVALID_HANDLE);
        }
        let kernel = Kernel::find(name).ok_or(Code::ERROR_NOT_FOUND)?;
        let function = Function { kernel, shared_bytes_max: SHARED_BYTES_USUAL, module };
        let handle = self.handle();
        self.functions.insert(handle, function);
        Ok(handle)
    }

    /// A function.
    pub fn function(&self, function: Handle) -> Result<Function, Code> {
        self.functions.get(&function).copied().ok_or(Code::ERROR_INVALID_HANDLE)
    }

    /// Lets launches of a function ask for more shared memory.
    pub fn set_shared_bytes_max(&mut self, function: Handle, bytes: i32) -> Result<(), Code> {
        let bytes = usize::try_from(bytes).ok().filter(|bytes| *bytes <= SHARED_BYTES_MAX);
        let bytes = bytes.ok_or(Code::ERROR_INVALID_VALUE)?;
        let function = self.functions.get_mut(&function).ok_or(Code::ERROR_INVALID_HANDLE)?;
        function.shared_bytes_max = bytes;
        Ok(())
    }
}
