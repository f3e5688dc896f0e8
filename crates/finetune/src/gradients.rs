//! The gradients of all parameters together.

use burn::module::{AutodiffModule, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use burn::tensor::backend::AutodiffBackend;

use crate::{TuneError, host};

/// Gradients whose length as one vector is at most `most`, and the length that they had: a longer vector is
/// shortened as PyTorch's `clip_grad_norm_` does; 0 is no limit. (Burn clips each tensor by itself.)
///
/// # Errors
/// [`TuneError::Device`].
pub fn clip<B: AutodiffBackend, M: AutodiffModule<B>>(
    module: &M,
    gradients: GradientsParams,
    most: f64,
) -> Result<(GradientsParams, f64), TuneError> {
    let mut squares = Squares::<B> {
        gradients: &gradients,
        sums: Vec::new(),
    };
    module.visit(&mut squares);
    let sums = squares.sums;
    if sums.is_empty() {
        return Ok((gradients, 0.0));
    }
    let norm = host::sum(Tensor::cat(sums, 0))?.sqrt();
    let share = most / (norm + 1e-6);
    if most == 0.0 || share >= 1.0 {
        return Ok((gradients, norm));
    }
    let mut scale = Scale {
        gradients,
        by: share,
    };
    module.visit(&mut scale);
    Ok((scale.gradients, norm))
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
