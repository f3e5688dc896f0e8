//! What `burn-collective` 0.21 does with sums between threads and between processes of one machine.
//!
//! ```sh
//! collective threads N ROUNDS              # N threads of this process
//! collective node I N PORT ROUNDS [anew]   # process I of N; process 0 is the orchestrator, too
//! ```
//! With `anew` a node registers before every sum and finishes behind it. What it prints, but for the logs:
//!
//! ```text
//! $ collective threads 3 2                     $ collective node 0 2 7300 3        (and node 1, beside it)
//! peer 0, 0.0 s: registered: Ok(())            peer 0, 1.0 s: registered: Ok(())
//! peer 0, 0.0 s: sum 0: Ok([6.0, …             peer 0, 1.0 s: sum 0: Ok([3.0, …
//! peer 0, 0.3 s: sum 1: Ok([12.0, …            (nothing more, until it is killed)
//! peer 0, 0.6 s: finished: Ok(())
//!                                              $ collective node 0 2 7300 2 anew
//!                                              peer 0, 0.0 s: registered: Ok(())
//!                                              peer 0, 0.0 s: sum 0: Ok([3.0, …
//!                                              peer 0, 0.1 s: finished: Ok(())
//!                                              peer 0, 0.4 s: registered: Ok(())
//!                                              peer 0, 0.4 s: sum 1: Ok([6.0, …
//! ```
//! Nodes never get past a second sum of one registration: `SyncService::sync` clears a copy of the list of those
//! that have come, so that it holds each twice when they come again, and is never the list that is waited for.

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use burn::tensor::{Tensor, TensorPrimitive};
use burn_collective::{
    AllReduceStrategy, CollectiveConfig, PeerId, ReduceOperation, all_reduce, finish_collective,
    register, start_global_orchestrator,
};
use burn_flex::Flex;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse::<u16>().expect("a number");
    match words[..] {
        ["threads", peers, rounds] => {
            let (peers, rounds) = (number(peers), number(rounds));
            let config = CollectiveConfig::default().with_num_devices(peers.into());
            thread::scope(|scope| {
                for peer in 0..peers {
                    let config = &config;
                    scope.spawn(move || go(peer, peers, config, rounds, false));
                }
            });
        }
        ["node", peer, peers, port, rounds, ref anew @ ..] => {
            let (peer, peers, port) = (number(peer), number(peers), number(port));
            if peer == 0 {
                thread::spawn(move || {
                    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
                    runtime.block_on(start_global_orchestrator(port));
                });
            }
            let address = |port: u16| format!("ws://127.0.0.1:{port}").parse().expect("one");
            let own = port + 1 + peer;
            let config = CollectiveConfig::default()
                .with_num_devices(1)
                .with_num_nodes(peers.into())
                .with_global_address(address(port))
                .with_node_address(address(own))
                .with_data_service_port(own)
                .with_global_all_reduce_strategy(AllReduceStrategy::Centralized);
            go(peer, peers, &config, number(rounds), anew == ["anew"]);
        }
        _ => {
            eprintln!("collective threads N ROUNDS | collective node I N PORT ROUNDS [anew]");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

fn go(peer: u16, peers: u16, config: &CollectiveConfig, rounds: u16, anew: bool) {
    let id = PeerId(peer.into());
    let device = Default::default();
    let began = Instant::now();
    let said = |what: String| {
        println!(
            "peer {peer}, {:.1} s: {what}",
            began.elapsed().as_secs_f64()
        )
    };
    for round in 0..rounds {
        if anew || round == 0 {
            let result = register::<Flex>(id, Default::default(), config.clone());
            said(format!("registered: {result:?}"));
        }
        let value = f32::from(peer + 1) * f32::from(round + 1);
        let tensor = Tensor::<Flex, 1>::full([4], value, &device);
        let TensorPrimitive::Float(tensor) = tensor.into_primitive() else {
            unreachable!("floats");
        };
        let sum = all_reduce::<Flex>(id, tensor, ReduceOperation::Sum);
        let sum = sum.map(|sum| {
            let sum = Tensor::<Flex, 1>::from_primitive(TensorPrimitive::Float(sum));
            sum.into_data().to_vec::<f32>().expect("floats")
        });
        let expected = f32::from(peers * (peers + 1) / 2) * f32::from(round + 1);
        said(format!("sum {round}: {sum:?}, expected {expected}"));
        if anew {
            let result = finish_collective::<Flex>(id);
            said(format!("finished: {result:?}"));
        }
        thread::sleep(Duration::from_millis(300));
    }
    if !anew {
        let result = finish_collective::<Flex>(id);
        said(format!("finished: {result:?}"));
    }
}
