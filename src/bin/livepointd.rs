//! The `livepointd` daemon.

fn main() -> std::process::ExitCode {
    livepoint::daemon::main()
}
