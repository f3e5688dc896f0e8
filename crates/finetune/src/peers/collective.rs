//! Sums by `burn-collective`, which waits without end and panics where a peer is lost: it works in a thread, and
//! whoever waits for it looks after the others.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorPrimitive};
use burn_collective::{
    AllReduceStrategy, CollectiveConfig, CollectiveError, PeerId, ReduceOperation, all_reduce,
    finish_collective, register, reset_collective, start_global_orchestrator,
};
use tokio::runtime::{Builder, Runtime};

use super::Peers;
use super::arrivals::Arrivals;
use super::names;
use crate::TuneError;

/// How often a peer that waits looks after the others.
const LOOK: Duration = Duration::from_millis(250);
/// How long one that has ended may have left something that still arrives.
const GRACE: Duration = Duration::from_secs(2);
/// What an orchestrator waits before it begins anew.
const PAUSE: Duration = Duration::from_millis(50);
/// What a peer waits before it looks for another one's server again.
const SOON: Duration = Duration::from_millis(2);
/// Orchestrators, and ports of each peer, which take turns.
const TURNS: u16 = 2;

/// A peer whose sums `burn-collective` takes.
///
/// In the folder of the run each has a file, `.peer-0` and so on, that it locks; so a peer that has ended is
/// noticed within a few seconds.
pub struct Collective<B: Backend> {
    peer: usize,
    count: usize,
    device: B::Device,
    patience: Duration,
    arrivals: Arrivals,
    port: Option<u16>,
    /// Sums that were asked for.
    sums: usize,
    /// Where nodes register, if that is here.
    orchestrators: Option<Runtime>,
    /// Whether the last sum has come.
    is_complete: bool,
    /// Whether somebody waits for what was begun.
    is_here: Arc<()>,
}

impl<B: Backend> Collective<B> {
    /// A thread of this process. Others are waited for that long.
    ///
    /// # Errors
    /// [`TuneError::Io`].
    pub fn thread(
        peer: usize,
        count: usize,
        folder: &Path,
        patience: Duration,
        device: &B::Device,
    ) -> Result<Self, TuneError> {
        Self::new(peer, count, folder, patience, device, None)
    }

    /// A process of this machine; the first one has the orchestrators. `2 + 2 * count` ports from the given one
    /// on are used, which `burn-collective` opens to all networks.
    ///
    /// # Errors
    /// [`TuneError::Io`], [`TuneError::Setting`], [`TuneError::Port`].
    pub fn process(
        peer: usize,
        count: usize,
        port: u16,
        folder: &Path,
        patience: Duration,
        device: &B::Device,
    ) -> Result<Self, TuneError> {
        let last = usize::from(port) + usize::from(TURNS) * (count + 1) - 1;
        if peer >= count || port == 0 || last > usize::from(u16::MAX) {
            return Err(TuneError::Setting {
                setting: "peer and peer_port",
                reason: "are a number below that of the peers, and the first of 2 + 2 * peers ports",
            });
        }
        let mut new = Self::new(peer, count, folder, patience, device, Some(port))?;
        for turn in 0..TURNS {
            let orchestrator = (peer == 0).then_some(port + turn);
            for port in orchestrator.into_iter().chain([own_port(port, peer, turn)]) {
                // Whoever cannot open a port says nothing there.
                let open = TcpListener::bind(("0.0.0.0", port));
                drop(open.map_err(|source| TuneError::Port { port, source })?);
            }
        }
        if peer == 0 {
            let runtime = Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build();
            let runtime = runtime.map_err(|source| TuneError::Port { port, source })?;
            for turn in 0..TURNS {
                // A signal ends one for good, but the run goes on until its step is done.
                runtime.spawn(async move {
                    loop {
                        start_global_orchestrator(port + turn).await;
                        tokio::time::sleep(PAUSE).await;
                    }
                });
            }
            new.orchestrators = Some(runtime);
        }
        Ok(new)
    }

    fn new(
        peer: usize,
        count: usize,
        folder: &Path,
        patience: Duration,
        device: &B::Device,
        port: Option<u16>,
    ) -> Result<Self, TuneError> {
        Ok(Self {
            peer,
            count,
            device: device.clone(),
            patience,
            arrivals: Arrivals::new(folder, peer, count)?,
            port,
            sums: 0,
            orchestrators: None,
            is_complete: false,
            is_here: Arc::new(()),
        })
    }

    /// What is registered for a sum, if that is due: threads once; nodes for every sum, since those of 0.21 wait
    /// without end for the second one (`SyncService::sync` clears a copy of who has come).
    fn registration(&self, sum: usize) -> Option<CollectiveConfig> {
        let config = CollectiveConfig::default();
        let Some(port) = self.port else {
            return (sum == 0).then(|| config.with_num_devices(self.count));
        };
        // An orchestrator gives numbers twice where one node registers anew before another has finished: so two
        // take turns.
        let turn = (sum % usize::from(TURNS)) as u16;
        let own = own_port(port, self.peer, turn);
        Some(
            config
                .with_num_devices(1)
                .with_num_nodes(self.count as u32)
                .with_global_address(address(port + turn)?)
                .with_node_address(address(own)?)
                .with_data_service_port(own)
                // In one place, so that all have the same bits.
                .with_global_all_reduce_strategy(AllReduceStrategy::Centralized),
        )
    }

