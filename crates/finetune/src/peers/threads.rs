//! Peers that are threads of one process.

use std::ops::ControlFlow;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use burn::module::Module;
use burn::tensor::backend::AutodiffBackend;
use reroute_zoo::Vlm;

use super::Collective;
use crate::{Run, TuneError, Watch, tune_among};

/// `burn-collective` knows one group of a process.
static GROUP: Mutex<()> = Mutex::new(());

/// [`tune`](crate::tune) by so many threads, each with a copy of what is trained; what is frozen is shared. The
/// calling thread is the first peer, and the one that is watched. Others are waited for that long.
///
/// # Errors
/// [`TuneError`]; that of a peer which failed by itself before those of the ones that have lost it.
pub fn tune_by_threads<B: AutodiffBackend>(
    vlm: Vlm<B>,
    run: &Run,
    peers: usize,
    patience: Duration,
    watch: &mut Watch,
) -> Result<Vlm<B>, TuneError> {
    let adapter = run.settings.adapter.as_ref();
    if adapter.is_some_and(|adapter| adapter.dropout > 0.0) {
        return Err(TuneError::Setting {
            setting: "dropout",
            reason: "is drawn from one generator for all threads of a process: leave it out, or train by processes",
        });
    }
    let _group = GROUP.lock().unwrap_or_else(PoisonError::into_inner);
    let device = vlm.device().clone();
    let peer =
        |peer| Collective::<B::InnerBackend>::thread(peer, peers, run.folder, patience, &device);
    let mut first = peer(0)?;
    let others: Vec<_> = (1..peers).map(peer).collect::<Result<_, _>>()?;
    thread::scope(|scope| {
        let others: Vec<_> = { others.into_iter() }
            .map(|mut peer| {
                let vlm = vlm.with_model(vlm.model().clone().fork(&device));
                scope.spawn(move || {
                    let watch = &mut |_: crate::Event<'_>| ControlFlow::Continue(());
                    tune_among(vlm, run, &mut peer, watch).map(drop)
                })
            })
            .collect();
        let result = tune_among(vlm, run, &mut first, watch);
        drop(first);
        let others = others.into_iter().filter_map(|other| other.join().ok());
        let is_cause = |error: &TuneError| !matches!(error, TuneError::PeersLost { .. });
        let cause = others.filter_map(Result::err).find(is_cause);
        match (result, cause) {
            (Err(TuneError::PeersLost { .. }), Some(cause)) => Err(cause),
            (result, _) => result,
        }
    })
}
