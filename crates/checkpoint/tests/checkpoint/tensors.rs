use burn::tensor::DType;
use half::{bf16, f16};
use reroute_checkpoint::{CheckpointError, Dtype, Layout, TensorError};

use crate::fixture::{counting, f32_bytes, open, safetensors};

/// Exact in f32, f16 and bf16.
const VALUES: [f32; 6] = [0.0, -1.5, 2.0, 0.15625, -96.0, 65280.0];

/// [`VALUES`] as a tensor of this type.
fn stored(dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => f32_bytes(VALUES),
        Dtype::F16 => (VALUES.iter())
            .flat_map(|v| f16::from_f32(*v).to_le_bytes())
            .collect(),
        _ => (VALUES.iter())
            .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
            .collect(),
    }
}

#[test]
fn every_stored_type_is_read_as_every_target_type() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        let name = dtype.to_string();
        let content = safetensors(&[
            ("first", "F32", &[1], vec![9; 4]),
            ("a", &name, &[2, 3], stored(dtype)),
        ]);
        let shards = open(&content).unwrap();

        let data = shards.read("a", DType::F32, Layout::AsStored).unwrap();
        assert_eq!((data.dtype, &data.shape[..]), (DType::F32, &[2, 3][..]));
        assert_eq!(data.to_vec::<f32>().unwrap(), VALUES);

        let data = shards.read("a", DType::F16, Layout::Transposed).unwrap();
        assert_eq!((data.dtype, &data.shape[..]), (DType::F16, &[3, 2][..]));
        let values: Vec<f32> = (data.to_vec::<f16>().unwrap().iter())
            .map(|value| value.to_f32())
            .collect();
        let [a, b, c, d, e, f] = VALUES;
        assert_eq!(values, [a, d, b, e, c, f]);
    }
}

#[test]
fn bits_of_f16_pass_unchanged() {
    let bits: Vec<u16> = (0..=u16::MAX).collect();
    let bytes = bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
    let shards = open(&safetensors(&[("a", "F16", &[1 << 16], bytes)])).unwrap();
    let data = shards.read("a", DType::F16, Layout::AsStored).unwrap();
    let values = data.to_vec::<f16>().unwrap();
    assert!(
        values
            .iter()
            .zip(&bits)
            .all(|(value, bits)| value.to_bits() == *bits)
    );
}

/// Larger than a block in every way: many rows, rows longer than a block, ragged ends.
#[test]
fn large_matrices_are_transposed_block_by_block() {
    for [rows, columns] in [[700, 1003], [3, 300_001], [300_001, 3], [1, 17], [17, 1]] {
        let shards = open(&safetensors(&[counting("a", &[rows, columns])])).unwrap();
        let data = shards.read("a", DType::F32, Layout::Transposed).unwrap();
        assert_eq!(&data.shape[..], &[columns, rows]);
        let values = data.to_vec::<f32>().unwrap();
        let expected = (0..columns).flat_map(|x| (0..rows).map(move |y| (y * columns + x) as f32));
        assert!(values.iter().copied().eq(expected), "{rows}×{columns}");

        let data = shards.read("a", DType::F32, Layout::AsStored).unwrap();
        let values = data.to_vec::<f32>().unwrap();
        let expected = (0..rows * columns).map(|i| i as f32);
        assert!(values.iter().copied().eq(expected), "{rows}×{columns}");
    }
}

#[test]
fn empty_tensors_are_read() {
    let empty: [&[usize]; 4] = [&[0], &[0, 5], &[5, 0], &[usize::MAX, 0]];
    for shape in empty {
        let shards = open(&safetensors(&[counting("a", shape)])).unwrap();
        let layouts = [Layout::AsStored, Layout::Transposed];
        for layout in layouts.into_iter().take(shape.len()) {
            let data = shards.read("a", DType::F32, layout).unwrap();
            assert_eq!(data.num_elements(), 0);
        }
    }
}

#[test]
fn what_cannot_be_read_is_said() {
    let shards = open(&safetensors(&[
        ("double", "F64", &[1], vec![0; 8]),
        ("vector", "F32", &[2], vec![0; 8]),
        ("large", "F32", &[1], f32_bytes([65520.0])),
        ("end", "F32", &[1], f32_bytes([f32::MAX])),
        ("infinite", "F32", &[1], f32_bytes([f32::NEG_INFINITY])),
        ("huge", "BF16", &[1], bf16::MAX.to_le_bytes().to_vec()),
    ]))
    .unwrap();
    let read = |name, dtype, layout| match shards.read(name, dtype, layout) {
        Err(CheckpointError::Tensor { source, .. }) => source,
        other => panic!("{name}: {other:?}"),
    };
    let as_stored = Layout::AsStored;
    assert!(matches!(
        read("double", DType::F32, as_stored),
        TensorError::Dtype { dtype: Dtype::F64 }
    ));
    assert!(matches!(
        read("vector", DType::F64, as_stored),
        TensorError::Target { dtype: DType::F64 }
    ));
    assert!(matches!(
        read("vector", DType::F32, Layout::Transposed),
        TensorError::NotAMatrix { axes: 1 }
    ));
    for name in ["large", "huge"] {
        assert!(matches!(
            read(name, DType::F16, as_stored),
            TensorError::Overflow
        ));
        assert!(shards.read(name, DType::F32, as_stored).is_ok());
    }
    // Near the end of f32, bf16 ends earlier.
    assert!(matches!(
        read("end", DType::BF16, as_stored),
        TensorError::Overflow
    ));
    // What is infinite in the file stays so: nothing is lost.
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        let infinite = shards.read("infinite", dtype, as_stored).unwrap();
        assert_eq!(infinite.iter::<f32>().next(), Some(f32::NEG_INFINITY));
    }
    assert!(matches!(
        shards.read("nothing", DType::F32, as_stored),
        Err(CheckpointError::NoSuchTensor { .. })
    ));
}
