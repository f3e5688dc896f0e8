//! LLaVA-1.5-7B layer shapes with random weights: vision, prefill, selection and decoding, then a
//! table of measured speed-ups beside their FLOP ceilings.
//!
//! `cargo bench -p benches` runs everything; `cargo bench -p benches -- decode` what matches. The
//! table is printed when nothing is filtered, and kept as JSON when `REROUTE_BENCH_OUT` names a file.

mod shapes;
mod single;
mod table;

fn main() {
    println!("backend {}", reroute_cli::backend::NAME);
    divan::main();
    let only_some = std::env::args().skip(1).any(|argument| argument != "--bench");
    if !only_some {
        table::run();
    }
}
