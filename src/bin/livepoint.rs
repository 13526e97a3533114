//! livepoint
fn main() {}
