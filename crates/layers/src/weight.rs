use burn::module::{
    AutodiffModule, Content, Devices, HasAutodiffModule, Initializer, Module, ModuleDisplay,
    ModuleDisplayDefault, ModuleMapper, ModuleVisitor, Param, ParamId,
};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{DType, Int, Tensor, TensorData};
use reroute_kernels::{Blocks, Format};

use crate::gradient::{Operation, Unranked, run};
use crate::host::{self, HostTensor};
use crate::linear::{dense_product, host_product, to_inputs};

/// A matrix that is multiplied with columns: floats, or codes of fewer bits. To visitors and in paths it is the one
/// parameter that it has; a record has codes as the numbers that they stand for.
#[derive(Debug, Clone)]
pub enum Weight<B: Backend> {
    /// `[out, in]`
    Float(Param<Tensor<B, 2>>),
    /// The same in a format of fewer bits.
    Coded(Coded<B>),
}

/// Rows of codes, with their scales among them; not trained.
#[derive(Debug, Clone)]
pub struct Coded<B: Backend> {
    /// `[out, words of a row]`: the bytes of the format, filled up to whole words of 32 bits.
    pub words: Param<Tensor<B, 2, Int>>,
    format: Format,
    columns: usize,
    /// What they are widened to: the type of the floats beside them.
    dtype: DType,
}

impl<B: Backend> Weight<B> {
    /// Floats that are lazily random until loaded.
    pub(crate) fn init(
        init: &Initializer,
        [output, input]: [usize; 2],
        device: &B::Device,
    ) -> Self {
        let (fan_in, fan_out) = (Some(input), Some(output));
        Self::Float(init.init_with([output, input], fan_in, fan_out, device))
    }

    /// `[out, in]`
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Float(weight) => weight.lazy_shape().dims(),
            Self::Coded(coded) => [coded.words.lazy_shape()[0], coded.columns],
        }
    }

    /// The device that the numbers lie on, or will.
    pub fn device(&self) -> B::Device {
        match self {
            Self::Float(weight) => weight.lazy_device(),
            Self::Coded(coded) => coded.words.lazy_device(),
        }
    }

    /// The format of the codes, if it is codes.
    pub fn format(&self) -> Option<Format> {
        match self {
            Self::Float(_) => None,
            Self::Coded(coded) => Some(coded.format),
        }
    }

    /// The numbers; of codes they are widened anew at every call.
    ///
    /// # Shapes
    /// - returns `[out, in]`
    pub fn val(&self) -> Tensor<B, 2> {
        match self {
            Self::Float(weight) => weight.val(),
            Self::Coded(coded) => coded.widened(coded.words.val(), coded.dtype),
        }
    }

    /// Some of its rows.
    ///
    /// # Shapes
    /// - `rows`: `[rows]`
    /// - returns `[rows, in]`
    pub(crate) fn rows(&self, rows: Tensor<B, 1, Int>) -> Tensor<B, 2> {
        match self {
            Self::Float(weight) => weight.val().select(0, rows),
            Self::Coded(coded) => coded.widened(coded.words.val().select(0, rows), coded.dtype),
        }
    }

    /// `W · x`
    ///
    /// # Shapes
    /// - `x`: `[in, rows]`
    /// - returns `[out, rows]`, of the type of `x`
    pub(crate) fn product(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        match self {
            Self::Float(weight) => dense_product(weight.val(), x),
            Self::Coded(coded) => coded.product(x),
        }
    }
}

impl<B: Backend> From<Tensor<B, 2>> for Weight<B> {
    fn from(weight: Tensor<B, 2>) -> Self {
        Self::Float(Param::from_tensor(weight))
    }
}

impl<B: Backend> Coded<B> {
    /// Rows of a format, each filled up to whole words of 32 bits, which are widened to `dtype` where a
    /// backend cannot multiply them; `None` if they are no such rows.
    pub fn new(
        format: Format,
        columns: usize,
        words: Vec<i32>,
        (device, dtype): (&B::Device, DType),
    ) -> Option<Self> {
        let row = format.row_bytes(columns)?.div_ceil(WORD);
        if row == 0 || !words.len().is_multiple_of(row) {
            return None;
        }
        let shape = [words.len() / row, row];
        let words = TensorData::new(words, shape);
        let words = Tensor::from_data(words, (device, DType::I32));
        Some(Self {
            words: Param::initialized(ParamId::new(), words),
            format,
            columns,
            dtype,
        })
    }

    /// The same codes elsewhere.
    fn with<C: Backend>(
        self,
        change: impl FnOnce(Param<Tensor<B, 2, Int>>) -> Param<Tensor<C, 2, Int>>,
    ) -> Coded<C> {
        Coded {
            words: change(self.words),
            format: self.format,
            columns: self.columns,
            dtype: self.dtype,
        }
    }

    fn product(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let words = self.words.val();
        let product = CodedProduct {
            words: HostTensor::of(&words),
            format: self.format,
            shape: [words.dims()[0], self.columns],
        };
        let product = run(product, [x.clone().into()]);
        product.unwrap_or_else(|| {
            // Not for longer than this product, unless gradients need it.
            let weight = self.widened(self.words.val(), x.dtype());
            dense_product(weight, x)
        })
    }