    /// Where all peers show their numbers for a sum.
    fn servers(&self, sum: usize) -> Vec<(Ipv4Addr, u16)> {
        let turn = (sum % usize::from(TURNS)) as u16;
        let ports = self.port.into_iter().flat_map(|port| {
            let peers = 0..self.count;
            peers.map(move |peer| own_port(port, peer, turn))
        });
        ports.map(|port| (Ipv4Addr::LOCALHOST, port)).collect()
    }

    /// Begins a sum in a thread.
    fn begin(
        &self,
        sum: usize,
        numbers: Tensor<B, 1>,
    ) -> Receiver<Result<Tensor<B, 1>, CollectiveError>> {
        let (sender, receiver) = sync_channel(1);
        let id = PeerId::from(self.peer);
        let (device, registration) = (self.device.clone(), self.registration(sum));
        let numbers = numbers.into_primitive().tensor();
        let is_here = Arc::downgrade(&self.is_here);
        let servers = self.servers(sum);
        thread::spawn(move || {
            let go = || {
                if let Some(config) = registration {
                    if sum > 0 {
                        finish_collective::<B>(id)?;
                    }
                    register::<B>(id, device, config)?;
                }
                // Nodes are registered before their servers listen, and panic where another's does not yet.
                for server in servers {
                    while is_here.strong_count() > 0 && TcpStream::connect(server).is_err() {
                        thread::sleep(SOON);
                    }
                }
                // One that was given up may be registered by those that come later.
                if is_here.strong_count() == 0 {
                    return Err(CollectiveError::LocalServerMissing);
                }
                let sum = all_reduce::<B>(id, numbers, ReduceOperation::Sum)?;
                Ok(Tensor::from_primitive(TensorPrimitive::Float(sum)))
            };
            // Nobody listens where a run has ended.
            let _ = sender.send(go());
        });
        receiver
    }

    /// Why a sum does not come, with those that it is for.
    fn lost(&self, sum: usize, reason: String) -> TuneError {
        let mut missing = self.arrivals.missing(sum);
        if missing.is_empty() {
            missing = (0..self.count).filter(|&peer| peer != self.peer).collect();
        }
        TuneError::PeersLost {
            peers: names(&missing),
            reason,
        }
    }
}

impl<B: Backend> Peers<B> for Collective<B> {
    fn peer(&self) -> usize {
        self.peer
    }

    fn count(&self) -> usize {
        self.count
    }

    fn sum(&mut self, numbers: Tensor<B, 1>) -> Result<Tensor<B, 1>, TuneError> {
        let sum = self.sums;
        self.sums += 1;
        self.is_complete = false;
        self.arrivals.arrive(sum)?;
        let receiver = self.begin(sum, numbers);
        let began = Instant::now();
        let (mut dead_since, mut failed) = (None, None);
        loop {
            match receiver.recv_timeout(LOOK) {
                Ok(Ok(sum)) => {
                    self.is_complete = true;
                    return Ok(sum);
                }
                Ok(Err(error)) => failed = Some(format!("could not be summed with: {error:?}")),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    failed.get_or_insert("could not be summed with".into());
                    thread::sleep(LOOK);
                }
            }
            // Of processes some may not have begun when the first sum is due.
            let is_dead = (sum > 0 || self.port.is_none()) && !self.arrivals.dead().is_empty();
            dead_since = match is_dead || failed.is_some() {
                true => dead_since.or(Some(Instant::now())),
                false => None,
            };
            if dead_since.is_some_and(|since| since.elapsed() >= GRACE) {
                let ended = is_dead.then(|| "has ended".into());
                return Err(self.lost(sum, ended.or(failed).unwrap_or_default()));
            }
            if began.elapsed() >= self.patience {
                let reason = format!("has not come within {} s", self.patience.as_secs());
                return Err(self.lost(sum, reason));
            }
        }
    }
}

impl<B: Backend> Drop for Collective<B> {
    fn drop(&mut self) {
        if self.port.is_none() && self.sums > 0 {
            // Whoever still waits is told that nobody comes.
            reset_collective::<B>();
        }
        if self.port.is_some() && self.is_complete {
            let (sender, receiver) = sync_channel(1);
            let id = PeerId::from(self.peer);
            thread::spawn(move || sender.send(finish_collective::<B>(id)));
            let _ = receiver.recv_timeout(GRACE);
            // The others finish at the orchestrators, too.
            let began = Instant::now();
            while self.orchestrators.is_some()
                && self.arrivals.dead().len() + 1 < self.count
                && began.elapsed() < GRACE
            {
                thread::sleep(PAUSE);
            }
        }
        if let Some(runtime) = self.orchestrators.take() {
            runtime.shutdown_background();
        }
    }
}

/// Where a peer shows its numbers to others.
fn own_port(port: u16, peer: usize, turn: u16) -> u16 {
    port + TURNS * (peer as u16 + 1) + turn
}

fn address<A: FromStr>(port: u16) -> Option<A> {
    format!("ws://127.0.0.1:{port}").parse().ok()
}
