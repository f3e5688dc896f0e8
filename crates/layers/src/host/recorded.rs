//! The same way through the one autodiff backend that wraps a backend in this program's memory.

use std::any::Any;
use std::array::from_fn;
use std::marker::PhantomData;

use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::ops::{FloatTensor, FloatTensorOps};
use burn::tensor::{DType, Shape, Tensor, TensorData, TensorMetadata};
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::NoCheckpointing;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};
use burn_autodiff::{Autodiff, NodeId};
use burn_flex::{Flex, FlexDevice, FlexTensor};

use super::{HostTensor, data};
use crate::gradient::{Operation, Unranked};

/// A tensor with its place in a graph; the same type for every strategy of checkpoints.
type Tracked = FloatTensor<Autodiff<Flex>>;

/// Runs an operation below an autodiff backend, and records it as one step if an input is tracked. `None`
/// on any other backend, and for numbers that are no floats of at most 32 bits.
pub(crate) fn recorded<B: Backend, O: Operation<N>, const N: usize, const D: usize>(
    operation: O,
    inputs: &[Unranked<B>; N],
) -> Option<Tensor<B, D>> {
    let inputs: Vec<Tracked> = inputs
        .iter()
        .map(|input| tracked(&input.0).cloned())
        .collect::<Option<_>>()?;
    let inputs: [Tracked; N] = inputs.try_into().ok()?;
    let is_float = |x: &Tracked| matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16);
    if !inputs.iter().all(is_float) {
        return None;
    }
    let inner = inputs.each_ref().map(|x| Unranked(x.primitive.clone()));
    let Unranked(output) = operation.forward::<Flex>(inner)?;
    let wanted = inputs.each_ref().map(|x| x.is_tracked());
    let nodes = inputs.each_ref().map(|x| x.node.clone());
    let step = Step(PhantomData).prepare::<NoCheckpointing>(nodes);
    let output = match step.compute_bound().stateful() {
        OpsKind::Tracked(mut step) => {
            let needs = operation.needs(wanted);
            let state = State {
                kept: from_fn(|at| needs[at].then(|| step.checkpoint(&inputs[at]))),
                kinds: inputs.each_ref().map(|x| (x.shape(), x.dtype())),
                operation,
            };
            step.finish(state, output)
        }
        OpsKind::UnTracked(_) => Autodiff::<Flex>::from_inner(output),
    };
    let output = (Box::new(output) as Box<dyn Any>).downcast().ok()?;
    Some(Unranked::<B>(*output).ranked())
}

/// A share in the numbers of a tensor that gets no gradient, if they are in this program's memory.
pub(crate) fn untracked<B: Backend, const D: usize>(tensor: &Tensor<B, D>) -> HostTensor {
    let Unranked(input) = Unranked::from(tensor.clone());
    match tracked(&input) {
        Some(input) => HostTensor((!input.is_tracked()).then(|| input.primitive.clone())),
        None => HostTensor::of(tensor),
    }
}

fn tracked<T: 'static>(tensor: &T) -> Option<&Tracked> {
    (tensor as &dyn Any).downcast_ref()
}

/// The step of an operation.
#[derive(Debug)]
struct Step<O>(PhantomData<O>);

/// What it needs to go back.
#[derive(Debug, Clone)]
struct State<O, const N: usize> {
    operation: O,
    /// Inputs that gradients are made of.
    kept: [Option<NodeId>; N],
    kinds: [(Shape, DType); N],
}

impl<O: Operation<N>, const N: usize> Backward<Flex, N> for Step<O> {
    type State = State<O, N>;

    fn backward(
        self,
        step: Ops<State<O, N>, N>,
        gradients: &mut Gradients,
        kept: &mut Checkpointer,
    ) {
        let packed = |tensor| HostTensor(Some(tensor)).packed();
        let gradient = packed(gradients.consume::<Flex>(&step.node));
        let state = step.state;
        let inputs = state.kept.map(|id| match id {
            Some(id) => packed(kept.retrieve_node_output::<FlexTensor>(id)),
            None => HostTensor(None),
        });
        let wanted = step.parents.each_ref().map(Option::is_some);
        let found = state.operation.backward(inputs, &gradient, wanted);
        let parents = step.parents.into_iter().zip(state.kinds);
        for ((parent, (shape, dtype)), found) in parents.zip(found) {
            if let (Some(parent), Some(found)) = (parent, found) {
                let found = Flex::float_from_data(fit(found, shape, dtype), &FlexDevice);
                gradients.register::<Flex>(parent.id, found);
            }
        }
    }
}

/// In a shape of as many numbers and in a type.
fn fit(found: TensorData, shape: Shape, dtype: DType) -> TensorData {
    let found = match found.dtype {
        DType::F32 if dtype != DType::F32 => match found.as_slice() {
            Ok(singles) => data(singles.to_vec(), shape.clone(), dtype),
            Err(_) => found,
        },
        _ => found.convert_dtype(dtype),
    };
    TensorData { shape, ..found }
}
