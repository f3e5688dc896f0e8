//! `reroute completions` and `reroute man`: what a shell and a reader want to know of the program.

use std::io::Write;

use clap::CommandFactory;
use clap_complete::generate;
use clap_mangen::Man;

use crate::args::{Args, CompletionsArgs};

/// Prints the script that completes commands and flags.
pub(crate) fn completions(args: &CompletionsArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    // Made in memory: the generator panics where it cannot write.
    let mut script = Vec::new();
    generate(args.shell, &mut Args::command(), "reroute", &mut script);
    Ok(out.write_all(&script)?)
}

/// Prints the manual page: the program, then each of its commands.
pub(crate) fn manual(out: &mut dyn Write) -> anyhow::Result<()> {
    let mut program = Args::command().disable_help_subcommand(true);
    program.build();
    Man::new(program.clone()).render(out)?;
    for command in program.get_subcommands() {
        let page = Man::new(command.clone());
        let name = command.get_name().to_uppercase();
        writeln!(out, ".SH \"REROUTE {name}\"")?;
        page.render_description_section(out)?;
        page.render_synopsis_section(out)?;
        page.render_options_section(out)?;
    }
    Ok(())
}