    /// # Shapes
    /// - `words`: `[rows, words of a row]`
    /// - returns `[rows, in]`
    fn widened(&self, words: Tensor<B, 2, Int>, dtype: DType) -> Tensor<B, 2> {
        let (rows, device) = (words.dims()[0], words.device());
        let mut numbers = vec![0.0; rows * self.columns];
        if let Some(blocks) = blocks(self.format, self.columns, &host::ints(words)) {
            blocks.widen_all(&mut numbers);
        }
        host::tensor(numbers, [rows, self.columns], dtype, &device)
    }
}

/// Bytes of a word.
const WORD: usize = size_of::<i32>();

fn blocks(format: Format, columns: usize, words: &[i32]) -> Option<Blocks<'_>> {
    let stride = format.row_bytes(columns)?.next_multiple_of(WORD);
    Blocks::new(format, columns, stride, bytemuck::cast_slice(words))
}

/// The product of codes with inputs, which alone get gradients.
#[derive(Debug, Clone)]
struct CodedProduct {
    words: HostTensor,
    format: Format,
    /// `[out, in]`
    shape: [usize; 2],
}

impl CodedProduct {
    fn weight(&self) -> Option<reroute_kernels::Weight<'_>> {
        let blocks = blocks(self.format, self.shape[1], self.words.slice()?)?;
        Some(reroute_kernels::Weight::Blocks(blocks))
    }
}

impl Operation<1> for CodedProduct {
    fn forward<B: Backend>(&self, [x]: [Unranked<B>; 1]) -> Option<Unranked<B>> {
        host_product(self.weight()?, self.shape, &x.ranked::<2>()).map(Unranked::from)
    }

    fn needs(&self, _: [bool; 1]) -> [bool; 1] {
        [false]
    }

    fn backward(
        &self,
        _: [HostTensor; 1],
        gradient: &HostTensor,
        _: [bool; 1],
    ) -> [Option<TensorData>; 1] {
        let weight = self.weight();
        [weight.and_then(|weight| to_inputs(weight, gradient, self.shape[0]))]
    }
}

impl<B: Backend> Module<B> for Weight<B> {
    type Record = Param<Tensor<B, 2>>;

    fn collect_devices(&self, devices: Devices<B>) -> Devices<B> {
        match self {
            Self::Float(weight) => weight.collect_devices(devices),
            Self::Coded(coded) => coded.words.collect_devices(devices),
        }
    }

    fn fork(self, device: &B::Device) -> Self {
        match self {
            Self::Float(weight) => Self::Float(weight.fork(device)),
            Self::Coded(coded) => Self::Coded(coded.with(|words| words.fork(device))),
        }
    }

    fn to_device(self, device: &B::Device) -> Self {
        match self {
            Self::Float(weight) => Self::Float(weight.to_device(device)),
            Self::Coded(coded) => Self::Coded(coded.with(|words| words.to_device(device))),
        }
    }

    fn visit<Visitor: ModuleVisitor<B>>(&self, visitor: &mut Visitor) {
        match self {
            Self::Float(weight) => visitor.visit_float(weight),
            Self::Coded(coded) => visitor.visit_int(&coded.words),
        }
    }

    fn map<Mapper: ModuleMapper<B>>(self, mapper: &mut Mapper) -> Self {
        match self {
            Self::Float(weight) => Self::Float(mapper.map_float(weight)),
            Self::Coded(coded) => Self::Coded(coded.with(|words| mapper.map_int(words))),
        }
    }

    fn load_record(self, record: Self::Record) -> Self {
        match self {
            Self::Float(weight) => Self::Float(weight.load_record(record)),
            Self::Coded(_) => Self::Float(record),
        }
    }

    fn into_record(self) -> Self::Record {
        match self {
            Self::Float(weight) => weight.into_record(),
            Self::Coded(_) => Param::from_tensor(self.val()),
        }
    }
}

impl<B: AutodiffBackend> AutodiffModule<B> for Weight<B> {
    type InnerModule = Weight<B::InnerBackend>;

    fn valid(&self) -> Self::InnerModule {
        match self {
            Self::Float(weight) => Weight::Float(weight.valid()),
            Self::Coded(coded) => Weight::Coded(coded.clone().with(|words| words.valid())),
        }
    }

    fn from_inner(module: Self::InnerModule) -> Self {
        match module {
            Weight::Float(weight) => Self::Float(AutodiffModule::from_inner(weight)),
            Weight::Coded(coded) => Self::Coded(coded.with(AutodiffModule::<B>::from_inner)),
        }
    }
}

impl<B: AutodiffBackend> HasAutodiffModule<B> for Weight<B::InnerBackend> {
    type TrainModule = Weight<B>;
}

impl<B: Backend> ModuleDisplayDefault for Weight<B> {
    fn content(&self, content: Content) -> Option<Content> {
        match self {
            Self::Float(weight) => weight.content(content),
            Self::Coded(coded) => coded.words.content(content),
        }
    }
}

impl<B: Backend> ModuleDisplay for Weight<B> {}
