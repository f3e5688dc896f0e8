//! `reroute`: ask a vision-language model, with recoverable visual-token routing.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use mimalloc::MiMalloc;
use reroute_cli::args::{Args, Command};
use reroute_cli::heap;

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Exit code for everything that is wrong with the input, the same that wrong flags have.
const BAD_INPUT: u8 = 2;

fn main() -> ExitCode {
    heap::keep_freed_memory();
    let args = Args::parse();
    let run = || {
        // Not locked: what peers are joined by prints, too.
        let mut out = io::stdout();
        reroute_cli::run(&args.command, &mut out)?;
        anyhow::Ok(out.flush()?)
    };
    let result = match args.command {
        // It waits, and would take one of the pool's threads to do so.
        Command::Serve(_) => run(),
        Command::Tune(ref tune) if tune.peers > 1 => run(),
        // From one of the pool's own threads a CPU operation starts several times faster than from outside.
        _ => rayon::scope(|_| run()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // A reader that has seen enough (`| head`) is no failure.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: {error}");
            let mut said = error.to_string();
            for cause in error.chain().skip(1).map(ToString::to_string) {
                // Transparent errors repeat their source's words.
                if !said.contains(&cause) {
                    let _ = writeln!(io::stderr(), "  because: {cause}");
                    said = cause;
                }
            }
            ExitCode::from(BAD_INPUT)
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io_error = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<io::Error>());
    io_error.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
