//! Codes packed along the columns of the weight, less a zero, times the scale of their group.

use std::io::{self, Read};

use safetensors::Dtype;

use super::rows::Decoder;
use super::{Coded, Quantization, Tensors, matrix, put, stems, take, weight};
use crate::shards::Shards;
use crate::{TensorError, TensorInfo};

/// Where AWQ's kernels want the eight numbers of a word (`AWQ_REVERSE_ORDER`).
const AWQ_ORDER: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Codes, zeros and scales.
#[derive(Debug, Clone)]
pub(crate) struct Columns {
    /// GPTQ: `[in / numbers in a word, out]`; AWQ: `[in, out / 8]`
    codes: TensorInfo,
    /// `[groups, out / numbers in a word]`
    zeros: TensorInfo,
    /// `[groups, out]`
    scales: TensorInfo,
    /// `[in]`: the group of every column, where they are in no order.
    groups: Option<TensorInfo>,
    group_size: usize,
    kind: Kind,
    /// `[out, in]`
    shape: [usize; 2],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Awq,
    Gptq {
        bits: u32,
        /// What is added to every zero.
        added: i32,
    },
}

/// AWQ's weights.
pub(super) fn awq(config: &Quantization, tensors: &mut Tensors) -> Result<(), String> {
    let version = config.version.as_deref().unwrap_or("gemm");
    if config.bits.unwrap_or(4) != 4 || !version.eq_ignore_ascii_case("gemm") {
        return Err(format!(
            "AWQ of {} bits, version {version}, is not supported: 4 bits, version gemm, is",
            config.bits.unwrap_or(4)
        ));
    }
    put_together(config, tensors, Kind::Awq)
}

/// GPTQ's weights.
pub(super) fn gptq(config: &Quantization, tensors: &mut Tensors) -> Result<(), String> {
    let format = config.checkpoint_format.as_deref().unwrap_or("gptq");
    let added = match format {
        "gptq" => 1,
        "gptq_v2" => 0,
        other => {
            return Err(format!(
                "GPTQ's checkpoint_format \"{other}\" is not supported: gptq and gptq_v2 are"
            ));
        }
    };
    match config.bits {
        Some(bits @ (4 | 8)) => put_together(config, tensors, Kind::Gptq { bits, added }),
        bits => Err(format!(
            "GPTQ of {bits:?} bits is not supported: 4 and 8 are"
        )),
    }
}

fn put_together(config: &Quantization, tensors: &mut Tensors, kind: Kind) -> Result<(), String> {
    for stem in stems(tensors, ".qweight") {
        let codes = take(tensors, &stem, ".qweight")?;
        let zeros = take(tensors, &stem, ".qzeros")?;
        let scales = take(tensors, &stem, ".scales")?;
        let groups = match config.desc_act {
            Some(true) if kind != Kind::Awq => Some(take(tensors, &stem, ".g_idx")?),
            _ => tensors.remove(&format!("{stem}.g_idx")),
        };
        let shard = codes.shard;
        let columns = Columns::new(&stem, config, [codes, zeros, scales], groups, kind)?;
        let shape = columns.shape;
        put(
            tensors,
            &stem,
            weight(shape, shard, Coded::Columns(columns))?,
        )?;
    }
    Ok(())
}

impl Kind {
    /// Numbers in a word.
    fn packed(self) -> usize {
        match self {
            Self::Awq => 8,
            Self::Gptq { bits, .. } => 32 / bits as usize,
        }
    }

    /// A number of a word.
    fn number(self, word: u32, at: usize) -> i32 {
        let (bits, at) = match self {
            Self::Awq => (4, AWQ_ORDER[at % 8]),
            Self::Gptq { bits, .. } => (bits, at as u32),
        };
        ((word >> (bits * at)) & ((1 << bits) - 1)) as i32
    }
}

