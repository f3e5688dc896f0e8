//! A step of training: forward and backward, of everything or of adapters alone, with operations that are
//! recorded as one step each and with the operations that they stand for.

use anyhow::{Context, anyhow};
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::backend::{AutodiffBackend, Backend as AnyBackend};
use burn::tensor::{Distribution, Tensor};
use burn_autodiff::Autodiff;
use reducers::Schedule;
use reroute::{Decoder, Prompt};
use reroute_cli::backend::{Backend, Device};
use reroute_layers::{Linear, Linears, LowRank, Scaling};
use serde::Serialize;

use crate::model::{Model, TEXT};
use crate::options::Options;
use crate::setup::{Cast, encode, prompt};
use crate::timing::{Spread, mebibytes, seconds_and_peak};

/// Rank of adapters.
const RANK: usize = 8;

/// Tokens of the answer that is learnt.
const ANSWER: usize = 16;

/// What is trained, and how.
#[derive(Serialize)]
pub struct Row {
    trained: &'static str,
    gradients: &'static str,
    rows: usize,
    ms: Spread,
    peak_bytes: Option<usize>,
}

/// Measures both ways in turn, prints the table and returns it.
pub fn run(model: &Model, device: &Device, options: &Options) -> anyhow::Result<Vec<Row>> {
    println!(
        "\nA training step: two layers of hidden size {}, {} rows and an answer of {ANSWER}, {}",
        model.decoder.hidden_size,
        model.visual + TEXT,
        options.dtype.name()
    );
    let mut table = Vec::new();
    for trained in ["adapters", "everything"] {
        if trained == "everything" && options.dtype.codes().is_some() {
            continue;
        }
        let recorded = Step::<Autodiff<Backend>>::new(model, trained, device, options)?;
        // The outer knows nothing of the inner one's tensors, and records operation by operation.
        let operations = Step::<Autodiff<Autodiff<Backend>>>::new(model, trained, device, options)?;
        let mut found = [Vec::new(), Vec::new()];
        for _ in 0..=options.rounds() {
            found[0].push(seconds_and_peak(|| recorded.run())?);
            found[1].push(seconds_and_peak(|| operations.run())?);
        }
        for (gradients, found) in ["recorded", "by operations"].into_iter().zip(found) {
            let found = found.get(1..).context("no rounds")?;
            let times: Vec<f64> = found.iter().map(|(seconds, _)| *seconds).collect();
            let row = Row {
                trained,
                gradients,
                rows: model.visual + TEXT,
                ms: Spread::milliseconds(&times),
                peak_bytes: found.iter().filter_map(|(_, peak)| *peak).max(),
            };
            println!(
                "{trained:<12} {gradients:<14} {:>20} ms {:>6} MiB",
                row.ms.show(0),
                mebibytes(row.peak_bytes)
            );
            table.push(row);
        }
    }
    Ok(table)
}

/// A decoder to be trained, and what it learns.
struct Step<A: AutodiffBackend> {
    decoder: Decoder<A>,
    prompt: Prompt<A>,
}

impl<A: AutodiffBackend<Device = Device>> Step<A> {
    fn new(
        model: &Model,
        trained: &str,
        device: &Device,
        options: &Options,
    ) -> anyhow::Result<Self> {
        let dtype = options.dtype.floats();
        A::seed(device, 0);
        let decoder = model.decoder.init::<A>(device)?.map(&mut Cast(dtype));
        let mut decoder = match trained {
            "everything" => decoder.map(&mut Track),
            _ => decoder.no_grad(),
        };
        if let Some(format) = options.dtype.codes() {
            encode(&mut decoder, format, dtype)?;
        }
        if trained == "adapters" {
            let mut linears: Vec<(String, &mut Linear<A>)> = Vec::new();
            decoder.linears("", &mut linears);
            for (_, linear) in linears {
                let [output, input] = linear.weight.dims();
                let random = |shape| Tensor::random(shape, Distribution::Normal(0.0, 0.02), device);
                let scaling = Scaling {
                    alpha: 16.0,
                    rank_stabilized: false,
                };
                let adapter = LowRank::new(random([RANK, input]), random([output, RANK]), scaling);
                linear.adapter = Some(adapter);
            }
        }
        let prompt = prompt(model, model.visual, dtype, device);
        Ok(Self { decoder, prompt })
    }

    /// As `Vlm::logits`: the answer is fed at once behind the prefill.
    fn run(&self) -> anyhow::Result<()> {
        let schedule = Schedule::dense();
        let mut prefill = self
            .decoder
            .prefill(&self.prompt, &schedule, Default::default())?;
        let answer: Vec<(usize, u32)> = (0..ANSWER).map(|token| (0, token as u32)).collect();
        let behind = self.decoder.decode(&answer, &mut prefill.cache)?;
        let logits = Tensor::cat(vec![prefill.logits, behind], 0);
        let loss = logits.powi_scalar(2).mean();
        let finite = loss.clone().into_data().convert::<f32>();
        let gradients = loss.backward();
        drop(gradients);
        match finite.iter::<f32>().all(f32::is_finite) {
            true => Ok(()),
            false => Err(anyhow!("the loss is not finite")),
        }
    }
}

/// Tracks all parameters, whatever they were made of.
struct Track;

impl<B: AnyBackend> ModuleMapper<B> for Track {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        param.map(|tensor| tensor.detach().require_grad())
    }
}
