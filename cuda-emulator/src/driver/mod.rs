//! The emulated machine behind the calls: devices, streams, events, modules.
//!
//! What is asked of a stream is done when somebody waits for it and not before, which is the latest
//! that a device may take: a buffer of the host that is written to too early, a result that is read
//! without a wait, an event that nobody waited for, all show. One lock is around everything.

mod capture;
mod code;
mod device;
mod module;
mod stream;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use crate::engine::Order;
use crate::memory::Region;
use crate::settings::Settings;

pub use capture::Mode;
pub use code::Code;
pub use device::{Device, attribute};
pub use module::{Function, Module};
pub use stream::{Advance, Event, Foreign, Launch, Stream, Work};

/// A pointer that names something of this driver to its caller.
pub type Handle = usize;

/// How often streams were asked to run something.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Launches {
    /// One kernel.
    pub kernels: u64,
    /// A graph, whatever is in it.
    pub graphs: u64,
}

/// The whole machine.
#[derive(Debug)]
pub struct Driver {
    settings: Settings,
    order: Order,
    initialised: bool,
    devices: Vec<Device>,
    /// The default stream of a device has the device's context as its handle.
    streams: BTreeMap<Handle, Stream>,
    events: BTreeMap<Handle, Arc<Event>>,
    /// What was captured, and what was made of it to be launched.
    graphs: BTreeMap<Handle, Arc<Vec<Work>>>,
    executables: BTreeMap<Handle, Arc<Vec<Work>>>,
    launches: Launches,
    modules: BTreeMap<Handle, Module>,
    functions: BTreeMap<Handle, Function>,
    /// Memory of the host that the driver has given out, by its address.
    host: BTreeMap<usize, Region>,
    last_handle: Handle,
}

static DRIVER: LazyLock<Mutex<Driver>> = LazyLock::new(|| Mutex::new(Driver::new(Settings::new())));

thread_local! {
    /// The context that this thread has made its own.
    static CONTEXT: Cell<Handle> = const { Cell::new(0) };
}

/// The context of this thread; 0 is none.
pub fn context() -> Handle {
    CONTEXT.get()
}

/// Makes a context this thread's own.
pub fn set_context(context: Handle) {
    CONTEXT.set(context);
}

/// How long a call waits before it looks again whether it need not wait any more.
const LOOK_AGAIN: Duration = Duration::from_micros(100);

