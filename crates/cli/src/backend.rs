//! The one place that names backends: exactly one is compiled in, by feature.

use burn::tensor::DType;

#[cfg(not(any(
    feature = "flex",
    feature = "ndarray",
    feature = "webgpu",
    feature = "cuda"
)))]
compile_error!(
    "no backend: build with exactly one of the features flex (the default), ndarray, wgpu, webgpu, \
     cuda, for example `--no-default-features --features wgpu`"
);

#[cfg(any(
    all(
        feature = "flex",
        any(feature = "ndarray", feature = "webgpu", feature = "cuda")
    ),
    all(feature = "ndarray", any(feature = "webgpu", feature = "cuda")),
    all(feature = "webgpu", feature = "cuda"),
))]
compile_error!(
    "several backends: flex is the default feature, so choose another one with \
     `--no-default-features --features wgpu` (or webgpu, ndarray, cuda)"
);

/// Name of the backend that is compiled in.
pub const NAME: &str = if cfg!(feature = "flex") {
    "flex"
} else if cfg!(feature = "ndarray") {
    "ndarray"
} else if cfg!(feature = "wgpu") {
    "wgpu"
} else if cfg!(feature = "webgpu") {
    "webgpu"
} else {
    "cuda"
};

/// Whether tensors lie in the machine's own memory.
pub const ON_HOST: bool = cfg!(any(feature = "flex", feature = "ndarray"));

/// Fastest CPU backend: AVX-512 where the processor has it, all cores.
#[cfg(all(
    feature = "flex",
    not(any(feature = "ndarray", feature = "webgpu", feature = "cuda"))
))]
pub type Backend = burn_flex::Flex;

/// Portable reference CPU backend.
#[cfg(all(
    feature = "ndarray",
    not(any(feature = "flex", feature = "webgpu", feature = "cuda"))
))]
pub type Backend = burn_ndarray::NdArray<f32>;

/// GPUs through Vulkan, or through what WebGPU stands on.
#[cfg(all(
    feature = "webgpu",
    not(any(feature = "flex", feature = "ndarray", feature = "cuda"))
))]
pub type Backend = burn_wgpu::Wgpu<f32, i32>;

/// NVIDIA GPUs; the driver is loaded at run time.
#[cfg(all(
    feature = "cuda",
    not(any(feature = "flex", feature = "ndarray", feature = "webgpu"))
))]
pub type Backend = burn_cuda::Cuda<f32, i32>;

/// Device of the backend.
pub type Device = burn::tensor::Device<Backend>;

/// The default device, after checking that it can compute: GPU backends panic without a driver.
pub fn device() -> anyhow::Result<Device> {
    let probe = || {
        let device = Device::default();
        let one = burn::tensor::Tensor::<Backend, 1>::ones([1], &device);
        one.try_into_data().map(|_| device)
    };
    let remedy = "install its driver, or build with another backend (README, \"Backends\")";
    if ON_HOST {
        return Ok(Device::default());
    }
    match quietly(probe) {
        Some(Ok(device)) => Ok(device),
        Some(Err(error)) => {
            anyhow::bail!("the {NAME} backend cannot compute ({error:?}); {remedy}")
        }
        None => anyhow::bail!("the {NAME} backend finds no device; {remedy}"),
    }
}

/// The result of what may panic, without a word about it.
fn quietly<T>(work: impl FnOnce() -> T) -> Option<T> {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let answer = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    std::panic::set_hook(hook);
    answer.ok()
}

/// What computes. `None` is what the backend does not say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adapter {
    /// Processor or graphics card.
    pub name: String,
    /// All of its memory, in bytes.
    pub memory_bytes: Option<u64>,
    /// What of it is free now, in bytes.
    pub available_bytes: Option<u64>,
    /// The largest tensor that an operation takes, in bytes.
    pub largest_binding_bytes: Option<u64>,
}

/// The processor that the default device is.
#[cfg(any(feature = "flex", feature = "ndarray"))]
pub fn adapter() -> Adapter {
    use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};
    let what = RefreshKind::nothing()
        .with_cpu(CpuRefreshKind::nothing())
        .with_memory(MemoryRefreshKind::nothing().with_ram());
    let system = System::new_with_specifics(what);
    let brand = system.cpus().first().map_or("", |cpu| cpu.brand().trim());
    // Where a container may use less than the machine has, its limit counts.
    let (total, available) = match system.cgroup_limits() {
        Some(limits) => (limits.total_memory, limits.free_memory),
        None => (system.total_memory(), system.available_memory()),
    };
    Adapter {
        name: if brand.is_empty() { "CPU" } else { brand }.to_string(),
        memory_bytes: Some(total),
        available_bytes: Some(available.min(system.available_memory())),
        largest_binding_bytes: None,
    }
}

/// The graphics card that the default device is. Made once, before anything computes on it: Burn
/// tells the card's name only then.
#[cfg(all(feature = "webgpu", not(any(feature = "flex", feature = "ndarray"))))]
pub fn adapter() -> Adapter {
    use std::sync::OnceLock;
    static ADAPTER: OnceLock<Adapter> = OnceLock::new();
    let ask = || {
        let setup = quietly(|| {
            burn_wgpu::init_setup::<burn_wgpu::graphics::AutoGraphicsApi>(
                &Device::default(),
                Default::default(),
            )
        });
        let info = setup.as_ref().map(|setup| setup.adapter.get_info());
        let limits = setup.as_ref().map(|setup| setup.device.limits());
        Adapter {
            name: info.map_or("unknown".into(), |info| {
                format!("{} ({})", info.name, info.backend)
            }),
            memory_bytes: None,
            available_bytes: None,
            largest_binding_bytes: limits.map(|limits| limits.max_storage_buffer_binding_size),
        }
    };
    ADAPTER.get_or_init(ask).clone()
}

/// The graphics card that the default device is.
#[cfg(all(
    feature = "cuda",
    not(any(feature = "flex", feature = "ndarray", feature = "webgpu"))
))]
pub fn adapter() -> Adapter {
    use burn_cubecl::cubecl::{Runtime, cuda::CudaRuntime};
    // CubeCL takes a quarter of the card's memory at a time.
    let page = quietly(|| {
        let client = CudaRuntime::client(&Device::default());
        client.properties().memory.max_page_size
    });
    Adapter {
        name: "CUDA device 0".into(),
        memory_bytes: page.map(|page| page.saturating_mul(4)),
        available_bytes: None,
        largest_binding_bytes: page,
    }
}

/// The types that models can be loaded in and computed with.
pub fn dtypes(device: &Device) -> Vec<DType> {
    let all = [DType::F32, DType::F16, DType::BF16];
    let supported =
        |dtype: &DType| <Backend as burn::tensor::backend::Backend>::supports_dtype(device, *dtype);
    all.into_iter().filter(supported).collect()
}
