//! The one place that names backends: exactly one is compiled in, by feature.

#[cfg(not(any(
    feature = "flex",
    feature = "ndarray",
    feature = "wgpu",
    feature = "cuda"
)))]
compile_error!(
    "no backend: build with exactly one of the features flex (the default), ndarray, wgpu, cuda, \
     for example `--no-default-features --features wgpu`"
);

#[cfg(any(
    all(
        feature = "flex",
        any(feature = "ndarray", feature = "wgpu", feature = "cuda")
    ),
    all(feature = "ndarray", any(feature = "wgpu", feature = "cuda")),
    all(feature = "wgpu", feature = "cuda"),
))]
compile_error!(
    "several backends: flex is the default feature, so choose another one with \
     `--no-default-features --features wgpu` (or ndarray, or cuda)"
);

/// Name of the backend that is compiled in.
pub const NAME: &str = if cfg!(feature = "flex") {
    "flex"
} else if cfg!(feature = "ndarray") {
    "ndarray"
} else if cfg!(feature = "wgpu") {
    "wgpu"
} else {
    "cuda"
};

/// Fastest CPU backend: AVX-512 where the processor has it, all cores.
#[cfg(all(
    feature = "flex",
    not(any(feature = "ndarray", feature = "wgpu", feature = "cuda"))
))]
pub type Backend = burn_flex::Flex;

/// Portable reference CPU backend.
#[cfg(all(
    feature = "ndarray",
    not(any(feature = "flex", feature = "wgpu", feature = "cuda"))
))]
pub type Backend = burn_ndarray::NdArray<f32>;

/// GPUs through Vulkan.
#[cfg(all(
    feature = "wgpu",
    not(any(feature = "flex", feature = "ndarray", feature = "cuda"))
))]
pub type Backend = burn_wgpu::Wgpu<f32, i32>;

/// NVIDIA GPUs; the driver is loaded at run time.
#[cfg(all(
    feature = "cuda",
    not(any(feature = "flex", feature = "ndarray", feature = "wgpu"))
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
    if cfg!(any(feature = "flex", feature = "ndarray")) {
        return Ok(Device::default());
    }
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let answer = std::panic::catch_unwind(probe);
    std::panic::set_hook(hook);
    match answer {
        Ok(Ok(device)) => Ok(device),
        Ok(Err(error)) => anyhow::bail!("the {NAME} backend cannot compute ({error:?}); {remedy}"),
        Err(_) => anyhow::bail!("the {NAME} backend finds no device; {remedy}"),
    }
}
