//! Streams are captured and graphs launched as a driver does it, and what it refuses meanwhile is
//! refused.

use std::ptr::null_mut;
use std::sync::{Arc, LazyLock};

use cudarc::driver::sys::{self, CUresult as R, CUstreamCaptureMode as Mode};
use cudarc::driver::{CudaContext, result};
use cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use entente_cuda_emulator::stand_in::{self, Emulator};

static EMULATOR: LazyLock<Emulator> = LazyLock::new(stand_in::load);

/// A stream, 64 numbers on the device, and memory of the host for as many, twice.
struct Machine {
    context: Arc<CudaContext>,
    stream: sys::CUstream,
    device: sys::CUdeviceptr,
    host: *mut f32,
}

const BYTES: usize = 256;

impl Machine {
    fn new() -> Self {
        LazyLock::force(&EMULATOR);
        let context = CudaContext::new(0).unwrap();
        // SAFETY: freed when the process ends.
        unsafe {
            let stream = result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
            let device = result::malloc_sync(BYTES).unwrap();
            let host = result::malloc_host(2 * BYTES, 0).unwrap().cast::<f32>();
            std::slice::from_raw_parts_mut(host, 128).fill(0.0);
            Self { context, stream, device, host }
        }
    }

    fn begin(&self, mode: Mode) -> R {
        // SAFETY: the stream lives.
        unsafe { sys::cuStreamBeginCapture_v2(self.stream, mode) }
    }

    fn end(&self) -> Result<sys::CUgraph, R> {
        let mut graph = null_mut();
        // SAFETY: the stream lives; the pointer is to a local of its type.
        match unsafe { sys::cuStreamEndCapture(self.stream, &raw mut graph) } {
            R::CUDA_SUCCESS => Ok(graph),
            code => Err(code),
        }
    }

    /// Up to the device, to its own end of the memory of the host, and back.
    fn there_and_back(&self) {
        // SAFETY: so many bytes on each side.
        unsafe {
            let up = sys::cuMemcpyHtoDAsync_v2(self.device, self.host.cast(), BYTES, self.stream);
            let back = self.host.add(64).cast();
            let down = sys::cuMemcpyDtoHAsync_v2(back, self.device, BYTES, self.stream);
            assert_eq!((up, down), (R::CUDA_SUCCESS, R::CUDA_SUCCESS));
        }
    }

    /// What came back, after a wait.
    fn back(&self) -> f32 {
        // SAFETY: within the memory; nothing is under way.
        unsafe {
            result::stream::synchronize(self.stream).unwrap();
            self.host.add(64).read()
        }
    }

    fn put(&self, value: f32) {
        // SAFETY: within the memory; nothing is under way.
        unsafe { self.host.write(value) }
    }
}

/// Has something done while a stream is captured; what it says, and then the end of the capture.
fn during(mode: Mode, act: impl FnOnce(&Machine) -> R) -> (R, Option<R>) {
    let machine = Machine::new();
    assert_eq!(machine.begin(mode), R::CUDA_SUCCESS);
    let told = act(&machine);
    let end = machine.end().err();
    // And the stream goes on as if nothing had been.
    machine.put(7.0);
    machine.there_and_back();
    assert_eq!(machine.back(), 7.0);
    (told, end)
}

const REFUSED: (R, Option<R>) =
    (R::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, Some(R::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED));

#[test]
fn what_is_captured_is_done_at_each_launch_and_not_before() {
    let machine = Machine::new();
    let before = EMULATOR.launches();
    assert_eq!(machine.begin(Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), R::CUDA_SUCCESS);
    machine.put(3.0);
    machine.there_and_back();
    let graph = machine.end().unwrap();
    assert_eq!(machine.back(), 0.0, "nothing has been done");
    let mut executable = null_mut();
    // SAFETY: what is made here is destroyed here.
    unsafe {
        let made = sys::cuGraphInstantiateWithFlags(&raw mut executable, graph, 0);
        assert_eq!(made, R::CUDA_SUCCESS);
        assert_eq!(sys::cuGraphDestroy(graph), R::CUDA_SUCCESS);
        assert_eq!(sys::cuGraphDestroy(graph), R::CUDA_ERROR_INVALID_HANDLE);
        for value in [4.0, 5.0] {
            machine.put(value);
            assert_eq!(sys::cuGraphLaunch(executable, machine.stream), R::CUDA_SUCCESS);
            assert_eq!(machine.back(), value, "of the memory as it is now");
        }
        machine.put(6.0);
        assert_eq!(sys::cuGraphLaunch(executable, machine.stream), R::CUDA_SUCCESS);
        assert_eq!(sys::cuGraphExecDestroy(executable), R::CUDA_SUCCESS);
        assert_eq!(machine.back(), 6.0, "what was launched is done all the same");
        let gone = sys::cuGraphLaunch(executable, machine.stream);
        assert_eq!(gone, R::CUDA_ERROR_INVALID_HANDLE);
    }
    let [before, after] = [before, EMULATOR.launches()].map(Option::unwrap);
    assert_eq!((after.graphs - before.graphs, after.kernels - before.kernels), (3, 0));
}

