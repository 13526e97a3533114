//! Symbol versions: each function is exported as `NAME@@LIVEPOINT_VERSION`, with the version of
//! the ABI that it came with, so that a program says which it was linked against.
//!
//! A function whose meaning changes gets a second one beside it with a later version; programs
//! that were linked before keep the first. The versions themselves are in `livepoint.map`.

/// Gives functions of this module their version. Must be in the module that has them: the
/// assembler wants to see a function whose version it sets. Not in the program of the unit tests: it
/// exports nothing, so that the optimiser may leave no such function.
macro_rules! symbol_versions {
    ($version:literal: $($name:ident),+ $(,)?) => {
        $(#[cfg(not(test))]
        std::arch::global_asm!(concat!(
            ".symver ", stringify!($name), ", ", stringify!($name), "@@LIVEPOINT_", $version
        ));)+
    };
}
