//! The gradients of all parameters together.

use burn::module::{AutodiffModule, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{DType, Tensor};

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

/// The gradients of all that is trained, one behind the other.
pub(crate) struct Flat<B: Backend> {
    /// `[numbers of all parameters]`; 0 where there is no gradient.
    pub(crate) numbers: Option<Tensor<B, 1>>,
    /// Which parameters have one.
    pub(crate) is_there: Vec<bool>,
}

/// In the order in which the module has its parameters, the same in every copy of it.
pub(crate) fn flat<B: AutodiffBackend, M: AutodiffModule<B>>(
    module: &M,
    gradients: GradientsParams,
) -> Flat<B::InnerBackend> {
    let mut flatten = Flatten::<B> {
        gradients,
        parts: Vec::new(),
        is_there: Vec::new(),
    };
    module.visit(&mut flatten);
    let Flatten {
        parts, is_there, ..
    } = flatten;
    Flat {
        numbers: (!parts.is_empty()).then(|| Tensor::cat(parts, 0)),
        is_there,
    }
}

/// The way back.
pub(crate) fn unflat<B: AutodiffBackend, M: AutodiffModule<B>>(
    module: &M,
    flat: Flat<B::InnerBackend>,
) -> GradientsParams {
    let Some(numbers) = flat.numbers else {
        return GradientsParams::new();
    };
    let mut unflatten = Unflatten::<B> {
        numbers,
        is_there: flat.is_there.into_iter(),
        at: 0,
        gradients: GradientsParams::new(),
    };
    module.visit(&mut unflatten);
    unflatten.gradients
}

struct Flatten<B: AutodiffBackend> {
    gradients: GradientsParams,
    parts: Vec<Tensor<B::InnerBackend, 1>>,
    is_there: Vec<bool>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Flatten<B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if !param.is_require_grad() {
            return;
        }
        let gradient = self.gradients.remove::<B::InnerBackend, D>(param.id);
        self.is_there.push(gradient.is_some());
        let value = param.val();
        let count = value.shape().num_elements();
        self.parts.push(match gradient {
            Some(gradient) => gradient.reshape([count]).cast(DType::F32),
            None => Tensor::zeros([count], (&value.device(), DType::F32)),
        });
    }
}

struct Unflatten<B: AutodiffBackend> {
    numbers: Tensor<B::InnerBackend, 1>,
    is_there: std::vec::IntoIter<bool>,
    at: usize,
    gradients: GradientsParams,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Unflatten<B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if !param.is_require_grad() {
            return;
        }
        let shape = param.val().dims();
        let count = shape.iter().product();
        if self.is_there.next() == Some(true) {
            let gradient = self.numbers.clone().narrow(0, self.at, count);
            let gradient = gradient.reshape(shape);
            self.gradients
                .register::<B::InnerBackend, D>(param.id, gradient);
        }
        self.at += count;
    }
}