/// Does something with the machine. What has to wait for another process is begun again after a
/// moment, in which others may do something with it.
pub fn machine(mut act: impl FnMut(&mut Driver) -> Result<(), Code>) -> Code {
    loop {
        let mut driver = DRIVER.lock().unwrap_or_else(PoisonError::into_inner);
        let code = Code::from(act(&mut driver));
        drop(driver);
        if code != Code::PENDING {
            return code;
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// Does something with the device of this thread's context, unless that is lost.
pub fn current(mut act: impl FnMut(&mut Driver, usize) -> Result<(), Code>) -> Code {
    machine(|driver| {
        let device = driver.device_of(context())?;
        driver.devices[device].alive()?;
        act(driver, device)
    })
}

impl Driver {
    fn new(settings: Settings) -> Self {
        let devices = (0..settings.devices).map(|_| Device::new(settings.memory_bytes)).collect();
        Self {
            order: Order::new(settings.seed),
            initialised: false,
            devices,
            streams: (0..settings.devices).map(|at| (at + 1, Stream::new(at))).collect(),
            events: BTreeMap::new(),
            graphs: BTreeMap::new(),
            executables: BTreeMap::new(),
            launches: Launches::default(),
            modules: BTreeMap::new(),
            functions: BTreeMap::new(),
            host: BTreeMap::new(),
            last_handle: settings.devices,
            settings,
        }
    }

    /// `cuInit`.
    pub fn initialise(&mut self) -> Result<(), Code> {
        if self.devices.is_empty() {
            return Err(Code::ERROR_NO_DEVICE);
        }
        self.initialised = true;
        Ok(())
    }

    /// How many devices there are.
    pub fn device_count(&self) -> Result<usize, Code> {
        if self.initialised { Ok(self.devices.len()) } else { Err(Code::ERROR_NOT_INITIALIZED) }
    }

    /// The device of an ordinal, which is also its `CUdevice`.
    pub fn device(&mut self, ordinal: i32) -> Result<&mut Device, Code> {
        self.device_count()?;
        let at = usize::try_from(ordinal).map_err(|_| Code::ERROR_INVALID_DEVICE)?;
        self.devices.get_mut(at).ok_or(Code::ERROR_INVALID_DEVICE)
    }

    /// The primary context of a device.
    pub fn retain(&mut self, ordinal: i32) -> Result<Handle, Code> {
        self.look_for_faults();
        self.device(ordinal)?.alive()?;
        Ok(ordinal as usize + 1)
    }

    /// The number of the device that a context belongs to.
    pub fn device_of(&self, context: Handle) -> Result<usize, Code> {
        let device = context.checked_sub(1).filter(|at| *at < self.device_count().unwrap_or(0));
        device.ok_or(Code::ERROR_INVALID_CONTEXT)
    }

    /// Changes the order of blocks, warps and lanes.
    pub fn set_seed(&mut self, seed: u64) {
        self.order = Order::new(seed);
    }

    /// Plants faults, in place of those that were planted before.
    pub fn plant(&mut self, faults: &str) {
        self.settings.plant(faults);
    }

    /// How often streams were asked to run something.
    pub fn launches(&self) -> Launches {
        self.launches
    }

    /// Finds what has gone wrong since.
    fn look_for_faults(&mut self) {
        if self.settings.faults().lost {
            for device in &mut self.devices {
                device.lose(Code::ERROR_ECC_UNCORRECTABLE);
            }
        }
    }

    /// A handle that no one has had before.
    fn handle(&mut self) -> Handle {
        self.last_handle += 1;
        self.last_handle
    }

    /// Takes memory of the host that work may read and write at any time.
    pub fn allocate_host(&mut self, bytes: usize) -> Result<usize, Code> {
        let region = Region::new(bytes).map_err(|_| Code::ERROR_OUT_OF_MEMORY)?;
        let address = region.address();
        self.host.insert(address, region);
        Ok(address)
    }

    /// Gives memory of the host back, once no work needs it.
    pub fn free_host(&mut self, address: usize) -> Result<(), Code> {
        for device in 0..self.devices.len() {
            // A device that is lost does not come to read it.
            if self.synchronise_device(device) == Err(Code::PENDING) {
                return Err(Code::PENDING);
            }
        }
        self.host.remove(&address).map(drop).ok_or(Code::ERROR_INVALID_VALUE)
    }

    /// Whether the driver has given out this memory of the host.
    pub fn is_pinned(&self, address: usize, bytes: usize) -> bool {
        device::covers(&self.host, address, bytes)
    }

    /// Takes memory of a device.
    pub fn allocate(&mut self, device: usize, bytes: usize) -> Result<usize, Code> {
        self.devices[device].allocate(bytes)
    }

    /// Gives memory of a device back, once no work needs it.
    pub fn free(&mut self, device: usize, address: usize) -> Result<(), Code> {
        self.synchronise_device(device)?;
        self.devices[device].free(address)
    }

    /// Bytes of a device's memory, free and in all.
    pub fn memory(&self, device: usize) -> (usize, usize) {
        self.devices[device].memory()
    }

    /// Checks that a range lies within one allocation.
    pub fn is_device_memory(&self, address: usize, bytes: usize) -> Result<(), Code> {
        let here = self.devices.iter().any(|device| device.has(address, bytes));
        if here { Ok(()) } else { Err(Code::ERROR_INVALID_VALUE) }
    }
}