#[test]
fn whoever_waits_for_what_is_captured_voids_the_capture() {
    let local = Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    let relaxed = Mode::CU_STREAM_CAPTURE_MODE_RELAXED;
    for mode in [local, relaxed] {
        // SAFETY: handles that live.
        assert_eq!(during(mode, |m| unsafe { sys::cuStreamSynchronize(m.stream) }), REFUSED);
        // SAFETY: as above.
        assert_eq!(during(mode, |m| unsafe { sys::cuStreamQuery(m.stream) }), REFUSED);
        // SAFETY: as above.
        assert_eq!(during(mode, |_| unsafe { sys::cuCtxSynchronize() }), REFUSED);
    }
    // Of another thread as well.
    let other = |machine: &Machine| {
        let context = machine.context.clone();
        let wait = move || {
            context.bind_to_thread().unwrap();
            // SAFETY: nothing to get wrong.
            unsafe { sys::cuCtxSynchronize() }
        };
        std::thread::spawn(wait).join().unwrap()
    };
    assert_eq!(during(local, other), REFUSED);
}

#[test]
fn copies_of_memory_that_may_move_are_refused() {
    let mut own = vec![0u8; BYTES];
    let to = own.as_mut_ptr().cast();
    for mode in [Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, Mode::CU_STREAM_CAPTURE_MODE_RELAXED] {
        // SAFETY: so many bytes on each side.
        let up = |m: &Machine| unsafe { sys::cuMemcpyHtoDAsync_v2(m.device, to, BYTES, m.stream) };
        assert_eq!(during(mode, up), REFUSED);
        // SAFETY: as above.
        let down =
            |m: &Machine| unsafe { sys::cuMemcpyDtoHAsync_v2(to, m.device, BYTES, m.stream) };
        assert_eq!(during(mode, down), REFUSED);
    }
}

#[test]
fn calls_that_may_wait_are_refused_to_whom_the_mode_says() {
    let take = || {
        let mut address = 0;
        // SAFETY: the pointer is to a local of its type.
        unsafe { sys::cuMemAlloc_v2(&raw mut address, 64) }
    };
    let pin = || {
        let mut address = null_mut();
        // SAFETY: the pointer is to a local of its type.
        unsafe { sys::cuMemHostAlloc(&raw mut address, 64, 0) }
    };
    let elsewhere = |machine: &Machine| {
        let context = machine.context.clone();
        let there = move || {
            context.bind_to_thread().unwrap();
            take()
        };
        std::thread::spawn(there).join().unwrap()
    };
    let [global, local, relaxed] = [
        Mode::CU_STREAM_CAPTURE_MODE_GLOBAL,
        Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
        Mode::CU_STREAM_CAPTURE_MODE_RELAXED,
    ];
    let allowed = (R::CUDA_SUCCESS, None);
    for mode in [global, local] {
        assert_eq!(during(mode, |_| take()), REFUSED);
        assert_eq!(during(mode, |_| pin()), REFUSED);
        // SAFETY: memory that lives; the call is refused.
        assert_eq!(during(mode, |m| unsafe { sys::cuMemFree_v2(m.device) }), REFUSED);
        // SAFETY: so many bytes on each side; as above.
        let copy = |m: &Machine| unsafe { sys::cuMemcpyHtoD_v2(m.device, m.host.cast(), BYTES) };
        assert_eq!(during(mode, copy), REFUSED);
    }
    assert_eq!(during(relaxed, |_| take()), allowed);
    assert_eq!(during(global, elsewhere), REFUSED);
    assert_eq!(during(local, elsewhere), allowed);
}

