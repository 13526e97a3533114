//! The `livepoint` command.

fn main() -> std::process::ExitCode {
    livepoint::cli::main()
}
