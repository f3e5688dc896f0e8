//! The messages of an ONNX file (<https://github.com/onnx/onnx/blob/main/onnx/onnx.proto>) as Protocol Buffers
//! encode them (<https://protobuf.dev/programming-guides/encoding/>), passed one by one: the file may claim
//! anything, and nothing of a tensor is read but where its numbers lie.

use std::collections::BTreeMap;
use std::io::{self, BufReader, Read};

use safetensors::Dtype;

use crate::CheckpointError;
use crate::folder::{ReadSeek, Source};

/// Longest name, in bytes.
const MAX_NAME: u64 = 4096;
const MAX_NODES: usize = 1 << 20;
const MAX_INPUTS: usize = 4096;
const MAX_AXES: usize = 8;
/// Attributes that change what a node with weights computes.
const ATTRIBUTES: [&str; 8] = [
    "alpha",
    "beta",
    "dilations",
    "epsilon",
    "pads",
    "strides",
    "transA",
    "transB",
];
const MAX_NUMBERS: usize = 16;
/// Longest tensor whose numbers are read with the graph, in bytes.
const MAX_SMALL: u64 = 64;

/// A node of the graph.
#[derive(Debug, Default)]
pub(super) struct Node {
    pub(super) name: String,
    pub(super) op: String,
    pub(super) inputs: Vec<String>,
    pub(super) outputs: Vec<String>,
    /// The modules that it lies in, outermost first, where the exporter says it beside the name.
    pub(super) scopes: Option<String>,
    /// Attributes that are a few numbers, of those that matter.
    pub(super) attributes: BTreeMap<String, Vec<f64>>,
    /// `approximate` of a `Gelu`.
    pub(super) approximate: String,
    /// `value` of a `Constant`.
    pub(super) value: Option<Tensor>,
}

/// Where a tensor lies.
#[derive(Debug, Default)]
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    kind: u64,
    /// Offset and length of its numbers in the file.
    pub(super) data: Option<(u64, u64)>,
    /// The numbers of one with few of them.
    pub(super) small: Vec<u8>,
    /// Whether its numbers lie in another file.
    pub(super) is_external: bool,
    /// Name of that file, and where they lie there.
    pub(super) location: String,
    pub(super) offset: u64,
    pub(super) length: Option<u64>,
}

impl Node {
    /// A number of an attribute, if that matters.
    fn attribute(&mut self, name: &str, number: f64) {
        if ATTRIBUTES.contains(&name) {
            let numbers = self.attributes.entry(name.to_owned()).or_default();
            if numbers.len() < MAX_NUMBERS {
                numbers.push(number);
            }
        }
    }
}

impl Tensor {
    /// Type of its elements, if it has a length.
    pub(super) fn dtype(&self) -> Option<Dtype> {
        Some(match self.kind {
            1 => Dtype::F32,
            2 => Dtype::U8,
            3 => Dtype::I8,
            4 => Dtype::U16,
            5 => Dtype::I16,
            6 => Dtype::I32,
            7 => Dtype::I64,
            9 => Dtype::BOOL,
            10 => Dtype::F16,
            11 => Dtype::F64,
            12 => Dtype::U32,
            13 => Dtype::U64,
            16 => Dtype::BF16,
            _ => return None,
        })
    }
}

/// What a graph is made of.
pub(super) enum Part {
    Node(Node),
    Tensor(Tensor),
}

/// Passes every node and tensor of a file's graph, in the order of the file.
pub(super) fn each_part(
    source: &Source,
    file: &str,
    each: &mut dyn FnMut(Part) -> Result<(), Fault>,
) -> Result<(), CheckpointError> {
    let failed = |source| CheckpointError::Read {
        file: file.to_owned(),
        source,
    };
    let (reader, bytes) = source.open().map_err(failed)?;
    let mut reader = Reader {
        reader: BufReader::new(reader),
        at: 0,
        nodes: 0,
    };
    reader.model(bytes, each).map_err(|error| match error {
        Fault::Io(source) => failed(source),
        Fault::Format(reason) => CheckpointError::Onnx {
            file: file.to_owned(),
            reason,
        },
        Fault::Other(error) => error,
    })
}

/// Why a file cannot be had.
pub(super) enum Fault {
    Io(io::Error),
    Format(String),
    Other(CheckpointError),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<CheckpointError> for Fault {
    fn from(error: CheckpointError) -> Self {
        Self::Other(error)
    }
}

pub(super) fn fault<T>(reason: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::Format(reason.into()))
}