#[test]
fn an_event_that_was_captured_is_a_place_in_a_graph_and_nothing_else() {
    let mut event = null_mut();
    let (told, end) = during(Mode::CU_STREAM_CAPTURE_MODE_RELAXED, |machine| {
        // SAFETY: handles that live.
        unsafe {
            assert_eq!(sys::cuEventCreate(&raw mut event, 0), R::CUDA_SUCCESS);
            assert_eq!(sys::cuEventRecord(event, machine.stream), R::CUDA_SUCCESS);
            sys::cuEventSynchronize(event)
        }
    });
    assert_eq!((told, end), (R::CUDA_ERROR_CAPTURED_EVENT, None));
    // SAFETY: handles that live.
    let query = |_: &Machine| unsafe { sys::cuEventQuery(event) };
    let (told, _) = during(Mode::CU_STREAM_CAPTURE_MODE_RELAXED, query);
    assert_eq!(told, R::CUDA_ERROR_CAPTURED_EVENT, "until it is recorded again");
    let from_outside = |machine: &Machine| {
        // SAFETY: handles that live.
        unsafe { sys::cuStreamWaitEvent(machine.stream, event, 0) }
    };
    let (told, end) = during(Mode::CU_STREAM_CAPTURE_MODE_RELAXED, from_outside);
    assert_eq!(told, R::CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    assert_eq!(end, Some(R::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED));
}

#[test]
fn a_capture_begins_once_and_ends_on_its_own_thread() {
    let machine = Machine::new();
    let local = Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    assert_eq!(machine.end().err(), Some(R::CUDA_ERROR_ILLEGAL_STATE));
    assert_eq!(machine.begin(local), R::CUDA_SUCCESS);
    assert_eq!(machine.begin(local), R::CUDA_ERROR_ILLEGAL_STATE);
    let (context, stream) = (machine.context.clone(), machine.stream as usize);
    let ended = std::thread::spawn(move || {
        context.bind_to_thread().unwrap();
        let mut graph = null_mut();
        // SAFETY: the stream lives; the pointer is to a local of its type.
        unsafe { sys::cuStreamEndCapture(stream as sys::CUstream, &raw mut graph) }
    });
    assert_eq!(ended.join().unwrap(), R::CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
    assert_eq!(machine.end().err(), Some(R::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED));
    // SAFETY: a null pointer is the default stream.
    let default = unsafe { sys::cuStreamBeginCapture_v2(null_mut(), local) };
    assert_eq!(default, R::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
}

#[test]
fn kernels_of_a_graph_run_in_their_order() {
    let machine = Machine::new();
    let options = CompileOptions { arch: Some("sm_90"), ..Default::default() };
    let image = compile_ptx_with_opts("", options).unwrap();
    let function = machine.context.load_module(image).unwrap();
    let function = function.load_function("emulator_shuffle").unwrap();
    machine.put(1.0);
    assert_eq!(machine.begin(Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), R::CUDA_SUCCESS);
    let (mut x, mut y) = (machine.device, machine.device);
    let mut arguments = [(&raw mut x).cast(), (&raw mut y).cast()];
    // SAFETY: the arguments are the kernel's; it reads and writes 32 numbers in place.
    unsafe {
        let (up, mut executable) = (machine.host.cast(), null_mut());
        let copied = sys::cuMemcpyHtoDAsync_v2(machine.device, up, BYTES, machine.stream);
        assert_eq!(copied, R::CUDA_SUCCESS);
        let (grid, block) = ((1, 1, 1), (32, 1, 1));
        let function = function.cu_function();
        for _ in 0..2 {
            result::launch_kernel(function, grid, block, 0, machine.stream, &mut arguments)
                .unwrap();
        }
        let back = machine.host.add(64).cast();
        let copied = sys::cuMemcpyDtoHAsync_v2(back, machine.device, BYTES, machine.stream);
        assert_eq!(copied, R::CUDA_SUCCESS);
        let graph = machine.end().unwrap();
        let made = sys::cuGraphInstantiateWithFlags(&raw mut executable, graph, 0);
        assert_eq!(made, R::CUDA_SUCCESS);
        assert_eq!(sys::cuGraphLaunch(executable, machine.stream), R::CUDA_SUCCESS);
    }
    // The sum over the warp, and ten times lane 5: 1 in each lane, and then that of those.
    assert_eq!(machine.back(), 32.0 + 10.0);
}
