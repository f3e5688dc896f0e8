//! Maps for tokens that wait: found again where they are exact, and the textbook's where they are not.

use burn::tensor::{Tensor, TensorData};
use burn_flex::Flex;
use nalgebra::{DMatrix, DVector};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use reroute_finetune::{Calibration, Fitted, Fitting};
use reroute_zoo::reroute::Waited;

const SIZE: usize = 12;

/// Rows of numbers as a tensor of columns.
fn tensor(rows: &[Vec<f64>]) -> Tensor<Flex, 2> {
    let numbers: Vec<f32> = rows.iter().flatten().map(|&x| x as f32).collect();
    let data = TensorData::new(numbers, [rows.len(), SIZE]);
    Tensor::<Flex, 2>::from_data(data, &Default::default()).transpose()
}

/// States far from zero, and what a map of rank 2 and noise of this size add to them.
fn waited(random: &mut StdRng, map: &[DMatrix<f64>; 2], noise: f64) -> Waited<Flex> {
    let mut number = || random.random_range(-1.0..1.0);
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for _ in 0..150 {
        let scale = |at: usize| 1.0 + at as f64;
        let state = DVector::from_fn(SIZE, |at, _| 40.0 + scale(at) * number());
        let update = &map[1] * (&map[0] * &state);
        let end = DVector::from_fn(SIZE, |at, _| {
            state[at] + update[at] - 3.0 + noise * number()
        });
        before.push(state.as_slice().to_vec());
        after.push(end.as_slice().to_vec());
    }
    Waited {
        layers: 2..5,
        before: tensor(&before),
        after: tensor(&after),
    }
}

fn map(random: &mut StdRng) -> [DMatrix<f64>; 2] {
    let mut matrix =
        |rows, columns| DMatrix::from_fn(rows, columns, |_, _| random.random_range(-0.3..0.3));
    [matrix(2, SIZE), matrix(SIZE, 2)]
}

fn fit(pictures: &[Waited<Flex>], rank: usize, ridge: f64) -> Fitted {
    let mut fitting = Fitting::default();
    fitting.add(pictures).expect("numbers");
    let fitted = fitting.fit(Calibration { rank, ridge }, &Fitting::default());
    fitted.expect("numbers").remove(0)
}

fn matrix(numbers: &[f32], rows: usize) -> DMatrix<f64> {
    let numbers: Vec<f64> = numbers.iter().map(|&x| x.into()).collect();
    DMatrix::from_row_slice(rows, numbers.len() / rows, &numbers)
}

/// A map of rank 2 is found again, and a map of rank 1 is less.
#[test]
fn what_a_map_adds_is_found_again() {
    let random = &mut StdRng::seed_from_u64(3);
    let map = map(random);
    let pictures = [(); 4].map(|()| waited(random, &map, 0.0));
    let fitted = fit(&pictures, 2, 1e-9);
    let found = &fitted.shortcut;
    assert_eq!((found.layers.clone(), found.rank()), (2..5, 2));
    assert_eq!(fitted.tokens, 4 * 150);
    let product = matrix(&found.up, SIZE) * matrix(&found.down, 2);
    let off = (product - &map[1] * &map[0]).norm() / (&map[1] * &map[0]).norm();
    assert!(off < 1e-4, "{off}");
    assert!(fitted.explained > 1.0 - 1e-6, "{}", fitted.explained);
    let less = fit(&pictures, 1, 1e-9).explained;
    let by_mean = fitted.explained_by_mean;
    assert!(by_mean < less && less < 1.0 - 1e-4, "{by_mean} {less}");
}

/// The map is that of the textbook: the penalised least squares, projected onto the first right singular vectors of
/// what it predicts for the states and for the penalty's own rows.
#[test]
fn maps_are_those_of_reduced_rank_ridge_regression() {
    let random = &mut StdRng::seed_from_u64(8);
    let map = map(random);
    let pictures = [(); 2].map(|()| waited(random, &map, 4.0));
    let (rank, ridge) = (3, 0.2);
    let found = fit(&pictures, rank, ridge).shortcut;

    let rows = |of: &dyn Fn(&Waited<Flex>) -> Tensor<Flex, 2>| {
        let all = pictures.iter().flat_map(|picture| {
            let numbers: Vec<f64> = of(picture).transpose().into_data().iter().collect();
            numbers
        });
        DMatrix::from_row_iterator(300, SIZE, all.collect::<Vec<f64>>())
    };
    let states = rows(&|picture| picture.before.clone());
    let updates = rows(&|picture| picture.after.clone() - picture.before.clone());
    let (mean_state, mean_update) = (states.row_mean(), updates.row_mean());
    let centred = |all: &DMatrix<f64>| {
        let mean = all.row_mean();
        DMatrix::from_fn(300, SIZE, |row, column| all[(row, column)] - mean[column])
    };
    let (x, t) = (centred(&states), centred(&updates));
    let penalty = ridge * (x.transpose() * &x).trace() / SIZE as f64;
    let padded = |top: &DMatrix<f64>, bottom: DMatrix<f64>| {
        let mut all = DMatrix::zeros(300 + SIZE, SIZE);
        all.rows_mut(0, 300).copy_from(top);
        all.rows_mut(300, SIZE).copy_from(&bottom);
        all
    };
    let x = padded(&x, DMatrix::identity(SIZE, SIZE) * penalty.sqrt());
    let t = padded(&t, DMatrix::zeros(SIZE, SIZE));
    let inverse = (x.transpose() * &x).try_inverse().expect("a penalty");
    let full = inverse * x.transpose() * t;
    let vectors = (&x * &full).svd(false, true).v_t.expect("asked for");
    let first = vectors.rows(0, rank).transpose();
    let expected = (full * &first * first.transpose()).transpose();

    let product = matrix(&found.up, SIZE) * matrix(&found.down, rank);
    let off = (&product - &expected).norm() / expected.norm();
    assert!(off < 1e-4, "{off}");
    // At the mean state it adds the mean update.
    let shift = DVector::from_iterator(SIZE, found.shift.iter().map(|&x| x.into()));
    let at_mean = product * mean_state.transpose() + shift;
    assert!((at_mean - mean_update.transpose()).norm() < 1e-3 * mean_update.norm());
}