/// What stands behind the number of a field.
#[derive(Clone, Copy)]
enum Value {
    Number(u64),
    /// So many bytes follow.
    Bytes(u64),
    /// Of four bytes.
    Float(f32),
    /// A number of eight bytes, which no field has that is looked at.
    Passed,
}

struct Reader {
    reader: BufReader<Box<dyn ReadSeek>>,
    /// Bytes read or passed so far.
    at: u64,
    nodes: usize,
}

impl Reader {
    fn model(
        &mut self,
        end: u64,
        each: &mut dyn FnMut(Part) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let mut graphs = 0;
        while let Some((field, value)) = self.field(end)? {
            match (field, value) {
                (7, Value::Bytes(bytes)) => {
                    graphs += 1;
                    self.graph(self.at + bytes, each)?;
                }
                _ => self.pass(value)?,
            }
        }
        match graphs {
            1 => Ok(()),
            _ => fault(format!("it has {graphs} graphs, not one")),
        }
    }

    fn graph(
        &mut self,
        end: u64,
        each: &mut dyn FnMut(Part) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        while let Some((field, value)) = self.field(end)? {
            match (field, value) {
                (1, Value::Bytes(bytes)) => {
                    self.nodes += 1;
                    if self.nodes > MAX_NODES {
                        return fault(format!("it has more than {MAX_NODES} nodes"));
                    }
                    let node = self.node(self.at + bytes)?;
                    each(Part::Node(node))?;
                }
                (5, Value::Bytes(bytes)) => {
                    let tensor = self.tensor(self.at + bytes)?;
                    each(Part::Tensor(tensor))?;
                }
                _ => self.pass(value)?,
            }
        }
        Ok(())
    }

    fn node(&mut self, end: u64) -> Result<Node, Fault> {
        let mut node = Node::default();
        while let Some((field, value)) = self.field(end)? {
            match (field, value) {
                (1, Value::Bytes(bytes)) if node.inputs.len() < MAX_INPUTS => {
                    node.inputs.push(self.text(bytes)?);
                }
                (2, Value::Bytes(bytes)) if node.outputs.len() < MAX_INPUTS => {
                    node.outputs.push(self.text(bytes)?);
                }
                (1 | 2, _) => return fault(format!("node {:?} has too many inputs", node.name)),
                (3, Value::Bytes(bytes)) => node.name = self.text(bytes)?,
                (4, Value::Bytes(bytes)) => node.op = self.text(bytes)?,
                (5, Value::Bytes(bytes)) => self.attribute(self.at + bytes, &mut node)?,
                (9, Value::Bytes(bytes)) => {
                    let (key, value) = self.entry(self.at + bytes)?;
                    if key == "pkg.torch.onnx.name_scopes" {
                        node.scopes = Some(value);
                    }
                }
                _ => self.pass(value)?,
            }
        }
        Ok(node)
    }

    fn attribute(&mut self, end: u64, node: &mut Node) -> Result<(), Fault> {
        let mut name = String::new();
        while let Some((field, value)) = self.field(end)? {
            match (field, value) {
                (1, Value::Bytes(bytes)) => name = self.text(bytes)?,
                (2, Value::Float(number)) => node.attribute(&name, number.into()),
                (3 | 8, Value::Number(number)) => node.attribute(&name, number as f64),
                (8, Value::Bytes(bytes)) => {
                    let end = self.at + bytes;
                    while self.at < end {
                        let number = self.number(end)?;
                        node.attribute(&name, number as f64);
                    }
                }
                (4, Value::Bytes(bytes)) if name == "approximate" => {
                    node.approximate = self.text(bytes)?;
                }
                (5, Value::Bytes(bytes)) if name == "value" => {
                    node.value = Some(self.tensor(self.at + bytes)?);
                }
                _ => self.pass(value)?,
            }
        }
        Ok(())
    }

