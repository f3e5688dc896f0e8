//! The `reroute` program. Other leaf packages share its [`backend`], the one that is compiled in,
//! and the setting of its [`heap`].

pub mod args;
pub mod ask;
pub mod backend;
pub mod calibrate;
pub mod chat;
pub mod compare;
pub mod convert;
pub mod doctor;
mod draw;
pub mod eval;
pub mod explain;
pub mod ground;
pub mod heap;
mod hub;
mod known;
mod open;
mod output;
pub mod presets;
mod progress;
pub mod serve;
mod shell;
mod source;
pub mod trace;
pub mod tune;

use std::io::Write;

use args::Command;

/// Runs one command; everything it has to say goes to `out`, progress and notes to stderr.
pub fn run(command: &Command, out: &mut dyn Write) -> anyhow::Result<()> {
    match command {
        Command::Ask(args) => ask::run(args, out),
        Command::Chat(args) => chat::run(args, out),
        Command::Ground(args) => ground::run(args, out),
        Command::Explain(args) => explain::run(args, out),
        Command::Calibrate(args) => calibrate::run(args, out),
        Command::Compare(args) => compare::run(args, out),
        Command::Trace(args) => trace::run(args, out),
        Command::Presets(args) => presets::run(args, out),
        Command::Convert(args) => convert::run(args, out),
        Command::Tune(args) => tune::run(args, out),
        Command::Serve(args) => serve::run(args, out),
        Command::Eval(args) => eval::run(args, out),
        Command::Doctor(args) => doctor::run(args, out),
        Command::Completions(args) => shell::completions(args, out),
        Command::Man => shell::manual(out),
    }
}
