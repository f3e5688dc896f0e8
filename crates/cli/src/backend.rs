//! The backend that the program is built with: exactly one, by feature.

use std::sync::LazyLock;

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

/// Version of the program, and what it was built with.
pub fn version() -> &'static str {
    static VERSION: LazyLock<String> = LazyLock::new(|| {
        let features = [
            ("flex", cfg!(feature = "flex")),
            ("ndarray", cfg!(feature = "ndarray")),
            ("wgpu", cfg!(feature = "wgpu")),
            ("webgpu", cfg!(feature = "webgpu")),
            ("cuda", cfg!(feature = "cuda")),
        ];
        let built = features.iter().filter(|(_, is_built)| *is_built);
        let names: Vec<&str> = built.map(|(name, _)| *name).collect();
        format!(
            "{}\nbackend: {NAME}\nfeatures: {}",
            env!("CARGO_PKG_VERSION"),
            names.join(", ")
        )
    });
    &VERSION
}

/// Whether tensors lie in the machine's own memory.
pub const ON_HOST: bool = cfg!(any(feature = "flex", feature = "ndarray"));

/// Fastest CPU backend: AVX-512 where the processor has it, all cores.
#[cfg(all(
    feature = "flex",
    not(any(feature = "ndarray", feature = "webgpu", feature = "cuda"))
))]
pub type Backend = reroute_zoo::backend::Flex;

/// Portable reference CPU backend.
#[cfg(all(
    feature = "ndarray",
    not(any(feature = "flex", feature = "webgpu", feature = "cuda"))
))]
pub type Backend = reroute_zoo::backend::NdArray;

/// GPUs through Vulkan, or through what WebGPU stands on.
#[cfg(all(
    feature = "webgpu",
    not(any(feature = "flex", feature = "ndarray", feature = "cuda"))
))]
pub type Backend = reroute_zoo::backend::Wgpu;

/// NVIDIA GPUs; the driver is loaded at run time.
#[cfg(all(
    feature = "cuda",
    not(any(feature = "flex", feature = "ndarray", feature = "webgpu"))
))]
pub type Backend = reroute_zoo::backend::Cuda;

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
    use sysinfo::{CpuRefreshKind, RefreshKind, System};
    let what = RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing());
    let system = System::new_with_specifics(what);
    let brand = system.cpus().first().map_or("", |cpu| cpu.brand().trim());
    let (total, free) = host_memory().unzip();
    Adapter {
        name: if brand.is_empty() { "CPU" } else { brand }.to_string(),
        memory_bytes: total,
        available_bytes: free,
        largest_binding_bytes: None,
    }
}

