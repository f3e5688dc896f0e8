//! The backends, each behind the feature of its name, with what makes it fast.
//!
//! | feature | type | runs on |
//! |---|---|---|
//! | `flex` | `Flex` | CPU: AVX-512 where there is one, all cores, the loops of `reroute-kernels` |
//! | `ndarray` | `NdArray` | CPU, portable reference, slow |
//! | `wgpu` | `Wgpu` | GPUs through Vulkan (SPIR-V) |
//! | `webgpu` | `Wgpu` | GPUs through Metal, DirectX 12 or Vulkan, in WebGPU's own shading language |
//! | `cuda` | `Cuda` | NVIDIA GPUs; the driver is loaded at run time |
//!
//! Several may be compiled in. For training wrap one in `burn::backend::Autodiff`, which the feature
//! `autodiff` brings.

/// CPU, the fastest.
#[cfg(feature = "flex")]
pub type Flex = burn_flex::Flex;

/// CPU, portable.
#[cfg(feature = "ndarray")]
pub type NdArray = burn_ndarray::NdArray<f32>;

/// GPUs.
#[cfg(feature = "webgpu")]
pub type Wgpu = burn_wgpu::Wgpu<f32, i32>;

/// NVIDIA GPUs.
#[cfg(feature = "cuda")]
pub type Cuda = burn_cuda::Cuda<f32, i32>;