    fn tensor(&mut self, end: u64) -> Result<Tensor, Fault> {
        let mut tensor = Tensor::default();
        while let Some((field, value)) = self.field(end)? {
            match (field, value) {
                (1, Value::Number(side)) => tensor.axis(side)?,
                (1, Value::Bytes(bytes)) => {
                    let end = self.at + bytes;
                    while self.at < end {
                        let side = self.number(end)?;
                        tensor.axis(side)?;
                    }
                }
                (2, Value::Number(kind)) => tensor.kind = kind,
                (8, Value::Bytes(bytes)) => tensor.name = self.text(bytes)?,
                // Floats, doubles or bytes, of which little-endian ones are the same.
                (4 | 9 | 10, Value::Bytes(bytes)) if tensor.data.is_none() => {
                    tensor.data = Some((self.at, bytes));
                    if bytes <= MAX_SMALL {
                        tensor.small = self.bytes(bytes)?;
                    } else {
                        self.pass(value)?;
                    }
                }
                (4 | 9 | 10, _) => {
                    return fault(format!("its tensor {:?} is in pieces", tensor.name));
                }
                (13, Value::Bytes(bytes)) => {
                    let (key, text) = self.entry(self.at + bytes)?;
                    let number = text.parse();
                    match (key.as_str(), number) {
                        ("location", _) => tensor.location = text,
                        ("offset", Ok(offset)) => tensor.offset = offset,
                        ("length", Ok(length)) => tensor.length = Some(length),
                        ("offset" | "length", Err(_)) => {
                            return fault(format!("the {key} of a tensor is {text:?}, no number"));
                        }
                        _ => {}
                    }
                }
                (14, Value::Number(place)) => tensor.is_external = place == 1,
                _ => self.pass(value)?,
            }
        }
        Ok(tensor)
    }

    /// A key and its value.
    fn entry(&mut self, end: u64) -> Result<(String, String), Fault> {
        let (mut key, mut text) = (String::new(), String::new());
        while let Some((field, value)) = self.field(end)? {
            match (field, value) {
                (1, Value::Bytes(bytes)) => key = self.text(bytes)?,
                // Descriptions may be long; nobody looks at them.
                (2, Value::Bytes(bytes)) if bytes <= MAX_NAME => text = self.text(bytes)?,
                _ => self.pass(value)?,
            }
        }
        Ok((key, text))
    }

    /// The next field of a message that ends there. Bytes are left to the caller.
    fn field(&mut self, end: u64) -> Result<Option<(u64, Value)>, Fault> {
        if self.at >= end {
            return Ok(None);
        }
        let key = self.number(end)?;
        let value = match key & 7 {
            0 => Value::Number(self.number(end)?),
            1 => {
                self.fits(8, end)?;
                self.pass(Value::Bytes(8))?;
                Value::Passed
            }
            5 => {
                self.fits(4, end)?;
                let mut bytes = [0; 4];
                self.reader.read_exact(&mut bytes)?;
                self.at += 4;
                Value::Float(f32::from_le_bytes(bytes))
            }
            2 => {
                let bytes = self.number(end)?;
                self.fits(bytes, end)?;
                Value::Bytes(bytes)
            }
            _ => return fault("it is not made of Protocol Buffers: is it an ONNX file?"),
        };
        Ok(Some((key >> 3, value)))
    }

    fn fits(&self, bytes: u64, end: u64) -> Result<(), Fault> {
        match end.checked_sub(self.at) {
            Some(left) if bytes <= left => Ok(()),
            _ => fault("a part ends behind the whole: is the download complete?"),
        }
    }

    /// Seven bits a byte, the lowest first.
    fn number(&mut self, end: u64) -> Result<u64, Fault> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            self.fits(1, end)?;
            let mut byte = [0];
            self.reader.read_exact(&mut byte)?;
            self.at += 1;
            number |= u64::from(byte[0] & 0x7F) << shift;
            if byte[0] < 0x80 {
                return Ok(number);
            }
        }
        fault("a number is longer than 64 bits: is it an ONNX file?")
    }

    /// A name; its length has been compared with that of the file.
    fn text(&mut self, bytes: u64) -> Result<String, Fault> {
        if bytes > MAX_NAME {
            return fault(format!("a name has {bytes} bytes, {MAX_NAME} are possible"));
        }
        match String::from_utf8(self.bytes(bytes)?) {
            Ok(text) => Ok(text),
            Err(_) => fault("a name is not UTF-8: is it an ONNX file?"),
        }
    }

    /// A few bytes.
    fn bytes(&mut self, bytes: u64) -> Result<Vec<u8>, Fault> {
        let mut content = vec![0; bytes as usize];
        self.reader.read_exact(&mut content)?;
        self.at += bytes;
        Ok(content)
    }

    /// Leaves out what has not been read of a field.
    fn pass(&mut self, value: Value) -> Result<(), Fault> {
        if let Value::Bytes(bytes) = value {
            self.reader.seek_relative(bytes as i64)?;
            self.at += bytes;
        }
        Ok(())
    }
}

impl Tensor {
    fn axis(&mut self, side: u64) -> Result<(), Fault> {
        match usize::try_from(side) {
            Ok(side) if self.shape.len() < MAX_AXES => self.shape.push(side),
            _ => return fault(format!("its tensor {:?} has no possible shape", self.name)),
        }
        Ok(())
    }
}
