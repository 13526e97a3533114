//! The `livepoint` command.

mod args;
mod bench;
mod clone;
mod confined;
mod console_log;
mod demo;
mod domain;
mod image;
mod output;
mod periodic;
mod scratch;
mod vm_process;
mod worker;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser};

use args::{Arguments, Command};
use output::Output;

/// What every subcommand needs.
pub(crate) struct Context {
    output: Output,
    runtime_dir: std::path::PathBuf,
}

impl Context {
    fn runtime(&self) -> anyhow::Result<crate::host::RuntimeDir> {
        Ok(crate::host::RuntimeDir::at(&self.runtime_dir)?)
    }
}

/// Returns the parser of the command's arguments, for its man pages and completions.
pub fn command() -> clap::Command {
    Arguments::command()
}

/// Parses the process's arguments, does what they say, and returns the exit status.
///
/// Status 0: done. 1: it failed, with the reason on stderr. 2: the arguments are wrong.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    env_logger::Builder::new()
        .filter_level(arguments.log_level())
        .parse_env("LIVEPOINT_LOG")
        .format_timestamp_micros()
        .init();
    match dispatch(arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("livepoint: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let context = Context {
        output: Output::new(arguments.json),
        runtime_dir: arguments.runtime_dir(),
    };
    match arguments.command {
        Command::Run(args) => return worker::run(&context, &args),
        Command::Restore(args) => return worker::restore(&context, &args),
        Command::Checkpoint(args) => domain::checkpoint(&context, &args)?,
        Command::Clone(args) => clone::run(&context, &args)?,
        Command::Rewind(args) => domain::rewind(&context, &args)?,
        Command::List => domain::list(&context)?,
        Command::Status(args) => domain::status(&context, &args.name)?,
        Command::Dumpxml(args) => domain::dump_xml(&context, &args.name)?,
        Command::Pause(args) => domain::act(&context, &args.name, domain::Action::Pause)?,
        Command::Resume(args) => domain::act(&context, &args.name, domain::Action::Resume)?,
        Command::Shutdown(args) => domain::act(&context, &args.name, domain::Action::Shutdown)?,
        Command::Reset(args) => domain::act(&context, &args.name, domain::Action::Reset)?,
        Command::Destroy(args) => domain::act(&context, &args.name, domain::Action::Destroy)?,
        Command::Inspect(args) => image::inspect(&context, &args)?,
        Command::Verify(args) => return image::verify(&context, &args),
        Command::Rebase(args) => image::rebase(&context, &args)?,
        Command::Gc(args) => image::gc(&context, &args)?,
        Command::Guests(args) => image::guests(&context, &args)?,
        Command::Demo(args) => return demo::demo(&context, &args),
        Command::Bench(args) => bench::bench(&context, &args)?,
    }
    Ok(ExitCode::SUCCESS)
}
