//! Ids and rows from outside that do not fit are errors.

use burn::tensor::{DType, Tensor};
use burn_flex::{Flex, FlexDevice};
use reroute_layers::{LayerError, VocabularyConfig, indices, write_rows};

const DEVICE: FlexDevice = FlexDevice;

#[test]
fn ids_that_are_in_no_table() {
    let config = VocabularyConfig {
        block: 4,
        ..VocabularyConfig::new(10, 3)
    };
    let table = config.init::<Flex>(&DEVICE);
    assert_eq!(table.entries(), 10);
    assert_eq!(table.embed(&[9, 0]).unwrap().dims(), [3, 2]);
    for id in [10, 12, u32::MAX] {
        let error = table.embed(&[0, id]).unwrap_err();
        assert_eq!(error, LayerError::Id { id, entries: 10 });
    }
    assert_eq!(table.embed(&[]).unwrap_err(), LayerError::NoIds);
    let empty = VocabularyConfig::new(0, 3).init::<Flex>(&DEVICE);
    assert_eq!(empty.device(), DEVICE);
    let error = empty.embed(&[0]).unwrap_err();
    assert_eq!(error, LayerError::Id { id: 0, entries: 0 });
}

#[test]
fn rows_that_do_not_fit() {
    let zeros = |shape: [usize; 3], dtype: DType| Tensor::<Flex, 3>::zeros(shape, (&DEVICE, dtype));
    let write = |start, rows| write_rows(zeros([2, 4, 5], DType::F32), start, rows);
    assert!(write(3, zeros([2, 4, 2], DType::F32)).is_ok());
    for (start, rows) in [
        (4, zeros([2, 4, 2], DType::F32)),
        (usize::MAX, zeros([2, 4, 2], DType::F32)),
        (0, zeros([1, 4, 2], DType::F32)),
        (0, zeros([2, 3, 2], DType::F32)),
        (0, zeros([2, 4, 2], DType::F16)),
    ] {
        let error = write(start, rows).unwrap_err();
        assert!(matches!(error, LayerError::Rows { .. }), "{error}");
    }
}

#[test]
fn indices_go_to_the_device_as_they_are() {
    let sent: Vec<i64> = indices::<Flex>(&[3, 0, 70_000], &DEVICE)
        .into_data()
        .iter()
        .collect();
    assert_eq!(sent, [3, 0, 70_000]);
}