/// The graphics card that the default device is. Made once, before anything computes on it: Burn
/// tells the card's name only then.
#[cfg(all(feature = "webgpu", not(any(feature = "flex", feature = "ndarray"))))]
pub fn adapter() -> Adapter {
    use std::sync::OnceLock;
    use wgpu::DeviceType;
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
        // No interface of WebGPU tells the memory of a card of its own.
        let shares = info.as_ref().is_some_and(|info| {
            matches!(
                info.device_type,
                DeviceType::Cpu | DeviceType::IntegratedGpu
            )
        });
        let (total, free) = host_memory().filter(|_| shares).unzip();
        Adapter {
            name: info.map_or("unknown".into(), |info| {
                format!("{} ({})", info.name, info.backend)
            }),
            memory_bytes: total,
            available_bytes: free,
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
    use cudarc::driver::CudaContext;
    // Loads the driver, and panics where there is none.
    let context = quietly(|| CudaContext::new(0).ok()).flatten();
    let name = context.as_ref().and_then(|context| context.name().ok());
    let memory = context.and_then(|context| context.mem_get_info().ok());
    let (free, total) = memory
        .map(|(free, total)| (free as u64, total as u64))
        .unzip();
    Adapter {
        name: name.unwrap_or("unknown".into()),
        memory_bytes: total,
        available_bytes: free,
        // What CubeCL takes of a card's memory at a time.
        largest_binding_bytes: total.map(|total| total / 4),
    }
}

/// The memory that this program may use, and what of it is free, in bytes: the machine's, or what a
/// container has of it. What holds nothing but copies of files is free.
#[cfg(not(feature = "cuda"))]
fn host_memory() -> Option<(u64, u64)> {
    use sysinfo::{MemoryRefreshKind, RefreshKind, System};
    let what = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let system = System::new_with_specifics(what);
    let (total, free) = (system.total_memory(), system.available_memory());
    if total == 0 {
        return None;
    }
    let container = system
        .cgroup_limits()
        .filter(|limits| limits.total_memory < total);
    Some(container.map_or((total, free), |limits| {
        let files = ["/sys/fs/cgroup", "/sys/fs/cgroup/memory"].map(|folder| {
            let stat = std::fs::read_to_string(format!("{folder}/memory.stat")).ok()?;
            unused_files(&stat)
        });
        let files = files.into_iter().flatten().next().unwrap_or(0);
        let limit = limits.total_memory;
        let left = limits.free_memory.saturating_add(files).min(limit);
        (limit, left.min(free))
    }))
}

/// Memory that the program has of the machine's, in bytes: its code, what it has read, and what its
/// allocator keeps.
pub fn own_memory() -> Option<u64> {
    use sysinfo::{ProcessRefreshKind, ProcessesToUpdate, System};
    let own = sysinfo::get_current_pid().ok()?;
    let mut system = System::new();
    let what = ProcessRefreshKind::nothing().with_memory();
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&[own]), false, what);
    Some(system.process(own)?.memory())
}

/// Bytes of files that a control group has read and does not use, of its `memory.stat`: version 1
/// counts the groups inside apart.
#[cfg(not(feature = "cuda"))]
fn unused_files(stat: &str) -> Option<u64> {
    let value = |name: &str| {
        let lines = stat.lines().filter_map(|line| line.split_once(' '));
        let mut values = lines.filter(|(key, _)| *key == name);
        values.next()?.1.trim().parse().ok()
    };
    value("total_inactive_file").or_else(|| value("inactive_file"))
}

/// How the backend keeps numbers of a type, and what it computes with.
pub fn numbers(dtype: DType) -> reroute_zoo::Arithmetic {
    reroute_zoo::Arithmetic {
        bytes: dtype.size(),
        threads: cfg!(feature = "flex").then(rayon::current_num_threads),
    }
}

/// A type, if the backend computes in it, or f32.
pub fn or_f32(dtype: DType) -> DType {
    let supported = device().is_ok_and(|device| dtypes(&device).contains(&dtype));
    if supported { dtype } else { DType::F32 }
}

/// The types that models can be loaded in and computed with.
pub fn dtypes(device: &Device) -> Vec<DType> {
    let all = [DType::F32, DType::F16, DType::BF16];
    let supported =
        |dtype: &DType| <Backend as burn::tensor::backend::Backend>::supports_dtype(device, *dtype);
    all.into_iter().filter(supported).collect()
}

#[cfg(all(test, not(feature = "cuda")))]
mod tests {
    use super::*;

    #[test]
    fn the_machine_has_memory_and_some_of_it_is_free() {
        let (total, free) = host_memory().expect("known on this system");
        assert!(free > 0 && free <= total, "{free} of {total}");
    }

    #[test]
    fn files_that_a_container_has_read_are_no_memory_in_use() {
        let second = "anon 4096\nfile 9000\ninactive_file 8192\nactive_file 808\n";
        let first = "cache 1\ninactive_file 2\ntotal_inactive_file 3\n";
        assert_eq!(unused_files(second), Some(8192));
        assert_eq!(unused_files(first), Some(3));
        assert_eq!(unused_files("inactive_files 7\ninactive_file x"), None);
    }
}
