//! The gradients of all parameters together.

use burn::module::{AutodiffModule, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use burn::tensor::backend::{AutodiffBackend, Backend};

/// The length of all gradients as one vector. Where it is longer than `most`, they are shortened to it, as
/// PyTorch's `clip_grad_norm_` does; 0 is no limit.
pub(crate) fn clip<B: AutodiffBackend, M: AutodiffModule<B>>(
    module: &M,
    gradients: GradientsParams,
    most: f64,
) -> (GradientsParams, f64) {
    let mut squares = Squares::<B> {
        gradients: &gradients,
        sums: Vec::new(),
    };
    module.visit(&mut squares);
    let sums = squares.sums;
    if sums.is_empty() {
        return (gradients, 0.0);
    }
    let sums = Tensor::cat(sums, 0).into_data();
    let norm = sums.iter::<f64>().sum::<f64>().sqrt();
    let share = most / (norm + 1e-6);
    if most == 0.0 || share >= 1.0 {
        return (gradients, norm);
    }
    let mut scale = Scale {
        gradients,
        by: share,
    };
    module.visit(&mut scale);
    (scale.gradients, norm)
}

/// Sums of the squares of each gradient.
struct Squares<'a, B: AutodiffBackend> {
    gradients: &'a GradientsParams,
    sums: Vec<Tensor<B::InnerBackend, 1>>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Squares<'_, B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some(gradient) = self.gradients.get::<B::InnerBackend, D>(param.id) {
            self.sums.push(gradient.square().sum());
        }
    }
}

struct Scale {
    gradients: GradientsParams,
    by: f64,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Scale {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let gradients = &mut self.gradients;
        if let Some(gradient) = gradients.remove::<B::InnerBackend, D>(param.id) {
            gradients.register::<B::InnerBackend, D>(param.id, gradient.mul_scalar(self.by));
        }
    }
}

/// What is of rank 0 elsewhere.
pub(crate) fn number<B: Backend>(tensor: Tensor<B, 1>) -> f64 {
    let data = tensor.into_data();
    data.iter::<f64>().next().unwrap_or(f64::NAN)
}
