//! Several that train one model together: each computes some forward passes of a step, the sums of all are taken
//! by each, so that their models stay the same.

#[cfg(feature = "collective")]
mod arrivals;
#[cfg(feature = "collective")]
mod collective;
#[cfg(feature = "collective")]
mod threads;

use burn::optim::GradientsParams;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{DType, Tensor, TensorData};
use reroute_zoo::Model;
use sha2::{Digest, Sha256};

use crate::gradients::{self, Flat};
use crate::{TuneError, host};

#[cfg(feature = "collective")]
pub use collective::Collective;
#[cfg(feature = "collective")]
pub use threads::tune_by_threads;

/// What the files of peers are called in the folder of a run, before the number.
pub(crate) const PREFIX: &str = ".peer-";

/// Where what the peers of a run computed is joined.
///
/// All peers ask for the same sums in the same order.
pub trait Peers<B: Backend> {
    /// Which one this is, counted from 0. The first one alone writes to the folder of the run.
    fn peer(&self) -> usize;

    /// How many there are.
    fn count(&self) -> usize;

    /// The sums of the numbers of all peers: the same in each of them, to the bit.
    ///
    /// # Errors
    /// [`TuneError::PeersLost`]: somebody is not there any more.
    fn sum(&mut self, numbers: Tensor<B, 1>) -> Result<Tensor<B, 1>, TuneError>;
}

/// A run without others.
#[derive(Debug, Clone, Copy)]
pub struct Alone;

impl<B: Backend> Peers<B> for Alone {
    fn peer(&self) -> usize {
        0
    }

    fn count(&self) -> usize {
        1
    }

    fn sum(&mut self, numbers: Tensor<B, 1>) -> Result<Tensor<B, 1>, TuneError> {
        Ok(numbers)
    }
}

/// The sums of numbers that hosts have.
pub(crate) fn sums<B: Backend>(
    peers: &mut dyn Peers<B>,
    numbers: &[f64],
    device: &B::Device,
) -> Result<Vec<f64>, TuneError> {
    if peers.count() == 1 {
        return Ok(numbers.to_vec());
    }
    let sums = peers.sum(on_device(numbers, device))?;
    Ok(host::data(sums)?.iter().collect())
}

fn on_device<B: Backend>(numbers: &[f64], device: &B::Device) -> Tensor<B, 1> {
    let numbers: Vec<f32> = numbers.iter().map(|&x| x as f32).collect();
    let shape = [numbers.len()];
    Tensor::from_data(TensorData::new(numbers, shape), (device, DType::F32))
}

/// Whether all peers have the same of something.
///
/// # Errors
/// [`TuneError::PeersDiffer`] with those that have not what the first one has.
pub(crate) fn agree<B: Backend>(
    peers: &mut dyn Peers<B>,
    what: &'static str,
    text: &str,
    device: &B::Device,
) -> Result<(), TuneError> {
    let digest = Sha256::digest(text);
    let size = digest.len();
    let mut all = vec![0.0; size * peers.count()];
    let own = &mut all[peers.peer() * size..][..size];
    for (place, &byte) in own.iter_mut().zip(&digest) {
        *place = byte.into();
    }
    let all = sums(peers, &all, device)?;
    let others = all.chunks(size).enumerate();
    let others = others.filter(|(_, digest)| *digest != &all[..size]);
    let others: Vec<usize> = others.map(|(peer, _)| peer).collect();
    match others.is_empty() {
        true => Ok(()),
        false => Err(TuneError::PeersDiffer {
            peers: names(&others),
            what,
        }),
    }
}

/// Peers as messages call them.
pub(crate) fn names(peers: &[usize]) -> String {
    let names: Vec<String> = peers.iter().map(|peer| format!("peer {peer}")).collect();
    names.join(", ")
}

/// What a step comes to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Total {
    /// Mean cross-entropy of the tokens.
    pub(crate) loss: f64,
    pub(crate) tokens: usize,
    pub(crate) examples: usize,
    pub(crate) rows: usize,
    /// Somebody was told to stop.
    pub(crate) stops: bool,
}

impl Total {
    /// What the peers come to together, with the gradients of the mean over the tokens of all.
    pub(crate) fn joined<B: AutodiffBackend>(
        self,
        model: &Model<B>,
        gradients: GradientsParams,
        peers: &mut dyn Peers<B::InnerBackend>,
        device: &B::Device,
    ) -> Result<(Self, GradientsParams), TuneError> {
        if peers.count() == 1 {
            return Ok((self, gradients));
        }
        let Flat { numbers, is_there } = gradients::flat(model, gradients);
        let tokens = self.tokens as f64;
        let mut told = vec![
            self.loss * tokens,
            tokens,
            self.examples as f64,
            self.rows as f64,
            f64::from(u8::from(self.stops)),
        ];
        let (of_step, all) = (told.len(), told.len() + is_there.len());
        told.extend(is_there.iter().map(|&is| f64::from(u8::from(is))));
        // The gradient of a mean becomes that of a sum, and of a mean over all tokens in the end.
        let numbers = numbers.map(|numbers| numbers.mul_scalar(tokens));
        let parts = [on_device(&told, device)].into_iter().chain(numbers);
        let sums = peers.sum(Tensor::cat(parts.collect(), 0))?;
        let told = host::data(sums.clone().narrow(0, 0, all))?;
        let told: Vec<f64> = told.iter().collect();
        let total = Self {
            loss: told[0] / told[1].max(1.0),
            tokens: told[1] as usize,
            examples: told[2] as usize,
            rows: told[3] as usize,
            stops: told[4] > 0.0,
        };
        let is_there: Vec<bool> = told[of_step..].iter().map(|&peers| peers > 0.0).collect();
        let rest = sums.dims()[0] - all;
        let numbers = (rest > 0).then(|| sums.narrow(0, all, rest).div_scalar(told[1].max(1.0)));
        let gradients = gradients::unflat(model, Flat { numbers, is_there });
        Ok((total, gradients))
    }
}