impl Columns {
    fn new(
        stem: &str,
        config: &Quantization,
        [codes, zeros, scales]: [TensorInfo; 3],
        groups: Option<TensorInfo>,
        kind: Kind,
    ) -> Result<Self, String> {
        let words = matrix(&format!("{stem}.qweight"), &codes, &[Dtype::I32])?;
        let packed = kind.packed();
        let wide = |length: usize| {
            length
                .checked_mul(packed)
                .ok_or("a weight is larger than any memory")
        };
        let [input, output] = match kind {
            Kind::Awq => [words[0], wide(words[1])?],
            Kind::Gptq { .. } => [wide(words[0])?, words[1]],
        };
        let group_size = match config.group_size {
            Some(size) if size > 0 => (size as usize).min(input),
            _ => input,
        };
        let count = input.div_ceil(group_size);
        let floats = [Dtype::F32, Dtype::F16, Dtype::BF16];
        let found = [
            matrix(&format!("{stem}.qzeros"), &zeros, &[Dtype::I32])?,
            matrix(&format!("{stem}.scales"), &scales, &floats)?,
        ];
        let expected = [[count, output.div_ceil(packed)], [count, output]];
        if found != expected {
            return Err(format!(
                "{stem}: qzeros and scales are {found:?}, for groups of {group_size} they must be {expected:?}"
            ));
        }
        if let Some(groups) = &groups
            && (groups.dtype != Dtype::I32 || groups.shape != [input])
        {
            return Err(format!(
                "{stem}.g_idx is {:?} {:?}, not I32 [{input}]",
                groups.dtype, groups.shape
            ));
        }
        Ok(Self {
            codes,
            zeros,
            scales,
            groups,
            group_size,
            kind,
            shape: [output, input],
        })
    }

    pub(super) fn name(&self) -> &'static str {
        match self.kind {
            Kind::Awq => "AWQ",
            Kind::Gptq { .. } => "GPTQ",
        }
    }

    /// From this row on. The codes are held, as their rows are columns of the weight.
    pub(super) fn open(
        &self,
        shards: &Shards,
        first: usize,
    ) -> Result<impl Decoder + use<>, TensorError> {
        let [_, input] = self.shape;
        let count = input.div_ceil(self.group_size);
        let groups = match &self.groups {
            Some(groups) => words(shards, groups)?
                .into_iter()
                .map(|group| group as usize)
                .collect(),
            None => (0..input)
                .map(|column| column / self.group_size)
                .collect::<Vec<_>>(),
        };
        if groups.iter().any(|&group| group >= count) {
            let reason = format!("g_idx names a group that is not there, of {count}");
            return Err(TensorError::Quantised { reason });
        }
        Ok(ColumnRows {
            codes: words(shards, &self.codes)?,
            zeros: words(shards, &self.zeros)?,
            scales: shards.scales(&self.scales)?,
            groups,
            kind: self.kind,
            shape: self.shape,
            row: first,
            scale: vec![0.0; count],
            zero: vec![0; count],
            words: Vec::new(),
        })
    }
}

/// All words of a tensor.
fn words(shards: &Shards, info: &TensorInfo) -> Result<Vec<u32>, TensorError> {
    let mut bytes = Vec::new();
    let bytes_of = usize::try_from(info.bytes).unwrap_or(usize::MAX);
    bytes.try_reserve_exact(bytes_of)?;
    shards.stored(info)?.read_to_end(&mut bytes)?;
    if bytes.len() != bytes_of {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    let words = bytes
        .as_chunks()
        .0
        .iter()
        .map(|&word| u32::from_le_bytes(word));
    Ok(words.collect())
}

struct ColumnRows {
    codes: Vec<u32>,
    zeros: Vec<u32>,
    scales: Vec<f32>,
    groups: Vec<usize>,
    kind: Kind,
    shape: [usize; 2],
    row: usize,
    /// Of the row, by group.
    scale: Vec<f32>,
    zero: Vec<i32>,
    /// AWQ: the words that the row is in, one of each column.
    words: Vec<u32>,
}

impl Decoder for ColumnRows {
    fn columns(&self) -> usize {
        self.shape[1]
    }

    fn next(&mut self, row: &mut [f32]) -> io::Result<()> {
        let ([output, _], packed, at) = (self.shape, self.kind.packed(), self.row);
        if at >= output {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let added = match self.kind {
            Kind::Awq => 0,
            Kind::Gptq { added, .. } => added,
        };
        let words = output.div_ceil(packed);
        for (group, (scale, zero)) in self.scale.iter_mut().zip(&mut self.zero).enumerate() {
            *scale = self.scales[group * output + at];
            let word = self.zeros[group * words + at / packed];
            *zero = self.kind.number(word, at % packed) + added;
        }
        if self.kind == Kind::Awq && (at % packed == 0 || self.words.is_empty()) {
            let column = self.codes.iter().skip(at / packed).step_by(words);
            self.words.clear();
            self.words.extend(column);
        }
        for (column, (number, &group)) in row.iter_mut().zip(&self.groups).enumerate() {
            let code = match self.kind {
                Kind::Awq => self.kind.number(self.words[column], at % packed),
                Kind::Gptq { .. } => {
                    let word = self.codes[column / packed * output + at];
                    self.kind.number(word, column % packed)
                }
            };
            *number = (code - self.zero[group]) as f32 * self.scale[group];
        }
        self.row += 1;
        Ok(())
    }
}
